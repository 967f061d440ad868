"""Runs on problems with several pairs: what they share changes the work, not what comes out."""

import dataclasses
import functools
import json
import re
import types

import jax
import jobs
import numpy as np
import pytest

from sage_jax import config
from sage_jax.models import attention, decoder, spec
from sage_jax.runtime import counters, dataset, forward, loop, setup, sharing
from sage_jax.runtime import mesh as meshes

SMALL = {
    "train.steps": 4, "train.batch_pairs": 24, "curriculum.pool_size": 72, "checkpoint.every": 9,
    "eval.problems": "", "eval.every": 0, "compare.uniform": False, "eval.kl_prompts": 0,
    "loss.beta": 0.5, "optim.lr": 1e-4, "selection.keep": 0.5, "selection.refresh": 1.0,
}  # fmt: skip
SHARES = {"off": 1, "problem": 1, "problem on eight": 8}  # devices


def small_run(data, **changes):
    return jobs.small_run(SMALL | {"data.train": data}, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four pairs for each of some problems, in any order: one chosen answer, four rejected ones."""
    text = (jobs.ROOT / "sage_jax/assets/quickstart/pairs.jsonl").read_text().splitlines()
    rows = []
    for line in text[:30]:
        row = json.loads(line)
        wrong = {row["rejected"]}
        for digit in "1234567890":
            wrong.add(re.sub(r"\d$", digit, row["rejected"]))
        rows += [row | {"rejected": one} for one in sorted(wrong - {row["chosen"]})[:4]]
    np.random.default_rng(0).shuffle(rows)
    path = tmp_path_factory.mktemp("problems") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def outcomes(data, tmp_path_factory):
    """A run for each way of sharing: its passes, its first statistics and what it logged."""
    base, found = tmp_path_factory.mktemp("runs"), {}
    for name, devices in SHARES.items():
        run = small_run(data, **{"data.share_prompts": name.split()[0]})
        mesh = meshes.make_mesh(devices=jax.devices()[:devices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAGE_JAX_CACHE", str(base / name))
            policy = setup.load_policy(run, mesh)
            pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
            shapes = sharing.shapes(run, policy.model, mesh, pairs)
            passes = forward.Passes(policy, mesh, *shapes)
            spent = counters.Counters()
            start = forward.stored_stats(run, policy, passes, pairs, "reference", spent)
        (base / name / "run").mkdir(parents=True)
        trainer = loop.Trainer(
            run, base / name / "run", policy=policy, passes=passes, pairs=pairs, start=start,
            reference=start.logps, evaluate=lambda _: {}, label=name,
        )  # fmt: skip
        found[name] = passes, start, trainer.train(lambda: False), spent
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHARES if name != "off"])
def test_what_is_shared_changes_nothing_that_comes_out(outcomes, name):
    _, wanted, expected, _ = outcomes["off"]
    _, stats, outcome, _ = outcomes[name]
    np.testing.assert_allclose(stats.logps, wanted.logps, rtol=1e-5)
    for a, b in zip(stats, wanted, strict=True):  # an entropy is a small difference of logits
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    rows, expected_rows = outcome.rows, expected.rows
    assert len(rows) == len(expected_rows) == 5
    for row, other in zip(rows[:4], expected_rows[:4], strict=True):
        for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm", "pairs",
                    "displacement/rejected", "selection/likelihood_margin_selected"):  # fmt: skip
            if key in other:
                np.testing.assert_allclose(row[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
    for a, b in zip(*(jax.tree.leaves(o.params) for o in (outcome, expected)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.slow
def test_a_problem_is_computed_once_in_passes_and_in_steps_where_they_meet(outcomes, data):
    passes, _, outcome, spent = outcomes["problem"]
    run = small_run(data)
    policy = setup.load_policy(run, passes.mesh)
    pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
    alone_N = counters.pair_flops(policy.model, pairs, shared=True)
    of_step_N = counters.step_flops(policy.model, pairs, passes.shape, run.train.batch_pairs)
    assert passes.whole.keys > 1 and passes.shape.keys > 1
    counted = outcome.counters
    assert spent.flops_reference < 0.75 * alone_N.sum()
    assert counted.flops_scoring < 0.9 * 3 * 72 * alone_N.mean()  # before three rounds
    # What a step costs a twin is what random steps cost.
    per_pair = counted.flops_training / 3 / counted.pairs
    assert per_pair == pytest.approx(of_step_N.mean(), rel=0.1)
    assert of_step_N.mean() < 0.95 * alone_N.mean()
    # What a step computes, as it counted and as it was planned.
    room = passes.shape.rows * np.array([*passes.shape.sizes, passes.shape.row_length])
    total = [0.0, *(row["num_tokens"] for row in outcome.rows[:4])]
    for row, count in zip(outcome.rows, np.diff(total), strict=False):
        assert np.isclose(1 - count / room, row["perf/padding_fraction"], atol=1e-6).any()


def test_one_place_says_where_problems_are_computed_once(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path))
    run, mesh = small_run(data), meshes.make_mesh(devices=jax.devices()[:1])
    policy = setup.load_policy(run, mesh)
    pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
    shape = setup.row_shape(run, pairs.row_lengths(True), mesh, share=True)
    decide = functools.partial(sharing.problem_shapes, pairs=pairs, shape=shape)
    model = policy.model
    of_step, of_pass = decide(run, model)
    assert of_pass.keys and of_step.every == shape.every
    for setting in ("pair", "off"):
        other = config.replace(run, **{"data.share_prompts": setting})
        assert decide(other, model) == (shape, shape)
    split = dataclasses.replace(
        model, place=attention.Placement("dense", meshes.make_mesh(context=8), context=("context",))
    )
    scaling = spec.RopeScaling("longrope", factor=4.0)
    turned = dataclasses.replace(model, spec=dataclasses.replace(model.spec, rope_scaling=scaling))
    asked = config.replace(run, **{"data.share_prompts": "problem"})
    alone = config.replace(asked, **{"data.packing": False})
    with pytest.raises(ValueError, match="packing=False"):
        decide(alone, model)
    for other, why in ((split, "mesh.context"), (turned, "rotary factors")):
        assert decide(run, other) == (shape, shape)
        with pytest.raises(ValueError, match=why):
            decide(asked, other)


def test_a_short_run_compiles_for_one_row_length_and_trains_the_same_pairs(
    data, tmp_path, monkeypatch
):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path))
    run, mesh = small_run(data), meshes.make_mesh(devices=jax.devices()[:1])
    run = config.replace(run, **{"data.share_prompts": "pair"})
    policy = setup.load_policy(run, mesh)
    pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)

    def of_steps(steps_of_run):
        long = config.replace(run, **{"train.steps": steps_of_run})
        price = sharing.program_tokens(long, policy.model, mesh, pairs)
        return price, sharing.shapes(long, policy.model, mesh, pairs)[0]

    dear, short = of_steps(4)
    cheap, long = of_steps(400_000)
    assert dear == pytest.approx(1e5 * cheap)
    assert short.sizes == (short.row_length,) and 1 < len(long.sizes) <= 4
    assert short.every == long.every and short.row_length == long.row_length


@pytest.mark.parametrize(
    ("lengths_N2", "block"),
    [([[40, 56]], attention.SHORT_BLOCK), ([[40, 0]], attention.SHORT_BLOCK),
     ([[40, 400]], attention.BLOCK)],
)  # fmt: skip
def test_attention_is_fitted_to_the_lengths_of_the_data(lengths_N2, block):
    model = decoder.Model(spec.ModelSpec(50, 32, 48, 1, 2, 2))
    fitted = setup.fitted(setup.Policy(model, None, None, ""), np.array(lengths_N2))
    assert fitted.model.place == dataclasses.replace(model.place, block=block)
    splash = dataclasses.replace(model, place=attention.Placement(mesh=_Tpu()))
    assert setup.fitted(setup.Policy(splash, None, None, ""), np.array(lengths_N2)).model == splash


class _Tpu:
    """A mesh of TPUs, as far as `Placement.platform` looks at it."""

    devices = np.array([types.SimpleNamespace(platform="tpu")])
