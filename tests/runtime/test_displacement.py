"""The displacement guard: its running mean, its hysteresis, what it says and how often."""

import json
import pathlib

import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.report import writers
from sage_jax.runtime import checkpoint, dataset, displacement, divergence, forward, loop, setup

ROOT = pathlib.Path(__file__).resolve().parents[2]


def row(chosen, rejected=None):
    rejected = 3 * chosen if rejected is None else rejected
    return {"displacement/chosen": chosen, "displacement/rejected": rejected}


def settings(**changes):
    return config.replace(config.Run(), **changes)


def watched(values, run, guard=None):
    guards = [guard or displacement.Guard()]
    for step, value in enumerate(values):
        guards.append(displacement.watch(guards[-1], step, row(value), run))
    return guards[1:]


def test_the_running_mean_is_the_decayed_mean_of_the_steps():
    values = np.random.default_rng(0).normal(size=30)
    guards = watched(values, settings())
    for n in (1, 7, 30):
        weight = displacement.DECAY ** np.arange(n)[::-1]
        expected = (weight * values[:n]).sum() / weight.sum()
        assert guards[n - 1].chosen_mean == pytest.approx(expected, rel=1e-12)
        assert guards[n - 1].rejected_mean == pytest.approx(3 * expected, rel=1e-12)


def test_the_nll_term_goes_on_above_the_limit_and_off_below_half_of_it():
    run = settings(**{"loss.nll_auto": 0.5, "loss.displacement_limit": 0.1})
    values = [0.0] * 5 + [-0.3] * 20 + [-0.07] * 60 + [0.0] * 40 + [-0.07] * 30
    guards = watched(values, run)
    lost = np.array([-g.chosen_mean for g in guards])
    state, expected = False, []
    for value in lost:
        state = bool(value > (0.05 if state else 0.1))
        expected.append(state)
    assert [g.on for g in guards] == expected
    assert np.flatnonzero(np.diff(expected)).size == 2  # on once, off once
    assert not guards[4].on and guards[24].on and guards[84].on  # -0.07 keeps it on,
    assert not guards[124].on and not guards[-1].on  # and does not switch it on
    assert not any(g.on for g in watched(values, settings()))


def test_what_a_step_is_told_does_not_depend_on_how_much_later_was_seen():
    """Results come one step late, unless a checkpoint or an evaluation waits for them."""
    run = settings(**{"loss.nll_auto": 0.5})
    values = [0.0] * 5 + [-2.0] * 3 + [8.0, -9.0, 9.0, -9.0, 9.0, 0.0, 0.0, -0.5, 0.6, 0.0]
    guards = watched(values, run)
    assert 3 < np.sum(np.diff([g.on for g in guards]))  # it goes on and off, also step by step
    for step in range(2, len(values)):
        late, early = guards[step - 2], guards[step - 1]
        assert late.nll_on(step) == early.nll_on(step)


def test_each_cause_is_said_once_in_plain_words_with_the_remedy():
    run = settings()
    last = watched([-0.4] * 40, run)[-1]
    assert len(last.warnings) == 1
    text = last.warnings[0]
    assert text.startswith("Step 4: the chosen answers have become less likely")
    assert "by 0.400 nats a token" in text and "the rejected ones by 1.200" in text
    assert "unlearns both answers" in text
    assert "Set config.loss.nll_weight=0.5" in text and "lower config.optim.lr=5e-07" in text
    far = {"eval_kl": 30.0, "eval_kl_per_token": 0.9}
    for step in (50, 60):
        last = displacement.watch_evaluation(last, step, far, run)
    assert len(last.warnings) == 2
    assert last.warnings[1].startswith("Step 50: what the model writes has moved 0.90 nats a token")
    near = {"eval_kl": 1.0, "eval_kl_per_token": 0.1}
    assert displacement.watch_evaluation(displacement.Guard(), 0, near, run).warnings == ()
    assert displacement.watch_evaluation(displacement.Guard(), 0, {}, run).warnings == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss.nll_auto": 0.7}, "From step 6 on config.loss.nll_auto=0.7 holds it."),
        ({"loss.nll_weight": 0.2}, "Raise config.loss.nll_weight=0.2 or lower"),
    ],
)
def test_the_remedy_fits_what_is_already_set(changes, words):
    assert words in watched([-0.4] * 6, settings(**changes))[-1].warnings[0]


def test_a_chosen_side_that_falls_faster_than_the_rejected_one_is_a_divergence():
    guard = displacement.Guard()
    for step in range(6):
        guard = displacement.watch(guard, step, row(-0.5, -0.1), settings())
    assert "the run diverges" in guard.warnings[0]


def test_healthy_runs_and_a_guard_that_is_off_say_nothing():
    assert watched([0.02, -0.01, 0.03] * 20, settings())[-1].warnings == ()
    off = settings(**{"loss.displacement_limit": 0.0})
    assert watched([-5.0] * 20, off)[-1].warnings == ()


def test_the_guard_goes_through_json_bit_for_bit():
    values = np.random.default_rng(1).normal(size=9) - 1
    guard = watched(values.tolist(), settings(**{"loss.nll_auto": 1.0}))[-1]
    assert guard.warnings
    assert displacement.restore(json.loads(json.dumps(guard._asdict()))) == guard


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"nll_auto": 0.5, "displacement_limit": 0.0}}, r"Set the limit to 0.1"),
        ({"loss": {"nll_auto": 0.5, "nll_weight": 0.5}}, r"has to be larger"),
        ({"eval": {"kl_limit": 1.0, "kl_prompts": 0}}, r"Set kl_prompts to 32"),
        ({"selection": {"name": "random"}, "compare": {"random": True}}, r"with itself"),
    ],
)
def test_settings_that_cannot_apply_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config.resolve(changes)


# ------------------------------------------------------------------------------------ whole runs

SMALL = {
    "train.steps": 24, "train.batch_pairs": 8, "curriculum.pool_size": 48, "checkpoint.every": 100,
    "compare.uniform": False, "data.limit": 200, "loss.nll_weight": 0.0, "loss.nll_auto": 1.0,
    "loss.displacement_limit": 0.02, "optim.lr": 2e-3, "optim.warmup": 0.0,
    "selection.keep": 0.5, "selection.uniform_share": 0.5, "selection.refresh": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    from sage_jax.runtime import mesh as meshes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
        _, found, _ = launcher.parse(
            ["train", f"--config={ROOT / 'configs/quickstart.py'}", *flags]
        )
        run, mesh = config.resolve(found), meshes.make_mesh()
        policy = setup.load_policy(run, mesh)
        pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
        passes = forward.Passes(policy, mesh, setup.row_shape(run, pairs.lengths_N2, mesh))
        stats = forward.stored_stats(run, policy, passes, pairs, "reference")
    return run, {"policy": policy, "passes": passes, "pairs": pairs, "start": stats,
                 "reference": stats.logps}  # fmt: skip


def train(job, workdir, stop_after=None, **changes):
    run, parts = job
    workdir.mkdir(parents=True, exist_ok=True)
    run = config.replace(run, **changes)
    trainer = loop.Trainer(run, workdir, **parts, evaluate=lambda _: {}, label="sage")
    outcome = trainer.train(lambda: stop_after is not None and trainer.counters.step >= stop_after)
    rows = writers.read_rows(workdir / "metrics.jsonl")
    plain = [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows]
    return trainer, outcome, plain


@pytest.mark.slow
def test_runs_stopped_anywhere_end_like_whole_ones_with_the_automatic_term(job, tmp_path, capsys):
    whole, outcome, rows = train(job, tmp_path / "whole")
    printed = capsys.readouterr().err
    weights = [r["loss/nll_weight"] for r in rows[:-1]]
    assert weights[0] == 0.0 and max(weights) == 1.0  # it has been switched on
    assert len(outcome.warnings) == 1 and printed.count("Warning (sage). Step") == 1
    switched = weights.index(1.0)
    # Among the stops are those right before and after the step that switches, and the switch.
    for n, stops in enumerate(([switched - 1, switched + 3], [switched - 2, switched])):
        workdir = tmp_path / f"cut{n}"
        for stop in stops:
            _, cut, _ = train(job, workdir, stop_after=stop)
            assert not cut.finished and cut.counters.step == stop
        other, again, mine = train(job, workdir)
        assert again.warnings == outcome.warnings and other.guard == whole.guard
        assert mine == rows
        for a, b in zip(*map(leaves, (whole, other)), strict=True):
            np.testing.assert_array_equal(a, b)
        # FLOPs are a function of the pairs, not of the interruptions.
        for part in ("reference", "scoring", "training"):
            name = f"flops_{part}"
            assert getattr(again.counters, name) == getattr(outcome.counters, name)
    capsys.readouterr()


def leaves(trainer):
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(trainer.state)]


@pytest.mark.slow
def test_rows_hold_what_was_spent_up_to_them_and_the_parts_add_up(job, tmp_path):
    trainer, outcome, _ = train(
        job, tmp_path / "run", **{"selection.refresh": 1.0, "train.steps": 7, "loss.nll_auto": 0.0}
    )
    rows, spent = outcome.rows, outcome.counters
    assert spent.flops_scoring > 0  # of the second and third round
    for r in rows:
        assert r["flops"] == r["flops_scoring"] + r["flops_training"]
        parts = r["perf/seconds_scoring"] + r["perf/seconds_training"]
        assert r["perf/seconds"] == pytest.approx(parts)
    for name in (
        "flops_training",
        "flops_scoring",
        "perf/seconds_training",
        "perf/seconds_drawing",
    ):
        assert (np.diff([r[name] for r in rows]) >= 0).all()
    # A row's seconds are those of the steps before it: the sum of their own.
    steps = np.cumsum([0.0] + [r["perf/step_time"] for r in rows[:-1]])
    np.testing.assert_allclose([r["perf/seconds_training"] for r in rows], steps, rtol=1e-9)
    assert rows[-1]["perf/seconds"] == pytest.approx(spent.device_seconds)
    assert rows[-1]["flops"] == spent.flops and spent.seconds_compiling > 0
    assert "loss/nll_weight" not in rows[0]
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        _, _, meta = checkpoints.restore(checkpoints.latest(), trainer.state)
    assert meta["counters"]["flops_training"] == spent.flops_training


def test_the_divergence_is_0_at_the_start_and_does_not_depend_on_the_batches(job):
    import jax

    run, parts = job
    policy, found = parts["policy"], []
    rng = np.random.default_rng(0)
    other = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape), policy.params)
    for batch in (5, 2):
        few = config.replace(
            run, **{"eval.kl_prompts": 5, "eval.max_new_tokens": 8, "eval.batch": batch}
        )
        measure = divergence.Divergence(few, policy, None, parts["pairs"])
        assert measure(policy.params)["eval_kl"] == pytest.approx(0.0, abs=1e-5)
        found.append(measure(other))
    assert found[0]["eval_kl"] > 0.01 and found[0]["eval_kl_error"] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-3)
