"""`report.html`: what a run did, as one file that needs nothing else and reads without training.

What the run did not write (a twin, an evaluation, selections) is left out.
"""

from __future__ import annotations

import html
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from sage_jax.report import charts, progress, writers

_EXAMPLES = 8  # pairs of each kind that are shown
_COLUMNS = (  # of the selection log, in the order in which they are shown
    "pair", "origin", "prompt", "chosen", "rejected", "stratum", "reward_margin",
    "likelihood_margin", "margin_error", "margin", "se", "score", "why",
)  # fmt: skip
_WHY = {
    "score": "among the best scores of its stratum",
    "uniform": "drawn at random, as a guard against one-sided selection",
    "rank": "others scored better",
    "noise": "looks mislabelled",
    "all": "everything drawn is trained on",
}


_TWINS = {"uniform": "uniform DPO", "random": "random selection"}
_SPENT = (  # of summary.json, in the order in which they are shown
    "pairs_trained", "steps", "flops_sampling", "flops_scoring", "flops_training",
    "seconds_sampling", "seconds_scoring", "seconds_training", "seconds_drawing",
    "seconds_compiling",
)  # fmt: skip


_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { margin-top: 2.2rem; font-size: 1.15rem }
p, figcaption { max-width: 70ch } .path, figcaption { opacity: .75; font-size: .9rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 1rem 2rem }
figure { margin: 0 } svg { width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8884; vertical-align: top }
th:first-child, td:first-child, .text td { text-align: left } td.long { white-space: pre-wrap; max-width: 40ch }
.warning { border-left: 4px solid #c9485b; padding-left: .8rem }
pre { overflow-x: auto; font-size: .85rem } summary { cursor: pointer }
"""  # noqa: E501

_ACCURACY = (
    "Share of held-out problems that the model solves with greedy decoding; the bands are 95% "
    "intervals. The charts show the same evaluations against four costs. Total compute is the "
    "fair one: selecting pairs is worth its price if its line lies higher there. Device time says "
    "the same of this machine, with everything that ran beside it."
)


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the report of a run from the files in its directory, finished or not.

    Args:
        workdir: with `metrics.jsonl`; and, where they exist, `summary.json`, `config.json`,
            `selection/` and the `metrics.jsonl` of twins in `uniform/` and `random/`.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: the directory has no metrics.
    """
    workdir = pathlib.Path(workdir)
    rows = writers.read_rows(workdir / "metrics.jsonl")
    if not rows:
        raise ValueError(
            f"{workdir / 'metrics.jsonl'} has no rows to report. Name the --workdir of a run."
        )
    config = _read_json(workdir / "config.json")
    runs = {_name(config): rows}
    for name, label in _TWINS.items():
        twin = writers.read_rows(workdir / name / "metrics.jsonl")
        if twin:
            runs[label] = twin
    summary = _read_json(workdir / "summary.json")
    parts = [
        f"<h1>{html.escape(_title(config))}</h1>"
        f'<p class="path">{html.escape(str(workdir.absolute()))}</p>',
        _warnings(summary),
        _headline(summary, _name(config)),
        _section("Accuracy", charts.accuracy(runs), _ACCURACY),
        *(_section(title, figures) for title, figures in charts.sections(runs).items()),
        _examples(workdir / "selection"),
        _settings(config),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(workdir.name)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>\n"
    )
    return writers.write_text(workdir / "report.html", page)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _name(config: dict[str, Any]) -> str:
    if config.get("mode") == "sft":
        return "supervised"
    name = config.get("selection", {}).get("name", "this run")
    return {"sage": "SAGE", "uniform": "uniform DPO"}.get(name, name)


def _title(config: dict[str, Any]) -> str:
    what = "Supervised fine-tuning" if config.get("mode") == "sft" else "Preference alignment"
    model = config.get("model", {}).get("path")
    return f"{what} of {model}" if model else what


def _warnings(summary: dict[str, Any]) -> str:
    """What was warned of during the run and its twins."""
    found = ""
    for key, name in {"warnings": "", **{f"warnings_{k}": v for k, v in _TWINS.items()}}.items():
        for text in summary[key] if key in summary else ():
            run = f"{name}: " if name else ""
            found += f'<p class="warning">{html.escape(run + text)}</p>'
    return f"<h2>Warnings</h2>{found}" if found else ""


def _headline(summary: dict[str, Any], method: str) -> str:
    """The tables of results and of costs, and what they mean."""
    if not summary:
        return "<p>The run is not finished: there is no summary yet.</p>"
    rows = []
    for key, label in {"before": "before", "after": "after", **_TWINS}.items():
        if summary.get(f"accuracy_{key}") is None:
            continue
        interval = summary.get(f"accuracy_{key}_interval")
        span = " – ".join(f"{100 * end:.1f}%" for end in interval) if interval else "–"
        rows.append([f"accuracy {label}", f"{100 * summary[f'accuracy_{key}']:.1f}%", span])
    tables = _table(["held-out, greedy decoding", "solved", "95% interval"], rows) if rows else ""
    if any(summary.get(f"accuracy_{twin}") is not None for twin in _TWINS):
        tables += (
            "<p>Twins start from the same weights and spend the same total of floating-point "
            "operations, the scoring of pairs counted: uniform DPO trains on randomly drawn "
            "pairs, random selection keeps the same share of the same pools, at random. Where "
            "intervals overlap, a single run does not decide which is better.</p>"
        )
    return tables + _costs(summary, method)


def _costs(summary: dict[str, Any], method: str) -> str:
    """What the run and its twins have spent, side by side, and what belongs to none of them."""
    runs = {"": method, **{f"_{k}": v for k, v in _TWINS.items() if f"steps_{k}" in summary}}
    counts = [
        [n.replace("_", " ").replace("flops", "FLOPs"), *(_number(n, summary[n + r]) for r in runs)]
        for n in _SPENT
        if all(n + r in summary for r in runs)
        and not (n.endswith("_sampling") and not any(summary[n + r] for r in runs))
    ]
    text = (
        "" if "seconds" not in summary else f"Whole run: {_number('seconds', summary['seconds'])}. "
    )
    if summary.get("pairs_reference"):
        text += (
            f"The reference pass, which every method needs, took "
            f"{_number('flops', summary['flops_reference'])} FLOPs and "
            f"{summary['seconds_reference']:.1f} s, for {summary['pairs_reference']:,} pairs."
        )
    elif "pairs_reference" in summary:
        text += "The reference's log-probs were known already: they cost nothing."
    return _table(["spent", *runs.values()], counts) + (f"<p>{text}</p>" if text else "")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.startswith("seconds_"):
        return f"{value:,.1f}"
    if name == "seconds":
        return progress.duration(value)
    return f"{value:.3g}" if name.startswith("flops") else f"{value:,.0f}"


def _section(title: str, figures: str, words: str = "") -> str:
    if not figures:
        return ""
    text = f"<p>{html.escape(words)}</p>" if words else ""
    return f'<h2>{html.escape(title)}</h2>{text}<div class="charts">{figures}</div>'


def _examples(folder: pathlib.Path) -> str:
    """Some candidates of the last round that was logged: selected ones, and others."""
    files = sorted(folder.glob("round_*.jsonl"))
    rows = writers.read_rows(files[-1]) if files else []
    if not rows:
        return ""
    rows.sort(key=lambda row: -(row.get("score") or 0.0))
    selected = [row for row in rows if row.get("selected")][:_EXAMPLES]
    others = [row for row in rows if not row.get("selected")]
    # Candidates left out as mislabelled first: these are worth a look at the data.
    others = sorted(others, key=lambda row: row.get("why") != "noise")[:_EXAMPLES]
    columns = [key for key in _COLUMNS if any(key in row for row in selected + others)]
    tables = [
        f"<h3>{title}</h3>{_table(columns, [[_cell(r.get(c)) for c in columns] for r in chosen])}"
        for title, chosen in (("Selected, by score", selected), ("Not selected", others))
        if chosen
    ]
    words = (
        f"From {files[-1].name}, which holds all {len(rows)} candidates of that round. "
        f"Why: {'; '.join(f'“{k}” {v}' for k, v in _WHY.items())}."
    )
    return f"<h2>Examples of the selection</h2><p>{html.escape(words)}</p>{''.join(tables)}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):  # a conversation
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    return "–" if value is None else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_td, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _td(text: str) -> str:
    kind = ' class="long"' if len(text) > 30 or "\n" in text else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _settings(config: dict[str, Any]) -> str:
    if not config:
        return ""
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<h2>Settings</h2><details><summary>config.json</summary><pre>{text}</pre></details>"
