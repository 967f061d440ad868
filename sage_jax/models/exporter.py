"""Writes a model as a Hugging Face directory."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import sage_jax
from sage_jax.models import decoder, hf, hf_config, tensors

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
) -> pathlib.Path:
    """Writes a directory that transformers loads, and `models.load` too.

    It appears complete or not at all: it is written beside its place and renamed. With several
    processes every one must call this; the first writes, and holds no more than one file's weights.

    Args:
      directory: where to; may be absent, empty, or an earlier export, which is replaced.
      model: the model.
      params: its parameters.
      tokenizer: a transformers tokenizer to save with it, or None.
      dtype: dtype of the weights in the file, "float32" or "bfloat16".
      shard_bytes: weights beyond this size are split over several files.

    Returns:
      The directory.

    Raises:
      ValueError: if the directory holds something that is not an export, or the dtype is unknown.
    """
    target = pathlib.Path(directory)
    if dtype not in decoder.DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Use one of {sorted(decoder.DTYPES)}.")
    config = hf_config.to_hf(model.spec, dtype=dtype)
    config[_MARK] = f"sage_jax {sage_jax.__version__}"
    _refuse_strangers(target)
    parts = dict(tensors.leaves(params))
    if jax.process_index() != 0:  # it takes part in gathering, tensor by tensor, and keeps nothing
        for row, layer in tensors.slices(model.spec):
            _slice(parts, row, layer, np.dtype(decoder.DTYPES[dtype]))
        return target
    with _replacing(target) as temporary:
        _write_json(temporary / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config[key] is not None}
        _write_json(temporary / "generation_config.json", generation)
        _write_weights(temporary, model, parts, dtype, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
    return target


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
    from safetensors import numpy as safetensors_numpy

    kind = np.dtype(decoder.DTYPES[dtype])
    shards: list[list[tuple[tensors.Tensor, int]]] = [[]]
    used = total = 0
    for row, layer in tensors.slices(model.spec):
        shape = parts[row.path].shape[1:] if tensors.is_stacked(row) else parts[row.path].shape
        size = int(np.prod(shape)) * kind.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((row, layer))
        used += size
        total += size
    home = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {row.hf.format(layer): _slice(parts, row, layer, kind) for row, layer in shard}
        safetensors_numpy.save_file(weights, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)  # written for the owner alone otherwise
        home.update(dict.fromkeys(weights, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": home}
        _write_json(directory / "model.safetensors.index.json", index)


def _slice(parts: dict[str, Any], row: tensors.Tensor, layer: int, kind: np.dtype) -> np.ndarray:
    value = tensors.fetch(parts[row.path], (layer,) if tensors.is_stacked(row) else ())
    return np.ascontiguousarray((value.T if row.transposed else value).astype(kind))


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
