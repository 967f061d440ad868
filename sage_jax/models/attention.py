"""Attention over packed rows: which keys a query sees, and the sums over them.

What a query sees is one contiguous range of its row, so two integers a token say it all. No caller
builds a [T, T] mask, and a kernel that takes ranges needs none.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visible(NamedTuple):
    """The keys that each query of a row sees."""

    first_RT: jax.Array  # int32, index in the row of the first one
    last_RT: jax.Array  # int32, index of the last one, itself included
    position_RT: jax.Array  # int32, position in the sequence, for windows


def causal(segment_RT: jax.Array, position_RT: jax.Array) -> Visible:
    """Earlier tokens of the same segment, and the token itself.

    Padding (segment 0) sees earlier padding, so that no row of the softmax is empty; nothing real
    sees padding.

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
    first_RT = jax.lax.cummax(jnp.where(segment_RT != before_RT, index_RT, 0), axis=1)
    return Visible(first_RT, index_RT, jnp.asarray(position_RT, jnp.int32))


def mask(visible: Visible, window: int = 0) -> jax.Array:
    """The ranges as a mask, for short rows and for tests.

    Args:
      visible: the range of every query.
      window: positions that a query sees, its own included; 0 = all.

    Returns:
      bool [R, T, T], query before key.

    >>> positions = jnp.array([[0, 1, 2]])
    >>> mask(causal(jnp.ones((1, 3), jnp.int32), positions), window=2)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    key_T = jnp.arange(visible.first_RT.shape[1])
    seen = (key_T >= visible.first_RT[:, :, None]) & (key_T <= visible.last_RT[:, :, None])
    if window:
        position_RT = visible.position_RT
        seen &= position_RT[:, :, None] - position_RT[:, None, :] < window
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
) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Written as batched matrix products whose two batch axes come first: the same sums as one einsum
    per product, but XLA's CPU backend differentiates them about a tenth faster.

    Args:
      q_RTHE: queries, H heads; each of the G key-value heads serves H / G of them.
      key_RTGE: keys.
      value_RTGE: values.
      visible: which keys each query sees.
      scale: factor of the logits, 1 / sqrt(E) in most models.
      window: positions that a query sees, its own included; 0 = all.
      softcap: logits become softcap * tanh(logits / softcap); 0 = as they are.

    Returns:
      [R, T, H * E] in the dtype of the values.
    """
    rows, length, heads, width = q_RTHE.shape
    groups = key_RTGE.shape[2]
    shared = heads // groups
    q = (q_RTHE * scale).transpose(0, 2, 1, 3)
    q = q.reshape(rows, groups, shared * length, width)
    logits = jnp.matmul(q, key_RTGE.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, groups, shared, length, length)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    seen = mask(visible, window)[:, None, None]
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(logits, axis=-1).astype(value_RTGE.dtype)
    weight = weight.reshape(rows, groups, shared * length, length)
    out = jnp.matmul(weight, value_RTGE.transpose(0, 2, 1, 3)).reshape(rows, heads, length, width)
    return out.transpose(0, 2, 1, 3).reshape(rows, length, heads * width)
