"""How good the suspicions of a run were, step by step, where the truth is known.

Reads the checkpoints of a finished run whose pairs carry the column `flipped`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np


def average_precision(suspicion_N: np.ndarray, flipped_N: np.ndarray) -> float:
    """Mean precision at the ranks of the flipped pairs, most suspicious first."""
    hit = flipped_N[np.argsort(-suspicion_N, kind="stable")] > 0
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def judged(workdir: pathlib.Path, run: Any, every: int) -> list[dict[str, Any]]:
    """How good the suspicions were at each checkpoint of a run."""
    import orbax.checkpoint as ocp

    from sage_jax import curriculum, noise
    from sage_jax.runtime import dataset, setup, suspicion

    pairs = dataset.load_pairs(run, setup.load_tokenizer(run), run.data.train)
    flipped_N = pairs.columns["flipped"]
    found = []
    for step in range(every, run.train.steps + 1, every):
        where = (workdir / "checkpoints" / str(step) / "arrays").resolve()
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore(where)
        memory = curriculum.Memory(
            *(np.asarray(arrays[f"memory.{name}"]) for name in curriculum.Memory._fields)
        )
        held = noise.Held(*map(float, np.asarray(arrays["round.held_3"])))
        flips = suspicion.detect(memory, run, pairs, held)
        seen_N, suspected_N = np.isfinite(flips.posterior_N), flips.suspected_N
        row: dict[str, Any] = {
            "step": step, "share": flips.share, "gain": flips.gain, "acts": flips.many,
            "suspected": int(suspected_N.sum()), "seen": int(seen_N.sum()),
        }  # fmt: skip
        if flipped_N.any():
            right = float((flipped_N[suspected_N] > 0).sum())
            row |= {
                "precision": right / suspected_N.sum() if suspected_N.any() else None,
                "recall": right / float(flipped_N.sum()),
                "average_precision": average_precision(
                    -flips.log_odds_N[seen_N], flipped_N[seen_N]
                ),
            }
        found.append(row)
    return found
