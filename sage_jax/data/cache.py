"""Arrays on disk under the hash of what they were made from: safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS, META = "arrays.safetensors", "meta.json"
log = logging.getLogger(__name__)


def key(**parts: Any) -> str:
    """The hash of JSON-serialisable parts, 32 hex digits.

    >>> key(a=1, b="x") == key(b="x", a=1)
    True
    """
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def store(
    directory: str | Path, name: str, arrays: Mapping[str, np.ndarray], meta: dict[str, Any]
) -> None:
    """Writes an entry as a whole: a reader, or a crash, sees all of it or nothing.

    Args:
      directory: of the cache; made if missing.
      name: of the entry, from `key`.
      arrays: what to keep, by name.
      meta: JSON-serialisable, kept beside the arrays.
    """
    from safetensors import numpy as safetensors

    final = Path(directory) / name
    scratch = Path(directory) / f".{name}.{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        data = safetensors.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        (scratch / ARRAYS).write_bytes(data)
        digest = hashlib.blake2b(data).hexdigest()
        (scratch / META).write_text(json.dumps({"arrays_blake2b": digest, "meta": meta}))
        try:
            os.rename(scratch, final)
        except OSError:
            if fetch(directory, name) is None:  # what stands there is damaged
                shutil.rmtree(final)
                os.rename(scratch, final)
    finally:  # gone after a rename; left over if another process was first, or on an error
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(directory: str | Path, name: str) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays and meta of an entry; None if there is none, or if it is damaged (logged)."""
    from safetensors import numpy as safetensors

    entry = Path(directory) / name
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / META).read_text())
        data = (entry / ARRAYS).read_bytes()
        intact = meta["arrays_blake2b"] == hashlib.blake2b(data).hexdigest()
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        log.warning("The cache entry %s is damaged and will be made again.", entry)
        return None
    return safetensors.load(data), meta["meta"]
