"""The batches of a round as a random-access source: step k is a function of the plan and k."""

from __future__ import annotations

import numpy as np

from sage_jax import batch
from sage_jax.data import encode, pack


class PlannedBatches:
    """The batches of a plan, built when asked for; a grain random-access source.

    Args:
      encoded: the data set.
      pair_KRS: int32 [K, R, S], a plan from `pack.plan`.
      row_length: tokens in a row.
      ref_logps_N2: float [N, 2], reference log-probabilities in nats, or None.
      weight_N: float [N], weights of the pairs, or None.
      process_index, process_count: each process builds an equal, contiguous share of the rows.

    Raises:
      ValueError: if the rows do not divide among the processes.
    """

    def __init__(
        self,
        encoded: encode.EncodedPairs,
        pair_KRS: np.ndarray,
        row_length: int,
        *,
        ref_logps_N2: np.ndarray | None = None,
        weight_N: np.ndarray | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        rows = pair_KRS.shape[1]
        if not 0 <= process_index < process_count or rows % process_count:
            raise ValueError(
                f"{rows} rows cannot be shared by process {process_index} of {process_count}; the "
                "number of rows must be a multiple of the number of processes."
            )
        share = rows // process_count
        self._local_KRS = pair_KRS[:, process_index * share : (process_index + 1) * share]
        self._encoded, self._row_length = encoded, row_length
        self._ref_logps_N2, self._weight_N = ref_logps_N2, weight_N

    def __len__(self) -> int:
        return len(self._local_KRS)

    def __getitem__(self, k: int) -> batch.PackedBatch:
        return pack.collate(
            self._encoded,
            self._local_KRS[k],
            self._row_length,
            ref_logps_N2=self._ref_logps_N2,
            weight_N=self._weight_N,
        )

    def __repr__(self) -> str:
        return f"PlannedBatches(shape={self._local_KRS.shape}, row_length={self._row_length})"
