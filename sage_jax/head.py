"""The vocabulary matmul: log-probabilities of tokens, with a gradient that computes little twice.

Logits exist for a chunk of tokens at a time. One pass over a chunk gives everything a step wants to
know of its tokens. Its gradient is written out: with e_y the target's one-hot vector and p the
softmax, the slope of a token's log-probability is (e_y - p) times a number that is known only after
the forward pass of the whole batch. So either p - e_y is kept, in the dtype of the matmul's inputs,
and the backward pass is two matmuls without a look at the vocabulary; or, where it would not fit,
the logits are computed once more.

Axes besides those of `batch`: N rows side by side, M tokens of such a row, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sage_jax import product


class Memory(NamedTuple):
    """Bytes that the head may take on one device."""

    chunk: int = 2**26  # float32 logits of one chunk
    kept: int = 2**29  # the softmax of a whole batch, for its backward pass


class TokenStats(NamedTuple):
    """What is said of single tokens: float32, [R, T] by position or [N, M] as gathered."""

    logp_RT: Any  # log-probability, nats; the only one with a gradient
    entropy_RT: Any  # of the predictive distribution, nats
    mean_logit_RT: Any  # mean of the logits over the vocabulary
    hit_RT: Any  # 1 if the token is the argmax
    logit_norm_RT: Any  # ||onehot(y) - softmax||^2


class Settings(NamedTuple):
    """Python choices of one call."""

    chunk: int  # tokens of each row in a chunk
    keep: bool  # keep the softmax for the backward pass
    logit_norm: bool
    light: bool  # log-probabilities, and logit_norm if asked for, alone
    softcap: float = 0.0  # bound of the logits, see `cap`; 0 = none
    cpu: bool = False  # where XLA has rules of its own, see `product` and `layers.norm`


def cap(logits: Any, softcap: float) -> Any:
    """Keeps logits within a bound: softcap * tanh(logits / softcap); 0 leaves them as they are.

    >>> float(cap(jnp.float32(100.0), 30.0)) < 30.0
    True
    """
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


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


def stats(
    hidden_NMD: Any, head_DV: Any, targets_NM: Any, count: Any, settings: Settings
) -> TokenStats:
    """Statistics of target tokens under the model's next-token distribution.

    Args:
        hidden_NMD: hidden states that predict them, float32 or bfloat16.
        head_DV: the output projection, same dtype.
        targets_NM: int32, the tokens.
        count: int32 [], leading tokens of each row that are asked for; the chunks behind them are
            not computed.
        settings: the Python choices.

    Returns:
        float32 [N, M]; 0 in chunks that are not computed.

    >>> settings = Settings(chunk=2, keep=True, logit_norm=False, light=False)
    >>> found = stats(jnp.ones((1, 4, 2)), jnp.zeros((2, 8)), jnp.zeros((1, 4), jnp.int32), 2,
    ...               settings)
    >>> jnp.round(jnp.exp(found.logp_RT), 3).tolist(), found.entropy_RT.shape
    ([[0.125, 0.125, 1.0, 1.0]], (1, 4))
    """
    length = hidden_NMD.shape[1]
    fill = -length % settings.chunk
    hidden = jnp.pad(hidden_NMD, ((0, 0), (0, fill), (0, 0)))
    targets = jnp.pad(jnp.asarray(targets_NM, jnp.int32), ((0, 0), (0, fill)))
    found = _stats(hidden, head_DV, targets, jnp.asarray(count, jnp.int32), settings)
    return TokenStats(*(x[:, :length] for x in found))


def keeps(rows: int, length: int, vocabulary: int, itemsize: int, budget_bytes: int) -> bool:
    """Whether the softmax of all these tokens fits the budget.

    >>> keeps(4, 1024, 49152, 4, 2**29), keeps(1, 1024, 49152, 4, 2**29)
    (False, True)
    """
    return rows * length * vocabulary * itemsize <= budget_bytes


def _slice(x: Any, i: Any, size: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, 1)


def _onto(whole: Any, part: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[1], 1)


def _logits(hidden_NCD: Any, head_DV: Any, softcap: float) -> Any:
    # float32 accumulation whatever the dtype of the inputs. Rows and tokens are merged: XLA's CPU
    # backend contracts two axes slowly. The sharded axis stays the major one.
    flat = hidden_NCD.reshape(-1, hidden_NCD.shape[-1])
    logits = jnp.matmul(flat, head_DV, preferred_element_type=jnp.float32)
    return cap(logits.reshape(*hidden_NCD.shape[:-1], -1), softcap)


def _of_chunk(logits: Any, targets: Any, settings: Settings) -> tuple[TokenStats, Any]:
    """Statistics, and the log of the softmax's denominator."""
    if settings.cpu and logits.ndim > 2:  # sums over [1, C, V] take ten times as long
        flat = logits.reshape(-1, logits.shape[-1])
        found = _of_chunk(flat, targets.reshape(-1), settings)
        return jax.tree.map(lambda x: x.reshape(targets.shape), found)
    top = logits.max(axis=-1)
    weight = jnp.exp(logits - top[..., None])
    total = weight.sum(axis=-1)
    lse = top + jnp.log(total)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = target - lse
    norm = zero = jnp.zeros_like(lse)
    if settings.logit_norm:  # ||e_y - p||^2 = 1 - 2 p_y + sum p^2
        norm = 1.0 - 2.0 * jnp.exp(logp) + jnp.sum(weight * weight, axis=-1) / (total * total)
    if settings.light:
        return TokenStats(logp, zero, zero, zero, norm), lse
    entropy = lse - jnp.sum(weight * logits, axis=-1) / total
    hit = (top <= target).astype(jnp.float32)
    return TokenStats(logp, entropy, logits.mean(axis=-1), hit, norm), lse


def _excess(logits: Any, lse: Any, targets: Any, dtype: Any, softcap: float) -> Any:
    """p - e_y, in the dtype that the backward pass multiplies; times the slope of the bound."""
    at = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hot = (at == targets[..., None]).astype(jnp.float32)
    excess = jnp.exp(logits - lse[..., None]) - hot
    if softcap:  # of softcap * tanh(x / softcap)
        excess *= 1.0 - jnp.square(logits / softcap)
    return excess.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _stats(hidden, head, targets, count, settings):
    return _forward(hidden, head, targets, count, settings, keep=False)[0]


def _forward(hidden, head, targets, count, settings, *, keep):
    rows, length, _ = hidden.shape
    chunk = settings.chunk

    def one(i, carry):
        found, lse, kept = carry
        logits = _logits(_slice(hidden, i, chunk), head, settings.softcap)
        wanted = _slice(targets, i, chunk)
        part, part_lse = _of_chunk(logits, wanted, settings)
        found = TokenStats(*(_onto(x, y, i) for x, y in zip(found, part, strict=True)))
        if keep:
            excess = _excess(logits, part_lse, wanted, hidden.dtype, settings.softcap)
            kept = _onto(kept, product.to_bits(excess) if settings.cpu else excess, i)
        return found, _onto(lse, part_lse, i), kept

    zero = jnp.zeros((rows, length), jnp.float32)
    bits = jax.eval_shape(product.to_bits, hidden).dtype if settings.cpu else hidden.dtype
    kept = jnp.zeros((rows, length, head.shape[1]), bits) if keep else ()
    start = (TokenStats(*[zero] * len(TokenStats._fields)), zero, kept)
    return jax.lax.fori_loop(0, _chunks(count, chunk, length), one, start)


def _chunks(count: Any, chunk: int, length: int) -> Any:
    return jnp.minimum((count + chunk - 1) // chunk, length // chunk)


def _keep(hidden, head, targets, count, settings):
    found, lse, kept = _forward(hidden, head, targets, count, settings, keep=settings.keep)
    return found, (hidden, head, targets, count, lse, kept)


def _backward(settings, residuals, slopes):
    hidden, head, targets, count, lse, kept = residuals
    slope = slopes.logp_RT
    length, width = hidden.shape[1], hidden.shape[2]
    # The gradient of the head is as large as the head and is written once a chunk: few large ones.
    chunk = settings.chunk
    if settings.keep:
        chunks = length // chunk
        # On a CPU fewer, as the last one is half for nothing.
        most = min(4, max(1, chunks // 4)) if settings.cpu else 4
        chunk *= max(n for n in range(1, most + 1) if chunks % n == 0)

    def one(i, carry):
        d_hidden, d_head = carry
        part, factor = _slice(hidden, i, chunk), _slice(slope, i, chunk)[..., None]
        if settings.keep:
            excess = product.from_bits(_slice(kept, i, chunk), hidden.dtype)
        else:
            logits = _logits(part, head, settings.softcap)
            wanted = _slice(targets, i, chunk)
            excess = _excess(logits, _slice(lse, i, chunk), wanted, hidden.dtype, settings.softcap)
        flat = excess.reshape(-1, excess.shape[-1])
        if settings.cpu:
            back = product.dot(flat, head, 1)  # given head.T, XLA would widen both
        else:
            back = jnp.matmul(flat, head.T, preferred_element_type=jnp.float32)
        new = -factor * back.reshape(part.shape)
        scaled = (-factor * part).astype(hidden.dtype).reshape(-1, width)
        d_head += product.over_rows(scaled, flat)
        return _onto(d_hidden, new.astype(hidden.dtype), i), d_head

    start = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    d_hidden, d_head = jax.lax.fori_loop(0, _chunks(count, chunk, length), one, start)
    return d_hidden, d_head.astype(head.dtype), None, None


_stats.defvjp(_keep, _backward)
