"""Selection rules against the formulas of their papers, in float64 numpy."""

import itertools

import jax
import numpy as np
import pytest

from sage_jax import curriculum, losses, rules, scores, selection

BETA = 0.1


def rng(seed=0):
    return np.random.default_rng(seed)


def known(margin, error=None, *, reward=None, trained=1, loss=None, kappa=2.0, **rest):
    """Candidates with these likelihood margins, and reward margins that are the same if not given.

    Args:
        trained: how often each pair was trained.
    """
    loss = loss or losses.sigmoid(BETA)
    margin = np.float32(margin)
    reward = margin if reward is None else np.float32(reward)
    rescore = scores.make_rescore_fn(loss, kappa=kappa)
    pairs = jax.device_get(rescore(reward, margin, margin * 0 if error is None else error))
    memory = curriculum.init_memory(len(margin))
    memory = memory._replace(
        reward_margin=reward,
        likelihood_margin=margin,
        trained=np.broadcast_to(np.int32(trained), margin.shape),
    )
    return rules.candidates(pairs, memory, loss=loss, **rest)


def order(priority):
    """From first to last; pairs that are not known come last."""
    return np.argsort(-np.asarray(priority), kind="stable").tolist()


# --- by score


@pytest.mark.parametrize("low", [-2000.0, -60.0, 20.0])
def test_sage_does_not_tie_where_float32_scores_do(low):
    margin = rng().permutation(low + np.linspace(0, 40, 41))
    candidates = known(margin)
    assert len(np.unique(candidates.pairs.score)) < 41  # saturated
    for name in ("sage", "gradient", "hard_first"):
        priority = rules.ranked(rules.RULES[name], candidates, rng()).priority_P
        assert priority.dtype == np.float64
        np.testing.assert_array_equal(np.argsort(-priority), np.argsort(margin))


def test_saturated_scores_are_ordered_by_the_pessimistic_margin_and_not_by_the_margin():
    candidates = known([-100, -200], np.float32([1, 80]))  # pessimistic: -98 and -40
    assert candidates.pairs.score[0] == candidates.pairs.score[1]
    assert rules.sage(candidates, rng()).argmax() == 0
    assert rules.gradient(candidates, rng()).argmax() == 1


def test_gradient_takes_the_largest_slopes_of_any_loss():
    margin = rng(1).normal(0, 3, 50)
    slope = 2 / 0.5**2 * np.abs(margin - 0.5)  # of ((m - 1/2) / beta)²
    found = rules.gradient(known(margin, loss=losses.ipo(0.5)), rng())
    np.testing.assert_array_equal(order(found)[:25], np.argsort(-slope)[:25])


def test_max_curvature_takes_the_undecided_pairs():
    margin = np.array([-70.0, -3.0, 0.2, 3.1, 60.0, 80.0])
    priority = rules.max_curvature(known(margin), rng())
    np.testing.assert_array_equal(np.argsort(-priority), np.argsort(np.abs(margin)))


def test_sage_puts_pairs_beyond_a_loss_s_target_last_and_gradient_follows_the_slope():
    pool = known([-1.0, 3.0, 0.25], loss=losses.ipo(beta=1.0))  # the target is 0.5
    assert order(rules.sage(pool, rng())) == [0, 2, 1]
    assert order(rules.gradient(pool, rng())) == [1, 0, 2]


def test_pairs_of_equal_score_and_margin_have_equal_priority_and_unknown_ones_nan():
    priority = rules.sage(known([1.0, -1.0, 1.0, np.nan]), rng())
    assert priority[0] == priority[2] < priority[1] and np.isnan(priority[3])


def test_random_rules_depend_on_nothing_but_the_generator():
    one, two = known(np.arange(5.0)), rules.candidates(None, curriculum.init_memory(5))
    for name in ("random", "uniform"):
        rank = rules.RULES[name].rank
        np.testing.assert_array_equal(rank(one, rng(3)), rank(two, rng(3)))
        assert (rank(one, rng(3)) != rank(one, rng(4))).any()


# --- published ones


def test_implicit_gap_takes_the_lowest_tenth_of_the_signed_margins():
    margin = rng(2).normal(0, 2, 100)
    priority = rules.implicit_gap(known(margin), rng())
    chosen = selection.select_pool(
        priority, np.zeros(100, int), np.arange(100), keep=0.1, uniform_share=0.0, rng=rng()
    )
    assert set(np.flatnonzero(chosen.selected_P)) == set(np.argsort(margin)[:10])
    column = rng(3).normal(size=100)  # a seed run's margins go first
    by_column = rules.implicit_gap(known(margin, column_P=column), rng())
    np.testing.assert_array_equal(order(by_column), np.argsort(column))


def test_margins_that_training_has_not_moved_from_the_reference_are_not_known():
    priority = rules.implicit_gap(
        known(np.ones(4), reward=[0.0, 0.0, -1.0, 2.0], trained=[0, 1, 0, 3]), rng()
    )
    assert np.isnan(priority).tolist() == [True, False, False, False]
    assert order(priority) == [2, 1, 3, 0]


def bees(external, implicit, certain=30):
    """Equation 3 of arXiv 2502.14560, with the bounds that the docstring gives."""
    p = []
    for margin in (external, implicit):
        reached = np.sort(margin)[-certain] if len(margin) >= certain else -np.inf
        upper = min(max(reached, margin.max() / 2), margin.max())
        p.append((np.clip(margin, -2, upper) + 2) / (upper + 2))
    with np.errstate(invalid="ignore"):  # 0 / 0 where the margins are at opposite ends
        return p[0] * p[1] / (p[0] * p[1] + (1 - p[0]) * (1 - p[1]))


@pytest.mark.parametrize("count", [12, 500])
def test_dual_margin_ranks_by_the_aggregated_probability(count):
    external, implicit = rng(4).normal(0.5, 1, count), rng(5).normal(1, 3, count)
    priority = rules.dual_margin(known(BETA * implicit, column_P=external), rng())
    p = bees(external, implicit)
    inside = (p > 1e-9) & (p < 1 - 1e-9)  # at the ends p is 0 or 1 and ties
    assert inside.sum() > count / 3
    np.testing.assert_allclose(1 / (1 + np.exp(-priority[inside])), p[inside], rtol=1e-4)
    assert (
        priority[p > 1 - 1e-9].min()
        > priority[inside].max()
        > priority[p < 1e-9].max(initial=-np.inf)
    )


def test_one_margin_at_its_end_and_the_other_at_the_opposite_is_undecided_and_finite():
    external, implicit = np.array([9.0, -9.0, 1.0]), np.array([-9.0, 9.0, 1.0])
    priority = rules.dual_margin(known(BETA * implicit, column_P=external), rng())
    np.testing.assert_allclose(priority[:2], 0, atol=1e-12)


def test_dual_margin_knows_nothing_before_training():
    priority = rules.dual_margin(known(np.zeros(4), trained=0, column_P=np.arange(4.0)), rng())
    assert np.isnan(priority).all()


def test_easy_half_goes_from_low_to_high_held_out_loss():
    rule, loss = rules.RULES["easy_half"], rng(6).exponential(size=40)
    assert rule.ordered and not rule.scores_with("") and not rule.scores_with("x")
    found = rules.ranked(rule, known(np.zeros(40), column_P=loss), rng())
    np.testing.assert_array_equal(order(found.priority_P), np.argsort(loss))


def test_easy_half_without_a_column_keeps_the_difficulty_of_the_start_over_rounds():
    rule, start = rules.RULES["easy_half"], rng(7).normal(size=20)
    state = rule.init(known(start))
    pool = rng(8).permutation(20)[:9]
    later = known(rng(9).normal(size=9), pair_P=pool, state=state)
    found = rules.ranked(rule, later, rng())
    np.testing.assert_array_equal(order(found.priority_P), np.argsort(-start[pool]))
    np.testing.assert_array_equal(found.state["difficulty_N"], state["difficulty_N"])


def test_easy_half_without_a_column_or_its_state_says_which_is_missing():
    with pytest.raises(ValueError, match="column_P, or the state that first_difficulty made"):
        rules.ranked(rules.RULES["easy_half"], known(np.zeros(3)), rng())


def test_beta_dpo_includes_pairs_as_often_as_draws_without_replacement_do():
    margin, draws = np.array([-3.0, 0.0, 0.4, 1.0]), 4_000
    candidates, generator = known(margin), rng(10)
    weight = np.exp(-0.5 * ((margin - margin.mean()) / margin.std(ddof=1)) ** 2)
    left_out = np.zeros(4)
    for _ in range(draws):
        left_out[rules.beta_dpo(candidates, generator).priority_P.argmin()] += 1
    expected = 1 - successive(weight, 3)
    np.testing.assert_allclose(left_out / draws, expected, atol=4 * np.sqrt(0.25 / draws))


def successive(weight, k):
    """Exact probability of each item in k successive draws without replacement."""
    found = np.zeros(len(weight))
    for chosen in itertools.permutations(range(len(weight)), k):
        left, probability = weight.sum(), 1.0
        for i in chosen:
            probability *= weight[i] / left
            left -= weight[i]
        found[list(chosen)] += probability
    return found


def test_beta_dpo_runs_its_mean_and_deviation_over_pools():
    pools, state = [np.zeros(30), *rng(11).normal(2, 3, (3, 30))], {}
    rule, seen = rules.RULES["beta_dpo"], []
    for pool in pools:
        found = rules.ranked(rule, known(pool, state=state), rng())
        state = found.state
        seen.append({k: float(v) for k, v in state.items()})
        assert all(isinstance(v, np.ndarray) for v in state.values())
    assert seen[0] == {}  # margins all alike: nothing to filter by
    mean, deviation = np.mean(pools[1]), np.std(pools[1], ddof=1)
    for pool, found in zip(pools[2:], seen[2:], strict=True):
        mean = 0.9 * mean + 0.1 * np.mean(pool)
        deviation = 0.9 * deviation + 0.1 * np.std(pool, ddof=1)
        np.testing.assert_allclose(found["margin_mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(found["margin_std"], deviation, rtol=1e-5)


def test_beta_dpo_leaves_unknown_margins_out_of_its_mean_and_to_chance():
    found = rules.ranked(rules.RULES["beta_dpo"], known([np.nan, 1.0, 3.0]), rng())
    assert found.state["margin_mean"] == 2.0
    assert np.isnan(found.priority_P).tolist() == [True, False, False]


def test_rho_is_the_loss_now_minus_the_held_out_loss():
    margin, held_out = rng(12).normal(0, 4, 60), rng(13).exponential(size=60)
    priority = rules.rho(known(np.zeros(60), reward=margin, column_P=held_out), rng())
    np.testing.assert_allclose(priority, np.log1p(np.exp(-margin)) - held_out, rtol=1e-5, atol=1e-6)


# --- the interface


def test_every_rule_gives_one_number_a_pair_and_repeats_itself():
    for name, rule in rules.RULES.items():
        column = None if rule.column == "unused" else rng(14).normal(size=10)
        candidates = known(rng(15).normal(size=10), column_P=column)
        state = {} if rule.init is None else rule.init(candidates)
        found = [rules.ranked(rule, candidates._replace(state=state), rng(1)) for _ in range(2)]
        assert found[0].priority_P.shape == (10,) and found[0].priority_P.dtype == np.float64, name
        np.testing.assert_array_equal(found[0].priority_P, found[1].priority_P)


def test_what_is_not_scored_is_nan_and_costs_no_pass():
    candidates = rules.candidates(None, curriculum.init_memory(3))
    assert all(np.isnan(values).all() for values in candidates.pairs)
    free = {name for name, rule in rules.RULES.items() if not rule.scores_with("")}
    assert free == {"uniform", "random", "easy_half"}
    assert not rules.RULES["implicit_gap"].scores_with("seed_margin")
    assert rules.RULES["rho"].scores_with("loss")


def lowest_pair(candidates, generator):
    return -candidates.pair_P


counting = rules.Rule(
    lambda c, _: rules.Ranked(np.full(len(c.pair_P), c.state["rounds"]),
                              {"rounds": c.state["rounds"] + 1}),
    init=lambda c: {"rounds": 0},
    needs_scores=False,
)  # fmt: skip


def test_own_rule_is_a_function_or_a_rule_by_module_and_name():
    found = rules.resolve("test_rules:lowest_pair")
    assert found.needs_scores and found.scores_with("x") and found.column == "optional"
    assert order(rules.ranked(found, known(np.zeros(3)), rng()).priority_P) == [0, 1, 2]
    own = rules.resolve("test_rules:counting")
    assert own is counting and not own.needs_scores
    state = own.init(known(np.zeros(3)))
    for expected in (1, 2):
        state = rules.ranked(own, known(np.zeros(3), state=state), rng()).state
        assert state["rounds"] == expected
    assert all(rules.resolve(name) is rule for name, rule in rules.RULES.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sgae", "Did you mean 'sage'"),
        ("nosuchmodule:rule", "cannot be loaded"),
        ("sage_jax.rules:nosuch", "cannot be loaded"),
        ("sage_jax.rules:COLUMN", "must be a function"),
    ],
)
def test_unknown_rule_is_named_with_the_nearest_or_the_reason(name, words):
    with pytest.raises(ValueError, match=words):
        rules.resolve(name)


def test_wrong_priorities_and_column_uses_are_named():
    with pytest.raises(ValueError, match=r"shape \(2,\) for 3 pairs"):
        rules.ranked(rules.Rule(lambda c, _: np.zeros(2)), known(np.zeros(3)), rng())
    with pytest.raises(ValueError, match="column='maybe'"):
        rules.Rule(lowest_pair, column="maybe")


@pytest.mark.parametrize("name", ["rho", "dual_margin"])
def test_a_rule_that_reads_a_column_says_so_where_there_is_none(name):
    known = rules.candidates(None, curriculum.init_memory(2))
    with pytest.raises(ValueError, match="column_P is None"):
        rules.ranked(rules.RULES[name], known, np.random.default_rng(0))
