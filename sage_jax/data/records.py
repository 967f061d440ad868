"""Reading preference data: JSONL, JSON, Parquet, or any sequence of dicts, into `Record`s.

A bad row is named by file and line with what is wrong and what is expected. It ends the reading,
or with `on_bad_row="skip"` is left out and counted; nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import numbers
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage_jax.data import canonical, formats

KEPT_TEXTS = frozenset({"task", "answer", "solution", "source", "id"})
SUFFIXES = (".jsonl", ".json", ".parquet")
Source = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of data in canonical form, before any tokenisation.

    Attributes:
      prompt, chosen, rejected: strings in the standard form, lists of `{"role", "content"}` turns
        in the conversational form; `rejected` is None for a supervised example.
      origin: where the row stands, "file:line".
      columns: numbers the row carries besides, such as pass_rate, level or score.
      texts: strings the row carries besides, such as task or answer.
      template: keyword arguments of the chat template (`tools` and chat_template_kwargs).
      ids: the token ids of a pre-tokenised row, else None.
    """

    prompt: canonical.Text
    chosen: canonical.Text
    rejected: canonical.Text | None
    origin: str
    columns: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    ids: canonical.Ids | None = None

    @property
    def conversational(self) -> bool:
        """Whether the row is made of turns, so that a chat template renders it."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class Records:
    """Rows that were read, and an account of what was not.

    Attributes:
      rows: the records, in the order of the source.
      skipped: bad rows left out, by reason.
      examples: the messages of the first few skipped rows.
      ignored_columns: columns that nothing uses, with the number of rows that had them.
      fingerprint: hash of the source's bytes and the reading options.
    """

    rows: list[Record]
    skipped: Counter[str]
    examples: list[str]
    ignored_columns: Counter[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)


def read(source: Source, *, format: str = "auto", on_bad_row: str = "error") -> Records:
    """Reads preference pairs or supervised examples.

    Args:
      source: a .jsonl, .json or .parquet file, a directory of such files, a list of files, or a
        sequence of dicts.
      format: "auto", or a name from `formats.FORMATS` that every row must have.
      on_bad_row: "error" raises at the first bad row, "skip" leaves it out and counts it.

    Returns:
      The records, with counts of skipped rows and ignored columns.

    Raises:
      ValueError: for a source that is missing or holds no usable row, and for a bad row.

    >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5", "level": 1}]
    >>> read(rows).rows[0].columns
    {'level': 1.0}
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; expected 'error' or 'skip'.")
    if format != "auto" and format not in formats.FORMATS:
        known = ", ".join(["auto", *formats.FORMATS])
        raise ValueError(f"format={format!r} is unknown; expected one of {known}.")
    rows: list[Record] = []
    skipped: Counter[str] = Counter()
    examples: list[str] = []
    ignored: Counter[str] = Counter()
    digest = _new_digest(format, on_bad_row)
    for content, block in _blocks(source):
        digest.update(content)
        for origin, row in block:
            try:
                record, unused = _record(row, origin, format)
            except canonical.BadRowError as e:
                if on_bad_row == "error":
                    raise ValueError(f"{origin}: {e}.") from e
                skipped[e.reason] += 1
                examples += [f"{origin}: {e}."] if len(examples) < 5 else []
                continue
            rows.append(record)
            ignored.update(unused)
    if not rows:
        lost = f" ({skipped.total()} skipped: {dict(skipped)})" if skipped else ""
        raise ValueError(
            f"{_name(source)} holds no usable row{lost}; expected at least one pair. "
            f"{' '.join(examples[:1])}".rstrip()
        )
    return Records(rows, skipped, examples, ignored, digest.hexdigest())


def _record(row: Any, origin: str, format: str) -> tuple[Record, list[str]]:
    """The record of one raw row, and the columns nothing used."""
    if isinstance(row, canonical.BadRowError):
        raise row
    if not isinstance(row, Mapping):
        raise canonical.BadRowError(
            "not an object", f"{type(row).__name__}, expected an object (a dict)"
        )
    found = formats.detect(row, format)
    pair = found.parse(row)
    used = {*found.needs, *found.optional, *formats.TEMPLATE_COLUMNS} - set(pair.unused)
    columns, texts, unused = {}, {}, []
    for key, value in row.items():
        if key in used or value is None:
            continue
        if isinstance(value, numbers.Real):
            columns[key] = _number(key, value)
        elif isinstance(value, str) and key in KEPT_TEXTS:
            texts[key] = value
        else:
            unused.append(key)
    template = formats.template_options(row)
    prompt, chosen, rejected, ids, _ = pair
    for column, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _check_text(column, text)
    for column, text in texts.items():
        _check_text(column, text)
    return Record(prompt, chosen, rejected, origin, columns, texts, template, ids), unused


def _number(column: str, value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError as e:
        raise canonical.wrong_type(column, value, "a number that a float64 holds") from e


def _check_text(column: str, value: Any) -> None:
    """Refuses half of a surrogate pair, such as an emoji that was cut in two: it is no text."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise canonical.BadRowError(
                "not text",
                f"'{column}' has {value[e.start]!r} at character {e.start}, half of a surrogate "
                f"pair, expected whole characters",
            ) from e
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            _check_text(column, part)


def raw(source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of a source as they stand in it, with their origin; lines without JSON are left out.

    >>> list(raw([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]))[0][0]
    'row 0'
    """
    for _, block in _blocks(source):
        for origin, row in block:
            if not isinstance(row, canonical.BadRowError):
                yield origin, row


def _name(source: Source) -> str:
    names = [source] if isinstance(source, str | Path) else list(source)
    if not names or not all(isinstance(item, str | Path) for item in names):
        return "the data"
    return ", ".join(f"'{name}'" for name in names)


def fingerprint(source: Source, *, format: str = "auto", on_bad_row: str = "error") -> str:
    """What `read(...).fingerprint` would be, without parsing: a hash of the bytes and options."""
    digest = _new_digest(format, on_bad_row)
    for content, _ in _blocks(source):
        digest.update(content)
    return digest.hexdigest()


def _new_digest(format: str, on_bad_row: str) -> Any:
    return hashlib.blake2b(repr((format, on_bad_row)).encode(), digest_size=16)


def _blocks(source: Source) -> Iterator[tuple[bytes, Iterable[tuple[str, Any]]]]:
    """Yields the bytes of a file or of a dict, and its (origin, row or BadRowError) pairs."""
    if isinstance(source, Mapping):
        raise ValueError(
            f"the data is one dict, with {', '.join(map(repr, list(source)[:4]))}; give a list of "
            f"rows, each a dict."
        )
    if isinstance(source, str | Path):
        source = [source]
    if all(isinstance(item, str | Path) for item in source):
        for item in source:
            for file in _files(Path(item)):  # type: ignore[arg-type]
                data = file.read_bytes()
                yield json.dumps([str(file), len(data)]).encode() + data, _file_rows(file, data)
    else:
        for i, row in enumerate(source):
            content = json.dumps(row, sort_keys=True, default=str).encode()
            yield content + b"\n", [(f"row {i}", row)]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"data source '{path}' does not exist; name a file or directory.")
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"data file '{path}' has suffix '{path.suffix}'; expected one of {SUFFIXES}."
            )
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not found:
        raise ValueError(f"data directory '{path}' holds no file with a suffix of {SUFFIXES}.")
    return found


def _file_rows(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        return _parquet_rows(file, data)
    if file.suffix == ".json" and data.lstrip()[:1] != b"{":
        return _json_rows(file, data)
    if file.suffix == ".json" and (row := _lone_object(data)) is not None:
        return iter([(f"{file}:1", row)])
    return _jsonl_rows(file, data)  # also .json files that hold one object a line


def _lone_object(data: bytes) -> Any:
    """The one object that a file holds, on however many lines; None where there are several."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _jsonl_rows(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    data = data.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        row: Any
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            row = canonical.BadRowError(
                "not JSON", f"not valid JSON ({e}), expected one object a line"
            )
        yield f"{file}:{number}", row


def _json_rows(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON array, each with the line it begins on."""
    try:
        text = data.decode("utf-8-sig")
        if not isinstance(json.loads(text), list):
            raise ValueError("the top level is no list")
    except ValueError as e:
        raise ValueError(f"{file}: {e}; expected a JSON array of objects.") from e
    decoder = json.JSONDecoder()
    at, line, seen = text.index("[") + 1, 1, 0
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "]":
            return
        line, seen = line + text.count("\n", seen, at), at
        row, at = decoder.raw_decode(text, at)
        yield f"{file}:{line}", row


def _parquet_rows(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ValueError(
            f"reading '{file}' needs pyarrow; pip install 'sage_jax[parquet]', or give JSONL."
        ) from e
    try:
        table = pq.ParquetFile(pa.BufferReader(data))
    except pa.ArrowInvalid as e:
        raise ValueError(f"{file}: not a Parquet file ({e}); expected one.") from e
    number = 0
    for block in table.iter_batches(batch_size=4096):
        for row in block.to_pylist():
            number += 1
            yield f"{file}:{number}", row
