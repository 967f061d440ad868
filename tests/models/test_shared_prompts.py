"""A prompt computed once for all that share it: the same loss and gradients as computed anew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import logprobs, losses, models, step
from sage_jax.data import encode, groups, pack, records
from sage_jax.models import attention
from sage_jax.runtime import mesh as meshes
from sage_jax.runtime import setup

PAIRS = 6


def make_pairs():
    rng = np.random.default_rng(0)

    def ids(least, most):
        return rng.integers(1, 64, rng.integers(least, most)).tolist()

    rows = [
        {"prompt_ids": ids(5, 30), "chosen_ids": ids(3, 30), "rejected_ids": ids(3, 30)}
        for _ in range(PAIRS)
    ]
    return encode.encode(records.read(rows), None, max_length=200)


def make_problems(seed=0):
    """Pairs of five problems in any order; most completions are in several of them."""
    rng = np.random.default_rng(seed)

    def ids(least, most):
        return rng.integers(1, 64, rng.integers(least, most)).tolist()

    rows = []
    for chosen, rejected, count in ((1, 3, 3), (2, 2, 4), (1, 1, 1), (3, 4, 7), (1, 2, 2)):
        prompt = {"prompt_ids": ids(5, 20)}
        sides = [[ids(3, 12) for _ in range(n)] for n in (chosen, rejected)]
        rows += [
            {**prompt, "chosen_ids": sides[0][n % chosen], "rejected_ids": sides[1][n % rejected]}
            for n in range(count)
        ]
    rng.shuffle(rows)
    return encode.encode(records.read(rows), None, max_length=200)


def rows_of(pairs, share, order=None):
    """All pairs in one batch."""
    count = len(pairs)
    order = range(count) if order is None else order
    lengths = pairs.row_lengths(share != "off")
    shape = pack.shape(lengths, batch_pairs=count, factors=(pack.LONG,), rows_multiple=2)
    keys = 0
    options = {"row_length": shape.row_length, "rows": 2, "slots": count}
    if share == "problem":
        plan, keys = groups.plan(pairs, order, **options, keys=2.0), 2 * shape.row_length
    else:
        plan = pack.plan(lengths, order, **options)
    assert len(plan) == 1
    ref = np.linspace(-9, -3, 2 * count).reshape(count, 2)
    return pack.collate(
        pairs, plan[0], shape.row_length, ref_logps_N2=ref, share=share != "off", keys=keys
    )


def loss_and_gradients(model, params, pairs, share, order=None):
    rows = rows_of(pairs, share, order)
    logps_fn = logprobs.make_logps_fn(
        lambda p, _, b: model.hidden(
            p, *map(jnp.asarray, (b.tokens_RT, b.position_RT, b.segment_RT)), b.shared
        ),
        lambda p, _: model.head(p),
    )

    def total(params):
        stats = logps_fn(params, None, rows)
        each = step.pair_losses(losses.sigmoid(0.5), stats, rows.ref_logps_RS2)
        return jnp.sum(jnp.where(rows.pair_RS >= 0, each, 0.0)), stats

    (value, stats), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    order = np.argsort(rows.pair_RS.ravel())[-len(pairs) :]
    by_pair = [np.asarray(x).reshape(-1, 2)[order] for x in stats]
    return value, by_pair, grads, int((rows.segment_RT > 0).sum())


@pytest.mark.parametrize("kernel", ["dense", "blocks"])
def test_sharing_the_prompt_changes_nothing_but_the_work(kernel):
    spec = models.ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    model = dataclasses.replace(models.Model(spec), place=attention.Placement(kernel))
    params, pairs = model.init(jax.random.key(0)), make_pairs()
    value, stats, grads, tokens = loss_and_gradients(model, params, pairs, "off")
    shared = loss_and_gradients(model, params, pairs, "pair")
    np.testing.assert_allclose(shared[0], value, rtol=1e-6)
    for a, b in zip(shared[1], stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(shared[2]), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)
    assert tokens - shared[3] == pairs.start_N2[:, 0].sum()  # each prompt once less


@functools.cache
def of_problems():
    """A model, its pairs, and what they give when each is by itself."""
    spec = models.ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    model = dataclasses.replace(models.Model(spec), place=attention.Placement("dense"))
    params, pairs = model.init(jax.random.key(0)), make_problems()
    return model, params, pairs, loss_and_gradients(model, params, pairs, "off")


@pytest.mark.parametrize("kernel", ["dense", "blocks", "splash", "triton"])
def test_a_problem_computed_once_for_all_its_pairs_changes_nothing_but_the_work(kernel):
    dense, params, pairs, (value, stats, grads, tokens) = of_problems()
    place = attention.Placement(kernel, interpret=kernel not in ("dense", "blocks"))
    model = dataclasses.replace(dense, place=place)
    order = np.random.default_rng(1).permutation(len(pairs))
    found = loss_and_gradients(model, params, pairs, "problem", order)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    for a, b in zip(found[1], stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(found[2]), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    # Each prompt once, and each completion of a problem once: counted by hand.
    prompts, completions = {}, {}
    for i in range(len(pairs)):
        for side in (0, 1):
            ids, start = pairs.sequence(i, side)
            prompts[tuple(ids[:start])] = start
            completions[tuple(ids)] = len(ids) - start
    assert found[3] == sum(prompts.values()) + sum(completions.values()) < 0.4 * tokens


def test_windows_of_a_problem_count_positions():
    spec = models.ModelSpec(
        vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2, windows=(8, 8)
    )
    model, pairs = models.Model(spec), make_problems(3)
    params = model.init(jax.random.key(0))

    def logps(kernel, share):
        rows = rows_of(pairs, share)
        other = dataclasses.replace(model, place=attention.Placement(kernel))
        stats = setup.Policy(other, None, None, "").logps_fn()(params, None, rows)
        return np.asarray(stats.logps)[rows.pair_RS >= 0][
            np.argsort(rows.pair_RS[rows.pair_RS >= 0])
        ]

    for kernel in ("dense", "blocks"):
        np.testing.assert_allclose(logps(kernel, "problem"), logps("dense", "off"), rtol=1e-5)


def test_shared_prompts_over_eight_devices():
    pairs = make_pairs()
    lengths = pairs.row_lengths(True)
    plan = pack.plan(lengths, range(PAIRS), row_length=128, rows=4, slots=PAIRS)
    rows = pack.collate(pairs, plan[0], 128, share=True)
    check_over_eight_devices(rows)


def test_problems_over_eight_devices():
    pairs = make_problems()
    options = {"row_length": 160, "rows": 4, "slots": len(pairs)}
    plan = groups.plan(pairs, range(len(pairs)), **options, keys=1.5)
    check_over_eight_devices(pack.collate(pairs, plan[0], 160, share=True, keys=240))


def check_over_eight_devices(rows):
    spec = models.ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    one = dataclasses.replace(models.Model(spec), place=attention.Placement("blocks"))
    params = one.init(jax.random.key(0))

    def total(model, mesh, params, rows):
        logps_fn = setup.Policy(model, None, None, "", mesh).logps_fn()
        return jnp.sum(logps_fn(params, None, rows).logps * rows.pair_RS[..., None])

    wanted = jax.grad(lambda p: total(one, None, p, rows))(params)
    place = attention.Placement("blocks", mesh, meshes.ROWS, ("tensor",))
    many = dataclasses.replace(one, place=place)
    placed = jax.device_put(params, meshes.shardings(params, mesh))
    found = jax.jit(jax.grad(lambda p, b: total(many, mesh, p, b)))(placed, meshes.put(rows, mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
