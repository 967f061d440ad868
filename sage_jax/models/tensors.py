"""Parameter trees and the tensors of files: which of them a model has, and how they are read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax.models import decoder, names, quantised
from sage_jax.models import spec as spec_lib

# Derived from the config, or a copy: safe to leave unread.
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|^rope_freqs\.weight$|^lm_head\.weight$|^output\.weight$"
)


def shapes(spec: spec_lib.ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model by path, without building it."""
    return {path: leaf.shape for path, leaf in leaves(abstract(spec))}


def abstract(spec: spec_lib.ModelSpec) -> Any:
    """The parameter tree of a model as `jax.ShapeDtypeStruct`s, without building it."""
    return jax.tree.map(lambda leaf: leaf, _abstract(spec))  # what is cached stays as it is


@functools.lru_cache(maxsize=16)  # a trace of the decoder, which loading asks for often
def _abstract(spec: spec_lib.ModelSpec) -> Any:
    return jax.eval_shape(decoder.Model(spec).init, jax.random.key(0))


def leaves(params: decoder.Params) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a parameter tree, in sorted order of the paths.

    >>> [path for path, _ in leaves({"b": {"x": 1}, "a": 2})]
    ['a', 'b/x']
    """
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        found["/".join(key.key for key in keys)] = leaf
    return iter(sorted(found.items()))


At = tuple[int, ...]  # the layer of a tensor, or its layer and expert; () for one without
Part = tuple[names.Tensor, At]


def present(spec: spec_lib.ModelSpec) -> list[tuple[names.Tensor, tuple[int, ...]]]:
    """The table's rows that this model has, with the shape of the whole parameter."""
    shape = shapes(spec)
    found = [(row, shape[row.path]) for row in names.rows(spec) if row.path in shape]
    assert len(found) == len(shape), sorted(set(shape) - {row.path for row, _ in found})
    return found


def slices(spec: spec_lib.ModelSpec) -> list[Part]:
    """Every part of a tensor that a file of this model holds."""
    return [(row, at) for row, shape in present(spec) for at in np.ndindex(*shape[: row.stacked])]


def files(spec: spec_lib.ModelSpec) -> dict[str, list[Part]]:
    """The parts of every tensor under its name in Hugging Face files, in their order."""
    found: dict[str, list[Part]] = {}
    for row, at in slices(spec):
        found.setdefault(row.hf.format(*at), []).append((row, at))
    return {name: sorted(parts, key=lambda p: p[0].start) for name, parts in found.items()}


def check_names(
    expected: Collection[str], found: Collection[str], origin: str, config: str
) -> None:
    """Compares the tensor names of a file with those a model needs.

    Raises:
      ValueError: if some are missing, or there are some the model has no place for.
    """
    missing = sorted(set(expected) - set(found))
    if missing:
        raise ValueError(
            f"{origin}: {len(missing)} tensors are missing, the first {missing[:3]}. {config} "
            f"promises them; the file is incomplete or belongs to another model."
        )
    extra = sorted(n for n in set(found) - set(expected) if not _IGNORED.search(n))
    if extra:
        raise ValueError(
            f"{origin}: {len(extra)} tensors have no place in the model, the first {extra[:3]}. "
            f"{config} does not announce them, and leaving them out would change the outputs."
        )


Index = tuple[slice, ...]  # of a tensor, every start and stop a number
Place = Callable[[Any], Any]  # from a tree of jax.ShapeDtypeStructs to one of shardings


class Source(NamedTuple):
    """A file, tensor by tensor, in Hugging Face's layout."""

    shape: Callable[[names.Tensor, At], tuple[int, ...]]
    read: Callable[[names.Tensor, At, Index], np.ndarray]  # this part alone, float32


def assemble(
    spec: spec_lib.ModelSpec,
    source: Source,
    origin: str,
    place: Place | None = None,
    how: quantised.How = quantised.FLOAT32,
) -> decoder.Params:
    """Builds the parameter tree; each process reads the parts that its devices hold, and no more.

    Of what is to be quantised, one matrix at a time is there in float32.

    Args:
      spec: the model.
      source: the file.
      origin: the file's name, for messages.
      place: where each leaf goes, from the tree of their shapes; None: whole on the default device.
      how: how each parameter is held.

    Returns:
      Nested dict of arrays.

    Raises:
      ValueError: if a tensor's shape is not the one the spec implies.
    """
    whole = abstract(spec)
    where: dict[str, Any] = {}
    if place is not None:  # of kernels, and of the leaves that stand for them
        held = jax.eval_shape(lambda params: quantised.hold(params, *how), whole)
        where = dict(leaves(place(whole))) | dict(leaves(place(held)))
    params: dict[str, Any] = {}
    for row, shape in present(spec):
        for at in np.ndindex(*shape[: row.stacked]):
            _check_shape(row, at, shape, source, origin)
        node = params
        *folders, leaf = row.path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        kind = quantised.plan(row.path, *how)
        if kind in quantised.KINDS:
            node |= _quantised(row, shape, source, where, kind)
        else:
            node[leaf] = _leaf(row, shape, source, where.get(row.path), dtype=jnp.dtype(kind))
    return params


def _check_shape(
    row: names.Tensor, at: At, shape: tuple[int, ...], source: Source, origin: str
) -> None:
    needed = shape[row.stacked :]
    found = source.shape(row, at)
    found = found[::-1] if row.transposed else found
    whole = (*needed[:-1], row.total) if row.total else needed
    if found != whole:
        gguf = f" (GGUF {row.gguf.format(*at)})" if row.gguf else ""
        raise ValueError(
            f"{origin}: {row.hf.format(*at)}{gguf} gives {row.path} the shape {found}, but the "
            f"config implies {whole}. The weights belong to another config."
        )


def _leaf(
    row: names.Tensor,
    shape: tuple[int, ...],
    source: Source,
    sharding: jax.sharding.Sharding | None,
    *,
    dtype: Any = np.float32,
    at: At | None = None,
) -> jax.Array:
    """One parameter, or what lies at an index of its leading axes, as this process's shards."""
    known: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices may hold the same part
    first = () if at is None else tuple((i, i + 1) for i in at)
    shape = shape[len(first) :]

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        ends = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if ends not in known:
            found = _cut(row, (*first, *ends), source, dtype)
            known[ends] = found.reshape(found.shape[len(first) :])
        return known[ends]

    if sharding is None:
        return jnp.asarray(part(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def _quantised(
    row: names.Tensor, shape: tuple[int, ...], source: Source, where: dict[str, Any], kind: str
) -> dict[str, jax.Array]:
    """The leaves that stand for a kernel, each matrix of it quantised where its shards lie."""
    single = whole = where.get(row.path)
    if isinstance(whole, NamedSharding):
        single = NamedSharding(whole.mesh, PartitionSpec(*whole.spec[row.stacked :]))
    stacked = jax.eval_shape(
        lambda kernel: quantised.quantise(kernel, kind), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    folder = row.path.removesuffix("kernel")
    placed = None if whole is None else {name: where[folder + name] for name in stacked}
    empty = jax.jit(
        lambda: {name: jnp.zeros(x.shape, x.dtype) for name, x in stacked.items()},
        out_shardings=placed,
    )

    def put(held: dict[str, jax.Array], kernel: jax.Array, at: At) -> dict[str, jax.Array]:
        new = quantised.quantise(kernel, kind)
        return {name: leaf.at[at].set(new[name]) for name, leaf in held.items()}

    into = jax.jit(put, donate_argnums=0, out_shardings=placed)
    held = empty()
    for at in np.ndindex(*shape[: row.stacked]):
        held = into(held, _leaf(row, shape, source, single, at=at), at)
    return held


def _cut(
    row: names.Tensor, ends: tuple[tuple[int, int], ...], source: Source, dtype: Any = np.float32
) -> np.ndarray:
    """The part of a parameter between `ends`, one tensor of it in memory besides at a time."""
    outer, inner = ends[: row.stacked], ends[row.stacked :]
    index = [slice(*pair) for pair in (inner[::-1] if row.transposed else inner)]
    if row.total:
        index[0] = slice(index[0].start + row.start, index[0].stop + row.start)
    out = np.empty([stop - start for start, stop in ends], dtype)
    for place in np.ndindex(*out.shape[: row.stacked]):
        at = tuple(i + start for i, (start, _) in zip(place, outer, strict=True))
        value = source.read(row, at, tuple(index))
        out[place] = value.T if row.transposed else value
    return out


def fetch(leaf: Any, at: tuple[int, ...] = ()) -> np.ndarray:
    """An array, or what lies at an index of its leading axes, on this host.

    Nothing besides that part is gathered, or computed, of a `lora.Merged`. With several processes
    every one must call it.

    >>> fetch(jnp.arange(6).reshape(3, 2), (1,)).tolist()
    [2, 3]
    """
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(_part(whole)(leaf, at))
    if not isinstance(leaf, np.ndarray | jax.Array):
        return np.asarray(leaf[at])
    return np.asarray(leaf)[at]


@functools.lru_cache(maxsize=8)
def _part(whole: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda leaf, at: leaf[at], out_shardings=whole)
