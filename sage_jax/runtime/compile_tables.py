"""The reports of compiled steps as people read them: tables, and what to change; or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax

from sage_jax import config
from sage_jax.report import progress
from sage_jax.runtime import targets
from sage_jax.runtime.compile_report import StepReport


def show(
    run: config.Run,
    machine: targets.Target,
    mesh: jax.sharding.Mesh,
    reports: Sequence[StepReport],
    said: str,
    *,
    as_json: bool,
) -> None:
    """Prints the reports of a topology; `said` is what the pairs are like."""
    if as_json:
        print(json.dumps(as_dict(run, machine, mesh, reports, said), indent=1))
        return
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "none"
    print(
        f"{run.model.path} in {run.model.dtype}, remat {run.model.remat}, for {machine.name}: "
        f"{len(machine.devices)} devices (mesh: {axes}), {_gib(machine.usable_bytes)} usable on "
        f"each.\nPairs: {said}{_rows_said(run, reports)}.\n"
        f"From the compiled programs, per device; nothing was run.\n"
    )
    print(progress.table(["memory", *(r.name for r in reports)], _memory_rows(reports)))
    print()
    print(progress.table(["one step", *(r.name for r in reports)], _cost_rows(reports)))
    for report in reports:
        if report.collectives:
            rows = [
                [one["kind"], f"{one['count']:.0f}", _gib(one["bytes"]), _time(one["seconds"])]
                for one in report.collectives
            ]
            heads = [f"{report.name}: collectives", "count", "bytes", "at least"]
            print("\n" + progress.table(heads, rows))
    for report in reports:
        if report.note:
            print(f"\n{report.name}: {report.note}")
        for name in report.opaque:
            print(f"\n{report.name}: {name} does not say what it costs; it counts as 0.")
        if report.unknown_loops:
            print(
                f"\n{report.name}: loops that end by a condition on data are counted to their "
                f"limit."
            )
        if report.longer:
            print(
                f"\n{report.name}: the few steps whose pairs are longer together take rows of "
                f"{' or '.join(map(str, report.longer))} tokens, and their memory with them."
            )
        if not report.fits:
            print(f"\n{report.name} does not fit: {_why(report)}\nWhat to change:")
            for change in report.changes:
                print(f"  {change}")


def _why(report: StepReport) -> str:
    """Why a step does not fit."""
    usable, margin = _gib(report.usable_bytes), report.margin
    limit = f"of {usable} that a program may use, {margin:.0%} have to stay free."
    if not report.refused:
        return f"it takes {_gib(report.total_bytes)} of a device's memory; {limit}"
    beside = f" In a training {_gib(report.beside_bytes)} lie beside it;"
    if not math.isfinite(report.temporary_bytes):
        return (
            f"the compiler refused it for its size, and did not say what it needs.{beside} {limit}"
        )
    return f"the compiler refused it, for it needs {_gib(report.temporary_bytes)}.{beside} {limit}"


def as_dict(
    run: config.Run,
    machine: targets.Target,
    mesh: jax.sharding.Mesh,
    reports: Sequence[StepReport],
    said: str,
) -> dict[str, Any]:
    """The reports of a topology, for JSON."""
    return {
        "topology": machine.name,
        "devices": len(machine.devices),
        "mesh": dict(mesh.shape),
        "chip": None if machine.chip is None else dataclasses.asdict(machine.chip),
        "config": config.as_dict(run),
        "pairs": said,
        "steps": {report.name: report.as_dict() for report in reports},
        "fits": all(report.fits for report in reports),
    }


def _rows_said(run: config.Run, reports: Sequence[StepReport]) -> str:
    """How the pairs lie in rows."""
    if not any(r.rows for r in reports):
        return ""
    packed = "packed" if run.data.packing else "one in a row"
    shared = "shared" if any(r.shared for r in reports) else "not shared"
    return f"; {packed}, prompts {shared} (--length_mean and --prompt_share plan for others)"


def _memory_rows(reports: Sequence[StepReport]) -> list[list[str]]:
    def text(report: StepReport, name: str) -> str:
        unknown = report.refused and name not in ("beside_bytes", "total_bytes")
        return "-" if unknown else _gib(getattr(report, name))

    rows = [
        [label, *(text(r, name) for r in reports)]
        for label, name in (
            ("arguments", "argument_bytes"),
            ("temporaries", "temporary_bytes"),
            ("output", "output_bytes"),
            ("  of it in place of arguments", "alias_bytes"),
            ("program", "code_bytes"),
            ("beside it in a training", "beside_bytes"),
            ("together", "total_bytes"),
        )
    ]
    rows.append(["free", *("-" if r.refused else f"{100 * r.free:.1f} %" for r in reports)])
    rows.append(["fits", *("yes" if r.fits else "NO" for r in reports)])
    if any(r.largest_batch is not None for r in reports):
        most = {None: "-", 0: "none"}
        cells = (most.get(r.largest_batch, str(r.largest_batch)) for r in reports)
        rows.append(["largest batch that fits", *cells])
    return rows


def _cost_rows(reports: Sequence[StepReport]) -> list[list[str]]:
    def each(label: str, text: Any) -> list[str]:
        return [label, *(text(r) for r in reports)]

    def of(name: str) -> Any:
        return lambda r: _time(getattr(r.seconds, name)) if r.seconds else "-"

    def rate(name: str) -> Any:
        def text(r: StepReport) -> str:
            most, least = getattr(r, name)(), getattr(r, name)(overlapped=False)
            if most is None:
                return "-"
            return f"{least:,.{_digits(least)}f} - {most:,.{_digits(most)}f}"

        return text

    def mfu(r: StepReport) -> str:
        if r.mfu is None or r.seconds is None:
            return "-"
        return f"{100 * r.mfu * r.seconds.overlapped / r.seconds.serial:.1f} - {100 * r.mfu:.1f} %"

    rows = [
        each("pairs (sample: prompts)", lambda r: f"{r.pairs:.0f}"),
        each("tokens, padding left out", lambda r: f"{r.tokens:.0f}"),
        each("rows x tokens", lambda r: f"{r.rows} x {r.row_length}" if r.rows else "-"),
        each("padding", lambda r: f"{100 * r.padding:.1f} %" if r.rows else "-"),
        each("tokens computed a pair", lambda r: f"{r.computed_per_pair:.0f}" if r.rows else "-"),
        each("keys computed a query", lambda r: f"{r.keys:.0f}" if r.keys else "-"),
        each("TFLOP", lambda r: "-" if r.refused else f"{r.flops / 1e12:.4g}"),
        each("bytes to and from memory", lambda r: "-" if r.refused else _gib(r.main_bytes)),
        each("arithmetic at the peak", of("compute")),
        each("memory at its bandwidth", of("memory")),
        each("collectives over their links", of("collectives")),
        each("compiler's estimate, no collectives", lambda r: _time(r.optimal_seconds)),
        each("limit", lambda r: r.seconds.bound if r.seconds else "-"),
        each("pairs/s, serial - overlapped", rate("pairs_per_second")),
        each("tokens/s, serial - overlapped", rate("tokens_per_second")),
        each("MFU, serial - overlapped", mfu),
        each("seconds to compile", lambda r: f"{r.compile_seconds:.1f}"),
    ]
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def _digits(value: float) -> int:
    """Decimals that leave three figures of a number."""
    return max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0


def _gib(size: float) -> str:
    if not math.isfinite(size):
        return "too much"
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
