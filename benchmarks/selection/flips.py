"""Are flipped labels found, and does leaving them out pay?

    python benchmarks/selection/flips.py

Flips a share of the labels of on-policy pairs (chosen and rejected swapped) and trains with every
guard. Reported: precision, recall and average precision of the suspects at several steps against
the truth, the estimated share of flips, and held-out accuracy beside uniform DPO's.
"""

from __future__ import annotations

import pathlib
from typing import Any

import curves
import lab
import numpy as np

SAGE = {"selection.name": "sage"}
UNIFORM = {"selection.name": "uniform", "curriculum.sharpness": 0.0}
GUARDS = ("off", "quantile", "suspects", "auto")
METHODS: dict[str, dict[str, Any]] = {
    "uniform": UNIFORM | {"selection.guard": "off"},
    "uniform, suspects": UNIFORM | {"selection.guard": "suspects"},
    **{f"sage, {g}": SAGE | {"selection.guard": g} for g in GUARDS},
}  # fmt: skip


def average_precision(suspicion_N: np.ndarray, flipped_N: np.ndarray) -> float:
    """Mean precision at the ranks of the flipped pairs, most suspicious first."""
    hit = flipped_N[np.argsort(-suspicion_N, kind="stable")] > 0
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def judged(workdir: pathlib.Path, run: Any, every: int) -> list[dict[str, Any]]:
    """How good the suspicions were at each checkpoint of a run."""
    import orbax.checkpoint as ocp

    from sage_jax import curriculum
    from sage_jax.runtime import setup, suspicion

    pairs = setup.load_pairs(run, setup.load_tokenizer(run), run.data.train)
    flipped_N = pairs.columns["flipped"]
    found = []
    for step in range(every, run.train.steps + 1, every):
        where = (workdir / "checkpoints" / str(step) / "arrays").resolve()
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore(where)
        memory = curriculum.Memory(
            *(np.asarray(arrays[f"memory.{name}"]) for name in curriculum.Memory._fields)
        )
        flips = suspicion.detect(memory, run, pairs)
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


def _job(task: str, seed: int, flips: float, method: str, args: Any) -> lab.Job:
    settings = METHODS[method] | {
        "train.steps": args.steps, "optim.lr": args.lr, "checkpoint.every": args.judge_every,
        "checkpoint.keep": 1000, "eval.every": args.eval_every, "eval.kl_prompts": 0,
    }  # fmt: skip
    return lab.job(task, seed, settings, flips=flips, split=args.split)


def _detector(jobs: dict[tuple, lab.Job], args: Any) -> dict[str, list[dict[str, Any]]]:
    """`judged` of the runs whose guard, or whose selection, remembers margins."""
    found = {}
    for (task, seed, flips, method), job in jobs.items():
        if method == "uniform":
            continue
        scratch = pathlib.Path(args.scratch)
        world = lab.make_world(scratch, task, seed)
        data = lab.pairs_file(world, seed, flips, "policy", task)
        run = lab.load("quickstart", lab.RUN | dict(job.settings) | {
            "model.path": str(world / "base" / "export"), "data.train": str(data),
            "data.cache": str(scratch / "encoded"),
        })  # fmt: skip
        found[f"{task}/{seed}/{flips:g}/{method}"] = judged(
            scratch / "workdirs" / job.key, run, args.judge_every
        )
    return found


def _mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.2f}" if known else "-"


def _detector_table(found: dict[str, list[dict[str, Any]]], flips: float, methods) -> str:
    rows = []
    for method in methods:
        runs = [v for k, v in found.items() if k.endswith(f"/{flips:g}/{method}")]
        for at in zip(*runs, strict=True):
            keys = ["share", "precision", "recall", "average_precision"]
            cells = [_mean([row.get(key) for row in at]) for key in keys]
            acts = f"{sum(row['acts'] for row in at)} of {len(at)}"
            suspected = f"{np.mean([row['suspected'] for row in at]):.0f}"
            rows.append([method, str(at[0]["step"]), *cells, suspected, acts])
    header = ["", "step", "estimated share", "precision", "recall", "average precision",
              "suspected", "enough for auto"]  # fmt: skip
    return f"## Suspects, {flips:.0%} flipped\n\n" + curves.markdown(header, rows)


def _accuracy_table(by: dict[str, dict], flips: float) -> str:
    rows = []
    for method, runs in by.items():
        area = [curves.area(c, "step", c[-1]["step"]) for c in runs.values()]
        last = [c[-1]["accuracy"] for c in runs.values()]
        apart = [a - curves.area(by["uniform"][key], "step", runs[key][-1]["step"])
                 for key, a in zip(runs, area, strict=True)]  # fmt: skip
        error = np.std(apart, ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else np.nan
        rows.append([method, f"{np.mean(last):.3f}", f"{np.mean(area):.3f}",
                     f"{np.mean(apart):+.3f} ± {error:.3f}"])  # fmt: skip
    header = ["", "final accuracy", "mean over steps", "- uniform"]
    return f"## Held-out accuracy, {flips:.0%} flipped\n\n" + curves.markdown(header, rows)


def main() -> None:
    parser = lab.arguments(__doc__.split("\n")[0], "flips.json")
    parser.add_argument("--flips", default="0,0.1,0.2", help="shares of flipped labels")
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--split", default="test", help="of the problems: test, or eval to tune")
    parser.add_argument("--judge-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=20)
    args = parser.parse_args()
    methods = args.methods.split(";")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: unknown {unknown}; there are {'; '.join(METHODS)}")
    if "uniform" not in methods:
        parser.error("--methods has to include uniform, which the others are compared with")
    seeds, tasks = lab.numbers(args.seeds), args.task.split(",")
    shares = [float(x) for x in args.flips.split(",")]
    jobs = {
        (t, s, f, m): _job(t, s, f, m, args)
        for m in methods for f in shares for t in tasks for s in seeds
    }  # fmt: skip
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    found = _detector(jobs, args)
    tables, all_curves = [], {}
    for flips in shares:
        by = {
            m: {(t, s): done[jobs[t, s, flips, m]]["curve"] for t in tasks for s in seeds}
            for m in methods
        }
        tables.append(_accuracy_table(by, flips))
        tables.append(_detector_table(found, flips, [m for m in methods if m != "uniform"]))
        all_curves[f"{flips:g}"] = {
            m: {f"{t}/{s}": c for (t, s), c in each.items()} for m, each in by.items()
        }
    lab.write(args.out, __doc__.split("\n")[0], tables, {
        "seeds": seeds, "tasks": tasks, "lr": args.lr, "split": args.split, "detector": found,
        "curves": all_curves,
    })  # fmt: skip
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
