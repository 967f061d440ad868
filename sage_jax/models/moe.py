"""A mixture of experts: each token goes through the few that its router chooses, none is dropped.

Axes: X experts, K experts of a token, N tokens on a device, F width of an expert, otherwise as in
`layers.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sage_jax.models import attention, quantised
from sage_jax.models import spec as spec_lib

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Balance(NamedTuple):
    """How a router spreads real tokens over its experts, float32; sums, so that layers add up."""

    chosen_X: jax.Array  # times that each expert was chosen
    probability_X: jax.Array  # sum of each expert's probability
    tokens: jax.Array  # real tokens, []


def balance_loss(balance: Balance) -> jax.Array:
    """The load-balancing loss: K when all experts get as many tokens, more when few get most.

    It may fall a little below K, where the experts that are chosen are not the more probable ones.

    Args:
      balance: sums over tokens, and over layers where its arrays have a leading axis.

    Returns:
      float32 []: X times the sum over experts of (share of tokens) * (mean probability).

    Source: Fedus et al. 2021 (arXiv 2101.03961) eq. 4-6, over all layers at once as in
    transformers' `load_balancing_loss_func`.

    >>> even = Balance(jnp.full(4, 2.0), jnp.full(4, 1.0), jnp.float32(4))  # K = 2 of X = 4
    >>> float(balance_loss(even))
    2.0
    """
    chosen, probability, tokens = balance
    if chosen.ndim > 1:
        chosen, probability, tokens = chosen.sum(0), probability.sum(0), tokens.sum(0)
    experts = chosen.shape[-1]
    return experts * jnp.sum(chosen * probability) / jnp.maximum(tokens, 1.0) ** 2


def mix(
    x_ND: jax.Array,
    weight_NK: jax.Array,
    choice_NK: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    *,
    activation: str = "silu",
) -> jax.Array:
    """Sums the outputs of each token's experts, by one grouped matrix product per matrix.

    The K copies of the tokens are sorted by expert, so that the cost is that of K experts a token
    and not of X.

    Args:
      x_ND: tokens.
      weight_NK: what each expert's output counts.
      choice_NK: int32, the experts.
      gate_XDF, up_XDF, down_XFD: their weights, in the dtype of x.
      activation: one of `ACTIVATIONS`.

    Returns:
      [N, D] in the dtype of x.
    """
    tokens, count = choice_NK.shape
    flat = choice_NK.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_X = jnp.bincount(flat, length=gate_XDF.shape[0]).astype(jnp.int32)
    sorted_MD = x_ND[order // count]
    inner = ACTIVATIONS[activation](jax.lax.ragged_dot(sorted_MD, gate_XDF, sizes_X))
    inner = inner * jax.lax.ragged_dot(sorted_MD, up_XDF, sizes_X)
    out_MD = jax.lax.ragged_dot(inner, down_XFD, sizes_X)
    back = jnp.argsort(order)
    out_NKD = out_MD[back].reshape(tokens, count, -1)
    return jnp.einsum("nkd,nk->nd", out_NKD, weight_NK.astype(x_ND.dtype))


def _over_devices(
    mix_fn: Callable[..., jax.Array], place: attention.Placement, context: bool
) -> Callable[..., jax.Array]:
    """`mix_fn` on the tokens that each device holds; the experts' width is split like heads.

    Left to the partitioner, the sort would gather the tokens of all devices on each.
    """
    tokens = P(place.rows, place.context if context else None, None)
    wide = place.heads

    def own(*args: jax.Array) -> jax.Array:
        return jax.lax.psum(mix_fn(*args), wide) if wide else mix_fn(*args)

    return jax.shard_map(
        own,
        mesh=place.mesh,
        in_specs=(*(tokens,) * 3, *(P(None, None, wide),) * 2, P(None, wide, None)),
        out_specs=tokens,
    )


class Experts(nn.Module):
    """Router and experts in the place of an MLP."""

    spec: spec_lib.ModelSpec
    dtype: Any
    place: attention.Placement = (
        attention.AUTO
    )  # over which devices rows, tokens and weights are spread

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array | None
    ) -> tuple[jax.Array, Balance | None]:
        spec = self.spec
        router = nn.Dense(spec.experts, use_bias=False, dtype=self.dtype, name="router")
        probability = jax.nn.softmax(router(x_BTD).astype(jnp.float32), axis=-1)
        weight_BTK, choice_BTK = jax.lax.top_k(probability, spec.experts_per_token)
        if spec.norm_topk:
            weight_BTK = weight_BTK / weight_BTK.sum(axis=-1, keepdims=True)
        kernels = _Kernels(spec, name="experts")(self.dtype)

        def by_rows(x: jax.Array, weight: jax.Array, choice: jax.Array, *kernels: Any) -> jax.Array:
            flat = [v.reshape(-1, v.shape[-1]) for v in (x, weight, choice)]
            return mix(*flat, *kernels, activation=spec.activation).reshape(x.shape)

        run, place = by_rows, self.place
        rows, length, _ = x_BTD.shape
        if place.mesh is not None and not (
            rows % place.size(place.rows) or spec.d_ff % place.size(place.heads)
        ):
            run = _over_devices(by_rows, place, length % place.size(place.context) == 0)
        out = run(x_BTD, weight_BTK, choice_BTK, *kernels)
        if real_BT is None:
            return out, None
        chosen = jax.nn.one_hot(choice_BTK, spec.experts, dtype=jnp.float32).sum(axis=2)
        real = real_BT.astype(jnp.float32)[..., None]
        return out, Balance(
            jnp.sum(chosen * real, (0, 1)), jnp.sum(probability * real, (0, 1)), jnp.sum(real)
        )


class _Kernels(nn.Module):
    """The experts' weights, stacked."""

    spec: spec_lib.ModelSpec

    @nn.compact
    def __call__(self, dtype: Any) -> tuple[jax.Array, ...]:
        spec = self.spec
        width, inner = spec.d_model, spec.d_ff

        def kernel(name: str, shape: tuple[int, int], gain: float) -> jax.Array:
            first = nn.initializers.variance_scaling(
                gain, "fan_in", "truncated_normal", batch_axis=(0,)
            )
            return _Kernel((spec.experts, *shape), first, name=name)().astype(dtype)

        return (
            kernel("gate", (width, inner), 1.0),
            kernel("up", (width, inner), 1.0),
            kernel("down", (inner, width), 0.5 / spec.layers),
        )


class _Kernel(nn.Module):
    """One stacked matrix under the name `kernel`, or what `quantised` holds in its place."""

    shape: tuple[int, ...]
    first: Callable[..., jax.Array]

    @nn.compact
    def __call__(self) -> jax.Array:
        if held := quantised.present(self):
            return quantised.dequantise(held)
        return self.param("kernel", self.first, self.shape, jnp.float32)
