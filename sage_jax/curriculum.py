"""What a run remembers of every pair, and the coarse draw that this memory drives.

Plain numpy on the host. A round draws a pool of candidates from strata of difficulty; the shares
of the strata follow how well the policy has mastered them. The draw is a function of the memory,
a seed and the round, so a run that is resumed draws what it would have drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sage_jax import scores


class Memory(NamedTuple):
    """One entry per pair of the data set; goes into the checkpoint as it is."""

    reward_margin: np.ndarray  # float32 [N], last seen, nan until then
    likelihood_margin: np.ndarray  # float32 [N], last seen, nan until then
    margin_error: np.ndarray  # float32 [N], last seen, nan until then
    score: np.ndarray  # float32 [N], last seen, nan until then
    mean: np.ndarray  # float32 [N], mean of the likelihood margin over visits
    m2: np.ndarray  # float32 [N], sum of its squared deviations from that mean
    visits: np.ndarray  # int32 [N], how often it was scored or trained
    drawn: np.ndarray  # int32 [N], how often it was drawn into a pool
    trained: np.ndarray  # int32 [N], how often it was trained
    last_round: np.ndarray  # int32 [N], round of the last visit, -1 until then


def init_memory(n: int) -> Memory:
    """The memory of n pairs that nothing has seen yet.

    >>> init_memory(2).last_round.tolist()
    [-1, -1]
    """
    unseen, zero, never = np.full(n, np.nan, np.float32), np.zeros(n, np.float32), np.zeros(n, int)
    return Memory(
        reward_margin=unseen,
        likelihood_margin=unseen.copy(),
        margin_error=unseen.copy(),
        score=unseen.copy(),
        mean=zero,
        m2=zero.copy(),
        visits=never.astype(np.int32),
        drawn=never.astype(np.int32),
        trained=never.astype(np.int32),
        last_round=np.full(n, -1, np.int32),
    )


def remember(
    memory: Memory,
    index_K: np.ndarray,
    pairs: scores.PairScores,
    round: int,
    trained: bool = False,
) -> Memory:
    """The memory after K pairs were seen.

    Args:
        memory: what is known so far; stays as it is.
        index_K: int, the pairs' indices in the data set. -1 marks an empty slot and is skipped.
        pairs: float [K] each, as scored or as returned by a train step.
        round: the round of this visit.
        trained: whether the visit was an update (True) or a scoring pass.

    Returns:
        A new memory. It copies N-long arrays: call it once a pass, not once a pair.

    Raises:
        ValueError: a pair appears twice, or its margin is not finite.

    Source: Welford 1962, for the running mean and variance.

    >>> pairs = scores.PairScores(*(np.array([2.0, 9.0]) for _ in scores.PairScores._fields))
    >>> remember(init_memory(3), np.array([1, -1]), pairs, round=0, trained=True).visits.tolist()
    [0, 1, 0]
    """
    index_K = np.asarray(index_K)
    real_K = index_K >= 0
    index = index_K[real_K]
    if len(np.unique(index)) < len(index):
        raise ValueError(
            "A pair appears twice in one call of remember. Call it once for each visit."
        )
    margin = np.asarray(pairs.likelihood_margin, np.float64)[real_K]
    if not np.isfinite(margin).all():
        bad = index[~np.isfinite(margin)][0]
        raise ValueError(
            f"Pair {bad} has a likelihood margin that is not finite. Its log-probabilities are "
            f"broken; lower the learning rate or look at the pair with `sage-jax doctor`."
        )
    new = Memory(*(a.copy() for a in memory))
    for name in ("reward_margin", "likelihood_margin", "margin_error", "score"):
        getattr(new, name)[index] = np.asarray(getattr(pairs, name))[real_K]
    visits = memory.visits[index] + 1
    step = margin - memory.mean[index]
    mean = memory.mean[index] + step / visits
    new.mean[index] = mean
    new.m2[index] = memory.m2[index] + step * (margin - mean)
    new.visits[index] = visits
    new.trained[index] += trained
    new.last_round[index] = round
    return new


def note_drawn(memory: Memory, index_P: np.ndarray) -> Memory:
    """The memory after these pairs (all different) were drawn into a pool.

    >>> note_drawn(init_memory(3), np.array([2])).drawn.tolist()
    [0, 0, 1]
    """
    drawn = memory.drawn.copy()
    drawn[index_P] += 1
    return memory._replace(drawn=drawn)


def grow(memory: Memory, count: int) -> Memory:
    """The memory with room for `count` more pairs behind the others, which nothing has seen yet.

    What was remembered of the others stays. Nothing has drawn the new ones either, so `draw` takes
    them first, until they have been in as many pools as the rest.

    >>> memory = note_drawn(init_memory(2), np.array([1]))
    >>> grow(memory, 1).drawn.tolist(), grow(memory, 1).last_round.tolist()
    ([0, 1, 0], [-1, -1, -1])
    """
    return Memory(*map(np.concatenate, zip(memory, init_memory(count), strict=True)))


def recall(memory: Memory, index_P: np.ndarray) -> Memory:
    """What is remembered of these pairs: the same fields, [P] each.

    `scores.make_rescore_fn` turns its margins into scores without a forward pass; pairs that were
    never visited have nan there.

    >>> recall(init_memory(3), np.array([0, 2])).visits.tolist()
    [0, 0]
    """
    return Memory(*(a[index_P] for a in memory))


def stratify(difficulty_N: np.ndarray, strata: int) -> np.ndarray:
    """Strata of about equal size from a difficulty, in increasing order of its values.

    A column with at most `strata` different values (a level, say) makes one stratum of each.
    Otherwise a value goes by its mid-rank among all, so equal values share a stratum, and a very
    frequent one can leave strata empty.

    Args:
        difficulty_N: float, any unit; nan = not known, and goes where the median is.
        strata: how many, at least 1.

    Returns:
        int32 [N], in [0, strata).

    >>> stratify(np.array([5.0, 1.0, 3.0, np.nan, 2.0, 4.0]), 5).tolist()
    [4, 0, 2, 2, 1, 3]
    >>> stratify(np.arange(8.0), 2).tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    if strata < 1:
        raise ValueError(f"curriculum.strata={strata} must be at least 1. Use 1 for no strata.")
    difficulty_N = np.asarray(difficulty_N, np.float64)
    known_N = ~np.isnan(difficulty_N)
    if not known_N.any():
        return np.zeros(len(difficulty_N), np.int32)
    value_U, inverse, count_U = np.unique(
        difficulty_N[known_N], return_inverse=True, return_counts=True
    )
    if len(value_U) <= strata:
        stratum_U = np.arange(len(value_U))
    else:
        mid_rank_U = np.cumsum(count_U) - count_U / 2
        stratum_U = np.floor(strata * mid_rank_U / count_U.sum()).astype(np.int64)
    median = np.searchsorted(np.cumsum(count_U), count_U.sum() / 2)
    stratum_N = np.full(len(difficulty_N), stratum_U[median], np.int32)
    stratum_N[known_N] = stratum_U[inverse]
    return stratum_N


def competence(memory: Memory, stratum_N: np.ndarray, strata: int) -> np.ndarray:
    """How well each stratum is mastered: the mean probability that a pair's margin is positive.

    A visited pair counts with P(margin > 0) under a normal distribution around its last likelihood
    margin, with its margin error as standard deviation.

    Args:
        memory: what is known of the pairs.
        stratum_N: int, the pairs' strata.
        strata: number of strata, K.

    Returns:
        float64 [K] in [0, 1]; 0.5 for a stratum of which no pair was visited.

    >>> competence(init_memory(4), np.array([0, 0, 1, 1]), 2).tolist()
    [0.5, 0.5]
    """
    seen_N = memory.visits > 0
    margin = memory.likelihood_margin[seen_N].astype(np.float64)
    error = memory.margin_error[seen_N].astype(np.float64)
    certain = np.where(margin == 0, 0.0, np.copysign(np.inf, margin))  # no error: the sign decides
    z = np.where(error > 0, margin / np.where(error > 0, error, 1.0), certain)
    probability = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
    total_K = np.bincount(stratum_N[seen_N], probability, minlength=strata)
    count_K = np.bincount(stratum_N[seen_N], minlength=strata)
    return np.where(count_K > 0, total_K / np.maximum(count_K, 1), 0.5)


def running_competence(previous_K: np.ndarray, now_K: np.ndarray, decay: float) -> np.ndarray:
    """decay * previous + (1 - decay) * now: a mean over rounds, so that one round moves little.

    >>> running_competence(np.array([0.5]), np.array([1.0]), 0.8).round(3).tolist()
    [0.6]
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"curriculum.decay={decay} must lie in [0, 1): at 1 competence never moves. Try 0.8."
        )
    return decay * np.asarray(previous_K) + (1 - decay) * np.asarray(now_K)


def mixture(
    competence_K: np.ndarray, population_K: np.ndarray, *, floor: float, sharpness: float
) -> np.ndarray:
    """Shares of the strata in the next pool: towards those that are not yet mastered.

    share = floor * population + (1 - floor) * wish, where the wish of a stratum is proportional to
    population * (1 - competence)^sharpness.

    Args:
        competence_K: float, in [0, 1].
        population_K: int or float, pairs in each stratum.
        floor: the part of its population share that every stratum keeps, in [0, 1]. Prototypes
            that starved strata did worse than no curriculum.
        sharpness: 0 = population shares exactly; larger leans further.

    Returns:
        float64 [K], sums to 1; 0 for an empty stratum.

    Raises:
        ValueError: a setting outside its range, or no pairs at all.

    >>> mixture(np.array([0.75, 0.25]), np.array([9, 9]), floor=0.2, sharpness=1).round(3).tolist()
    [0.3, 0.7]
    """
    if not (0 <= floor <= 1 and sharpness >= 0):
        raise ValueError(
            f"curriculum.floor={floor} must lie in [0, 1] and curriculum.sharpness={sharpness} "
            f"must not be negative. Use sharpness 0 for population shares."
        )
    population_K = np.asarray(population_K, np.float64)
    if not population_K.sum() > 0:
        raise ValueError("The strata hold no pairs. Load a data set with at least one pair.")
    population_K = population_K / population_K.sum()
    wish_K = population_K * (1 - np.asarray(competence_K, np.float64)) ** sharpness
    if sharpness == 0 or wish_K.sum() == 0:  # nothing left to master
        return population_K
    share_K = floor * population_K + (1 - floor) * wish_K / wish_K.sum()
    return share_K / share_K.sum()


def draw(
    drawn_N: np.ndarray,
    stratum_N: np.ndarray,
    share_K: np.ndarray,
    pool_size: int,
    *,
    seed: int,
    round: int,
) -> np.ndarray:
    """The pool of a round: pairs without repeats, in random order.

    Inside a stratum the pairs that were drawn least come first, at random among equals. With the
    shares of the population, rounds together visit every pair once before any twice, as epochs do.
    With other shares the expected count of every stratum is exactly its share, rounded at random:
    a stratum of half a pair a round is drawn every other round, not never.

    Args:
        drawn_N: int, how often each pair was drawn before.
        stratum_N: int, in [0, K).
        share_K: float, shares of the pool, summing to 1. What a stratum cannot fill goes to others.
        pool_size: pairs to draw; all of them in random order if it is N or more.
        seed: of the run.
        round: number of the round.

    Returns:
        int64 [min(pool_size, N)].

    >>> pool = draw(np.array([1, 0, 0, 1]), np.zeros(4, int), np.ones(1), 2, seed=0, round=0)
    >>> sorted(pool.tolist())
    [1, 2]
    """
    if pool_size < 1:
        raise ValueError(f"curriculum.pool_size={pool_size} must be at least 1, or N for an epoch.")
    rng = np.random.default_rng(np.random.SeedSequence([seed, round]))
    drawn_N, stratum_N = np.asarray(drawn_N), np.asarray(stratum_N)
    total = min(pool_size, len(drawn_N))
    population_K = np.bincount(stratum_N, minlength=len(share_K))
    if np.allclose(share_K, population_K / population_K.sum(), rtol=0, atol=1e-9):
        count_K = _epoch_counts(drawn_N, stratum_N, len(share_K), total, rng)
    else:
        count_K = _filled_counts(np.asarray(share_K, np.float64), population_K, total, rng)
    chosen = []
    for stratum, count in enumerate(count_K):
        inside = rng.permutation(np.flatnonzero(stratum_N == stratum))
        chosen.append(inside[np.argsort(drawn_N[inside], kind="stable")][:count])
    return rng.permutation(np.concatenate(chosen)).astype(np.int64)


def _epoch_counts(drawn_N, stratum_N, strata, total, rng) -> np.ndarray:
    """Counts that empty the least-drawn pairs of all strata before any pair is drawn again."""
    count_K = np.zeros(strata, np.int64)
    for level in np.unique(drawn_N):
        waiting_K = np.bincount(stratum_N[drawn_N == level], minlength=strata)
        take = min(total - count_K.sum(), waiting_K.sum())
        count_K += _round_at_random(take * waiting_K / waiting_K.sum(), rng)
    return count_K


def _filled_counts(share_K, population_K, total, rng) -> np.ndarray:
    """Counts by share; what exceeds a stratum goes to those that still have pairs, by share."""
    exact_K = np.zeros(len(share_K))
    while (missing := total - exact_K.sum()) > 1e-6:
        room_K = population_K - exact_K
        weight_K = np.where(room_K > 1e-9, share_K, 0.0)
        if weight_K.sum() == 0:  # only strata without a share have pairs left
            weight_K = room_K
        exact_K = np.minimum(exact_K + missing * weight_K / weight_K.sum(), population_K)
    return _round_at_random(exact_K, rng)


def _round_at_random(exact_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers with the same sum, each the floor or the ceiling, and exact on average.

    Systematic sampling: one random offset for all. Largest remainders would give a small stratum
    nothing in every round.
    """
    total = round(exact_K.sum())
    # 6.9999999999 is meant as 7: whole numbers stay themselves whatever the offset.
    edges = np.round(np.concatenate([[0.0], np.cumsum(exact_K)]), 9)
    edges[-1] = total
    return np.diff(np.floor(edges + rng.random())).astype(np.int64)
