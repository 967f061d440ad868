"""The parts of a decoder block as Linen modules and plain functions.

Axes besides those of `sage_jax.batch`: L layers, H query heads, G key-value heads (each serves
H / G query heads), E width of a head, C slots of a key-value cache, F width of the MLP.

Matrix products run in the compute dtype; norms, rotations and the softmax run in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_jax import head, product
from sage_jax.models import attention, lora, moe, quantised, rope
from sage_jax.models import spec as spec_lib

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, float32 [..., B, T, 1, W]
KeyValue = tuple[jax.Array, jax.Array]  # keys and values, [B, T, G, E]
Seen = attention.Visible | jax.Array  # of whole rows; or the visible slots of a cache, [B, C]


class Kind(NamedTuple):
    """What differs between the layers of a model, int32 [L]: one entry a layer is scanned over.

    Choices, not values, so that one scan serves all layers and each keeps its static window.
    """

    window: jax.Array  # index into `window_choices`
    rotation: jax.Array  # index into `rotation_choices`


def window_choices(spec: spec_lib.ModelSpec, length: int) -> tuple[int, ...]:
    """The windows that the layers of a model have; one that holds all of `length` counts as 0."""
    return tuple(dict.fromkeys(w if w < length else 0 for w in spec.windows))


def rotation_choices(spec: spec_lib.ModelSpec) -> tuple[str, ...]:
    """The ways in which the layers of a model rotate, see `ModelSpec.rotations`."""
    return tuple(dict.fromkeys(spec.rotations))


def kinds(spec: spec_lib.ModelSpec, length: int) -> Kind:
    """The choices of every layer, for rows of `length` tokens."""
    windows, rotations = window_choices(spec, length), rotation_choices(spec)
    return Kind(
        jnp.array([windows.index(w if w < length else 0) for w in spec.windows], jnp.int32),
        jnp.array([rotations.index(r) for r in spec.rotations], jnp.int32),
    )


def rotation(
    spec: spec_lib.ModelSpec, position_BT: jax.Array, long_BT: jax.Array | bool = False
) -> Rotation:
    """Cosine and sine of every rotary angle, computed once and shared by all layers.

    Args:
      spec: the model.
      position_BT: int32 [B, T].
      long_BT: bool, where longrope's factors for long sequences hold.

    Returns:
      Two float32 [K, B, T, 1, W] for the K `rotation_choices`. Layers without positions turn by 0.
    """
    scaling, width = spec.rope_scaling, spec.rotated

    def angles(choice: str) -> jax.Array:
        if choice == "none":
            return jnp.zeros((*position_BT.shape, 1, width // 2), jnp.float32)
        theta = spec.local_rope_theta if choice == "local" else spec.rope_theta
        own = None if choice == "local" else scaling
        frequency = jnp.asarray(rope.scaled_frequencies(theta, width, own), jnp.float32)
        if own is not None and own.kind == "longrope" and long_BT is not False:
            slow = jnp.asarray(rope.scaled_frequencies(theta, width, own, long=True), jnp.float32)
            long = jnp.asarray(long_BT)[..., None, None]
            frequency = jnp.where(long, slow, frequency)
        return position_BT.astype(jnp.float32)[:, :, None, None] * frequency

    def factor(choice: str) -> float:
        return scaling.attention_factor if scaling is not None and choice == "main" else 1.0

    choices = rotation_choices(spec)
    angle = jnp.stack([angles(choice) for choice in choices])
    angle = jnp.concatenate([angle, angle], axis=-1)
    gain = jnp.array([factor(choice) for choice in choices], jnp.float32).reshape(-1, 1, 1, 1, 1)
    return jnp.cos(angle) * gain, jnp.sin(angle) * gain


def rotate(x_BTHE: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns channel i together with channel i + W/2 by the angle of its position (NeoX order).

    Channels from W on stay as they are.
    """
    cos, sin = rotation
    width = cos.shape[-1]
    x = x_BTHE[..., :width].astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    turned = (x * cos + turned * sin).astype(x_BTHE.dtype)
    if width == x_BTHE.shape[-1]:
        return turned
    return jnp.concatenate([turned, x_BTHE[..., width:]], axis=-1)


def attend_cached(
    q_B1HE: jax.Array,
    past: KeyValue,
    own: KeyValue,
    mask_BC: jax.Array,
    *,
    scale: float,
    window: jax.Array | int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention of one new token to the cache and to itself.

    The new key and value come as arguments of their own and are written to the cache once for all
    layers, after the scan: writing inside it would copy the whole cache at every token.

    Args:
      q_B1HE: queries, [B, 1, H, E].
      past: cached keys and values of this layer, [B, G, C, E].
      own: key and value of the new token, [B, 1, G, E].
      mask_BC: bool, the cache slots that hold visible keys, in the order of their positions,
        without the new token's slot.
      scale: factor of the logits.
      window: tokens that the new one sees, itself included; 0 = all. May be traced.
      softcap: as in `attention.attend`.

    Returns:
      [B, 1, H * E].
    """
    batch, _, heads, width = q_B1HE.shape
    groups = past[0].shape[1]
    q = q_B1HE.reshape(batch, groups, heads // groups, width) * scale
    if not isinstance(window, int) or window:
        behind_BC = jnp.cumsum(mask_BC[:, ::-1], axis=1)[:, ::-1]  # the last slot is 1 behind
        mask_BC &= (behind_BC < window) | (jnp.asarray(window) == 0)

    def logits(key: jax.Array) -> jax.Array:
        return head.cap(
            jnp.einsum("bghe,bgce->bghc", q, key, preferred_element_type=jnp.float32), softcap
        )

    own = (own[0].swapaxes(1, 2), own[1].swapaxes(1, 2))
    old = jnp.where(mask_BC[:, None, None], logits(past[0]), jnp.finfo(jnp.float32).min)
    new = logits(own[0])
    weight = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("bghc,bgce->bghe", weight[..., :-1], past[1])
    out += jnp.einsum("bghc,bgce->bghe", weight[..., -1:], own[1])
    return out.reshape(batch, 1, heads * width)


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics and scale in float32, output in `dtype`."""

    epsilon: float
    dtype: Any
    offset: float = 0.0  # added to the stored scale: some families store its distance from 1
    flat: bool = False  # merges the leading axes, see `norm`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", first, (x.shape[-1],), jnp.float32)
        shape = x.shape
        x = (x.reshape(-1, shape[-1]) if self.flat else x).astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * (scale + self.offset if self.offset else scale)
        return x.astype(self.dtype).reshape(shape)


def norm(spec: spec_lib.ModelSpec, dtype: Any, name: str, place: attention.Placement) -> RMSNorm:
    """A norm as the family has it, on the devices of `place`.

    XLA's CPU backend takes sums of products of [1, N, D] arrays for N or D products of vectors, and
    needs 7 to 20 times as long as for [N, D] arrays.
    """
    offset, flat = spec_lib.FAMILIES[spec.family].norm_offset, place.platform == "cpu"
    return RMSNorm(spec.norm_eps, dtype, offset, flat, name=name)


class Linear(nn.Module):
    """A linear map, and its adapter where the parameters hold one.

    Its weights are float32 at first; frozen ones may be bfloat16, or the leaves of `quantised` in
    the place of the kernel.

    The leading axes of the input are merged for the product: XLA's CPU backend runs the kernel's
    gradient three times slower when it contracts over two axes. Merging keeps a sharded row axis
    sharded: it is the major one.
    """

    features: int
    bias: bool
    dtype: Any
    gain: float  # variance of the output at initialisation
    platform: str  # where it runs: "cpu", "gpu", "tpu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
        if base := quantised.present(self):
            out = quantised.matmul(flat, base, self.platform)
        else:
            first = nn.initializers.variance_scaling(self.gain, "fan_in", "truncated_normal")
            kernel = self.param("kernel", first, (x.shape[-1], self.features), jnp.float32)
            base = {"kernel": kernel}
            out = product.matmul(flat, kernel, self.platform)
        if own := quantised.present(self, lora.LEAVES):
            out = lora.delta(flat, out, own, base)
        if self.bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


def dense(
    features: int,
    place: attention.Placement,
    *,
    bias: bool | None,
    name: str,
    dtype: Any,
    gain: float = 1.0,
) -> Linear:
    """A linear map on the devices of `place`; at initialisation its output variance is `gain`."""
    return Linear(features, bool(bias), dtype, gain, place.platform, name=name)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    spec: spec_lib.ModelSpec
    dtype: Any
    place: attention.Placement

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kind: Kind,
        rotation: Rotation,
        seen: Seen,
        past: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        spec = self.spec
        qk_norm = spec_lib.FAMILIES[spec.family].qk_norm
        # One choice needs no selection; it is then also what XLA sees.
        turn = jax.tree.map(lambda x: x[kind.rotation] if len(x) > 1 else x[0], rotation)

        def project(name: str, heads: int) -> jax.Array:
            width = heads * spec.head_dim
            linear = dense(width, self.place, bias=spec.attention_bias, name=name, dtype=self.dtype)
            out = linear(x_BTD)
            if qk_norm == "whole" and name != "v":
                out = norm(spec, self.dtype, f"{name}_norm", self.place)(out)
            out = out.reshape(*x_BTD.shape[:2], heads, spec.head_dim)
            if qk_norm == "head" and name != "v":
                out = norm(spec, self.dtype, f"{name}_norm", self.place)(out)
            return out

        q_BTHE = rotate(project("q", spec.heads), turn)
        key = rotate(project("k", spec.kv_heads), turn)
        value = project("v", spec.kv_heads)
        out = self._attend(q_BTHE, (key, value), kind, seen, past)
        output = dense(
            spec.d_model,
            self.place,
            bias=spec.output_bias,
            name="o",
            dtype=self.dtype,
            gain=0.5 / spec.layers,
        )
        return output(out), (key, value)

    def _attend(
        self, q_BTHE: jax.Array, own: KeyValue, kind: Kind, seen: Seen, past: KeyValue | None
    ) -> jax.Array:
        spec = self.spec
        common: dict[str, Any] = {"scale": spec.attention_scale, "softcap": spec.attention_softcap}
        if isinstance(seen, attention.Visible):
            windows = window_choices(spec, q_BTHE.shape[1])
            # A branch for each window, which kernels want static; the scan takes one a layer.
            branches: list[Callable[..., jax.Array]] = [
                functools.partial(attention.attend, window=window, place=self.place, **common)
                for window in windows
            ]
            if len(branches) == 1:
                return branches[0](q_BTHE, *own, seen)
            return jax.lax.switch(kind.window, branches, q_BTHE, *own, seen)
        assert past is not None
        windows = window_choices(spec, past[0].shape[2])
        window: jax.Array | int = windows[0]
        if len(windows) > 1:
            window = jnp.array(windows, jnp.int32)[kind.window]
        return attend_cached(q_BTHE, past, own, seen, window=window, **common)


class MLP(nn.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x))."""

    spec: spec_lib.ModelSpec
    dtype: Any
    place: attention.Placement

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        spec = self.spec
        linear = functools.partial(dense, place=self.place, bias=spec.mlp_bias, dtype=self.dtype)
        gate = linear(spec.d_ff, name="gate")(x_BTD)
        up = linear(spec.d_ff, name="up")(x_BTD)
        down = linear(spec.d_model, name="down", gain=0.5 / spec.layers)
        if self.place.platform == "cpu":
            # There each operation on bfloat16 numbers is one on float32 numbers and two casts.
            gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        return down(moe.ACTIVATIONS[spec.activation](gate) * up)


class Block(nn.Module):
    """One decoder layer, in the form `nn.scan` wants: carry first, per-layer output last.

    `keep` says whether keys and values leave the block (for a cache); training drops them. What a
    router says of the balance of its experts leaves it too (None without experts).
    """

    spec: spec_lib.ModelSpec
    dtype: Any
    keep: bool
    constrain: Callable[[jax.Array], jax.Array] | None
    place: attention.Placement

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kind: Kind,
        past: KeyValue | None,
        rotation: Rotation,
        seen: Seen,
        real_BT: jax.Array | None,
    ) -> tuple[jax.Array, tuple[KeyValue | None, moe.Balance | None]]:
        spec, dtype = self.spec, self.dtype
        norms = spec_lib.FAMILIES[spec.family].norms
        balance = None

        def normed(x: jax.Array, name: str, place: str) -> jax.Array:
            return norm(spec, dtype, name, self.place)(x) if norms in (place, "both") else x

        entering = normed(x_BTD, "attention_norm", "before")
        attend = Attention(spec, dtype, self.place, name="attention")
        attended, own = attend(entering, kind, rotation, seen, past)
        x_BTD = x_BTD + normed(attended, "attention_post_norm", "after")
        entering = normed(x_BTD, "mlp_norm", "before")
        if spec.experts:
            out, balance = moe.Experts(spec, dtype, self.place, name="mlp")(entering, real_BT)
        else:
            out = MLP(spec, dtype, self.place, name="mlp")(entering)
        x_BTD = x_BTD + normed(out, "mlp_post_norm", "after")
        if self.constrain is not None:
            x_BTD = self.constrain(x_BTD)
        return x_BTD, (own if self.keep else None, balance)
