"""Delivering the batches of a round: built ahead by threads, in order, from any position."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from sage_jax import batch
from sage_jax.data import encode, pool, steps


def batches(
    encoded: encode.EncodedPairs,
    pair_KRS: np.ndarray,
    row_length: int,
    *,
    ref_logps_N2: np.ndarray | None = None,
    weight_N: np.ndarray | None = None,
    start: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    rows_L: np.ndarray | None = None,
    shape: steps.Shape | None = None,
) -> Generator[batch.PackedBatch]:
    """The batches `start`, `start + 1`, ... of a plan, as numpy arrays.

    The position in a round is all there is to save: starting at k gives what an uninterrupted
    iterator gives from its k-th batch on.

    Args:
      encoded: the data set.
      pair_KRS: int32 [K, R, S], a plan from `pack.plan`.
      row_length: tokens in a row.
      ref_logps_N2: float [N, 2], reference log-probabilities in nats, or None.
      weight_N: float [N], weights of the pairs in the loss, or None.
      start: first batch, in [0, K].
      threads: threads that build batches ahead; 0 builds them when asked for.
      prefetch: batches built ahead.
      shape: as in `pool.PlannedBatches`.
      rows_L: int, the rows of each batch to build (of several processes, each its own); None = all.

    Returns:
      An iterator; closing it ends its threads.

    Raises:
      ValueError: if `start` or a row lies outside the plan.
      RuntimeError: if building a batch fails. A failure never looks like the end of the data.
    """
    source = pool.PlannedBatches(
        encoded,
        pair_KRS,
        row_length,
        ref_logps_N2=ref_logps_N2,
        weight_N=weight_N,
        rows_L=rows_L,
        shape=shape,
    )
    if not 0 <= start <= len(source):
        raise ValueError(f"start={start} lies outside the plan of {len(source)} batches.")
    return iterate(source, start=start, threads=threads, prefetch=prefetch)


def iterate(source: Any, *, start: int = 0, threads: int = 2, prefetch: int = 4) -> Generator[Any]:
    """The elements of a random-access source from `start` on, each exactly once, in order.

    Args:
      source: anything with `__len__` and `__getitem__`.
      start, threads, prefetch: as in `batches`.

    Raises:
      RuntimeError: if an element cannot be had.
    """
    if start == len(source):
        return
    import grain

    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
    )
    dataset = grain.MapDataset.source(_Guarded(source))[start:].to_iter_dataset(options)
    iterator = iter(dataset)
    delivered = start
    try:
        for element in iterator:
            yield element
            delivered += 1
    finally:
        iterator.close()
    if delivered != len(source):
        raise RuntimeError(
            f"The loader ended after batch {delivered} of {len(source)}; it must deliver all."
        )


class _Guarded:
    """A source whose failures are RuntimeErrors.

    A StopIteration or IndexError raised while building an element would otherwise read as the end
    of the data, and training would end as if it had finished.
    """

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, k: int) -> Any:
        try:
            element = self._source[k]
        except Exception as e:
            raise RuntimeError(f"Building batch {k} of {self._source!r} failed: {e!r}") from e
        if element is None:  # grain skips None
            raise RuntimeError(f"Building batch {k} of {self._source!r} gave None.")
        return element

    def __repr__(self) -> str:
        return repr(self._source)
