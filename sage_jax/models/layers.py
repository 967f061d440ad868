"""The parts of a decoder block as Linen modules and plain functions.

Axes besides those of `sage_jax.batch`: L layers, H query heads, G key-value heads (each serves
H / G query heads), E width of a head, C slots of a key-value cache, F width of the MLP.

Matrix products run in the compute dtype; norms, rotations and the softmax run in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sage_jax.models import attention
from sage_jax.models import spec as spec_lib

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, T, 1, E]
KeyValue = tuple[jax.Array, jax.Array]  # keys and values, [B, T, G, E]
Seen = attention.Visible | jax.Array  # of whole rows; or the visible slots of a cache, [B, C]


def frequencies(theta: float, width: int) -> np.ndarray:
    """Unscaled rotary frequencies of a head of `width` channels, float64 [width / 2]."""
    return theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)


def rope_frequencies(spec: spec_lib.ModelSpec) -> np.ndarray:
    """Angular frequencies of the rotary embedding, radians per position.

    Args:
      spec: the model; uses `rope_theta`, `rope_scaling` and `head_dim`.

    Returns:
      float64 [E / 2].

    Source: Su et al. 2021 (arXiv 2104.09864); the llama3 scaling as in transformers'
    `modeling_rope_utils`.

    >>> spec = spec_lib.ModelSpec(vocab=8, d_model=8, d_ff=8, layers=1, heads=2, rope_theta=100.0)
    >>> rope_frequencies(spec).tolist()
    [1.0, 0.1]
    """
    frequency = frequencies(spec.rope_theta, spec.head_dim)
    if spec.rope_scaling is None:
        return frequency
    return frequency / spec.rope_scaling.divisors(frequency)


def rotation(spec: spec_lib.ModelSpec, position_BT: jax.Array) -> Rotation:
    """Cosine and sine of every rotary angle, computed once and shared by all layers."""
    frequency = jnp.asarray(rope_frequencies(spec), jnp.float32)
    angle = position_BT.astype(jnp.float32)[:, :, None, None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHE: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns channel i together with channel i + E/2 by the angle of its position (NeoX order)."""
    cos, sin = rotation
    x = x_BTHE.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x_BTHE.dtype)


def attend_cached(
    q_B1HE: jax.Array, past: KeyValue, own: KeyValue, mask_BC: jax.Array
) -> jax.Array:
    """Attention of one new token to the cache and to itself.

    The new key and value come as arguments of their own and are written to the cache once for all
    layers, after the scan: writing inside it would copy the whole cache at every token.

    Args:
      q_B1HE: queries, [B, 1, H, E].
      past: cached keys and values of this layer, [B, C, G, E].
      own: key and value of the new token, [B, 1, G, E].
      mask_BC: bool, the cache slots that hold visible keys, without the new token's slot.

    Returns:
      [B, 1, H * E].
    """
    batch, _, heads, width = q_B1HE.shape
    groups = past[0].shape[2]
    q = q_B1HE.reshape(batch, groups, heads // groups, width) * width**-0.5
    old = jnp.einsum("bghe,bcge->bghc", q, past[0], preferred_element_type=jnp.float32)
    old = jnp.where(mask_BC[:, None, None], old, jnp.finfo(jnp.float32).min)
    new = jnp.einsum("bghe,bcge->bghc", q, own[0], preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("bghc,bcge->bghe", weight[..., :-1], past[1])
    out += jnp.einsum("bghc,bcge->bghe", weight[..., -1:], own[1])
    return out.reshape(batch, 1, heads * width)


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics and scale in float32, output in `dtype`."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def _flat_dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any
) -> jax.Array:
    """`lhs @ rhs` with the leading axes of `lhs` merged.

    XLA's CPU backend runs the kernel's gradient three times slower when it contracts over two
    axes. Merging keeps a sharded row axis sharded: it is the major one.
    """
    flat = lhs.reshape(-1, lhs.shape[-1])
    dims = (((1,), (0,)), ((), ()))
    out = jax.lax.dot_general(flat, rhs, dims, precision=precision, **kwargs)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


def dense(
    features: int, *, bias: bool | None, name: str, dtype: Any, gain: float = 1.0
) -> nn.Dense:
    """A linear map with float32 parameters; at initialisation its output variance is `gain`."""
    return nn.Dense(
        features,
        use_bias=bool(bias),
        dtype=dtype,
        name=name,
        dot_general=_flat_dot_general,
        kernel_init=nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal"),
    )


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    spec: spec_lib.ModelSpec
    dtype: Any
    kernel: attention.Kernel

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rotation: Rotation, seen: Seen, past: KeyValue | None
    ) -> tuple[jax.Array, KeyValue]:
        spec = self.spec

        def project(name: str, heads: int) -> jax.Array:
            width = heads * spec.head_dim
            out = dense(width, bias=spec.attention_bias, name=name, dtype=self.dtype)(x_BTD)
            return out.reshape(*x_BTD.shape[:2], heads, spec.head_dim)

        q_BTHE = rotate(project("q", spec.heads), rotation)
        key = rotate(project("k", spec.kv_heads), rotation)
        value = project("v", spec.kv_heads)
        if isinstance(seen, attention.Visible):
            out = attention.attend(
                q_BTHE, key, value, seen, scale=spec.head_dim**-0.5, kernel=self.kernel
            )
        else:
            assert past is not None
            out = attend_cached(q_BTHE, past, (key, value), seen)
        output = dense(
            spec.d_model,
            bias=spec.output_bias,
            name="o",
            dtype=self.dtype,
            gain=0.5 / spec.layers,
        )
        return output(out), (key, value)


class MLP(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    spec: spec_lib.ModelSpec
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        spec, bias, dtype = self.spec, self.spec.mlp_bias, self.dtype
        gate = dense(spec.d_ff, bias=bias, name="gate", dtype=dtype)(x_BTD)
        up = dense(spec.d_ff, bias=bias, name="up", dtype=dtype)(x_BTD)
        down = dense(spec.d_model, bias=bias, name="down", dtype=dtype, gain=0.5 / spec.layers)
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm decoder layer, in the form `nn.scan` wants: carry first, per-layer output last.

    `keep` says whether keys and values leave the block (for a cache); training drops them.
    """

    spec: spec_lib.ModelSpec
    dtype: Any
    keep: bool
    constrain: Callable[[jax.Array], jax.Array] | None
    kernel: attention.Kernel

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, past: KeyValue | None, rotation: Rotation, seen: Seen
    ) -> tuple[jax.Array, KeyValue | None]:
        spec = self.spec
        normed = RMSNorm(spec.norm_eps, self.dtype, name="attention_norm")(x_BTD)
        attend = Attention(spec, self.dtype, self.kernel, name="attention")
        attended, own = attend(normed, rotation, seen, past)
        x_BTD = x_BTD + attended
        normed = RMSNorm(spec.norm_eps, self.dtype, name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + MLP(spec, self.dtype, name="mlp")(normed)
        if self.constrain is not None:
            x_BTD = self.constrain(x_BTD)
        return x_BTD, own if self.keep else None
