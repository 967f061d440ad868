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
pre { overflow-x: auto; font-size: .85rem } summary { cursor: pointer }
"""  # noqa: E501

_ACCURACY = (
    "Share of held-out problems that the model solves with greedy decoding; the bands are 95% "
    "intervals. The charts show the same evaluations against three costs. The last one is the "
    "fair one: selecting pairs is worth its price if its line lies higher there."
)


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the report of a run from the files in its directory, finished or not.

    Args:
        workdir: with `metrics.jsonl`; and, where they exist, `summary.json`, `config.json`,
            `selection/` and `uniform/metrics.jsonl` (the twin trained without selection).

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
    twin = writers.read_rows(workdir / "uniform" / "metrics.jsonl")
    if twin:
        runs["uniform DPO"] = twin
    parts = [
        f"<h1>{html.escape(_title(config))}</h1>"
        f'<p class="path">{html.escape(str(workdir.absolute()))}</p>',
        _headline(_read_json(workdir / "summary.json")),
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


def _headline(summary: dict[str, Any]) -> str:
    """The table of results, and one sentence that says what they mean."""
    if not summary:
        return "<p>The run is not finished: there is no summary yet.</p>"
    rows = []
    for key, label in (("before", "before"), ("after", "after"), ("uniform", "uniform DPO")):
        if summary.get(f"accuracy_{key}") is None:
            continue
        interval = summary.get(f"accuracy_{key}_interval")
        span = " – ".join(f"{100 * end:.1f}%" for end in interval) if interval else "–"
        rows.append([f"accuracy {label}", f"{100 * summary[f'accuracy_{key}']:.1f}%", span])
    tables = _table(["held-out, greedy decoding", "solved", "95% interval"], rows) if rows else ""
    if summary.get("accuracy_uniform") is not None:
        tables += (
            "<p>Uniform DPO trained on randomly drawn pairs with the same total of floating-point "
            "operations, the scoring of pairs counted. Where intervals overlap, a single run "
            "does not decide which is better.</p>"
        )
    names = ("pairs_trained", "steps", "seconds", "flops_scoring", "flops_training")
    counts = [
        [n.replace("_", " ").replace("flops", "FLOPs"), _number(n, summary[n])]
        for n in names
        if n in summary
    ]
    return f"{tables}{_table(['spent', ''], counts)}"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
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
