"""Scores of preference pairs: how much signal a pair holds, and how sure that signal is.

For the sigmoid loss, |l'|, |l'| / (l'' + d) and the damped decrement are all decreasing functions
of the margin: each of them ranks pairs exactly as "lowest margin first" does. What can change the
ranking is knowledge beside the mean margin, so the SAGE score evaluates the decrement at the
pessimistic end of an error bar: m + kappa * error. An error whose sign the tokens do not support
falls behind a smaller one that they do.

Scores are float32, one a pair, unreduced. A margin m is handed to a loss as (m/2, -m/2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import logprobs, losses

Array = jax.Array | np.ndarray

MARGINS = ("likelihood", "reward")
STABILITIES = {  # what each side adds to the variance of the margin, nats², in one forward pass
    "token_error": lambda stats: stats.spread,
    "logit_norm": lambda stats: stats.logit_norm,
    "none": lambda stats: jnp.zeros_like(stats.spread),
}

ROUNDS = "rounds"  # the variance over visits, which a memory of several rounds has


def stability_sources(stability: str) -> tuple[str, ...]:
    """The sources of a margin's error in a setting; variances of several, joined by "+", add up.

    Raises:
        ValueError: an unknown source, one that is named twice, or "none" beside others.

    >>> stability_sources("token_error+rounds")
    ('token_error', 'rounds')
    """
    sources = tuple(stability.split("+"))
    known = {*STABILITIES, ROUNDS}
    if set(sources) - known or len(set(sources)) < len(sources):
        raise ValueError(
            f"selection.stability={stability!r} must be one of {', '.join(sorted(known))}, or "
            f"several of them joined by '+', each once."
        )
    if "none" in sources and len(sources) > 1:
        raise ValueError(
            f"selection.stability={stability!r} is none and something. Leave out 'none', or the "
            f"rest."
        )
    return sources


class PairScores(NamedTuple):
    """What scoring knows about each pair: float32, one value a pair, any common shape."""

    reward_margin: Array  # beta * [(a_w - r_w) - (a_l - r_l)], always of sums: rewards/margins
    likelihood_margin: Array  # temperature * (a_w - a_l), or of means over tokens
    margin_error: Array  # standard error of the likelihood margin, in its units
    gradient_signal: Array  # |slope| of the loss at `margin`
    curvature: Array  # curvature of the loss at `margin`
    score: Array  # damped decrement at `pessimistic_margin`: the SAGE score
    margin: Array  # the margin in use: the reward or the likelihood margin
    pessimistic_margin: Array  # margin + kappa * error; orders pairs whose float32 scores tie


def gradient_signal(loss: losses.Loss, margin: Array) -> jax.Array:
    """How hard a loss pulls at a pair: |dl/dm| at margin m. Any shape, float32.

    >>> float(gradient_signal(losses.sigmoid(), 0.0))
    0.5
    """
    return jnp.abs(loss.slope(*_sides(margin)))


def curvature(loss: losses.Loss, margin: Array) -> jax.Array:
    """How fast that pull changes: d²l/dm² at margin m. Any shape, float32.

    >>> float(curvature(losses.sigmoid(), 0.0))
    0.25
    """
    return loss.curvature(*_sides(margin))


def damped_decrement(loss: losses.Loss, margin: Array, damping: float = 0.1) -> jax.Array:
    """The damped Newton decrement min(l', 0)² / (max(l'', 0) + damping) at margin m.

    Twice the fall of the loss that a damped Newton step on the margin alone would promise, if the
    step raises the margin. Where a loss pulls it down, to a target that a pair has passed (ipo,
    sppo_hard, nca_pair, label smoothing), there is no error to learn from, and it counts as 0: or
    else mastered pairs would score highest of all. Where a loss is concave (apo_zero on wrong
    pairs) its curvature promises nothing and counts as 0.

    Args:
        loss: one of `losses.LOSSES` or your own.
        margin: float32, any shape, in the loss's units of reward.
        damping: positive; bounds the score where the loss is flat.

    Returns:
        float32, the shape of `margin`, never negative.

    Raises:
        ValueError: damping is not positive.

    Source: Boyd & Vandenberghe, Convex Optimization, section 9.5.1.

    >>> round(float(damped_decrement(losses.sigmoid(), 0.0, damping=0.25)), 4)  # 0.5² / (0.25+0.25)
    0.5
    """
    if not damping > 0:
        raise ValueError(
            f"selection.damping={damping} must be positive: it bounds the score where the loss is "
            f"flat. Try 0.1."
        )
    slope = jnp.minimum(loss.slope(*_sides(margin)), 0.0)
    return jnp.square(slope) / (jnp.maximum(curvature(loss, margin), 0.0) + damping)


def sage(
    loss: losses.Loss, margin: Array, error: Array, kappa: float = 2.0, damping: float = 0.1
) -> jax.Array:
    """The SAGE score: the damped decrement at the pessimistic margin m + kappa * error.

    Args:
        loss: one of `losses.LOSSES` or your own.
        margin: float32, any shape.
        error: float32, the margin's standard error in the same units, 0 or more.
        kappa: standard errors of doubt; 0 ranks by the margin alone.
        damping: see `damped_decrement`.

    >>> confident, doubtful = sage(losses.sigmoid(), np.array([-4.0, -6.0]), np.array([0.1, 3.0]))
    >>> bool(confident > doubtful)
    True
    """
    pessimistic = jnp.asarray(margin, jnp.float32) + kappa * jnp.asarray(error, jnp.float32)
    return damped_decrement(loss, pessimistic, damping)


def token_standard_error(
    spread: Array, tokens: Array, *, temperature: float = 1.0, length_normalised: bool = False
) -> jax.Array:
    """Standard error of the likelihood margin, from how its tokens disagree.

    A completion's log-probability is a sum of n token terms x_t. Taken as draws of one
    distribution, the sum has variance n * var(x) = sum_t (x_t - mean x)²; both sides add up.

    Args:
        spread: float32 [..., 2], sum_t (x_t - mean x)² of each side, nats².
        tokens: [..., 2], completion tokens of each side.
        temperature: factor between nats and the margin.
        length_normalised: the margin is of means over tokens.

    Returns:
        float32 [...], in units of the likelihood margin; 0 for a pair without tokens.

    >>> token_standard_error(np.array([[9.0, 16.0]]), np.array([[3, 4]])).tolist()
    [5.0]
    """
    variance = jnp.maximum(jnp.asarray(spread, jnp.float32), 0.0)
    if length_normalised:
        variance = variance / jnp.square(jnp.maximum(jnp.asarray(tokens, jnp.float32), 1.0))
    return temperature * _sqrt(variance.sum(-1))


def logit_norm_error(
    logit_norm: Array, tokens: Array, *, temperature: float = 1.0, length_normalised: bool = False
) -> jax.Array:
    """Error of the likelihood margin if every logit carried independent noise of variance 1.

    d logp / d logits of a token is onehot(y) - softmax, so that noise gives the token's log-prob
    the variance ||onehot(y) - softmax||², and the variances of all tokens add up.

    Args:
        logit_norm: float32 [..., 2], sum_t ||onehot(y_t) - p_t||² of each side.
        tokens: [..., 2], completion tokens of each side.
        temperature: factor between nats and the margin.
        length_normalised: the margin is of means over tokens.

    Returns:
        float32 [...], in units of the likelihood margin.

    >>> logit_norm_error(np.array([[1.0, 3.0]]), np.array([[2, 2]])).tolist()
    [2.0]
    """
    return token_standard_error(
        logit_norm, tokens, temperature=temperature, length_normalised=length_normalised
    )


def round_variance_error(mean: Array, m2: Array, visits: Array) -> jax.Array:
    """Standard deviation of a pair's margin over its visits: how unsettled training leaves it.

    Args:
        mean: float32, any shape: the running mean of the margin. Only its shape is used, so that
            the three Welford arrays of `curriculum.Memory` can be passed as they are.
        m2: float32, the running sum of squared deviations.
        visits: int32, visits so far.

    Returns:
        float32, the units of the margin; 0 before the second visit.

    Source: Welford 1962.

    >>> round_variance_error(np.zeros(2), np.array([8.0, 0.0]), np.array([3, 1])).tolist()
    [2.0, 0.0]
    """
    visits = jnp.broadcast_to(jnp.asarray(visits), jnp.shape(mean))
    variance = jnp.asarray(m2, jnp.float32) / jnp.maximum(visits - 1, 1)
    return _sqrt(jnp.where(visits > 1, variance, 0.0))


def make_rescore_fn(
    loss: losses.Loss,
    *,
    margin: str = "likelihood",
    kappa: float = 2.0,
    damping: float = 0.1,
    temperature: float = 1.0,
) -> Callable[[Array, Array, Array], PairScores]:
    """Makes a function that scores pairs from margins alone, fresh or remembered.

    Args:
        loss: the loss whose signal and curvature are wanted.
        margin: which margin to score, one of `MARGINS`. All reward margins are 0 while the policy
            equals its reference, so "likelihood" is the one that can rank from the first round.
        kappa: standard errors of doubt, see `sage`. Not negative.
        damping: see `damped_decrement`.
        temperature: the factor the likelihood margin and its error were made with.

    Returns:
        A pure function `(reward_margin, likelihood_margin, margin_error) -> PairScores`.

    Raises:
        ValueError: a setting outside its range.

    >>> pairs = make_rescore_fn(losses.sigmoid())(np.zeros(2), np.array([-3.0, 3.0]), np.ones(2))
    >>> pairs.pessimistic_margin.tolist()
    [-1.0, 5.0]
    """
    if margin not in MARGINS:
        raise ValueError(f"selection.margin={margin!r} must be one of {', '.join(MARGINS)}.")
    if not kappa >= 0:
        raise ValueError(
            f"selection.kappa={kappa} must not be negative: it counts standard errors of doubt. "
            f"Use 2 for on-policy pairs, 0 when chosen answers are ground truth."
        )
    if not (damping > 0 and temperature > 0):
        raise ValueError(
            f"selection.damping={damping} and selection.temperature={temperature} must be "
            f"positive. Defaults are 0.1 and 1.0."
        )

    def rescore(reward_margin, likelihood_margin, margin_error) -> PairScores:
        reward, likelihood, error = (
            jnp.asarray(x, jnp.float32) for x in (reward_margin, likelihood_margin, margin_error)
        )
        in_use, scale = (
            (likelihood, 1.0) if margin == "likelihood" else (reward, loss.beta / temperature)
        )
        pessimistic = in_use + kappa * scale * error
        return PairScores(
            reward_margin=reward,
            likelihood_margin=likelihood,
            margin_error=error,
            gradient_signal=gradient_signal(loss, in_use),
            curvature=curvature(loss, in_use),
            score=damped_decrement(loss, pessimistic, damping),
            margin=in_use,
            pessimistic_margin=pessimistic,
        )

    return rescore


def make_score_fn(
    loss: losses.Loss,
    *,
    margin: str = "likelihood",
    kappa: float = 2.0,
    damping: float = 0.1,
    temperature: float = 1.0,
    length_normalised: bool = False,
    stability: str = "token_error",
) -> Callable[[logprobs.SequenceStats, Array], PairScores]:
    """Makes the function that scores pairs from the sums of one forward pass.

    Args:
        loss: the loss whose signal and curvature are wanted.
        margin: which margin to score, see `make_rescore_fn`.
        kappa: standard errors of doubt.
        damping: see `damped_decrement`.
        temperature: factor between nats and the likelihood margin; positive.
        length_normalised: take means over completion tokens for the likelihood margin.
        stability: where the error comes from, of `STABILITIES`, several joined by "+": their
            variances add up. "logit_norm" needs statistics
            made with `logit_norm=True`.

    Returns:
        A pure, jit-able function `(stats [..., 2], ref_logps [..., 2]) -> PairScores [...]`.

    Raises:
        ValueError: a setting outside its range, or one that cannot apply.

    >>> z = np.zeros((1, 2), np.float32)
    >>> stats = logprobs.SequenceStats(np.array([[-5.0, -2.0]]), z + 4, z + 2, z, z, z, z)
    >>> pairs = make_score_fn(losses.sigmoid(0.1))(stats, z)
    >>> float(pairs.likelihood_margin[0]), float(pairs.margin_error[0]), float(pairs.margin[0])
    (-3.0, 2.0, -3.0)
    """
    rescore = make_rescore_fn(
        loss, margin=margin, kappa=kappa, damping=damping, temperature=temperature
    )
    sources = stability_sources(stability)
    if ROUNDS in sources:
        raise ValueError(
            f"selection.stability={stability!r}: one pass does not know the variance over rounds. "
            f"Add `round_variance_error` of a memory to its error."
        )
    if length_normalised and margin == "reward":
        raise ValueError(
            "selection.length_normalised=True cannot apply to selection.margin='reward', which is "
            "always of sums. Use selection.margin='likelihood' or switch length_normalised off."
        )

    def score_fn(stats: logprobs.SequenceStats, ref_logps: Array) -> PairScores:
        logps = jnp.asarray(stats.logps, jnp.float32)
        tokens = jnp.asarray(stats.tokens, jnp.float32)
        ratio = logps - jnp.asarray(ref_logps, jnp.float32)
        side = logps / jnp.maximum(tokens, 1.0) if length_normalised else logps
        error = token_standard_error(
            sum(STABILITIES[source](stats) for source in sources),
            tokens,
            temperature=temperature,
            length_normalised=length_normalised,
        )
        reward_margin = loss.beta * (ratio[..., 0] - ratio[..., 1])
        return rescore(reward_margin, temperature * (side[..., 0] - side[..., 1]), error)

    return score_fn


def _sides(margin: Array) -> tuple[jax.Array, jax.Array]:
    half = jnp.asarray(margin, jnp.float32) / 2
    return half, -half


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0 instead of infinite, so that no masked pair is NaN."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
