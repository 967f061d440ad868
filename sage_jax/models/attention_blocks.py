"""Attention over key ranges in blocks, as plain XLA: no [T, T] array; unseen blocks are skipped.

A block of queries needs the keys from the first to the last one that any of its queries sees. The
loop over these key blocks has a length that only the device knows, which XLA cannot differentiate,
so the backward pass is written out. What it keeps of the forward pass is the output and one number
a query.

Axes besides those of `layers`: N rows side by side, M tokens of such a row, I query blocks, Q = the
queries of a block times the heads that share a key head, C keys of a block.

Source: Dao et al. 2022 (arXiv 2205.14135), the online softmax of Milakov & Gimelshein 2018 (arXiv
1805.02867).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # what a remat policy may keep of a forward pass
LOW = float(jnp.finfo(jnp.float32).min)


class Settings(NamedTuple):
    """Python choices of one call."""

    scale: float
    window: int
    softcap: float
    queries: int  # in a block
    keys: int  # in a block


class _Ranges(NamedTuple):
    """What the queries of each block see; int32."""

    first_INQ: jax.Array
    last_INQ: jax.Array
    position_INQ: jax.Array
    begin_I: jax.Array  # the first key that any query of the block sees
    blocks_I: jax.Array  # key blocks from there on


def attend(
    q_NMHE: jax.Array,
    key_NMGE: jax.Array,
    value_NMGE: jax.Array,
    visible: Any,
    key_position_NM: jax.Array,
    settings: Settings,
) -> jax.Array:
    """Attention of rows [N, M] to their key ranges; there may be more keys than queries.

    Args:
      q_NMHE: queries.
      key_NMGE: keys.
      value_NMGE: values.
      visible: `attention.Visible` of [N, M] arrays, of the queries.
      key_position_NM: int32, positions of the keys.
      settings: the Python choices.

    Returns:
      [N, M, H, E] in the dtype of the values.
    """
    rows, length, heads, width = q_NMHE.shape
    groups = key_NMGE.shape[2]
    settings = settings._replace(
        queries=min(settings.queries, length), keys=min(settings.keys, key_NMGE.shape[1])
    )
    fill = -length % settings.queries
    # A filled query sees key 0 alone, so that no softmax is empty; its output is cut off.
    first, last, position = (jnp.pad(x, ((0, 0), (0, fill))) for x in visible[:3])
    ranges = _ranges(first, last, position, settings, heads // groups)
    q_INGQE = _to_blocks(jnp.pad(q_NMHE, ((0, 0), (0, fill), (0, 0), (0, 0))), groups, settings)
    key, value = (x.transpose(0, 2, 1, 3) for x in (key_NMGE, value_NMGE))
    # A key block begins anywhere: the last one reaches past the row.
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, settings.keys), (0, 0))) for x in (key, value))
    position = jnp.pad(key_position_NM, ((0, 0), (0, settings.keys)))
    out_INGQE = _attend(q_INGQE, key, value, ranges, position, settings)
    count = out_INGQE.shape[0]
    out = out_INGQE.reshape(
        count, rows, groups, heads // groups, settings.queries, width
    ).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(rows, count * settings.queries, heads, width)[:, :length]


def _to_blocks(x_NMHE: jax.Array, groups: int, settings: Settings) -> jax.Array:
    rows, _, heads, width = x_NMHE.shape
    x = x_NMHE.reshape(rows, -1, settings.queries, groups, heads // groups, width)
    x = x.transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(x.shape[0], rows, groups, -1, width)


def _ranges(
    first_NM: jax.Array,
    last_NM: jax.Array,
    position_NM: jax.Array,
    settings: Settings,
    shared: int,
) -> _Ranges:
    rows = first_NM.shape[0]

    def blocks(x_NM):
        return x_NM.reshape(rows, -1, settings.queries).transpose(1, 0, 2)

    first, last, position = blocks(first_NM), blocks(last_NM), blocks(position_NM)
    begin_I, end_I = first.min(axis=(1, 2)), last.max(axis=(1, 2)) + 1
    blocks_I = (end_I - begin_I + settings.keys - 1) // settings.keys
    first, last, position = (jnp.tile(x, (1, 1, shared)) for x in (first, last, position))
    return _Ranges(first, last, position, begin_I, blocks_I)


def _seen(block: _Ranges, at: jax.Array, position_NM: jax.Array, settings: Settings) -> jax.Array:
    """bool [N, 1, Q, C] for the keys from index `at` on."""
    key_C = at + jnp.arange(settings.keys, dtype=jnp.int32)
    seen = (key_C >= block.first_INQ[..., None]) & (key_C <= block.last_INQ[..., None])
    if settings.window:
        position_NC = jax.lax.dynamic_slice_in_dim(position_NM, at, settings.keys, 1)
        seen &= block.position_INQ[..., None] - position_NC[:, None, :] < settings.window
    return seen[:, None]


def _over_width(q_NGQE: jax.Array, key_NGCE: jax.Array) -> jax.Array:
    """Products of all queries and keys, [N, G, Q, C], as one product without a transpose: XLA's CPU
    backend would widen bfloat16 keys that are transposed before (see `product`)."""
    axes = (((3,), (3,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(q_NGQE, key_NGCE, axes, preferred_element_type=jnp.float32)


def _logits(q: jax.Array, key: jax.Array, settings: Settings) -> jax.Array:
    logits = _over_width(q, key) * settings.scale
    return settings.softcap * jnp.tanh(logits / settings.softcap) if settings.softcap else logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings):
    return _forward(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings)[0]


def _forward(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings):
    """The output and the log of each query's softmax denominator."""

    def one(part):
        q, block = part

        def add(j, carry):
            out, top, total = carry
            at = block.begin_I + j * settings.keys
            key, value = (
                jax.lax.dynamic_slice_in_dim(x, at, settings.keys, 2)
                for x in (key_NGME, value_NGME)
            )
            seen = _seen(block, at, position_NM, settings)
            logits = jnp.where(seen, _logits(q, key, settings), LOW)
            higher = jnp.maximum(top, logits.max(axis=-1))
            # A query that has seen no key yet has top = LOW, where exp(LOW - LOW) would be 1.
            weight = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
            shrink = jnp.exp(top - higher)
            new = jnp.matmul(weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return (
                out * shrink[..., None] + new,
                higher,
                total * shrink + weight.sum(axis=-1),
            )

        zero = jnp.zeros(q.shape, jnp.float32)
        flat = jnp.zeros(q.shape[:-1], jnp.float32)
        out, top, total = jax.lax.fori_loop(0, block.blocks_I, add, (zero, flat + LOW, flat))
        return (out / total[..., None]).astype(value_NGME.dtype), top + jnp.log(total)

    return jax.lax.map(one, (q_INGQE, ranges))


def _keep(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings):
    out, lse = _forward(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings)
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q_INGQE, key_NGME, value_NGME, ranges, position_NM, out, lse)


def _backward(settings, kept, slope_INGQE):
    q_INGQE, key_NGME, value_NGME, ranges, position_NM, out_INGQE, lse_INGQ = kept

    def one(carry, part):
        q, block, out, lse, slope = part
        # sum over keys of weight x its slope, which the softmax takes off
        mean = jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1)

        def add(j, carry):
            d_q, d_key, d_value = carry
            at = block.begin_I + j * settings.keys
            key, value = (
                jax.lax.dynamic_slice_in_dim(x, at, settings.keys, 2)
                for x in (key_NGME, value_NGME)
            )
            logits = _logits(q, key, settings)
            seen = _seen(block, at, position_NM, settings)
            weight = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
            d_weight = _over_width(slope, value)
            d_logits = weight * (d_weight - mean[..., None]) * settings.scale
            if settings.softcap:
                d_logits *= 1.0 - (logits / settings.softcap) ** 2
            weight, d_logits = weight.astype(q.dtype), d_logits.astype(q.dtype)
            d_q += jnp.matmul(d_logits, key, preferred_element_type=jnp.float32)

            def onto(whole, rows, columns):
                new = jnp.matmul(rows.swapaxes(-1, -2), columns, preferred_element_type=jnp.float32)
                old = jax.lax.dynamic_slice_in_dim(whole, at, settings.keys, 2)
                return jax.lax.dynamic_update_slice_in_dim(whole, old + new, at, 2)

            return d_q, onto(d_key, d_logits, q), onto(d_value, weight, slope)

        zero = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = jax.lax.fori_loop(0, block.blocks_I, add, (zero, *carry))
        return tuple(carry), d_q.astype(q.dtype)

    zero = jnp.zeros(key_NGME.shape, jnp.float32)
    (d_key, d_value), d_q = jax.lax.scan(
        one, (zero, zero), (q_INGQE, ranges, out_INGQE, lse_INGQ, slope_INGQE)
    )
    return d_q, d_key.astype(key_NGME.dtype), d_value.astype(value_NGME.dtype), None, None


_attend.defvjp(_keep, _backward)
