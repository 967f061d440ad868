"""Where every parameter lives in a file: one table for reading and writing all formats."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax.models import decoder
from sage_jax.models import spec as spec_lib


class Tensor(NamedTuple):
    """One parameter and its names; `{}` in a name stands for the layer."""

    path: str  # in our tree
    hf: str
    gguf: str
    transposed: bool = False  # files hold [out, in], we hold [in, out]


def _linear(path: str, hf: str, gguf: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{path}/kernel", f"{hf}.weight", f"{gguf}.weight", transposed=True),
        Tensor(f"{path}/bias", f"{hf}.bias", f"{gguf}.bias"),
    )


TENSORS: tuple[Tensor, ...] = (
    Tensor("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    Tensor(
        "layers/attention_norm/scale",
        "model.layers.{}.input_layernorm.weight",
        "blk.{}.attn_norm.weight",
    ),
    *_linear("layers/attention/q", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    *_linear("layers/attention/k", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    *_linear("layers/attention/v", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    *_linear("layers/attention/o", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    Tensor(
        "layers/mlp_norm/scale",
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight",
    ),
    *_linear("layers/mlp/gate", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    *_linear("layers/mlp/up", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    *_linear("layers/mlp/down", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    Tensor("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    Tensor("lm_head/kernel", "lm_head.weight", "output.weight", transposed=True),
)
# Derived from the config, or a copy: safe to leave unread.
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|^rope_freqs\.weight$|^lm_head\.weight$|^output\.weight$"
)


def shapes(spec: spec_lib.ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model by path, without building it."""
    return {path: leaf.shape for path, leaf in leaves(abstract(spec))}


def abstract(spec: spec_lib.ModelSpec) -> Any:
    """The parameter tree of a model as `jax.ShapeDtypeStruct`s, without building it."""
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


def present(spec: spec_lib.ModelSpec) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The table's rows that this model has, with the shape of the whole parameter."""
    shape = shapes(spec)
    return [(row, shape[row.path]) for row in TENSORS if row.path in shape]


def is_stacked(row: Tensor) -> bool:
    """Whether the parameter has a leading layer axis."""
    return "{}" in row.hf


def slices(spec: spec_lib.ModelSpec) -> list[tuple[Tensor, int]]:
    """Every tensor a file of this model holds, as (row of the table, layer)."""
    return [
        (row, layer)
        for row, shape in present(spec)
        for layer in range(shape[0] if is_stacked(row) else 1)
    ]


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
    """A file, tensor by tensor, in Hugging Face's layout; the layer is 0 for rows without one."""

    shape: Callable[[Tensor, int], tuple[int, ...]]
    read: Callable[[Tensor, int, Index], np.ndarray]  # this part alone, float32


def assemble(
    spec: spec_lib.ModelSpec, source: Source, origin: str, place: Place | None = None
) -> decoder.Params:
    """Builds the parameter tree; each process reads the parts that its devices hold, and no more.

    Args:
      spec: the model.
      source: the file.
      origin: the file's name, for messages.
      place: where each leaf goes, from the tree of their shapes; None: whole on the default device.

    Returns:
      Nested dict of float32 arrays.

    Raises:
      ValueError: if a tensor's shape is not the one the spec implies.
    """
    shardings = None if place is None else dict(leaves(place(abstract(spec))))
    params: dict[str, Any] = {}
    for row, shape in present(spec):
        for layer in range(shape[0] if is_stacked(row) else 1):
            _check_shape(row, layer, shape, source, origin)
        node = params
        *folders, leaf = row.path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = _leaf(row, shape, source, None if shardings is None else shardings[row.path])
    return params


def _check_shape(
    row: Tensor, layer: int, shape: tuple[int, ...], source: Source, origin: str
) -> None:
    needed = shape[1:] if is_stacked(row) else shape
    found = source.shape(row, layer)
    found = found[::-1] if row.transposed else found
    if found != needed:
        raise ValueError(
            f"{origin}: {row.hf.format(layer)} (GGUF {row.gguf.format(layer)}) gives {row.path} "
            f"the shape {found}, but the config implies {needed}. The weights belong to another "
            f"config."
        )


def _leaf(
    row: Tensor, shape: tuple[int, ...], source: Source, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """One parameter, whole or as the shards of this process."""
    known: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices may hold the same part

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        ends = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if ends not in known:
            known[ends] = _cut(row, ends, source)
        return known[ends]

    if sharding is None:
        return jnp.asarray(part(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def _cut(row: Tensor, ends: tuple[tuple[int, int], ...], source: Source) -> np.ndarray:
    """The part of a parameter between `ends`, one layer of it in memory besides at a time."""
    first, last = ends[0] if is_stacked(row) else (0, 1)
    inner = ends[1:] if is_stacked(row) else ends
    index = tuple(slice(*pair) for pair in (inner[::-1] if row.transposed else inner))
    out = np.empty((last - first, *(stop - start for start, stop in inner)), np.float32)
    for layer in range(first, last):
        value = source.read(row, layer, index)
        out[layer - first] = value.T if row.transposed else value
    return out if is_stacked(row) else out[0]


def fetch(leaf: Any, at: tuple[int, ...] = ()) -> np.ndarray:
    """An array, or what lies at an index of its leading axes, on this host.

    Nothing besides that part is gathered. With several processes every one must call it.

    >>> fetch(jnp.arange(6).reshape(3, 2), (1,)).tolist()
    [2, 3]
    """
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(_part(whole)(leaf, at))
    return np.asarray(leaf)[at]


@functools.lru_cache(maxsize=8)
def _part(whole: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda leaf, at: leaf[at], out_shardings=whole)
