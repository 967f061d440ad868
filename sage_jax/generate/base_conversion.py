"""The task "base_conversion": a decimal number in another base, by repeated division.

The worked solution divides by the base, writing quotient and remainder, until the quotient is
smaller than the base. The last quotient and the remainders, read backwards, are the answer:

    prompt     45>3:
    solution   15r0,5r0,1r2;1200            the answer is what follows the last ";"

A problem of level n takes n divisions: the answer has n + 1 digits. Numbers are at most LARGEST,
bases 2 to 9, which makes some 7000 problems. A division is worked out digit by digit as on paper,
carrying remainders over in one's head, so it rests on some 400 *facts* (remainder carried over,
next digit, base): `45>3:` takes 4 by 3, then 15 by 3. Unlike in the other tasks, these facts are
not written down one by one; only the finished quotient is. See `faults` for the teacher.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sage_jax.generate import faults as mistakes
from sage_jax.generate.problem import Draw, Problem, Task

LARGEST = 999
LENGTH = 60  # characters of prompt and solution
BASES = range(2, 10)
LEVELS = (1, 2, 3, 4, 5, 6)
ALPHABET = "0123456789>:r,;"


class Fact(NamedTuple):
    """One digit of a long division: 10 * carried + digit is divided by the base."""

    carried: int  # remainder of the digits before, less than the base
    digit: int
    base: int


Believe = Callable[[Fact], int]


def apply(fact: Fact) -> int:
    """The number that is divided: its quotient is written, its remainder is carried over.

    >>> divmod(apply(Fact(1, 5, 4)), 4)
    (3, 3)
    """
    return 10 * fact.carried + fact.digit


FACTS = [  # without those whose quotient is 0: everyone knows that 4 is less than 5
    fact
    for base in BASES
    for fact in (Fact(carried, digit, base) for carried in range(base) for digit in range(10))
    if apply(fact) >= base
]


def divide(value: int, base: int, believe: Believe = apply) -> tuple[int, int]:
    """Quotient and remainder by long division.

    Args:
        value: at least 0.
        base: what it is divided by.
        believe: what the teacher takes the result of `apply` for.

    >>> divide(457, 3), divide(457, 3, lambda fact: {15: 13}.get(apply(fact), apply(fact)))
    ((152, 1), (145, 2))
    """
    quotient = carried = 0
    for digit in map(int, str(value)):
        part, carried = divmod(believe(Fact(carried, digit, base)), base)
        quotient = 10 * quotient + part
    return quotient, carried


def _solution(value: int, base: int, believe: Believe = apply) -> str:
    steps = []
    while value >= base:
        value, remainder = divide(value, base, believe)
        steps.append((value, remainder))
    answer = str(value) + "".join(str(remainder) for _, remainder in reversed(steps))
    return ",".join(f"{quotient}r{remainder}" for quotient, remainder in steps) + ";" + answer


def _by_level() -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {level: [] for level in LEVELS}
    for base in BASES:
        for level in LEVELS:
            last = min(base ** (level + 1), LARGEST + 1)
            found[level] += [(value, base) for value in range(base**level, last)]
    return found


NUMBERS = _by_level()  # the (number, base) of each level


def _draw(rng: random.Random, level: int, believe: Believe) -> Problem:
    while True:
        value, base = rng.choice(NUMBERS[level])
        prompt, solution = f"{value}>{base}:", _solution(value, base, believe)
        if len(prompt + solution) <= LENGTH:
            answer = _solution(value, base).rpartition(";")[2]
            return Problem(prompt, solution, answer, level)


def problem(rng: random.Random, level: int) -> Problem:
    """A number that takes `level` divisions, with its exact worked solution.

    >>> problem(random.Random("docs"), 2)
    Problem(prompt='197>8:', solution='24r5,3r0;305', answer='305', level=2)
    """
    return _draw(rng, level, apply)


def check(completion: str, answer: str) -> bool:
    """True when what follows the last ";" of the completion is the answer.

    >>> check("15r0,5r0,1r2;1200", "1200"), check("15r0,5r0,1r2;12", "1200"), check("1200", "1200")
    (True, False, False)
    """
    _, semicolon, final = completion.strip().rpartition(";")
    return bool(semicolon) and final == answer


def _wrong(fact: Fact) -> list[int]:
    # Quotients stay above 0, and below what is divided, or division would not end.
    largest = 9 if fact.carried else fact.digit - 1
    return mistakes.near(apply(fact), fact.base, fact.base * (largest + 1) - 1)


def faults(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> dict[Fact, mistakes.Fault]:
    """The teacher's table of faulty facts; see `faults.table` for the arguments.

    Returns:
        For each faulty fact the number that the teacher takes for the one to be divided, near it
        ("12 by 3" is worked out as "14 by 3": 4 remainder 2), and the probability of that.
    """
    stream = f"base_conversion/faults/{seed}"
    return mistakes.table(FACTS, wrong=_wrong, stream=stream, share=share, odds=odds)


def teacher(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> Draw:
    """A function like `problem` whose solutions carry the mistakes of `faults(seed, ...)`.

    A mistake is carried on: it changes the remainder that is carried over and all divisions that
    follow. Problems which that makes longer than LENGTH are drawn again. `answer` stays the exact
    one.
    """
    table = faults(seed, share=share, odds=odds)

    def draw(rng: random.Random, level: int) -> Problem:
        def believe(fact: Fact) -> int:
            return mistakes.believe(rng, table, fact, apply(fact))

        return _draw(rng, level, believe)

    return draw


TASK = Task("base_conversion", LEVELS, problem, check, ALPHABET, teacher)
