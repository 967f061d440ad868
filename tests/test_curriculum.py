"""Memory, strata, competence, mixture and draw, against numpy and closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_jax import curriculum, scores


def _pairs(margin, error=0.0):
    margin = np.asarray(margin, np.float32)
    fields = dict.fromkeys(scores.PairScores._fields, np.zeros_like(margin))
    fields |= {
        "reward_margin": margin / 10,
        "likelihood_margin": margin,
        "margin_error": np.zeros_like(margin) + np.float32(error),
        "score": -margin,
    }
    return scores.PairScores(**fields)


def _visited(margin, error):
    memory = curriculum.init_memory(len(margin))
    return curriculum.remember(memory, np.arange(len(margin)), _pairs(margin, error), 0)


# --- memory


def test_running_mean_and_variance_equal_numpys_over_all_visits():
    rng = np.random.default_rng(0)
    n, rounds = 40, 25
    history = [[] for _ in range(n)]
    memory = curriculum.init_memory(n)
    for number in range(rounds):
        index = rng.permutation(n)[: rng.integers(0, n)]
        margin = np.float32(rng.normal(1000, 3, len(index)))  # a mean far from 0 cancels digits
        memory = curriculum.remember(memory, index, _pairs(margin), number)
        for i, m in zip(index, margin, strict=True):
            history[i].append(m)
    assert min(map(len, history)) > 2
    np.testing.assert_array_equal(memory.visits, list(map(len, history)))
    np.testing.assert_allclose(
        memory.mean, [np.mean(h, dtype=np.float64) for h in history], rtol=1e-6
    )
    deviation = [np.std(h, ddof=1, dtype=np.float64) for h in history]
    found = scores.round_variance_error(memory.mean, memory.m2, memory.visits)
    np.testing.assert_allclose(found, deviation, rtol=1e-3)
    np.testing.assert_array_equal(memory.likelihood_margin, [h[-1] for h in history])


def test_remember_writes_the_last_values_counts_and_round_of_the_seen_pairs_only():
    memory = curriculum.init_memory(4)
    memory = curriculum.remember(
        memory, np.array([2, 0]), _pairs([5.0, -1.0], 0.5), 3, trained=True
    )
    memory = curriculum.remember(memory, np.array([2]), _pairs([7.0], 0.25), 4)
    np.testing.assert_array_equal(memory.likelihood_margin, [-1, np.nan, 7, np.nan])
    np.testing.assert_array_equal(memory.reward_margin, np.float32([-0.1, np.nan, 0.7, np.nan]))
    np.testing.assert_array_equal(memory.margin_error, [0.5, np.nan, 0.25, np.nan])
    np.testing.assert_array_equal(memory.score, [1, np.nan, -7, np.nan])
    assert memory.visits.tolist() == [1, 0, 2, 0]
    assert memory.trained.tolist() == [1, 0, 1, 0]
    assert memory.last_round.tolist() == [3, -1, 4, -1]
    assert memory.drawn.tolist() == [0, 0, 0, 0]


def test_memory_functions_leave_their_argument_as_it_is_and_keep_the_dtypes():
    memory = curriculum.init_memory(3)
    before = [a.copy() for a in memory]
    after = curriculum.remember(memory, np.array([1]), _pairs([2.0]), 0, trained=True)
    after = curriculum.note_drawn(after, np.array([0, 1]))
    for old, same, new in zip(before, memory, after, strict=True):
        np.testing.assert_array_equal(old, same)
        assert old.dtype == new.dtype
    assert after.drawn.tolist() == [1, 1, 0]


def test_empty_slots_are_skipped():
    memory = curriculum.init_memory(3)
    after = curriculum.remember(memory, np.array([-1, 2, -1]), _pairs([np.nan, 1.0, np.nan]), 0)
    assert after.visits.tolist() == [0, 0, 1]
    nothing = curriculum.remember(memory, np.array([-1]), _pairs([0.0]), 0)
    np.testing.assert_array_equal(nothing.last_round, memory.last_round)


def test_recall_gives_what_was_remembered_in_the_order_asked_for():
    memory = _visited([1.0, 2.0, 3.0], 0.5)
    found = curriculum.recall(memory, np.array([2, 0]))
    np.testing.assert_array_equal(found.likelihood_margin, [3.0, 1.0])
    np.testing.assert_array_equal(found.visits, [1, 1])


def test_a_grown_memory_remembers_and_draws_the_new_pairs_first():
    memory = curriculum.note_drawn(_visited([1.0, 2.0, 3.0], 0.5), np.arange(3))
    grown = curriculum.grow(memory, 2)
    for old, new, fresh in zip(memory, grown, curriculum.init_memory(2), strict=True):
        np.testing.assert_array_equal(new[:3], old)
        np.testing.assert_array_equal(new[3:], fresh)
        assert new.dtype == old.dtype
    pool = curriculum.draw(grown.drawn, np.zeros(5, int), np.ones(1), 2, seed=0, round=1)
    assert sorted(pool.tolist()) == [3, 4]


def test_a_pair_seen_twice_at_once_or_without_a_finite_margin_is_refused():
    memory = curriculum.init_memory(3)
    with pytest.raises(ValueError, match="appears twice"):
        curriculum.remember(memory, np.array([1, 1]), _pairs([1.0, 2.0]), 0)
    with pytest.raises(ValueError, match="Pair 2 has a likelihood margin that is not finite"):
        curriculum.remember(memory, np.array([1, 2]), _pairs([1.0, np.inf]), 0)


# --- strata


@pytest.mark.parametrize("strata", [1, 2, 4, 7])
def test_different_values_make_strata_of_equal_size_in_their_order(strata):
    difficulty = np.random.default_rng(0).permutation(84) * 0.1
    stratum = curriculum.stratify(difficulty, strata)
    assert stratum.dtype == np.int32
    assert np.bincount(stratum).tolist() == [84 // strata] * strata
    assert (np.diff(stratum[np.argsort(difficulty)]) >= 0).all()


def test_few_values_make_one_stratum_each():
    assert curriculum.stratify(np.array([8.0, 1, 8, 3]), 4).tolist() == [2, 0, 2, 1]


@given(
    values=st.lists(st.integers(-5, 5) | st.just(None), min_size=1, max_size=60),
    strata=st.integers(1, 8),
)
def test_strata_keep_equal_values_together_and_the_order(values, strata):
    difficulty = np.array([np.nan if v is None else v for v in values], float)
    stratum = curriculum.stratify(difficulty, strata)
    assert stratum.shape == difficulty.shape
    assert (0 <= stratum).all() and (stratum < strata).all()
    known = np.flatnonzero(~np.isnan(difficulty))
    for i in known:
        for j in known:
            if difficulty[i] == difficulty[j]:
                assert stratum[i] == stratum[j]
            if difficulty[i] < difficulty[j]:
                assert stratum[i] <= stratum[j]
    assert len(np.unique(stratum[np.isnan(difficulty)])) <= 1


def test_unknown_difficulty_goes_where_the_median_is():
    stratum = curriculum.stratify(np.r_[np.arange(9.0), np.nan], 3)
    assert stratum[-1] == stratum[4]
    assert curriculum.stratify(np.full(3, np.nan), 3).tolist() == [0, 0, 0]


def test_no_strata_at_all_is_refused():
    with pytest.raises(ValueError, match="strata=0 must be at least 1"):
        curriculum.stratify(np.zeros(3), 0)


# --- competence and mixture


def test_competence_is_the_mean_normal_probability_of_a_positive_margin():
    margin, error = np.array([1.0, -2.0, 0.5, 30.0]), np.array([2.0, 1.0, 0.5, 1.0])
    found = curriculum.competence(_visited(margin, error), np.array([0, 0, 1, 1]), 3)
    phi = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in margin / error]
    expected = [(phi[0] + phi[1]) / 2, (phi[2] + phi[3]) / 2, 0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_an_error_competence_is_the_share_of_positive_margins():
    found = curriculum.competence(_visited([1.0, -1.0, 0.0, 2.0], 0.0), np.zeros(4, int), 1)
    np.testing.assert_allclose(found, (1 + 0 + 0.5 + 1) / 4)


def test_pairs_never_visited_do_not_count():
    memory = curriculum.remember(curriculum.init_memory(5), np.array([3]), _pairs([9.0], 1.0), 0)
    found = curriculum.competence(memory, np.array([0, 1, 1, 1, 2]), 3)
    np.testing.assert_allclose(found, [0.5, 1.0, 0.5], atol=1e-6)


def test_running_competence_is_the_exponential_mean():
    value, seen = np.array([0.5]), [0.1, 0.9, 0.3, 0.7]
    for now in seen:
        value = curriculum.running_competence(value, np.array([now]), 0.8)
    expected = 0.5 * 0.8**4 + sum(0.2 * 0.8 ** (3 - i) * x for i, x in enumerate(seen))
    np.testing.assert_allclose(value, [expected])
    with pytest.raises(ValueError, match="decay=1"):
        curriculum.running_competence(value, value, 1)


@given(
    competence=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    population=st.lists(st.integers(0, 100), min_size=5, max_size=5),
    floor=st.floats(0, 1),
    sharpness=st.floats(0, 8),
)
def test_mixture_sums_to_1_keeps_every_floor_and_gives_nothing_to_nobody(
    competence, population, floor, sharpness
):
    competence, population = np.array(competence), np.array(population)
    if population.sum() == 0:
        with pytest.raises(ValueError, match="hold no pairs"):
            curriculum.mixture(competence, population, floor=floor, sharpness=sharpness)
        return
    share = curriculum.mixture(competence, population, floor=floor, sharpness=sharpness)
    assert math.isclose(share.sum(), 1.0)
    assert (share >= floor * population / population.sum() - 1e-12).all()
    assert (share[population == 0] == 0).all()


def test_mixture_moves_towards_what_is_not_mastered_and_further_with_sharpness():
    competence, population = np.array([0.9, 0.6, 0.1]), np.array([20, 20, 20])
    mild = curriculum.mixture(competence, population, floor=0.1, sharpness=1.0)
    sharp = curriculum.mixture(competence, population, floor=0.1, sharpness=3.0)
    assert mild[0] < mild[1] < mild[2] < sharp[2] and sharp[0] < mild[0]
    wish = np.array([0.1, 0.4, 0.9])
    np.testing.assert_allclose(mild, 0.1 / 3 + 0.9 * wish / wish.sum())


def test_sharpness_0_and_full_mastery_give_population_shares_exactly():
    population = np.array([3, 7, 11])
    expected = population / population.sum()
    plain = curriculum.mixture(np.array([0.1, 0.5, 1]), population, floor=0.3, sharpness=0.0)
    np.testing.assert_array_equal(plain, expected)
    mastered = curriculum.mixture(np.ones(3), population, floor=0.3, sharpness=2.0)
    np.testing.assert_array_equal(mastered, expected)


@pytest.mark.parametrize("wrong", [{"floor": -0.1}, {"floor": 1.1}, {"sharpness": -1.0}])
def test_mixture_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        curriculum.mixture(np.ones(2), np.ones(2), **({"floor": 0.1, "sharpness": 1.0} | wrong))


# --- draw


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda s: sum(s) > 0),
    pool_size=st.integers(1, 30),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_at_population_shares_rounds_visit_every_pair_once_before_any_twice(sizes, pool_size, seed):
    stratum = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n, share = len(stratum), np.array(sizes) / sum(sizes)
    drawn = np.zeros(n, int)
    for number in range(2 * n // pool_size + 2):
        pool = curriculum.draw(drawn, stratum, share, pool_size, seed=seed, round=number)
        assert len(pool) == len(set(pool.tolist())) == min(pool_size, n)
        drawn[pool] += 1
        assert drawn.max() - drawn.min() <= 1


def test_every_round_of_an_epoch_holds_the_strata_in_their_shares():
    stratum = np.repeat([0, 1, 2], [50, 30, 20])
    drawn = np.zeros(100, int)
    for number in range(10):
        pool = curriculum.draw(drawn, stratum, np.array([0.5, 0.3, 0.2]), 10, seed=0, round=number)
        assert np.bincount(stratum[pool]).tolist() == [5, 3, 2]
        drawn[pool] += 1
    assert (drawn == 1).all()


def test_a_pool_as_large_as_the_data_is_a_new_permutation_every_round():
    stratum = np.arange(20) % 3
    for share in (np.bincount(stratum) / 20, np.array([0.8, 0.1, 0.1])):
        pools = [
            curriculum.draw(np.zeros(20, int), stratum, share, 99, seed=0, round=r) for r in (0, 1)
        ]
        assert all(sorted(pool) == list(range(20)) for pool in pools)
        assert (pools[0] != pools[1]).any() and (pools[0] != np.arange(20)).any()
        assert pools[0].dtype == np.int64


def test_draw_is_a_function_of_memory_seed_and_round():
    def drawn(seed, number):
        share = np.array([0.2, 0.8])
        return curriculum.draw(
            np.arange(30) % 2, np.arange(30) // 15, share, 9, seed=seed, round=number
        ).tolist()

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) != drawn(0, 4) and drawn(0, 3) != drawn(1, 3)


def test_any_shares_are_kept_on_average_so_that_small_strata_are_not_forgotten():
    stratum = np.repeat(np.arange(4), 25)
    share = np.array([0.01, 0.04, 0.25, 0.70])
    rounds = 4000
    count = np.zeros(4)
    for number in range(rounds):
        pool = curriculum.draw(np.zeros(100, int), stratum, share, 10, seed=1, round=number)
        now = np.bincount(stratum[pool], minlength=4)
        assert (np.abs(now - 10 * share) < 1).all()
        count += now
    np.testing.assert_allclose(count / rounds, 10 * share, atol=0.03)


def test_the_least_drawn_come_first_inside_a_stratum_and_equals_at_random():
    drawn = np.array([0, 1, 0, 1, 0, 5, 0, 0])
    stratum = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    count = np.zeros(8)
    for number in range(2000):
        count[curriculum.draw(drawn, stratum, np.array([0.75, 0.25]), 4, seed=0, round=number)] += 1
    np.testing.assert_allclose(count[[0, 2]], 2000)  # 3 of stratum 0: both of level 0 ...
    np.testing.assert_allclose(count[[1, 3]], 1000, atol=120)  # ... and one of level 1
    np.testing.assert_allclose(count[[4, 6, 7]], 2000 / 3, atol=120)
    assert count[5] == 0


def test_what_a_stratum_cannot_fill_goes_to_the_others():
    stratum = np.repeat([0, 1, 2], [2, 10, 10])
    pool = curriculum.draw(
        np.zeros(22, int), stratum, np.array([0.9, 0.1, 0.0]), 10, seed=0, round=0
    )
    assert np.bincount(stratum[pool], minlength=3).tolist() == [2, 8, 0]
    pool = curriculum.draw(
        np.zeros(22, int), stratum, np.array([0.9, 0.1, 0.0]), 15, seed=0, round=0
    )
    assert np.bincount(stratum[pool], minlength=3).tolist() == [2, 10, 3]


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="pool_size=0 must be at least 1"):
        curriculum.draw(np.zeros(3, int), np.zeros(3, int), np.ones(1), 0, seed=0, round=0)
