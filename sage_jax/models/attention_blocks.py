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

from sage_jax import product

SAVED = "attention"  # what a remat policy may keep of a forward pass
LOW = float(jnp.finfo(jnp.float32).min)


class Settings(NamedTuple):
    """Python choices of one call."""

    scale: float
    window: int
    softcap: float
    queries: int  # in a block
    keys: int  # in a block
    cpu: bool = False  # keeps and loops over bits of bfloat16 numbers, see `product.keep_bits`
    streams: int = 1  # loops side by side, each over every so manyth block of queries


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
    fill = -length % (settings.queries * settings.streams)
    # A filled query repeats the last one: then its block sees no more keys. Its output is cut off.
    first, last, position = (jnp.pad(x, ((0, 0), (0, fill)), mode="edge") for x in visible[:3])
    ranges = _ranges(first, last, position, settings, heads // groups)
    q_INGQE = _to_blocks(jnp.pad(q_NMHE, ((0, 0), (0, fill), (0, 0), (0, 0))), groups, settings)
    key, value = (x.transpose(0, 2, 1, 3) for x in (key_NMGE, value_NMGE))
    # A key block begins anywhere: the last one reaches past the row.
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, settings.keys), (0, 0))) for x in (key, value))
    position = jnp.pad(key_position_NM, ((0, 0), (0, settings.keys)))
    out_INGQE = _attend(q_INGQE, key, value, ranges, position, settings)
    out = out_INGQE.reshape(-1, rows, groups, settings.queries, heads // groups * width)
    out = out.transpose(1, 0, 3, 2, 4)
    return out.reshape(rows, length + fill, heads, width)[:, :length]


def _to_blocks(x_NMHE: jax.Array, groups: int, settings: Settings) -> jax.Array:
    rows, _, heads, width = x_NMHE.shape
    x = x_NMHE.reshape(rows, -1, settings.queries, groups, heads // groups * width)
    x = x.transpose(1, 0, 3, 2, 4)
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
    first, last, position = (jnp.repeat(x, shared, axis=2) for x in (first, last, position))
    return _Ranges(first, last, position, begin_I, blocks_I)


def _seen(block: _Ranges, at: jax.Array, position_NM: jax.Array, settings: Settings) -> jax.Array:
    """bool [N, 1, C, Q] for the keys from index `at` on."""
    key_C1 = at + jnp.arange(settings.keys, dtype=jnp.int32)[:, None]
    seen = (key_C1 >= block.first_INQ[..., None, :]) & (key_C1 <= block.last_INQ[..., None, :])
    if settings.window:
        position_NC = jax.lax.dynamic_slice_in_dim(position_NM, at, settings.keys, 1)
        seen &= block.position_INQ[..., None, :] - position_NC[..., None] < settings.window
    return seen[:, None]


def _over_width(a_NGAE: jax.Array, b_NGBE: jax.Array) -> jax.Array:
    """Products of all of a with all of b, [N, G, A, B], as one product without a transpose: XLA's
    CPU backend would widen bfloat16 numbers that are transposed before (see `product`)."""
    axes = (((3,), (3,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a_NGAE, b_NGBE, axes, preferred_element_type=jnp.float32)


def _logits(key: jax.Array, q: jax.Array, settings: Settings) -> jax.Array:
    logits = _over_width(key, q) * settings.scale
    return settings.softcap * jnp.tanh(logits / settings.softcap) if settings.softcap else logits


def _bits(x: jax.Array, settings: Settings) -> jax.Array:
    return product.to_bits(x) if settings.cpu else x


def _block(whole: jax.Array, at: jax.Array, axis: int, settings: Settings, dtype: Any) -> jax.Array:
    """The keys from index `at` on, of what `_bits` made."""
    return product.from_bits(jax.lax.dynamic_slice_in_dim(whole, at, settings.keys, axis), dtype)


def _apart(tree: Any, settings: Settings) -> list[Any]:
    """What each stream has of arrays [I, ...]: neighbours, which see about as many keys, go to
    different ones."""
    n = settings.streams
    return [jax.tree.map(lambda x, i=i: x[i::n], tree) for i in range(n)]


def _joined(parts: list[Any]) -> Any:
    """Undoes `_apart`."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings):
    return _forward(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings)[0]


def _forward(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings):
    """The output and the log of each query's softmax denominator."""
    dtype = value_NGME.dtype
    keys, values = _bits(key_NGME, settings), _bits(value_NGME, settings)

    def one(part):
        q, block = part
        q = product.from_bits(q, dtype)

        def add(j, carry):
            out, top, total = carry
            at = block.begin_I + j * settings.keys
            key, value = (_block(x, at, 2, settings, dtype) for x in (keys, values))
            seen = _seen(block, at, position_NM, settings).swapaxes(2, 3)
            logits = jnp.where(seen, _logits(q, key, settings), LOW)
            higher = jnp.maximum(top, logits.max(axis=-1))
            # A query that has seen no key yet has top = LOW, where exp(LOW - LOW) would be 1.
            weight = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
            shrink = jnp.exp(top - higher)
            new = jnp.matmul(weight.astype(dtype), value, preferred_element_type=jnp.float32)
            return (
                out * shrink[..., None] + new,
                higher,
                total * shrink + weight.sum(axis=-1),
            )

        zero = jnp.zeros(q.shape, jnp.float32)
        flat = jnp.zeros(q.shape[:-1], jnp.float32)
        out, top, total = jax.lax.fori_loop(0, block.blocks_I, add, (zero, flat + LOW, flat))
        return out / total[..., None], top + jnp.log(total)

    parts = _apart((_bits(q_INGQE, settings), ranges), settings)
    out, lse = _joined([jax.lax.map(one, part) for part in parts])
    return out.astype(dtype), lse


def _keep(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings):
    if settings.cpu:
        # In place of what they were computed from: they need not be rotated and laid out again.
        given = (q_INGQE, key_NGME, value_NGME)
        q_INGQE, key_NGME, value_NGME = (product.keep_bits(x, SAVED) for x in given)
    out, lse = _forward(q_INGQE, key_NGME, value_NGME, ranges, position_NM, settings)
    out = product.keep_bits(out, SAVED) if settings.cpu else checkpoint_name(out, SAVED)
    lse = checkpoint_name(lse, SAVED)
    return out, (q_INGQE, key_NGME, value_NGME, ranges, position_NM, out, lse)


def _backward(settings, kept, slope_INGQE):
    """Keys before queries in all products of the loop: then none has to be transposed, but for the
    keys, all of them at once."""
    q_INGQE, key_NGME, value_NGME, ranges, position_NM, out_INGQE, lse_INGQ = kept
    dtype = q_INGQE.dtype
    keys, values = _bits(key_NGME, settings), _bits(value_NGME, settings)
    keys_turned = keys.swapaxes(2, 3)
    # sum over keys of weight x its slope, which the softmax takes off
    moved_INGQE = out_INGQE.astype(jnp.float32) * slope_INGQE.astype(jnp.float32)
    if settings.cpu:  # a sum of products is slow there, see `layers.norm`; of this it is none
        moved_INGQE = jnp.where(slope_INGQE != 0, moved_INGQE, 0.0)
    mean_INGQ = jnp.sum(moved_INGQE, axis=-1)

    def one(carry, part):
        q, slope, block, lse, mean = part
        q, slope = (product.from_bits(x, dtype) for x in (q, slope))

        def add(j, carry):
            d_q, d_key, d_value = carry
            at = block.begin_I + j * settings.keys
            key, value = (_block(x, at, 2, settings, dtype) for x in (keys, values))
            key_turned = _block(keys_turned, at, 3, settings, dtype)
            logits = _logits(key, q, settings)
            seen = _seen(block, at, position_NM, settings)
            weight = jnp.where(seen, jnp.exp(logits - lse[..., None, :]), 0.0)
            d_logits = weight * (_over_width(value, slope) - mean[..., None, :]) * settings.scale
            if settings.softcap:
                d_logits *= 1.0 - (logits / settings.softcap) ** 2
            weight, d_logits = weight.astype(dtype), d_logits.astype(dtype)
            d_q += jnp.matmul(key_turned, d_logits, preferred_element_type=jnp.float32)

            def onto(whole, new):
                old = jax.lax.dynamic_slice_in_dim(whole, at, settings.keys, 2)
                return jax.lax.dynamic_update_slice_in_dim(whole, old + new, at, 2)

            new_key, new_value = (
                jnp.matmul(a, b, preferred_element_type=jnp.float32)
                for a, b in ((d_logits, q), (weight, slope))
            )
            return d_q, onto(d_key, new_key), onto(d_value, new_value)

        zero = jnp.zeros((*q.shape[:2], *q.shape[:1:-1]), jnp.float32)
        d_q, *carry = jax.lax.fori_loop(0, block.blocks_I, add, (zero, *carry))
        return tuple(carry), d_q.swapaxes(2, 3)

    zero = jnp.zeros(key_NGME.shape, jnp.float32)
    given = (_bits(q_INGQE, settings), _bits(slope_INGQE, settings), ranges, lse_INGQ, mean_INGQ)
    found = [jax.lax.scan(one, (zero, zero), part) for part in _apart(given, settings)]
    d_key, d_value = (sum(x) for x in zip(*(carry for carry, _ in found), strict=True))
    d_q = _joined([d_q for _, d_q in found])
    return *(x.astype(dtype) for x in (d_q, d_key, d_value)), None, None


_attend.defvjp(_keep, _backward)
