"""The matrix products of a linear map, in the form that a platform multiplies fastest.

XLA's CPU backend (0.10) multiplies bfloat16 numbers as they are, with the instructions that some
CPUs have for it, if the result is float32 and the left operand is contracted over its last axis.
All else it widens to float32 before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "product"  # what a remat policy may keep of a forward pass


def matmul(x_ND: jax.Array, kernel_DF: jax.Array, platform: str) -> jax.Array:
    """`x @ kernel` in the dtype of x.

    Args:
        x_ND: inputs, float32 or bfloat16.
        kernel_DF: weights, in any floating dtype.
        platform: "cpu", "gpu" or "tpu": where the product runs, not where it is compiled.

    Returns:
        [N, F]. On a CPU the gradient of a float32 kernel is not rounded to bfloat16.

    >>> matmul(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 3)), "cpu")
    Array([[2, 2, 2]], dtype=bfloat16)
    """
    if platform == "cpu" and x_ND.dtype == jnp.bfloat16:
        return _narrow(x_ND, kernel_DF)
    return jax.lax.dot_general(x_ND, kernel_DF.astype(x_ND.dtype), (((1,), (0,)), ((), ())))


@jax.custom_vjp
def _narrow(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    return dot(x_ND, kernel_DF.astype(x_ND.dtype), 0).astype(x_ND.dtype)


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Products of the rows of a matrix with another one along one of its axes, in float32.

    The form that a CPU multiplies as it is. Given `b.T` in the place of axis 1, XLA would widen
    both to float32, which takes twice as long.

    >>> dot(jnp.ones((2, 3)), jnp.ones((1, 3)), 1).tolist()
    [[3.0], [3.0]]
    """
    axes = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _forward(x_ND: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, tuple]:
    # Named, so that these 16 bits are kept for the backward pass and not the 32 of the product.
    return keep_bits(_narrow(x_ND, kernel_DF), SAVED), (x_ND, kernel_DF)


def _backward(kept: tuple[jax.Array, jax.Array], slope_NF: jax.Array) -> tuple:
    x_ND, kernel_DF = kept
    d_x = dot(slope_NF, kernel_DF.astype(x_ND.dtype), 1)
    d_kernel = _over_rows(x_ND, slope_NF)
    return d_x.astype(x_ND.dtype), d_kernel.astype(kernel_DF.dtype)


_narrow.defvjp(_forward, _backward)


def keep_bits(x: jax.Array, name: str) -> jax.Array:
    """`x`, of which a remat policy may keep the bits, as whole numbers, under this name.

    For a forward pass that has its own backward pass, on a CPU. XLA has no bfloat16 stores there:
    it widens the array of all layers to float32, as a whole, whenever one layer is put into it.
    Of whole numbers it writes the layer alone.

    >>> keep_bits(jnp.bfloat16([0.5, -2.0]), "kept").tolist()
    [0.5, -2.0]
    """
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    return from_bits(checkpoint_name(to_bits(x), name), x.dtype)


def to_bits(x: jax.Array) -> jax.Array:
    """The bits of bfloat16 numbers, uint16; other numbers as they are.

    >>> to_bits(jnp.bfloat16([1.0])).tolist(), to_bits(jnp.float32([1.0])).tolist()
    ([16256], [1.0])
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """What `to_bits` had.

    >>> from_bits(to_bits(jnp.bfloat16([0.5])), jnp.bfloat16).tolist()
    [0.5]
    """
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def over_rows(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    """Products over rows, the transpose of a times b, in float32: the gradient of a kernel.

    Args:
        a_ND: float32 or bfloat16.
        b_NF: same dtype.

    Returns:
        [D, F].

    >>> over_rows(jnp.ones((2, 1)), jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    if a_ND.dtype != jnp.bfloat16:
        return _plain_over_rows(a_ND, b_NF)
    return jax.lax.platform_dependent(a_ND, b_NF, cpu=_over_rows, default=_plain_over_rows)


def _over_rows(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    if a_ND.shape[1] > b_NF.shape[1]:
        # The narrower one is transposed, and the result. XLA computes what it transposes in the
        # order of the result: of an MLP's wide activation that took 5.3 ms instead of 3.1.
        return _over_rows(b_NF, a_ND).T
    # Of a.T alone XLA would make an operand that is contracted over its first axis again.
    a_EN = jnp.pad(a_ND.T, ((0, 1), (0, 0)))
    return dot(a_EN, b_NF, 0)[:-1]


def _plain_over_rows(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    return jnp.matmul(a_ND.T, b_NF, preferred_element_type=jnp.float32)
