"""A training run from its settings to its report; the modes `train` and `sft` are this."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from sage_jax import config
from sage_jax.data import encode
from sage_jax.models import attention, quantised
from sage_jax.report import writers
from sage_jax.runtime import (
    counters,
    dataset,
    divergence,
    evaluation,
    forward,
    hosts,
    interrupt,
    loop,
    resample,
    resample_plan,
    rounds,
    saved,
    setup,
    sharing,
    summary,
)  # fmt: skip


def need(workdir: pathlib.Path | None, mode: str) -> pathlib.Path:
    if workdir is None:
        raise ValueError(f"--workdir is missing. Example: --workdir=runs/my_{mode}")
    return workdir


def open_workdir(run: config.Run, workdir: pathlib.Path | None, mode: str) -> pathlib.Path:
    """A new workdir, or one with the same run. Refuses one that holds another."""
    workdir = need(workdir, mode)
    hosts.on_first(lambda: _check_workdir(run, workdir, mode))
    return workdir


def _check_workdir(run: config.Run, workdir: pathlib.Path, mode: str) -> None:
    now = {"mode": mode} | config.as_dict(run)
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file. Name a directory.")
    if path.exists():
        before = json.loads(path.read_text())
        # A training that ended before its first row has nothing to lose: its settings and its mode
        # may be corrected.
        if before["mode"] not in MODES or writers.read_rows(workdir / "metrics.jsonl"):
            saved.refuse_changes(before, now, workdir)
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(
            f"--workdir={workdir} is not empty and holds no run of sage_jax. Name a new directory."
        )


class _Parts(NamedTuple):
    """What a training run is made of, all of it checked."""

    policy: setup.Policy
    other: setup.Policy | None
    pairs: encode.EncodedPairs
    held_out: encode.EncodedPairs | None
    problems: evaluation.Held | None
    asked: resample_plan.Problems | None  # what new pairs are sampled for


def _load(run: config.Run, mesh: jax.sharding.Mesh, mode: str) -> _Parts:
    """Loads and checks everything that a user named, the quick things first."""
    attention.Placement(run.model.attention, mesh).check()
    tokenizer = setup.load_tokenizer(run)
    pairs = dataset.load_pairs(run, tokenizer, run.data.train)
    dataset.check_pairs(config.settle_data(run, pairs.columns), pairs, sft=mode == "sft")
    held_out = dataset.load_pairs(run, tokenizer, run.data.eval) if run.data.eval else None
    if held_out is not None and mode == "train":
        dataset.check_sides(held_out, "data.eval")
    if run.curriculum.difficulty not in ("auto", "margin"):
        rounds.difficulty(pairs, None, run.curriculum.difficulty)
    rounds.rule_column(run, pairs)
    problems = evaluation.held_out(run, tokenizer, pairs)
    asked = None
    if run.rounds.resample:
        resample_plan.settled(run, pairs)
        asked = resample_plan.load_problems(run, tokenizer, problems, held_out)
    policy = setup.fitted(setup.load_policy(run, mesh, tokenizer), pairs.lengths_N2)
    for data in (pairs, held_out) if held_out is not None else (pairs,):
        dataset.check_ids(data, policy)
    other = setup.load_reference(run, policy, mesh)
    return _Parts(policy, other, pairs, held_out, problems, asked)


def fit(run: config.Run, workdir: pathlib.Path, mode: str) -> int:
    done = workdir / "summary.json"
    finished = hosts.on_first(lambda: json.loads(done.read_text()) if done.exists() else None)
    if finished is not None:
        print(f"{workdir} is finished. For another run, name another --workdir.\n")
        summary.show(finished, workdir)
        return 0
    started = time.perf_counter()
    mesh = setup.make_mesh(run)
    parts = _load(run, mesh, mode)
    # From here on files are written: everything the user typed has been checked.
    if hosts.first():
        workdir.mkdir(parents=True, exist_ok=True)
        writers.write_json(workdir / "config.json", {"mode": mode} | config.as_dict(run))
    _describe(run, parts, workdir)
    keep_programs(run, workdir)

    policy, pairs, held_out = parts.policy, parts.pairs, parts.held_out
    run = config.settle_data(run, pairs.columns)  # before the twins, which keep the same share
    share = sharing.shares_prompts(run, policy.model, pairs)
    lengths = pairs.row_lengths(share)
    if held_out is not None:
        lengths = np.concatenate([lengths, held_out.row_lengths(share)])
    if parts.asked is not None:
        run = resample_plan.settled(run, pairs)
        lengths = resample_plan.planned(run, policy.tokenizer, pairs, parts.asked, lengths)
    shapes = sharing.shapes(run, policy.model, mesh, pairs, share=share, lengths_N=lengths)
    passes = forward.Passes(policy, mesh, *shapes)
    moved = None
    if run.eval.kl_prompts:
        moved = divergence.Divergence(run, policy, parts.other, pairs)
    evaluator = evaluation.Evaluator(
        run, policy, parts.problems, passes, held_out, parts.other, aside=True, divergence=moved
    )
    start = None  # supervised training has nothing to compare with or to select by
    spent = counters.Counters()
    if mode == "train":
        start = forward.stored_stats(run, policy, passes, pairs, "reference", spent)
    reference = forward.reference_logps(run, policy, passes, pairs, start, parts.other, spent)
    resampler = None
    if parts.asked is not None:
        longest = int(lengths.max())
        resampler = resample.Resampler(run, policy, passes, parts.other, parts.asked, longest)
    shared: dict[str, Any] = {
        "policy": policy, "passes": passes, "pairs": pairs, "start": start,
        "reference": reference, "evaluate": evaluator, "began": started, "resampler": resampler,
        "spent": spent,
    }  # fmt: skip
    with interrupt.stop_signal() as stopped:
        label = run.selection.name if mode == "train" else mode
        outcome = loop.Trainer(run, workdir, **shared, label=label).train(stopped)
        twins: dict[str, loop.Outcome] = {}
        flops_N = counters.step_flops(policy.model, pairs, passes.shape, run.train.batch_pairs)
        for name in [name for name in TWINS if getattr(run.compare, name)]:
            if not [outcome, *twins.values()][-1].finished:
                break
            if hosts.first():
                (workdir / name).mkdir(exist_ok=True)
            twin = loop.Trainer(
                twin_run(name, run, outcome, flops_N), workdir / name, **shared, label=name
            )
            twins[name] = twin.train(stopped)
    last = [outcome, *twins.values()][-1]
    if not last.finished:
        print(
            f"Stopped after step {last.counters.step}, saved. The same command goes on from there."
        )
        return 0
    export(workdir / "export", run, policy, outcome.params)
    earlier = max(o.earlier for o in (outcome, *twins.values()))
    found = summary.make(
        outcome, twins, earlier + time.perf_counter() - started, label, len(pairs)
    )  # fmt: skip
    if hosts.first():
        from sage_jax.report import html

        writers.write_json(workdir / "summary.json", found)
        html.write(workdir)
        summary.show(found, workdir)
    return 0


def keep_programs(run: config.Run, workdir: pathlib.Path) -> None:
    """Keeps compiled programs, by train.compile_cache, unless JAX keeps them elsewhere already."""
    setting = run.train.compile_cache
    if not setting or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    from jax.experimental.compilation_cache import compilation_cache

    where = workdir / "compiled" if setting == "workdir" else pathlib.Path(setting)
    jax.config.update("jax_compilation_cache_dir", str(where))
    compilation_cache.reset_cache()  # what has compiled before has noted that there is no cache


MODES = ("train", "sft")  # those that come here
TWINS = ("uniform", "random")  # what a run can be compared with: config.compare


def twin_run(name: str, run: config.Run, outcome: loop.Outcome, flops_N: np.ndarray) -> config.Run:
    """The settings of a twin that spends the FLOPs that a run has spent, scoring counted.

    `uniform` is plain DPO; `random` draws the same pools and keeps the same share, at random. Where
    the run sampled new pairs, so does its twin, in rounds of as many steps.
    """
    per_step = counters.train_passes(run) * run.train.batch_pairs * float(flops_N.mean())
    steps = max(1, round(outcome.counters.flops / per_step))
    if run.rounds.resample:
        pool = resample_plan.twin_pool(run, len(flops_N))
        whole = config.replace(run, **{"curriculum.pool_size": pool})
        steps = resample_plan.twin_steps(whole, outcome.rows, outcome.counters, per_step)
        run = whole if name == "uniform" else run
    changes: dict[str, Any] = {
        "selection.name": name, "selection.column": "", "selection.soft": 0.0,
        "selection.refresh": 0.0, "selection.scoring_dtype": "", "selection.scoring_tokens": 0,
        "selection.guard": "off", "train.steps": steps,
    }  # fmt: skip
    if run.checkpoint.directory:
        changes["checkpoint.directory"] = f"{run.checkpoint.directory}/{name}"
    if name == "uniform":
        changes["curriculum.sharpness"] = 0.0
    return config.replace(run, **changes)


def _describe(run: config.Run, parts: _Parts, workdir: pathlib.Path) -> None:
    policy = parts.policy
    size = sum(x.size for x in jax.tree.leaves(policy.params))
    below = quantised.parameters(policy.frozen) / 1e6
    frozen = f" on {below:.2f} M frozen ones, held in {run.lora.base}" if below else ""
    pairs, held = parts.pairs, parts.problems
    unit = "rows" if run.loss.name == "sft" else "pairs"
    lines = [
        ("model", f"{run.model.path}: {parts.policy.model.spec.family}, {size / 1e6:.2f} M "
                  f"parameters{frozen}"),
        ("data", f"{len(pairs)} {unit}, {pairs.lengths_N2.sum() / len(pairs):.0f} tokens each"
                 f"{dataset.left_out(pairs)}"),
    ]  # fmt: skip
    if held is not None:
        text = f"{len(held.problems)} problems of {run.eval.problems}"
        if held.seen:
            text += f", without {held.seen} that are in the training data"
        lines.append(("held out", text))
    if parts.asked is not None:
        every, source = run.rounds.resample, config.sample_source(run)
        text = f"every {every} rounds, from {run.sample.count} problems of {source}"
        lines.append(("new pairs", f"{text}, {run.sample.per_problem} answers each"))
    if config.needs_scores(run):
        settled = config.settle_data(run, pairs.columns).selection
        text = f"{run.selection.name}, kappa {settled.kappa:g}"
        if run.selection.kappa == -1:
            text += ", as the pairs " + ("have" if settled.kappa else "lack") + " a pass_rate"
        if run.selection.margin == "auto" and settled.margin == "reward":
            text += f"; reward margins, as the pass_rate is below {config.KNOWS_LITTLE} on average"
        lines.append(("selection", text))
    lines.append(("devices", f"{jax.device_count()} {jax.devices()[0].platform}"))
    lines.append(("workdir", str(workdir)))
    print("\n".join(f"{name:11}{text}" for name, text in lines), flush=True)


def export(directory: pathlib.Path, run: config.Run, policy: setup.Policy, params: Any) -> None:
    """Writes the model, adapters merged into it; they lie by themselves in `adapter` beside it."""
    from sage_jax import models
    from sage_jax.models import peft_files

    models.export(
        directory, policy.model, policy.merged(params), tokenizer=policy.tokenizer,
        dtype=run.export.dtype, check=run.export.check,
        computes=policy.whole(params) if quantised.is_held(policy.frozen) else None,
    )  # fmt: skip
    if policy.lora is not None:
        peft_files.write(
            directory.parent / "adapter", policy.model.spec, params, policy.lora,
            base=run.model.path,
        )  # fmt: skip
