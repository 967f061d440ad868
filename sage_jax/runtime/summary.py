"""The end of a run: summary.json, and the table that a person sees."""

from __future__ import annotations

import pathlib
from typing import Any

from sage_jax.report import progress
from sage_jax.runtime import loop


def first_last(rows: list[dict[str, Any]], key: str) -> tuple[float | None, float | None]:
    """The first and the last value under a key; None where no row has it."""
    values = [row[key] for row in rows if key in row]
    return (values[0], values[-1]) if values else (None, None)


def make(
    outcome: loop.Outcome, twin: loop.Outcome | None, seconds: float, method: str
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        outcome: the run.
        twin: uniform DPO at equal FLOPs, if it was trained.
        seconds: of the command, and of those before it when it resumed.
        method: what the run was trained with, such as the name of its selection.
    """
    before, after = first_last(outcome.rows, "eval_accuracy")
    counters = outcome.counters
    summary: dict[str, Any] = {
        "method": method,
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_uniform": first_last(twin.rows, "eval_accuracy")[1] if twin else None,
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


def show(summary: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the closing table, and where things lie."""

    def share(name: str) -> str:
        value = summary.get(f"accuracy_{name}")
        if value is None:
            return "-"
        low, high = summary.get(f"accuracy_{name}_interval", (value, value))
        return f"{100 * value:.1f} % ({100 * low:.1f} - {100 * high:.1f})"

    def count(key: str, scale: float = 1.0, form: str = ",.0f") -> str:
        return format(summary[key] / scale, form) if summary.get(key) is not None else "-"

    total = summary["flops_scoring"] + summary["flops_training"]
    method = {"sage": "SAGE", "sft": "supervision"}.get(summary["method"], summary["method"])
    rows = [["before", share("before"), "-", "-", "-", "-"]]
    rows.append(
        [f"after {method}", share("after"), count("steps"), count("pairs_trained"),
         f"{total / 1e9:,.1f}", count("seconds_training", form=",.0f")]
    )  # fmt: skip
    if summary.get("accuracy_uniform") is not None or "steps_uniform" in summary:
        rows.append(
            ["after uniform DPO, equal FLOPs", share("uniform"), count("steps_uniform"),
             count("pairs_trained_uniform"), count("flops_uniform", 1e9, ",.1f"),
             count("seconds_training_uniform", form=",.0f")]
        )  # fmt: skip
    header = ["", "held-out accuracy (95 %)", "steps", "pairs trained", "GFLOPs", "seconds"]
    print("\n" + progress.table(header, rows))
    print(f"\nThe whole run took {summary['seconds']:.0f} seconds.")
    for name, path in (("report", "report.html"), ("model", "export"), ("rows", "metrics.jsonl")):
        if (workdir / path).exists():
            print(f"{name:8} {workdir / path}")
