"""Log-probabilities of packed completions, and their sums over each completion.

Only completion tokens pass through the vocabulary matmul, in chunks; see `head`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sage_jax import batch as batches
from sage_jax import head

Array = batches.Array
MEMORY = head.Memory()
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
TokenFn = Callable[..., tuple[head.TokenStats, Array, Array]]
TokenStats = head.TokenStats
chunk_length = head.chunk_length


def token_stats(
    hidden_RTD: Array,
    head_DV: Array,
    targets_RT: Array,
    *,
    chunk: int | None = None,
    logit_norm: bool = False,
    softcap: float = 0.0,
    memory: head.Memory = MEMORY,
    platform: str | None = None,
) -> TokenStats:
    """Statistics of each target token under the model's next-token distribution.

    Args:
        hidden_RTD: final hidden states, float32 or bfloat16.
        head_DV: the output projection, same dtype as the hidden states.
        targets_RT: int32, the token that position t is to predict.
        chunk: tokens of each row per chunk; None chooses by `chunk_length`.
        logit_norm: also compute the squared norm of the logit-space gradient.
        softcap: bound of the logits, see `head.cap`; 0 = none.
        memory: what the head may take on one device.
        platform: "cpu", "gpu" or "tpu": where it runs; None: where this program does.

    Returns:
        TokenStats, float32 [R, T]. Only `logp_RT` carries a gradient.

    >>> hidden = jnp.ones((1, 4, 2)); head = jnp.zeros((2, 8))
    >>> stats = token_stats(hidden, head, jnp.zeros((1, 4), jnp.int32), chunk=2)
    >>> bool(jnp.allclose(stats.logp_RT, -jnp.log(8.0)))
    True
    """
    rows, length, _ = hidden_RTD.shape
    vocabulary, itemsize = head_DV.shape[-1], jnp.dtype(hidden_RTD.dtype).itemsize
    chunk = chunk or chunk_length(rows, length, vocabulary, memory.chunk)
    keep = head.keeps(rows, length, vocabulary, itemsize, memory.kept)
    settings = head.Settings(chunk, keep, logit_norm, False, softcap, _on_cpu(platform))
    return head.stats(hidden_RTD, head_DV, targets_RT, length, settings)


def completion_stats(
    hidden_RTD: Array,
    head_DV: Array,
    targets_RT: Array,
    mask_RT: Array,
    *,
    chunk: int | None = None,
    logit_norm: bool = False,
    softcap: float = 0.0,
    light: bool = False,
    joined: bool = False,
    memory: head.Memory = MEMORY,
    platform: str | None = None,
) -> TokenStats:
    """Statistics of the counted tokens, which alone pass through the vocabulary matmul.

    Each row's counted positions are gathered to its front, and the loop over chunks ends with the
    fullest row: prompts and padding cost no head work, whatever share of the rows they are.

    Args:
        hidden_RTD: final hidden states, float32 or bfloat16.
        head_DV: the output projection, same dtype as the hidden states.
        targets_RT: int32, the token that position t is to predict.
        mask_RT: float32, 1 where the target counts.
        chunk: tokens of each row per chunk; None chooses at most a sixteenth of a row, on a CPU an
            eighth.
        logit_norm: also compute the squared norm of the logit-space gradient.
        softcap: bound of the logits, see `head.cap`; 0 = none.
        light: compute `logp_RT` and, if asked for, `logit_norm_RT` alone; the other fields are 0.
        joined: gather over all rows at once. For rows that lie on one device: then no row's loop
            waits for the fullest one.
        memory: what the head may take on one device.
        platform: "cpu", "gpu" or "tpu": where it runs; None: where this program does.

    Returns:
        TokenStats, float32 [R, T], by position; 0 where the target does not count. Only `logp_RT`
        carries a gradient.

    >>> hidden = jnp.ones((1, 4, 2)); head = jnp.zeros((2, 8)); mask = jnp.float32([[0, 1, 0, 1]])
    >>> stats = completion_stats(hidden, head, jnp.zeros((1, 4), jnp.int32), mask, chunk=2)
    >>> jnp.round(jnp.exp(stats.logp_RT), 3).tolist()
    [[1.0, 0.125, 1.0, 0.125]]
    """
    shape = targets_RT.shape
    if joined:
        hidden_RTD = hidden_RTD.reshape(1, -1, hidden_RTD.shape[-1])
        targets_RT, mask_RT = targets_RT.reshape(1, -1), mask_RT.reshape(1, -1)
    rows, length, _ = hidden_RTD.shape
    vocabulary, itemsize = head_DV.shape[-1], jnp.dtype(hidden_RTD.dtype).itemsize
    cpu = _on_cpu(platform)
    settings = head.Settings(
        chunk or _completion_chunk(rows, length, vocabulary, memory.chunk, 8 if cpu else 16),
        head.keeps(rows, length, vocabulary, itemsize, memory.kept),
        logit_norm,
        light,
        softcap,
        cpu,
    )
    order_RT = jnp.argsort(mask_RT <= 0, axis=1, stable=True)
    found = head.stats(
        jnp.take_along_axis(hidden_RTD, order_RT[..., None], 1),
        head_DV,
        jnp.take_along_axis(targets_RT, order_RT, 1),
        jnp.max(jnp.sum(mask_RT > 0, axis=1)),
        settings,
    )
    place_RT = jnp.argsort(order_RT, axis=1)

    def by_position(x_RT: Array) -> Array:
        # The last chunk reaches past the counted tokens of a row, into positions that do not count.
        return jnp.where(mask_RT > 0, jnp.take_along_axis(x_RT, place_RT, 1), 0.0).reshape(shape)

    return TokenStats(*(by_position(x) for x in found))


def _on_cpu(platform: str | None) -> bool:
    return (platform or jax.default_backend()) == "cpu"


def _completion_chunk(
    rows: int,
    length: int,
    vocabulary: int,
    budget_bytes: int,
    parts: int = 16,
    least_bytes: int = 2**20,
) -> int:
    """Tokens of each row that one chunk of completions holds: at most one part of the row.

    A pass ends with a whole chunk: fine ones waste little. Below a megabyte of logits the loop
    costs more than it saves. A CPU multiplies 128 tokens a fifth faster than 64, and 256 hardly
    faster, whose logits leave its cache.
    """
    fine = max(math.ceil(length / parts), least_bytes // (4 * rows * vocabulary))
    return min(chunk_length(rows, length, vocabulary, budget_bytes), fine)


def head_chunks(tokens: int, vocabulary: int, budget_bytes: int) -> int:
    """How many chunks the head makes of so many tokens on one device, if all of them count.

    >>> head_chunks(8192, 128256, 2**26)
    64
    """
    return math.ceil(tokens / _completion_chunk(1, tokens, vocabulary, budget_bytes))


def predictors(hidden_RTD: Array, batch: batches.PackedBatch) -> Array:
    """The hidden states that predict what `targets` says of each position, [R, T, D].

    >>> rows = batches.empty(1, 2, 1)
    >>> index = jnp.zeros((1, 2), jnp.int32)
    >>> shared = rows._replace(shared=batches.Shared(index, index, index + 1))
    >>> hidden = jnp.array([[[1.0], [2.0]]])
    >>> predictors(hidden, rows).ravel().tolist(), predictors(hidden, shared).ravel().tolist()
    ([1.0, 2.0], [2.0, 2.0])
    """
    if batch.shared is None:
        return hidden_RTD
    return jnp.take_along_axis(hidden_RTD, jnp.asarray(batch.shared.source_RT)[..., None], 1)


def targets(batch: batches.PackedBatch) -> tuple[Array, Array, Array]:
    """Next-token targets of packed rows, in the places of the hidden states of `predictors`.

    Args:
        batch: packed rows.

    Returns:
        targets_RT int32, the token to predict: the next one, or with shared prompts, where a token
        may be followed by two, the token of the place itself; segment_RT int32, the segment it
        belongs to, 0 where it does not count (prompt, padding, another sequence, end of the row);
        mask_RT float32, 1 where it counts.

    >>> rows = batches.empty(1, 4, 1)
    >>> rows = rows._replace(tokens_RT=jnp.array([[5, 6, 7, 0]]),
    ...                      segment_RT=jnp.array([[1, 1, 1, 0]]),
    ...                      completion_RT=jnp.array([[False, True, True, False]]))
    >>> targets(rows)[2].tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """
    if batch.shared is not None:
        counts = jnp.asarray(batch.completion_RT)
        segment_RT = jnp.where(counts, jnp.asarray(batch.segment_RT), 0)
        return jnp.asarray(batch.tokens_RT), segment_RT, counts.astype(jnp.float32)
    following = [jnp.roll(jnp.asarray(x), -1, axis=1) for x in (batch.tokens_RT, batch.segment_RT)]
    counted = jnp.roll(jnp.asarray(batch.completion_RT), -1, axis=1)
    same = (following[1] == batch.segment_RT) & (following[1] > 0)
    last = jnp.arange(same.shape[1]) == same.shape[1] - 1
    mask = counted & same & ~last
    return following[0], jnp.where(mask, following[1], 0), mask.astype(jnp.float32)


def segment_sums(values_RT: Array, segment_RT: Array, slots: int) -> Array:
    """Sums over the tokens of each sequence.

    Args:
        values_RT: float32.
        segment_RT: int32 segments of the tokens, 0 = in no sum.
        slots: pair slots in a row, S.

    Returns:
        float32 [R, S, 2].

    >>> segment_sums(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0, 2, 2]]), 1).tolist()
    [[[0.0, 6.0]]]
    """
    return _sums(values_RT, segment_RT, slots)[:, 1:].reshape(len(values_RT), slots, 2)


def _sums(values_RT: Array, segment_RT: Array, slots: int) -> Array:
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
        return _sums(jnp.where(mask_RT > 0, values_RT, 0.0), segment_RT, slots)

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


def of_pairs(values_RS2: Array, batch: batches.PackedBatch) -> Array:
    """What belongs to the completions of each pair, of what belongs to the sequences of the rows.

    The two differ where several pairs have a completion in common, see `batch.Shared`.

    >>> rows = batches.empty(1, 2, 2)
    >>> of = jnp.array([[[0, 1], [0, 3]]])  # both pairs have one chosen completion
    >>> shared = batches.Shared(*[rows.tokens_RT] * 3, sequence_RS2=of)
    >>> of_pairs(jnp.array([[[1.0, 2.0], [0.0, 3.0]]]), rows._replace(shared=shared)).tolist()
    [[[1.0, 2.0], [1.0, 3.0]]]
    """
    if batch.shared is None or batch.shared.sequence_RS2 is None:
        return values_RS2
    index = jnp.asarray(batch.shared.sequence_RS2).reshape(len(values_RS2), -1)
    flat = values_RS2.reshape(index.shape)
    return jnp.take_along_axis(flat, index, axis=1).reshape(values_RS2.shape)


def make_logps_fn(
    hidden_fn: Callable[[Any, Any, batches.PackedBatch], Array],
    head_fn: Callable[[Any, Any], Array],
    *,
    chunk: int | None = None,
    logit_norm: bool = False,
    softcap: float = 0.0,
    light: bool = False,
    spread: Callable[[TokenFn], TokenFn] | None = None,
    memory: head.Memory = MEMORY,
    penalty: bool = False,
    platform: str | None = None,
) -> LogpsFn:
    """Makes the function that every step takes, from a model's body and its output projection.

    Only completion tokens pass through the head.

    Args:
        hidden_fn: `(params, frozen, batch) -> hidden_RTD`, the final hidden states. It has to
            respect `segment_RT` (no attention across segments) and `position_RT`; and `shared`, if
            it is given rows with shared prompts.
        head_fn: `(params, frozen) -> head_DV`.
        chunk: tokens of each row per chunk of logits; None chooses.
        logit_norm: also compute the squared norm of the logit-space gradient.
        softcap: bound of the logits, see `head.cap`; 0 = none.
        light: for scoring: `entropy`, `mean_logit` and `hits` are not computed but 0.
        spread: gives the head to devices that share rows and tokens, such as a `jax.shard_map` of
            the function over both: its arrays are [R, T, ...], and the head is last. Left to the
            compiler, the head's gradient would be summed over devices once a chunk. None: one
            device, or the compiler's choice.
        memory: what the head may take on one device; with more of it, it computes less twice.
        penalty: `hidden_fn` returns a pair: the hidden states, and a scalar to be added to the
            loss (the load balance of experts); the result is then a pair as well, see
            `step.make_train_step`.
        platform: "cpu", "gpu" or "tpu": where it runs; None: where this program does.

    Returns:
        A pure function `(params, frozen, batch) -> SequenceStats` of [R, S, 2] arrays. It raises
        ValueError where `hidden_fn` returns other rows or tokens than it was given.

    >>> fn = make_logps_fn(lambda p, f, b: jnp.zeros((*b.tokens_RT.shape, 2)), lambda p, f: p)
    >>> fn(jnp.zeros((2, 8)), None, batches.empty(1, 4, 3)).logps.shape
    (1, 3, 2)
    """
    joined = spread is not None or jax.device_count() == 1

    def per_token(hidden_RTD, targets_RT, segment_RT, mask_RT, head_DV):
        tokens = completion_stats(
            hidden_RTD, head_DV, targets_RT, mask_RT,
            chunk=chunk, logit_norm=logit_norm, softcap=softcap, light=light, joined=joined,
            memory=memory, platform=platform,
        )  # fmt: skip
        return tokens, segment_RT, mask_RT

    per_token = per_token if spread is None else spread(per_token)

    def logps_fn(params, frozen, batch: batches.PackedBatch):
        found: Any = hidden_fn(params, frozen, batch)
        hidden_RTD, extra = found if penalty else (found, None)
        if hidden_RTD.shape[:2] != batch.tokens_RT.shape:
            raise ValueError(
                f"hidden_fn returned an array {list(hidden_RTD.shape)} for rows "
                f"{list(batch.tokens_RT.shape)}. It has to give a hidden state [R, T, D] for every "
                f"token; which one predicts which is found here."
            )
        hidden_RTD = predictors(hidden_RTD, batch)
        tokens, segment_RT, mask_RT = per_token(
            hidden_RTD, *targets(batch), head_fn(params, frozen)
        )
        stats = sequence_stats(tokens, segment_RT, mask_RT, batch.pair_RS.shape[1])
        stats = SequenceStats(*(of_pairs(x, batch) for x in stats))
        return (stats, extra) if penalty else stats

    return logps_fn
