"""Progress on terminals, in logs, and on processes that are to keep quiet."""

import contextlib
import io
import os
import sys

import pytest

from sage_jax.report import progress, writers


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(total, seconds_each, start=0, stop=None):
    clock, stream = Clock(), io.StringIO()
    with progress.Progress(total, "sage", "steps", start=start, stream=stream, clock=clock) as bar:
        for _ in range(start, total if stop is None else stop):
            clock.now += seconds_each
            bar.update()
    return stream.getvalue().splitlines()


def test_fast_work_prints_one_line_at_the_end():
    assert lines_of(1000, 0.002) == ["sage: 1000/1000 steps (100%), 500 steps/s, 2 s"]


def test_lines_come_with_every_tenth_but_five_seconds_apart():
    lines = lines_of(100, 1.0)
    assert len(lines) == 10
    assert lines[0] == "sage: 10/100 steps (10%), 1 steps/s, 1 min 30 s left"
    assert lines_of(100, 0.125)[0] == "sage: 40/100 steps (40%), 8 steps/s, 8 s left"


def test_slow_work_prints_a_line_every_half_minute():
    lines = lines_of(1000, 10.0, stop=12)
    assert [line.split()[1] for line in lines] == ["3/1000", "6/1000", "9/1000", "12/1000"]
    assert "10.00 s a step, 2 h 46 min left" in lines[0]


def test_what_was_done_before_does_not_count_for_the_rate():
    lines = lines_of(100, 2.0, start=80)
    assert lines[0] == "sage: 90/100 steps (90%), 2.00 s a step, 20 s left"
    assert lines[-1] == "sage: 100/100 steps (100%), 2.00 s a step, 40 s"


def test_what_will_not_come_again_does_not_count_for_the_rate():
    clock, stream = Clock(), io.StringIO()
    with progress.Progress(100, "sage", "steps", stream=stream, clock=clock) as bar:
        clock.now += 50.0
        bar.leave_out(50.0)
        for _ in range(10):
            clock.now += 2.0
            bar.update()
    first = stream.getvalue().splitlines()[0]
    assert first == "sage: 1/100 steps (1%), 2.00 s a step, 3 min 18 s left"


def test_a_bar_leaves_it_out_too():
    with progress.Progress(100, "sage", "steps", stream=Terminal()) as bar:
        before = bar._bar.format_dict["elapsed"]
        bar.leave_out(50.0)
        assert bar._bar.format_dict["elapsed"] < before - 49.0


def test_nothing_to_do_prints_nothing():
    assert lines_of(0, 1.0) == []
    assert lines_of(10, 1.0, start=10) == []


def test_a_note_is_shown():
    clock, stream = Clock(), io.StringIO()
    bar = progress.Progress(10, "sage", "steps", stream=stream, clock=clock)
    clock.now += 6
    bar.update(5, note="loss 0.61")
    assert stream.getvalue().endswith("left, loss 0.61\n")


def test_the_last_note_stays_on_the_last_line():
    clock, stream = Clock(), io.StringIO()
    with progress.Progress(10, "sage", "steps", stream=stream, clock=clock) as bar:
        bar.update(9, note="loss 0.61")
        bar.update(1)
    assert stream.getvalue().endswith("loss 0.61\n")


@pytest.mark.parametrize(("seconds_each", "lines"), [(0.9, 0), (3.0, 7)])
def test_work_inside_other_work_is_shown_only_when_it_takes_long(seconds_each, lines):
    clock, stream = Clock(), io.StringIO()
    with progress.Progress(
        10, "evaluating", "problems", aside=True, stream=stream, clock=clock
    ) as bar:
        for _ in range(10):
            clock.now += seconds_each
            bar.update()
    assert stream.getvalue().count("\n") <= lines
    assert bool(stream.getvalue()) == (lines > 0)


def test_work_inside_other_work_leaves_no_bar_on_a_terminal():
    stream = Terminal()
    with progress.Progress(10, "evaluating", "problems", aside=True, stream=stream) as bar:
        bar.update(10)
    assert not stream.getvalue().strip()


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    stream = Terminal()
    with progress.Progress(10, "sage", "steps", start=4, stream=stream) as bar:
        for _ in range(6):
            bar.update(note="loss 0.5")
    last = stream.getvalue().split("\r")[-1]
    assert "sage: 100%" in last
    assert "10/10" in last
    assert "steps/s" in last


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_warning_is_a_line_of_its_own_and_the_progress_goes_on(kind, monkeypatch):
    stream = kind()
    with progress.Progress(10, "sage", "steps", stream=stream) as bar:
        bar.update(4)
        bar.say("Step 4: the chosen answers fall.")
        bar.update(6)
    # A bar is wiped by \r before the line, and drawn anew behind it.
    lines = [line.split("\r")[-1] for line in stream.getvalue().split("\n")]
    assert "Step 4: the chosen answers fall." in lines
    assert "10/10" in stream.getvalue().split("fall.")[1]
    monkeypatch.setattr(writers, "first_process", lambda: False)
    quiet = kind()
    progress.Progress(10, "sage", "steps", stream=quiet).say("not twice")
    assert quiet.getvalue() == ""


def test_a_terminal_that_does_not_know_its_size_gets_a_bar_too(monkeypatch):
    outer, inner = os.openpty()  # its size is 0 x 0
    with open(inner, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.Progress(2, "sage", "steps") as bar:
            bar.update(2)
    said = ""
    with contextlib.suppress(OSError):  # what Linux says at the end of a closed terminal
        while part := os.read(outer, 4096):  # the writes come one by one
            said += part.decode()
    os.close(outer)
    assert "sage: 100%" in said and "2/2" in said


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr(writers, "first_process", lambda: False)
    assert lines_of(100, 1.0) == []


def test_tables_align_and_refuse_ragged_rows():
    text = progress.table(["method", "accuracy"], [["sage", "61 %"], ["uniform DPO", None]])
    assert text.splitlines() == [
        "method       accuracy",
        "-----------  --------",
        "sage             61 %",
        "uniform DPO         -",
    ]
    with pytest.raises(ValueError, match="must have 2 cells"):
        progress.table(["a", "b"], [["only one"]])
