"""Log-probabilities of packed rows against float64 numpy, and what the chunks cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sage_jax import batch, head, logprobs

R, T, S, D, V = 3, 24, 2, 8, 40


def packed(seed=0):
    """Rows with two pairs each, the second row half empty, sequences of uneven lengths."""
    rng = np.random.default_rng(seed)
    rows = batch.empty(R, T, S)
    pair = 0
    for r in range(R):
        at = 0
        for s in range(1 if r == 1 else S):
            rows.pair_RS[r, s], rows.weight_RS[r, s] = pair, 1.0
            pair += 1
            for side in range(2):
                length = int(rng.integers(3, 7))
                span = slice(at, at + length)
                rows.tokens_RT[r, span] = rng.integers(1, V, length)
                rows.position_RT[r, span] = np.arange(length)
                rows.segment_RT[r, span] = batch.segment_id(s, side)
                rows.completion_RT[r, at + int(rng.integers(1, length)) : at + length] = True
                at += length
    return rows


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.float32(rng.normal(size=(V, D))), jnp.float32(rng.normal(size=(D, V)))


def logps_fn(chunk=None, logit_norm=False, light=False, spread=None):
    """A model whose hidden state is its token's embedding plus its position."""
    return logprobs.make_logps_fn(
        lambda p, _, b: p[0][b.tokens_RT] + 0.1 * b.position_RT[..., None],
        lambda p, _: p[1],
        chunk=chunk,
        logit_norm=logit_norm,
        light=light,
        spread=spread,
    )


def expected(rows, params):
    """Every statistic, token by token, in float64."""
    embed, head = (np.float64(x) for x in params)
    out = {name: np.zeros((R, S, 2)) for name in logprobs.SequenceStats._fields}
    each = {}
    for r in range(R):
        for t in range(1, T):
            segment = rows.segment_RT[r, t]
            if not rows.completion_RT[r, t] or segment == 0 or rows.segment_RT[r, t - 1] != segment:
                continue
            place = (r, (segment - 1) // 2, (segment - 1) % 2)
            before = rows.tokens_RT[r, t - 1]
            logits = (embed[before] + 0.1 * rows.position_RT[r, t - 1]) @ head
            logp = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            p, y = np.exp(logp), rows.tokens_RT[r, t]
            each.setdefault(place, []).append(logp[y])
            out["entropy"][place] -= (p * logp).sum()
            out["mean_logit"][place] += logits.mean()
            out["hits"][place] += logits.argmax() == y
            out["logit_norm"][place] += ((np.eye(V)[y] - p) ** 2).sum()
    for place, values in each.items():
        out["logps"][place] = np.sum(values)
        out["tokens"][place] = len(values)
        out["spread"][place] = ((values - np.mean(values)) ** 2).sum()
    return out


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("chunk", [None, 1, 7, T])
def test_statistics_equal_a_token_by_token_float64_computation(jit, chunk):
    rows, params = packed(), weights()
    found = jit(logps_fn(chunk, logit_norm=True))(params, None, rows)
    for name, value in expected(rows, params).items():
        np.testing.assert_allclose(getattr(found, name), value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("chunk", [None, 1, 5, T])
def test_the_light_path_gives_the_same_numbers_and_zeros_for_what_no_score_reads(jit, chunk):
    rows, params = packed(), weights()
    found = jit(logps_fn(chunk, logit_norm=True, light=True))(params, None, rows)
    by_hand = expected(rows, params)
    for name in ("logps", "tokens", "spread", "logit_norm"):
        np.testing.assert_allclose(getattr(found, name), by_hand[name], atol=2e-4, err_msg=name)
    assert all(np.all(np.asarray(x) == 0) for x in (found.entropy, found.mean_logit, found.hits))
    # The full path differs in the last bits at most: the same dot products, in other chunks.
    full = jit(logps_fn(logit_norm=True))(params, None, rows)
    for name in ("logps", "tokens", "spread", "logit_norm"):
        a, b = getattr(found, name), getattr(full, name)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5, err_msg=name)


def test_the_light_path_of_rows_without_completions_is_zero():
    empty = jax.jit(logps_fn(light=True))(weights(), None, batch.empty(R, T, S))
    assert all(np.all(np.asarray(value) == 0) for value in empty)


def test_no_head_work_is_spent_on_prompts():
    """The loop runs as many chunks as the fullest row has completion tokens, and no more."""
    rows, params, seen = packed(), weights(), []
    hidden = jnp.asarray(params[0])[rows.tokens_RT]
    _, _, mask_RT = logprobs.targets(rows)
    with jax.disable_jit():  # the loop runs in Python: each chunk calls the matmul
        with pytest.MonkeyPatch.context() as patch:
            one = head._logits
            patch.setattr(head, "_logits", lambda *a: seen.append(a[0].shape) or one(*a))
            logprobs.completion_stats(hidden, params[1], rows.tokens_RT, mask_RT, chunk=2)
    fullest = int(np.asarray(mask_RT).sum(axis=1).max())
    assert seen == [(R, 2, D)] * -(-fullest // 2) and 2 * len(seen) < T


def whole(hidden, head_DV, targets, mask):
    """Log-probabilities with all logits at once, differentiated by JAX."""
    logits = jnp.matmul(hidden, head_DV, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits)
    return jnp.where(mask > 0, jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], 0.0)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kept", [0, 2**20], ids=["again", "kept"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_gradient_is_that_of_whole_logits(dtype, kept, joined):
    rows, params = packed(), weights()
    targets, _, mask = logprobs.targets(rows)
    slope = jnp.float32(np.random.default_rng(1).normal(size=mask.shape))
    hidden, head_DV = (jnp.asarray(x, dtype) for x in (params[0][rows.tokens_RT], params[1]))
    exact = [x.astype(jnp.float32) for x in (hidden, head_DV)]
    wanted = jax.grad(lambda *a: jnp.sum(whole(*a, targets, mask) * slope), (0, 1))(*exact)

    def ours(*given):
        memory = head.Memory(kept=kept)
        found = logprobs.completion_stats(
            *given, targets, mask, chunk=4, joined=joined, memory=memory
        )
        return jnp.sum(found.logp_RT * slope)

    for a, b in zip(jax.jit(jax.grad(ours, (0, 1)))(hidden, head_DV), wanted, strict=True):
        assert a.dtype == dtype
        error = np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))
        assert error < (1e-6 if dtype == jnp.float32 else 1e-2)


def test_head_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("rows",), axis_types=(AxisType.Auto,))
    rows = jax.tree.map(lambda x: np.concatenate([x] * 3 + [x[:1]] * 7), packed())  # 16 rows
    params, spec = weights(), PartitionSpec("rows")

    def spread(fn):
        return jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=(spec,) * 4 + (PartitionSpec(),),
            out_specs=spec,
            check_vma=False,
        )

    def total(fn, params, rows):
        stats = fn(params, None, rows)
        return jnp.sum(stats.logps * jnp.arange(1.0, 1 + stats.logps.size).reshape(16, S, 2))

    split = jax.device_put(rows, NamedSharding(mesh, spec))
    wanted = jax.grad(lambda p: total(logps_fn(), p, rows))(params)
    for fn in (logps_fn(), logps_fn(spread=spread)):
        found = jax.jit(jax.grad(lambda p, b, fn=fn: total(fn, p, b)))(params, split)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-3)


def test_gradient_does_not_depend_on_the_chunk_and_empty_slots_add_nothing():
    rows, params = packed(), weights()

    def total(params, chunk):
        stats = logps_fn(chunk)(params, None, rows)
        return jnp.sum(stats.logps * jnp.arange(1.0, 1 + R * S * 2).reshape(R, S, 2))

    whole, cut = (jax.grad(total)(params, chunk) for chunk in (T, 5))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.all(np.isfinite(whole[0]))
    empty = logps_fn()(params, None, batch.empty(R, T, S))
    assert all(np.all(np.asarray(value) == 0) for value in empty)


def test_only_log_probabilities_carry_a_gradient():
    rows, params = packed(), weights()

    def others(params):
        stats = logps_fn(logit_norm=True)(params, None, rows)
        return sum(jnp.sum(v) for k, v in stats._asdict().items() if k != "logps")

    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(jax.grad(others)(params)))


def test_bfloat16_hidden_states_give_float32_sums():
    params = tuple(jnp.bfloat16(x) for x in weights())
    found = logps_fn()(params, None, packed())
    assert all(value.dtype == jnp.float32 for value in found)


def test_head_needs_a_tenth_of_the_memory_of_whole_logits():
    rows, length, width, vocabulary = 4, 1024, 64, 49152
    hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    head = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def chunked(hidden, head, targets):
        return logprobs.token_stats(hidden, head, targets).logp_RT.sum()

    def naive(hidden, head, targets):
        logp = jax.nn.log_softmax(jnp.einsum("rtd,dv->rtv", hidden, head))
        return jnp.take_along_axis(logp, targets[..., None], -1).sum()

    def temporaries(fn):
        compiled = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(hidden, head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunked) < 0.1 * temporaries(naive)


@pytest.mark.parametrize("kept", [0, 2**29], ids=["computed again", "kept"])
def test_capped_logits_have_the_gradient_of_autodiff(kept):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (2, 6, 5)), jax.random.normal(keys[1], (5, 11))
    targets = jax.random.randint(keys[2], (2, 6), 0, 11)
    weight = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)

    def ours(hidden, table):
        memory = head.Memory(kept=kept)
        found = logprobs.token_stats(hidden, table, targets, chunk=4, softcap=2.0, memory=memory)
        return jnp.sum(weight * found.logp_RT)

    def plain(hidden, table):
        logps = jax.nn.log_softmax(2.0 * jnp.tanh(hidden @ table / 2.0))
        return jnp.sum(weight * jnp.take_along_axis(logps, targets[..., None], -1)[..., 0])

    found, expected = (
        jax.jit(jax.value_and_grad(fn, (0, 1)))(hidden, table) for fn in (ours, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_hidden_states_that_were_shifted_already_are_refused():
    logps_fn = logprobs.make_logps_fn(lambda p, f, b: p[b.tokens_RT][:, :-1], lambda p, f: p.T)
    with pytest.raises(ValueError, match=r"\[1, 7, 4\] for rows \[1, 8\]"):
        logps_fn(jnp.ones((4, 4)), None, batch.empty(1, 8, 1))
