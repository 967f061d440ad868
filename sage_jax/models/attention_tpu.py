"""Attention over key ranges by JAX's splash kernel for TPUs.

The kernel knows a static mask (causal) and segment ids. Ranges that end at the query are segments:
queries with the same first key. A row with shared prompts also has queries whose range begins at
the query and ends at a later key. For those the row is read backwards, where their ranges end at
the query too; a second pass of the kernel gives their outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sage_jax.models import attention_blocks

BLOCK = 512  # the largest block of queries and keys
LANES = 128  # rows and heads are filled up to a multiple of this


@functools.lru_cache(maxsize=32)
def _kernel(heads: int, length: int, window: int, softcap: float, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(b for b in (BLOCK, 384, 256, LANES) if length % b == 0)
    shape = (length, length)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    # The kernel's arrays of block indices have to be concrete, also when the first call is traced.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name=attention_blocks.SAVED,
            interpret=interpret,
        )


def attend(
    q_RTHE: jax.Array,
    key_RTGE: jax.Array,
    value_RTGE: jax.Array,
    visible: Any,
    *,
    scale: float,
    window: int,
    softcap: float,
    kernel: Any,
) -> jax.Array:
    """As `attention.attend`; `kernel` names the mesh that the arrays are spread over.

    Raises:
      ValueError: a window in rows with shared prompts, where positions are not indices.
    """
    if window and visible.ahead_RT is not None:
        raise ValueError(
            f"attention='splash' has no window ({window}) in rows with shared prompts. Use "
            f"data.share_prompts='off', or model.attention='blocks'."
        )
    rows, length, heads, width = q_RTHE.shape
    fill, wider = -length % LANES, -width % LANES
    # Filled keys are no query's: their segment is one that no token has.
    q, key, value = (
        jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, wider))).transpose(0, 2, 1, 3)
        for x in (q_RTHE * scale, key_RTGE, value_RTGE)
    )
    ids = [
        None if x is None else jnp.pad(x, ((0, 0), (0, fill)), constant_values=-1)
        for x in (visible.first_RT, visible.last_RT, visible.ahead_RT)
    ]

    def local(q, key, value, first_RT, last_RT, ahead_RT):
        run = _kernel(q.shape[1], length + fill, window, softcap, kernel.interpret)
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        def forwards(q, key, value, id_RT):
            return jax.vmap(run)(q, key, value, splash.SegmentIds(id_RT, id_RT))

        out = forwards(q, key, value, first_RT)
        if ahead_RT is None:
            return out
        flipped = [jnp.flip(x, 2) for x in (q, key, value)]
        other = jnp.flip(forwards(*flipped, jnp.flip(ahead_RT, 1)), 2)
        later_RT = last_RT > jnp.arange(last_RT.shape[1])
        return jnp.where(later_RT[:, None, :, None], other, out)

    out = _spread(local, kernel, heads, key_RTGE.shape[2], rows)(q, key, value, *ids)
    out = out.transpose(0, 2, 1, 3)[:, :length, :, :width]
    return out.reshape(rows, length, heads * width)


def _spread(local: Any, kernel: Any, heads: int, groups: int, rows: int) -> Any:
    """The function on each device's rows and heads; the compiler cannot split a kernel itself."""
    if kernel.mesh is None or kernel.mesh.size == 1:
        return local
    split = kernel.size(kernel.heads)
    head_axes = kernel.heads if heads % split == 0 and groups % split == 0 else ()
    row_axes = kernel.rows if rows % kernel.size(kernel.rows) == 0 else ()
    array = PartitionSpec(row_axes or None, head_axes or None)
    ids = PartitionSpec(row_axes or None)
    return jax.shard_map(
        local,
        mesh=kernel.mesh,
        in_specs=(array, array, array, ids, ids, ids),
        out_specs=array,
        check_vma=False,
    )
