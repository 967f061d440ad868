"""What a run spends, and how the rows of metrics.jsonl say it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from sage_jax import config
from sage_jax.data import encode, groups, steps
from sage_jax.models import decoder
from sage_jax.runtime import chips


def train_passes(run: config.Run) -> float:
    """Forward passes that a train step is worth: its own, and a backward pass of as much for the
    inputs of each matrix product and again for its weights.

    Those that lie frozen under adapters need no gradient; adapters of a small rank cost nothing
    beside them.

    >>> train_passes(config.Run()), train_passes(config.resolve({"lora": {"rank": 8}}))
    (3.0, 2.0)
    """
    return 2.0 if run.lora.rank or run.lora.path else 3.0


@dataclasses.dataclass
class Counters:
    """What has been spent so far; in every checkpoint."""

    step: int = 0
    position: int = 0  # steps done in the current round
    pairs: int = 0
    tokens: int = 0
    pairs_reference: int = 0  # that the reference was asked about; the others were stored
    flops_reference: float = 0.0  # what every method needs before its first step
    flops_sampling: float = 0.0  # of new pairs: answers, and the reference's pass over them
    flops_scoring: float = 0.0
    flops_training: float = 0.0
    seconds_reference: float = 0.0
    seconds_compiling: float = 0.0  # of the train step and the scoring pass
    seconds_drawing: float = 0.0  # of the host: draw, select, plan the rows
    seconds_sampling: float = 0.0
    seconds_scoring: float = 0.0
    seconds_training: float = 0.0
    seconds_waiting: float = 0.0  # of training: the host had no batch ready
    seconds: float = 0.0  # of the commands that led to this checkpoint

    @property
    def flops(self) -> float:
        """All of them, sampling and scoring counted."""
        return self.flops_sampling + self.flops_scoring + self.flops_training

    @property
    def device_seconds(self) -> float:
        """Of sampling, scoring and training; without evaluation and compilation."""
        return self.seconds_sampling + self.seconds_scoring + self.seconds_training

    def add_reference(self, other: Counters) -> None:
        """Adds what other passes than those counted here spent on the reference."""
        self.pairs_reference += other.pairs_reference
        self.flops_reference += other.flops_reference
        self.seconds_reference += other.seconds_reference

    @property
    def scoring_seconds_fraction(self) -> float:
        """Share of the time in scoring passes, of that and the time in train steps."""
        total = self.seconds_scoring + self.seconds_training
        return self.seconds_scoring / total if total else 0.0

    @property
    def data_wait_fraction(self) -> float:
        """Share of the time in train steps in which the loop waited for a batch.

        The device may still be at work on the step before: it idles for this share at most.
        """
        total = self.seconds_training
        return min(self.seconds_waiting / total, 1.0) if total else 0.0

    def count(self, pairs: int, flops: float) -> None:
        """Counts one step over so many pairs and of so many floating-point operations."""
        self.step, self.position = self.step + 1, self.position + 1
        self.pairs += pairs
        self.flops_training += flops

    def row(self, pairs: int) -> dict[str, Any]:
        """The beginning of a row, for a data set of so many pairs."""
        return {
            "step": self.step,
            "epoch": self.pairs / pairs,
            "pairs": self.pairs,
            "flops": self.flops,
            **({"flops_sampling": self.flops_sampling} if self.flops_sampling else {}),
            "flops_scoring": self.flops_scoring,
            "flops_training": self.flops_training,
        }

    def clock(self) -> dict[str, float]:
        """`perf/seconds*` of everything up to now, cumulative like the FLOPs of a row."""
        row = {"perf/seconds": self.device_seconds}
        if self.seconds_sampling:
            row["perf/seconds_sampling"] = self.seconds_sampling
        for name in ("drawing", "scoring", "training"):
            row[f"perf/seconds_{name}"] = getattr(self, f"seconds_{name}")
        return row


def pair_flops(
    model: decoder.Model, pairs: encode.EncodedPairs, *, shared: bool = False
) -> np.ndarray:
    """Floating-point operations of one forward pass over each pair, float64 [N].

    Completion tokens alone pass through the head; `shared` prompts are computed once.
    """
    lengths = pairs.lengths_N2.astype(np.float64)
    per_token, per_score = model.forward_flops(1, 0, 0), model.forward_flops(0, 1)
    body = lengths * per_token + lengths * (lengths + 1) / 2 * per_score
    head = (lengths - pairs.start_N2) * model.forward_flops(0, 0, 1)
    total_N = (body + head).sum(axis=1)
    if shared:
        once = pairs.common_N.astype(np.float64)
        total_N -= once * per_token + once * (once + 1) / 2 * per_score
    return total_N


def flops(
    model: decoder.Model,
    pairs: encode.EncodedPairs,
    pair_KRS: np.ndarray,
    shape: steps.Shape,
    flops_N: np.ndarray | None = None,
) -> float:
    """Floating-point operations of one forward pass over the rows of a plan.

    Args:
        model: whose pass it is.
        pairs: the data set.
        pair_KRS: int [K, R, S], indices of pairs, -1 for an empty slot.
        shape: of the rows, which says what pairs share in them.
        flops_N: those of each pair alone, where they are known already.
    """
    if not shape.keys:
        if flops_N is None:
            flops_N = pair_flops(model, pairs, shared=shape.share)
        return float(flops_N[pair_KRS[pair_KRS >= 0]].sum())
    found = groups.work(pairs, pair_KRS, grouped=True)
    return model.forward_flops(*(int(x.sum()) for x in (found.tokens, found.attended, found.head)))


def step_flops(
    model: decoder.Model, pairs: encode.EncodedPairs, shape: steps.Shape, batch_pairs: int
) -> np.ndarray:
    """Floating-point operations of a forward pass that each pair adds to a random step, [N]."""
    flops_N = pair_flops(model, pairs, shared=shape.share)
    if not shape.keys:
        return flops_N
    placed = steps.drawn(pairs, shape, batch_pairs)
    alone = flops_N[placed[placed >= 0]].sum()
    return flops_N * flops(model, pairs, placed, shape) / alone


def speed(tokens: int, flops: float, seconds: float, peak_flops: float | None) -> dict[str, float]:
    """`perf/*` of one step: model FLOPs against the devices' peak where that is known."""
    row = {"perf/step_time": seconds, "perf/tokens_per_second": tokens / seconds}
    if peak_flops is not None:
        row["perf/mfu"] = flops / seconds / peak_flops
    return row


def peak_flops(dtype: str) -> float | None:
    """FLOP/s of all devices together; None where it is not known, as on CPUs or in float32."""
    one = chips.PEAK_FLOPS.get(jax.devices()[0].device_kind) if dtype == "bfloat16" else None
    return None if one is None else one * jax.device_count()


def peak_bytes() -> dict[str, float]:
    """`perf/peak_bytes` of the first device, where the backend reports it; CPUs do not."""
    found = jax.local_devices()[0].memory_stats() or {}
    return {"perf/peak_bytes": float(found["peak_bytes_in_use"])} if found else {}
