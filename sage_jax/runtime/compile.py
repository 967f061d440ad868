"""`sage-jax compile`: the real steps of a run, compiled for a machine that is not there.

From shapes alone: no weights, no data, no accelerator (`runtime/lowering.py`). TPU topologies are
compiled by the TPU's own compiler, which comes with `libtpu`. By default for the longest pairs that
`data.max_length` admits.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time

import jax

from sage_jax import config
from sage_jax.runtime import compile_report, compile_tables, fit, hlo, lowering, planned, targets
from sage_jax.runtime import mesh as meshes

LARGEST = 4096  # pairs or prompts in a step, of those that are tried
MARGIN = 0.05  # of the usable memory that has to stay free: fragmentation, the runtime's own
_ALLOCATED = re.compile(r"required for [^(]*\(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)B? of")


def compile_step(step: lowering.Lowered, machine: targets.Target) -> compile_report.StepReport:
    """Compiles a step and reads what came out."""
    start = time.perf_counter()
    try:
        compiled = step.lower().compile()
    except Exception as e:
        used = out_of_memory(str(e))
        if used is None:
            raise
        return compile_report.too_large(step, machine, used, time.perf_counter() - start, MARGIN)
    seconds = time.perf_counter() - start
    totals, note = None, ""
    try:
        text = compiled.as_text()
        program = hlo.Program(text, unknown_trips=step.trips, keys=step.keys)
        totals = program.totals()
    except jax.errors.JaxRuntimeError as e:  # written by a libtpu that is newer than jaxlib
        said = str(e).splitlines()[0]
        note = (
            f"The program cannot be read ({said}), so only its memory is known. Install the "
            f"libtpu that belongs to this jax: pip install 'jax[tpu]=={jax.__version__}'."
        )
    return compile_report.read(
        step,
        machine,
        seconds=seconds,
        memory=compiled.memory_analysis(),
        cost=compiled.cost_analysis() or {},
        totals=totals,
        note=note,
        margin=MARGIN,
    )


def out_of_memory(said: str) -> float | None:
    """Bytes that a refused program needs, None for another error."""
    if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
        return None
    found = _ALLOCATED.search(said)
    if found is None:
        return math.inf
    number, unit = found.group(1) or found.group(3), found.group(2) or found.group(4)
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def largest(
    name: str, run: config.Run, mesh: jax.sharding.Mesh, machine: targets.Target,
    known: compile_report.StepReport, pairs: planned.Pairs | None = None,
) -> tuple[int, int, bool]:  # fmt: skip
    """The most pairs a step that fit the machine, how many compilations it took to know, and
    whether more than these `LARGEST` may fit.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails on a batch of another size.
    """
    unit = meshes.row_multiple(mesh)
    if name != "sample":
        unit *= run.train.accumulate
    size = "eval.batch" if name == "sample" else "train.batch_pairs"

    def bytes_of(units: int) -> float:
        run_ = config.replace(run, **{size: units * unit})
        if name != "sample":  # the pool follows, so that its check stays out of the way
            run_ = config.replace(run_, **{"curriculum.pool_size": 0})
        return compile_step(lowering.make_step(name, run_, mesh, pairs), machine).total_bytes

    now = run.eval.batch if name == "sample" else run.train.batch_pairs
    units, tried = fit.largest(
        bytes_of,
        machine.usable_bytes * (1 - MARGIN),
        now=max(1, round(now / unit)),
        bytes_now=known.total_bytes,
        most=LARGEST // unit,
    )
    return units * unit, tried, 0 < LARGEST // unit <= units


def _with_largest(
    report: compile_report.StepReport,
    run: config.Run,
    mesh: jax.sharding.Mesh,
    machine: targets.Target,
    pairs: planned.Pairs,
) -> compile_report.StepReport:
    """A step's report with the largest batch that fits, or with why it is not known."""
    try:
        most, tried, more = largest(report.name, run, mesh, machine, report, pairs)
    except jax.errors.JaxRuntimeError as e:  # the compiler's own error, on a batch of another size
        said = (str(e).splitlines() or [""])[0][:200]
        note = f"The largest batch is not known, for the compiler failed on another one: {said}"
        return dataclasses.replace(report, note=f"{report.note} {note}".strip())
    note = report.note
    if more:
        note = f"{note} The search ends at {LARGEST} pairs or prompts: more may fit.".strip()
    return dataclasses.replace(report, largest_batch=most, search_compilations=tried, note=note)


def run_mode(
    run: config.Run,
    *,
    topology: str,
    steps: str = "",
    search: bool = True,
    as_json: bool = False,
    length_mean: float | None = None,
    length_sigma: float | None = None,
    prompt_share: float = 0.0,
) -> int:
    """The mode `compile`: returns 0, or 3 when a step does not fit.

    Args:
        run: the settings.
        topology: see `targets.target`.
        steps: which of `lowering.STEPS`, joined by commas; "" = train, score and sample.
        search: also find the largest batch that fits.
        as_json: print JSON instead of tables.
        length_mean, length_sigma, prompt_share: of the pairs to plan rows for, see
            `planned.pairs`.

    Raises:
        ValueError: an unknown step or topology, lengths that there cannot be, or a mesh that the
            topology does not fill.
    """
    names = [n for n in steps.split(",") if n] or ["train", "score", "sample"]
    for name in names:
        if name not in lowering.STEPS:
            raise ValueError(f"--steps={steps}: {name!r} is none of {', '.join(lowering.STEPS)}.")
    pairs = planned.pairs(
        run.data.max_length,
        length_mean=length_mean,
        length_sigma=length_sigma,
        prompt_share=prompt_share,
    )
    machine = targets.target(topology)
    mesh = lowering.make_mesh(run, machine)
    reports = []
    for name in names:
        found = compile_step(lowering.make_step(name, run, mesh, pairs), machine)
        if search:
            found = _with_largest(found, run, mesh, machine, pairs)
        reports.append(dataclasses.replace(found, changes=compile_report.changes(found, run, mesh)))
    compile_tables.show(run, machine, mesh, reports, pairs.said, as_json=as_json)
    return 0 if all(r.fits for r in reports) else 3
