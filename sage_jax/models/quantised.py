"""Weights held in 8 or 4 bits: leaves that take the place of a `kernel` [..., in, out].

    int8, scale    int8 [..., in, out]; float32 [..., 1, out]
    nf4, scale     uint8 [..., in / 2, out], of every block the first half in the lower bits and the
                   second half in the upper ones; float32 [..., in / block, out]
    w8a8, scale    as int8, and the inputs are rounded too, each token by its largest: a product of
                   whole numbers. For forward passes only, it has no gradient

The layers find them by these names, and `hold` puts them there. Values and scales come from qwix
(Google's quantisation library, the extra `qlora`); it keeps 4 bits in a byte of their own, so bytes
are packed here. Only linear maps inside the layers are quantised, those of experts too.

Source: Dettmers et al. 2023 (arXiv 2305.14314), without the second quantisation, of the scales.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import product

Params = Any  # nested dict of arrays
Node = dict[str, Any]  # the leaves of one linear map
BLOCK = 64  # weights of a column that share a scale in nf4, as in the paper
LEAST_BLOCK = 16  # with fewer, scales would take as much as the weights
KINDS = ("int8", "nf4", "w8a8")
LEAVES = (*KINDS, "scale")
HOLDS = ("float32", "bfloat16", "int8", "nf4")  # how a frozen base may be held
How = tuple[str, str]  # one of these, and the compute dtype
FLOAT32: How = ("float32", "float32")
QUANTISED = re.compile(r"(^|/)layers/.+/(?:q|k|v|o|gate|up|down)/kernel$")


def library() -> Any:
    """The module qwix.

    Raises:
      ValueError: it is not installed, or does not go with the JAX and Flax that are.
    """
    try:
        import qwix
    except ModuleNotFoundError as e:
        raise ValueError(
            f"Weights in int8 and nf4 need the package qwix ({e}). Run: pip install "
            f"'sage_jax[qlora]', or hold them in bfloat16."
        ) from e
    except (ImportError, AttributeError, TypeError) as e:  # it imports flax.nnx, which may fail
        raise ValueError(
            f"The package qwix cannot be imported with jax {jax.__version__}: {e!r}. Install a "
            f"version of flax whose flax.nnx goes with it, or hold weights in bfloat16."
        ) from e
    return qwix


def block(wide: int) -> int:
    """Weights of a column of `wide` that share a scale in nf4.

    The largest even number up to 64 that divides the column, or all of it.

    >>> block(576), block(96), block(90), block(74)
    (64, 48, 30, 74)
    """
    found = [n for n in range(LEAST_BLOCK, BLOCK + 1, 2) if wide % n == 0]
    return found[-1] if found else wide


def present(module: Any, names: Iterable[str] = LEAVES) -> Node:
    """Those of some leaves that the parameters of a Flax module hold."""
    found = (name for name in names if module.has_variable("params", name))
    return {name: module.get_variable("params", name) for name in found}


def kind(node: Node) -> str | None:
    """How a linear map is held; None as a kernel, or when the node is none."""
    return next((name for name in KINDS if name in node), None)


def kernel_shape(node: Node) -> tuple[int, ...]:
    """Shape of the kernel that a node stands for."""
    held = kind(node)
    if held is None:
        return tuple(node["kernel"].shape)
    *outer, rows, narrow = node[held].shape
    return (*outer, 2 * rows if held == "nf4" else rows, narrow)


def quantise(kernel: jax.Array, held: str) -> Node:
    """The leaves that stand for a kernel.

    Args:
      kernel: float32 [..., in, out].
      held: one of `KINDS`.

    Returns:
      Values and scales, see above. A scale is the largest |weight| of its column (int8; over 127.5)
      or of its block (nf4); each weight takes the nearest level.

    Raises:
      ValueError: an odd number of input channels for nf4, or qwix is missing.
    """
    wide = kernel.shape[-2]
    if held == "nf4" and wide % 2:
        raise ValueError(
            f"A linear map of {wide} input channels cannot be held in nf4, which keeps two in a "
            f"byte. Use int8."
        )
    qwix = library()
    tiles = {0: block(wide)} if held == "nf4" else {0: wide}

    def column(weights: jax.Array) -> Any:
        return qwix.quantize(weights, "nf4" if held == "nf4" else jnp.int8, tiled_axes=tiles)

    # Column by column: qwix flattens what it is given, which would gather a sharded kernel.
    every: Any = column
    for _ in range(kernel.ndim - 1):
        every = jax.vmap(every)
    found = every(jnp.moveaxis(jnp.asarray(kernel, jnp.float32), -2, -1))
    values, scale = (jnp.moveaxis(x, -1, -2) for x in (found.qvalue, found.scale))
    if held == "nf4":
        size, narrow = block(wide), kernel.shape[-1]
        halves = values.astype(jnp.uint8).reshape(*scale.shape[:-1], 2, size // 2, narrow)
        values = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
        values = values.reshape(*kernel.shape[:-2], wide // 2, narrow)
    return {held: values, "scale": scale}


@functools.cache
def levels() -> np.ndarray:
    """The 16 values of nf4, float32, as qwix has them (appendix E of the paper)."""
    qwix = library()
    with jax.ensure_compile_time_eval():
        codes = qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1), qtype="nf4")
        return np.asarray(qwix.dequantize(codes))


def dequantise(node: Node) -> jax.Array:
    """The kernel that a node stands for, float32 [..., in, out]."""
    shape, scale = kernel_shape(node), node["scale"]
    *blocks, narrow = scale.shape
    if "nf4" in node:
        packed = node["nf4"].reshape(*blocks, 1, -1, narrow)
        code = (packed >> jnp.array([0, 4], jnp.uint8).reshape(2, 1, 1)) & 15  # a block's halves
        value = _choose(code, scale[..., None, None, :])
    else:
        whole = node["int8" if "int8" in node else "w8a8"].reshape(*blocks, -1, narrow)
        value = whole.astype(jnp.float32) * scale[..., None, :]
    return value.reshape(shape)


def _choose(code: jax.Array, scale: jax.Array) -> jax.Array:
    """The level of each code times its scale, as one fused loop.

    A lookup in a table is slow on TPUs. Levels are scaled before one is chosen: XLA would move the
    choice among constants out of the scan over layers, as 15 arrays of the size of a kernel.
    """
    value = jnp.broadcast_to(scale * levels()[0], code.shape)
    for i, level in enumerate(levels()[1:], start=1):
        value = jnp.where(code == i, scale * level, value)
    return value


def matmul(x_ND: jax.Array, node: Node, platform: str) -> jax.Array:
    """`x @ kernel`, in the dtype of x; of the layer's weights nothing is kept for the gradient.

    Args:
      x_ND: [N, in].
      node: leaves of one layer.
      platform: "cpu", "gpu" or "tpu": where it runs.

    Returns:
      [N, out].
    """
    if "w8a8" in node:
        return _whole_numbers(x_ND, node)
    return _matmul(x_ND, node, platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_ND: jax.Array, node: Node, platform: str) -> jax.Array:
    return _product(x_ND, dequantise(node).astype(x_ND.dtype), 0, platform)


def _product(x: jax.Array, kernel: jax.Array, axis: int, platform: str) -> jax.Array:
    if platform == "cpu":
        return product.dot(x, kernel, axis).astype(x.dtype)
    return jax.lax.dot_general(x, kernel, (((1,), (axis,)), ((), ())))


def _forward(x_ND: jax.Array, node: Node, platform: str) -> tuple[jax.Array, Node]:
    out = _matmul(x_ND, node, platform)
    if platform == "cpu":
        out = product.keep_bits(out, product.SAVED)
    return out, node  # not the kernel: a scan would keep it for every layer


def _backward(platform: str, node: Node, out_NF: jax.Array) -> tuple[jax.Array, Node]:
    kernel = dequantise(node).astype(out_NF.dtype)
    return _product(out_NF, kernel, 1, platform), jax.tree.map(_no_gradient, node)


def _no_gradient(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_matmul.defvjp(_forward, _backward)


def _whole_numbers(x_ND: jax.Array, node: Node) -> jax.Array:
    qwix = library()
    x = qwix.quantize(x_ND.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))
    kernel = qwix.QArray(node["w8a8"], node["scale"])
    return qwix.dot_general(x, kernel, (((1,), (0,)), ((), ()))).astype(x_ND.dtype)


# ------------------------------------------------------------------------------- parameter trees


def plan(path: str, hold: str, dtype: str) -> str:
    """How a parameter is held in a base that is held in `hold`: a dtype, or one of `KINDS`.

    Norms stay float32. What is not quantised otherwise (embedding, output matrix, routers, biases)
    takes the compute dtype, to which the model casts it anyway.

    Args:
      path: such as "layers/mlp/up/kernel".
      hold: one of `HOLDS`.
      dtype: compute dtype of the model.

    >>> plan("layers/mlp/up/kernel", "nf4", "bfloat16"), plan("embed/embedding", "nf4", "bfloat16")
    ('nf4', 'bfloat16')
    >>> plan("layers/mlp_norm/scale", "nf4", "bfloat16")
    'float32'
    """
    if hold not in HOLDS:
        raise ValueError(f"hold={hold!r} is unknown. Use one of {', '.join(HOLDS)}.")
    if hold == "float32" or "norm" in path:
        return "float32"
    if hold == "bfloat16":
        return hold
    return hold if QUANTISED.search(path) else dtype


def hold(params: Params, how: str, dtype: str = "float32") -> Params:
    """A parameter tree held in `how`, one of `HOLDS`; also under `jax.eval_shape`.

    `models.load` does this tensor by tensor, so that the float32 weights are never there at once.

    >>> base = {"layers": {"mlp": {"up": {"kernel": jnp.ones((2, 64, 3))}}}}
    >>> {k: v.shape for k, v in hold(base, "nf4")["layers"]["mlp"]["up"].items()}
    {'nf4': (2, 32, 3), 'scale': (2, 1, 3)}
    """
    return _rebuild(params, lambda path: plan(path, how, dtype))


def for_scoring(params: Params) -> Params:
    """The tree with linear maps of the layers as `w8a8`; all else, adapters too, stays as it is.

    Raises:
      ValueError: a base in nf4, which would be rounded twice.
    """
    return _rebuild(params, lambda path: "w8a8" if QUANTISED.search(path) else "")


def _rebuild(tree: Params, how: Any, path: str = "") -> Params:
    out: Params = {}
    for name, child in tree.items():
        here = f"{path}/{name}" if path else name
        if isinstance(child, dict):
            out[name] = _rebuild(child, how, here)
        elif name in KINDS:
            if how(f"{path}/kernel") not in ("w8a8", name) or name == "nf4":
                raise ValueError(f"{path} is held in {name} already and is not quantised again.")
            out[how(f"{path}/kernel")] = child
        else:
            wanted = how(here)
            if wanted in KINDS:
                out |= quantise(child, wanted)
            else:
                out[name] = child.astype(wanted) if wanted else child
    return out


def parameters(tree: Params) -> int:
    """Number of weights that a tree stands for.

    >>> parameters(hold({"layers": {"mlp": {"up": {"kernel": jnp.ones((2, 64, 3))}}}}, "nf4"))
    384
    """
    if not isinstance(tree, dict):
        return 0 if tree is None else math.prod(tree.shape)
    if kind(tree) is None:
        return sum(map(parameters, tree.values()))
    others = {k: v for k, v in tree.items() if k not in LEAVES}
    return math.prod(kernel_shape(tree)) + parameters(others)


def is_held(tree: Params) -> bool:
    """Whether any linear map of a tree is quantised."""
    return isinstance(tree, dict) and (
        kind(tree) is not None or any(is_held(child) for child in tree.values())
    )
