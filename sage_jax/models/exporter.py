"""Writes a model as a Hugging Face directory."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sage_jax
from sage_jax.models import decoder, hf, hf_config, tensors
from sage_jax.models import spec as spec_lib

SHARD_BYTES = 5 * 10**9  # transformers' own limit
_MARK = "exported_by"  # in config.json: tells our exports from directories we must not replace


def export(
    directory: str | os.PathLike[str],
    model: decoder.Model,
    params: decoder.Params,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    check: bool = True,
    computes: decoder.Params | None = None,
) -> pathlib.Path:
    """Writes a directory that transformers loads, and `models.load` too.

    It appears complete or not at all: it is written beside its place and renamed. With several
    processes every one must call this; the first writes, and holds no more than one file's weights.

    Args:
      directory: where to; may be absent, empty, or an earlier export, which is replaced.
      model: the model.
      params: its parameters; kernels may be `lora.Merged`, which `check` needs `computes` for.
      tokenizer: a transformers tokenizer to save with it, or None.
      dtype: dtype of the weights in the file, "float32", "bfloat16" or "float16".
      shard_bytes: weights beyond this size are split over several files.
      check: read the files again and compare logits with those of `params` before the directory
        takes its place; holds the weights twice for as long. With several processes, which need
        not share a file system, it is left out.
      computes: parameters, with adapters or quantised, that compute what `params` do. The check
        then compares with these, as closely as `dtype` allows.

    Returns:
      The directory.

    Raises:
      ValueError: if the directory holds something that is not an export, or the dtype is unknown.
      RuntimeError: the files do not give the logits of the model.
      OSError: the files cannot be written, as when a disk is full.
    """
    target = pathlib.Path(directory)
    if dtype not in decoder.STORED:
        raise ValueError(f"dtype={dtype!r} is unknown. Use one of {sorted(decoder.STORED)}.")
    config = hf_config.to_hf(model.spec, dtype=dtype)
    config[_MARK] = f"sage_jax {sage_jax.__version__}"
    _refuse_strangers(target)
    parts = dict(tensors.leaves(params))
    if jax.process_index() != 0:  # it takes part in gathering, tensor by tensor, and keeps nothing
        for row, at in tensors.slices(model.spec):
            tensors.fetch(parts[row.path], at)
        return target
    with _replacing(target) as temporary:
        _write_json(temporary / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config[key] is not None}
        _write_json(temporary / "generation_config.json", generation)
        _write_weights(temporary, model, parts, dtype, shard_bytes)
        if check and jax.process_count() == 1:
            _compare(temporary, model, params, dtype, computes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
    return target


_CHECKED = 16  # tokens whose logits are compared


# Largest difference by the dtype of the file, as a share of the largest logit, where what computes
# is not what was rounded for it. A tensor in the wrong place makes one of about 1.
_APART = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}


def _compare(
    directory: pathlib.Path,
    model: decoder.Model,
    params: Any,
    dtype: str,
    computes: Any,
) -> None:
    """Reads an export again, to where the weights lie, and compares logits."""
    placed = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), params)
    on_devices = all(x is not None for x in jax.tree.leaves(placed, is_leaf=lambda x: x is None))
    again, read = hf.load(directory, place=(lambda _: placed) if on_devices else None)
    difference = _difference(model.spec, decoder.STORED[dtype] if computes is None else None)
    allowed = 1e-5 if computes is None else _APART[dtype]
    found = float(difference(params if computes is None else computes, read))
    if again.spec != model.spec or not found <= allowed:
        raise RuntimeError(
            f"The export does not compute what the model computes: its logits differ by "
            f"{found:.3g} of their size. Nothing was written; please "
            f"report this with the model's config.json."
        )


@functools.lru_cache(maxsize=4)
def _difference(spec: spec_lib.ModelSpec, rounded: Any) -> Callable[[Any, Any], jax.Array]:
    """The largest difference of two sets of weights' logits, as a share of the largest logit.

    Of the first as a file of dtype `rounded` can hold it, unless that is None: what rounding
    changes is no mistake.
    """
    plain = decoder.Model(spec)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, spec.vocab, (1, _CHECKED)))

    @jax.jit
    def difference(params: Any, read: Any) -> jax.Array:
        if rounded is not None:
            params = jax.tree.map(lambda x: x.astype(rounded).astype(jnp.float32), params)
        ours, theirs = plain.logits(params, tokens), plain.logits(read, tokens)
        return jnp.max(jnp.abs(ours - theirs)) / jnp.maximum(jnp.max(jnp.abs(ours)), 1e-6)

    return difference


def _refuse_strangers(target: pathlib.Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    config = target / "config.json"
    if not config.is_file() or _MARK not in hf.read_json(config):
        raise ValueError(
            f"{target} exists and is not an earlier export, so it is not replaced. Choose another "
            f"directory or remove it."
        )


@contextlib.contextmanager
def _replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary directory beside `target` that takes its place if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0o700 would hide the export from other users
        content = temporary / "new"
        content.mkdir()
        yield content
        if target.exists():
            target.rename(temporary / "old")
        content.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(
    directory: pathlib.Path,
    model: decoder.Model,
    parts: dict[str, Any],
    dtype: str,
    shard_bytes: int,
) -> None:
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors_numpy

    kind = np.dtype(decoder.STORED[dtype])
    stored = tensors.files(model.spec)
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, pieces in stored.items():
        shapes = (parts[row.path].shape[row.stacked :] for row, _ in pieces)
        size = sum(math.prod(shape) for shape in shapes) * kind.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
        total += size
    home = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: _tensor(parts, stored[name], kind) for name in shard}
        try:
            safetensors_numpy.save_file(weights, directory / file, metadata={"format": "pt"})
        except SafetensorError as e:  # a full disk, say
            raise OSError(
                f"The export could not be written ({e}). Nothing of it was kept. The weights "
                f"of a run are in its checkpoint: its command, given again, goes on from there."
            ) from e
        (directory / file).chmod(0o644)  # written for the owner alone otherwise
        home.update(dict.fromkeys(weights, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": home}
        _write_json(directory / "model.safetensors.index.json", index)


def _tensor(parts: dict[str, Any], pieces: list[tensors.Part], kind: np.dtype) -> np.ndarray:
    values = []
    for row, at in pieces:
        value = tensors.fetch(parts[row.path], at)
        values.append((value.T if row.transposed else value).astype(kind))
    return np.ascontiguousarray(np.concatenate(values) if len(values) > 1 else values[0])


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
