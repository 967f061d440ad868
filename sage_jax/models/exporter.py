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
    processes every one must call this; the first writes.

    Args:
      directory: where to; may be absent, empty, or an earlier export, which is replaced.
      model: the model.
      params: its parameters.
      tokenizer: a transformers tokenizer to save with it, or None.
      dtype: dtype of the weights in the file, "float32", "bfloat16" or "float16".
      shard_bytes: weights beyond this size are split over several files.

    Returns:
      The directory.

    Raises:
      ValueError: if the directory holds something that is not an export, or the dtype is unknown.
    """
    target = pathlib.Path(directory)
    if dtype not in decoder.STORED:
        raise ValueError(f"dtype={dtype!r} is unknown. Use one of {sorted(decoder.STORED)}.")
    config = hf_config.to_hf(model.spec, dtype=dtype)
    config[_MARK] = f"sage_jax {sage_jax.__version__}"
    _refuse_strangers(target)
    host = {path: tensors.to_host(leaf) for path, leaf in tensors.leaves(params)}
    if jax.process_index() != 0:
        return target
    with _replacing(target) as temporary:
        _write_json(temporary / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config[key] is not None}
        _write_json(temporary / "generation_config.json", generation)
        _write_weights(temporary, model, host, dtype, shard_bytes)
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
    host: dict[str, np.ndarray],
    dtype: str,
    shard_bytes: int,
) -> None:
    from safetensors import numpy as safetensors_numpy

    kind = np.dtype(decoder.STORED[dtype])
    stored = tensors.files(model.spec)
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, parts in stored.items():
        size = sum(host[row.path][at].size for row, at in parts) * kind.itemsize
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
        weights = {name: _tensor(host, stored[name], kind) for name in shard}
        safetensors_numpy.save_file(weights, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # written for the owner alone otherwise
        home.update(dict.fromkeys(weights, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": home}
        _write_json(directory / "model.safetensors.index.json", index)


def _tensor(host: dict[str, np.ndarray], parts: list[tensors.Part], kind: np.dtype) -> np.ndarray:
    values = []
    for row, at in parts:
        value = host[row.path][at]
        values.append((value.T if row.transposed else value).astype(kind))
    return np.ascontiguousarray(np.concatenate(values) if len(values) > 1 else values[0])


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
