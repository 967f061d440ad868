"""Tables, JSON and figure of `medium.py`, from the result files of its test runs alone."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import common
import numpy as np

AXES = {"step": "steps", "pairs": "pairs", "flops": "total FLOPs"}
Runs = dict[str, dict[int, dict[str, Any]]]  # method -> seed -> result


def read(directory: pathlib.Path) -> Runs:
    """The test results of a workdir, uniform among them for every seed.

    Raises:
        ValueError: there is nothing to compare, or the runs have other settings than each other.
    """
    runs: Runs = {}
    found = [json.loads(p.read_text()) for p in sorted(directory.glob("test_*.json"))]
    for one in found:
        for what in ("settings", "tasks"):
            if one[what] != found[0][what]:
                raise ValueError(
                    f"{directory} holds runs with different {what}: {_difference(one, found[0])}. "
                    f"Move those of the other experiment elsewhere."
                )
        runs.setdefault(one["method"], {})[one["seed"]] = one
    seeds = {frozenset(by_seed) for by_seed in runs.values()}
    if "uniform" not in runs or len(seeds) != 1:
        have = {m: sorted(by_seed) for m, by_seed in runs.items()}
        raise ValueError(
            f"{directory} holds test runs of {have}. The comparison is paired by seed: run "
            f"--stage=train with uniform, and with the same seeds for every method."
        )
    return runs


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    a, b = one["settings"], other["settings"]
    keys = [k for k in sorted(a | b) if a.get(k) != b.get(k)]
    return ", ".join(f"{k} {a.get(k)!r} and {b.get(k)!r}" for k in keys) or (
        f"{one['tasks']} and {other['tasks']}"
    )


def series(points: list[dict[str, Any]], task: str) -> np.ndarray:
    """Accuracy at every point, float64; task "" is all of them together."""
    return np.array([p["tasks"][task] if task else p["accuracy"] for p in points])


def at(points: list[dict[str, Any]], axis: str, where: float, task: str = "") -> float:
    """Accuracy where so much has been spent, interpolated between evaluations.

    >>> two = [{"step": 0, "accuracy": 0.2}, {"step": 10, "accuracy": 0.6}]
    >>> round(at(two, "step", 5), 6)
    0.4
    """
    return float(np.interp(where, [p[axis] for p in points], series(points, task)))


def mean_upto(points: list[dict[str, Any]], axis: str, upto: float) -> float:
    """Mean accuracy over an axis from 0 to a bound that the curve reaches.

    >>> two = [{"step": 0, "accuracy": 0.2}, {"step": 10, "accuracy": 0.6}]
    >>> round(mean_upto(two, "step", 5), 6)
    0.3
    """
    inner = [p[axis] for p in points if p[axis] < upto]
    y = [at(points, axis, x) for x in (*inner, upto)]
    return float(np.trapezoid(y, (*inner, upto)) / upto)


def first_at(points: list[dict[str, Any]], axis: str, level: float) -> float | None:
    """Where a curve first reaches a level, interpolated; None if it does not.

    >>> two = [{"step": 0, "accuracy": 0.2}, {"step": 10, "accuracy": 0.6}]
    >>> first_at(two, "step", 0.3), first_at(two, "step", 0.7)
    (2.5, None)
    """
    if points[0]["accuracy"] >= level:
        return float(points[0][axis])
    for before, after in itertools.pairwise(points):
        rise = after["accuracy"] - before["accuracy"]
        if after["accuracy"] >= level > before["accuracy"]:
            part = round((level - before["accuracy"]) / rise, 12)
            return before[axis] + part * (after[axis] - before[axis])
    return None


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard error (None for a single seed) and the number of seeds."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error, "seeds": len(values)}


def summarise(runs: Runs) -> dict[str, Any]:
    """Per method: accuracies and differences to uniform, paired by seed, on every axis.

    The bound of an axis is, for each seed, the least that a method spent in all; so all are
    compared at equal steps, equal pairs and equal total FLOPs. `need` is what it takes to reach
    95 % of uniform's best gain, as a multiple of what uniform takes; seeds that do not get there
    are left out and show in `seeds`.
    """
    table: dict[str, Any] = {}
    for method, by_seed in runs.items():
        row: dict[str, list[float]] = {}
        tasks: dict[str, dict[str, list[float]]] = {}
        for seed, result in by_seed.items():
            mine, theirs = result["curve"], runs["uniform"][seed]["curve"]
            start = theirs[0]["accuracy"]
            level = start + 0.95 * (max(p["accuracy"] for p in theirs) - start)
            row.setdefault("before", []).append(mine[0]["accuracy"])
            row.setdefault("lr", []).append(result["lr"])
            for axis in AXES:
                upto = min(of[seed]["curve"][-1][axis] for of in runs.values())
                for name, measure in (("at_equal", at), ("mean_over", mean_upto)):
                    row.setdefault(f"{name}_{axis}", []).append(measure(mine, axis, upto))
                    row.setdefault(f"{name}_{axis}_minus_uniform", []).append(
                        measure(mine, axis, upto) - measure(theirs, axis, upto)
                    )
                reached, needed = (first_at(c, axis, level) for c in (mine, theirs))
                if reached is not None and needed:
                    row.setdefault(f"need_{axis}", []).append(reached / needed)
                for task in result["tasks"]:
                    one = tasks.setdefault(task, {})
                    one.setdefault(f"at_equal_{axis}", []).append(at(mine, axis, upto, task))
                    one.setdefault(f"at_equal_{axis}_minus_uniform", []).append(
                        at(mine, axis, upto, task) - at(theirs, axis, upto, task)
                    )
            for task in result["tasks"]:
                tasks[task].setdefault("before", []).append(mine[0]["tasks"][task])
        table[method] = {k: spread(v) for k, v in row.items()}
        table[method]["tasks"] = {
            task: {k: spread(v) for k, v in one.items()} for task, one in tasks.items()
        }
    return table


# -- out -------------------------------------------------------------------------------------------


def show(value: dict[str, Any] | None, form: str = "{:.3f}") -> str:
    """A mean with its standard error, and how many seeds where it has to be said.

    >>> show({"mean": 0.5, "error": 0.01, "seeds": 3})
    '0.500 ± 0.010'
    """
    if value is None:
        return "not reached"
    text = form.format(value["mean"])
    if value["error"] is not None:
        text += " ± " + form.replace("+", "").format(value["error"])
    return text


def markdown(table: dict[str, Any], seeds: int) -> str:
    """The tables as Markdown."""
    head = ["method", "learning rate", "before", "at equal steps", "at equal pairs",
            "at equal FLOPs", "mean over FLOPs, minus uniform",
            "FLOPs to 95 % of uniform's gain"]  # fmt: skip
    lines = [f"Held-out accuracy, {seeds} seeds, mean ± standard error.", ""]
    lines += _table(head, [_overall(name, row, seeds) for name, row in table.items()])
    tasks = list(next(iter(table.values()))["tasks"])
    for axis, title in AXES.items():
        lines += ["", f"Each task at equal {title} (minus uniform, paired by seed):", ""]
        rows = [["before", *(show(table["uniform"]["tasks"][t]["before"]) for t in tasks)]]
        for name, row in table.items():
            cells = []
            for one in (row["tasks"][t] for t in tasks):
                text = show(one[f"at_equal_{axis}"])
                if name != "uniform":
                    text += f" ({show(one[f'at_equal_{axis}_minus_uniform'], '{:+.3f}')})"
                cells.append(text)
            rows.append([name, *cells])
        lines += _table(["method", *tasks], rows)
    return "\n".join(lines) + "\n"


def _overall(name: str, row: dict[str, Any], seeds: int) -> list[str]:
    need = row.get("need_flops")
    reached = show(need, "{:.2f}") + " ×" if need else "not reached"
    if need and need["seeds"] < seeds:
        reached += f" ({need['seeds']} of {seeds} seeds)"
    return [
        name, f"{row['lr']['mean']:g}", show(row["before"]),
        *(show(row[f"at_equal_{axis}"]) for axis in AXES),
        "0" if name == "uniform" else show(row["mean_over_flops_minus_uniform"], "{:+.3f}"),
        reached,
    ]  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def plot(runs: Runs, path: pathlib.Path) -> None:
    """Accuracy against steps, pairs and FLOPs, and of each task against FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = next(iter(runs["uniform"].values()))["tasks"]
    panels = [(axis, "") for axis in AXES] + [("flops", task) for task in tasks]
    height = -(-len(panels) // 3)
    figure, axes = plt.subplots(
        height, 3, figsize=(13, 3.6 * height), layout="constrained", squeeze=False
    )
    for panel, (axis, task) in zip(axes.flat, panels, strict=False):
        scale = 1e15 if axis == "flops" else 1
        for name, by_seed in runs.items():
            curves = [result["curve"] for result in by_seed.values()]
            grid = np.linspace(0, min(c[-1][axis] for c in curves), 101)
            each = np.array([[at(c, axis, x, task) for x in grid] for c in curves])
            (line,) = panel.plot(grid / scale, each.mean(axis=0), label=name)
            if len(each) > 1:
                error = each.std(axis=0, ddof=1) / np.sqrt(len(each))
                low, high = each.mean(axis=0) - error, each.mean(axis=0) + error
                panel.fill_between(
                    grid / scale, low, high, alpha=0.15, color=line.get_color(), linewidth=0
                )
        panel.set_title(task or "all tasks")
        panel.set_xlabel("total PFLOPs" if axis == "flops" else AXES[axis])
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out greedy accuracy")
    axes.flat[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(results: pathlib.Path, out: pathlib.Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png from the results, and prints the tables."""
    runs = read(results)
    table = summarise(runs)
    every = [result for by_seed in runs.values() for result in by_seed.values()]
    seeds = sorted(runs["uniform"])
    common.write(str(out), {
        "question": "Does SAGE need less than uniform DPO on a real model and several tasks?",
        "seeds": seeds,
        "machines": [json.loads(m) for m in sorted({json.dumps(r["machine"]) for r in every})],
        "settings": every[0]["settings"],
        "pairs": {str(seed): runs["uniform"][seed]["pairs"] for seed in seeds},
        "summary": table,
        "curves": {m: {str(s): r["curve"] for s, r in of.items()} for m, of in runs.items()},
    })  # fmt: skip
    text = markdown(table, len(seeds))
    out.with_suffix(".md").write_text(text)
    plot(runs, out.with_suffix(".png"))
    print("\n" + text)
