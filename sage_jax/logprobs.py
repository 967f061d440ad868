"""Log-probabilities of packed completions, without ever holding logits for a whole row.

The vocabulary matmul runs over chunks of tokens. A chunk's logits live only inside the chunk: the
backward pass computes them again. Everything a step wants to know about a token (log-probability,
entropy, argmax hit, mean logit) comes from that one matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sage_jax import batch as batches

Array = batches.Array
LogpsFn = Callable[[Any, Any, batches.PackedBatch], "SequenceStats"]


class SequenceStats(NamedTuple):
    """Sums over the completion tokens of each sequence: float32, [..., 2], last axis the side."""

    logps: Array  # log-probability of the completion, nats
    tokens: Array  # completion tokens counted
    spread: Array  # sum of (x_t - mean x)^2, nats^2, with x_t a token's log-probability
    entropy: Array  # sum of the predictive entropies, nats
    mean_logit: Array  # sum of the vocabulary-mean logits
    hits: Array  # number of tokens that are the argmax
    logit_norm: Array  # sum of ||onehot(y) - softmax||^2, 0 unless asked for


# `(hidden_RTD, targets_RT, segment_RT, mask_RT, head_DV) -> (TokenStats, segment_RT, mask_RT)`
TokenFn = Callable[..., tuple["TokenStats", Array, Array]]


class TokenStats(NamedTuple):
    """The same quantities of single tokens: float32 [R, T], index t speaks of token t + 1."""

    logp_RT: Array
    entropy_RT: Array
    mean_logit_RT: Array
    hit_RT: Array
    logit_norm_RT: Array


def chunk_length(rows: int, length: int, vocabulary: int, budget_bytes: int = 2**26) -> int:
    """Tokens of each row that one chunk holds, so that its float32 logits fit the budget.

    Chunks cut the token axis only: the row axis stays sharded as it is.

    Args:
        rows: rows of the batch on one device.
        length: tokens in a row.
        vocabulary: size of the vocabulary.
        budget_bytes: size of one [rows, chunk, vocabulary] float32 array.

    Returns:
        A chunk length between 1 and `length`, chunks as equal as possible.

    >>> chunk_length(4, 1024, 49152), chunk_length(4, 128, 32)
    (79, 128)
    """
    most = max(1, budget_bytes // (4 * rows * vocabulary))
    return math.ceil(length / math.ceil(length / most))


def _stats_of_chunk(
    hidden: Array, head_DV: Array, targets: Array, logit_norm: bool, light: bool = False
) -> TokenStats:
    # float32 accumulation whatever the dtype of the matmul's inputs. Rows and tokens are merged for
    # it: XLA's CPU backend contracts two axes slowly in the head's gradient. The sharded row axis
    # stays the major one.
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.matmul(flat, head_DV, preferred_element_type=jnp.float32)
    logits = logits.reshape(*hidden.shape[:-1], -1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = target_logit - lse

    seen = jax.lax.stop_gradient(logits)  # what follows is reported, never differentiated
    prob = jnp.exp(seen - jax.lax.stop_gradient(lse)[..., None])
    norm = zero = jnp.zeros_like(lse)
    if logit_norm:  # ||e_y - p||^2 = 1 - 2 p_y + sum p^2
        norm = 1.0 - 2.0 * jnp.exp(jax.lax.stop_gradient(logp)) + jnp.sum(prob * prob, axis=-1)
        norm = jax.lax.stop_gradient(norm)
    if light:
        return TokenStats(logp, zero, zero, zero, norm)
    entropy = jax.lax.stop_gradient(lse) - jnp.sum(prob * seen, axis=-1)
    hit = (seen.max(axis=-1) <= jax.lax.stop_gradient(target_logit)).astype(jnp.float32)
    return TokenStats(logp, entropy, seen.mean(axis=-1), hit, norm)


def token_stats(
    hidden_RTD: Array,
    head_DV: Array,
    targets_RT: Array,
    *,
    chunk: int | None = None,
    logit_norm: bool = False,
) -> TokenStats:
    """Statistics of each target token under the model's next-token distribution.

    Args:
        hidden_RTD: final hidden states, float32 or bfloat16.
        head_DV: the output projection, same dtype as the hidden states.
        targets_RT: int32, the token that position t is to predict.
        chunk: tokens of each row per chunk; None chooses by `chunk_length`.
        logit_norm: also compute the squared norm of the logit-space gradient.

    Returns:
        TokenStats, float32 [R, T]. Only `logp_RT` carries a gradient.

    >>> hidden = jnp.ones((1, 4, 2)); head = jnp.zeros((2, 8))
    >>> stats = token_stats(hidden, head, jnp.zeros((1, 4), jnp.int32), chunk=2)
    >>> bool(jnp.allclose(stats.logp_RT, -jnp.log(8.0)))
    True
    """
    rows, length, width = hidden_RTD.shape
    chunk = chunk or chunk_length(rows, length, head_DV.shape[-1])
    count = math.ceil(length / chunk)
    if count == 1:
        return _stats_of_chunk(hidden_RTD, head_DV, targets_RT, logit_norm)

    fill = count * chunk - length
    hidden = jnp.pad(hidden_RTD, ((0, 0), (0, fill), (0, 0)))
    hidden = jnp.moveaxis(hidden.reshape(rows, count, chunk, width), 1, 0)
    targets = jnp.pad(targets_RT, ((0, 0), (0, fill)))
    targets = jnp.moveaxis(targets.reshape(rows, count, chunk), 1, 0)

    @jax.checkpoint  # without it, the scan would keep every chunk's logits for the backward pass
    def one(part):
        return _stats_of_chunk(part[0], head_DV, part[1], logit_norm)

    stacked = jax.lax.map(one, (hidden, targets))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, count * chunk)[:, :length], stacked
    )


def completion_stats(
    hidden_RTD: Array,
    head_DV: Array,
    targets_RT: Array,
    mask_RT: Array,
    *,
    chunk: int | None = None,
    logit_norm: bool = False,
) -> tuple[TokenStats, Array]:
    """What a score needs of the counted tokens, which alone pass through the vocabulary matmul.

    Each row's counted positions are gathered to its front, and the loop over chunks ends with the
    fullest row: prompts and padding cost no head work, whatever share of the rows they are. The
    number of chunks is known on the device only, so this is a forward pass without a gradient.

    Args:
        hidden_RTD: final hidden states, float32 or bfloat16.
        head_DV: the output projection, same dtype as the hidden states.
        targets_RT: int32, the token that position t is to predict.
        mask_RT: float32, 1 where the target counts.
        chunk: tokens of each row per chunk; None chooses at most an eighth of a row.
        logit_norm: also compute the squared norm of the logit-space gradient.

    Returns:
        TokenStats, float32 [R, T], and the int32 [R, T] order of positions that they are in: the
        counted ones first, each row's in their order. `logp_RT` and, if asked for,
        `logit_norm_RT`; the other fields are 0, and so is everything after the counted tokens.

    >>> hidden = jnp.ones((1, 4, 2)); head = jnp.zeros((2, 8)); mask = jnp.float32([[0, 1, 0, 1]])
    >>> stats, order = completion_stats(hidden, head, jnp.zeros((1, 4), jnp.int32), mask, chunk=2)
    >>> order.tolist(), jnp.round(jnp.exp(stats.logp_RT), 3).tolist()
    ([[1, 3, 0, 2]], [[0.125, 0.125, 1.0, 1.0]])
    """
    rows, length, _ = hidden_RTD.shape
    chunk = chunk or _completion_chunk(rows, length, head_DV.shape[-1])
    count = math.ceil(length / chunk)
    order_RT = jnp.argsort(mask_RT <= 0, axis=1, stable=True)
    padded = jnp.pad(order_RT, ((0, 0), (0, count * chunk - length)))
    fullest = jnp.max(jnp.sum(mask_RT > 0, axis=1))

    def one(i, found):
        place = jax.lax.dynamic_slice_in_dim(padded, i * chunk, chunk, 1)
        part = _stats_of_chunk(
            jnp.take_along_axis(hidden_RTD, place[..., None], 1),
            head_DV,
            jnp.take_along_axis(targets_RT, place, 1),
            logit_norm,
            light=True,
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, new, i * chunk, 1)
            for whole, new in zip(found, (part.logp_RT, part.logit_norm_RT), strict=True)
        )

    zero = jnp.zeros((rows, count * chunk), jnp.float32)
    logp, norm = jax.lax.fori_loop(0, (fullest + chunk - 1) // chunk, one, (zero, zero))
    # The last chunk reaches past the counted tokens of a row, into positions that do not count.
    counted_RT = jnp.take_along_axis(mask_RT, order_RT, 1) > 0
    logp_RT, norm_RT = (jnp.where(counted_RT, x[:, :length], 0.0) for x in (logp, norm))
    zero_RT = zero[:, :length]
    return TokenStats(logp_RT, zero_RT, zero_RT, zero_RT, norm_RT), order_RT


def _completion_chunk(rows: int, length: int, vocabulary: int, least_bytes: int = 2**20) -> int:
    """Tokens of each row that one chunk of completions holds.

    A pass ends with a whole chunk: fine ones waste little. Below a megabyte of logits the loop
    costs more than it saves.
    """
    fine = max(math.ceil(length / 8), least_bytes // (4 * rows * vocabulary))
    return min(chunk_length(rows, length, vocabulary), fine)


def targets(batch: batches.PackedBatch) -> tuple[Array, Array, Array]:
    """Next-token targets of packed rows.

    Args:
        batch: packed rows.

    Returns:
        targets_RT int32, the next token; segment_RT int32, the segment it belongs to, 0 where it
        does not count (prompt, padding, another sequence, end of the row); mask_RT float32, 1
        where it counts.

    >>> rows = batches.empty(1, 4, 1)
    >>> rows = rows._replace(tokens_RT=jnp.array([[5, 6, 7, 0]]),
    ...                      segment_RT=jnp.array([[1, 1, 1, 0]]),
    ...                      completion_RT=jnp.array([[False, True, True, False]]))
    >>> targets(rows)[2].tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """
    following = [jnp.roll(jnp.asarray(x), -1, axis=1) for x in (batch.tokens_RT, batch.segment_RT)]
    counted = jnp.roll(jnp.asarray(batch.completion_RT), -1, axis=1)
    same = (following[1] == batch.segment_RT) & (following[1] > 0)
    last = jnp.arange(same.shape[1]) == same.shape[1] - 1
    mask = counted & same & ~last
    return following[0], jnp.where(mask, following[1], 0), mask.astype(jnp.float32)


def _segment_sums(values_RT: Array, segment_RT: Array, slots: int) -> Array:
    """[R, 2S + 1] sums by segment; column 0 collects what does not count."""

    def one(values, segments):
        return jax.ops.segment_sum(values, segments, num_segments=2 * slots + 1)

    return jax.vmap(one)(values_RT, segment_RT)


def sequence_stats(tokens: TokenStats, segment_RT: Array, mask_RT: Array, slots: int):
    """Sums token statistics over the completions of packed rows.

    Args:
        tokens: float32 [R, T] statistics.
        segment_RT: int32 segments of the targets, 0 = not counted (from `targets`).
        mask_RT: float32, 1 where the target counts.
        slots: pair slots in a row, S.

    Returns:
        SequenceStats, float32 [R, S, 2]; exactly 0 for empty slots. Only `logps` has a gradient.

    >>> logp = jnp.array([[-1.0, -2.0, -4.0, -9.0]]); zero = jnp.zeros((1, 4))
    >>> segment = jnp.array([[1, 1, 2, 0]])  # two chosen tokens, one rejected, one not counted
    >>> mask = (segment > 0).astype(jnp.float32)
    >>> stats = sequence_stats(TokenStats(logp, zero, zero, zero, zero), segment, mask, slots=1)
    >>> stats.logps.tolist(), stats.tokens.tolist(), stats.spread.tolist()
    ([[[-3.0, -4.0]]], [[[2.0, 1.0]]], [[[0.5, 0.0]]])
    """
    rows = segment_RT.shape[0]

    def per_pair(sums):
        return sums[:, 1:].reshape(rows, slots, 2)

    def total(values_RT):
        return _segment_sums(jnp.where(mask_RT > 0, values_RT, 0.0), segment_RT, slots)

    count = total(mask_RT)
    logps = total(tokens.logp_RT)
    mean = jax.lax.stop_gradient(logps) / jnp.maximum(count, 1.0)
    # Two passes: the one-pass form E[x^2] - E[x]^2 cancels badly for long confident completions.
    deviation = jax.lax.stop_gradient(tokens.logp_RT) - jnp.take_along_axis(mean, segment_RT, 1)
    return SequenceStats(
        logps=per_pair(logps),
        tokens=per_pair(count),
        spread=per_pair(total(deviation**2)),
        entropy=per_pair(total(tokens.entropy_RT)),
        mean_logit=per_pair(total(tokens.mean_logit_RT)),
        hits=per_pair(total(tokens.hit_RT)),
        logit_norm=per_pair(total(tokens.logit_norm_RT)),
    )


def make_logps_fn(
    hidden_fn: Callable[[Any, Any, batches.PackedBatch], Array],
    head_fn: Callable[[Any, Any], Array],
    *,
    chunk: int | None = None,
    logit_norm: bool = False,
    light: bool = False,
    spread: Callable[[TokenFn], TokenFn] | None = None,
) -> LogpsFn:
    """Makes the function that every step takes, from a model's body and its output projection.

    Args:
        hidden_fn: `(params, frozen, batch) -> hidden_RTD`, the final hidden states. It has to
            respect `segment_RT` (no attention across segments) and `position_RT`.
        head_fn: `(params, frozen) -> head_DV`.
        chunk: tokens of each row per chunk of logits; None chooses by `chunk_length`.
        logit_norm: also compute the squared norm of the logit-space gradient.
        light: for scoring: `entropy`, `mean_logit` and `hits` are not computed but 0, and only
            completion tokens pass through the head. A forward pass without a gradient.
        spread: gives the head to devices that share rows and tokens, such as a `jax.shard_map` of
            the function over both: its arrays are [R, T, ...], and the head is last. Left to the
            compiler, the head's gradient would be summed over devices once a chunk. None: one
            device, or the compiler's choice.

    Returns:
        A pure function `(params, frozen, batch) -> SequenceStats` of [R, S, 2] arrays.

    >>> fn = make_logps_fn(lambda p, f, b: jnp.zeros((*b.tokens_RT.shape, 2)), lambda p, f: p)
    >>> fn(jnp.zeros((2, 8)), None, batches.empty(1, 4, 3)).logps.shape
    (1, 3, 2)
    """

    def every_token(hidden_RTD, targets_RT, segment_RT, mask_RT, head_DV):
        tokens = token_stats(hidden_RTD, head_DV, targets_RT, chunk=chunk, logit_norm=logit_norm)
        return tokens, segment_RT, mask_RT

    def completions(hidden_RTD, targets_RT, segment_RT, mask_RT, head_DV):
        tokens, order_RT = completion_stats(
            hidden_RTD, head_DV, targets_RT, mask_RT, chunk=chunk, logit_norm=logit_norm
        )
        segment_RT, mask_RT = (jnp.take_along_axis(x, order_RT, 1) for x in (segment_RT, mask_RT))
        return tokens, segment_RT, mask_RT

    per_token = completions if light else every_token
    if spread is not None:
        per_token = spread(per_token)

    def logps_fn(params, frozen, batch: batches.PackedBatch) -> SequenceStats:
        hidden_RTD = hidden_fn(params, frozen, batch)
        tokens, segment_RT, mask_RT = per_token(
            hidden_RTD, *targets(batch), head_fn(params, frozen)
        )
        return sequence_stats(tokens, segment_RT, mask_RT, batch.pair_RS.shape[1])

    return logps_fn
