"""Programs compiled for every row length of a plan, together, before the first batch needs one."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from sage_jax import batch
from sage_jax.data import encode, layout, steps
from sage_jax.runtime import hosts
from sage_jax.runtime import mesh as meshes

THREADS = 4  # compilations at a time; each holds a program in memory, and uses cores of the host


def rows_of(shape: steps.Shape, length: int, mesh: jax.sharding.Mesh) -> batch.PackedBatch:
    """What a batch with rows of a length looks like on a mesh, as `jax.ShapeDtypeStruct`s."""
    one = batch.empty(1, length, shape.slots)
    if shape.share:
        none = layout.unshared(1, length, shape.slots, shape.keys_of(length))
        one = one._replace(shared=none)
    where = meshes.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((shape.rows, *x.shape[1:]), x.dtype, sharding=where), one
    )


def lengths(placed: np.ndarray, pairs: encode.EncodedPairs, shape: steps.Shape) -> list[int]:
    """The row lengths that the batches of a plan have, ascending.

    Args:
        placed: int [K, R, S], indices of pairs, -1 for an empty slot.
        pairs: the data set.
        shape: the static shapes of the batches.
    """
    return sorted(set(steps.lengths(pairs, placed, shape).tolist()))


class Programs:
    """A jitted function, compiled once for each row length, before it is called with it.

    Calling the function itself would compile one length after another, each in the middle of the
    work that needs it first.
    """

    def __init__(self, program: Any):
        """`program` is what `jax.jit` returned."""
        self._program = program
        self._compiled: dict[int, Any] = {}

    @property
    def known(self) -> set[int]:
        """The row lengths compiled so far."""
        return set(self._compiled)

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """Those of some row lengths that have not been compiled, ascending."""
        return sorted(set(wanted) - self.known)

    def compile(self, wanted: Iterable[int], arguments: Callable[[int], tuple[Any, ...]]) -> float:
        """Compiles what is missing.

        Args:
            wanted: row lengths.
            arguments: those of the function for a length: arrays, or shapes with shardings.

        Returns:
            The seconds that it took.
        """
        start, new = time.perf_counter(), self.missing(wanted)
        lowered = [self._program.lower(*arguments(length)) for length in new]  # tracing: one thread
        # Several processes have to compile in one order: they may tune kernels together.
        threads = 1 if hosts.several() else min(THREADS, len(new))
        if threads <= 1:
            found = [one.compile() for one in lowered]
        else:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(lambda one: one.compile(), lowered))
        self._compiled.update(zip(new, found, strict=True))
        return time.perf_counter() - start

    def __call__(self, length: int, *args: Any) -> Any:
        """Runs the program for rows of this length.

        Raises:
            KeyError: it has not been compiled.
        """
        return self._compiled[length](*args)
