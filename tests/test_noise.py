"""Flipped labels: their share is recovered, the posterior is right, and none are found in none."""

import numpy as np
import pytest

from sage_jax import noise


def mirrored(n, share, *, mean=(0.8, 0.3), deviation=(0.8, 0.35), seed=0):
    """Evidence of n pairs, and which of them are flipped: the mirror images."""
    rng = np.random.default_rng(seed)
    flipped = rng.random(n) < share
    x = rng.normal(mean, deviation, (n, 2))
    return np.where(flipped, -1.0, 1.0)[:, None] * x, flipped


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.35])
def test_the_share_of_flips_is_recovered(share):
    found = [noise.detect(mirrored(8000, share, seed=seed)[0]).share for seed in range(8)]
    assert np.mean(found) == pytest.approx(share, abs=0.025)
    assert np.std(found) < 0.05


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(0.6, 1.0, n),
        lambda rng, n: rng.uniform(-1.0, 2.5, n),
        lambda rng, n: rng.gumbel(0.2, 0.8, n),
        lambda rng, n: rng.normal(np.where(rng.random(n) < 0.5, 0.1, 1.2), 0.7),
    ],
    ids=["normal", "flat", "skewed", "two kinds"],
)
@pytest.mark.parametrize("n", [300, 3000])
def test_without_flips_the_automatic_guard_stays_off_whatever_the_shape_of_the_margins(draw, n):
    rng = np.random.default_rng(1)
    acts = [noise.detect(np.stack([draw(rng, n), draw(rng, n)], 1)).many for _ in range(20)]
    assert sum(acts) <= 1


def test_with_many_flips_it_acts_and_accuses_few_of_the_right_pairs():
    for seed in range(5):
        x, flipped = mirrored(4000, 0.2, seed=seed)
        found = noise.detect(x)
        assert found.many
        assert flipped[found.suspected_N].mean() > 0.75
        assert found.suspected_N[flipped].mean() > 0.6


def test_the_posterior_is_the_one_of_bayes():
    """Two mirrored normal densities of one covariance, in float64 and by hand."""
    mean, cov = np.array([0.8, 0.4]), np.array([[0.6, 0.2], [0.2, 0.3]])
    rng = np.random.default_rng(3)
    flipped = rng.random(200_000) < 0.15
    x = rng.multivariate_normal(mean, cov, len(flipped))
    x[flipped] *= -1
    log_odds = 2 * x @ np.linalg.solve(cov, mean)  # log N(x; m) - log N(x; -m)
    posterior = 1 / (1 + np.exp(log_odds + np.log(0.85 / 0.15)))
    found = noise.detect(x)
    np.testing.assert_allclose(found.posterior_N, posterior, atol=0.04)
    assert np.corrcoef(found.log_odds_N, log_odds)[0, 1] > 0.9995


def test_held_is_the_mean_of_the_well_supported_estimates_by_their_gains():
    estimates = [(0.12, 5.0), (0.3, noise.LEAST_GAIN), (0.08, 40.0)]
    ignored = [(noise.LEAST_SHARE - 1e-6, 100.0), (0.4, noise.LEAST_GAIN - 1e-6), (0.0, 0.0)]
    shares, gains = np.array(estimates).T
    for order in ([*estimates, *ignored], [*ignored, *estimates[::-1]]):
        held = noise.Held()
        for share, gain in order:
            held = held.with_estimate(share, gain)
        assert held.weight == pytest.approx(gains.sum())
        assert held.share == pytest.approx((gains * shares).sum() / gains.sum())


def test_what_is_held_is_the_prior_once_flips_are_learned_by_heart():
    """No margin is negative any more: nothing is left to estimate, but low margins still tell."""
    x = np.abs(mirrored(4000, 0.2, seed=9)[0])
    for doubtful in (noise.Held(), noise.Held(noise.LEAST_HELD - 1e-6, 0.2)):
        alone = noise.detect(x, doubtful)
        assert alone.share == 0 and not alone.many and not alone.suspected_N.any()
        assert alone.held == doubtful
    held = noise.Held(noise.LEAST_HELD, 0.2)
    found = noise.detect(x, held)
    assert found.many and found.held == held and found.share == 0.2
    likelihood = np.exp(-found.log_odds_N)  # of flipped over right
    np.testing.assert_allclose(
        found.posterior_N, 0.2 * likelihood / (0.2 * likelihood + 0.8), atol=1e-12
    )
    order = np.argsort(found.log_odds_N)
    assert found.posterior_N[order[0]] == found.posterior_N.max()


def test_a_well_supported_estimate_is_held_and_one_that_says_nothing_forgets_nothing():
    x, _ = mirrored(4000, 0.2, seed=10)
    first = noise.detect(x)
    assert first.held == noise.Held().with_estimate(first.share, first.gain) != noise.Held()
    assert first.many and first.held.firm
    earlier = noise.Held(3 * first.gain, 0.4)
    again = noise.detect(x, earlier)
    assert again.gain == first.gain  # of the present evidence alone
    assert again.share == again.held.share == pytest.approx(0.75 * 0.4 + 0.25 * first.share)
    for nothing in (x[: noise.LEAST_PAIRS - 1], -mirrored(1000, 0.0)[0]):
        found = noise.detect(nothing, earlier)
        assert (found.held, found.share, found.many) == (earlier, 0.4, True)
        assert not found.suspected_N.any()
        assert noise.detect(nothing, noise.Held(1.0, 0.4)).share == 0


def test_a_known_share_gives_the_posterior_of_bayes():
    mean, deviation, share = 0.9, 0.7, 0.15
    rng = np.random.default_rng(11)
    sign = np.where(rng.random(200_000) < share, -1.0, 1.0)
    x = sign * rng.normal(mean, deviation, len(sign))
    odds = share / (1 - share) * np.exp(-2 * mean * x / deviation**2)
    found = noise.detect(x[:, None], noise.Held(1e9, share))
    np.testing.assert_allclose(found.posterior_N, odds / (1 + odds), atol=0.015)


def test_posteriors_are_calibrated():
    x, flipped = mirrored(50_000, 0.2, seed=4)
    found = noise.detect(x)
    for low in np.arange(0, 1, 0.2):
        inside = (found.posterior_N >= low) & (found.posterior_N < low + 0.2)
        expected = found.posterior_N[inside].mean()
        assert flipped[inside].mean() == pytest.approx(expected, abs=0.04)


def test_the_order_of_the_pairs_changes_no_bit():
    x, _ = mirrored(1000, 0.2, seed=5)
    order = np.random.default_rng(0).permutation(1000)
    one, other = noise.detect(x), noise.detect(x[order])
    np.testing.assert_array_equal(one.posterior_N[order], other.posterior_N)
    assert (one.share, one.gain) == (other.share, other.gain)


def test_units_of_the_evidence_do_not_matter():
    x, _ = mirrored(2000, 0.2, seed=6)
    one, other = noise.detect(x), noise.detect(x * np.array([256.0, 0.125]))
    np.testing.assert_allclose(one.posterior_N, other.posterior_N, atol=1e-9)


def test_unknown_pairs_are_accused_of_nothing_and_change_nothing():
    x, _ = mirrored(1000, 0.2, seed=7)
    more = np.concatenate([x, np.full((50, 2), np.nan), [[np.nan, -9.0]]])
    one, other = noise.detect(x), noise.detect(more)
    np.testing.assert_array_equal(one.posterior_N, other.posterior_N[:1000])
    assert np.isnan(other.posterior_N[1000:]).all() and not other.suspected_N[1000:].any()


def test_too_few_pairs_or_evidence_against_all_labels_conclude_nothing():
    few = mirrored(noise.LEAST_PAIRS - 1, 0.4)[0]
    for x in (few, -mirrored(1000, 0.0)[0], np.zeros((1000, 2)), np.zeros((0, 2))):
        found = noise.detect(x)
        assert np.isnan(found.posterior_N).all() and found.share == 0 and not found.many


def test_evidence_that_counts_against_most_labels_is_left_out():
    """Longer chosen answers have negative margins without being wrong; only the drift counts."""
    x, _ = mirrored(4000, 0.2, seed=8)
    length = np.random.default_rng(0).normal(-3, 1, 4000)
    found = noise.detect(np.stack([length, x[:, 0]], 1))
    np.testing.assert_allclose(found.posterior_N, noise.detect(x[:, :1]).posterior_N, atol=1e-9)


def test_evidence_is_in_standard_errors_of_the_margin():
    x = noise.evidence(np.array([6.0, 1.0, 2.0]), np.array([0.3, 0.1, np.nan]),
                       np.array([2.0, 0.0, 4.0]), 0.1, nats=np.array([1.0, 1.0, 2.0]))  # fmt: skip
    np.testing.assert_allclose(x, [[3, 1.5], [1 / 3, 1 / 3], [0.5, np.nan]])  # 0: the median, 3
    exact = noise.evidence(np.array([6.0]), np.array([0.3]), np.zeros(1), 0.1)
    np.testing.assert_allclose(exact, [[6, 3]])  # no errors at all: nats


def test_lowest_leaves_unknown_pairs_alone_and_breaks_ties_by_the_pair():
    reward = np.array([-9.0, np.nan, 5.0, -1.0, 0.0, np.nan])
    assert np.flatnonzero(noise.lowest(reward, np.arange(6), 0.5)).tolist() == [0, 3]
    tied = noise.lowest(np.zeros(4), np.array([7, 2, 9, 1]), 0.5)
    assert tied.tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"share=1 must lie in \[0, 1\)"):
        noise.lowest(reward, np.arange(6), 1)


def test_neighbours_mean_is_that_of_the_nearest_others():
    rng = np.random.default_rng(9)
    value, position = rng.normal(size=40), rng.permutation(40).astype(float)
    found = noise.neighbours_mean(value, position, np.arange(40), count=6)
    by_rank = value[np.argsort(position)]
    for pair in range(40):
        rank = int(position[pair])
        low = min(max(rank - 3, 0), 40 - 7)
        around = np.delete(by_rank[low : low + 7], rank - low)
        assert found[pair] == pytest.approx(around.mean(), rel=1e-12)
    assert np.isnan(noise.neighbours_mean(np.ones(1), np.zeros(1), np.array([0])))


def test_what_a_policy_does_not_know_before_training_is_no_flip_after_it():
    """A policy that is right of 60 % of the pairs, however sure it is, contradicts 40 % of them."""
    rng = np.random.default_rng(12)
    size = np.abs(rng.normal(0.0, 2.0, 4000))
    ignorant = np.where(rng.random(4000) < 0.6, size, -size)
    one = np.ones(4000)
    start = noise.at_start(ignorant, one)
    drift = rng.normal(0.1, 1.0, 4000)  # and learns little from others
    x = noise.evidence(ignorant, drift, one, 1.0)
    alarm, calm = noise.detect(x), noise.detect(x[:, 1:], start)
    assert alarm.many and alarm.share > 0.3
    assert start.ignorant and not calm.many and calm.held == start


def test_flips_come_to_light_as_others_teach():
    """The policy knew nothing of these pairs; what others taught tells them apart."""
    rng = np.random.default_rng(13)
    flipped = rng.random(4000) < 0.2
    sign, one = np.where(flipped, -1.0, 1.0), np.ones(4000)
    held = noise.at_start(sign * rng.normal(0.0, 1.0, 4000), one)
    assert held.ignorant
    for far in (0.5, 1.0, 1.5):
        drift = sign * rng.normal(far, 0.7 * far, 4000)
        found = noise.detect(drift[:, None], held)
        held = found.held
    assert found.many and held.firm and held.share == pytest.approx(0.2, abs=0.03)
    assert flipped[found.suspected_N].mean() > 0.9


def test_few_pairs_say_nothing_of_what_a_policy_does_not_know():
    margin = -np.ones(noise.LEAST_PAIRS - 1)
    assert noise.at_start(margin, np.ones(len(margin))) == noise.Held()
    gaps = np.concatenate([margin, np.full(1000, np.nan)])
    assert noise.at_start(gaps, np.ones(len(gaps))) == noise.Held()
