"""Scores against closed forms in float64; what can and what cannot change a ranking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import curriculum, logprobs, losses, rules, scores

JIT = pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
TO_ZERO = ("sigmoid", "simpo")  # losses whose slope dies out, so that every score falls with m


def _stats(n=50, seed=0, *, spread=4.0):
    """Sums over completions of `n` pairs, and the token log-probs that they are sums of."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 12, (n, 2))
    terms = [[-rng.exponential(spread, k) for k in pair] for pair in tokens]
    zero = np.zeros((n, 2), np.float32)
    stats = logprobs.SequenceStats(
        logps=np.float32([[side.sum() for side in pair] for pair in terms]),
        tokens=np.float32(tokens),
        spread=np.float32([[((s - s.mean()) ** 2).sum() for s in pair] for pair in terms]),
        entropy=zero,
        mean_logit=zero,
        hits=zero,
        logit_norm=np.float32(rng.uniform(0, 2, (n, 2)) * tokens),
    )
    ref = np.float32(stats.logps + rng.normal(0, 3, (n, 2)))
    return stats, ref, terms


def _ranking(score):
    return np.argsort(-np.float64(score), kind="stable")


@JIT
def test_signal_curvature_and_decrement_of_sigmoid_match_float64(jit):
    margin = np.linspace(-30, 30, 61)
    sigma = 1 / (1 + np.exp(-margin))
    signal, bell = 1 - sigma, np.exp(-np.abs(margin)) / (1 + np.exp(-np.abs(margin))) ** 2
    loss = losses.sigmoid()
    found = jit(lambda m: scores.gradient_signal(loss, m))(margin)
    np.testing.assert_allclose(found, signal, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(jit(lambda m: scores.curvature(loss, m))(margin), bell, rtol=1e-5)
    for damping in (1e-3, 0.1, 10.0):
        found = jit(lambda m, d=damping: scores.damped_decrement(loss, m, d))(margin)
        np.testing.assert_allclose(found, signal**2 / (bell + damping), rtol=1e-5, atol=1e-12)


def test_decrement_is_twice_the_fall_of_the_quadratic_model_under_a_damped_newton_step():
    loss, m, damping = losses.sigmoid(), 0.7, 0.3
    slope = float(jax.grad(loss)(m))
    bend = float(jax.grad(jax.grad(loss))(m)) + damping
    newton = -slope / bend
    fall = -(slope * newton + 0.5 * bend * newton**2)
    np.testing.assert_allclose(scores.damped_decrement(loss, m, damping), 2 * fall, rtol=1e-5)


@pytest.mark.parametrize("name", TO_ZERO)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_margin_only_scores_rank_exactly_like_hardest_first(name, damping):
    loss = losses.LOSSES[name]()
    margin = np.random.default_rng(0).permutation(np.linspace(-9, 9, 200))
    hardest_first = np.argsort(margin)
    signal = scores.gradient_signal(loss, margin)
    bend = scores.curvature(loss, margin)
    for score in (
        signal,
        signal / (bend + damping),
        scores.damped_decrement(loss, margin, damping),
        scores.sage(loss, margin, np.full(200, 0.3), kappa=2.0, damping=damping),
    ):
        np.testing.assert_array_equal(_ranking(score), hardest_first)


@pytest.mark.parametrize(
    "loss",
    [losses.ipo(0.1), losses.sppo_hard(0.1), losses.nca_pair(), losses.sigmoid(0.1, 0.2)],
    ids=lambda loss: loss.name,
)
def test_no_pair_beyond_a_target_comes_before_one_that_is_short_of_it(loss):
    margin = np.float32(np.random.default_rng(0).permutation(np.linspace(-30, 30, 121)))
    slope = jax.vmap(jax.grad(lambda m: loss(m / 2, -m / 2)))(margin)  # by autodiff
    short = np.asarray(slope) < 0
    assert 0 < short.sum() < len(margin)
    score = np.asarray(scores.damped_decrement(loss, margin))
    assert (score[~short] == 0).all() and (score[short] > 0).all()
    pairs = scores.make_rescore_fn(loss, kappa=0.0)(margin, margin, np.zeros(121))
    priority = rules.sage(
        rules.candidates(pairs, curriculum.init_memory(121)), np.random.default_rng(0)
    )
    np.testing.assert_array_equal(np.argsort(-priority), np.argsort(margin))


@pytest.mark.parametrize("margin", ["likelihood", "reward"])
def test_without_errors_all_score_selectors_choose_the_hardest_half(margin):
    stats, ref, _ = _stats()
    pairs = scores.make_score_fn(losses.sigmoid(), margin=margin, kappa=0.0)(stats, ref)
    hardest = set(np.argsort(np.asarray(pairs.margin))[:25])
    for name in ("sage", "gradient", "hard_first"):
        known = rules.candidates(pairs, curriculum.init_memory(50))
        priority = rules.RULES[name].rank(known, np.random.default_rng(0))
        assert set(np.argsort(-priority)[:25]) == hardest, name


def test_token_errors_change_the_ranking_and_put_unsupported_errors_behind():
    stats, ref, _ = _stats()
    loss = losses.sigmoid()
    plain = scores.make_score_fn(loss, kappa=0.0)(stats, ref)
    doubting = scores.make_score_fn(loss, kappa=2.0)(stats, ref)
    memory, rng = curriculum.init_memory(50), np.random.default_rng(0)
    first = [rules.sage(rules.candidates(pairs, memory), rng) for pairs in (plain, doubting)]
    assert (np.argsort(first[0]) != np.argsort(first[1])).mean() > 0.5
    confident, doubtful = scores.sage(loss, np.array([-4.0, -6.0]), np.array([0.5, 4.0]))
    assert confident > doubtful


def test_an_error_bar_can_only_lower_the_score_of_a_monotone_loss():
    stats, ref, _ = _stats()
    found = [scores.make_score_fn(losses.sigmoid(), kappa=k)(stats, ref).score for k in (0, 1, 4)]
    assert (found[1] <= found[0]).all() and (found[2] <= found[1]).all()


# --- where the errors come from


@JIT
@pytest.mark.parametrize("length_normalised", [False, True])
def test_token_standard_error_is_that_of_the_sum_over_tokens(jit, length_normalised):
    stats, _, terms = _stats()
    expected = []
    for chosen, rejected in terms:
        side = [
            s.size * s.var() / (s.size**2 if length_normalised else 1) for s in (chosen, rejected)
        ]
        expected.append(3.0 * np.sqrt(sum(side)))
    found = jit(
        lambda spread, tokens: scores.token_standard_error(
            spread, tokens, temperature=3.0, length_normalised=length_normalised
        )
    )(stats.spread, stats.tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_token_standard_error_covers_the_margin_of_resampled_tokens():
    rng = np.random.default_rng(0)
    chosen, rejected = -rng.exponential(2.0, 40), -rng.exponential(2.0, 30)
    redrawn = [rng.choice(s, (20_000, s.size)).sum(1) for s in (chosen, rejected)]  # bootstrap
    spread = np.array([((s - s.mean()) ** 2).sum() for s in (chosen, rejected)])
    found = scores.token_standard_error(spread, np.array([40, 30]))
    np.testing.assert_allclose(found, (redrawn[0] - redrawn[1]).std(), rtol=0.02)


def test_logit_norm_error_is_the_deviation_under_unit_noise_on_the_logits():
    rng = np.random.default_rng(0)
    logits, target, scale = rng.normal(size=(6, 5)), rng.integers(0, 5, 6), 1e-3

    def total(logits):  # log-probability of a completion of six tokens
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logp, np.broadcast_to(target[:, None], (*logp.shape[:-1], 1)), -1)

    noisy = total(logits + scale * rng.normal(size=(20_000, 6, 5)))[..., 0].sum(-1)
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    norm = ((np.eye(5)[target] - prob) ** 2).sum()
    found = scores.logit_norm_error(np.array([norm, 0.0]), np.array([6, 0]))
    np.testing.assert_allclose(found, noisy.std() / scale, rtol=0.02)


@JIT
def test_round_variance_error_is_the_sample_deviation_and_0_before_two_visits(jit):
    visited = np.random.default_rng(0).normal(size=(7, 3))
    m2 = ((visited - visited.mean(0)) ** 2).sum(0)
    found = jit(scores.round_variance_error)(visited.mean(0), m2, np.full(3, 7))
    np.testing.assert_allclose(found, visited.std(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(jit(scores.round_variance_error)(m2, m2, np.array([0, 1, 1])), 0)


# --- the score function


@JIT
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_score_fn_measures_both_margins_and_uses_the_likelihood_margin(jit, temperature):
    stats, ref, _ = _stats()
    loss = losses.sigmoid(beta=0.2)
    pairs = jit(scores.make_score_fn(loss, kappa=1.5, temperature=temperature))(stats, ref)
    a, r = np.float64(stats.logps), np.float64(ref)
    likelihood = temperature * (a[:, 0] - a[:, 1])
    error = temperature * np.sqrt(np.float64(stats.spread).sum(-1))
    reward = 0.2 * ((a - r)[:, 0] - (a - r)[:, 1])
    np.testing.assert_allclose(pairs.reward_margin, reward, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pairs.likelihood_margin, likelihood, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pairs.margin_error, error, rtol=1e-5)
    np.testing.assert_array_equal(pairs.margin, pairs.likelihood_margin)
    np.testing.assert_allclose(
        pairs.pessimistic_margin, likelihood + 1.5 * error, rtol=1e-4, atol=1e-4
    )
    sigma = 1 / (1 + np.exp(-(likelihood + 1.5 * error)))
    expected = (1 - sigma) ** 2 / (sigma * (1 - sigma) + 0.1)
    np.testing.assert_allclose(pairs.score, expected, rtol=1e-3, atol=1e-8)
    assert all(x.dtype == jnp.float32 and x.shape == (50,) for x in pairs)


def test_reward_margin_in_use_scales_the_error_by_beta():
    stats, ref, _ = _stats()
    pairs = scores.make_score_fn(losses.sigmoid(0.2), margin="reward", temperature=0.5)(stats, ref)
    error = 0.2 * np.sqrt(stats.spread.sum(-1))
    np.testing.assert_array_equal(pairs.margin, pairs.reward_margin)
    np.testing.assert_allclose(
        pairs.pessimistic_margin - pairs.reward_margin, 2.0 * error, rtol=1e-4, atol=1e-4
    )


def test_all_reward_margins_tie_while_the_policy_is_its_reference():
    stats, _, _ = _stats()
    literal = scores.make_score_fn(losses.sigmoid(), margin="reward", kappa=0.0)
    assert len(np.unique(literal(stats, stats.logps).score)) == 1
    policy = scores.make_score_fn(losses.sigmoid(), margin="likelihood")
    assert len(np.unique(policy(stats, stats.logps).pessimistic_margin)) == 50


def test_length_normalised_margin_is_of_means_and_leaves_the_reward_margin_a_sum():
    stats, ref, _ = _stats()
    pairs = scores.make_score_fn(losses.simpo(), length_normalised=True)(stats, ref)
    mean = stats.logps / stats.tokens
    np.testing.assert_allclose(
        pairs.likelihood_margin, mean[:, 0] - mean[:, 1], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        pairs.reward_margin, scores.make_score_fn(losses.simpo())(stats, ref).reward_margin
    )


@pytest.mark.parametrize("stability", scores.STABILITIES)
def test_stability_names_the_source_of_the_error(stability):
    stats, ref, _ = _stats()
    error = scores.make_score_fn(losses.sigmoid(), stability=stability)(stats, ref).margin_error
    of = {"token_error": stats.spread, "logit_norm": stats.logit_norm, "none": np.zeros((50, 2))}
    np.testing.assert_allclose(error, np.sqrt(of[stability].sum(-1)), rtol=1e-6)


def test_variances_of_several_sources_add_up():
    stats, ref, _ = _stats()
    both = scores.make_score_fn(losses.sigmoid(), stability="token_error+logit_norm")(stats, ref)
    want = np.sqrt(np.float64(stats.spread + stats.logit_norm).sum(-1))
    np.testing.assert_allclose(both.margin_error, want, rtol=1e-6)


@pytest.mark.parametrize("margin", scores.MARGINS)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_rescoring_remembered_margins_equals_scoring_afresh(margin, temperature):
    stats, ref, _ = _stats()
    settings = {"margin": margin, "kappa": 3.0, "damping": 0.2, "temperature": temperature}
    fresh = scores.make_score_fn(losses.ipo(), **settings)(stats, ref)
    again = scores.make_rescore_fn(losses.ipo(), **settings)(
        np.asarray(fresh.reward_margin), np.asarray(fresh.likelihood_margin), fresh.margin_error
    )
    jax.tree.map(np.testing.assert_array_equal, fresh, again)


# --- edges


@pytest.mark.parametrize("name", losses.LOSSES)
def test_scores_of_extreme_and_of_empty_pairs_are_finite_and_not_negative(name):
    big = np.float32([[-1e4, -1e-3], [-1e-3, -1e4], [0, 0], [-1e4, -1e4], [-5, 0]])
    z = np.zeros_like(big)
    tokens = np.float32([[900, 3], [3, 900], [0, 0], [900, 900], [4, 0]])
    stats = logprobs.SequenceStats(big, tokens, big**2, z, z, z, z)
    for margin in scores.MARGINS:
        pairs = scores.make_score_fn(losses.LOSSES[name](), margin=margin)(stats, z)
        assert all(np.isfinite(x).all() for x in pairs)
        assert (pairs.score >= 0).all() and (pairs.gradient_signal >= 0).all()


def test_concave_stretches_of_a_loss_do_not_break_the_decrement():
    loss = losses.apo_zero()  # curvature down to -0.048: with small damping l'' + d would be < 0
    margin = np.linspace(-8, 8, 101)
    score = scores.damped_decrement(loss, margin, 0.01)
    assert (scores.curvature(loss, margin) < -0.04).any()
    assert (score >= 0).all() and (score <= loss.slope(margin / 2, -margin / 2) ** 2 / 0.0099).all()


def test_gradients_through_scores_are_finite_even_for_pairs_without_tokens():
    stats, ref, _ = _stats(4)
    empty = stats._replace(logps=stats.logps * 0, spread=stats.spread * 0, tokens=stats.tokens * 0)
    score_fn = scores.make_score_fn(losses.sigmoid())

    def total(logps, spread):
        return score_fn(empty._replace(logps=logps, spread=spread), ref * 0).score.sum()

    for gradient in jax.grad(total, argnums=(0, 1))(empty.logps, empty.spread):
        assert np.isfinite(gradient).all()


def test_scores_keep_any_leading_shape():
    stats, ref, _ = _stats(12)
    flat = scores.make_score_fn(losses.sigmoid())(stats, ref)
    rows = jax.tree.map(lambda x: x.reshape(3, 4, 2), stats)
    packed = scores.make_score_fn(losses.sigmoid())(rows, ref.reshape(3, 4, 2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(-1), b), packed, flat)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"margin": "rewards"}, "margin='rewards' must be one of likelihood, reward"),
        ({"kappa": -1.0}, "kappa=-1.0 must not be negative"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"stability": "tokens"}, "stability='tokens' must be one of logit_norm"),
        ({"stability": "token_error+token_error"}, "each once"),
        ({"stability": "none+token_error"}, "none and something"),
        ({"stability": "token_error+rounds"}, "one pass does not know the variance over rounds"),
        ({"margin": "reward", "length_normalised": True}, "cannot apply"),
    ],
)
def test_wrong_settings_are_named_with_rule_and_fix(settings, words):
    with pytest.raises(ValueError, match=words):
        scores.make_score_fn(losses.sigmoid(), **settings)


def test_decrement_without_damping_is_refused():
    with pytest.raises(ValueError, match="damping=0"):
        scores.damped_decrement(losses.sigmoid(), 0.0, 0)
