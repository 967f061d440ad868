"""Choosing pairs by score: inside a jitted step, and on the host from a scored pool.

The jit-able functions (`top_k`, `threshold`, `sample`, `soft_weights`) have static shapes: they
return a fixed number of indices, a mask, or weights.

On the host a rule (`rules.RULES`) gives priorities, larger first, and `select_pool` keeps the best
of every stratum, a uniform share beside them, and leaves out suspected label noise.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


# --- inside a step: static shapes ---


def top_k(score_B: Array, k: int, tie_break_B: Array | None = None) -> jax.Array:
    """Indices of the k pairs with the largest scores, best first.

    Args:
        score_B: float32 scores; a NaN ranks last. Give pairs that must not be chosen -inf.
        k: how many, at most B.
        tie_break_B: float32, larger first among equal scores. What is still equal goes by index.

    Returns:
        int32 [k].

    >>> top_k(np.array([0.1, 0.9, 0.9]), 2, tie_break_B=np.array([0.0, 1.0, 2.0])).tolist()
    [2, 1]
    """
    keys = [score_B] if tie_break_B is None else [tie_break_B, score_B]  # last key counts most
    return jnp.lexsort([-_nan_last(key) for key in keys])[:k].astype(jnp.int32)


def threshold(score_B: Array, at_least: float) -> jax.Array:
    """Mask of the pairs whose score is at least a threshold: bool [B]. A NaN is never chosen.

    >>> threshold(np.array([0.1, np.nan, 0.9]), 0.5).tolist()
    [False, False, True]
    """
    return jnp.asarray(score_B) >= at_least


def sample(key: jax.Array, score_B: Array, k: int, tau: float = 1.0) -> jax.Array:
    """k pairs without replacement, each draw proportional to score^tau of those still left.

    Args:
        key: PRNG key.
        score_B: float32, not negative. Score 0 comes after every positive one, unless tau is 0;
            give pairs that must not be chosen -inf or NaN.
        k: how many, at most B.
        tau: 0 draws uniformly; larger is greedier, towards `top_k`.

    Returns:
        int32 [k], in the order drawn.

    Source: Kool et al. 2019, "Stochastic beams and where to find them" (Gumbel top-k).

    >>> sorted(sample(jax.random.key(0), np.array([0.0, 5.0, 2.0]), 2).tolist())
    [1, 2]
    """
    score_B = jnp.asarray(score_B, jnp.float32)
    log_score_B = tau * _log(score_B) + jax.random.gumbel(key, score_B.shape)
    # Positive, zero, excluded: the floor of `_log` alone is no zero when tau is small.
    class_B = jnp.where(score_B >= 0, 1 + ((score_B > 0) | (tau == 0)), 0)
    return top_k(class_B, k, tie_break_B=log_score_B)


def soft_weights(score_B: Array, tau: float, weight_B: Array) -> jax.Array:
    """Weights proportional to weight * score^tau that add up to what the weights did.

    Args:
        score_B: float32, any shape, not negative; ignored where the weight is 0. If all are 0, the
            weights stay as they are.
        tau: 0 leaves the weights as they are; larger concentrates on high scores.
        weight_B: float32, the same shape, 0 for empty slots.

    Returns:
        float32, the shape of `weight_B`: the weighted mean of the factors is 1; 0 stays exactly 0.

    >>> weight_B = soft_weights(np.array([2.0, 6.0, 7.0]), 1.0, np.array([1.0, 1.0, 0.0]))
    >>> [round(float(x), 3) for x in weight_B]
    [0.5, 1.5, 0.0]
    """
    weight_B = jnp.asarray(weight_B, jnp.float32)
    used_B = weight_B > 0
    score_B = jnp.where(used_B, score_B, 1.0)
    # Below all others, but finite: zeros among themselves are alike.
    log_score_B = jnp.where((score_B <= 0) & (tau != 0), -1e30, tau * _log(score_B))
    log_score_B = jnp.where(used_B, log_score_B, -jnp.inf)
    factor_B = jnp.exp(log_score_B - jnp.max(log_score_B, initial=-1e30))  # the largest is 1
    total = jnp.sum(weight_B * factor_B)
    scale = jnp.sum(weight_B) / jnp.where(total > 0, total, 1.0)
    return weight_B * factor_B * scale


def _log(score_B: Array) -> jax.Array:
    """log with a floor, so that zeros stay comparable among themselves and tau = 0 has no NaN."""
    return jnp.log(jnp.maximum(jnp.asarray(score_B, jnp.float32), jnp.finfo(jnp.float32).tiny))


def _nan_last(x: Array) -> jax.Array:
    x = jnp.asarray(x, jnp.float32)
    return jnp.where(jnp.isnan(x), -jnp.inf, x)


# --- on the host: the pool ---


class Selection(NamedTuple):
    """What was chosen from a pool, and why."""

    selected_P: np.ndarray  # bool
    reason_P: np.ndarray  # "all", "score", "uniform" (chosen); "rank", "noise" (not chosen)


def select_pool(
    priority_P: np.ndarray,
    stratum_P: np.ndarray,
    pair_P: np.ndarray,
    *,
    keep: float,
    uniform_share: float,
    rng: np.random.Generator,
    noisy_P: np.ndarray | None = None,
) -> Selection:
    """Keeps a fraction of a pool: the best of every stratum, and a uniform share beside them.

    The fraction counts the whole pool. It is apportioned to the strata by what the noise guard
    leaves of them, and inside a stratum to rank and chance. The result depends on the set of pairs
    in the pool, not on their order.

    Args:
        priority_P: float64, larger first; nan = not known yet: such a pair can only come in by
            chance, and chance also fills what too few known pairs leave open.
        stratum_P: int, stratum of each pair.
        pair_P: int, index of each pair in the data set, all different; breaks ties, lower first.
        keep: fraction of the pool to keep, in (0, 1]; at least one pair.
        uniform_share: fraction of the kept pairs that is drawn uniformly, in [0, 1].
        rng: for the uniform share.
        noisy_P: bool, pairs whose labels are not believed (`noise`): they are left out before
            anything is ranked, and of the uniform share. A flipped label looks like a confident
            error. None = none.

    Returns:
        Selection over the pool.

    Raises:
        ValueError: a fraction outside its range.

    >>> chosen = select_pool(np.array([1.0, 3.0, 2.0, 0.0]), np.zeros(4, int), np.arange(4),
    ...                      keep=0.5, uniform_share=0.0, rng=np.random.default_rng(0))
    >>> chosen.selected_P.tolist(), chosen.reason_P.tolist()
    ([False, True, True, False], ['rank', 'score', 'score', 'rank'])
    """
    _check_fractions(keep, uniform_share)
    priority_P, stratum_P, pair_P = map(np.asarray, (priority_P, stratum_P, pair_P))
    noisy_P = np.zeros(len(pair_P), bool) if noisy_P is None else np.asarray(noisy_P, bool)
    reason_P = np.where(noisy_P, "noise", "rank").astype("<U10")
    if len(pair_P) == 0:
        return Selection(np.zeros(0, bool), reason_P)

    _, member_P = np.unique(stratum_P, return_inverse=True)
    left_K = np.bincount(member_P[~noisy_P], minlength=member_P.max() + 1)
    total = min(max(1, _round(keep * len(pair_P))), int(left_K.sum()))
    quota_K = apportion(total, left_K)
    chance_K = apportion(_round(uniform_share * total), quota_K)
    for stratum, (quota, chance) in enumerate(zip(quota_K, chance_K, strict=True)):
        inside = np.flatnonzero((member_P == stratum) & ~noisy_P)
        order = inside[np.lexsort((pair_P[inside], -priority_P[inside]))]  # nan sorts last
        known = int(np.sum(~np.isnan(priority_P[order])))
        best = min(int(quota - chance), known)
        reason_P[order[:best]] = "score"
        rest = order[best:][np.argsort(pair_P[order[best:]])]
        reason_P[rng.choice(rest, size=int(quota) - best, replace=False)] = "uniform"
    selected_P = np.isin(reason_P, ("score", "uniform"))
    if keep == 1:
        reason_P[selected_P] = "all"
    return Selection(selected_P, reason_P)


def apportion(total: int, weight_K: np.ndarray) -> np.ndarray:
    """Whole shares of a total, proportional to weights, by largest remainder: int64 [K].

    No share is off its exact value by one or more, so counts are never exceeded when
    `total <= sum(weight_K)`. Equal remainders go to the lower index.

    >>> apportion(5, np.array([7, 3, 0])).tolist()
    [4, 1, 0]
    """
    weight_K = np.asarray(weight_K, np.float64)
    if weight_K.sum() == 0:
        return np.zeros(len(weight_K), np.int64)
    exact_K = total * weight_K / weight_K.sum()
    share_K = np.floor(exact_K + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-(exact_K - share_K), kind="stable")
    share_K[by_remainder[: total - share_K.sum()]] += 1
    return share_K


def _round(x: float) -> int:
    return int(np.floor(x + 0.5))  # halves go up, unlike Python's round


def _check_fractions(keep, uniform_share) -> None:
    if not 0 < keep <= 1:
        raise ValueError(
            f"selection.keep={keep} must lie in (0, 1]: it is the fraction of the pool to train "
            f"on. Use 0.5, or 1 for all of it."
        )
    if not 0 <= uniform_share <= 1:
        raise ValueError(
            f"selection.uniform_share={uniform_share} must lie in [0, 1]: it is a fraction of the "
            f"kept pairs. Use 0 for none."
        )
