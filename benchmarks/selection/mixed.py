"""Four tasks in one: what a data set of several kinds of problems does to a selection.

Kinds differ in how long answers are, how much those to one problem differ in length, and how soon
they are learned. A level is a kind here, so that an evaluation by level is one by kind; how hard a
problem of a kind is, is drawn. `task:mixed:TASK` where this folder is on PYTHONPATH.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import euclid

from sage_jax.generate import arithmetic, base_conversion, equations
from sage_jax.generate import faults as mistakes
from sage_jax.generate.problem import Draw, Problem, Task

KINDS = {1: arithmetic.TASK, 2: equations.TASK, 3: base_conversion.TASK, 4: euclid.TASK}


def _of_kind(rng: random.Random, kind: int, draw: Draw) -> Problem:
    levels = KINDS[kind].levels[1:]  # the first have too few problems for a split
    found = draw(rng, rng.choice(levels))
    return found._replace(answer=f"{kind}|{found.answer}", level=kind)


def draw(rng: random.Random, level: int) -> Problem:
    """A problem of a kind, with its exact solution; its answer says which kind it is.

    >>> draw(random.Random(1), 1).answer.partition("|")[0]
    '1'
    """
    return _of_kind(rng, level, KINDS[level].problem)


def check(completion: str, answer: str) -> bool:
    """As the kind's own.

    >>> check("8*2=16-5=11", "1|11"), check("8*2=16-5=11", "2|11")
    (True, False)
    """
    kind, _, right = answer.partition("|")
    return KINDS[int(kind)].check(completion, right)


def teacher(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> Draw:
    """The kinds' own teachers."""
    of = {}
    for kind, task in KINDS.items():
        assert task.teacher is not None
        of[kind] = task.teacher(seed, share=share, odds=odds)
    return lambda rng, level: _of_kind(rng, level, of[level])


ALPHABET = "".join(sorted({c for task in KINDS.values() for c in task.alphabet}))
TASK = Task("mixed", tuple(KINDS), draw, check, ALPHABET, teacher)
