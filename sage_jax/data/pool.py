"""The batches of a round as a random-access source: step k is a function of the plan and k."""

from __future__ import annotations

import numpy as np

from sage_jax import batch
from sage_jax.data import encode, pack, steps


class PlannedBatches:
    """The batches of a plan, built when asked for; a grain random-access source.

    Args:
      encoded: the data set.
      pair_KRS: int32 [K, R, S], a plan from `pack.plan`.
      row_length: tokens in a row.
      ref_logps_N2: float [N, 2], reference log-probabilities in nats, or None.
      weight_N: float [N], weights of the pairs, or None.
      shape: row lengths to choose from for each batch, and whether prompts are shared; None =
        `row_length`, and they are not.
      rows_L: int, the rows of each batch to build, such as those that this process needs; None =
        all.

    Raises:
      ValueError: if a row lies outside the plan.
    """

    def __init__(
        self,
        encoded: encode.EncodedPairs,
        pair_KRS: np.ndarray,
        row_length: int,
        *,
        ref_logps_N2: np.ndarray | None = None,
        weight_N: np.ndarray | None = None,
        rows_L: np.ndarray | None = None,
        shape: steps.Shape | None = None,
    ):
        rows = pair_KRS.shape[1]
        if rows_L is not None and len(rows_L) and not 0 <= min(rows_L) <= max(rows_L) < rows:
            raise ValueError(
                f"rows_L={list(rows_L)} of a plan with {rows} rows; each must lie in [0, {rows})."
            )
        self._local_KRS = pair_KRS if rows_L is None else pair_KRS[:, rows_L]
        self._encoded, self._shape = encoded, shape
        self._length_K = np.full(len(pair_KRS), row_length)
        if shape is not None:
            self._length_K[:] = steps.lengths(encoded, pair_KRS, shape)
        self._ref_logps_N2, self._weight_N = ref_logps_N2, weight_N

    def __len__(self) -> int:
        return len(self._local_KRS)

    def __getitem__(self, k: int) -> batch.PackedBatch:
        length, shape = int(self._length_K[k]), self._shape
        return pack.collate(
            self._encoded,
            self._local_KRS[k],
            length,
            ref_logps_N2=self._ref_logps_N2,
            weight_N=self._weight_N,
            share=shape is not None and shape.share,
            keys=0 if shape is None else shape.keys_of(length),
        )

    def __repr__(self) -> str:
        longest = self._length_K.max(initial=0)
        return f"PlannedBatches(shape={self._local_KRS.shape}, row_length={longest})"
