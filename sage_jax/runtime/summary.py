"""The end of a run: summary.json, and the tables that a person sees."""

from __future__ import annotations

import pathlib
from typing import Any

from sage_jax.report import progress
from sage_jax.runtime import counters, loop, suspicion

_NAMES = {"sage": "SAGE", "sft": "supervision", "uniform": "uniform DPO", "random": "random"}
_PARTS = ("sampling", "scoring", "training")


def first_last(rows: list[dict[str, Any]], key: str) -> tuple[float | None, float | None]:
    """The first and the last value under a key; None where no row has it."""
    values = [row[key] for row in rows if key in row]
    return (values[0], values[-1]) if values else (None, None)


def _spent(spent: counters.Counters) -> dict[str, Any]:
    """What a run has spent, by the names of summary.json."""
    found: dict[str, Any] = {"pairs_trained": spent.pairs, "steps": spent.step}
    found |= {f"flops_{part}": getattr(spent, f"flops_{part}") for part in _PARTS}
    for part in ("drawing", *_PARTS, "compiling"):
        found[f"seconds_{part}"] = getattr(spent, f"seconds_{part}")
    return found


def make(
    outcome: loop.Outcome,
    twins: dict[str, loop.Outcome],
    seconds: float,
    method: str,
    pairs: int,
) -> dict[str, Any]:
    """The content of summary.json; what belongs to a twin has its name as an ending.

    Args:
        outcome: the run.
        twins: runs at equal FLOPs, by name, if there are any.
        seconds: of the command, and of those before it when it resumed.
        method: what the run was trained with, such as the name of its selection.
        pairs: in the data set.
    """
    before, after = first_last(outcome.rows, "eval_accuracy")
    spent = outcome.counters
    summary: dict[str, Any] = {
        "method": method,
        "accuracy_before": before,
        "accuracy_after": after,
        "seconds": round(seconds, 1),
        **_spent(spent),
        "pairs": pairs,
        "pairs_reference": spent.pairs_reference,
        "flops_reference": spent.flops_reference,
        "seconds_reference": spent.seconds_reference,
        "warnings": list(outcome.warnings),
    }
    if outcome.flips is not None:
        summary["suspected"] = int(outcome.flips.suspected_N.sum())
        summary["suspected_of"] = len(outcome.flips.suspected_N)  # pairs, with new ones
        summary["flip_share"] = outcome.flips.share
    intervals = {"before": outcome.rows[0], "after": outcome.rows[-1]}
    for name, twin in twins.items():
        intervals[name] = twin.rows[-1]
        found = _spent(twin.counters) | {"warnings": list(twin.warnings)}
        found["accuracy"] = first_last(twin.rows, "eval_accuracy")[1]
        summary |= {f"{key}_{name}": value for key, value in found.items()}
    for name, row in intervals.items():
        if "eval_accuracy_low" in row:
            summary[f"accuracy_{name}_interval"] = [
                row["eval_accuracy_low"], row["eval_accuracy_high"]
            ]  # fmt: skip
    for key in ("eval_rewards/accuracies", "eval_loss", "eval_kl", "eval_kl_per_token"):
        if key in outcome.rows[-1]:
            summary[key] = outcome.rows[-1][key]
    return summary


def show(summary: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the closing tables, what was warned of, and where things lie."""
    method = _NAMES.get(summary["method"], summary["method"])
    runs = [(f"after {method}", "after", "")]
    for twin in ("uniform", "random"):
        if f"steps_{twin}" in summary:
            runs.append((f"after {_NAMES[twin]}, equal FLOPs", twin, f"_{twin}"))
    rows = [["before", _accuracy(summary, "before"), "-", "-", "-", "-"]]
    for label, name, end in runs:
        flops = sum(summary[f"flops_{part}{end}"] for part in _PARTS)
        seconds = sum(summary[f"seconds_{part}{end}"] for part in _PARTS)
        rows.append(
            [label, _accuracy(summary, name), f"{summary[f'steps{end}']:,}",
             f"{summary[f'pairs_trained{end}']:,}", f"{flops / 1e9:,.1f}", f"{seconds:,.0f}"]
        )  # fmt: skip
    header = ["", "held-out accuracy (95 %)", "steps", "pairs trained", "GFLOPs", "seconds"]
    print("\n" + progress.table(header, rows))
    print("\n" + _costs(summary, [(label.removeprefix("after "), end) for label, _, end in runs]))
    if summary["method"] != "sft":
        print("\n" + reference_text(summary))
    if "suspected" in summary:
        print("\n" + flips_text(summary, workdir))
    for key in ("warnings", "warnings_uniform", "warnings_random"):
        for text in summary[key] if key in summary else ():
            print(f"\nWarning ({key[9:] or summary['method']}). {text}")
    print(f"\nThe whole run took {summary['seconds']:.0f} seconds.")
    for name, path in (("report", "report.html"), ("model", "export"), ("rows", "metrics.jsonl")):
        if (workdir / path).exists():
            print(f"{name:8} {workdir / path}")


def _accuracy(summary: dict[str, Any], name: str) -> str:
    value = summary[f"accuracy_{name}"]
    if value is None:
        return "-"
    low, high = summary[f"accuracy_{name}_interval"]
    return f"{100 * value:.1f} % ({100 * low:.1f} - {100 * high:.1f})"


def _costs(summary: dict[str, Any], runs: list[tuple[str, str]]) -> str:
    """Where time and FLOPs went: the table's seconds and GFLOPs are these parts' sums."""
    sampled = any(summary[f"flops_sampling{end}"] for _, end in runs)
    parts = [part for part in _PARTS if part != "sampling" or sampled]
    rows = []
    for label, end in runs:
        cells = [label]
        for part in parts:
            flops, seconds = (summary[f"{unit}_{part}{end}"] for unit in ("flops", "seconds"))
            cells.append(f"{seconds:,.1f} ({flops / 1e9:,.1f})")
        for part in ("drawing", "compiling"):
            cells.append(f"{summary[f'seconds_{part}{end}']:,.1f}")
        rows.append(cells)
    header = ["seconds (GFLOPs)", *parts, "+ host: drawing", "compiling"]
    return progress.table(header, rows)


def flips_text(summary: dict[str, Any], workdir: pathlib.Path) -> str:
    """One sentence on which labels look wrong, and where they are listed."""
    count, share = summary["suspected"], 100 * summary["flip_share"]
    text = f"{count:,} of {summary['suspected_of']:,} pairs look flipped"
    if not count:
        return f"{text} (estimated share of flipped labels: {share:.0f} %)."
    where = suspicion.path(workdir)
    return f"{text} (estimated share of flipped labels: {share:.0f} %): {where}"


def reference_text(summary: dict[str, Any]) -> str:
    """One sentence on what the reference pass cost, which belongs to no method."""
    count = summary["pairs_reference"]
    if not count:
        return "Reference log-probs: all known already, 0 GFLOPs."
    text = (
        f"Reference log-probs, which every method needs: {count:,} pairs computed in "
        f"{summary['seconds_reference']:.1f} seconds, {summary['flops_reference'] / 1e9:,.1f} "
        f"GFLOPs"
    )
    return f"{text}; the others were known already." if count < summary["pairs"] else f"{text}."
