"""Are flipped labels found, and does leaving them out pay?

    python benchmarks/selection/flips.py

Flips a share of the labels of on-policy pairs (chosen and rejected swapped) and trains with every
guard. Reported: precision, recall and average precision of the suspects at several steps against
the truth, the estimated share of flips, and held-out accuracy beside uniform DPO's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from typing import Any

import lab
import numpy as np
import small
from lab import curves

SAGE = {"selection.name": "sage"}
UNIFORM = {"selection.name": "uniform", "curriculum.sharpness": 0.0}
GUARDS = ("off", "quantile", "suspects", "auto")
METHODS: dict[str, dict[str, Any]] = {
    "uniform": UNIFORM | {"selection.guard": "off"},
    "uniform, suspects": UNIFORM | {"selection.guard": "suspects"},
    **{f"sage, {g}": SAGE | {"selection.guard": g} for g in GUARDS},
}  # fmt: skip


def _mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.2f}" if known else "-"


def _detector_table(
    found: dict[str, list[dict[str, Any]]], flips: float, methods: list[str], tasks: list[str]
) -> str:
    rows = []
    for method, task in itertools.product(methods, tasks):
        runs = [
            v for k, v in found.items()
            if k.startswith(f"{task}/") and k.endswith(f"/{flips:g}/{method}")
        ]  # fmt: skip
        for at in zip(*runs, strict=True):
            keys = ["share", "precision", "recall", "average_precision"]
            cells = [_mean([row.get(key) for row in at]) for key in keys]
            acts = f"{sum(row['acts'] for row in at)} of {len(at)}"
            suspected = f"{np.mean([row['suspected'] for row in at]):.0f}"
            rows.append([method, task, str(at[0]["step"]), *cells, suspected, acts])
    header = ["", "task", "step", "estimated share", "precision", "recall", "average precision",
              "suspected", "enough for auto"]  # fmt: skip
    return f"## Suspects, {flips:.0%} flipped\n\n" + curves.markdown(header, rows)


def _accuracy_table(by: dict[str, dict], flips: float) -> str:
    rows = []
    tasks = dict.fromkeys(task for task, _ in by["uniform"])
    for method, task in itertools.product(by, tasks):
        worlds = [key for key in by[method] if key[0] == task]
        mine, uniform = ({key: by[of][key] for key in worlds} for of in (method, "uniform"))
        c = curves.compare(mine, uniform)
        rows.append([
            method, task, ", ".join(str(seed) for _, seed in worlds),
            curves.text(c["accuracy_after"]),
            *(curves.text(c[f"minus_uniform_{what}"], sign=True)
              for what in ("over_step", "over_flops", "at_equal_flops")),
        ])  # fmt: skip
    header = ["", "task", "seeds", "accuracy after", "− uniform, mean over steps",
              "− uniform, mean over FLOPs", "− uniform at equal FLOPs"]  # fmt: skip
    return f"## Held-out accuracy, {flips:.0%} flipped\n\n" + curves.markdown(header, rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = lab.arguments(__doc__.split("\n")[0], "flips.json")
    parser.add_argument("--flips", default="0,0.1,0.2", help="shares of flipped labels")
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--lr", type=float, default=0.0, help="0 = what validation gave uniform")
    parser.add_argument("--split", default="test", help="of the problems: test, or eval to tune")
    parser.add_argument("--judge-every", type=int, default=50)
    parser.add_argument("--finished", action="store_true", help="tables of what ran, and no run")
    args = parser.parse_args(argv)
    args.methods = args.methods.split(";")
    args.flips = [float(x) for x in args.flips.split(",")]
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods: unknown {unknown}; there are {'; '.join(METHODS)}")
    if "uniform" not in args.methods:
        parser.error("--methods has to include uniform, which the others are compared with")
    return args


def jobs_of(args: argparse.Namespace) -> dict[tuple, lab.Job]:
    """(task, seed, share of flips, method) -> job."""
    rates = json.loads(small.RATES_FILE.read_text())["rates"]

    def job(task: str, seed: int, flips: float, method: str) -> lab.Job:
        settings = METHODS[method] | {
            "train.steps": args.steps, "optim.lr": args.lr or rates[task]["uniform"]
        }  # fmt: skip
        judge = args.judge_every if method != "uniform" else 0  # remembers no margins
        return lab.job(task, seed, settings, flips=flips, split=args.split, judge=judge)

    return {
        (t, s, f, m): job(t, s, f, m)
        for s in lab.numbers(args.seeds) for t in args.task.split(",")
        for f in args.flips for m in args.methods
    }  # fmt: skip


def plan(argv: list[str]) -> list[lab.Job]:
    return list(jobs_of(parse(argv)).values())


def compared(args: argparse.Namespace, jobs: dict[tuple, lab.Job]) -> dict[tuple, lab.Job]:
    """All jobs; with `--finished`, those of the worlds in which every method ran."""
    if not args.finished:
        return jobs
    there = {k for k, job in jobs.items() if lab.finished(pathlib.Path(args.scratch), job)}
    return {k: job for k, job in jobs.items() if {(*k[:3], m) for m in args.methods} <= there}


def main() -> None:
    args = parse()
    methods, shares, jobs = args.methods, args.flips, compared(args, jobs_of(args))
    tasks = args.task.split(",")
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    found = {f"{t}/{s}/{f:g}/{m}": done[job]["detector"]
             for (t, s, f, m), job in jobs.items() if job.judge}  # fmt: skip
    tables, all_curves = [], {}
    for flips in shares:
        by = {
            m: {(t, s): done[job]["curve"] for (t, s, f, of), job in jobs.items()
                if (f, of) == (flips, m)}
            for m in methods
        }  # fmt: skip
        tables.append(_accuracy_table(by, flips))
        tables.append(_detector_table(found, flips, [m for m in methods if m != "uniform"], tasks))
        all_curves[f"{flips:g}"] = {
            m: {f"{t}/{s}": c for (t, s), c in each.items()} for m, each in by.items()
        }
    lab.write(args.out, __doc__.split("\n")[0], tables, {
        "worlds": sorted({f"{t}/{s}/{f:g}" for t, s, f, _ in jobs}), "tasks": tasks,
        "lr": args.lr, "split": args.split, "detector": found,
        "curves": all_curves,
    }, done)  # fmt: skip
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
