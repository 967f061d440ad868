"""The matrix products of a linear map, in the form that a platform multiplies fastest.

XLA's CPU backend (0.10) multiplies bfloat16 numbers as they are, with the instructions that some
CPUs have for it, if the result is float32 and the left operand is contracted over its last axis.
All else it widens to float32 before.
"""

from __future__ import annotations

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
        # Named, so that these 16 bits are kept for the backward pass and not the 32 of the product.
        return checkpoint_name(_narrow(x_ND, kernel_DF), SAVED)
    return jax.lax.dot_general(x_ND, kernel_DF.astype(x_ND.dtype), (((1,), (0,)), ((), ())))


@jax.custom_vjp
def _narrow(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    return _product(x_ND, kernel_DF.astype(x_ND.dtype), 0).astype(x_ND.dtype)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    axes = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _forward(x_ND: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, tuple]:
    return _narrow(x_ND, kernel_DF), (x_ND, kernel_DF)


def _backward(kept: tuple[jax.Array, jax.Array], slope_NF: jax.Array) -> tuple:
    x_ND, kernel_DF = kept
    d_x = _product(slope_NF, kernel_DF.astype(x_ND.dtype), 1)
    d_kernel = _over_rows(x_ND, slope_NF)
    return d_x.astype(x_ND.dtype), d_kernel.astype(kernel_DF.dtype)


_narrow.defvjp(_forward, _backward)


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
    # Of a.T alone XLA would make an operand that is contracted over its first axis again.
    a_EN = jnp.pad(a_ND.T, ((0, 1), (0, 0)))
    return _product(a_EN, b_NF, 0)[:-1]


def _plain_over_rows(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    return jnp.matmul(a_ND.T, b_NF, preferred_element_type=jnp.float32)
