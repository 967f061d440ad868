"""Formats of preference data, as a table: which columns name a format, and how a row is read.

Every row becomes a prompt, a chosen and a rejected side: strings in the standard form, lists of
`{"role", "content"}` turns in the conversational form. Nothing is tokenised here.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sage_jax.data import canonical

Row = Mapping[str, Any]


class Format(NamedTuple):
    """A format is known by the columns it needs; a column that is None counts as missing."""

    name: str
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Row], canonical.Pair]
    matches: Callable[[Row], bool] = lambda row: True


def _instruction(question: Any, system: Any = None, extra: Any = None) -> canonical.Turns:
    asked = canonical.string(question, "instruction or question")
    asked = f"{asked}\n{extra}" if extra else asked
    head = [{"role": "system", "content": canonical.string(system, "system")}] if system else []
    return [*head, {"role": "user", "content": asked}]


def _ids(row: Row) -> canonical.Pair:
    ids: list[list[int]] = []
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        value = row[column]
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy rows
        if not isinstance(value, list) or not value or not all(_is_id(i) for i in value):
            raise canonical.wrong_type(column, value, "a non-empty list of token ids")
        ids.append(value)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    given = {name: row[name] for name in names if row.get(name) is not None}
    for column, value in given.items():
        if not isinstance(value, numbers.Real) or math.isinf(value):
            raise canonical.wrong_type(column, value, "a finite number of nats")
    both = len(given) == 2  # that of one side alone is a column like any other
    logps = (float(given[names[0]]), float(given[names[1]])) if both else None
    made = canonical.Ids(ids[0], ids[1], ids[2], logps)
    return canonical.Pair("", "", "", made, () if both else tuple(given))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _sharegpt(row: Row) -> canonical.Pair:
    context = canonical.turns(row["conversations"], "conversations", "user")
    system = row.get("system")
    head = [{"role": "system", "content": canonical.string(system, "system")}] if system else []
    return canonical.pair(head + context, row["chosen"], row["rejected"])


def _ranked(row: Row) -> canonical.Pair:
    answers = row["completions"]
    if not isinstance(answers, Sequence) or len(answers) < 2:
        raise canonical.wrong_type("completions", answers, 'two or more {"rank", "completion"}')
    if not all(isinstance(a, Mapping) and {"rank", "completion"} <= a.keys() for a in answers):
        raise canonical.wrong_type("completions", answers, '{"rank", "completion"} in every entry')
    for answer in answers:  # texts would be compared letter by letter: "10" before "9"
        if not isinstance(answer["rank"], numbers.Real) or math.isnan(answer["rank"]):
            raise canonical.wrong_type("rank", answer["rank"], "a number")
    best = min(answers, key=lambda a: a["rank"])
    worst = max(answers, key=lambda a: a["rank"])
    if best["rank"] == worst["rank"]:
        raise canonical.BadRowError(
            "equal ranks", f"all ranks are {best['rank']}, expected a best and a worst"
        )
    return canonical.pair(row["context"], best["completion"], worst["completion"])


def _completion(row: Row) -> canonical.Pair:
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(answer, str):
        return canonical.Pair(prompt, answer, None)
    asked = canonical.turns(prompt, "prompt", "user")
    return canonical.answered(
        canonical.Pair(asked, canonical.turns(answer, "completion", "assistant"), None)
    )


def _messages(row: Row) -> canonical.Pair:
    chat = canonical.turns(row["messages"], "messages", "user")
    if len(chat) < 2:
        raise canonical.wrong_type("messages", row["messages"], "a question and an answer")
    return canonical.answered(canonical.Pair(chat[:-1], chat[-1:], None))


def _texts(row: Row) -> bool:
    return isinstance(row["chosen"], str) and isinstance(row["rejected"], str)


SIDES = ("chosen", "rejected")
FORMATS: dict[str, Format] = {  # the first that matches a row reads it
    f.name: f
    for f in (
        Format(
            "ids",
            ("prompt_ids", "chosen_ids", "rejected_ids"),
            ("ref_chosen_logps", "ref_rejected_logps"),
            _ids,
        ),
        Format(
            "explicit",
            ("prompt", *SIDES),
            (),
            lambda row: canonical.pair(row["prompt"], row["chosen"], row["rejected"]),
        ),
        Format("sharegpt", ("conversations", *SIDES), ("system",), _sharegpt),
        Format(
            "alpaca",
            ("instruction", *SIDES),
            ("input", "system"),
            lambda row: canonical.pair(
                _instruction(row["instruction"], row.get("system"), row.get("input")),
                row["chosen"],
                row["rejected"],
            ),
            _texts,
        ),
        Format(
            "intel",
            ("question", *SIDES),
            ("system",),
            lambda row: canonical.pair(
                _instruction(row["question"], row.get("system")), row["chosen"], row["rejected"]
            ),
            _texts,
        ),
        Format(
            "argilla",
            ("instruction", "chosen_response", "rejected_response"),
            (),
            lambda row: canonical.pair(
                _instruction(row["instruction"]), row["chosen_response"], row["rejected_response"]
            ),
        ),
        Format(
            "tunix",
            ("prompts", "chosen_responses", "rejected_responses"),
            (),
            lambda row: canonical.pair(
                row["prompts"], row["chosen_responses"], row["rejected_responses"]
            ),
        ),
        Format(
            "implicit", SIDES, (), lambda row: canonical.pair(None, row["chosen"], row["rejected"])
        ),
        Format("nemo", ("context", "completions"), (), _ranked),
        Format("completion", ("prompt", "completion"), (), _completion),
        Format("messages", ("messages",), (), _messages),
    )
}
TEMPLATE_COLUMNS: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}


def detect(row: Row, name: str = "auto") -> Format:
    """The format of a row: the first of the table whose columns it has.

    >>> detect({"instruction": "Add.", "chosen": "4", "rejected": "5"}).name
    'alpaca'
    """
    candidates = FORMATS.values() if name == "auto" else [FORMATS[name]]
    for candidate in candidates:
        if all(row.get(column) is not None for column in candidate.needs):
            if candidate.matches(row):
                return candidate
    # The format that the row shares most columns with; one of which it lacks all is no hint.
    nearest = min(
        (c for c in candidates if any(column in row for column in c.needs)),
        key=lambda c: (len(_missing(row, c)), -len(c.needs)),
        default=FORMATS["explicit" if name == "auto" else name],
    )
    missing = _missing(row, nearest)
    raise canonical.BadRowError(
        "missing columns",
        f"column {' and '.join(map(repr, missing or nearest.needs))} is missing or of the wrong "
        f"kind among {sorted(map(str, row))}, expected {', '.join(nearest.needs)} "
        f"(format '{nearest.name}')",
    )


def template_options(row: Row) -> dict[str, Any]:
    """Keyword arguments of the chat template: `tools` and the row's `chat_template_kwargs`."""
    options: dict[str, Any] = {}
    for column, kind in TEMPLATE_COLUMNS.items():
        value: Any = row.get(column)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except ValueError as e:
                raise canonical.BadRowError(
                    "wrong type", f"'{column}' is not valid JSON ({e})"
                ) from e
        if value and not isinstance(value, kind):
            raise canonical.wrong_type(column, value, f"a {kind.__name__}")
        if value:
            options |= {"tools": value} if column == "tools" else dict(value)
    return options


def _missing(row: Row, candidate: Format) -> tuple[str, ...]:
    return tuple(column for column in candidate.needs if row.get(column) is None)
