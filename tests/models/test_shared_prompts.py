"""A prompt computed once for both answers: the same loss and gradients as computed twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import logprobs, losses, models, step
from sage_jax.data import encode, pack, records
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


def loss_and_gradients(model, params, pairs, share):
    lengths = pairs.row_lengths(share)
    shape = pack.shape(lengths, batch_pairs=PAIRS, factors=(pack.LONG,), rows_multiple=2)
    plan = pack.plan(lengths, range(PAIRS), row_length=shape.row_length, rows=2, slots=PAIRS)
    ref = np.linspace(-9, -3, 2 * PAIRS).reshape(PAIRS, 2)
    rows = pack.collate(pairs, plan[0], shape.row_length, ref_logps_N2=ref, share=share)
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
    order = np.argsort(rows.pair_RS.ravel())[-PAIRS:]
    by_pair = [np.asarray(x).reshape(-1, 2)[order] for x in stats]
    return value, by_pair, grads, int((rows.segment_RT > 0).sum())


@pytest.mark.parametrize("kernel", ["dense", "blocks"])
def test_sharing_the_prompt_changes_nothing_but_the_work(kernel):
    spec = models.ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    model = dataclasses.replace(models.Model(spec), place=attention.Placement(kernel))
    params, pairs = model.init(jax.random.key(0)), make_pairs()
    value, stats, grads, tokens = loss_and_gradients(model, params, pairs, share=False)
    shared = loss_and_gradients(model, params, pairs, share=True)
    np.testing.assert_allclose(shared[0], value, rtol=1e-6)
    for a, b in zip(shared[1], stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(shared[2]), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)
    assert tokens - shared[3] == pairs.start_N2[:, 0].sum()  # each prompt once less


def test_shared_prompts_over_eight_devices():
    spec = models.ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    pairs = make_pairs()
    lengths = pairs.row_lengths(True)
    plan = pack.plan(lengths, range(PAIRS), row_length=128, rows=4, slots=PAIRS)
    rows = pack.collate(pairs, plan[0], 128, share=True)
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
