"""Files of a run: `metrics.jsonl`, `summary.json`, `selection/round_*.jsonl`.

What is not finite is written as `null`, since JSON has no NaN. A row is on disk when `write`
returns; whole files appear by an atomic rename, so that no reader ever sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, TextIO

PathLike = str | os.PathLike[str]


def first_process() -> bool:
    """Whether this process is the one that writes files and prints, among those of a run."""
    import jax

    return jax.process_index() == 0


def plain(value: Any) -> Any:
    """The value as JSON knows it: numbers and arrays of any library as Python's, NaN as None.

    >>> import numpy as np
    >>> plain({"loss": np.float32(0.5), "worst": float("nan"), "share": np.array([1, 2])})
    {'loss': 0.5, 'worst': None, 'share': [1, 2]}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and jax, scalars included
        return plain(value.tolist())
    raise TypeError(f"{value!r} is a {type(value).__name__}; a JSON file holds numbers and text.")


def write_text(path: PathLike, text: str) -> pathlib.Path:
    """Writes a file that is either the old or the new one, whatever happens; returns its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path), open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _named(path: PathLike) -> Iterator[None]:
    """Gives an error of writing, such as that of a full disk, the name of the file."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, os.fspath(path)) from e


def write_json(path: PathLike, value: Any) -> pathlib.Path:
    """Writes an indented JSON file atomically.

    >>> import tempfile
    >>> path = write_json(pathlib.Path(tempfile.mkdtemp()) / "summary.json", {"steps": 3})
    >>> json.loads(path.read_text())
    {'steps': 3}
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    return write_text(path, text + "\n")


def read_rows(path: PathLike) -> list[dict[str, Any]]:
    """Rows of a JSONL file; none if there is no file.

    A last line without its end is what a killed process leaves, and is left out.

    Raises:
        ValueError: another line is no JSON object; the message has the form `file:line: what`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}:{number}: {e.msg}; a line must be one JSON object.") from e
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: {line[:40]!r} is not a JSON object.")
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends rows of metrics to a JSONL file, for a run that may have been interrupted.

    Args:
        path: the file, usually `metrics.jsonl`; made when missing.
        after_step: rows of later steps, which a resumed run is going to write again, are dropped
            first; -1 drops all.
        tensorboard: directory of TensorBoard event files that mirror the numbers; None = none.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsWriter(path, after_step=-1) as writer:
        ...     writer.write({"step": 0, "loss": 0.6931})
        >>> read_rows(path)
        [{'step': 0, 'loss': 0.6931}]
    """

    def __init__(
        self, path: PathLike, after_step: int = -1, *, tensorboard: PathLike | None = None
    ):
        self.path = pathlib.Path(path)
        self._file: TextIO | None = None
        self._events: Any = None
        if not first_process():
            return
        if tensorboard is not None:
            self._events = _event_writer(tensorboard, after_step)
        kept = [row for row in read_rows(self.path) if row["step"] <= after_step]
        write_text(self.path, "".join(map(_line, kept)))
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one flat row with an integer `step`; on disk when this returns."""
        if self._file is None:
            return
        if not isinstance(row.get("step"), int):
            raise ValueError(f"A row of metrics has step={row.get('step')!r}; it must be an int.")
        with _named(self.path):
            self._file.write(_line(row))
            self._file.flush()
        if self._events is not None:
            for name, value in plain(row).items():
                if isinstance(value, int | float) and name != "step":
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def selection_path(workdir: PathLike, round: int) -> pathlib.Path:
    """Where the selection of a round is logged.

    >>> selection_path("runs/a", 12).as_posix()
    'runs/a/selection/round_00012.jsonl'
    """
    return pathlib.Path(workdir) / "selection" / f"round_{round:05d}.jsonl"


def write_selection(workdir: PathLike, round: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes who was a candidate in a round, with which score, who was selected, and why.

    Args:
        workdir: directory of the run.
        round: number of the round, from 0.
        rows: one a candidate: pair, stratum, margin, standard error, score, selected, why.
    """
    if first_process():
        write_text(selection_path(workdir, round), "".join(map(_line, rows)))


_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


def _line(row: Mapping[str, Any]) -> str:
    return _encode(plain(row)) + "\n"


def _event_writer(directory: PathLike, after_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError as e:
        raise ValueError(
            "TensorBoard files need tensorboardX: pip install 'sage_jax[report]'."
        ) from e
    return tensorboardX.SummaryWriter(os.fspath(directory), purge_step=after_step + 1)
