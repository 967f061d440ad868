"""Learning curves: areas, crossings, paired differences, figures.

A curve is a list of points {"step", "pairs", "flops", "seconds", "accuracy"}, in order. Where
methods are compared, curves of one key (a seed, or a task and a seed) belong together.
"""

from __future__ import annotations

import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

Point = dict[str, float]
Curves = Mapping[Hashable, Sequence[Point]]  # by seed

AXES = {
    "step": "optimizer steps",
    "pairs": "pairs trained",
    "flops": "total TFLOPs, scoring counted",
    "seconds": "device seconds, scoring counted",
}
SCALE = {"flops": 1e12}


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The curve in the rows of a metrics.jsonl: those with an evaluation, also by level."""
    keys = {"step": "step", "pairs": "pairs", "flops": "flops", "seconds": "perf/seconds"}
    level = "eval_accuracy_level_"
    return [
        {k: row.get(v, 0.0) for k, v in keys.items()}
        | {"accuracy": row["eval_accuracy"]}
        | {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith(level)}
        for row in rows
        if "eval_accuracy" in row
    ]


def column(curve: Sequence[Point], key: str) -> np.ndarray:
    return np.array([point[key] for point in curve], float)


def area(curve: Sequence[Point], axis: str, upto: float) -> float:
    """Mean accuracy over an axis, from 0 up to a bound that all methods reach."""
    grid = np.linspace(0, upto, 401)
    return float(np.interp(grid, column(curve, axis), column(curve, "accuracy")).mean())


def at(curve: Sequence[Point], axis: str, value: float) -> float:
    """Accuracy at a point of an axis, interpolated."""
    return float(np.interp(value, column(curve, axis), column(curve, "accuracy")))


def level(start: float, best: float, share: float) -> float:
    """The accuracy at which a share of a gain is reached."""
    return start + share * (best - start)


def _mean_curve(curves: Curves, scale: Mapping[Hashable, float], axis: str) -> np.ndarray:
    """[2, 401] places and mean accuracies, in units of each key's scale; as far as all go."""
    end = min(curve[-1][axis] / scale[key] for key, curve in curves.items())
    grid = np.linspace(0, end, 401)
    each = [
        np.interp(grid * scale[key], column(curve, axis), column(curve, "accuracy"))
        for key, curve in curves.items()
    ]
    return np.array([grid, np.mean(each, axis=0)])


def relative_need(method: Curves, uniform: Curves, axis: str, share: float) -> dict[str, Any]:
    """What a method needs, relative to uniform, for a share of uniform's best gain.

    Read off the mean curves over keys: single curves are noisy, and the best of a noisy curve is
    luck. The standard error is the jackknife's over keys.

    Returns:
        mean, standard_error, count, and `lower_bound`: the mean curve of the method never gets
        there, so the whole of its axis stands for what it needs.
    """

    def ratio(keys: Sequence[Hashable]) -> tuple[float, bool]:
        scale = {key: uniform[key][-1][axis] for key in keys}
        theirs = _mean_curve({key: uniform[key] for key in keys}, scale, axis)
        mine = _mean_curve({key: method[key] for key in keys}, scale, axis)
        wanted = level(theirs[1, 0], theirs[1].max(), share)
        needs = theirs[0, np.argmax(theirs[1] >= wanted)]
        there = bool((mine[1] >= wanted).any())
        reach = mine[0, np.argmax(mine[1] >= wanted)] if there else mine[0, -1]
        return float(reach / needs) if needs else 1.0, there

    keys = list(method)
    mean, there = ratio(keys)
    error = None
    if len(keys) > 1:
        without = [ratio([k for k in keys if k != left])[0] for left in keys]
        error = float(np.sqrt((len(keys) - 1) * np.var(without)))
    return {"mean": mean, "standard_error": error, "count": len(keys), "lower_bound": not there}


def mean_error(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard error (None for one value) and count; no mean where a value is None."""
    if any(value is None for value in values):
        return {"mean": None, "standard_error": None, "count": len(values)}
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "count": len(values)}


def compare(method: Curves, uniform: Curves) -> dict[str, Any]:
    """What a method does against uniform, paired by key.

    Returns:
        `accuracy_*` and `minus_uniform_*`: at the end of the shorter curve, and as the mean over
        each axis up to there; `*_to_95` and `*_to_best`: see `relative_need`.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    all_curves = [*method.values(), *uniform.values()]
    axes = [axis for axis in AXES if all(curve[-1][axis] > 0 for curve in all_curves)]
    for key, curve in method.items():
        other = uniform[key]
        note("accuracy_before", curve[0]["accuracy"])
        note("accuracy_after", curve[-1]["accuracy"])
        for axis in axes:
            upto = min(curve[-1][axis], other[-1][axis])
            mine, theirs = area(curve, axis, upto), area(other, axis, upto)
            note(f"accuracy_over_{axis}", mine)
            note(f"minus_uniform_over_{axis}", mine - theirs)
            mine, theirs = at(curve, axis, upto), at(other, axis, upto)
            note(f"accuracy_at_equal_{axis}", mine)
            note(f"minus_uniform_at_equal_{axis}", mine - theirs)
    needs = {
        f"{axis}_to_{name}": relative_need(method, uniform, axis, share)
        for axis in axes
        for name, share in (("95", 0.95), ("best", 1.0))
    }
    return {k: mean_error(v) for k, v in found.items()} | needs


def text(value: Mapping[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    """`mean ± standard error` for a table; "-" where nothing was measured."""
    if value is None or value["mean"] is None:
        return "-"
    mean = f"{value['mean']:{'+' if sign else ''}.{digits}f}"
    if value.get("lower_bound"):
        return f"> {mean}"
    error = value["standard_error"]
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a README."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def plot(
    panels: Mapping[str, Mapping[str, Curves]],
    path: str | pathlib.Path,
    axes: Sequence[str] = ("step", "pairs", "flops", "seconds"),
) -> None:
    """Draws mean accuracy: a row a panel, a column an axis, a colour a method.

    Bands are one standard error of the difference to `uniform` paired by key, where there is one:
    keys differ more among themselves than methods do.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    size = (3.6 * len(axes), 3.0 * len(panels))
    figure, cells = plt.subplots(
        len(panels), len(axes), figsize=size, sharey="row", layout="constrained", squeeze=False
    )
    for row, (title, methods) in zip(cells, panels.items(), strict=True):
        for cell, key in zip(row, axes, strict=True):
            for name, by_key in methods.items():
                _line(cell, by_key, methods.get("uniform"), key, name, colours[name])
            cell.set_xlabel(AXES[key])
            cell.grid(alpha=0.3)
        row[0].set_ylabel(f"{title}\nheld-out accuracy")
    lines = [plt.Line2D([], [], color=colours[name], label=name) for name in names]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(cell: Any, by_key: Curves, uniform: Curves | None, axis: str, name: str, colour: str):
    paired = uniform if uniform is not None and name != "uniform" else None
    among = [*by_key.values(), *(paired.values() if paired else ())]
    grid = np.linspace(0, min(curve[-1][axis] for curve in by_key.values()), 101)
    each = np.array([
        np.interp(grid, column(curve, axis), column(curve, "accuracy"))
        for curve in by_key.values()
    ])  # fmt: skip
    mean, x = each.mean(axis=0), grid / SCALE.get(axis, 1.0)
    cell.plot(x, mean, color=colour)
    if paired is None or len(each) < 2:
        return
    shared = grid <= min(curve[-1][axis] for curve in among)
    theirs = np.array([
        np.interp(grid, column(paired[key], axis), column(paired[key], "accuracy"))
        for key in by_key
    ])  # fmt: skip
    error = (each - theirs).std(axis=0, ddof=1) / np.sqrt(len(each))
    low, high = (mean - error)[shared], (mean + error)[shared]
    cell.fill_between(x[shared], low, high, alpha=0.2, color=colour, linewidth=0)
