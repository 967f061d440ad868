"""Which pairs have flipped labels, judged by margins that a run remembers anyway.

A flipped pair is the mirror image of a right one: all that the policy says of it has the other
sign. Training follows the majority, so the margin of a right pair grows, and that of a flipped one
falls, as far as other pairs decide it. `evidence` takes two numbers of a pair, both in units of
the margin's token-level standard error, so that only what the tokens agree on counts:

    t   the likelihood margin now
    r   how far training has moved it: reward margin / beta

`detect` puts them into one number s by the direction in which the data differ most from their
mirror image, and reads from the signs of s how surely the policy is right where it is sure, and in
which share of the labels it is contradicted however sure it is. That share is the estimate of the
flipped labels. It is one number for a data set, about 0 where there are none, and it is the prior
of each pair's posterior. No forward pass is made for any of it. Plain numpy, on the host.

A policy that trains on flipped labels learns them by heart, one after the other: then it no longer
contradicts any, and the share that can be read off falls to 0, while flipped pairs still have
lower margins than others. So a share that was well supported time and again is held (`Held`).

A policy that knows little contradicts right labels, however sure it is, as if they were flipped.
Its ignorance is there before the first step (`at_start`). Where it is large, t says nothing of
labels: then r alone decides, what others taught, and has to say so more clearly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GUARDS = ("off", "quantile", "suspects", "auto")
QUANTILE = 0.25  # lowest reward margins that the guard "quantile" leaves out
LIKELY = 0.5  # posterior from which on a pair is suspected
LEAST_SHARE = 0.05  # estimated share of flips from which on the guard "auto" acts,
LEAST_GAIN = 3.0  # if it explains the data by so many nats better than no flips
LEAST_DRIFT_GAIN = 10.0  # the same where drift alone decides: that of right pairs levels off too
IGNORANT = 0.2  # share contradicted at the start however sure, or
IGNORANT_SUREST = 0.4  # among the surest quarter, from which on drift alone decides
LEAST_HELD = 30.0  # sum of such gains over a run, nats, from which on their mean share is held
LEAST_PAIRS = 256  # pairs that have to be known before anything is concluded
_BINS = 256
_LARGEST_SHARE = 0.45  # beyond that right and wrong labels cannot be told apart


class Held(NamedTuple):
    """What is held of the estimates so far: those that were well supported, by their gains."""

    weight: float = 0.0  # sum of the gains, nats; 0 = there was none yet
    share: float = 0.0  # mean of the shares, weighted by their gains
    ignorance: float = (
        0.0  # 1 = the policy knew too little at the start to judge labels (`at_start`)
    )

    @property
    def ignorant(self) -> bool:
        """Whether drift alone decides."""
        return self.ignorance > 0

    @property
    def firm(self) -> bool:
        """Whether there were enough to go by their mean: one or two looks may err."""
        return self.weight >= LEAST_HELD

    def with_estimate(self, share: float, gain: float) -> Held:
        """Takes an estimate in, if it is one that the guard "auto" would act on.

        >>> Held().with_estimate(0.125, 4.0).with_estimate(0.25, 4.0).with_estimate(0.0, 0.5)
        Held(weight=8.0, share=0.1875, ignorance=0.0)
        """
        if not self.supports(share, gain):
            return self
        weight = self.weight + gain
        return self._replace(weight=weight, share=self.share + gain / weight * (share - self.share))

    def supports(self, share: float, gain: float) -> bool:
        """Whether an estimate is large and well supported enough to act on.

        >>> Held().supports(0.2, 4.0), Held(ignorance=1.0).supports(0.2, 4.0)
        (True, False)
        """
        least = LEAST_DRIFT_GAIN if self.ignorant else LEAST_GAIN
        return share >= LEAST_SHARE and gain >= least


class Flips(NamedTuple):
    """What the margins say about the labels of N pairs."""

    posterior_N: np.ndarray  # float64, probability that the label is flipped; nan = not known
    log_odds_N: np.ndarray  # float64, of being right, without the prior, nats; nan = not known
    share: float  # estimated share of flipped labels: the prior of the posterior
    gain: float  # log-likelihood of the share that fits best now over that of no flips, nats
    held: Held = Held()  # for the next estimate of the same run

    @property
    def suspected_N(self) -> np.ndarray:
        """bool: more likely flipped than not."""
        return self.posterior_N > LIKELY  # nan: False

    @property
    def many(self) -> bool:
        """Whether there are, or were for some time, enough flips for the guard "auto" to act."""
        return self.held.firm or self.held.supports(self.share, self.gain)


def evidence(
    likelihood_margin: np.ndarray,
    reward_margin: np.ndarray,
    error: np.ndarray,
    beta: float,
    nats: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Margin and drift of each pair, in standard errors of its margin.

    Args:
        likelihood_margin: float [N], of the policy.
        reward_margin: float [N], against the reference, best from before the pair's own update, as
            a train step reports it.
        error: float [N], standard error of the likelihood margin, its units. Where it is 0 the
            median of the others stands in, or 1.
        beta: rewards per nat.
        nats: nats in a unit of the likelihood margin: 1 / temperature, times the tokens of a
            completion if it is of means over tokens.

    Returns:
        float64 [N, 2]: likelihood_margin / error and reward_margin / (beta * nats * error); nan
        where anything is not known.

    >>> evidence(np.array([4.0, -1.0]), np.array([0.2, -0.1]), np.array([2.0, 1.0]), 0.1).tolist()
    [[2.0, 1.0], [-1.0, -1.0]]
    """
    margin, reward, error = (
        np.asarray(x, np.float64) for x in (likelihood_margin, reward_margin, error)
    )
    positive = error[np.isfinite(error) & (error > 0)]
    error = np.where(error == 0, np.median(positive) if len(positive) else 1.0, error)
    return np.stack([margin / error, reward / (beta * nats * error)], axis=-1)


def at_start(likelihood_margin: np.ndarray, error: np.ndarray) -> Held:
    """What to hold before training: whether the policy's own margins can judge labels.

    They cannot where the policy contradicts labels however sure it is. Of a policy that has some
    things right and is surely wrong of others the share that it contradicts falls with its
    certainty, also if some labels are flipped. So it is ignorant if that share levels off already
    at `IGNORANT` or more, by the fit of `detect`, or is `IGNORANT_SUREST` among the surest quarter
    of the pairs. Many flips that a policy sees without any training look the same: their drift has
    to show them.

    Args:
        likelihood_margin: float [N], of the policy that training starts from.
        error: float [N], its standard error, in its units.

    Returns:
        `Held` without an estimate; not ignorant where fewer than `LEAST_PAIRS` are known.

    >>> margin = np.where(np.arange(1000) % 9 < 4, -9.0, 9.0)  # sure, and often wrong
    >>> at_start(margin, np.ones(1000)).ignorant
    True
    """
    t = evidence(likelihood_margin, np.zeros(len(likelihood_margin)), error, 1.0)[:, 0]
    t = t[np.isfinite(t)]
    if len(t) < LEAST_PAIRS:
        return Held()
    surest = np.sort(np.abs(t))[-(len(t) // 4)]
    share, _, gain = _fit(t)
    contradicted = float(np.mean(t[np.abs(t) >= surest] < 0))
    level = share >= IGNORANT and gain >= LEAST_GAIN
    return Held(ignorance=float(level or contradicted >= IGNORANT_SUREST))


def detect(evidence_NE: np.ndarray, held: Held | None = None) -> Flips:
    """Posterior of a flipped label for each pair, and the share of flips.

    With g(s) the density of a right pair, a flipped one has g(-s). If g(s) / g(-s) = exp(a s), as
    for a normal density and for any that is an even one tilted, the sign of s follows

        P(s > 0 | |s|) = pi + (1 - 2 pi) sigmoid(a |s|)

    whatever the distribution of |s|: it levels off at 1 - pi, the share of right labels. pi and a
    are fitted by maximum likelihood, and the posterior is sigmoid(-a s - log((1 - pi) / pi)).
    s is E[x xᵀ]⁻¹E[x] · x: for two mirrored normal densities of the same covariance that is the
    best direction, and it does not depend on pi, as pairs and mirror images have the same second
    moments. A number that would count against the label where it is large is left out: where chosen
    answers are mostly the longer ones, say, their margins are negative without being wrong.

    Errors of the policy that do not fade where it is surest count as flips, and so do the heavy
    tails of a density for which g(s) / g(-s) is bounded.

    Args:
        evidence_NE: float, E numbers for each of N pairs, all with the sign of the label, larger =
            more surely right; rows with a nan are not known.
        held: of earlier estimates of the same data. Once it is firm, with the present one if that
            is well supported, its share is the prior, whatever the present one is.

    Returns:
        Flips; the same for every order of the pairs. Nothing is known of fewer than `LEAST_PAIRS`,
        nor if no number is positive on average.

    Source: own. Relatives: Pleiss et al. 2020, "Identifying mislabeled data using the area under
    the margin ranking", arXiv 2001.10528; Northcutt et al. 2021, "Confident learning", arXiv
    1911.00068; Li et al. 2020, "DivideMix", arXiv 2002.07394; Scott 2015 for a share as the level
    that a ratio of densities tends to.

    >>> rng = np.random.default_rng(0)
    >>> flipped = rng.random(4000) < 0.2
    >>> x = np.where(flipped, -1, 1)[:, None] * rng.normal([1.0, 0.5], 0.7, (4000, 2))
    >>> found = detect(x)
    >>> round(found.share, 1), round(float(flipped[found.suspected_N].mean()), 1), found.many
    (0.2, 0.9, True)
    """
    x, held = np.asarray(evidence_NE, np.float64), held or Held()
    known_N = np.isfinite(x).all(axis=1)
    unknown = np.full(len(x), np.nan)
    s = _direction(x[known_N]) if known_N.sum() >= LEAST_PAIRS else np.zeros(0)
    if not s.any():
        return Flips(unknown, unknown.copy(), held.share if held.firm else 0.0, 0.0, held)
    share, slope, gain = _fit(s)
    held = held.with_estimate(share, gain)
    if held.firm:
        share, slope, _ = _fit(s, held.share)
    log_odds_N, posterior_N = unknown.copy(), unknown
    log_odds_N[known_N] = slope * s
    prior = np.log1p(-share) - np.log(share) if share > 0 else np.inf
    posterior_N[known_N] = _sigmoid(-slope * s - prior)
    return Flips(posterior_N, log_odds_N, share, gain, held)


def lowest(reward_margin_P: np.ndarray, pair_P: np.ndarray, share: float = QUANTILE) -> np.ndarray:
    """The pairs with the lowest reward margins: the guard that needs no estimate.

    Args:
        reward_margin_P: float; a pair where it is nan is not known and never among them.
        pair_P: int, all different; breaks ties, lower first.
        share: of the known pairs, in [0, 1), rounded down.

    Returns:
        bool [P].

    Raises:
        ValueError: a share outside its range.

    >>> lowest(np.array([0.3, -2.0, np.nan, 1.0]), np.arange(4)).tolist()
    [False, False, False, False]
    >>> lowest(np.array([0.3, -2.0, np.nan, 1.0]), np.arange(4), 0.4).tolist()
    [False, True, False, False]
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} must lie in [0, 1). Use {QUANTILE}.")
    margin_P = np.asarray(reward_margin_P, np.float64)
    order = np.lexsort((pair_P, margin_P))  # nan sorts last
    lowest_P = np.zeros(len(order), bool)
    lowest_P[order[: int(share * np.isfinite(margin_P).sum())]] = True
    return lowest_P


def neighbours_mean(
    value_N: np.ndarray, position_N: np.ndarray, which: np.ndarray, count: int = 50
) -> np.ndarray:
    """Mean of a value over the pairs that are next to a pair in some position, without itself.

    Args:
        value_N: float, what is averaged; pairs where it is nan are nobody's neighbours.
        position_N: float, what makes neighbours, such as the margin under the reference.
        which: int [K], pairs whose neighbours are asked for.
        count: neighbours of each, as many on either side as there are, nearest in rank.

    Returns:
        float64 [K]; nan where there is no neighbour.

    >>> value, position = np.array([1.0, 2.0, 6.0, 9.0]), np.array([0.0, 1.0, 2.0, 3.0])
    >>> neighbours_mean(value, position, np.array([1]), count=2).tolist()
    [3.5]
    """
    value_N, position_N = np.asarray(value_N, np.float64), np.asarray(position_N, np.float64)
    known = np.flatnonzero(np.isfinite(value_N) & np.isfinite(position_N))
    known = known[np.lexsort((known, position_N[known]))]
    total = np.concatenate([[0.0], np.cumsum(value_N[known])])
    at = np.searchsorted(position_N[known], position_N[which])
    low = np.clip(at - count // 2, 0, max(0, len(known) - count - 1))
    high = np.minimum(low + count + 1, len(known))
    place = np.full(len(value_N), -1)
    place[known] = np.arange(len(known))
    inside = (place[which] >= low) & (place[which] < high)
    own = np.where(inside, np.nan_to_num(value_N[which]), 0.0)
    others = high - low - inside
    mean = (total[high] - total[low] - own) / np.maximum(others, 1)
    return np.where(others > 0, mean, np.nan)


def _direction(x_ME: np.ndarray) -> np.ndarray:
    """E[x xᵀ]⁻¹E[x] · x, without the columns whose weight would be negative; zeros if none is left.

    Sums are taken in sorted order, so that the order of the pairs changes no bit.
    """
    scale_E = np.sqrt(_mean(x_ME * x_ME))
    x_ME = x_ME[:, scale_E > 0] / scale_E[scale_E > 0]
    while x_ME.shape[1]:
        second = np.array([[_mean(a * b) for a in x_ME.T] for b in x_ME.T])
        second += 1e-6 * np.eye(len(second))  # for evidence that says the same twice
        weight_E = np.linalg.solve(second, _mean(x_ME))
        if weight_E.min() > 0:
            return np.sum(x_ME * weight_E, axis=1)
        x_ME = np.delete(x_ME, np.argmin(weight_E), axis=1)
    return np.zeros(len(x_ME))


def _mean(x: np.ndarray) -> np.ndarray:
    return np.mean(np.sort(x, axis=0), axis=0)


def _fit(s: np.ndarray, known_share: float | None = None) -> tuple[float, float, float]:
    """Share, slope and gain of P(s > 0 | |s|) = share + (1 - 2 share) sigmoid(slope |s|)."""
    order = np.lexsort((s, np.abs(s)))
    bins = np.array_split(s[order], min(_BINS, len(s)))
    size = np.array([np.mean(np.abs(b)) for b in bins])
    positive = np.array([np.sum(b > 0) for b in bins], np.float64)
    count = np.array([len(b) for b in bins], np.float64)

    def value(share, slope):  # log-likelihoods of all combinations
        p = share[:, None, None] + (1 - 2 * share)[:, None, None] * _sigmoid(
            slope[None, :, None] * size
        )
        p = np.clip(p, 1e-12, 1 - 1e-12)
        return np.sum(positive * np.log(p) + (count - positive) * np.log1p(-p), axis=-1)

    unit = np.sqrt(np.mean(size**2)) or 1.0
    shares = np.linspace(0.0, _LARGEST_SHARE, 46)
    if known_share is not None:
        shares = np.array([known_share])
    slopes = np.geomspace(0.1, 50.0, 64) / unit
    none = float(value(np.zeros(1), slopes).max())
    for _ in range(3):  # a grid, and twice a finer one around its best
        found = value(shares, slopes)
        i, j = divmod(int(np.argmax(found)), found.shape[1])
        share, slope, best = shares[i], slopes[j], found[i, j]
        around = shares[max(i - 1, 0)], shares[min(i + 1, len(shares) - 1)]
        shares = np.linspace(*around, 17)
        slopes = np.geomspace(slopes[max(j - 1, 0)], slopes[min(j + 1, len(slopes) - 1)], 17)
    return float(share), float(slope), float(best) - none


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
