"""Beta-DPO's beta for every batch, against its formula in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_jax import batch, logprobs, losses, step

T, D, V, BETA, LR, ALPHA = 16, 8, 30, 0.1, 5.0, 0.6
logps_fn = logprobs.make_logps_fn(lambda p, _, b: p["embed"][b.tokens_RT], lambda p, _: p["head"])


def rows_of(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = batch.empty(count, T, 1)
    for r in range(count):
        rows.pair_RS[r, 0], rows.weight_RS[r, 0] = r, 1.0
        rows.ref_logps_RS2[r, 0] = rng.normal(size=2) * 3 - 8
        for side in range(2):
            span = slice(8 * side, 8 * side + int(rng.integers(4, 9)))
            rows.tokens_RT[r, span] = rng.integers(1, V, span.stop - span.start)
            rows.segment_RT[r, span] = batch.segment_id(0, side)
            rows.completion_RT[r, span.start + 2 : span.stop] = True
    return rows


def params():
    rng = np.random.default_rng(3)
    embed, head = rng.normal(size=(V, D)), rng.normal(size=(D, V))
    return {"embed": np.float32(embed), "head": np.float32(head)}


def log_probs(p, rows):
    """Each pair's two log-probs, and what a change of each does to the weights; float64."""
    found = []
    for r in range(len(rows.tokens_RT)):
        for side in range(2):
            at = rows.completion_RT[r] & (rows.segment_RT[r] == batch.segment_id(0, side))
            token, before = rows.tokens_RT[r, at], rows.tokens_RT[r, np.flatnonzero(at) - 1]
            logits = p["embed"][before] @ p["head"]
            logits -= logits.max(-1, keepdims=True)
            prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            pull = np.eye(V)[token] - prob
            embed = np.zeros((V, D))
            np.add.at(embed, before, pull @ p["head"].T)
            grad = {"embed": embed, "head": p["embed"][before].T @ pull}
            found.append((np.log(prob[np.arange(len(token)), token]).sum(), grad))
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def by_hand(count, batches, alpha, beta0=BETA):
    """Losses, betas, running means and weights of plain SGD steps; float64."""
    p = {name: np.float64(value) for name, value in params().items()}
    running, out = 0.0, []
    for rows in batches:
        sides = log_probs(p, rows)
        logp = np.array([[side[0] for side in pair] for pair in sides])
        ratio = logp - rows.ref_logps_RS2[:, 0]
        gap = ratio[:, 0] - ratio[:, 1]
        running = 0.9 * running + 0.1 * gap.mean()
        beta = max(beta0 * (1 + alpha * (gap.mean() - running)), 1e-3)
        loss = np.log1p(np.exp(-beta * gap)).mean()
        slope = -beta / (1 + np.exp(beta * gap)) / count
        for i, (chosen, rejected) in enumerate(sides):
            for name in p:
                p[name] = p[name] - LR * slope[i] * (chosen[1][name] - rejected[1][name])
        out.append((loss, beta, running))
    return out, p


def train(batches, alpha, loss=None, **settings):
    tx = optax.sgd(LR)
    fn = step.make_train_step(logps_fn, loss or losses.sigmoid(BETA), tx, beta_alpha=alpha,
                              **settings)  # fmt: skip
    traces = []
    jitted = jax.jit(lambda *a: (traces.append(1), fn(*a))[1])
    state, outputs = step.init_state(params(), tx, adaptive_beta=alpha is not None), []
    for rows in batches:
        state, output = jitted(state, None, rows)
        outputs.append((state.beta, output.metrics))
    assert len(traces) == 1
    return state, outputs


def test_loss_gradient_and_beta_are_those_of_the_paper_step_by_step():
    batches = [rows_of(6, seed) for seed in range(4)]
    expected, weights = by_hand(6, batches, ALPHA)
    state, outputs = train(batches, ALPHA)
    assert np.ptp([beta for _, beta, _ in expected]) > 0.02
    for (loss, beta, running), (adapted, metrics) in zip(expected, outputs, strict=True):
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
        np.testing.assert_allclose(metrics["selection/beta"], beta, rtol=2e-4)
        np.testing.assert_allclose(adapted.margin_mean, running, rtol=2e-4, atol=1e-5)
    for name in weights:
        np.testing.assert_allclose(state.params[name], weights[name], rtol=2e-4, atol=2e-5)


def test_alpha_0_is_plain_dpo_exactly():
    batches = [rows_of(6, seed) for seed in range(3)]
    plain, adapted = train(batches, None), train(batches, 0.0)
    jax.tree.map(np.testing.assert_array_equal, plain[0].params, adapted[0].params)
    for (nothing, a), (_, b) in zip(plain[1], adapted[1], strict=True):
        assert nothing == () and "selection/beta" not in a
        assert float(b["selection/beta"]) == np.float32(BETA)
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_constant_beta_adds_no_leaf_to_the_state():
    plain = step.init_state(params(), optax.sgd(0.1))
    assert len(jax.tree.leaves(plain)) == 3 and plain.beta == ()


def test_beta_never_falls_below_the_least_one():
    state = step.BetaState(jnp.float32(0.0))
    factor, _ = step.adapt_beta(state, jnp.full(4, -1e4), jnp.ones(4), beta=0.1, alpha=0.6)
    np.testing.assert_allclose(0.1 * factor, 1e-3, rtol=1e-6)
    small, _ = step.adapt_beta(state, jnp.full(4, -1e4), jnp.ones(4), beta=1e-4, alpha=0.6)
    assert float(small) == 1.0  # the floor raises nothing


def test_empty_slots_do_not_move_beta_and_an_empty_batch_leaves_the_mean():
    state, margin = step.BetaState(jnp.float32(2.0)), jnp.array([1.0, 5.0, 99.0])
    some = step.adapt_beta(state, margin, jnp.array([1.0, 0.5, 0.0]), beta=0.1, alpha=0.5)
    np.testing.assert_allclose(some[1].margin_mean, 0.9 * 2 + 0.1 * 3, rtol=1e-6)
    none = step.adapt_beta(state, margin, jnp.zeros(3), beta=0.1, alpha=0.5)
    np.testing.assert_allclose(none[0], 1, rtol=1e-6)
    np.testing.assert_allclose(none[1].margin_mean, 2, rtol=1e-6)


@pytest.mark.parametrize("name", losses.BETA_SCALES_REWARDS)
def test_a_factor_on_rewards_is_another_beta_for_the_losses_that_say_so(name):
    rows, factor = rows_of(6), jnp.float32(1.7)
    stats = logps_fn(params(), None, rows)
    scaled = step.pair_losses(losses.LOSSES[name](0.1), stats, rows.ref_logps_RS2,
                              reward_factor=factor)  # fmt: skip
    other = step.pair_losses(losses.LOSSES[name](0.17), stats, rows.ref_logps_RS2)
    np.testing.assert_allclose(scaled, other, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_adapted_is_refused():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate=1, not 2"):
        step.make_train_step(logps_fn, losses.sigmoid(), tx, accumulate=2, beta_alpha=0.6)
    with pytest.raises(ValueError, match="not 'ipo'"):
        step.make_train_step(logps_fn, losses.ipo(), tx, beta_alpha=0.6)


@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_a_state_made_for_the_other_kind_of_beta_is_an_error(alpha):
    tx = optax.sgd(LR)
    fn = step.make_train_step(logps_fn, losses.sigmoid(BETA), tx, beta_alpha=alpha)
    state = step.init_state(params(), tx, adaptive_beta=alpha is None)
    with pytest.raises(ValueError, match=f"adaptive_beta={alpha is not None}"):
        fn(state, None, rows_of(6, 0))
