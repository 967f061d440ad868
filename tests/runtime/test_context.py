"""Rows cut over devices, and every other way to split, train as one device does."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import batch, config
from sage_jax.models import attention, decoder, spec
from sage_jax.runtime import mesh as meshes
from sage_jax.runtime import programs, setup, state

ROWS, LENGTH, SLOTS, VOCABULARY = 8, 128, 2, 48
STEPS = 2
SPEC = spec.ModelSpec(vocab=VOCABULARY, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
RUN = config.resolve(
    {
        "train": {"steps": 10, "batch_pairs": ROWS * SLOTS},
        "selection": {"kappa": 0.0, "margin": "likelihood"},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0.0},
        "loss": {"nll_weight": 0.1},
    }
)


def rows() -> batch.PackedBatch:
    """Four sequences a row, which end anywhere, so that they cross the borders of devices."""
    rng = np.random.default_rng(0)
    one = batch.empty(ROWS, LENGTH, SLOTS)
    for r in range(ROWS):
        cuts = np.sort(rng.choice(np.arange(4, LENGTH - 4), 3, replace=False))
        ends = [0, *cuts.tolist(), LENGTH - int(rng.integers(0, 4))]
        for n, (start, end) in enumerate(itertools.pairwise(ends)):
            one.tokens_RT[r, start:end] = rng.integers(1, VOCABULARY, end - start)
            one.position_RT[r, start:end] = np.arange(end - start)
            one.segment_RT[r, start:end] = batch.segment_id(n // 2, n % 2)
            one.completion_RT[r, start + (end - start) // 3 : end] = True
        one.pair_RS[r] = np.arange(SLOTS) + SLOTS * r
        one.ref_logps_RS2[r] = rng.normal(-200, 5, (SLOTS, 2))
        one.weight_RS[r] = 1.0
    return one


@functools.cache
def weights():
    return decoder.Model(SPEC).init(jax.random.key(1))


def train(kernel: str, **sizes: int):
    """Losses, scores and final weights of some steps, on the devices of a mesh."""
    count = int(np.prod(list(sizes.values())))
    mesh = meshes.make_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:count])
    run = config.replace(RUN, **{"model.attention": kernel})
    model = setup.on_mesh(run, decoder.Model(SPEC), mesh)
    params = jax.device_put(weights(), meshes.shardings(weights(), mesh))
    policy = setup.Policy(model, params, None, "", mesh)
    tx, _ = state.make_optimizer(run)
    loss = setup.make_loss(run)
    step = programs.train_step(run, policy, mesh, tx, loss, setup.make_score_fn(run, loss))
    placed = state.state_shardings(run, tx, params, mesh)
    now = jax.jit(
        lambda p: state.init_state(run, jax.tree.map(jnp.copy, p), tx), out_shardings=placed
    )(params)
    data = meshes.put(rows(), mesh)
    losses, scores = [], []
    for _ in range(STEPS):
        now, out = step(now, None, data, programs.now(run))
        losses.append(float(out.metrics["loss"]))
        scores.append(np.asarray(out.pairs.score))
    light = programs.stats_step(policy, mesh, light=True)(params, None, data)
    return losses, np.stack(scores), jax.device_get(now.params), jax.device_get(light)


@functools.cache
def of_one_device():
    return train("dense")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        ("blocks", {"fsdp": 2, "context": 4}),
        ("blocks", {"data": 2, "context": 2, "tensor": 2}),
        ("dense", {"context": 8}),
        ("dense", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_any_split_trains_as_one_device_does(kernel, sizes):
    expected, found = of_one_device(), train(kernel, **sizes)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True):
        # Adam divides by the size of the gradient: where that is rounding alone, so is its sign.
        close = np.isclose(a, b, rtol=1e-4, atol=1e-5)
        assert close.mean() > 0.999 and np.abs(a - b).max() < 2 * STEPS * RUN.optim.lr
    for name in ("logps", "tokens", "spread"):  # the last: squares of differences, some near 0
        np.testing.assert_allclose(
            getattr(found[3], name), getattr(expected[3], name), rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_gradients_of_a_cut_row_are_those_of_a_whole_one():
    def gradient(kernel, **sizes):
        count = int(np.prod(list(sizes.values())))
        mesh = meshes.make_mesh(data=1, **sizes, devices=jax.devices()[:count])
        run = config.replace(RUN, **{"model.attention": kernel})
        policy = setup.Policy(
            setup.on_mesh(run, decoder.Model(SPEC), mesh), weights(), None, "", mesh
        )
        logps_fn = policy.logps_fn()
        data = meshes.put(rows(), mesh)
        found = jax.jit(jax.grad(lambda p: logps_fn(p, None, data).logps.sum()))(
            jax.device_put(weights(), meshes.shardings(weights(), mesh))
        )
        return jax.device_get(found)

    whole, cut = gradient("dense", fsdp=1), gradient("blocks", fsdp=2, context=4)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(a - b) < 2e-6 * np.linalg.norm(b)


def test_rows_are_planned_so_that_context_divides_them():
    mesh = meshes.make_mesh(data=1, fsdp=2, context=4)
    lengths = np.full((6, 2), 90)
    assert setup.row_shape(RUN, lengths, mesh).row_length % (4 * 128) == 0
    whole = meshes.make_mesh(data=2, fsdp=4)
    assert setup.row_shape(RUN, lengths, whole).row_length < 4 * 128


def test_a_row_that_does_not_divide_stays_whole():
    mesh = meshes.make_mesh(data=1, context=8)
    place = attention.Placement("dense", mesh, meshes.ROWS, ("tensor",), (meshes.CONTEXT,))
    keys = jax.random.split(jax.random.key(0), 3)
    q, key, value = (jax.random.normal(k, (1, 12, 4, 8)) for k in keys)
    seen = attention.causal(jnp.ones((1, 12), jnp.int32), jnp.arange(12)[None])
    run = functools.partial(attention.attend, q, key, value, seen, scale=0.3)
    found = jax.jit(lambda: run(place=place))()
    np.testing.assert_allclose(
        found, run(place=dataclasses.replace(place, mesh=None)), rtol=1e-5, atol=1e-6
    )
