"""Attention over key ranges by JAX's splash kernels for TPUs.

The kernels take a mask that is known when they are compiled, as a list of blocks and a function of
two integers, a query's and a key's index. Both are made anew for each batch here: the integer of a
query holds both ends of its range, and the list has the blocks that some query sees. So packed
rows of many short segments cost what their segments cost, and rows with shared prompts need one
pass. The rows of a device lie one after the other, since the list cannot have an axis for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sage_jax.models import attention_blocks, attention_spread

BLOCK = 512  # the largest block of queries and keys
LANES = 128  # blocks and the width of heads are multiples of this
LONGEST = 2**16  # keys of a call, whose two ends of a range fit into 32 bits


def block_size(length: int) -> int:
    """The largest block that fills up a row of so many tokens by little, a sixteenth of it."""
    sizes = range(BLOCK, LANES, -LANES)
    return next((b for b in sizes if -length % b <= length / 16), LANES)


def seen_blocks(first_RT: jax.Array, last_RT: jax.Array, keys: int, block: int) -> jax.Array:
    """Which blocks of keys some query of a block sees.

    Args:
      first_RT, last_RT: int32 [R, T], the range of every query, which holds the query itself; T a
        multiple of `block`.
      keys: in a row.
      block: queries and keys of a block.

    Returns:
      bool [R, T / block, keys / block, rounded up].
    """
    # Not by a reshape: of some shapes libtpu cannot compile it (0.0.42, 8 rows of 4,096 tokens).
    over = functools.partial(
        jax.lax.reduce_window,
        window_dimensions=(1, block), window_strides=(1, block), padding="VALID",
    )  # fmt: skip
    low_RI = over(first_RT, jnp.int32(keys), jax.lax.min) // block
    high_RI = over(last_RT, jnp.int32(0), jax.lax.max) // block
    block_J = jnp.arange(-(-keys // block), dtype=jnp.int32)
    return (block_J >= low_RI[..., None]) & (block_J <= high_RI[..., None])


def passes(visible: Any, window: int = 0) -> list[tuple[jax.Array, ...]]:
    """The ranges that a run of the kernels takes, each of which holds the query itself.

    Args:
      visible: which keys each query sees.
      window: positions that a query sees, its own included; 0 = all.

    Returns:
      For each run, the first and the last key, int32 [R, T]. One run, unless rows are longer than
      `LONGEST`, so that both do not fit into one integer. Then the query's own index stands for one
      of them: ranges end at the query, and in a second run, where prompts are shared, begin at it;
      and a third array has the same value where a query and a key belong together.
    """
    length = visible.first_RT.shape[1]
    index_T = jnp.arange(length, dtype=jnp.int32)
    first_RT, last_RT = visible.first_RT, visible.last_RT
    if window:
        first_RT = jnp.maximum(first_RT, index_T - (window - 1))
    if length <= LONGEST:
        return [(first_RT, last_RT)]
    behind = (first_RT, jnp.minimum(last_RT, index_T), visible.first_RT)
    if visible.ahead_RT is None:
        return [behind]
    return [behind, (jnp.maximum(first_RT, index_T), last_RT, visible.ahead_RT)]


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
) -> jax.Array:
    """As `attention.attend`; `place` names the mesh that the arrays are spread over.

    There may be more keys than queries.

    Raises:
      ValueError: a window in rows with shared prompts, where positions are not indices; or rows
        with copies of keys of more than `LONGEST` keys, where an index is not that of its key.
    """
    del position_RC
    if window and visible.ahead_RT is not None:
        raise ValueError(
            f"attention='splash' has no window ({window}) in rows with shared prompts. Use "
            f"data.share_prompts='off', or model.attention='blocks'."
        )
    rows, length, heads, _ = q_RTHE.shape
    keys = key_RTGE.shape[1]
    if visible.key_RX is not None and keys > LONGEST:
        raise ValueError(
            f"attention='splash' takes rows of up to {LONGEST} keys where several pairs share a "
            f"prompt, not {keys}. Use data.share_prompts='pair'."
        )
    found = attention_spread.Split((), (), ())
    spread = place.mesh is not None and place.mesh.size > 1
    if spread:
        found = attention_spread.split(
            place, rows=rows, length=length, heads=heads, groups=key_RTGE.shape[2]
        )

    def local(q_RTHE, key_RTGE, value_RTGE, ranges):
        whole = functools.partial(attention_spread.gather, axes=found.context, axis=1)
        key_RCGE, value_RCGE = whole(key_RTGE), whole(value_RTGE)
        outs: list[jax.Array] = []
        for first_RT, last_RT, *ids in ranges:
            ids += [whole(x) for x in ids]
            mask = _within if not ids else _from if outs else _up_to(window)
            out = _part(
                q_RTHE, key_RCGE, value_RCGE, first_RT, last_RT, *ids,
                mask=mask, softcap=softcap, interpret=place.interpret,
            )  # fmt: skip
            outs.append(out)
        if len(outs) == 1:
            return outs[0]
        later_RT = ranges[1][1] > ranges[1][0]  # the others see only themselves there
        return jnp.where(later_RT[..., None], outs[1], outs[0])

    given = (q_RTHE * scale, key_RTGE, value_RTGE, passes(visible, window))
    if not spread:
        return local(*given)
    array = found.spec(heads_at=2)
    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(array, array, array, found.spec()),
        out_specs=array,
        check_vma=False,
    )(*given)


def _part(
    q_RTHE: jax.Array,
    key_RCGE: jax.Array,
    value_RCGE: jax.Array,
    first_RT: jax.Array,
    last_RT: jax.Array,
    *ids: jax.Array,
    **options: Any,
) -> jax.Array:
    """Attention of one device's queries to all keys of their rows; see `_rows`."""
    rows, length, heads, width = q_RTHE.shape
    block = block_size(length)

    def filled(x: jax.Array, **how: Any) -> jax.Array:
        more = [(0, -size % (block, 1, LANES)[n]) for n, size in enumerate(x.shape[1:])]
        return jnp.pad(x, [(0, 0), *more], **how)

    # Keys that fill up a row are in no range. Queries that do repeat the range of the last.
    arrays = [filled(x) for x in (q_RTHE, key_RCGE, value_RCGE)]
    arrays += [filled(x, mode="edge") for x in (first_RT, last_RT, *ids[:1])]
    arrays += [filled(x, constant_values=-1) for x in ids[1:]]
    run = functools.partial(_rows, block=block, **options)
    together = max(1, LONGEST // arrays[1].shape[1])
    together = max(n for n in range(1, min(rows, together) + 1) if rows % n == 0)
    if together == rows:
        out = run(*arrays)
    else:
        parts = [x.reshape(rows // together, together, *x.shape[1:]) for x in arrays]
        out = jax.lax.map(lambda part: run(*part), parts)
        out = out.reshape(rows, *out.shape[2:])
    return out[:, :length, :, :width].reshape(rows, length, heads * width)


def _rows(
    q_RTHE: jax.Array,
    key_RCGE: jax.Array,
    value_RCGE: jax.Array,
    first_RT: jax.Array,
    last_RT: jax.Array,
    *ids: jax.Array,
    mask: Callable[[jax.Array, jax.Array], jax.Array],
    block: int,
    softcap: float,
    interpret: bool,
) -> jax.Array:
    """One call of the kernels, for rows whose tokens fill blocks; with `ids`, of queries and of
    keys, for one row."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    rows, length, heads, width = q_RTHE.shape
    keys = key_RCGE.shape[1]
    by_query, by_key = lists(seen_blocks(first_RT, last_RT, keys, block))
    base_R1 = keys * jnp.arange(rows, dtype=jnp.int32)[:, None]
    first, last = ((x + base_R1).reshape(-1) for x in (first_RT, last_RT))
    ends, segments = (first << 16) | last, None
    if ids:
        ends = first if mask is _from else last
        segments = splash.SegmentIds(*(x.reshape(-1) for x in ids))
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    run: Callable[..., Any] = splash.SplashAttentionKernel(
        by_query._replace(q_sequence=ends),
        by_query._replace(q_sequence=ends),
        by_key._replace(q_sequence=ends),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=attention_blocks.SAVED,
        mask_function=mask,
        interpret=interpret,
    )
    heads_first = (
        x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, width)
        for x in (q_RTHE, key_RCGE, value_RCGE)
    )
    out = run(*heads_first, segments)
    return out.reshape(heads, rows, length, width).transpose(1, 2, 0, 3)


def _within(ends: jax.Array, key: jax.Array) -> jax.Array:
    """Mask of keys between both ends of a range, of 16 bits each."""
    first = jax.lax.shift_right_logical(ends, jnp.full_like(ends, 16))
    return (key >= first) & (key <= (ends & 0xFFFF))


@functools.cache  # the same function each time, or programs are compiled again
def _up_to(window: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def mask(last: jax.Array, key: jax.Array) -> jax.Array:
        return (key <= last) & (key > last - window) if window else key <= last

    return mask


def _from(first: jax.Array, key: jax.Array) -> jax.Array:
    return key >= first


def lists(seen_RIJ: jax.Array) -> tuple[Any, Any]:
    """What the kernels compute, by blocks of queries and by blocks of keys.

    Args:
      seen_RIJ: bool, blocks of queries before blocks of keys, of rows that lie one after the other.

    Returns:
      Two `MaskInfo` without a mask: which of each block's steps to run, [1, R * I, J] and
      [1, I, R * J]; and which block to fetch for it. A step that does not run has the block of the
      next one that does, so that it is there in time, and nothing is fetched for its own.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    rows, queries, keys = seen_RIJ.shape
    next_ = _next(seen_RIJ.reshape(-1))
    keys_RIJ = (next_ // (queries * keys) * keys + next_ % keys).reshape(seen_RIJ.shape)
    seen_RJI = seen_RIJ.transpose(0, 2, 1)
    queries_RJI = _next(seen_RJI) + queries * jnp.arange(rows, dtype=jnp.int32)[:, None, None]

    def small(x: jax.Array, most: int) -> jax.Array:  # scalar memory is small
        return x.astype(jnp.int8 if most < 2**7 else jnp.int16 if most < 2**15 else jnp.int32)

    def made(fetched: jax.Array, run: jax.Array, most: int) -> Any:
        return info.MaskInfo(small(fetched, most), None, small(run, 1), None, None)

    def by_key(x_RJI: jax.Array) -> jax.Array:
        return x_RJI.transpose(2, 0, 1).reshape(1, queries, rows * keys)

    one = (1, rows * queries, keys)
    return (
        made(keys_RIJ.reshape(one), seen_RIJ.reshape(one), rows * keys),
        made(by_key(queries_RJI), by_key(seen_RJI), rows * queries),
    )


def _next(seen: jax.Array) -> jax.Array:
    """Along the last axis, the next true place, its own included; behind the last, the last.

    >>> _next(jnp.array([False, True, False, True, False])).tolist()
    [1, 1, 3, 3, 3]
    """
    place = jnp.arange(seen.shape[-1], dtype=jnp.int32)
    last = jnp.max(jnp.where(seen, place, 0), axis=-1, keepdims=True)
    after = jnp.where(seen, place, seen.shape[-1])
    return jnp.minimum(jax.lax.cummin(after, axis=seen.ndim - 1, reverse=True), last)
