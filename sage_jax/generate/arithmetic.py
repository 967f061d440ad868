"""The task "arithmetic": chains of one to eight steps, worked out as on a pocket calculator.

A problem of level n is a single-digit number and n steps, each an operation (+, -, *) with one
digit, evaluated **from left to right without precedence**: `7+5-9*2=` means ((7+5)-9)*2. Every
intermediate value is an exact integer in 0..LIMIT. The worked solution repeats the chain and writes
the running value after every step, the way a four-function calculator shows it:

    prompt     7+5-9*2=
    solution   7+5=12-9=3*2=6          the answer is what follows the last "="

So one step costs 4 or 5 characters, level 8 with its prompt at most 60, and the language has only
some 300 *facts* (operation, running value, digit), few enough for a very small decoder.

**The teacher.** A model supervised on exact solutions of so small a language ends up nearly perfect
and leaves nothing to align. The teacher therefore makes *systematic mistakes*, as a misinformed
person would: a fixed share of the facts, drawn from a seed, is faulty; each faulty fact has one
fixed wrong value and a fixed probability of being used. A model trained on its solutions is right
on problems without faulty facts (trivial), wavers on those whose fault shows half of the time
(uncertain), and is sure of the wrong answer on the rest (confidently wrong). This is a world built
to have all three kinds; results on it say how methods behave when they are there, not how often
they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from sage_jax.generate import faults as mistakes
from sage_jax.generate.problem import Draw, Problem, Task

LIMIT = 20  # largest running value
LEVELS = tuple(range(1, 9))
ALPHABET = "0123456789+-*="


class Fact(NamedTuple):
    """One step: the running value, the operation and its digit."""

    value: int
    operation: str
    digit: int


def apply(fact: Fact) -> int:
    """The exact result of a step.

    >>> apply(Fact(7, "+", 5))
    12
    """
    value, operation, digit = fact
    if operation == "+":
        return value + digit
    return value - digit if operation == "-" else value * digit


def _is_dull(fact: Fact) -> bool:
    # 0 times anything would let long chains collapse to 0 and forget their mistakes.
    return fact.operation == "*" and (fact.value == 0 or fact.digit == 1)


def _facts() -> dict[tuple[int, str], list[Fact]]:
    """Facts whose result lies in range, by running value and operation."""
    return {
        (value, operation): [
            fact
            for fact in (Fact(value, operation, digit) for digit in range(1, 10))
            if 0 <= apply(fact) <= LIMIT and not _is_dull(fact)
        ]
        for value in range(LIMIT + 1)
        for operation in "+-*"
    }


FACTS = _facts()
_OPERATIONS = {v: [op for op in "+-*" if FACTS[v, op]] for v in range(LIMIT + 1)}


def chain(rng: random.Random, level: int) -> tuple[int, list[Fact]]:
    """A start in 1..9 and `level` facts that follow from each other."""
    value = start = rng.randint(1, 9)
    steps = []
    for _ in range(level):
        operation = rng.choice(_OPERATIONS[value])
        steps.append(rng.choice(FACTS[value, operation]))
        value = apply(steps[-1])
    return start, steps


def _prompt(start: int, steps: list[Fact]) -> str:
    return str(start) + "".join(f"{step.operation}{step.digit}" for step in steps) + "="


def _solution(start: int, steps: list[Fact], results: list[int]) -> str:
    return str(start) + "".join(
        f"{step.operation}{step.digit}={result}"
        for step, result in zip(steps, results, strict=True)
    )


def problem(rng: random.Random, level: int) -> Problem:
    """A problem of `level` steps with its exact worked solution.

    >>> problem(random.Random("docs"), 2)
    Problem(prompt='7-7+7=', solution='7-7=0+7=7', answer='7', level=2)
    """
    start, steps = chain(rng, level)
    results = [apply(step) for step in steps]
    return Problem(_prompt(start, steps), _solution(start, steps, results), str(results[-1]), level)


def check(completion: str, answer: str) -> bool:
    """True when what follows the last "=" of the completion is the answer.

    >>> check("8*2=16-5=11", "11"), check("8*2=16-5=1", "11"), check("11", "11")
    (True, False, False)
    """
    _, equals, final = completion.strip().rpartition("=")
    return bool(equals) and final == answer


def faults(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> dict[Fact, mistakes.Fault]:
    """The teacher's table of faulty facts; see `faults.table` for the arguments.

    Returns:
        For each faulty fact a wrong value in 0..LIMIT, near the right one, and the probability
        that the teacher writes it.
    """
    return mistakes.table(
        [fact for group in FACTS.values() for fact in group],
        wrong=lambda fact: mistakes.near(apply(fact), 0, LIMIT),
        stream=f"arithmetic/faults/{seed}",
        share=share,
        odds=odds,
    )


def teacher(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> Draw:
    """A function like `problem` whose solutions carry the mistakes of `faults(seed, ...)`.

    A mistake is carried on: the steps after it work with the wrong value. Problems for which that
    leaves 0..LIMIT are drawn again. `answer` stays the exact one.
    """
    table = faults(seed, share=share, odds=odds)

    def draw(rng: random.Random, level: int) -> Problem:
        while True:
            start, steps = chain(rng, level)
            results = _with_mistakes(rng, start, steps, table)
            if all(0 <= result <= LIMIT for result in results):
                answer = str(apply(steps[-1]))
                return Problem(
                    _prompt(start, steps), _solution(start, steps, results), answer, level
                )

    return draw


def _with_mistakes(
    rng: random.Random, start: int, steps: list[Fact], table: dict[Fact, mistakes.Fault]
) -> list[int]:
    value, results = start, []
    for step in steps:
        fact = step._replace(value=value)
        value = mistakes.believe(rng, table, fact, apply(fact))
        results.append(value)
    return results


TASK = Task("arithmetic", LEVELS, problem, check, ALPHABET, teacher)
