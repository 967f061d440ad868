"""Whole runs: interrupted ones end like uninterrupted ones, and every number in them adds up."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jobs
import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.data import encode, records
from sage_jax.report import writers
from sage_jax.runtime import loop, rounds, training

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "train.steps": 10, "train.batch_pairs": 8, "curriculum.pool_size": 48, "checkpoint.every": 3,
    "eval.count": 16, "eval.every": 4, "eval.batch": 16, "compare.uniform": False,
    "data.limit": 200, "loss.beta": 0.5, "loss.nll_weight": 0.0, "optim.lr": 1e-4,
    "eval.kl_prompts": 4,
    "selection.keep": 0.5, "selection.uniform_share": 0.5, "selection.refresh": 0.0,
}  # fmt: skip


def command(workdir, **changes):
    settings = [f"--config.{k}={v}" for k, v in (SMALL | changes).items()]
    return [
        "train",
        f"--config={ROOT / 'configs/quickstart.py'}",
        f"--workdir={workdir}",
        *settings,
    ]


def small_run(**changes):
    _, found, _ = launcher.parse(command("unused", **changes))
    return config.resolve(found)


def rows_of(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def result(workdir):
    """What has to be the same, bit for bit: metrics, selections, weights."""
    chosen = {p.name: p.read_bytes() for p in sorted((workdir / "selection").iterdir())}
    return rows_of(workdir), chosen, (workdir / "export" / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    base = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(base / "cache"))
        assert launcher.main(command(base / "run")) == 0
    return base / "run"


def start(workdir, cache):
    env = os.environ | {"SAGE_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    # Killed, it must not leave half a program for others: it reads what they compiled, no more.
    env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = str(2**40)
    # The tests have eight virtual devices; so must the run that is compared with theirs.
    code = (
        "import sys, jax; jax.config.update('jax_num_cpu_devices', 8); "
        "from sage_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *command(workdir)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_rows(process, workdir, count, seconds=240):
    path = workdir / "metrics.jsonl"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()}")
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no {count} rows in {seconds} s: {process.communicate()}")


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for rows in (2, 8):  # before the first checkpoint, and between two later ones
        process = start(workdir, tmp_path / "cache")
        wait_for_rows(process, workdir, rows)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert launcher.main(command(workdir)) == 0
    mine, whole = result(workdir), result(uninterrupted)
    assert mine[0] == whole[0]
    assert mine[1] == whole[1]
    assert mine[2] == whole[2]


@pytest.mark.slow
def test_sigterm_saves_ends_cleanly_and_the_same_command_goes_on(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, tmp_path / "cache")
    wait_for_rows(process, workdir, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "Stopped after step" in out and "Traceback" not in err
    assert not (workdir / "summary.json").exists()
    assert launcher.main(command(workdir)) == 0
    assert result(workdir) == result(uninterrupted)


def test_a_finished_run_is_told_again_not_trained_again(uninterrupted, capsys):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert launcher.main(command(uninterrupted)) == 0
    assert "is finished" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_objective_in_the_same_workdir_is_refused_with_its_key(uninterrupted, capsys):
    before = sorted(p.name for p in uninterrupted.iterdir())
    assert launcher.main(command(uninterrupted, **{"loss.beta": 0.2})) == 2
    assert "config.loss.beta was 0.5, now 0.2" in capsys.readouterr().err
    assert sorted(p.name for p in uninterrupted.iterdir()) == before


def test_rows_and_summary_add_up(uninterrupted):
    rows = rows_of(uninterrupted)
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(range(SMALL["train.steps"] + 1))
    first = rows[0]
    assert abs(first["loss"] - np.log(2)) < 5e-5 and first["rewards/accuracies"] == 0.0
    assert summary["accuracy_before"] == first["eval_accuracy"]
    assert summary["accuracy_after"] == rows[-1]["eval_accuracy"]
    assert (
        summary["steps"] == SMALL["train.steps"] and summary["pairs_trained"] == rows[-1]["pairs"]
    )
    assert summary["flops_scoring"] == 0.0  # margins are remembered
    assert summary["flops_training"] == rows[-1]["flops"] > rows[-2]["flops"] > 0
    assert [r["step"] for r in rows if "eval_accuracy" in r] == [0, 4, 8, 10]
    logged = writers.read_rows(uninterrupted / "selection" / "round_00000.jsonl")
    assert len(logged) == 48 and sum(row["selected"] for row in logged) == 24


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A loaded model and its data, for runs inside this process."""
    return jobs.loaded(small_run(), tmp_path_factory.mktemp("job"))


def train(job, workdir, run):
    workdir.mkdir(parents=True)
    trainer = loop.Trainer(run, workdir, **job, evaluate=lambda _: {}, label="test")
    return trainer, trainer.train(lambda: False)


def test_uniform_keeps_no_scores_and_visits_every_pair_once_an_epoch(job, tmp_path):
    run = small_run(**{"selection.name": "uniform", "train.steps": 12})
    trainer, _ = train(job, tmp_path / "run", run)
    assert trainer.memory.visits.max() == 1  # the reference pass alone
    assert set(trainer.memory.drawn) <= {0, 1}
    run = small_run(**{"selection.name": "uniform", "train.steps": 26})
    trainer, _ = train(job, tmp_path / "more", run)
    assert set(trainer.memory.drawn) <= {1, 2}


def test_training_refreshes_the_margins_that_the_next_selection_uses(job, tmp_path):
    trainer, _ = train(job, tmp_path / "run", small_run())
    trained = trainer.memory.trained > 0
    at_start = job["start"].logps[:, 0] - job["start"].logps[:, 1]
    moved = np.abs(trainer.memory.likelihood_margin - at_start) > 1e-3
    assert moved[trained].mean() > 0.6 and not moved[~trained].any()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(job, tmp_path):
    broken = job | {"reference": np.where(np.arange(200)[:, None] >= 0, np.nan, job["reference"])}
    with pytest.raises(FloatingPointError, match="Step 0: the loss is nan"):
        train(broken, tmp_path / "run", small_run(**{"selection.name": "uniform"}))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_twins_spend_the_flops_of_the_run_and_score_nothing(job, tmp_path):
    run = small_run(**{"selection.refresh": 1.0, "train.steps": 9})
    trainer, outcome = train(job, tmp_path / "run", run)
    spent = outcome.counters.flops_scoring + outcome.counters.flops_training
    for name, pool, share in (("uniform", 48, 1.0), ("random", 48, 0.5)):
        twin = training.twin_run(name, run, outcome, trainer.flops_N)
        _, other = train(job, tmp_path / name, twin)
        per_step = other.counters.flops_training / other.counters.step
        assert abs(other.counters.flops_training - spent) < 1.5 * per_step
        assert other.counters.flops_scoring == 0.0
        assert other.rows[0]["selection/pool"] == pool
        assert other.rows[0]["selection/selected"] == share * pool
        assert other.counters.step > 9  # scoring was counted


def test_difficulty_column_with_gaps_is_refused():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "level": 1},
            {"prompt_ids": [1, 5], "chosen_ids": [3], "rejected_ids": [4]}]  # fmt: skip
    pairs = encode.encode(records.read(rows), None, max_length=8)
    with pytest.raises(ValueError, match="1 of 2 pairs have no value"):
        rounds.difficulty(pairs, None, "level")


def test_programs_are_kept_in_the_workdir_unless_jax_keeps_them_elsewhere(tmp_path):
    code = f"""
import pathlib, jax, jax.numpy as jnp
from sage_jax import config
from sage_jax.runtime import training
jax.jit(lambda x: x + 1)(jnp.ones(3))  # there was no cache when this was compiled
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
training.keep_programs(config.Run(), pathlib.Path({str(tmp_path)!r}))
jax.jit(lambda x: x * 2)(jnp.ones(3))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu"}
    kept = tmp_path / "compiled"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert any(kept.iterdir())
    elsewhere = env | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")}
    for file in kept.iterdir():
        file.unlink()
    subprocess.run([sys.executable, "-c", code], env=elsewhere, check=True, timeout=120)
    assert not any(kept.iterdir()) and any((tmp_path / "other").iterdir())
