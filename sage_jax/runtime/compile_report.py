"""What a compiled step costs, and whether it fits: figures from the compiler, and a roofline.

Nothing here is a measurement. Seconds are bounds from data sheets (`runtime/chips.py`): the time of
the arithmetic at the chip's peak, of the traffic to main memory at its bandwidth, and of the
collectives over their links. A perfect program overlaps the three and takes the longest; one that
overlaps nothing takes their sum.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax

from sage_jax import config
from sage_jax.runtime import chips, hlo, targets
from sage_jax.runtime import mesh as meshes

if TYPE_CHECKING:
    from sage_jax.runtime import lowering

# Of one collective that brings `bytes` together in a group of n: the share that crosses a link.
_RING = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n / 2,
    "ragged-all-to-all": lambda n: (n - 1) / n / 2,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Lower bounds of one step, by what limits it."""

    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """All three at the same time."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        """One after the other."""
        return self.compute + self.memory + self.collectives

    @property
    def bound(self) -> str:
        """Which of the three is longest."""
        named = dataclasses.asdict(self)
        return max(named, key=lambda name: named[name])


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One compiled step; bytes, FLOPs and seconds are those of one device."""

    name: str
    pairs: float
    tokens: float
    compile_seconds: float
    argument_bytes: float
    output_bytes: float
    alias_bytes: float  # of the output that lie in the place of donated arguments
    temporary_bytes: float
    code_bytes: float
    beside_bytes: float  # in a training, of what the program does not see
    usable_bytes: float
    margin: float  # of the usable bytes that has to stay free
    model_flops: float  # of the batch on all devices, nothing recomputed
    flops: float = 0.0
    main_bytes: float = 0.0
    xla_flops: float = 0.0  # as the compiler says, which counts a loop's body once
    xla_bytes: float = 0.0
    optimal_seconds: float | None = None  # the compiler's, by its cycles; None where it has none
    seconds: Seconds | None = None  # None: a machine without a data sheet, or a refused program
    mfu: float | None = None
    collectives: tuple[dict[str, Any], ...] = ()  # kind, count, bytes, seconds
    opaque: tuple[str, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    largest_batch: int | None = None  # pairs (prompts for `sample`) that fit; None: not searched
    search_compilations: int = 0
    note: str = ""
    changes: tuple[str, ...] = ()  # what to do when it does not fit
    rows: int = 0  # 0: a step without rows
    row_length: int = 0
    longer: tuple[int, ...] = ()  # row lengths of the few steps that need more; not compiled
    shared: bool = False  # both answers of a pair share one prompt
    keys: float = 0.0  # that attention computes for a query, by the blocks of the planned rows
    refused: bool = False  # by the compiler, for its size, which then is in `temporary_bytes`

    @property
    def total_bytes(self) -> float:
        """Everything that lies in a device's memory while the step runs."""
        inside = self.argument_bytes + self.output_bytes - self.alias_bytes
        return inside + self.temporary_bytes + self.code_bytes + self.beside_bytes

    @property
    def free(self) -> float:
        """Share of the usable memory that is left; negative when it does not fit."""
        return 1 - self.total_bytes / self.usable_bytes

    @property
    def fits(self) -> bool:
        """Whether the margin is left free."""
        return self.free >= self.margin

    @property
    def padding(self) -> float:
        """Share of the tokens of the rows that belong to no pair."""
        room = self.rows * self.row_length
        return 1 - self.tokens / room if room else 0.0

    @property
    def computed_per_pair(self) -> float:
        """Tokens that go through the model for a pair, padding counted."""
        return self.rows * self.row_length / self.pairs

    def tokens_per_second(self, *, overlapped: bool = True) -> float | None:
        """Of all devices, at the bound; padding not counted."""
        return self._rate(self.tokens, overlapped)

    def pairs_per_second(self, *, overlapped: bool = True) -> float | None:
        """Of all devices, at the bound; prompts for `sample`."""
        return self._rate(self.pairs, overlapped)

    def _rate(self, count: float, overlapped: bool) -> float | None:
        if self.seconds is None:
            return None
        time = self.seconds.overlapped if overlapped else self.seconds.serial
        return count / time if time else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        if self.seconds is not None:
            found["seconds"] |= {
                "overlapped": self.seconds.overlapped,
                "serial": self.seconds.serial,
                "bound": self.seconds.bound,
            }
        for name in ("total_bytes", "free", "fits", "padding", "computed_per_pair"):
            found[name] = getattr(self, name)
        for name in ("tokens_per_second", "pairs_per_second"):
            found[name] = getattr(self, name)()
            found[f"{name}_serial"] = getattr(self, name)(overlapped=False)
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        return {key: finite(value) for key, value in found.items()}


def read(
    step: lowering.Lowered,
    machine: targets.Target,
    *,
    seconds: float,
    memory: Any,
    cost: dict[str, float],
    totals: hlo.Totals | None,
    margin: float,
    note: str = "",
) -> StepReport:
    """The report of a program that compiled.

    Args:
        step: the step.
        machine: what it was compiled for.
        seconds: that the compilation took.
        memory: of `Compiled.memory_analysis()`.
        cost: of `Compiled.cost_analysis()`.
        totals: of the compiled text; None where it cannot be read.
        margin: share of the memory that has to stay free.
        note: what the reader should know besides.
    """
    chip = machine.chip if totals is not None else None
    totals = totals or hlo.Totals(0.0, 0.0, 0.0, (), (), ())
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in totals.collectives:
        found = by_kind[one.kind]
        found[0] += one.count
        found[1] += one.total_bytes
        found[2] += collective_seconds(one, machine)
    collectives: tuple[dict[str, Any], ...] = tuple(
        {"kind": kind, "count": found[0], "bytes": found[1], "seconds": found[2]}
        for kind, found in sorted(by_kind.items(), key=lambda item: -item[1][1])
    )
    bound = optimal = mfu = None
    if chip is not None:
        bound = Seconds(
            totals.flops / chip.flops,
            totals.main_bytes / chip.memory_bandwidth,
            sum(one["seconds"] for one in collectives),
        )
        peak = chip.flops * len(machine.devices)
        mfu = step.model_flops / peak / bound.overlapped if bound.overlapped else None
        optimal = totals.cycles / chip.clock if totals.cycles else None
    return StepReport(
        step.name,
        step.pairs,
        step.tokens,
        seconds,
        float(memory.argument_size_in_bytes),
        float(memory.output_size_in_bytes),
        float(memory.alias_size_in_bytes),
        float(memory.temp_size_in_bytes),
        float(memory.generated_code_size_in_bytes),
        step.beside_bytes,
        machine.usable_bytes,
        margin,
        step.model_flops,
        flops=totals.flops,
        main_bytes=totals.main_bytes,
        xla_flops=float(cost.get("flops", 0.0)),
        xla_bytes=float(cost.get("bytes accessed", 0.0)),
        optimal_seconds=optimal,
        seconds=bound,
        mfu=mfu,
        collectives=collectives,
        opaque=totals.opaque,
        unknown_loops=totals.unknown_loops,
        note=note,
        **_rows(step),
    )


def _rows(step: lowering.Lowered) -> dict[str, Any]:
    """What the report of a step says of its rows."""
    rows, length = step.rows
    return {
        "rows": rows, "row_length": length, "longer": step.longer, "shared": step.shared,
        "keys": step.keys,
    }  # fmt: skip


def too_large(
    step: lowering.Lowered, machine: targets.Target, used: float, seconds: float, margin: float
) -> StepReport:
    """The report of a program that the compiler refused for its size."""
    return StepReport(
        step.name, step.pairs, step.tokens, seconds, 0.0, 0.0, 0.0, used, 0.0,
        step.beside_bytes, machine.usable_bytes, margin, step.model_flops, refused=True,
        **_rows(step),
    )  # fmt: skip


def collective_seconds(one: hlo.Collective, machine: targets.Target) -> float:
    """The least time of a collective, in all its repetitions, over links that nobody else uses."""
    if machine.chip is None or one.groups < 2 or not one.total_bytes:
        return 0.0
    places = [machine.coordinates[i] for i in one.group if i < len(machine.coordinates)]
    speed = chips.ring_bandwidth(machine.chip, places, machine.extent)
    if one.kind == "collective-permute":
        speed = machine.chip.link_bandwidth
    return _RING[one.kind](one.groups) * one.total_bytes / speed


def changes(report: StepReport, run: config.Run, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """What would make a step fit, the cheapest first."""
    if report.fits:
        return ()
    found = []
    shape, devices = mesh.shape, mesh.size
    rows = meshes.row_multiple(mesh)
    key, size = "train.batch_pairs", run.train.batch_pairs
    if report.name == "sample":
        key, size = "eval.batch", run.eval.batch
    if report.largest_batch:
        found.append(f"config.{key}={report.largest_batch}, the largest that fits")
    elif report.largest_batch is None and size > rows:
        found.append(f"config.{key}={max(rows, size // 2 // rows * rows)}, half the rows a device")
    if report.name == "train" and run.model.remat != "full":
        found.append("config.model.remat=full, which keeps the layers' inputs alone")
    if run.model.dtype == "float32":
        found.append("config.model.dtype=bfloat16, half the activations")
    if report.name == "train" and size // run.train.accumulate > rows:
        found.append(
            f"config.train.accumulate={2 * run.train.accumulate}: parts one after the other"
        )
    fixed = report.argument_bytes + report.beside_bytes
    heavy = fixed > report.usable_bytes / 4 or not fixed
    if shape["fsdp"] < devices and heavy:
        found.append(
            f"config.mesh.fsdp={devices // shape['tensor']} and config.mesh.data=1: weights and "
            f"moments over more devices"
        )
    if report.name == "train" and run.optim.moments_dtype == "float32" and heavy:
        found.append("config.optim.moments_dtype=bfloat16, half of Adam's moments")
    if "context" in shape and report.name != "sample":
        found.append(
            f"config.mesh.context={2 * shape['context']} (fsdp or data divided by 2): rows cut "
            f"over more devices"
        )
    if report.name != "sample":
        found.append(f"config.data.max_length={run.data.max_length // 2}: shorter rows")
    found.append(f"a topology of more than {devices} devices")
    return tuple(found)
