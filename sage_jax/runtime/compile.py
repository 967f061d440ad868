"""`sage-jax compile`: the real steps of a run, compiled for a machine that is not there.

From shapes alone: no weights, no data, no accelerator. TPU topologies are compiled by the TPU's own
compiler, which comes with `libtpu`. Rows are planned as a run plans them, for pairs of stated
lengths (`runtime/planned.py`); by default for the longest that `data.max_length` admits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import config, logprobs
from sage_jax.data import steps as row_shapes
from sage_jax.models import (
    attention,
    attention_tpu,
    catalog,
    decoder,
    hf,
    hf_config,
    lora,
    quantised,
    sources,
    spec,
    tensors,
)
from sage_jax.runtime import (
    ahead,
    compile_report,
    compile_tables,
    counters,
    fit,
    forward,
    hlo,
    planned,
    programs,
    setup,
    state,
    targets,
)  # fmt: skip
from sage_jax.runtime import mesh as meshes

STEPS = ("train", "score", "eval", "sample")
LARGEST = 4096  # pairs or prompts in a step, of those that are tried
MARGIN = 0.05  # of the usable memory that has to stay free: fragmentation, the runtime's own
_ALLOCATED = re.compile(r"required for [^(]*\(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)B? of")


def make_mesh(run: config.Run, machine: targets.Target) -> jax.sharding.Mesh:
    """The mesh of the settings on the devices of a topology."""
    return meshes.make_mesh(**dataclasses.asdict(run.mesh), devices=machine.devices)


def abstract_policy(run: config.Run, mesh: jax.sharding.Mesh) -> setup.Policy:
    """The model of a run with shapes in place of weights.

    `model.path` may be "spec:NAME", a directory of which only config.json is read, or "new".
    """
    model = setup.on_mesh(run, decoder.Model(model_spec(run)), mesh)
    shapes = tensors.abstract(model.spec)
    base = placed(shapes, meshes.shardings(shapes, mesh))
    policy = setup.Policy(model, base, None, "", mesh)
    settings = setup.lora_settings(run)
    if run.lora.base != config.Lora.base:
        held = jax.eval_shape(lambda p: quantised.hold(p, run.lora.base, run.model.dtype), shapes)
        shapes, base = held, placed(held, meshes.shardings(held, mesh))
    if run.lora.path:
        raise ValueError(
            f"config.lora.path={run.lora.path!r} names an adapter, whose files a dry run does not "
            f"read. Set config.lora.rank and lora.targets to what it has."
        )
    if settings is None:
        return policy
    adapter = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, settings), shapes)
    return dataclasses.replace(
        policy,
        params=placed(adapter, meshes.shardings(adapter, mesh)),
        frozen=base,
        lora=settings,
    )


def model_spec(run: config.Run) -> spec.ModelSpec:
    """The architecture of `model.path`, from a name, a config.json or the settings.

    Raises:
        ValueError: none of these is there.
    """
    path = run.model.path
    named = catalog.named(path)
    if named is not None:
        return named
    if path == "new" or not path:
        return setup.new_spec(run, setup.load_tokenizer(run))
    where = sources.resolve(path)
    if (where / "config.json").is_file():
        file = where / "config.json"
        return hf_config.from_hf(hf.read_json(file), None, origin=str(file))
    model, _ = hf.load(path)  # a GGUF file: its header alone has no reader of its own
    return model.spec


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where their arrays live."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def row_shape(
    run: config.Run, mesh: jax.sharding.Mesh, pairs: planned.Pairs, share: bool
) -> row_shapes.Shape:
    """The rows that a run with such pairs plans."""
    lengths_N = pairs.row_lengths(share)
    if len(lengths_N) < run.train.batch_pairs:  # all alike
        lengths_N = np.resize(lengths_N, run.train.batch_pairs)
    return setup.row_shape(run, lengths_N, mesh, share=share)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step ready to be compiled, and what its figures are held against."""

    name: str
    lower: Callable[[], Any]
    pairs: float  # that one run of it handles; prompts for `sample`
    tokens: float  # of these pairs that lie in the rows; prompts that they share count once
    model_flops: float  # of the whole batch, by the closed form, nothing recomputed
    beside_bytes: float  # on each device in a training, besides what the program sees
    trips: Callable[[str], float]  # of loops that end by a condition on data, by their path
    keys: float = 0.0  # that attention computes for a query, see `planned.keys_computed`
    rows: tuple[int, int] = (0, 0)  # their number and their length; `sample` has none
    longer: tuple[int, ...] = ()  # row lengths of the few steps whose pairs do not fit into these
    shared: bool = False  # both answers of a pair share one prompt in their row


def make_step(
    name: str, run: config.Run, mesh: jax.sharding.Mesh, pairs: planned.Pairs | None = None
) -> Lowered:
    """One of `STEPS`, as the run would run it on such pairs; None: on the longest there may be."""
    run = config.settle_data(run, {})
    policy = abstract_policy(run, mesh)
    if name == "sample":
        return _sample_step(run, policy, mesh)
    pairs = planned.pairs(run.data.max_length) if pairs is None else pairs
    share = planned.shares(run, policy.model, pairs)
    shape = row_shape(run, mesh, pairs, share)
    rows = ahead.rows_of(shape, shape.row_length, mesh)
    count = min(run.train.batch_pairs, shape.rows * shape.slots)
    flops_N = counters.pair_flops(policy.model, pairs, shared=share)  # type: ignore[arg-type]
    flops = count * float(flops_N.mean())
    tokens = count * float(pairs.row_lengths(share).mean())
    answers = count * float((pairs.lengths_N2 - pairs.start_N2).sum(axis=1).mean())
    keys = _keys(run, mesh, pairs, shape, count)
    trips = _trips(policy, shape, mesh, answers, keys)
    about: dict[str, Any] = {
        "keys": keys,
        "rows": (shape.rows, shape.row_length),
        "longer": tuple(size for size in shape.sizes if size > shape.row_length),
        "shared": share,
    }
    tx, _ = state.make_optimizer(run)
    weights = device_bytes(policy.params)  # with adapters: these alone
    if name == "train":
        loss = setup.make_loss(run)
        program = programs.train_step(run, policy, mesh, tx, loss, setup.make_score_fn(run, loss))
        start = state.abstract_state(run, policy.params, mesh)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        now = programs.now(run, nll_weight=number, soft=number)
        # The weights that training started from stay: they are the reference of evaluations.
        return Lowered(
            name,
            lambda: program.lower(start, policy.frozen, rows, now),
            count,
            tokens,
            counters.train_passes(run) * flops,
            weights,
            trips,
            **about,
        )
    # In a training, the optimizer's state and the first weights lie beside a forward pass.
    beside = device_bytes(state.abstract_state(run, policy.params, mesh))
    params, frozen = policy.params, policy.frozen
    light = name == "score"
    dtype = run.selection.scoring_dtype if light else ""
    if dtype:
        beside += weights + device_bytes(frozen)
        cast = jax.eval_shape(functools.partial(forward.cast, dtype=dtype), (params, frozen))
        params, frozen = placed(cast, meshes.shardings(cast, mesh))
    program = programs.stats_step(
        policy, mesh, logit_norm="logit_norm" in run.selection.stability, light=light, dtype=dtype
    )
    return Lowered(
        name,
        lambda: program.lower(params, frozen, rows),
        count,
        tokens,
        flops,
        beside,
        trips,
        **about,
    )


def _sample_step(run: config.Run, policy: setup.Policy, mesh: jax.sharding.Mesh) -> Lowered:
    new = run.eval.max_new_tokens
    prompt = max(32, 1 << (max(run.data.max_length - new, 1).bit_length() - 1))
    parts = meshes.row_multiple(mesh)
    count = -(-run.eval.batch // parts) * parts
    program, arguments = programs.sampler(
        policy, prompts=count, prompt_length=prompt, max_new_tokens=new
    )
    lengths = np.full((count, 1), prompt + new)
    beside = device_bytes(state.abstract_state(run, policy.params, mesh))
    block = _block(run, mesh, prompt)
    # of the last stretch of a prompt, which has the most
    keys = prompt - (prompt // mesh.shape[meshes.CONTEXT] - block) / 2 if block else prompt
    return Lowered(
        "sample", lambda: program.lower(*arguments), count, float(count * new),
        _forward_flops(policy.model, lengths), beside, lambda _: new, keys,
    )  # fmt: skip


def _kernel(run: config.Run, mesh: jax.sharding.Mesh, length: int) -> str:
    """The back end of attention that a run takes for rows of so many tokens."""
    return attention.Placement(run.model.attention, mesh).chosen(length)


def _block(run: config.Run, mesh: jax.sharding.Mesh, length: int) -> int | None:
    """Queries and keys of the blocks that the run's attention skips; None: it skips none."""
    kernel = _kernel(run, mesh, length)
    if kernel == "dense":
        return None
    if kernel == "splash":
        return attention_tpu.block_size(length // mesh.shape[meshes.CONTEXT])
    return attention.BLOCK


def _keys(
    run: config.Run,
    mesh: jax.sharding.Mesh,
    pairs: planned.Pairs,
    shape: row_shapes.Shape,
    batch_pairs: int,
) -> float:
    """Keys that the run's attention computes for a query."""
    block = _block(run, mesh, shape.row_length)
    if block is None:
        return shape.row_length
    splash = _kernel(run, mesh, shape.row_length) == "splash"
    how: dict[str, Any] = {"passes": attention_tpu.passes} if splash else {}
    parts, stretches = meshes.row_multiple(mesh), mesh.shape[meshes.CONTEXT]
    return planned.keys_computed(
        pairs, shape, batch_pairs, parts=parts, stretches=stretches, block=block, **how
    )


def _trips(
    policy: setup.Policy,
    shape: row_shapes.Shape,
    mesh: jax.sharding.Mesh,
    answers: float,
    keys: float,
) -> Callable[[str], float]:
    """How often loops over data run: over the tokens of answers, evenly spread over the devices;
    and over the keys that attention in blocks computes for a query."""
    parts = mesh.size // mesh.shape["tensor"]
    tokens = shape.rows * shape.row_length // parts
    all_ = logprobs.head_chunks(tokens, policy.model.spec.vocab, setup.head_memory(mesh).chunk)
    head = math.ceil(all_ * min(answers / parts / tokens, 1.0))
    blocks = max(keys / attention.BLOCK, 1.0)
    return lambda path: blocks if "attention" in path else head


def _forward_flops(model: decoder.Model, lengths: np.ndarray) -> float:
    tokens = float(lengths.sum())
    attended = float((lengths.astype(np.float64) * (lengths + 1) / 2).sum())
    return model.forward_flops(tokens, attended)  # type: ignore[arg-type]


def device_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of placed shapes."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def compile_step(lowered: Lowered, machine: targets.Target) -> compile_report.StepReport:
    """Compiles a step and reads what came out."""
    start = time.perf_counter()
    try:
        compiled = lowered.lower().compile()
    except Exception as e:
        used = out_of_memory(str(e))
        if used is None:
            raise
        return compile_report.too_large(lowered, machine, used, time.perf_counter() - start, MARGIN)
    seconds = time.perf_counter() - start
    totals, note = None, ""
    try:
        text = compiled.as_text()
        program = hlo.Program(text, unknown_trips=lowered.trips, keys=lowered.keys)
        totals = program.totals()
    except jax.errors.JaxRuntimeError as e:  # written by a libtpu that is newer than jaxlib
        said = str(e).splitlines()[0]
        note = (
            f"The program cannot be read ({said}), so only its memory is known. Install the "
            f"libtpu that belongs to this jax: pip install 'jax[tpu]=={jax.__version__}'."
        )
    return compile_report.read(
        lowered,
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
        return compile_step(make_step(name, run_, mesh, pairs), machine).total_bytes

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
        steps: which of `STEPS`, joined by commas; "" = train, score and sample.
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
        if name not in STEPS:
            raise ValueError(f"--steps={steps}: {name!r} is none of {', '.join(STEPS)}.")
    pairs = planned.pairs(
        run.data.max_length,
        length_mean=length_mean,
        length_sigma=length_sigma,
        prompt_share=prompt_share,
    )
    machine = targets.target(topology)
    mesh = make_mesh(run, machine)
    reports = []
    for name in names:
        found = compile_step(make_step(name, run, mesh, pairs), machine)
        if search:
            found = _with_largest(found, run, mesh, machine, pairs)
        reports.append(dataclasses.replace(found, changes=compile_report.changes(found, run, mesh)))
    compile_tables.show(run, machine, mesh, reports, pairs.said, as_json=as_json)
    return 0 if all(r.fits for r in reports) else 3
