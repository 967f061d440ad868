"""Selection: counts, ties, chance and guards, against closed forms and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_jax import selection

JIT = pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])


def _maybe_jit(jit, fn):
    return jax.jit(fn) if jit else fn


def _rng(seed=0):
    return np.random.default_rng(seed)


# --- inside a step


@JIT
def test_top_k_is_the_sorted_prefix_with_ties_by_tie_break_then_index(jit):
    score = np.float32([1, 3, 3, 2, 3, np.nan, -np.inf])
    plain = _maybe_jit(jit, lambda s: selection.top_k(s, 4))(score)
    assert plain.tolist() == [1, 2, 4, 3]
    broken = _maybe_jit(jit, lambda s, t: selection.top_k(s, 4, t))(score, np.arange(7.0))
    assert broken.tolist() == [4, 2, 1, 3]
    assert selection.top_k(score, 7).tolist() == [1, 2, 4, 3, 0, 5, 6]  # nan and -inf are last


@JIT
def test_threshold_counts_the_boundary_in_and_nan_out(jit):
    mask = _maybe_jit(jit, selection.threshold)(np.float32([0.5, 0.4999, np.nan, np.inf]), 0.5)
    assert mask.tolist() == [True, False, False, True]


def _inclusion(weight, k):
    """Exact probability of each item in k successive draws without replacement."""
    found = np.zeros(len(weight))
    for order in itertools.permutations(range(len(weight)), k):
        left, probability = weight.sum(), 1.0
        for i in order:
            probability *= weight[i] / left
            left -= weight[i]
        found[list(order)] += probability
    return found


@JIT
@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_gumbel_top_k_includes_pairs_as_often_as_successive_draws_do(jit, tau):
    score, k, draws = np.array([0.2, 0.5, 1.0, 2.0, 3.5]), 2, 40_000
    fn = _maybe_jit(jit, jax.vmap(lambda key: selection.sample(key, score, k, tau)))
    drawn = np.asarray(fn(jax.random.split(jax.random.key(0), draws)))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    frequency = np.bincount(drawn.reshape(-1), minlength=5) / draws
    expected = _inclusion(score**tau, k)
    np.testing.assert_allclose(frequency, expected, atol=4 * np.sqrt(0.25 / draws))
    first = np.bincount(drawn[:, 0], minlength=5) / draws
    np.testing.assert_allclose(first, score**tau / (score**tau).sum(), atol=0.01)


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_sample_takes_zeros_last_and_excluded_pairs_never_while_others_are_left(tau):
    score = np.float32([0, 5, -np.inf, np.nan, 0, 1e-30])
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = np.asarray(jax.vmap(lambda key: selection.sample(key, score, 4, tau))(keys))
    assert all({1, 5} == set(row[:2]) and {0, 4} == set(row[2:]) for row in drawn.tolist())
    assert 0.3 < (drawn[:, 2] == 0).mean() < 0.7  # zeros are alike


def test_sampling_ever_more_greedily_becomes_top_k():
    score = np.float32([0.3, 0.1, 0.2, 0.4])
    drawn = selection.sample(jax.random.key(0), score, 4, 1e4)
    assert drawn.tolist() == selection.top_k(score, 4).tolist()


@JIT
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0])
def test_soft_weights_follow_the_power_and_keep_the_total(jit, tau):
    score = np.random.default_rng(0).uniform(0.1, 9, (3, 4))
    weight = np.float32(np.random.default_rng(1).integers(0, 3, (3, 4)))
    found = _maybe_jit(jit, lambda s, w: selection.soft_weights(s, tau, w))(score, weight)
    power = weight * score**tau
    np.testing.assert_allclose(found, power * weight.sum() / power.sum(), rtol=1e-4)
    assert (np.asarray(found)[weight == 0] == 0).all()
    np.testing.assert_allclose(found.sum(), weight.sum(), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_soft_weights_ignore_the_scores_of_empty_slots(bad):
    found = selection.soft_weights(np.float32([1.0, bad, 1.0]), 2.0, np.float32([1, 0, 3]))
    np.testing.assert_allclose(found, [1, 0, 3], rtol=1e-6)


def test_soft_weights_of_nothing_are_0_and_of_zero_scores_are_even():
    nothing = selection.soft_weights(np.ones(3), 1.0, np.zeros(3))
    assert nothing.tolist() == [0, 0, 0]
    np.testing.assert_allclose(selection.soft_weights(np.zeros(3), 1.0, np.ones(3)), 1, rtol=1e-6)


@JIT
@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_a_pair_of_score_0_has_no_weight_beside_others(jit, tau):
    score, weight = np.float32([0, 1, 16, 0]), np.float32([1, 1, 1, 0])
    found = _maybe_jit(jit, lambda s, w, t: selection.soft_weights(s, t, w))(score, weight, tau)
    power = np.float64([0, 1, 16.0**tau, 0])
    np.testing.assert_allclose(found, 3 * power / power.sum(), rtol=1e-5)


def test_soft_weights_survive_scores_of_any_size():
    score = np.float32([1e-38, 1e-3, 1.0, 1e30])
    for tau in (0.5, 8.0):
        found = np.asarray(selection.soft_weights(score, tau, np.ones(4)))
        assert np.isfinite(found).all() and np.isclose(found.sum(), 4, rtol=1e-5)


def test_two_batches_of_one_shape_are_traced_once():
    traces = []

    @jax.jit
    def step(key, score, weight):
        traces.append(1)
        return (
            selection.top_k(score, 3),
            selection.sample(key, score, 3),
            selection.soft_weights(score, 1.0, weight),
            selection.threshold(score, 0.5),
        )

    for seed in range(2):
        step(jax.random.key(seed), jnp.full(8, seed + 1.0), jnp.ones(8))
    assert len(traces) == 1


# --- the pool


def _select(priority, *, stratum=None, pair=None, keep=0.5, uniform_share=0.0, seed=0, **guard):
    n = len(priority)
    return selection.select_pool(
        np.asarray(priority, float),
        np.zeros(n, int) if stratum is None else np.asarray(stratum),
        np.arange(n) if pair is None else np.asarray(pair),
        keep=keep,
        uniform_share=uniform_share,
        rng=_rng(seed),
        **guard,
    )


@given(
    n=st.integers(1, 60),
    strata=st.integers(1, 7),
    keep=st.floats(0.01, 1.0),
    share=st.floats(0, 1),
    noise=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_counts_are_exact_and_strata_get_their_share(n, strata, keep, share, noise, seed):
    rng = _rng(seed)
    stratum, reward = rng.integers(0, strata, n), rng.normal(size=n)
    chosen = _select(
        rng.normal(size=n),
        stratum=stratum,
        keep=keep,
        uniform_share=share,
        seed=seed,
        noisy_P=reward < np.sort(reward)[int(noise * n)],
    )
    left_out = int(noise * n)
    total = min(max(1, int(np.floor(keep * n + 0.5))), n - left_out)
    assert chosen.selected_P.sum() == total
    assert (chosen.reason_P == "noise").sum() == left_out
    guarded = chosen.reason_P != "noise"
    if left_out:
        assert reward[~guarded].max() < reward[guarded].min()
    for k in range(strata):
        exact = total * (guarded & (stratum == k)).sum() / guarded.sum()
        assert abs(chosen.selected_P[stratum == k].sum() - exact) < 1
    if keep < 1:
        assert (chosen.reason_P == "uniform").sum() == int(np.floor(share * total + 0.5))
        assert set(chosen.reason_P[chosen.selected_P]) <= {"score", "uniform"}
    assert set(chosen.reason_P[~chosen.selected_P]) <= {"rank", "noise"}


def test_inside_a_stratum_the_best_are_kept_even_if_another_stratum_is_better():
    priority = np.r_[np.arange(8.0), 100 + np.arange(4.0)]
    chosen = _select(priority, stratum=[0] * 8 + [1] * 4)
    assert np.flatnonzero(chosen.selected_P).tolist() == [4, 5, 6, 7, 10, 11]


def test_ties_go_to_the_lower_pair_wherever_it_stands_in_the_pool():
    chosen = _select(np.zeros(6), pair=[9, 2, 7, 1, 8, 3])
    assert sorted(np.array([9, 2, 7, 1, 8, 3])[chosen.selected_P]) == [1, 2, 3]


def test_result_is_a_function_of_the_generator_and_the_set_of_pairs():
    rng = _rng(5)
    priority, stratum, pair = rng.normal(size=40), rng.integers(0, 3, 40), rng.permutation(99)[:40]
    order = rng.permutation(40)

    def kept(o, seed):
        chosen = _select(
            priority[o], stratum=stratum[o], pair=pair[o], uniform_share=0.5, seed=seed
        )
        return dict(zip(pair[o], chosen.reason_P, strict=True))

    assert kept(np.arange(40), 0) == kept(np.arange(40), 0) == kept(order, 0)
    assert kept(np.arange(40), 0) != kept(np.arange(40), 1)


def test_the_uniform_share_comes_evenly_from_what_rank_left():
    picked = np.zeros(12)
    for seed in range(3000):
        reason = _select(-np.arange(12.0), uniform_share=0.5, seed=seed).reason_P
        assert (reason[:3] == "score").all()
        picked += reason == "uniform"
    np.testing.assert_allclose(picked[3:] / 3000, 3 / 9, atol=0.04)
    assert (picked[:3] == 0).all()


def test_keeping_all_needs_no_ranking_and_says_all():
    chosen = _select(np.full(5, np.nan), keep=1.0)
    assert chosen.selected_P.all() and set(chosen.reason_P) == {"all"}


def test_pairs_of_unknown_priority_come_in_by_chance_only():
    chosen = _select([np.nan, 1.0, np.nan, np.nan, np.nan, 2.0, np.nan, np.nan], keep=0.5)
    assert (chosen.reason_P[[1, 5]] == "score").all()
    assert (chosen.reason_P == "uniform").sum() == 2


def test_pairs_that_are_not_believed_come_in_neither_by_rank_nor_by_chance():
    noisy = np.arange(12) % 3 == 0
    for share in (0.0, 0.5, 1.0):
        chosen = _select(np.ones(12), keep=0.6, uniform_share=share, noisy_P=noisy)
        assert not chosen.selected_P[noisy].any() and (chosen.reason_P[noisy] == "noise").all()
        assert chosen.selected_P.sum() == 7
    assert _select(np.ones(12), keep=1.0, noisy_P=noisy).selected_P.sum() == 8  # all that is left


def test_a_guard_that_suspects_nobody_changes_nothing():
    priority = _rng().normal(size=30)
    plain = _select(priority, uniform_share=0.3)
    off = _select(priority, uniform_share=0.3, noisy_P=np.zeros(30, bool))
    jax.tree.map(np.testing.assert_array_equal, plain, off)


def test_an_empty_pool_gives_an_empty_selection():
    assert _select([]).selected_P.shape == (0,)


@given(st.integers(0, 200), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_apportioned_shares_are_exact_to_within_one_and_never_exceed_what_there_is(total, weight):
    weight = np.array(weight)
    share = selection.apportion(total, weight)
    if weight.sum() == 0:
        assert (share == 0).all()
        return
    assert share.sum() == total and (share >= 0).all()
    assert (np.abs(share - total * weight / weight.sum()) < 1 + 1e-6).all()
    if total <= weight.sum():
        assert (share <= weight).all()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"keep": 0.0}, r"keep=0.0 must lie in \(0, 1\]"),
        ({"keep": 1.5}, r"keep=1.5 must lie in \(0, 1\]"),
        ({"uniform_share": -0.1}, "uniform_share=-0.1"),
    ],
)
def test_wrong_fractions_are_named_with_rule_and_fix(settings_, words):
    with pytest.raises(ValueError, match=words):
        _select(np.zeros(4), **settings_)
