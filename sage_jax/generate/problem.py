"""What a task is, and how its problems are drawn and split.

A task is a few functions in a `Task`. A complete one:

>>> def double(rng, level):
...     n = rng.randrange(10**level)
...     return Problem(f"2*{n}=", f"{2 * n}", f"{2 * n}", level)
>>> doubling = Task("doubling", levels=(1, 2, 3), problem=double,
...                 check=lambda completion, answer: completion == answer,
...                 alphabet="0123456789*=")
>>> [p.level for p in problems(doubling, count=3, seed=0)]
[1, 2, 3]

Problem number `index` of a seed is a function of (task, split, seed, index) alone: it depends
neither on how many are asked for, nor on the Python version, nor on the hash seed. The split of a
problem is read off its *text*, so no problem is ever in two splits, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Tenths of all problem texts. "test" is for numbers that no decision has seen.
SPLITS = {"train": range(8), "eval": range(8, 9), "test": range(9, 10)}
_PATIENCE = 10_000


class Problem(NamedTuple):
    """One problem, as text."""

    prompt: str  # what the model is given
    solution: str  # a worked solution, what a model is supervised on
    answer: str  # the exact answer, what a completion is checked against
    level: int  # difficulty, 1 = easiest


Draw = Callable[[random.Random, int], Problem]


class Task(NamedTuple):
    """The functions that make a task; everything else in this package is written against these."""

    name: str
    levels: Sequence[int]
    problem: Draw  # (rng, level) -> Problem with a right solution; randomness from rng only
    check: Callable[[str, str], bool]  # (completion, answer) -> is the completion right?
    alphabet: str  # every character of prompts and solutions, for a character-level tokenizer
    # (seed, **settings) -> Draw whose solutions carry systematic mistakes; None: no such teacher
    teacher: Callable[..., Draw] | None = None


def split_of(prompt: str) -> str:
    """The split a problem belongs to, by its text alone: "train" (80 %), "eval" or "test" (10 %).

    >>> split_of("7+5=")
    'train'
    """
    tenth = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def problems(
    task: Task,
    *,
    count: int,
    seed: int,
    start: int = 0,
    split: str = "train",
    levels: Sequence[int] | None = None,
    draw: Draw | None = None,
) -> list[Problem]:
    """Problems `start` to `start + count - 1` of a seed; their levels take turns.

    Args:
        task: the task.
        count: how many problems.
        seed: any integer; other seeds give other problems of the same split.
        start: index of the first; consecutive ranges of one seed join without overlap of indices
            (a short problem may come up twice).
        split: "train", "eval" or "test".
        levels: the levels that take turns; all of the task's when None.
        draw: draws a problem in place of `task.problem` (a teacher), from a stream of its own.

    Returns:
        `count` problems; number `i` has level `levels[(start + i) % len(levels)]`.

    Raises:
        ValueError: an unknown split, a level that the task does not have, or a level none of whose
            problems fall into the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split; use one of {', '.join(SPLITS)}.")
    levels = tuple(task.levels if levels is None else levels)
    unknown = [level for level in levels if level not in task.levels]
    if unknown or not levels:
        raise ValueError(
            f"levels={list(levels)}: task {task.name!r} has the levels {list(task.levels)}; "
            "choose at least one of them."
        )
    stream = f"{task.name}/{split}/{seed}"
    if draw is None:
        draw = task.problem
    else:  # or what a model is supervised on would be what is asked of it later
        stream = f"{stream}/own"
    return [
        _draw_in_split(draw, stream, split, index, levels[index % len(levels)])
        for index in range(start, start + count)
    ]


def _draw_in_split(draw: Draw, stream: str, split: str, index: int, level: int) -> Problem:
    # A string seed goes through SHA-512, so the stream is the same for every Python and process.
    rng = random.Random(f"{stream}/{index}")
    for _ in range(_PATIENCE):
        problem = draw(rng, level)
        if split_of(problem.prompt) == split:
            return problem
    raise ValueError(
        f"Level {level} of {stream!r} gave no problem of split {split!r} in {_PATIENCE} draws: "
        "it has too few different problems; leave the level out or widen the task."
    )


def supervised(
    task: Task,
    *,
    count: int,
    seed: int,
    start: int = 0,
    split: str = "train",
    levels: Sequence[int] | None = None,
    teacher: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Records {"prompt", "completion", "level"} for supervised training.

    Args:
        task, count, seed, start, split, levels: as for `problems`.
            The problems are others than those that `problems` gives for the same arguments.
        teacher: None for exact solutions; otherwise the keyword arguments of `task.teacher`, whose
            solutions carry systematic mistakes.

    Raises:
        ValueError: as `problems`; or a teacher is asked of a task that has none.
    """
    draw = task.problem
    if teacher is not None:
        if task.teacher is None:
            raise ValueError(
                f"Task {task.name!r} has no teacher with mistakes; use teacher=None for exact "
                "solutions."
            )
        draw = task.teacher(**teacher)
    drawn = problems(
        task, count=count, seed=seed, start=start, split=split, levels=levels, draw=draw
    )
    return [{"prompt": p.prompt, "completion": p.solution, "level": p.level} for p in drawn]
