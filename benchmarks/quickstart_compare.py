"""Does SAGE need less than uniform DPO on the quickstart's task?

    python benchmarks/quickstart_compare.py --seeds=0,1,2 --out=OUT.json
    python benchmarks/quickstart_compare.py --world=fresh --seeds=0,1,2,3,4 --out=OUT.json

All methods start from one decoder and one set of pairs and take the same number of optimizer steps;
every point of a curve carries the steps, pairs and total FLOPs (scoring counted) behind it.
Differences are paired by seed. With the decoder and pairs of the package a seed changes the order
of the data and the held-out problems. With `--world=fresh` it is a world of its own: a new faulty
teacher, a decoder supervised by it, and pairs sampled from that decoder (three minutes more each).
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import common
import numpy as np

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.runtime import modes

METHODS = {  # name -> settings besides those of configs/quickstart.py
    "sage": {},
    "sage_fresh": {"selection.refresh": 1.0},
    "uniform": {"selection.name": "uniform", "curriculum.sharpness": 0.0},
    "random": {"selection.name": "random", "curriculum.sharpness": 0.0},
    "gradient": {"selection.name": "gradient", "selection.uniform_share": 0.0,
                 "curriculum.sharpness": 0.0, "selection.margin": "reward"},
}  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parent.parent


def load(name: str, overrides: dict[str, object]) -> config.Run:
    _, found, _ = launcher.parse(["train", f"--config={ROOT / 'configs' / name}.py"])
    return config.replace(config.resolve(found), **overrides)


def make_world(directory: pathlib.Path, seed: int) -> dict[str, object]:
    """Supervises a decoder on a new teacher and samples pairs from it; returns settings."""
    base = load("quickstart_base", {"seed": seed, "eval.count": 8})
    if not (directory / "pairs" / "pairs.jsonl").exists():
        modes.sft(base, directory / "base")
        sampling = config.replace(base, **{"model.path": str(directory / "base" / "export")})
        modes.sample(sampling, directory / "pairs")
    return {
        "model.path": str(directory / "base" / "export"),
        "data.train": str(directory / "pairs" / "pairs.jsonl"),
    }


def curve(rows: list[dict]) -> list[dict[str, float]]:
    keys = {"step": "step", "pairs": "pairs", "flops": "flops", "accuracy": "eval_accuracy"}
    return [{k: row[v] for k, v in keys.items()} for row in rows if "eval_accuracy" in row]


def area(points: list[dict[str, float]], axis: str, upto: float) -> float:
    """Mean accuracy over an axis, up to a bound that all methods reach."""
    x = np.array([p[axis] for p in points])
    y = np.array([p["accuracy"] for p in points])
    grid = np.linspace(0, upto, 201)
    return float(np.interp(grid, x, y).mean())


def first_at(points: list[dict[str, float]], axis: str, level: float) -> float | None:
    """Where a curve first reaches a level, interpolated; None if it does not."""
    for before, after in itertools.pairwise(points):
        if after["accuracy"] >= level:
            rise = after["accuracy"] - before["accuracy"]
            part = (level - before["accuracy"]) / rise if rise > 0 else 0.0
            return before[axis] + max(part, 0.0) * (after[axis] - before[axis])
    return None


def setting(change: str) -> tuple[str, object]:
    """A `key=value` of the command line; values are JSON, or text."""
    key, _, value = change.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def mean_error(values: list[float]) -> dict[str, float]:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}


def summarise(runs: dict[str, dict[int, list[dict]]]) -> dict[str, dict]:
    """Per method: areas, final accuracy, and what it takes to reach 95 % of uniform's best gain."""
    table: dict[str, dict] = {}
    for name, by_seed in runs.items():
        row: dict[str, list[float]] = {}
        for seed, points in by_seed.items():
            uniform = runs["uniform"][seed]
            steps = min(points[-1]["step"], uniform[-1]["step"])
            flops = min(points[-1]["flops"], uniform[-1]["flops"])
            start = uniform[0]["accuracy"]
            level = start + 0.95 * (max(p["accuracy"] for p in uniform) - start)
            for axis, upto in (("step", steps), ("flops", flops)):
                mine, theirs = area(points, axis, upto), area(uniform, axis, upto)
                row.setdefault(f"accuracy_over_{axis}s".replace("flopss", "flops"), []).append(mine)
                row.setdefault(f"difference_over_{axis}s".replace("flopss", "flops"), []).append(
                    mine - theirs
                )
                reach, needs = first_at(points, axis, level), first_at(uniform, axis, level)
                if reach is not None and needs:
                    key = f"{axis}s_relative_to_uniform".replace("flopss", "flops")
                    row.setdefault(key, []).append(reach / needs)
            row.setdefault("accuracy_before", []).append(start)
            row.setdefault("accuracy_after", []).append(points[-1]["accuracy"])
        table[name] = {k: mean_error(v) | {"seeds": len(v)} for k, v in row.items()}
    return table


def plot(runs: dict[str, dict[int, list[dict]]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    labels = {"step": "optimizer steps", "pairs": "pairs trained", "flops": "total TFLOPs"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, by_seed in runs.items():
            scale = 1e12 if key == "flops" else 1.0
            upto = min(points[-1][key] for points in by_seed.values())
            grid = np.linspace(0, upto, 101)
            each = np.array([
                np.interp(grid, [p[key] for p in points], [p["accuracy"] for p in points])
                for points in by_seed.values()
            ])  # fmt: skip
            mean = each.mean(axis=0)
            (line,) = axis.plot(grid / scale, mean, label=name)
            if len(each) > 1:
                error = each.std(axis=0, ddof=1) / np.sqrt(len(each))
                axis.fill_between(grid / scale, mean - error, mean + error, alpha=0.15,
                                  color=line.get_color(), linewidth=0)  # fmt: skip
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out greedy accuracy")
    axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--world", choices=("fresh", "shipped"), default="shipped")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; 0 = the config's")
    parser.add_argument("--lr", type=float, default=0.0, help="for all methods; 0 = the config's")
    parser.add_argument("--split", default="test", help="test, or eval for choosing settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...",
                        help="another method: SAGE with settings changed")  # fmt: skip
    parser.add_argument("--worlds", default="", help="directory where worlds are kept")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    known = dict(METHODS)
    for variant in args.variant:
        name, _, changes = variant.partition(":")
        known[name] = dict(setting(change) for change in changes.split(","))
    methods = [*args.methods.split(","), *(set(known) - set(METHODS))]
    if "uniform" not in methods or set(methods) - set(known):
        parser.error(f"--methods must hold uniform and be among {', '.join(METHODS)}")

    shared: dict[str, object] = {"eval.split": args.split, "compare.uniform": False}
    if args.steps:
        shared["train.steps"] = args.steps
    if args.lr:
        shared["optim.lr"] = args.lr
    shared |= dict(setting(change) for change in args.set)
    runs: dict[str, dict[int, list[dict]]] = {name: {} for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as scratch:
        worlds = pathlib.Path(args.worlds or scratch)
        for seed in map(int, args.seeds.split(",")):
            settings = shared | {"seed": seed, "eval.seed": seed}
            if args.world == "fresh":
                settings |= make_world(worlds / f"world_{seed}", seed)
            for name in methods:
                start = time.perf_counter()
                run = load("quickstart", settings | known[name])
                workdir = pathlib.Path(scratch) / f"{name}_{seed}"
                modes.train(run, workdir)
                if not (workdir / "summary.json").exists():
                    sys.exit("stopped before the end; nothing was written")
                rows = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
                runs[name][seed] = curve(rows)
                seconds[name].append(time.perf_counter() - start)
                print(f"seed {seed} {name}: {runs[name][seed][-1]}", file=sys.stderr, flush=True)
    table = summarise(runs)
    common.write(args.out, {
        "question": __doc__.split("\n")[0],
        "world": args.world,
        "settings": {k: str(v) for k, v in shared.items()},
        "summary": table,
        "seconds": seconds,
        "curves": {name: {str(s): c for s, c in by.items()} for name, by in runs.items()},
    })  # fmt: skip
    if args.out:
        plot(runs, pathlib.Path(args.out).with_suffix(".png"))
    for name, row in table.items():
        print(name, {k: (round(v["mean"], 4), v["standard_error"] and round(v["standard_error"], 4))
                     for k, v in row.items()}, file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
