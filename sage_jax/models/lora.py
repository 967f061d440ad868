"""Low-rank adapters: small matrices beside frozen ones, in a parameter tree of their own.

An adapter of the linear map `layers/attention/q` are the leaves `lora_a` [L, in, K], `lora_b`
[L, K, out] and, with DoRA, `lora_norm` [L, out] under the same path (K: the rank). `join` lays them
over the frozen tree, where the layers find them; without them the same model is the base. The
frozen tree may be held in 8 or 4 bits (QLoRA), see `quantised`.

Source: Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scale: Kalajdzievski 2023 (arXiv
2312.03732); DoRA: Liu et al. 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax.models import quantised

Params = Any  # nested dict of arrays
LEAVES = ("lora_a", "lora_b", "lora_norm")
LINEAR = re.compile(r"^layers/(.+/(?:q|k|v|o|gate|up|down))$")


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter is like.

    >>> Lora(rank=4, alpha=8).scale, Lora(rank=4, alpha=8, rank_stabilised=True).scale
    (2.0, 4.0)
    """

    rank: int
    alpha: float = 16.0
    targets: str = r"attention/[qkvo]|mlp/"  # searched in "attention/q", ..., "mlp/down"
    rank_stabilised: bool = False  # alpha / sqrt(rank) in the place of alpha / rank
    dora: bool = False  # the length of every output column is trained apart from its direction

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"lora.rank={self.rank} must be at least 1 and lora.alpha={self.alpha} positive."
            )
        try:
            re.compile(self.targets)
        except re.error as e:
            raise ValueError(f"lora.targets={self.targets!r} is no regular expression: {e}.") from e

    @property
    def scale(self) -> float:
        """What the product of the two matrices counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def walk(tree: Params, path: str = "") -> Any:
    """(path, dict) of every node that holds a `kernel`, quantised or not, or an adapter."""
    if "kernel" in tree or "lora_a" in tree or quantised.kind(tree):
        yield path, tree
        return
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from walk(child, f"{path}/{name}" if path else name)


def targets(base: Params, lora: Lora) -> dict[str, Any]:
    """The linear maps that get an adapter.

    Args:
      base: the model's parameters, or their shapes.
      lora: the adapter; `targets` is searched in names such as "attention/q" and "mlp/down".

    Returns:
      The shapes of their kernels by path, sorted.

    Raises:
      ValueError: nothing matches.
    """
    linear = {
        path: jax.ShapeDtypeStruct(quantised.kernel_shape(node), jnp.float32)
        for path, node in walk(base)
        if LINEAR.match(path)
    }
    linear = {path: kernel for path, kernel in linear.items() if len(kernel.shape) == 3}
    names = {path: path.removeprefix("layers/") for path in sorted(linear)}
    found = {path: linear[path] for path, name in names.items() if re.search(lora.targets, name)}
    if not found:
        raise ValueError(
            f"lora.targets={lora.targets!r} matches none of {', '.join(names.values())}. It is a "
            f"regular expression that is searched in these names."
        )
    return found


def put(tree: Params, path: str, node: Params) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = node


def init(key: jax.Array, base: Params, lora: Lora) -> Params:
    """A new adapter, whose product is 0: the model with it is the base.

    Args:
      key: PRNG key.
      base: the model's parameters.
      lora: the adapter.

    Returns:
      The adapter's tree, float32.

    Raises:
      ValueError: as `targets`.

    >>> base = {"layers": {"attention": {"q": {"kernel": jnp.ones((2, 4, 6))}}}}
    >>> adapter = init(jax.random.key(0), base, Lora(rank=3))
    >>> {k: v.shape for k, v in adapter["layers"]["attention"]["q"].items()}
    {'lora_a': (2, 4, 3), 'lora_b': (2, 3, 6)}
    """
    out: Params = {}
    found, nodes = targets(base, lora), dict(walk(base))
    for number, (path, kernel) in enumerate(found.items()):
        count, wide, narrow = kernel.shape
        bound = wide**-0.5  # PEFT's: Kaiming with a = sqrt(5)
        node = {
            "lora_a": jax.random.uniform(
                jax.random.fold_in(key, number), (count, wide, lora.rank), minval=-bound,
                maxval=bound,
            ),
            "lora_b": jnp.zeros((count, lora.rank, narrow)),
        }  # fmt: skip
        if lora.dora:
            # Layer by layer: of a quantised base, one kernel at a time.
            node["lora_norm"] = jax.lax.map(lambda x: column_norm(_kernel(x)), nodes[path])
        put(out, path, node)
    return out


def _kernel(node: Params) -> jax.Array:
    """The kernel of a node, float32."""
    if quantised.kind(node):
        return quantised.dequantise(node)
    return jnp.asarray(node["kernel"], jnp.float32)


def column_norm(kernel: jax.Array) -> jax.Array:
    """Length of every output column: [..., in, out] to [..., out]."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2))


def join(base: Params, adapter: Params, lora: Lora) -> Params:
    """Lays an adapter over the parameters of its base, as `models.Model` takes them.

    Args:
      base: the frozen parameters.
      adapter: from `init`, `read` or training.
      lora: what it is like; its scale is multiplied into `lora_b`.

    Returns:
      The parameters of both, in one tree; nothing of the base is copied.
    """
    return lay(
        base,
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * lora.scale if path[-1].key == "lora_b" else leaf, adapter
        ),
    )


def lay(base: Params, adapter: Params) -> Params:
    """The leaves of both trees in one; also of shapes.

    >>> lay({"q": {"kernel": 1}}, {"q": {"lora_a": 2}})
    {'q': {'kernel': 1, 'lora_a': 2}}
    """
    out = dict(base)
    for name, child in adapter.items():
        out[name] = lay(base[name], child) if isinstance(child, dict) else child
    return out


def delta(
    x: jax.Array, plain: jax.Array, node: dict[str, jax.Array], base: dict[str, jax.Array]
) -> jax.Array:
    """The output of a linear map with its adapter.

    Args:
      x: inputs [N, in], in the compute dtype.
      plain: `x @ kernel`.
      node: `lora_a`, `lora_b` (scaled), and `lora_norm` for DoRA.
      base: the kernel [in, out], as a node of the frozen tree.

    Returns:
      [N, out]. The length that DoRA divides by passes no gradient (section 4.3 of the paper).
    """
    a, b = (node[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
    out = plain + jnp.matmul(jnp.matmul(x, a), b)
    if "lora_norm" not in node:
        return out
    moved = _kernel(base) + jnp.matmul(node["lora_a"], node["lora_b"])
    length = jax.lax.stop_gradient(column_norm(moved))
    return out * (node["lora_norm"] / length).astype(x.dtype)


def merge(base: Params, adapter: Params, lora: Lora) -> Params:
    """The parameters of a model without adapter that computes the same.

    Args:
      base: the frozen parameters.
      adapter: its adapter.
      lora: what that is like.

    Returns:
      The base with changed kernels, float32; what has no adapter is not copied. A quantised base
      gives kernels of what it stands for, all of them, which are not those that it was made from.

    >>> base = {"layers": {"mlp": {"up": {"kernel": jnp.ones((1, 1, 1))}}}}
    >>> adapter = {"layers": {"mlp": {"up": {"lora_a": jnp.ones((1, 1, 1)),
    ...                                      "lora_b": jnp.ones((1, 1, 1))}}}}
    >>> merged = merge(base, adapter, Lora(rank=1, alpha=2.0))
    >>> float(merged["layers"]["mlp"]["up"]["kernel"][0, 0, 0])
    3.0
    """
    return _merge(base, adapter, lambda base, adapter: merged_kernel(base, adapter, lora))


def merge_lazily(base: Params, adapter: Params, lora: Lora) -> Params:
    """As `merge`, but every kernel that changes is a `Merged`, for `models.export`.

    A model whose base is held in 4 bits need not fit into memory in 32.
    """
    return _merge(base, adapter, lambda base, adapter: Merged(base, adapter, lora))


def _merge(base: Params, adapter: Params, kernel: Any) -> Params:
    if "lora_a" in adapter or quantised.kind(base):
        kept = {k: v for k, v in base.items() if k not in quantised.LEAVES}
        return kept | {"kernel": kernel(base, adapter)}
    return {
        name: _merge(child, adapter.get(name, {}), kernel) if isinstance(child, dict) else child
        for name, child in base.items()
    }


def merged_kernel(base: Params, adapter: Params, lora: Lora) -> jax.Array:
    """The kernel of a linear map with its adapter, float32; `adapter` may be empty."""
    kernel = _kernel(base)
    if "lora_a" not in adapter:
        return kernel
    kernel = kernel + lora.scale * jnp.matmul(
        adapter["lora_a"], adapter["lora_b"], precision=jax.lax.Precision.HIGHEST
    )
    if "lora_norm" in adapter:
        kernel = kernel * (adapter["lora_norm"] / column_norm(kernel))[..., None, :]
    return kernel


class Merged:
    """A merged kernel that is computed when a part of it is taken: `merged[layer]`.

    Has the shape and sharding of the array that it stands for, float32.
    """

    def __init__(self, base: Params, adapter: Params, lora: Lora):
        leaves = ("kernel", *quantised.LEAVES)
        self.base = {name: leaf for name, leaf in base.items() if name in leaves}
        self.adapter, self.lora = adapter, lora
        self.shape = quantised.kernel_shape(base)
        self.dtype = jnp.dtype(jnp.float32)
        self.sharding = self.base[quantised.kind(base) or "kernel"].sharding

    def __getitem__(self, at: tuple[int, ...]) -> jax.Array:
        """The kernel at an index of its leading axes, whole on every device."""
        whole = None
        if isinstance(self.sharding, NamedSharding):
            whole = NamedSharding(self.sharding.mesh, PartitionSpec())
        return _merged_part(self.lora, whole)(self.base, self.adapter, at)


@functools.lru_cache(maxsize=8)
def _merged_part(lora: Lora, whole: NamedSharding | None) -> Any:
    def part(base: Params, adapter: Params, at: tuple[int, ...]) -> jax.Array:
        base, adapter = jax.tree.map(lambda leaf: leaf[at], (base, adapter))
        return merged_kernel(base, adapter, lora)

    return jax.jit(part, out_shardings=whole)
