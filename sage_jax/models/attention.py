"""Attention over packed rows: which keys a query sees, and the sums over them.

What a query sees is one contiguous range of its row's keys, so two integers a token say it all. No
caller builds a [T, T] mask, and a kernel that takes ranges needs none. Where completions of several
pairs share a prompt, copies of its keys keep this so; a range with a hole would have fitted neither
the TPU's kernel, whose mask is a function of one integer a query, nor those of tokamax.

    dense    every query with every key: one [T, T] array a head, the fastest for short rows
    blocks   plain XLA in blocks, without those that no query sees; runs everywhere
    triton   the same as a kernel for NVIDIA GPUs
    tokamax  kernels of the package tokamax, for NVIDIA GPUs
    splash   JAX's kernel for TPUs
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

KERNELS = ("auto", "dense", "blocks", "triton", "tokamax", "splash")
DENSE_UP_TO = 128  # tokens in a row; beyond that blocks are as fast on a CPU, and soon many times
STREAMS = 2  # on a CPU, of whose cores a loop over small products occupies one
# Queries and keys of a block: the best of 64 to 512, and what is better where sequences are short.
BLOCK, SHORT_BLOCK = 64, 32


class Visible(NamedTuple):
    """The keys that each query of a row sees."""

    first_RT: jax.Array  # int32, index in the row of the first one
    last_RT: jax.Array  # int32, index of the last one, itself or a later one
    position_RT: jax.Array  # int32, position in the sequence, for windows
    # int32, the running maximum of `last_RT`, which ties queries to the later keys that they see;
    # None where no query sees a later key, which a kernel may rely on.
    ahead_RT: jax.Array | None = None
    # int32 [R, X], the tokens whose keys make up the row, where some do more than once; ranges are
    # of these then. None: the keys of a row are those of its tokens, in order.
    key_RX: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """How attention is computed, and over which devices.

    Attributes:
      name: one of `KERNELS`; "auto" chooses by platform and length of the rows.
      mesh: the devices that the arrays are spread over; None for one device, or unknown.
      rows: axes of the mesh that split the rows.
      heads: axes of the mesh that split the heads, where these divide; else they are replicated.
      context: axes of the mesh that split the tokens of a row, likewise.
      interpret: runs a TPU's or GPU's kernel step by step on any device, for tests.
      block: queries and keys of a block of "blocks"; `block_for` knows the better one of two.
    """

    name: str = "auto"
    mesh: jax.sharding.Mesh | None = None
    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    interpret: bool = False
    block: int = BLOCK

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise ValueError(f"attention={self.name!r} is unknown. Use one of {list(KERNELS)}.")

    def chosen(self, length: int) -> str:
        """The back end for rows of `length` tokens, never "auto"."""
        if self.name != "auto":
            return self.name
        if length <= DENSE_UP_TO:
            return "dense"
        if self.platform == "gpu" and self.size(self.context) > 1:
            return "blocks"  # the GPU kernels take rows that are whole
        return {"tpu": "splash", "gpu": "triton"}.get(self.platform, "blocks")

    @property
    def platform(self) -> str:
        """Of the mesh, which may be of another kind than the machine that compiles for it."""
        if self.mesh is None:
            return jax.default_backend()
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    def check(self) -> None:
        """Raises ValueError where the kernel is for other devices, or for rows that are whole."""
        needed = {"splash": "tpu", "triton": "gpu"}.get(self.name, self.platform)
        if needed != self.platform and not self.interpret:
            raise ValueError(
                f"model.attention={self.name!r} is a kernel for {needed.upper()}s, and these "
                f"are of the kind {self.platform!r}. Use 'auto', or 'blocks', which runs anywhere."
            )
        if self.name in ("triton", "tokamax") and self.size(self.context) > 1:
            raise ValueError(
                f"model.attention={self.name!r} takes whole rows, and mesh.context="
                f"{self.size(self.context)} splits them. Use model.attention='blocks', or "
                f"mesh.context=1."
            )

    def fitted(self, width: int, lengths: Any) -> Placement:
        """The same for heads of so many channels and sequences of these lengths; 0 = there is none.

        That is which blocks a CPU computes; other platforms' kernels have their own.
        """
        if self.platform != "cpu":
            return self
        return dataclasses.replace(self, block=block_for(width, float(lengths[lengths > 0].mean())))

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along some axes of the mesh."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)


AUTO = Placement()


def block_for(width: int, tokens: float) -> int:
    """Queries and keys of a block on a CPU; benchmarks/attention_block.py measures both.

    Small blocks compute fewer keys that no query sees, and take more passes of a loop.

    Args:
      width: channels of a head.
      tokens: of a sequence, in the mean.

    >>> block_for(64, 170), block_for(64, 1000), block_for(16, 170)
    (32, 64, 64)
    """
    return SHORT_BLOCK if tokens <= 3 * width else BLOCK


def causal(segment_RT: jax.Array, position_RT: jax.Array) -> Visible:
    """Earlier tokens of the same segment, and the token itself.

    Padding (segment 0) sees itself, so that no softmax is empty; nothing real sees padding.

    Args:
      segment_RT: int [R, T], 0 = padding; the tokens of a segment lie side by side.
      position_RT: int32 [R, T], position inside the sequence.

    Returns:
      The range of every token.

    >>> segment = jnp.array([[1, 1, 2, 2, 0]])
    >>> causal(segment, jnp.array([[0, 1, 0, 1, 0]])).first_RT.tolist()
    [[0, 0, 2, 2, 4]]
    """
    index_RT = jnp.broadcast_to(jnp.arange(segment_RT.shape[1], dtype=jnp.int32), segment_RT.shape)
    before_RT = jnp.pad(segment_RT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    begins_RT = (segment_RT != before_RT) | (segment_RT == 0)
    first_RT = jax.lax.cummax(jnp.where(begins_RT, index_RT, 0), axis=1)
    return Visible(first_RT, index_RT, jnp.asarray(position_RT, jnp.int32))


def mask(visible: Visible, window: int = 0, key_position_RC: jax.Array | None = None) -> jax.Array:
    """The ranges as a mask, for short rows and for tests.

    Args:
      visible: the range of every query.
      window: positions that a query sees, its own included; 0 = all.
      key_position_RC: int32, the positions of all keys, where `visible` has some queries only.

    Returns:
      bool [R, T, C], query before key.

    >>> positions = jnp.array([[0, 1, 2]])
    >>> mask(causal(jnp.ones((1, 3), jnp.int32), positions), window=2)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    position_RC = visible.position_RT if key_position_RC is None else key_position_RC
    key_C = jnp.arange(position_RC.shape[1])
    seen = (key_C >= visible.first_RT[:, :, None]) & (key_C <= visible.last_RT[:, :, None])
    if window:
        seen &= visible.position_RT[:, :, None] - position_RC[:, None, :] < window
    return seen


def attend(
    q_RTHE: jax.Array,
    key_RTGE: jax.Array,
    value_RTGE: jax.Array,
    visible: Visible,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    place: Placement = AUTO,
) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
      q_RTHE: queries, H heads; each of the G key-value heads serves H / G of them.
      key_RTGE: keys.
      value_RTGE: values.
      visible: which keys each query sees.
      scale: factor of the logits, 1 / sqrt(E) in most models.
      window: positions that a query sees, its own included; 0 = all.
      softcap: logits become softcap * tanh(logits / softcap); 0 = as they are.
      place: the back end, and the devices.

    Returns:
      [R, T, H * E] in the dtype of the values.

    Raises:
      ValueError: the back end cannot do what is asked for.
    """
    name = place.chosen(q_RTHE.shape[1])
    position_RC = visible.position_RT
    if visible.key_RX is not None:
        if place.size(place.context) > 1:
            raise ValueError(
                f"Keys that a row has more than once do not go with mesh.context="
                f"{place.size(place.context)}. Use data.share_prompts='pair'."
            )
        key_RTGE, value_RTGE = (_keys(x, visible.key_RX) for x in (key_RTGE, value_RTGE))
        position_RC = _keys(position_RC, visible.key_RX)
    given = (q_RTHE, key_RTGE, value_RTGE, visible, position_RC)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if name in _PARTS:
        part = functools.partial(_PARTS[name], **options, place=place)
        spread = place.size(place.context) > 1 or name == "blocks"
        if place.mesh is None or place.mesh.size == 1 or not spread:
            return part(*given)
        from sage_jax.models import attention_spread

        # Each device by itself: left to the compiler, all would share the longest of their loops.
        return attention_spread.attend(*given, place=place, part=part)
    place.check()
    if name == "splash":
        from sage_jax.models import attention_tpu

        return attention_tpu.attend(*given, **options, place=place)
    from sage_jax.models import attention_gpu

    return attention_gpu.attend(*given, **options, place=place, tokamax=name == "tokamax")


def _keys(x_RT: jax.Array, key_RX: jax.Array) -> jax.Array:
    """What belongs to the keys of a row, of arrays [R, T, ...]."""
    index = key_RX.reshape(*key_RX.shape, *[1] * (x_RT.ndim - 2))
    return jnp.take_along_axis(x_RT, index, axis=1, mode="promise_in_bounds")


def _dense(
    q_RTHE: jax.Array,
    key_RTGE: jax.Array,
    value_RTGE: jax.Array,
    visible: Visible,
    key_position_RC: jax.Array,
    *,
    scale: float,
    window: int,
    softcap: float,
    place: Placement,
) -> jax.Array:
    """With all logits at once.

    Written as batched matrix products whose two batch axes come first: the same sums as one einsum
    per product, but XLA's CPU backend differentiates them about a tenth faster.
    """
    rows, length, heads, width = q_RTHE.shape
    groups = key_RTGE.shape[2]
    shared = heads // groups
    q = (q_RTHE * scale).transpose(0, 2, 1, 3)
    q = q.reshape(rows, groups, shared * length, width)
    logits = jnp.matmul(q, key_RTGE.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, groups, shared, length, -1)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    seen = mask(visible, window, key_position_RC)[:, None, None]
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(logits, axis=-1).astype(value_RTGE.dtype)
    weight = weight.reshape(rows, groups, shared * length, -1)
    out = jnp.matmul(weight, value_RTGE.transpose(0, 2, 1, 3)).reshape(rows, heads, length, width)
    return out.transpose(0, 2, 1, 3).reshape(rows, length, heads * width)


def _in_blocks(
    q_RTHE: jax.Array,
    key_RTGE: jax.Array,
    value_RTGE: jax.Array,
    visible: Visible,
    key_position_RC: jax.Array,
    *,
    scale: float,
    window: int,
    softcap: float,
    place: Placement,
) -> jax.Array:
    """The rows of a device as one long row: then a block of queries skips what it alone does not
    see, where side by side the rows would share their loop's length."""
    from sage_jax.models import attention_blocks

    rows, length, heads, width = q_RTHE.shape
    cpu = place.platform == "cpu"
    offset_R1 = (jnp.arange(rows, dtype=jnp.int32) * key_RTGE.shape[1])[:, None]
    first, last = visible.first_RT + offset_R1, visible.last_RT + offset_R1

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(1, -1, *x.shape[2:])

    out = attention_blocks.attend(
        join(q_RTHE),
        join(key_RTGE),
        join(value_RTGE),
        Visible(join(first), join(last), join(visible.position_RT)),
        join(key_position_RC),
        attention_blocks.Settings(
            scale, window, softcap, place.block, place.block, cpu, STREAMS if cpu else 1
        ),
    )
    return out.reshape(rows, length, heads * width)


# In plain XLA, on one device or on each.
_PARTS: dict[str, Callable[..., jax.Array]] = {"dense": _dense, "blocks": _in_blocks}
