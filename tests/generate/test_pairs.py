import copy
import json

import pytest

from sage_jax.generate import pairs, sampler, tasks

TASK = tasks.resolve("arithmetic")


def _answer(text, finished=True):
    return sampler.Completion(text, len(text), finished)


PROBLEM = tasks.Problem("7+5=", "7+5=12", "12", 1)


def _make(texts, **settings):
    answers = [_answer(t) if isinstance(t, str) else t for t in texts]
    return pairs.make_pairs([PROBLEM], [answers], check=TASK.check, task="arithmetic", **settings)


def test_a_pair_is_a_right_answer_against_a_wrong_one_with_its_columns():
    records, tally = _make(["7+5=12", "7+5=13", "7+5=12", "7+5=12"])
    assert records == [
        {
            "prompt": "7+5=",
            "chosen": "7+5=12",
            "rejected": "7+5=13",
            "pass_rate": 0.75,
            "level": 1,
            "task": "arithmetic",
            "answer": "12",
        }
    ]
    assert tally == pairs.Yield(1, 1, 0, 0, 1, 0.75, 0)


def test_problems_that_give_no_pair_are_counted_by_reason():
    problems = [PROBLEM] * 3
    answers = [[_answer("=12")] * 2, [_answer("=13")] * 2, [_answer("=12"), _answer("=1")]]
    records, tally = pairs.make_pairs(problems, answers, check=TASK.check, task="arithmetic")
    assert (tally.problems, tally.with_pairs, tally.no_wrong, tally.no_right) == (3, 1, 1, 1)
    assert tally.pairs == len(records) == 1
    assert tally.pass_rate == 0.5


def test_unfinished_and_empty_answers_are_in_no_pair():
    cut_right, cut_wrong = _answer("7+5=12", False), _answer("7+5=1", False)
    records, tally = _make([cut_right, cut_wrong, "", "7+5=12"])
    assert records == []
    assert (tally.no_wrong, tally.unfinished, tally.pass_rate) == (1, 2, 0.25)


@pytest.mark.parametrize(("rights", "wrongs"), [(1, 1), (2, 2), (2, 3), (4, 2), (1, 5)])
@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_pairs_of_a_problem_are_different_and_at_most_as_many_as_asked(rights, wrongs, most):
    texts = [f"{i}=12" for i in range(rights)] + [f"{i}=7" for i in range(wrongs)]
    records, _ = _make(texts * 2, per_problem=most)
    found = [(r["chosen"], r["rejected"]) for r in records]
    assert len(set(found)) == len(found) == min(most, rights * wrongs)
    assert all(c.endswith("=12") and r.endswith("=7") for c, r in found)
    if most >= max(rights, wrongs):
        assert {c for c, _ in found} == set(texts[:rights])


def test_the_choice_of_pairs_is_a_function_of_the_seed():
    texts = [f"{i}=12" for i in range(6)] + [f"{i}=7" for i in range(6)]
    assert _make(texts, per_problem=2, seed=1) == _make(texts, per_problem=2, seed=1)
    assert any(_make(texts, seed=0) != _make(texts, seed=seed) for seed in range(1, 5))


def _half_right(prompt, answer):
    """A check under which an untrained model has right and wrong answers."""
    return len(prompt) % 2 == 0


def _sample(model, params, tokenizer, **settings):
    problems = tasks.problems(TASK, count=12, seed=0)
    settings = {
        "check": _half_right, "task": "parity", "max_new_tokens": 24, "samples": 6, "batch": 24,
        "per_problem": 2,
    } | settings  # fmt: skip
    return pairs.sample_pairs(model, params, tokenizer, problems, **settings)


def test_sampled_pairs_are_verified_and_reproducible(model, params, tokenizer, tmp_path):
    records, tally = _sample(model, params, tokenizer)
    assert records and tally.pairs == len(records)
    assert all(_half_right(r["chosen"], "") and not _half_right(r["rejected"], "") for r in records)
    assert all(0 < r["pass_rate"] < 1 for r in records)
    assert (records, tally) == _sample(model, params, tokenizer)
    path = tmp_path / "new" / "pairs.jsonl"
    assert pairs.write_jsonl(path, records) == len(records)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]


def test_the_work_of_sampling_is_that_of_every_answer_with_its_prompt(model, params, tokenizer):
    _, tally = _sample(model, params, tokenizer)
    prompts = [tokenizer(p.prompt)["input_ids"] for p in tasks.problems(TASK, count=12, seed=0)]
    answers = sampler.generate(
        model, params, tokenizer, [p.prompt for p in tasks.problems(TASK, count=12, seed=0)],
        max_new_tokens=24, temperature=1.0, samples=6, batch=24,
    )  # fmt: skip
    whole = [len(p) + a.tokens for p, found in zip(prompts, answers, strict=True) for a in found]
    assert tally.tokens == sum(whole)
    assert tally.attended == sum(sum(range(1, n + 1)) for n in whole)
    ends = sum(a.finished for found in answers for a in found)
    assert tally.new_tokens == sum(whole) - 6 * sum(map(len, prompts)) + ends


def test_written_pairs_are_read_back_by_the_data_reader(tmp_path):
    from sage_jax.data import records as reader

    records, _ = _make(["7+5=12", "7+5=13"])
    pairs.write_jsonl(tmp_path / "pairs.jsonl", records)
    (row,) = reader.read(tmp_path / "pairs.jsonl").rows
    assert (row.prompt, row.chosen, row.rejected) == ("7+5=", "7+5=12", "7+5=13")
    assert row.columns["pass_rate"] == 0.5 and row.columns["level"] == 1


def test_with_a_chat_template_pairs_are_conversational(model, params, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    plain, _ = _sample(model, params, tokenizer)
    records, _ = _sample(model, params, chat)
    assert [r["chosen"] for r in records] == [
        [{"role": "assistant", "content": r["chosen"]}] for r in plain
    ]
    assert records[0]["prompt"] == [{"role": "user", "content": plain[0]["prompt"]}]


def test_repeated_problems_are_sampled_once(model, params, tokenizer):
    _, tally = pairs.sample_pairs(
        model, params, tokenizer, [PROBLEM] * 5, check=TASK.check, task="arithmetic",
        max_new_tokens=2, samples=2,
    )  # fmt: skip
    assert tally.problems == 1


@pytest.mark.parametrize("bad", [{"samples": 1}, {"temperature": 0.0}, {"per_problem": 0}])
def test_settings_that_cannot_give_pairs_are_errors(bad, model, params, tokenizer):
    with pytest.raises(ValueError, match="pairs need"):
        _sample(model, params, tokenizer, **bad)
