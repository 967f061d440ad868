"""What each mode of the launcher does: a function of a checked run that returns an exit code."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from sage_jax import config
from sage_jax.generate import pairs as pair_makers
from sage_jax.report import progress, writers
from sage_jax.runtime import checkpoint, evaluation, loop, setup
from sage_jax.runtime import mesh as meshes


def train(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Aligns a model on selected pairs, with uniform DPO at equal FLOPs beside it if asked."""
    if run.loss.name == "sft":
        raise ValueError("config.loss.name='sft' needs no pairs. Use the mode: sage-jax sft.")
    return _fit(run, _open(run, workdir, "train"), "train")


def sft(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Supervised fine-tuning: the same step and loop, with the loss of single answers."""
    run = config.replace(
        run, **{"loss.name": "sft", "selection.name": "uniform", "curriculum.sharpness": 0.0,
                "compare.uniform": False},
    )  # fmt: skip
    return _fit(run, _open(run, workdir, "sft"), "sft")


def _open(run: config.Run, workdir: pathlib.Path | None, mode: str) -> pathlib.Path:
    """Makes or re-enters a workdir. Refuses one that holds another run."""
    if workdir is None:
        raise ValueError(f"--workdir is missing. Example: --workdir=runs/my_{mode}")
    now = {"mode": mode} | config.as_dict(run)
    path = workdir / "config.json"
    if path.exists():
        loop.refuse_changes(json.loads(path.read_text()), now, workdir)
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(
            f"--workdir={workdir} is not empty and holds no run of sage_jax. Name a new directory."
        )
    return workdir


def _fit(run: config.Run, workdir: pathlib.Path, mode: str) -> int:
    if (workdir / "summary.json").exists():
        print(f"{workdir} is finished. For another run, name another --workdir.\n")
        _print_summary(json.loads((workdir / "summary.json").read_text()), workdir)
        return 0
    started = time.perf_counter()
    mesh = meshes.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    policy = setup.load_policy(run, mesh)
    pairs = setup.load_pairs(run, policy.tokenizer, run.data.train)
    held_out = setup.load_pairs(run, policy.tokenizer, run.data.eval) if run.data.eval else None
    setup.check_pairs(run, pairs, sft=mode == "sft")
    # From here on files are written: everything the user typed has been checked.
    workdir.mkdir(parents=True, exist_ok=True)
    writers.write_json(workdir / "config.json", {"mode": mode} | config.as_dict(run))
    _describe(run, policy, pairs, workdir)

    lengths = pairs.lengths_N2
    if held_out is not None:
        lengths = np.concatenate([lengths, held_out.lengths_N2])
    passes = setup.Passes(policy, mesh, setup.row_shape(run, lengths, mesh))
    evaluator = evaluation.Evaluator(run, policy, passes, held_out)
    start = None  # supervised training has nothing to compare with or to select by
    if mode == "train":
        start = setup.stored_stats(run, policy, passes, pairs, "reference")
    reference = setup.reference_logps(run, policy, passes, pairs, start)
    parts: dict[str, Any] = {
        "policy": policy, "passes": passes, "pairs": pairs, "start": start, "reference": reference
    }  # fmt: skip
    with loop.stop_signal() as stopped:
        outcome = loop.Trainer(
            run, workdir, **parts, evaluate=evaluator,
            label=run.selection.name if mode == "train" else mode,
        ).train(stopped)  # fmt: skip
        twin = None
        if outcome.finished and run.compare.uniform:
            twin_run = uniform_twin(run, outcome, loop.pair_flops(policy, pairs))
            (workdir / "uniform").mkdir(exist_ok=True)
            twin = loop.Trainer(
                twin_run, workdir / "uniform", **parts, evaluate=evaluator, label="uniform"
            ).train(stopped)
    if not outcome.finished or (twin is not None and not twin.finished):
        at = twin.counters.step if twin is not None else outcome.counters.step
        print(f"Stopped after step {at}, saved. The same command goes on from there.")
        return 0
    _export(workdir / "export", run, policy, outcome.params)
    summary = _summary(outcome, twin, time.perf_counter() - started)
    writers.write_json(workdir / "summary.json", summary)
    from sage_jax.report import html

    html.write(workdir)
    _print_summary(summary, workdir)
    return 0


def uniform_twin(run: config.Run, outcome: loop.Outcome, flops_N: np.ndarray) -> config.Run:
    """The settings of plain DPO that spends the FLOPs that a run has spent, scoring counted."""
    spent = outcome.counters.flops_training + outcome.counters.flops_scoring
    per_step = 3.0 * run.train.batch_pairs * float(flops_N.mean())
    return config.replace(
        run,
        **{
            "selection.name": "uniform",
            "selection.soft": 0.0,
            "curriculum.sharpness": 0.0,
            "train.steps": max(1, round(spent / per_step)),
        },
    )


def _describe(run: config.Run, policy: setup.Policy, pairs: Any, workdir: pathlib.Path) -> None:
    size = sum(x.size for x in jax.tree.leaves(policy.params))
    dropped = ", ".join(f"{n} {why}" for why, n in pairs.dropped.items() if n)
    print(
        f"model      {run.model.path}: {policy.model.spec.family}, {size / 1e6:.2f} M parameters\n"
        f"data       {len(pairs)} pairs{f' ({dropped})' if dropped else ''}, "
        f"{pairs.lengths_N2.sum() / len(pairs):.0f} tokens a pair\n"
        f"devices    {jax.device_count()} {jax.devices()[0].platform}\n"
        f"workdir    {workdir}",
        flush=True,
    )


def _export(directory: pathlib.Path, run: config.Run, policy: setup.Policy, params: Any) -> None:
    from sage_jax import models

    models.export(
        directory, policy.model, jax.device_get(params), tokenizer=policy.tokenizer,
        dtype=run.export.dtype,
    )  # fmt: skip


def _first_last(rows: list[dict[str, Any]], key: str) -> tuple[float | None, float | None]:
    values = [row[key] for row in rows if key in row]
    return (values[0], values[-1]) if values else (None, None)


def _summary(outcome: loop.Outcome, twin: loop.Outcome | None, seconds: float) -> dict[str, Any]:
    before, after = _first_last(outcome.rows, "eval_accuracy")
    counters = outcome.counters
    summary: dict[str, Any] = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_uniform": _first_last(twin.rows, "eval_accuracy")[1] if twin else None,
        "pairs_trained": counters.pairs,
        "steps": counters.step,
        "seconds": round(seconds, 1),
        "flops_scoring": counters.flops_scoring,
        "flops_training": counters.flops_training,
        "seconds_drawing": counters.seconds_drawing,
        "seconds_scoring": counters.seconds_scoring,
        "seconds_training": counters.seconds_training,
    }
    intervals = {"before": outcome.rows[0], "after": outcome.rows[-1]}
    if twin:
        intervals["uniform"] = twin.rows[-1]
        summary |= {
            "pairs_trained_uniform": twin.counters.pairs,
            "steps_uniform": twin.counters.step,
            "flops_uniform": twin.counters.flops_training,
            "seconds_training_uniform": twin.counters.seconds_training,
        }
    for name, row in intervals.items():
        if "eval_accuracy_low" in row:
            summary[f"accuracy_{name}_interval"] = [
                row["eval_accuracy_low"], row["eval_accuracy_high"]
            ]  # fmt: skip
    for key in ("eval_rewards/accuracies", "eval_loss"):
        if key in outcome.rows[-1]:
            summary[key] = outcome.rows[-1][key]
    return summary


def _print_summary(summary: dict[str, Any], workdir: pathlib.Path) -> None:
    def share(name: str) -> str:
        value = summary.get(f"accuracy_{name}")
        if value is None:
            return "-"
        low, high = summary.get(f"accuracy_{name}_interval", (value, value))
        return f"{100 * value:.1f} % ({100 * low:.1f} - {100 * high:.1f})"

    def count(key: str, scale: float = 1.0, form: str = ",.0f") -> str:
        return format(summary[key] / scale, form) if summary.get(key) is not None else "-"

    total = summary["flops_scoring"] + summary["flops_training"]
    rows = [["before", share("before"), "-", "-", "-", "-"]]
    rows.append(
        ["after", share("after"), count("steps"), count("pairs_trained"),
         f"{total / 1e9:,.1f}", count("seconds_training", form=",.0f")]
    )  # fmt: skip
    if summary.get("accuracy_uniform") is not None or "steps_uniform" in summary:
        rows.append(
            ["uniform DPO, equal FLOPs", share("uniform"), count("steps_uniform"),
             count("pairs_trained_uniform"), count("flops_uniform", 1e9, ",.1f"),
             count("seconds_training_uniform", form=",.0f")]
        )  # fmt: skip
    header = ["", "held-out accuracy (95 %)", "steps", "pairs trained", "GFLOPs", "seconds"]
    print("\n" + progress.table(header, rows))
    print(f"\nThe whole run took {summary['seconds']:.0f} seconds.")
    for name, path in (("report", "report.html"), ("model", "export"), ("rows", "metrics.jsonl")):
        if (workdir / path).exists():
            print(f"{name:8} {workdir / path}")


def sample(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Samples answers of the model to problems and writes verified pairs to WORKDIR/pairs.jsonl."""
    workdir = _need(workdir, "sample")
    out = workdir / "pairs.jsonl"
    if out.exists():
        raise ValueError(f"{out} exists. Name another --workdir; nothing was overwritten.")
    settings = run.sample
    source = settings.problems or run.eval.problems
    if not source:
        raise ValueError("config.sample.problems is empty. Give 'task:NAME' or a .jsonl file.")
    problems, check, name = evaluation.load_problems(
        source, settings.count, split="train", seed=run.seed, verifier=run.eval.verify
    )
    policy = setup.load_policy(run, meshes.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor))
    total = len({p.prompt for p in problems}) * settings.per_problem
    with progress.Progress(total, "sampling", "answers") as bar:
        rows, tally = pair_makers.sample_pairs(
            policy.model, policy.params, policy.tokenizer, problems,
            check=check, task=name, max_new_tokens=run.eval.max_new_tokens,
            samples=settings.per_problem, per_problem=settings.pairs_per_problem,
            temperature=settings.temperature, top_p=settings.top_p, seed=run.seed,
            batch=run.eval.batch, progress=lambda done, _: bar.update(done - bar.done),
        )  # fmt: skip
    if not rows:
        raise ValueError(
            f"No problem had both a right and a wrong answer ({tally.no_right} none right, "
            f"{tally.no_wrong} none wrong). Use easier or harder problems, or more samples."
        )
    pair_makers.write_jsonl(out, rows)
    writers.write_json(workdir / "sample.json", tally._asdict())
    print(
        f"{tally.pairs} pairs from {tally.with_pairs} of {tally.problems} problems "
        f"({tally.no_right} had no right answer, {tally.no_wrong} no wrong one, pass rate "
        f"{tally.pass_rate:.3f}): {out}"
    )
    return 0


def eval(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Greedy accuracy with its interval, per level; preference accuracy on held-out pairs."""
    mesh = meshes.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    if not run.eval.problems and not run.data.eval:
        raise ValueError("config.eval.problems and config.data.eval are both empty. Give one.")
    policy = setup.load_policy(run, mesh)
    pairs = passes = None
    if run.data.eval:
        pairs = setup.load_pairs(run, policy.tokenizer, run.data.eval)
        passes = setup.Passes(policy, mesh, setup.row_shape(run, pairs.lengths_N2, mesh))
    evaluator = evaluation.Evaluator(run, policy, passes, pairs)
    row = evaluator(policy.params)
    if evaluator.last is not None:
        levels = [
            [str(level), f"{100 * a.mean:.1f} % ({100 * a.low:.1f} - {100 * a.high:.1f})",
             str(a.count)]
            for level, a in [*evaluator.last.by_level.items(), ("all", evaluator.last.overall)]
        ]  # fmt: skip
        print(progress.table(["level", "greedy accuracy (95 %)", "problems"], levels))
    if pairs is not None:
        accuracy = row["eval_rewards/accuracies"]
        print(
            f"\nloss {row['eval_loss']:.4f}, rewards/accuracies {accuracy:.3f}, {len(pairs)} pairs"
        )
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        writers.write_json(workdir / "eval.json", row)
        print(f"\n{workdir / 'eval.json'}")
    return 0


def score(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Scores a data set; writes the scores, and the selected rows as they came."""
    from sage_jax.runtime import scoring

    return scoring.score(run, _need(workdir, "score"))


def export(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Writes the weights of a run's latest checkpoint to WORKDIR/export."""
    workdir = _need(workdir, "export")
    mesh = meshes.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    policy = setup.load_policy(run, mesh)
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        at = checkpoints.latest()
        if at is None:
            raise ValueError(f"{workdir / 'checkpoints'} holds no checkpoint to export.")
        state, _, _ = checkpoints.restore(at, loop.abstract_state(run, policy.params, mesh))
    _export(workdir / "export", run, policy, state.params)
    print(f"step {at}: {workdir / 'export'}")
    return 0


def report(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Writes report.html again from the files of a workdir."""
    from sage_jax.report import html

    del run
    print(html.write(_need(workdir, "report")))
    return 0


def doctor(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Looks a data set over, with the tokenizer of the model; writes nothing but its cache."""
    from sage_jax.data import doctor as doctors
    from sage_jax.data import encode, records

    del workdir
    tokenizer = setup.load_tokenizer(run)
    found = records.read(
        setup.sources(run, run.data.train), format=run.data.format, on_bad_row="skip"
    )
    encoded = encode.encode(found, tokenizer, max_length=run.data.max_length)
    print(doctors.report(found, encoded)[1])
    return 0


def _need(workdir: pathlib.Path | None, mode: str) -> pathlib.Path:
    if workdir is None:
        raise ValueError(f"--workdir is missing. Example: --workdir=runs/my_{mode}")
    return workdir
