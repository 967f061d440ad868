"""Iterated alignment: new pairs from the policy, in whole runs and piece by piece."""

import copy
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config, curriculum, rules
from sage_jax.data import encode, merge, records, steps
from sage_jax.generate import tasks
from sage_jax.report import writers
from sage_jax.runtime import (
    counters,
    dataset,
    evaluation,
    forward,
    loop,
    resample,
    resample_plan,
    setup,
    training,
)
from sage_jax.runtime import mesh as meshes

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Rounds of two steps: new pairs come before the steps 4 and 8, checkpoints after 3, 6, 9 and 12.
SMALL = {
    "train.steps": 12, "train.batch_pairs": 8, "curriculum.pool_size": 32, "checkpoint.every": 3,
    "eval.count": 16, "eval.every": 0, "eval.batch": 64, "data.limit": 100, "optim.lr": 2e-4,
    "rounds.resample": 2, "sample.count": 24, "sample.per_problem": 4,
    "selection.keep": 0.5, "selection.uniform_share": 0.5, "selection.refresh": 0.0,
}  # fmt: skip


def command(workdir, **changes):
    settings = [f"--config.{k}={v}" for k, v in (SMALL | changes).items()]
    return ["train", f"--config={ROOT / 'configs/online.py'}", f"--workdir={workdir}", *settings]


def small_run(**changes):
    return config.resolve(launcher.parse(command("unused", **changes))[1])


def rows_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def result(workdir):
    """What has to be the same, bit for bit."""
    files = [*(workdir / "selection").iterdir(), *(workdir / "resampled").iterdir()]
    return rows_of(workdir), {f.name: f.read_bytes() for f in sorted(files)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A loaded model, its data and what new pairs need, for runs inside this process."""
    base = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(base))
        run, mesh = small_run(), meshes.make_mesh(devices=jax.devices()[:1])
        policy = setup.load_policy(run, mesh)
        pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
        problems = resample_plan.load_problems(run, policy.tokenizer, None, None)
        lengths = pairs.row_lengths(True)
        lengths = resample_plan.planned(run, policy.tokenizer, pairs, problems, lengths)
        passes = forward.Passes(policy, mesh, setup.row_shape(run, lengths, mesh, share=True))
        stats = forward.stored_stats(run, policy, passes, pairs, "reference")
        longest = int(lengths.max())
        resampler = resample.Resampler(run, policy, passes, None, problems, longest)
    return {"policy": policy, "passes": passes, "pairs": pairs, "start": stats,
            "reference": stats.logps, "resampler": resampler}  # fmt: skip


def trainer_of(job, workdir, run):
    workdir.mkdir(parents=True, exist_ok=True)
    return loop.Trainer(run, workdir, **job, evaluate=lambda _: {}, label="test")


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
    base = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(base / "cache"))
        trainer = trainer_of(job, base / "run", small_run())
        outcome = trainer.train(lambda: False)
    return base / "run", trainer, outcome


def params_of(trainer):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state.params)]


def assert_same(trainer, workdir, uninterrupted):
    whole, other, _ = uninterrupted
    mine, theirs = result(workdir), result(whole)
    assert mine[0] == theirs[0]
    assert mine[1] == theirs[1]
    for a, b in zip(params_of(trainer), params_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


# --- a run with new pairs


def test_new_pairs_join_the_data_with_reference_and_memory_of_the_same_length(job, uninterrupted):
    workdir, trainer, _ = uninterrupted
    files = sorted((workdir / "resampled").iterdir())
    assert [f.name for f in files] == ["round_00002.jsonl", "round_00004.jsonl"]
    sampled = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    task = tasks.resolve("arithmetic")
    assert all(task.check(r["chosen"], r["answer"]) for r in sampled)
    assert not any(task.check(r["rejected"], r["answer"]) for r in sampled)
    assert {tasks.split_of(r["prompt"]) for r in sampled} == {"train"}
    rows = [row for row in rows_of(workdir) if "resample/pairs" in row]
    assert [row["step"] for row in rows] == [4, 8]
    joined = int(sum(row["resample/pairs"] for row in rows))
    assert joined + sum(row["resample/duplicates"] for row in rows) == len(sampled)
    assert 0 < joined and len(trainer.pairs) == len(job["pairs"]) + joined
    assert rows[-1]["resample/data"] == len(trainer.pairs)
    assert all(len(a) == len(trainer.pairs) for a in (*trainer.memory, trainer.reference))
    assert np.isfinite(trainer.memory.likelihood_margin).all()
    new = np.arange(len(trainer.pairs)) >= len(job["pairs"])
    assert trainer.memory.trained[new].sum() > 0
    assert trainer.pairs.origin[-1].startswith("resampled/round_00004.jsonl:")


def test_the_reference_of_new_pairs_is_the_starting_model_not_the_policy(job, uninterrupted):
    _, trainer, _ = uninterrupted
    everything = np.arange(len(trainer.pairs))
    start = job["passes"].stats(job["policy"].params, trainer.pairs, everything).logps
    now = job["passes"].stats(trainer.state.params, trainer.pairs, everything).logps
    np.testing.assert_allclose(trainer.reference, start, atol=2e-4)
    assert np.abs(now - start).max() > 0.1


def test_the_train_step_is_compiled_for_few_row_lengths(uninterrupted):
    _, trainer, _ = uninterrupted
    assert 1 <= len(trainer.train_step.known) <= steps.SIZES


def test_sampling_counts_in_the_total_and_new_margins_as_scoring(uninterrupted):
    workdir, trainer, outcome = uninterrupted
    spent, rows = outcome.counters, rows_of(workdir)
    assert spent.flops_sampling > 0 and spent.seconds_sampling > 0
    new = encode.take(trainer.pairs, np.arange(100, len(trainer.pairs)))
    light = counters.pair_flops(trainer.policy.model, new, shared=True).sum()
    assert spent.flops_scoring == pytest.approx(light)
    total = spent.flops_sampling + spent.flops_scoring + spent.flops_training
    assert rows[-1]["flops"] == pytest.approx(total)
    sampled = [row.get("flops_sampling", 0.0) for row in rows]
    assert sampled[3] == 0 < sampled[4] == sampled[7] < sampled[8] == spent.flops_sampling


def grown(job, params, tmp_path, **changes):
    """One resampling before round 2, with its trainer."""
    run = small_run(**changes)
    trainer = trainer_of(job, tmp_path / "run", run)
    rule = {"difficulty_N": -np.asarray(trainer.memory.likelihood_margin, np.float64)}
    data = resample.Data(trainer.pairs, trainer.reference, trainer.memory, rule)
    found = job["resampler"].grow(
        run, tmp_path / "run", 2, params, data,
        loss=trainer.loss, score_fn=trainer.score_fn, stopped=lambda: False,
    )  # fmt: skip
    return trainer, found


def test_new_margins_are_those_of_the_policy_now(job, uninterrupted, tmp_path):
    moved = uninterrupted[1].state.params
    _, found = grown(job, moved, tmp_path, **{"selection.name": "easy_half"})
    new = np.arange(100, len(found.data.pairs))
    assert len(new) > 4
    logps = job["passes"].stats(moved, found.data.pairs, new).logps.astype(np.float64)
    reference = found.data.reference[new].astype(np.float64)
    likelihood = logps[:, 0] - logps[:, 1]
    memory = curriculum.recall(found.data.memory, new)
    np.testing.assert_allclose(memory.likelihood_margin, likelihood, atol=1e-3)
    reward = 0.3 * (likelihood - (reference[:, 0] - reference[:, 1]))
    np.testing.assert_allclose(memory.reward_margin, reward, atol=1e-3)
    assert np.abs(reward).max() > 0.01
    assert memory.last_round.tolist() == [2] * len(new) and not memory.drawn.any()
    # What a rule keeps of every pair begins for the new ones as it would have at a start.
    np.testing.assert_array_equal(found.data.rule["difficulty_N"][new], -memory.likelihood_margin)


def test_plain_dpo_pays_for_no_margins_of_new_pairs(job, tmp_path):
    _, found = grown(job, job["policy"].params, tmp_path, **{"selection.name": "uniform"})
    assert found.flops_scoring == 0 and found.flops_sampling > 0
    assert np.isnan(found.data.memory.likelihood_margin[100:]).all()


def test_a_chat_model_is_asked_by_messages_and_its_pairs_are_conversational(job, tmp_path):
    tokenizer = copy.deepcopy(job["policy"].tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    plain = job["resampler"]
    policy = dataclasses.replace(plain.policy, tokenizer=tokenizer)
    chat = resample.Resampler(
        small_run(), policy, plain.passes, None, plain.problems, plain.capacity
    )
    params = policy.params
    _, one = grown(job, params, tmp_path / "plain")
    _, other = grown(job | {"resampler": chat}, params, tmp_path / "chat")
    (row, *_) = (tmp_path / "chat/run/resampled/round_00002.jsonl").read_text().splitlines()
    assert json.loads(row)["prompt"][0]["role"] == "user"
    np.testing.assert_array_equal(one.data.pairs.tokens, other.data.pairs.tokens)


# --- interrupted runs


def crash(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_dies_after_sampling_goes_on_the_same(job, uninterrupted, tmp_path, monkeypatch):
    trainer = trainer_of(job, tmp_path / "run", small_run())
    first = loop.Trainer._next_round
    with monkeypatch.context() as patch:  # the file of round 2 is there, its checkpoint is not
        patch.setattr(loop.Trainer, "_next_round", lambda t: crash() if t.resampled else first(t))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(lambda: False)
    assert (tmp_path / "run/resampled/round_00002.jsonl").exists()
    trainer = trainer_of(job, tmp_path / "run", small_run())
    with monkeypatch.context() as patch:  # after the checkpoint of step 6, in round 4
        patch.setattr(
            loop.Trainer, "_next_round", lambda t: crash() if len(t.resampled) > 1 else first(t)
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.train(lambda: False)
    again = trainer_of(job, tmp_path / "run", small_run())
    sampled = []
    monkeypatch.setattr(
        resample.Resampler, "_sample",
        lambda *a, f=resample.Resampler._sample: sampled.append(a[2]) or f(*a),
    )  # fmt: skip
    again.train(lambda: False)
    assert sampled == [2]  # the first resampling is read back, not made again
    assert_same(again, tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_stop_while_sampling_saves_the_state_before_it(job, uninterrupted, tmp_path):
    calls = iter(range(10**6))
    trainer = trainer_of(job, tmp_path / "run", small_run())
    sampling = []
    resampler = copy.copy(job["resampler"])
    whole = resampler._sample

    def noted(*args):
        sampling.append(next(calls))
        return whole(*args)

    resampler._sample = noted
    trainer.resampler = resampler
    outcome = trainer.train(lambda: bool(sampling))
    assert not outcome.finished and outcome.counters.step == 4
    assert not (tmp_path / "run/resampled").exists()
    again = trainer_of(job, tmp_path / "run", small_run())
    assert again.train(lambda: False).finished
    assert_same(again, tmp_path / "run", uninterrupted)


def test_files_that_a_checkpoint_names_are_checked_and_give_its_data(job, tmp_path):
    run, (prompt, answer) = small_run(), ("7+5=", "7+5=12")
    row = {"prompt": prompt, "chosen": answer, "rejected": "7+5=11", "pass_rate": 0.5, "level": 1}
    file = resample.path(tmp_path, 2)
    writers.write_text(file, json.dumps(row) + "\n")
    entries = [resample.Entry(2, resample.digest(file.read_text()))]
    pairs = job["resampler"].replay(run, tmp_path, job["pairs"], entries)
    ids, start = pairs.sequence(len(pairs) - 1, 0)
    assert job["policy"].tokenizer.decode(ids[start:-1]) == answer and len(pairs) == 101
    file.write_text(file.read_text().replace("11", "13"))
    with pytest.raises(ValueError, match=r"round_00002.jsonl is not what it was"):
        job["resampler"].replay(run, tmp_path, job["pairs"], entries)
    file.unlink()
    with pytest.raises(ValueError, match=r"round_00002.jsonl is missing"):
        job["resampler"].replay(run, tmp_path, job["pairs"], entries)


def start(workdir, cache, **changes):
    env = os.environ | {"SAGE_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    # Killed, it must not leave half a program for others: it reads what they compiled, no more.
    env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = str(2**40)
    code = (
        "import sys, jax; jax.config.update('jax_num_cpu_devices', 8); "
        "from sage_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *command(workdir, **changes)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_when(process, came, seconds=900):
    end = time.monotonic() + seconds
    while not came():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"not in time: {process.communicate()}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_killed_runs_and_their_twin_go_on_bit_for_bit(tmp_path):
    """Killed when the first new pairs are on disk, after the next checkpoint, and in the twin."""
    twin = {"compare.uniform": True}
    assert launcher.main(command(tmp_path / "whole", **twin)) == 0
    workdir = tmp_path / "run"

    def lines(path):
        return path.read_text().count("\n") if path.exists() else 0

    for came in (
        (workdir / "resampled/round_00002.jsonl").exists,
        lambda: lines(workdir / "metrics.jsonl") >= 8,
        (workdir / "uniform/resampled/round_00002.jsonl").exists,
    ):
        kill_when(start(workdir, tmp_path / "other_cache", **twin), came)
    assert launcher.main(command(workdir, **twin)) == 0
    for part in ("", "uniform"):
        mine, whole = result(workdir / part), result(tmp_path / "whole" / part)
        assert mine[0] == whole[0]
        assert mine[1] == whole[1]
    weights = "export/model.safetensors"
    assert (workdir / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    mine, twins = (
        json.loads((workdir / part / "metrics.jsonl").read_text().splitlines()[-1])
        for part in ("", "uniform")
    )
    # The twin sampled for itself, and spent what the run spent, sampling counted.
    first = "resampled/round_00002.jsonl"
    assert (workdir / first).read_bytes() != (workdir / "uniform" / first).read_bytes()
    per_step = twins["flops_training"] / twins["step"]
    sampling = twins["flops_sampling"] - mine["flops_sampling"]
    assert abs(twins["flops"] - mine["flops"] - sampling) < 1.5 * per_step


# --- the pieces


def pretokenised(*ids):
    rows = [{"prompt_ids": [1], "chosen_ids": [i] * n, "rejected_ids": [0]} for i, n in ids]
    return encode.encode(records.read(rows), None, max_length=16)


def middle(pairs):
    return [int(pairs.sequence(i, 0)[0][1]) for i in range(len(pairs))]


OLD, NEW = ((2, 1), (3, 1), (4, 1), (5, 1)), ((6, 1), (3, 1), (7, 9), (6, 1), (8, 1))


@pytest.mark.parametrize(
    ("replace", "least", "left"),
    [
        ("none", 1, [2, 3, 4, 5, 6, 8]),
        ("oldest", 1, [4, 5, 6, 8]),  # the old 3 is known when its copy comes
        ("all", 1, [6, 3, 8]),  # the new 3 takes the place of the old one
        ("all", 5, [4, 5, 6, 3, 8]),
        ("all", 50, [2, 4, 5, 6, 3, 8]),
        ("oldest", 6, [2, 3, 4, 5, 6, 8]),
    ],
)
def test_merging_leaves_out_duplicates_and_what_does_not_fit(replace, least, left):
    old, new = pretokenised(*OLD), pretokenised(*NEW)
    found = merge.merge(old, new, capacity=8, replace=replace, least=least)
    assert middle(found.pairs) == left
    assert len({d.tobytes() for d in found.pairs.digest_N16}) == len(left)
    assert found.too_long == 1
    assert found.duplicates == (1 if replace == "all" else 2)
    assert middle(encode.take(old, found.stays)) + middle(encode.take(new, found.joins)) == left


def test_without_a_new_pair_nothing_leaves():
    old = pretokenised(*OLD)
    for replace in ("none", "oldest", "all"):
        found = merge.merge(old, pretokenised((7, 9)), capacity=8, replace=replace, least=1)
        assert middle(found.pairs) == middle(old) and not len(found.joins)


def problems_of(run, held=None):
    return resample_plan.load_problems(run, setup.load_tokenizer(run), held, None)


def drawn(run, number, problems=None):
    tokenizer = setup.load_tokenizer(run)
    problems = problems or problems_of(run)
    return [p.prompt for p in resample_plan.draw(problems, run, tokenizer, number)]


def test_a_task_gives_new_training_problems_each_time_that_depend_on_the_seed():
    run = small_run(**{"sample.count": 200})
    one, two, other = drawn(run, 1), drawn(run, 2), drawn(config.replace(run, seed=1), 1)
    assert one == drawn(run, 1) and {*map(tasks.split_of, one + two)} == {"train"}
    assert len({*one} & {*two}) < 0.5 * len({*one})  # short problems come up again
    assert one != other
    of_sample = tasks.problems(tasks.resolve("arithmetic"), count=200, seed=run.seed)
    assert one != [p.prompt for p in of_sample]


def test_a_file_of_problems_is_gone_through_in_turn_without_the_held_out_ones(tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = small_run(**{"sample.problems": file, "sample.count": 3, "eval.verify": "number"})
    assert drawn(run, 1) == ["0+1=", "1+1=", "2+1="]
    assert drawn(run, 2) == ["3+1=", "4+1=", "0+1="]
    held = evaluation.Held([tasks.Problem("4+1=", "", "5", 1)], lambda *_: True, 0)
    assert drawn(run, 2, problems_of(run, held)) == ["3+1=", "0+1="]
    everything = held._replace(problems=[tasks.Problem(r["prompt"], "", "", 1) for r in rows])
    with pytest.raises(ValueError, match=r"config\.rounds\.resample=2 .* none of its problems"):
        problems_of(run, everything)


def test_fixed_problems_are_answered_anew_each_time(job, tmp_path):
    file = tmp_path / "problems.jsonl"
    task = tasks.problems(tasks.resolve("arithmetic"), count=24, seed=5)
    file.write_text(
        "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in task)
    )
    run = small_run(**{"sample.problems": file, "eval.verify": "number"})
    resampler = copy.copy(job["resampler"])
    resampler.problems = problems_of(run)._replace(check=tasks.resolve("arithmetic").check)
    params = job["policy"].params
    one, two = (resampler._sample(run, n, params, lambda: False)[0] for n in (1, 2))
    assert one == resampler._sample(run, 1, params, lambda: False)[0]
    assert one != two and {r["prompt"] for r in one} & {r["prompt"] for r in two}


def test_rows_are_planned_for_the_longest_answers_that_can_be_sampled(job):
    run, pairs = small_run(**{"eval.max_new_tokens": 90}), job["pairs"]
    problems, lengths_N = problems_of(run), pairs.row_lengths(True)
    lengths = resample_plan.planned(run, job["policy"].tokenizer, pairs, problems, lengths_N)
    longest = max(len(p) for p in drawn(run, 1))  # one token a character
    longest = max(longest, int(pairs.start_N2.max()))
    assert lengths[-1] == 2 * (longest + 90 + resample_plan.AFTER_ANSWER)
    run = config.replace(run, **{"data.max_length": 64})
    short = resample_plan.planned(run, job["policy"].tokenizer, pairs, problems, lengths_N)
    assert short[-1] == 2 * 64


def test_the_twin_takes_as_many_steps_as_the_same_flops_allow():
    run = small_run(**{"rounds.resample": 2, "curriculum.pool_size": 32})
    assert resample_plan.twin_pool(run, 1000) == 16 and resample_plan.twin_pool(run, 20) == 10
    twin = config.replace(run, **{"selection.name": "uniform", "curriculum.pool_size": 16})
    spent = counters.Counters(flops_sampling=20.0, flops_scoring=8.0, flops_training=120.0)
    rows = [{"step": 4, "resample/pairs": 9.0}, {"step": 8, "resample/pairs": 9.0}]
    # 10 a step, and 10 before the steps 4, 8 and 12: 12 steps cost 140, 13 cost 160.
    assert resample_plan.twin_steps(twin, rows, spent, 10.0) == 12
    assert (
        resample_plan.twin_steps(twin, [], dataclasses.replace(spent, flops_sampling=0.0), 10.0)
        == 13
    )


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample.temperature": 0.0}, "config.sample.temperature=0: a pair needs two different"),
        ({"sample.per_problem": 1}, "config.sample.per_problem=1"),
        ({"sample.problems": "", "eval.problems": ""}, "config.sample.problems is empty"),
        ({"sample.problems": "", "eval.problems": "held.jsonl"}, "is for evaluation"),
        ({"sample.problems": "none.jsonl"}, "none.jsonl does not exist"),
        ({"sample.problems": "task:arithmetik"}, "'arithmetik' is not a built-in task"),
        ({"rounds.resample": 0, "rounds.replace": "all"}, "config.rounds.replace='all' does noth"),
        ({"rounds.resample": -1}, "config.rounds.resample=-1 has to be 0 or more"),
        ({"rounds.replace": "old"}, "config.rounds.replace='old' is not one of"),
        ({"selection.name": "rho", "selection.column": "holdout"}, "holdout.*level, pass_rate"),
        ({"curriculum.difficulty": "words"}, "config.curriculum.difficulty='words' is a column"),
        ({"data.max_length": 4}, "leaves none of|none of its problems can be used"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_written(
    changes, said, tmp_path, capsys
):
    assert launcher.main(command(tmp_path / "run", **changes)) == 2
    import re

    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_supervised_training_samples_no_pairs(tmp_path, capsys):
    words = command(tmp_path / "run")
    assert launcher.main(["sft", *words[1:]]) == 2
    assert "config.rounds.resample=2 makes pairs" in capsys.readouterr().err


def test_strata_keep_their_meaning_when_pairs_without_the_column_join():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    with_column = [row | {"difficulty": 1.0} for row in rows]
    pairs, hard = (encode.encode(records.read(r), None, max_length=8) for r in (rows, with_column))
    run = small_run()
    assert resample_plan.settled(run, pairs).curriculum.difficulty == "margin"
    with pytest.raises(ValueError, match=r"'difficulty' of the data.*Set it to 'margin'"):
        resample_plan.settled(run, hard)


def test_how_pairs_are_sampled_is_part_of_a_run_that_samples():
    old = config.as_dict(small_run())
    new = config.as_dict(small_run(**{"sample.temperature": 0.5}))
    assert config.changed_keys(old, new) == {"sample.temperature": (1.0, 0.5)}
    old, new = (x | {"rounds": {"resample": 0, "replace": "none"}} for x in (old, new))
    assert config.changed_keys(old, new) == {}


def test_rules_that_keep_a_value_of_every_pair_name_it_so():
    """A resampling lengthens state whose name ends in _N: another name would break it."""
    memory = curriculum.init_memory(3)
    for name, rule in rules.RULES.items():
        if rule.init is None:
            continue
        state = rule.init(rules.candidates(None, memory))
        for key, value in state.items():
            assert np.shape(value) != (3,) or key.endswith("_N"), (name, key)


def test_the_twin_of_a_run_that_samples_has_rounds_of_as_many_steps(uninterrupted):
    _, trainer, outcome = uninterrupted
    twin = training.twin_run("uniform", small_run(), outcome, trainer.flops_N)
    assert (twin.curriculum.pool_size, twin.rounds.resample) == (16, 2)
    # As many steps as the FLOPs allow, when every fourth comes after a sampling.
    per_step, each = 3 * 8 * trainer.flops_N.mean(), outcome.counters.flops_sampling / 2
    cost = [steps * per_step + (steps - 1) // 4 * each for steps in range(40)]
    nearest = max(n for n in range(1, 40) if cost[n] <= outcome.counters.flops + per_step / 2)
    assert twin.train.steps == nearest > 8
