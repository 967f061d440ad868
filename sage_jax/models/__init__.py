"""Decoders in Flax Linen: build, load, run, export.

`load`, `export`, `fingerprint` and `load_tokenizer` are imported on first use, so that
`import sage_jax.models` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage_jax.models.decoder import Cache as Cache
    from sage_jax.models.decoder import Model as Model
    from sage_jax.models.exporter import export as export
    from sage_jax.models.fingerprints import fingerprint as fingerprint
    from sage_jax.models.hf import load as load
    from sage_jax.models.rope import RopeScaling as RopeScaling
    from sage_jax.models.spec import ModelSpec as ModelSpec
    from sage_jax.models.tokenizer import load_tokenizer as load_tokenizer

_HOME = {
    "Cache": "decoder",
    "Model": "decoder",
    "ModelSpec": "spec",
    "RopeScaling": "rope",
    "export": "exporter",
    "fingerprint": "fingerprints",
    "load": "hf",
    "load_tokenizer": "tokenizer",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
