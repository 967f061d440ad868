"""Where arrays live: the device mesh and one table of rules for weights and optimizer state.

The mesh always has the axes `data`, `fsdp`, `context` and `tensor`, also on a single device, so
that a program written for one device is the program for a pod. Rows of a batch are split over
(`data`, `fsdp`), the tokens of a row over `context`; weights are split over `fsdp`, `context` and
`tensor` and repeated over `data`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sage_jax.models import quantised

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes over which the rows of a batch are split
CONTEXT = "context"  # the mesh axis over which the tokens of a row are split
TOKENS = P(ROWS, CONTEXT)  # an array of [R, T]
RESIDUAL = P(ROWS, CONTEXT, None)  # hidden_RTD between blocks; without it the batch is un-sharded
WEIGHTS = ("fsdp", CONTEXT)  # the mesh axes that split weights without splitting their products

# First match wins. The leading axis of everything under `layers` is the stacked layer, which is
# never split: scan slices it on every device. An adapter's rank is small and stays whole; its other
# side is split as that side of its weight is.
RULES: Rules = (
    (r"norm", P()),
    (r"bias$", P()),
    (r"lm_head/lora_a", P(WEIGHTS, None)),
    (r"lm_head/lora_b", P(None, "tensor")),
    (r"lm_head", P(WEIGHTS, "tensor")),  # [D, V]
    (r"embed/lora_a", P("tensor", None)),
    (r"embed/lora_b", P(None, WEIGHTS)),
    (r"embed", P("tensor", WEIGHTS)),  # [V, D]
    (r"layers/.*/router/", P()),
    (r"layers/.*/experts/(gate|up)/", P(None, None, WEIGHTS, "tensor")),  # [L, X, D, F]
    (r"layers/.*/experts/down/", P(None, None, "tensor", WEIGHTS)),
    (r"layers/.*/(q|k|v|gate|up)/lora_a", P(None, WEIGHTS, None)),
    (r"layers/.*/(q|k|v|gate|up)/lora_b", P(None, None, "tensor")),
    (r"layers/.*/(q|k|v|gate|up)/", P(None, WEIGHTS, "tensor")),
    (r"layers/.*/(o|down)/lora_a", P(None, "tensor", None)),
    (r"layers/.*/(o|down)/lora_b", P(None, None, WEIGHTS)),
    (r"layers/.*/(o|down)/", P(None, "tensor", WEIGHTS)),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, context and tensor.

    Args:
      data: copies of the weights, each with its own rows; -1 = all devices that are left.
      fsdp: parts in which weights and optimizer state are split, each with its own rows; or -1.
      tensor: parts in which a matrix product is split, with the same rows; or -1.
      devices: the devices to use; all of them by default.

    Returns:
      A `Mesh` of Auto axes: XLA chooses the shardings that are not given.

    Raises:
      ValueError: a size is neither positive nor -1, two sizes are -1, or the product of the
        sizes is not the number of devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"mesh.{name}={size} must be a positive number of devices, or -1 for the rest."
            )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"mesh.{' and mesh.'.join(free)} are both -1, but only one axis can take the rest of "
            "the devices. Give a number to all but one."
        )
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    if int(np.prod(list(sizes.values()))) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if name not in free)
        rule = "does not divide" if free else "is not"
        raise ValueError(
            f"The mesh {asked} = {fixed} {rule} the number of devices, {len(devices)}. "
            f"Choose sizes whose product is {len(devices)}, or -1 for one of them."
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf as the rules see it, such as `layers/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The sharding of every leaf of a parameter tree, by the first rule that its name matches.

    A dimension that the mesh does not divide (9 heads over 2 devices) is left whole, and a log
    line says so once.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s; only shapes are read.
      mesh: a mesh of `make_mesh`.
      rules: pairs of a regular expression, searched in the leaf's path with "/" between the keys,
        and the `PartitionSpec` of the leaves that it matches.

    Returns:
      A tree of `NamedSharding`s with the structure of `tree`.

    Raises:
      ValueError: no rule matches a leaf, or its rule has more dimensions than the leaf.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> found = shardings({"final_norm": {"scale": np.zeros(4)}}, mesh)
    >>> found["final_norm"]["scale"].spec == P()
    True
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        return NamedSharding(mesh, _fit(name, np.shape(leaf), _match(name, rules), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def state_shardings(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, rules: Rules = RULES
) -> Any:
    """The sharding of every leaf of the optimizer state: moments like their weights.

    To be given as `out_shardings` of `jax.jit(tx.init)`; without it XLA repeats Adam's moments on
    every device, twice the size of the weights.

    Args:
      tx: the optimizer.
      params: the weights, or their `jax.ShapeDtypeStruct`s.
      mesh: a mesh of `make_mesh`.
      rules: as in `shardings`.

    Returns:
      A tree of `NamedSharding`s with the structure of `tx.init(params)`.

    >>> tx, params = optax.adam(1e-3), {"final_norm": {"scale": np.zeros(4, np.float32)}}
    >>> moments, _ = state_shardings(tx, params, make_mesh(devices=jax.devices()[:1]))
    >>> moments.mu["final_norm"]["scale"].spec == moments.count.spec == P()
    True
    """
    whole = replicated(mesh)
    return optax.tree.map_params(
        tx,
        # What is not as large as its weight, such as sums over its rows, is small: it is whole.
        lambda leaf, sharding, weight: sharding if leaf.shape == weight.shape else whole,
        jax.eval_shape(tx.init, params),
        shardings(params, mesh, rules),
        params,
        transform_non_params=lambda _: whole,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp), all else whole: for every leaf of a `PackedBatch`."""
    return NamedSharding(mesh, P(ROWS))


@functools.cache  # one function a mesh: models on it are equal, and share their programs
def residual(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Says where hidden_RTD lies, once per block; a row that does not divide stays whole."""

    def constrain(x_RTD: jax.Array) -> jax.Array:
        whole = x_RTD.shape[1] % mesh.shape[CONTEXT]
        spec = P(ROWS, None, None) if whole else RESIDUAL
        return jax.lax.with_sharding_constraint(x_RTD, NamedSharding(mesh, spec))

    return constrain


@functools.cache
def table(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Brings the embedding [V, D] together over all axes but `tensor`, before tokens are looked up.

    Looked up in parts of its width, every token's channels would lie on other devices than the
    token, and the compiler replicates the batch to change that.
    """

    def gather(table_VD: jax.Array) -> jax.Array:
        whole = table_VD.shape[0] % mesh.shape["tensor"]
        spec = P(None if whole else "tensor", None)
        return jax.lax.with_sharding_constraint(table_VD, NamedSharding(mesh, spec))

    return gather


@functools.cache
def together(mesh: Mesh, dtype: Any) -> Callable[[Any], Any]:
    """Brings the weights together over all axes but `tensor`, in the dtype of the matmuls.

    For sampling, which reads all of them for every token: split, they would cross the network as
    often. The scales of norms and what is quantised keep their dtype, as the model reads them.
    """

    def gather(params: Any) -> Any:
        def one(path: tuple[Any, ...], leaf: jax.Array, where: NamedSharding) -> jax.Array:
            spec = P(*("tensor" if axes == "tensor" else None for axes in where.spec))
            name = leaf_name(path)
            kept = "norm" in name or name.rsplit("/", 1)[-1] in quantised.LEAVES
            leaf = leaf if kept else leaf.astype(dtype)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(one, params, shardings(params, mesh))

    return gather


def spread(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Runs a function of [R, T, ...] arrays on each device's own tokens, with the head whole.

    For `logprobs.make_logps_fn`. Over `tensor` the head stays split as the compiler likes it.
    """

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        if mesh.size == 1:
            return fn

        def run(*arrays: jax.Array) -> Any:
            *tokens, head_DV = arrays
            dtype = head_DV.dtype

            def local(*arrays: jax.Array) -> Any:
                *tokens, head_DV = arrays
                return fn(*tokens, head_DV.astype(dtype))

            if mesh.devices.flat[0].platform == "cpu":
                # XLA's CPU backend ends the process at a sum of bfloat16 written by shard_map.
                head_DV = head_DV.astype(np.float32)
            return jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(*[TOKENS] * len(tokens), P()),
                out_specs=TOKENS,
                axis_names={*ROWS, CONTEXT},
                check_vma=False,
            )(*tokens, head_DV)

        return run

    return wrap


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def row_multiple(mesh: Mesh) -> int:
    """The number of which the rows of every batch must be a multiple.

    >>> row_multiple(make_mesh(devices=jax.devices()[:1]))
    1
    """
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def token_multiple(mesh: Mesh) -> int:
    """The number of which the tokens of a row must be a multiple, so that `context` splits it.

    Each device's part is a multiple of 128 tokens, what TPU kernels take at once.
    """
    parts = mesh.shape[CONTEXT]
    return 128 * parts if parts > 1 else 1


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices: the only ones that it has to build.

    Processes that share a row, because `tensor` goes across them, each build it.

    Args:
      mesh: a mesh of `make_mesh`.
      rows: of the whole batch.

    Returns:
      int64, increasing.

    Raises:
      ValueError: the rows are not a multiple of `row_multiple(mesh)`.

    >>> local_rows(make_mesh(devices=jax.devices()[:1]), 3).tolist()
    [0, 1, 2]
    """
    if rows % row_multiple(mesh):
        raise ValueError(
            f"A batch of {rows} rows cannot be split over the {row_multiple(mesh)} devices of the "
            f"axes {' and '.join(ROWS)}. Plan the rows in multiples of it."
        )
    here = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    found = [np.arange(rows)[index] for index in here if index is not None]
    return np.unique(np.concatenate(found))


def put(batch: Any, mesh: Mesh, rows: int | None = None) -> Any:
    """The rows that this process built, as global arrays split by `batch_sharding`.

    Args:
      batch: a tree of numpy arrays, rows first; each process gives its `local_rows`.
      mesh: a mesh of `make_mesh`.
      rows: of the whole batch; None: `batch` has them all.

    Returns:
      The same tree of `jax.Array`s, whose rows are those of all processes.

    Raises:
      ValueError: the rows are not a multiple of `row_multiple(mesh)`, or not those of this process.

    >>> put({"tokens_RT": np.zeros((2, 8))}, make_mesh(devices=jax.devices()[:1]))[
    ...     "tokens_RT"].shape
    (2, 8)
    """
    sharding = batch_sharding(mesh)
    batch = jax.tree.map(np.asarray, batch)
    total = len(jax.tree.leaves(batch)[0]) if rows is None else rows
    local = local_rows(mesh, total)
    given = local if rows is not None else np.arange(total)
    for leaf in jax.tree.leaves(batch):
        if len(leaf) != len(given):
            raise ValueError(
                f"This process gives {len(leaf)} rows, and its devices hold {len(given)} of the "
                f"batch of {total}. Build the rows of local_rows(mesh, {total})."
            )

    def one(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(total)
            at = int(np.searchsorted(given, start))  # what is one piece of the batch is one here
            return leaf[(slice(at, at + stop - start), *index[1:])]

        return jax.make_array_from_callback((total, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(one, batch)


def init(make: Callable[..., Any], mesh: Mesh, *args: Any, rules: Rules = RULES) -> Any:
    """What `make(*args)` returns, made where `shardings` puts it: no device ever holds the whole.

    Args:
      make: a function of arrays, such as `Model.init`; its result is a tree that `rules` know.
      mesh: a mesh of `make_mesh`.
      *args: of `make`.
      rules: as in `shardings`.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> init(lambda key: {"embed": jax.random.normal(key, (4, 2))}, mesh, jax.random.key(0))[
    ...     "embed"].sharding.spec
    P('tensor', 'fsdp')
    """
    placed = shardings(jax.eval_shape(make, *args), mesh, rules)
    return jax.jit(make, out_shardings=placed)(*args)


def _match(name: str, rules: Rules) -> PartitionSpec:
    for pattern, spec in rules:
        if re.search(pattern, name):
            return spec
    raise ValueError(
        f"No sharding rule matches the parameter {name!r}. Add a pair (regular expression, "
        "PartitionSpec) for it to the rules, for example "
        f"({re.escape(name)!r}, PartitionSpec())."
    )


def _fit(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    if len(spec) > len(shape):
        raise ValueError(
            f"The sharding rule for {name!r}, {spec}, has {len(spec)} dimensions but the "
            f"parameter has the shape {shape}. Put a rule that fits before it."
        )
    kept = []
    for dimension, axes in enumerate(spec):
        fitted = axes
        while shape[dimension] % _parts(fitted, mesh):
            fitted = fitted[:-1] if isinstance(fitted, tuple) else None
        if _parts(fitted, mesh) != _parts(axes, mesh) and shape[dimension] > 1:
            where = "split over fewer" if _parts(fitted, mesh) > 1 else "left whole"
            _say_less(name, shape, dimension, str(axes), _parts(axes, mesh), where)
        kept.append(_short(fitted, mesh))
    return P(*kept)


def _parts(axes: Any, mesh: Mesh) -> int:
    names = (axes,) if isinstance(axes, str) else (axes or ())
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def _short(axes: Any, mesh: Mesh) -> Any:
    """The same split, without axes of one device at the end."""
    if not isinstance(axes, tuple):
        return axes
    while len(axes) > 1 and mesh.shape[axes[-1]] == 1:
        axes = axes[:-1]
    return axes if len(axes) > 1 else (axes[0] if axes else None)


@functools.cache  # once per leaf, however often shardings are asked for
def _say_less(
    name: str, shape: tuple[int, ...], dimension: int, axes: str, parts: int, where: str
) -> None:
    logging.getLogger(__name__).warning(
        "%s: dimension %d of %s is not divisible by the %d devices of %s, so it is %s.",
        name, dimension, shape, parts, axes, where,
    )  # fmt: skip
