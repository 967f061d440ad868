"""Attention over key ranges on NVIDIA GPUs: a Pallas kernel of our own, or those of tokamax.

The kernel is the algorithm of `attention_blocks`, one program a block of queries (forward, and the
gradient of the queries) or of keys (the gradient of keys and values). Blocks that no query of a
block sees are never read.

Axes besides those of `layers`: T is filled up to whole blocks, and E to a power of 2.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from sage_jax.models import attention_blocks

LOG2E = math.log2(math.e)
LOW = attention_blocks.LOW


class Settings(NamedTuple):
    """Python choices of one call."""

    scale: float
    window: int
    softcap: float
    queries: int  # in a block
    keys: int
    interpret: bool


def attend(
    q_RTHE: jax.Array,
    key_RTGE: jax.Array,
    value_RTGE: jax.Array,
    visible: Any,
    position_RC: jax.Array,
    *,
    scale: float,
    window: int,
    softcap: float,
    place: Any,
    tokamax: bool,
) -> jax.Array:
    """As `attention.attend`; `place` names the mesh that the arrays are spread over.

    There may be more keys than queries; `position_RC` are those of the keys.

    Raises:
      ValueError: tokamax with a window in rows with shared prompts, or a missing package.
    """
    rows, length, heads, width = q_RTHE.shape
    if tokamax:
        local = functools.partial(
            _tokamax, scale=scale, window=window, softcap=softcap,
            ahead=visible.ahead_RT is not None,
        )  # fmt: skip
    else:
        block = 64 if q_RTHE.dtype == jnp.float32 or width > 128 else 128
        settings = Settings(scale, window, softcap, block, 64, place.interpret)
        local = functools.partial(_padded, settings=settings)
    if place.mesh is not None and place.mesh.size > 1:
        split = place.size(place.heads)
        fits = heads % split == 0 and key_RTGE.shape[2] % split == 0
        row_axes = place.rows if rows % place.size(place.rows) == 0 else ()
        array = PartitionSpec(row_axes or None, None, (place.heads if fits else ()) or None)
        local = jax.shard_map(
            local,
            mesh=place.mesh,
            in_specs=(array, array, array, *[PartitionSpec(row_axes or None)] * 4),
            out_specs=array,
            check_vma=False,
        )
    ranges = (visible.first_RT, visible.last_RT, visible.position_RT, position_RC)
    out = local(q_RTHE, key_RTGE, value_RTGE, *ranges)
    return out.reshape(rows, length, heads * width)


def _tokamax(
    q: Any, key: Any, value: Any, first: Any, last: Any, position: Any, key_position: Any,
    *, scale: float, window: int, softcap: float, ahead: bool,
) -> jax.Array:  # fmt: skip
    del position, key_position
    try:
        from tokamax._src.ops.attention import api, base
    except ImportError as e:
        raise ValueError(
            "model.attention='tokamax' needs the package tokamax. pip install tokamax, or use "
            "'triton'."
        ) from e
    if window and ahead:
        raise ValueError(
            f"model.attention='tokamax' has no window ({window}) in rows with shared prompts. Use "
            f"'triton'."
        )
    if window:  # positions of a segment that ends at the query are indices
        index = jnp.arange(first.shape[1], dtype=jnp.int32)
        first = jnp.maximum(first, index - window + 1)
    # The public function takes no ranges; the operators behind it do, [R, H or 1, T].
    mask = base.Mask(k_start=first[:, None], k_end=last[:, None] + 1)
    names = ("mosaic_gpu", "triton") if jax.default_backend() == "gpu" else ("xla",)
    for name in names:
        try:
            return api.IMPLEMENTATIONS[name](
                q, key, value, mask=mask, logits_scale=scale, logits_soft_cap=softcap or None
            )
        except (KeyError, NotImplementedError):
            if name == names[-1]:
                raise
    raise AssertionError


def _padded(
    q: Any, key: Any, value: Any, first: Any, last: Any, position: Any, key_position: Any,
    *, settings: Settings,
) -> jax.Array:  # fmt: skip
    """Fills up to whole blocks; filled queries repeat the last one, and their output is cut off.

    So their block sees no more keys, and no block of keys is seen by more queries than these.
    """
    length, width = q.shape[1], q.shape[3]
    whole = math.lcm(settings.queries, settings.keys)
    wider = pl.next_power_of_2(max(width, 16)) - width

    def filled(x: jax.Array, mode: str = "constant") -> jax.Array:
        rest = ((0, 0), (0, wider)) if x.ndim == 4 else ()
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % whole), *rest), mode=mode)

    arrays = map(filled, (q, key, value))
    ranges = (filled(x, "edge") for x in (first, last, position))
    return _attend(*arrays, *ranges, filled(key_position), settings)[:, :length, :, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q, key, value, first, last, position, key_position, settings):
    return _forward(q, key, value, first, last, position, key_position, settings)[0]


def _block_of(size: int, *rest: int) -> pl.BlockSpec:
    """Block i of the tokens of a row, for one head: grid (i, row, head)."""
    return pl.BlockSpec((None, size, None, *rest), lambda i, r, h: (r, i, h, *(0 for _ in rest)))


def _specs(
    settings: Settings, length: int, keys: int, width: int, shared: int
) -> dict[str, pl.BlockSpec]:
    """Parts of arrays of `length` queries and of `keys`."""
    return {
        "queries": _block_of(settings.queries, width),
        "keys": pl.BlockSpec(
            (None, settings.keys, None, width), lambda i, r, h: (r, i, h // shared, 0)
        ),
        "key gradients": _block_of(settings.keys, width),
        "all queries": pl.BlockSpec((None, length, None, width), lambda i, r, h: (r, 0, h, 0)),
        "all keys": pl.BlockSpec((None, keys, None, width), lambda i, r, h: (r, 0, h // shared, 0)),
        "of queries": pl.BlockSpec((None, settings.queries), lambda i, r, h: (r, i)),
        "of all": pl.BlockSpec((None, length), lambda i, r, h: (r, 0)),
        "of all keys": pl.BlockSpec((None, keys), lambda i, r, h: (r, 0)),
        "per query": pl.BlockSpec((None, None, settings.queries), lambda i, r, h: (r, h, i)),
        "per all": pl.BlockSpec((None, None, length), lambda i, r, h: (r, h, 0)),
        "bound": pl.BlockSpec((None, 1), lambda i, r, h: (r, i)),
    }


def _dot(a: Any, b: Any) -> Any:
    # The default precision of float32 would be tf32.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _logits(q: Any, key: Any, settings: Settings) -> Any:
    logits = _dot(q, key.T) * settings.scale
    if settings.softcap:  # tanh by exp: Triton has no tanh on every version
        y = jnp.exp(-2.0 * jnp.abs(logits) / settings.softcap)
        logits = jnp.sign(logits) * settings.softcap * (1.0 - y) / (1.0 + y)
    return logits


def _seen(first: Any, last: Any, at: Any, position: Any, key_position: Any, s: Settings) -> Any:
    key = at + jnp.arange(s.keys, dtype=jnp.int32)
    seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
    if s.window:
        seen &= position[:, None] - key_position[None, :] < s.window
    return seen


def _call(kernel: Any, settings: Settings, name: str, **options: Any) -> Any:
    return pl.pallas_call(
        kernel,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=settings.interpret,
        name=name,
        **options,
    )


def _forward(q, key, value, first, last, position, key_position, settings):
    rows, length, heads, width = q.shape
    spec = _specs(settings, length, key.shape[1], width, heads // key.shape[2])

    def kernel(q_ref, k_ref, v_ref, first_ref, last_ref, at_ref, position_ref, out_ref, lse_ref):
        q, first, last, at_q = q_ref[...], first_ref[...], last_ref[...], at_ref[...]

        def add(j, carry):
            out, top, total = carry
            at = j * settings.keys
            here = pl.dslice(at, settings.keys)
            logits = _logits(q, k_ref[here, :], settings)
            seen = _seen(first, last, at, at_q, position_ref[here], settings)
            logits = jnp.where(seen, logits * LOG2E, LOW)
            higher = jnp.maximum(top, jnp.max(logits, axis=1))
            weight = jnp.where(seen, jnp.exp2(logits - higher[:, None]), 0.0)
            shrink = jnp.exp2(top - higher)
            value = v_ref[here, :]
            out = out * shrink[:, None] + _dot(weight.astype(value.dtype), value)
            return out, higher, total * shrink + jnp.sum(weight, axis=1)

        flat = jnp.zeros((settings.queries,), jnp.float32)
        begin = jnp.min(first) // settings.keys
        end = jnp.max(last) // settings.keys + 1
        start = (jnp.zeros((settings.queries, width), jnp.float32), flat + LOW, flat)
        out, top, total = jax.lax.fori_loop(begin, end, add, start)
        out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
        lse_ref[...] = top + jnp.log2(total)

    of = spec["of queries"]
    return _call(
        kernel, settings, "attention_forward",
        grid=(length // settings.queries, rows, heads),
        in_specs=[
            spec["queries"], spec["all keys"], spec["all keys"], of, of, of, spec["of all keys"],
        ],
        out_specs=[spec["queries"], spec["per query"]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, value.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
    )(q, key, value, first, last, position, key_position)  # fmt: skip


def _keep(q, key, value, *seen_and_settings):
    out, lse = _forward(q, key, value, *seen_and_settings)
    out = checkpoint_name(out, attention_blocks.SAVED)
    lse = checkpoint_name(lse, attention_blocks.SAVED)
    return out, (q, key, value, seen_and_settings[:-1], out, lse)


def _slopes(q, key, value, slope, lse, mean, seen, settings):
    """The softmax weights and the gradient of the logits, both [queries, keys]."""
    logits = _logits(q, key, settings)
    weight = jnp.where(seen, jnp.exp2(logits * LOG2E - lse[:, None]), 0.0)
    d_logits = weight * (_dot(slope, value.T) - mean[:, None]) * settings.scale
    if settings.softcap:
        d_logits *= 1.0 - (logits / settings.softcap) * (logits / settings.softcap)
    return weight.astype(q.dtype), d_logits.astype(q.dtype)


def _backward(settings, kept, slope):
    q, key, value, (first, last, position, key_position), out, lse = kept
    mean = jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1)
    mean = mean.transpose(0, 2, 1)  # like lse, [R, H, T]
    settings = settings._replace(queries=64)
    given = (q, key, value, first, last, position, key_position, slope, lse, mean, settings)
    d_q = _query_slopes(*given)
    d_key, d_value = _key_slopes(*given)
    return d_q, d_key, d_value, None, None, None, None


def _query_slopes(q, key, value, first, last, position, key_position, slope, lse, mean, settings):
    rows, length, heads, width = q.shape
    spec = _specs(settings, length, key.shape[1], width, heads // key.shape[2])

    def kernel(
        q_ref, k_ref, v_ref, slope_ref, lse_ref, mean_ref, first_ref, last_ref, at_ref,
        position_ref, d_q_ref,
    ):  # fmt: skip
        q, slope, lse, mean = q_ref[...], slope_ref[...], lse_ref[...], mean_ref[...]
        first, last, at_q = first_ref[...], last_ref[...], at_ref[...]

        def add(j, d_q):
            at = j * settings.keys
            here = pl.dslice(at, settings.keys)
            seen = _seen(first, last, at, at_q, position_ref[here], settings)
            key = k_ref[here, :]
            _, d_logits = _slopes(q, key, v_ref[here, :], slope, lse, mean, seen, settings)
            return d_q + _dot(d_logits, key)

        begin = jnp.min(first) // settings.keys
        end = jnp.max(last) // settings.keys + 1
        zero = jnp.zeros((settings.queries, width), jnp.float32)
        d_q_ref[...] = jax.lax.fori_loop(begin, end, add, zero).astype(d_q_ref.dtype)

    of = spec["of queries"]
    return _call(
        kernel, settings, "attention_query_slopes",
        grid=(length // settings.queries, rows, heads),
        in_specs=[
            spec["queries"], spec["all keys"], spec["all keys"], spec["queries"],
            spec["per query"], spec["per query"], of, of, of, spec["of all keys"],
        ],
        out_specs=spec["queries"],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, key, value, slope, lse, mean, first, last, position, key_position)  # fmt: skip


def _seen_by(
    first_RT: jax.Array, last_RT: jax.Array, keys: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """The first and last query that sees any key of a block, int32 [R, blocks].

    Blocks that nothing sees get an empty range.
    """
    length = first_RT.shape[1]
    at = jnp.arange(0, keys, size, dtype=jnp.int32)
    touches = (first_RT[:, None] < at[:, None] + size) & (last_RT[:, None] >= at[:, None])
    index = jnp.arange(length, dtype=jnp.int32)
    begin = jnp.min(jnp.where(touches, index, length), axis=2)
    return begin, jnp.max(jnp.where(touches, index, -1), axis=2)


def _key_slopes(q, key, value, first, last, position, key_position, slope, lse, mean, settings):
    rows, length, heads, width = q.shape
    keys, groups = key.shape[1:3]
    spec = _specs(settings, length, keys, width, heads // groups)
    begin, end = _seen_by(first, last, keys, settings.keys)

    def kernel(
        q_ref, k_ref, v_ref, slope_ref, lse_ref, mean_ref, first_ref, last_ref, at_ref,
        key_at_ref, begin_ref, end_ref, d_k_ref, d_v_ref,
    ):  # fmt: skip
        key, value = k_ref[...], v_ref[...]
        at = pl.program_id(0) * settings.keys
        key_position = key_at_ref[pl.dslice(at, settings.keys)]

        def add(i, carry):
            d_key, d_value = carry
            here = pl.dslice(i * settings.queries, settings.queries)
            seen = _seen(first_ref[here], last_ref[here], at, at_ref[here], key_position, settings)
            q, slope = q_ref[here, :], slope_ref[here, :]
            weight, d_logits = _slopes(
                q, key, value, slope, lse_ref[here], mean_ref[here], seen, settings
            )
            return d_key + _dot(d_logits.T, q), d_value + _dot(weight.T, slope)

        zero = jnp.zeros((settings.keys, width), jnp.float32)
        d_key, d_value = jax.lax.fori_loop(
            jnp.max(begin_ref[...]) // settings.queries,
            jnp.max(end_ref[...]) // settings.queries + 1,
            add,
            (zero, zero),
        )
        d_k_ref[...], d_v_ref[...] = d_key, d_value

    per_head = jax.ShapeDtypeStruct((rows, keys, heads, width), jnp.float32)
    all_of = spec["of all"]
    found = _call(
        kernel, settings, "attention_key_slopes",
        grid=(keys // settings.keys, rows, heads),
        in_specs=[
            spec["all queries"], spec["keys"], spec["keys"], spec["all queries"],
            spec["per all"], spec["per all"], all_of, all_of, all_of, spec["of all keys"],
            spec["bound"], spec["bound"],
        ],
        out_specs=[spec["key gradients"], spec["key gradients"]],
        out_shape=[per_head, per_head],
    )(q, key, value, slope, lse, mean, first, last, position, key_position, begin, end)  # fmt: skip
    # Each head gives its own; the heads that share a key add up here.
    d_key, d_value = (
        x.reshape(rows, keys, groups, heads // groups, width).sum(axis=3) for x in found
    )
    return d_key.astype(key.dtype), d_value.astype(value.dtype)


_attend.defvjp(_keep, _backward)
