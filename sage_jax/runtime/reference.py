"""The reference store: what the reference model says of a pair is computed once, ever.

Values are keyed by content: a space (weights and dtype policy of the reference) and the digest of
the pair's token ids. So they survive another learning rate, seed, order or file name, and rows
added to or removed from the data; only new pairs cost a forward pass. A store is a directory of
append-only part files:

    <directory>/<space>/<time>-<random>.safetensors     digest [n, 16], logps [n, 2], tokens ...

A part appears by an atomic rename and is never changed, so several runs may share a store without
locks. Where two runs stored the same pair, the older part counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sage_jax import logprobs
from sage_jax.runtime import hosts

DIGEST_BYTES = 16
_FIELDS = logprobs.SequenceStats._fields
_VERSION = 1  # raise it when a field of SequenceStats comes to mean something else
_VALUE = np.dtype((np.void, DIGEST_BYTES))


def space(fingerprint: str, dtype: str, **policy: object) -> str:
    """The name of a space: everything besides the pair that its reference values depend on.

    Args:
        fingerprint: content hash of the reference's weights.
        dtype: compute dtype of the reference's forward pass.
        **policy: anything else that changes the values, as JSON values.

    Returns:
        A name that fits a directory; the beginning of the fingerprint and the dtype stay legible.

    >>> space("0123456789abcdef0123", "float32") == space("0123456789abcdef0123", "float32")
    True
    >>> space("0123456789abcdef0123", "bfloat16").startswith("0123456789ab-bfloat16-")
    True
    """
    everything = [_VERSION, _FIELDS, fingerprint, dtype, sorted(policy.items())]
    key = hashlib.blake2b(json.dumps(everything).encode(), digest_size=8).hexdigest()
    return f"{fingerprint[:12]}-{dtype}-{key}"


class Store:
    """Sequence statistics of pairs on disk, by space and digest.

    Args:
        directory: made when the first values are added.

    Example:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp())
        >>> digest = np.zeros((1, 16), np.uint8)
        >>> stats = logprobs.SequenceStats(*np.full((7, 1, 2), -3, np.float32))
        >>> store.add("space", digest, stats)
        >>> found_stats, found = store.lookup("space", digest)
        >>> found_stats.logps.tolist(), found.tolist()
        ([[-3.0, -3.0]], [True])
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self._parts: dict[pathlib.Path, dict[str, np.ndarray] | None] = {}  # None: damaged

    def lookup(
        self, space: str, digest_N16: np.ndarray
    ) -> tuple[logprobs.SequenceStats, np.ndarray]:
        """Stored statistics of pairs, in their order.

        Args:
            space: see `space`.
            digest_N16: uint8 [N, 16].

        Returns:
            (stats, found): numpy float32 [N, 2] per field, 0 where not found; bool [N].
        """
        values, part_N, _ = self._lookup(space, digest_N16)
        return values, part_N >= 0

    def add(self, space: str, digest_N16: np.ndarray, stats: logprobs.SequenceStats) -> None:
        """Writes one part file with these pairs.

        Args:
            space: see `space`.
            digest_N16: uint8 [N, 16].
            stats: float32 [N, 2] per field.

        Raises:
            ValueError: shapes do not agree, or a value is not finite: it would be kept for ever.
        """
        tensors = {"digest": _digests(digest_N16)}
        for name, value in zip(_FIELDS, stats, strict=True):
            tensors[name] = np.ascontiguousarray(value, np.float32)
        _check_values(tensors)
        if len(digest_N16) == 0:
            return
        import safetensors.numpy

        meta = {"space": space, "checksum": _checksum(tensors)}
        folder = self.directory / space
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.safetensors"
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            file.write(safetensors.numpy.save(tensors, meta))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def files(self, space: str) -> list[pathlib.Path]:
        """The part files of a space, oldest first."""
        return sorted((self.directory / space).glob("*.safetensors"))

    def _lookup(
        self, space: str, digest_N16: np.ndarray
    ) -> tuple[logprobs.SequenceStats, np.ndarray, list[pathlib.Path]]:
        """The values, the number of the file that each comes from (-1: none), and the files."""
        files = self.files(space)
        wanted_N = _digests(digest_N16).view(_VALUE)[:, 0]
        values: dict[str, Any] = {
            name: np.zeros((len(wanted_N), 2), np.float32) for name in _FIELDS
        }
        part_N = np.full(len(wanted_N), -1)
        for number, path in enumerate(files):
            part = self._read(path, space)
            missing = np.flatnonzero(part_N < 0)
            if part is None or not len(missing):
                continue
            known = part["digest"].view(_VALUE)[:, 0]  # sorted by _read
            at = np.searchsorted(known, wanted_N[missing]).clip(max=len(known) - 1)
            hit = known[at] == wanted_N[missing]
            part_N[missing[hit]] = number
            for name in _FIELDS:
                values[name][missing[hit]] = part[name][at[hit]]
        return logprobs.SequenceStats(**values), part_N, files

    def _read(self, path: pathlib.Path, space: str) -> dict[str, np.ndarray] | None:
        """A part sorted by digest; None, and one warning with its name, if it is damaged."""
        if path not in self._parts:
            try:
                self._parts[path] = _load(path, space)
            except DamagedError as e:
                logging.getLogger(__name__).warning(
                    "The reference store's file %s is damaged (%s) and ignored: its pairs are "
                    "computed again. Delete it to be rid of this line.", path, e,
                )  # fmt: skip
                self._parts[path] = None
        return self._parts[path]


def fill(
    store: Store,
    space: str,
    digest_N16: np.ndarray,
    compute: Callable[[np.ndarray], logprobs.SequenceStats],
    *,
    spot_check: int = 4,
    tolerance: float = 0.02,
) -> logprobs.SequenceStats:
    """Statistics of all pairs: stored ones from the store, the others computed and stored.

    Of several processes the first alone reads and writes the store, and the others take its word
    for what is in it; all of them call this and compute.

    Args:
        store: where to look and to write.
        space: see `space`.
        digest_N16: uint8 [N, 16], one digest a pair; equal pairs are computed once.
        compute: the reference's forward pass, from indices int64 [M] to float32 [M, 2] per field.
        spot_check: how many stored pairs to compute again and compare before trusting the rest.
        tolerance: largest difference in log-prob, in nats per square root of a token, that
            another packing, device or precision of the same weights may explain.

    Returns:
        numpy float32 [N, 2] per field: what the store now holds, so that a later run with the same
        pairs reads exactly the same bits.

    Raises:
        ValueError: a stored pair differs from what the reference says now.
    """
    stored, part_N, files = hosts.on_first(lambda: store._lookup(space, digest_N16))
    found = np.flatnonzero(part_N >= 0)
    if len(found) and spot_check > 0:
        rng = np.random.default_rng(np.random.SeedSequence(digest_N16[found[0]].tolist()))
        index = np.sort(rng.choice(found, min(spot_check, len(found)), replace=False))
        of = [files[part] for part in part_N[index]]
        _compare(index, of, _take(stored, index), compute(index), tolerance)
    if len(found) == len(part_N):
        return stored
    missing = np.flatnonzero(part_N < 0)
    _, first = np.unique(digest_N16[missing], axis=0, return_index=True)
    index = missing[np.sort(first)]
    computed = compute(index)

    def kept() -> logprobs.SequenceStats:
        store.add(space, digest_N16[index], computed)
        return store.lookup(space, digest_N16)[0]

    return hosts.on_first(kept)


def _compare(
    index: np.ndarray,
    files: list[pathlib.Path],
    stored: logprobs.SequenceStats,
    now: logprobs.SequenceStats,
    tolerance: float,
) -> None:
    allowed = tolerance * np.sqrt(1 + np.asarray(now.tokens))
    wrong = ~(np.abs(stored.logps - now.logps) <= allowed) | (stored.tokens != now.tokens)
    if wrong.any():
        row, side = np.argwhere(wrong)[0]
        raise ValueError(
            f"The reference store's file {files[row]} is stale: it has the log-prob "
            f"{stored.logps[row, side]:.6g} over {stored.tokens[row, side]:.0f} tokens for "
            f"{('chosen', 'rejected')[side]} of pair {index[row]}, and the reference model says "
            f"{now.logps[row, side]:.6g} over {now.tokens[row, side]:.0f}. Delete that file, or "
            "set config.reference.store to another directory; its pairs are then computed again."
        )


def _take(stats: logprobs.SequenceStats, index: np.ndarray) -> logprobs.SequenceStats:
    return logprobs.SequenceStats(*(value[index] for value in stats))


def _digests(digest_N16: np.ndarray) -> np.ndarray:
    digest_N16 = np.ascontiguousarray(digest_N16)
    if digest_N16.dtype != np.uint8 or digest_N16.shape[1:] != (DIGEST_BYTES,):
        raise ValueError(
            f"Digests have the dtype {digest_N16.dtype} and shape {digest_N16.shape}; they must "
            f"be uint8 [N, {DIGEST_BYTES}], as EncodedPairs.digest_N16."
        )
    return digest_N16


def _check_values(tensors: dict[str, np.ndarray]) -> None:
    shape = (len(tensors["digest"]), 2)
    for name in _FIELDS:
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has the shape {tensors[name].shape}; {shape[0]} digests need {shape}."
            )
        bad = np.argwhere(~np.isfinite(tensors[name]))
        if len(bad):
            raise ValueError(
                f"The reference gives {name}={tensors[name][tuple(bad[0])]} for pair {bad[0][0]} "
                f"of the {shape[0]} computed ({len(bad)} such values). Only finite values are "
                "stored: check the reference's weights, or use model.dtype=float32."
            )


class DamagedError(Exception):
    """A part file does not hold what a part file holds; the text says what is wrong."""


def _load(path: pathlib.Path, space: str) -> dict[str, np.ndarray]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, ValueError, OSError) as e:
        raise DamagedError(str(e).splitlines()[0][:120]) from e
    if set(tensors) != {"digest", *_FIELDS}:
        raise DamagedError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
    if meta.get("space") != space or meta.get("checksum") != _checksum(tensors):
        raise DamagedError("its checksum or space does not agree with its content")
    order = np.argsort(tensors["digest"].view(_VALUE)[:, 0], kind="stable")
    return {name: tensor[order] for name, tensor in tensors.items()}


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for name in ("digest", *_FIELDS):
        hasher.update(f"{name}{tensors[name].shape}".encode())
        hasher.update(np.ascontiguousarray(tensors[name]).tobytes())
    return hasher.hexdigest()
