"""What a person sees while waiting: progress with a rate and the time left, and the closing table.

On a terminal a tqdm bar; elsewhere (a log file, CI) plain lines, few of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TextIO

from sage_jax.report import writers

_PAUSE = 5.0  # seconds between plain lines, at least
_SILENCE = 30.0  # seconds without a line, at most, while there is progress
_PATIENCE = 10.0  # seconds of work inside other work that are not worth a line


class Progress:
    """Progress of a known number of things, on stderr; silent on all processes but the first.

    Args:
        total: how many things there are.
        label: what is being done, for example "sage".
        unit: plural of the things, for example "steps".
        start: how many are done already, in a resumed run; they do not count for the rate.
        aside: work inside other work that has a bar of its own: shown only when it takes more than
            ten seconds, and gone from a terminal when it is done.
        stream: where to write; stderr by default.
        clock: seconds, for tests.

    Example:
        >>> with Progress(2, "scoring", "pairs", stream=sys.stdout, clock=lambda: 0.0) as bar:
        ...     bar.update(2)
        scoring: 2/2 pairs (100%), 0 s
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        *,
        start: int = 0,
        aside: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.label, self.unit = total, label, unit
        self.done = self._start = start
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began = self._said_at = clock()
        self._said = start
        self._note = ""
        self._patience = _PATIENCE if aside else 0.0
        self._bar: Any = None
        self._silent = total <= 0 or not writers.first_process()
        if not self._silent and self._stream.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, initial=start, desc=label, unit=f" {unit}", file=self._stream,
                leave=not aside, delay=self._patience, **_size(self._stream),
            )  # fmt: skip

    def update(self, count: int = 1, note: str = "") -> None:
        """Says that `count` more things are done; `note` is shown behind, such as a loss."""
        self.done, self._note = self.done + count, note or self._note
        if self._silent:
            return
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        pause = self._clock() - self._said_at
        enough = self.done - self._said >= 0.1 * self.total or pause >= _SILENCE
        waited = self._clock() - self._began >= self._patience
        if self.done < self.total and pause >= _PAUSE and enough and waited:
            self._say()

    def leave_out(self, seconds: float) -> None:
        """Takes the last `seconds` out of the rate: spent on what will not come again."""
        self._began += seconds
        if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one; such as a warning."""
        if not writers.first_process():
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar, or prints the last line."""
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and self.done > self._said:
            if self._clock() - self._began >= self._patience:
                self._say()
        self._silent, self._bar = True, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _say(self) -> None:
        now = self._clock()
        seconds = now - self._began
        text = f"{self.label}: {self.done}/{self.total} {self.unit}"
        text += f" ({100 * self.done // self.total}%)"
        if seconds > 0:
            rate = (self.done - self._start) / seconds
            text += f", {rate_text(rate, self.unit)}"
        if self.done < self.total and seconds > 0:
            text += f", {duration((self.total - self.done) / rate)} left"
        else:
            text += f", {duration(seconds)}"
        text += f", {self._note}" if self._note else ""
        print(text, file=self._stream, flush=True)
        self._said, self._said_at = self.done, now


def _size(stream: TextIO) -> dict[str, Any]:
    """Follows the terminal; 80 x 24 where it does not know its size, as in some containers."""
    try:
        known = os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal with a number
        known = True
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


def rate_text(rate: float, unit: str) -> str:
    """A rate per second, or seconds for one where that is easier to read.

    >>> rate_text(12.34, "pairs"), rate_text(0.2, "steps")
    ('12.3 pairs/s', '5.00 s a step')
    """
    if rate >= 1:
        return f"{rate:.3g} {unit}/s" if rate < 1000 else f"{rate:,.0f} {unit}/s"
    return f"{1 / rate:.2f} s a {unit.removesuffix('s')}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter.

    >>> duration(8.4), duration(95), duration(7500)
    ('8 s', '1 min 35 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned plain text: the first column to the left, the others to the right.

    Args:
        header: one name a column.
        rows: as many cells as names; what is not text is shown by `str`, None as "-".

    Raises:
        ValueError: a row has another number of cells than the header.

    >>> print(table(["", "before", "after"], [["accuracy", "38.1 %", "61.0 %"], ["steps", 0, 120]]))
              before   after
    --------  ------  ------
    accuracy  38.1 %  61.0 %
    steps          0     120
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in [header, *rows]]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"The table's row {row} must have {len(header)} cells.")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
