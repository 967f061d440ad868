"""Loads models: from a Hugging Face directory here, from GGUF through `gguf_reader`.

Weights are read with safetensors only. Pickled weights and code that comes with a model are never
loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from sage_jax.models import decoder, gguf_reader, hf_config, names, quantised, sources, tensors
from sage_jax.models import spec as spec_lib

_FLOATS = ("F64", "F32", "F16", "BF16")


def load(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    place: tensors.Place | None = None,
    hold: str = "float32",
) -> tuple[decoder.Model, decoder.Params]:
    """Loads a model.

    Args:
      path: a Hugging Face directory, a .gguf file, or `package:NAME[/INSIDE]`.
      dtype: compute dtype, "float32" or "bfloat16".
      place: from the tree of the parameters' shapes to one of shardings; each process then reads
        and holds its own shards only. None: all of it, on the default device.
      hold: how the parameters are held: "float32", to be trained, or frozen "bfloat16", "int8" or
        "nf4", see `quantised.plan`. They are read and quantised matrix by matrix.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: if nothing is there, the architecture is not supported, or tensors are missing,
        superfluous or of the wrong shape.
    """
    where, how = sources.resolve(path), (hold, dtype)
    if where.is_file() and where.suffix == ".gguf":
        spec, params = gguf_reader.read(where, place, how)
    elif where.is_dir():
        spec, params = _read_directory(where, place, how)
    else:
        raise ValueError(
            f"model path {str(where)!r} is neither a directory with config.json nor a .gguf file."
        )
    return decoder.Model(spec, dtype=dtype), params


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Parses a JSON file; a broken one is an error that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: not valid JSON ({e}). Copy the file again.") from e


def _read_directory(
    where: pathlib.Path, place: tensors.Place | None, how: quantised.How
) -> tuple[spec_lib.ModelSpec, decoder.Params]:
    config_file = where / "config.json"
    if not config_file.exists():
        hint = "It holds a LoRA adapter: merge it into its base model first."
        if not (where / "adapter_config.json").exists():
            hint = "A Hugging Face model directory has one beside its .safetensors files."
        raise ValueError(f"{where} has no config.json. {hint}")
    generation_file = where / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else None
    spec = hf_config.from_hf(read_json(config_file), generation, origin=str(config_file))
    return spec, _read_safetensors(where, spec, place, how)


def _weight_files(where: pathlib.Path) -> list[pathlib.Path]:
    index = where / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [where / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        pickled = sorted(file.name for file in where.glob("*.bin"))
        hint = "Copy them beside config.json."
        if pickled:
            hint = (
                f"{pickled[0]} is a pickle, which can run code and is never read: save the model "
                f"with transformers' save_pretrained(safe_serialization=True)."
            )
        raise ValueError(f"{where}: weight files {missing} are missing. {hint}")
    return files


def _read_safetensors(
    where: pathlib.Path,
    spec: spec_lib.ModelSpec,
    place: tensors.Place | None,
    how: quantised.How,
) -> decoder.Params:
    import safetensors

    with contextlib.ExitStack() as stack:
        home = {}
        for file in _weight_files(where):
            handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
            home.update(dict.fromkeys(handle.keys(), handle))
        expected = tensors.files(spec)
        tensors.check_names(expected, home, str(where), "config.json")

        def opened(row: names.Tensor, at: tensors.At) -> Any:
            name = row.hf.format(*at)
            found = home[name].get_slice(name)
            if found.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{where}: {name} is stored as {found.get_dtype()}; only {', '.join(_FLOATS)} "
                    f"are read. Use an unquantised copy of the model."
                )
            return found

        source = tensors.Source(
            lambda row, at: tuple(opened(row, at).get_shape()),
            lambda row, at, index: np.asarray(opened(row, at)[index], np.float32),
        )
        return tensors.assemble(spec, source, str(where), place, how)
