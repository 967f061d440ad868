"""The greatest common divisor of three numbers: a task whose answers differ in length.

    84,60,45>   84%60=24,60%24=12,24%12=0;45%12=9,12%9=3,9%3=0;3

Euclid's algorithm, twice. A wrong remainder makes another number of divisions, so a right and a
wrong answer to one problem differ by whole steps, as those of the `gcd` of `gym_tasks` do and those
of the built-in tasks do not. `task:euclid:TASK` where this folder is on PYTHONPATH.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from sage_jax.generate import faults as mistakes
from sage_jax.generate.problem import Draw, Problem, Task

LARGEST = 60
LEVELS = (1, 2, 3, 4, 5)  # by the divisions that the right solution takes
DIVISIONS = {1: (2, 3), 2: (4, 4), 3: (5, 5), 4: (6, 6), 5: (7, 9)}
LENGTH = 96  # characters of a prompt and its solution, mistakes included
Fact = tuple[int, int]  # larger, smaller
FACTS = [(high, low) for high in range(2, LARGEST + 1) for low in range(1, high)]
Believe = Callable[[Fact], int]


def right(fact: Fact) -> int:
    """The remainder."""
    return fact[0] % fact[1]


def divide(high: int, low: int, believe: Believe) -> tuple[list[str], int]:
    """The divisions of two numbers, as far as nothing remains, and the last divisor.

    >>> divide(24, 36, right)
    (['36%24=12', '24%12=0'], 12)
    """
    high, low = max(high, low), min(high, low)
    steps = []
    while True:
        rest = believe((high, low)) if high > low else 0
        steps.append(f"{high}%{low}={rest}")
        if not rest:
            return steps, low
        high, low = low, rest


def work(numbers: Sequence[int], believe: Believe = right) -> tuple[str, int, int]:
    """The worked solution, its number of divisions, and the divisor.

    >>> work((24, 36, 9))
    ('36%24=12,24%12=0;12%9=3,9%3=0;3', 4, 3)
    """
    first, divisor = divide(*numbers[:2], believe)
    second, divisor = divide(divisor, numbers[2], believe)
    return f"{','.join(first)};{','.join(second)};{divisor}", len(first + second), divisor


def draw(rng: random.Random, level: int, believe: Believe = right) -> Problem:
    """Three numbers that take as many divisions as the level says, drawn until they do."""
    least, most = DIVISIONS[level]
    while True:
        numbers = [rng.randint(2, LARGEST) for _ in range(3)]
        _, divisions, divisor = work(numbers)
        if divisor == 1 or not least <= divisions <= most:
            continue  # 1 is what most mistakes end with, too
        prompt, solution = ",".join(map(str, numbers)) + ">", work(numbers, believe)[0]
        if len(prompt + solution) <= LENGTH:
            return Problem(prompt, solution, str(divisor), level)


def check(completion: str, answer: str) -> bool:
    """True when what follows the second ";" of the completion is the answer.

    >>> check("36%24=12,24%12=0;12%9=3,9%3=0;3", "3"), check("3", "3")
    (True, False)
    """
    parts = completion.strip().split(";")
    return len(parts) == 3 and parts[2] == answer


def teacher(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> Draw:
    """A function like `draw` whose solutions carry systematic mistakes, and work on with them."""
    table = mistakes.table(
        [fact for fact in FACTS if fact[1] > 1],  # a remainder by 1 can only be right
        wrong=lambda fact: mistakes.near(right(fact), 0, fact[1] - 1),
        stream=f"euclid/faults/{seed}",
        share=share,
        odds=odds,
    )
    return lambda rng, level: draw(
        rng, level, lambda fact: mistakes.believe(rng, table, fact, right(fact))
    )


TASK = Task("euclid", LEVELS, draw, check, "0123456789%=,;>", teacher)
