"""Attention over key ranges by JAX's splash kernel for TPUs.

The kernel knows a static mask (causal) and segment ids. Ranges that end at the query are segments:
queries with the same first key. A row with shared prompts also has queries whose range begins at
the query and ends at a later key. A second pass of the kernel, whose mask is the other triangle,
gives their outputs.
"""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax.models import attention_blocks, attention_spread

BLOCK = 512  # the largest block of queries and keys
LANES = 128  # rows and heads are filled up to a multiple of this


@functools.lru_cache(maxsize=32)
def _kernel(
    heads: int, length: int, shards: int, window: int, ahead: bool, softcap: float, interpret: bool
) -> Any:
    """The kernel of a device with so many heads, and 1 / shards of a row's queries."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(b for b in (BLOCK, 384, 256, LANES) if (length // shards) % b == 0)
    shape = (length, length)
    mask: Any = splash.CausalMask(shape)
    if ahead:
        mask = splash.LocalMask(shape, (0, None), 0)
    elif window:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    make = functools.partial(
        splash.make_splash_mha,
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=attention_blocks.SAVED,
        interpret=interpret,
    )
    # The kernel's arrays of block indices have to be concrete, also when the first call is traced;
    # under Flax's scan `ensure_compile_time_eval` leaves tracers. A thread is in no trace.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return jax.tree.map(np.asarray, thread.submit(make).result())


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
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rows, length, heads, width = q_RTHE.shape
    found = attention_spread.Split((), (), ())
    if kernel.mesh is not None and kernel.mesh.size > 1:
        found = attention_spread.split(
            kernel, rows=rows, length=length, heads=heads, groups=key_RTGE.shape[2], unit=LANES
        )
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
    index = jnp.broadcast_to(jnp.arange(length + fill, dtype=jnp.int32), (rows, length + fill))
    runs = [
        _kernel(
            heads // kernel.size(found.heads), length + fill, kernel.size(found.context), window,
            ahead, softcap, kernel.interpret,
        )
        for ahead in ((False,) if visible.ahead_RT is None else (False, True))
    ]  # fmt: skip

    def local(runs, q, key, value, index_RT, first_RT, last_RT, ahead_RT):
        key, value = (attention_spread.gather(x, found.context, 2) for x in (key, value))

        def one(run, id_RT):
            segments = splash.SegmentIds(id_RT, attention_spread.gather(id_RT, found.context, 1))
            return jax.vmap(run)(q, key, value, segments)

        out = one(runs[0], first_RT)
        if ahead_RT is None:
            return out
        later_RT = last_RT > index_RT
        return jnp.where(later_RT[:, None, :, None], one(runs[1], ahead_RT), out)

    if found != attention_spread.Split((), (), ()):
        blocks = NamedSharding(kernel.mesh, PartitionSpec(None, found.context or None))
        array = PartitionSpec(found.rows or None, found.heads or None, found.context or None)
        tokens = found.spec()
        local = jax.shard_map(
            local,
            mesh=kernel.mesh,
            in_specs=(
                [run.manual_sharding_spec(blocks) for run in runs],
                *[array] * 3,
                *[tokens] * 4,
            ),
            out_specs=array,
            check_vma=False,
        )
    out = local(runs, q, key, value, index, *ids)
    out = out.transpose(0, 2, 1, 3)[:, :length, :, :width]
    return out.reshape(rows, length, heads * width)
