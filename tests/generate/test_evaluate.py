import copy
import math

import numpy as np
import pytest

from sage_jax.generate import evaluate, tasks

TASK = tasks.resolve("arithmetic")


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (41, 100), (1, 1)])
def test_wilson_ends_solve_the_score_equation(right, count):
    """The interval's ends are where |p_hat - p| equals z standard deviations of p itself."""
    z, found = 1.959964, evaluate.wilson(right, count)
    assert found.mean == right / count
    for end in (found.low, found.high):
        at_a_bound = end in (0.0, 1.0)
        distance = abs(right / count - end)
        assert at_a_bound or distance == pytest.approx(z * math.sqrt(end * (1 - end) / count))
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_wilson_covers_the_true_share_about_95_percent_of_the_time():
    count, share = 40, 0.3
    chance = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    covered = [evaluate.wilson(k, count).low <= share <= evaluate.wilson(k, count).high
               for k in range(count + 1)]  # fmt: skip
    assert np.dot(chance, covered) == pytest.approx(0.95, abs=0.02)


def test_wilson_refuses_impossible_counts_and_bounds_nothing_without_trials():
    with pytest.raises(ValueError, match=r"0\.\.count"):
        evaluate.wilson(3, 2)
    empty = evaluate.wilson(0, 0)
    assert math.isnan(empty.mean) and (empty.low, empty.high) == (0.0, 1.0)


class _Oracle:
    """Stands in for the sampler: right on odd levels, wrong on even ones, cut off on level 8."""

    def __call__(self, model, params, tokenizer, prompts, **settings):
        from sage_jax.generate import sampler

        out = []
        for prompt in prompts:
            level = (len(prompt) - 2) // 2
            answer = self.solutions[prompt] if level % 2 else "0=99"
            out.append([sampler.Completion(answer, 5, level != 8)])
        return out


def test_accuracy_is_counted_overall_and_per_level(monkeypatch):
    problems = tasks.problems(TASK, count=64, seed=0, split="eval")
    oracle = _Oracle()
    oracle.solutions = {p.prompt: p.solution for p in problems}
    monkeypatch.setattr(evaluate.sampler, "generate", oracle)
    found = evaluate.greedy_accuracy(
        None, None, None, problems, check=TASK.check, max_new_tokens=48
    )
    assert (found.overall.right, found.overall.count) == (32, 64)
    assert {level: a.mean for level, a in found.by_level.items()} == {
        level: level % 2 for level in range(1, 9)
    }
    assert found.unfinished == 8
    assert found.right_P.tolist() == [p.level % 2 == 1 for p in problems]


def test_an_untrained_model_is_evaluated_end_to_end(model, params, tokenizer):
    problems = tasks.problems(TASK, count=16, seed=0, split="eval")
    found = evaluate.greedy_accuracy(
        model, params, tokenizer, problems, check=TASK.check, max_new_tokens=8
    )
    assert found.overall.count == 16 and len(found.completions) == 16
    assert found.overall.right == sum(
        TASK.check(c, p.answer) for c, p in zip(found.completions, problems, strict=True)
    )


def test_a_chat_model_is_asked_in_a_users_turn(model, params, tokenizer):
    problems = tasks.problems(TASK, count=4, seed=0, split="eval")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}0"
    asked = [problem._replace(prompt=problem.prompt + "0") for problem in problems]
    settings = {"check": TASK.check, "max_new_tokens": 8}
    assert (
        evaluate.greedy_accuracy(model, params, chat, problems, **settings).completions
        == evaluate.greedy_accuracy(model, params, tokenizer, asked, **settings).completions
    )


def test_no_problems_is_an_error(model, params, tokenizer):
    with pytest.raises(ValueError, match="no problems"):
        evaluate.greedy_accuracy(model, params, tokenizer, [], check=TASK.check, max_new_tokens=8)


def test_preference_accuracy_counts_strictly_larger_margins():
    logps_N2 = np.array([[-1.0, -2.0], [-2.0, -1.0], [-3.0, -3.0], [-5.0, -9.0]])
    found = evaluate.preference_accuracy(logps_N2)
    assert (found.right, found.count) == (2, 4)
    assert evaluate.preference_accuracy(logps_N2, logps_N2).mean == 0.0
    ref_N2 = np.array([[0.0, -3.0], [-3.0, 0.0], [-1.0, -1.0], [0.0, 0.0]])
    assert evaluate.preference_accuracy(logps_N2, ref_N2).mean == 0.5
