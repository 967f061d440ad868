"""The task "equations": linear equations in one unknown, solved move by move.

The worked solution writes the equation anew after every move, in a fixed order: brackets are
multiplied out, numbers on the left are put together, the x on the right is taken to the left, the
number on the left to the right, and what is left is divided by the factor of x:

    prompt     2(x+3)-4=x+9;
    solution   2x+6-4=x+9;2x+2=x+9;x+2=9;x=7        the answer is what follows the last "x="

    level 1    x+5=12    x-5=12    3x=12        one move
    level 2    3x+5=20                          two
    level 3    5x+3=2x+9                        x on both sides
    level 4    2(x+3)-4=12                      a bracket
    level 5    4(x+1)-3=2x+11                   a bracket, and x on both sides
    level 6    4(x+2)-5=2(x+6)                  two brackets

Every number that a move yields is an integer in 1..LIMIT, prompt and solution together have at most
LENGTH characters, and the language has some 500 *facts*: sums, differences, products and quotients
of two numbers, and differences of two multiples of x. See `faults` for the teacher; where its
mistake spoils a division it drops the remainder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sage_jax.generate import faults as mistakes
from sage_jax.generate.problem import Draw, Problem, Task

LIMIT = 20  # largest number that a move yields
LENGTH = 60  # characters of prompt and solution
LEVELS = (1, 2, 3, 4, 5, 6)
ALPHABET = "0123456789+-=x();"
_PATIENCE = 10_000


class Fact(NamedTuple):
    """One calculation inside a move; "-x" takes multiples of x from multiples of x."""

    value: int
    operation: str  # + - * / -x
    operand: int


class Side(NamedTuple):
    """One side of an equation: factor(x+inner)+constants, without a bracket when inner is 0."""

    factor: int
    inner: int = 0
    constants: tuple[int, ...] = ()


class Equation(NamedTuple):
    left: Side
    right: Side


Believe = Callable[[Fact], int]


def apply(fact: Fact) -> int:
    """The exact result of a fact; a division drops the remainder.

    >>> apply(Fact(20, "-", 5)), apply(Fact(5, "-x", 2)), apply(Fact(14, "/", 4))
    (15, 3, 3)
    """
    value, operation, operand = fact
    if operation == "+":
        return value + operand
    if operation == "*":
        return value * operand
    return value // operand if operation == "/" else value - operand


def _facts() -> list[Fact]:
    numbers, factors = range(1, LIMIT + 1), range(1, 10)
    found = [Fact(a, operation, b) for operation in "+-" for a in numbers for b in numbers]
    found += [Fact(a, "*", b) for a in factors[1:] for b in numbers]
    found += [Fact(a * b, "/", a) for a in factors[1:] for b in numbers if a * b <= LIMIT]
    found += [Fact(a, "-x", b) for a in factors for b in factors]
    return [fact for fact in found if 1 <= apply(fact) <= LIMIT]


FACTS = _facts()


def _side_text(side: Side) -> str:
    x = f"(x{side.inner:+d})" if side.inner else "x"
    factor = str(side.factor) if side.factor > 1 else ""
    constants = "".join(f"{constant:+d}" for constant in side.constants)
    return (factor + x + constants) if side.factor else constants.removeprefix("+")


def _text(equation: Equation) -> str:
    return f"{_side_text(equation.left)}={_side_text(equation.right)}"


def _multiplied_out(side: Side, believe: Believe) -> Side:
    if not side.inner:
        return side
    product = believe(Fact(side.factor, "*", abs(side.inner)))
    return Side(side.factor, 0, (product if side.inner > 0 else -product, *side.constants))


def _plus(a: int, b: int, believe: Believe) -> int:
    """a + b by a fact about their absolute values."""
    sign, (high, low) = (1 if a > 0 else -1), (abs(a), abs(b))
    if (a > 0) == (b > 0):
        return sign * believe(Fact(high, "+", low))
    if high < low:
        sign, high, low = -sign, low, high
    return sign * believe(Fact(high, "-", low))


def solve(equation: Equation, believe: Believe = apply) -> list[Equation]:
    """The equation after every move; the last one is x = a number.

    Args:
        equation: more x on the left than on the right, and at most one number on the right.
        believe: the result of a fact.

    >>> start = Equation(Side(3, 0, (5,)), Side(0, 0, (20,)))
    >>> [_text(equation) for equation in solve(start)]
    ['3x=15', 'x=5']
    """
    moves: list[Equation] = []
    left, right = equation
    if left.inner or right.inner:
        left, right = _multiplied_out(left, believe), _multiplied_out(right, believe)
        moves.append(Equation(left, right))
    if len(left.constants) > 1:
        a, b = left.constants
        left = left._replace(constants=(_plus(a, b, believe),))
        moves.append(Equation(left, right))
    if right.factor:
        left = left._replace(factor=believe(Fact(left.factor, "-x", right.factor)))
        right = right._replace(factor=0)
        moves.append(Equation(left, right))
    if left.constants:
        right = Side(0, 0, (_plus(right.constants[0], -left.constants[0], believe),))
        left = left._replace(constants=())
        moves.append(Equation(left, right))
    if left.factor > 1:
        right = Side(0, 0, (believe(Fact(right.constants[0], "/", left.factor)),))
        moves.append(Equation(left._replace(factor=1), right))
    return moves


def _numbers(equation: Equation) -> list[int]:
    left, right = equation
    return [abs(n) for n in (left.factor, *left.constants, *right.constants)]


def _written(start: Equation, answer: int, level: int, believe: Believe) -> Problem | None:
    """The problem as text; None if a number leaves its range or the text its length."""
    moves = solve(start, believe)
    small = all(1 <= n <= LIMIT for move in moves for n in _numbers(move))
    if not small or moves[-1].right.constants[0] < 0:
        return None
    prompt, solution = _text(start) + ";", ";".join(map(_text, moves))
    if len(prompt + solution) > LENGTH:
        return None
    return Problem(prompt, solution, str(answer), level)


def _equation(rng: random.Random, level: int) -> tuple[Equation, int] | None:
    """An equation and its x; None when no number in range on the right makes it come out."""
    x = rng.randint(1, LIMIT if level <= 3 else 9)
    factor = rng.randint(2, 9)
    if level == 1:
        if rng.random() < 0.2:  # a fifth, as there are fewer of them
            return _finished(Side(factor), Side(0), x)
        factor = 1
    number = rng.choice((1, -1)) * rng.randint(1, LIMIT - 1 if level <= 3 else 9)
    if level < 3:
        return _finished(Side(factor, 0, (number,)), Side(0), x)
    if level == 3:  # often one x more than on the right, which leaves no division: any sum may be
        gap = 1 if rng.random() < 0.5 else rng.randint(1, factor - 1)
        return _finished(Side(factor, 0, (number,)), Side(factor - gap), x)
    extra = rng.choice((1, -1)) * rng.randint(1, 9)
    left = Side(factor, number, (extra,))
    if level == 4:
        return _finished(left, Side(0), x)
    other = rng.randint(1, factor - 1)
    return _finished(left, Side(other), x, bracket=level == 6)


def _finished(
    left: Side, right: Side, x: int, bracket: bool = False
) -> tuple[Equation, int] | None:
    """The equation with the number on the right, in a bracket or not, that makes x its solution."""
    missing = left.factor * (x + left.inner) + sum(left.constants) - right.factor * x
    if bracket:
        if right.factor == 1 or missing % right.factor:
            return None
        missing //= right.factor
    if not 1 <= missing <= LIMIT:
        return None
    if bracket:
        return Equation(left, right._replace(inner=missing)), x
    return Equation(left, right._replace(constants=(missing,))), x


def _draw(rng: random.Random, level: int, believe: Believe) -> Problem:
    for _ in range(_PATIENCE):
        found = _equation(rng, level)
        exact = _written(*found, level, apply) if found else None
        if found and exact:  # or a teacher would be asked what no model is asked later
            problem = exact if believe is apply else _written(*found, level, believe)
            if problem:
                return problem
    raise ValueError(f"No equation of level {level} in {_PATIENCE} draws.")


def problem(rng: random.Random, level: int) -> Problem:
    """An equation with its exact worked solution.

    >>> problem(random.Random("docs"), 2)
    Problem(prompt='4x+6=18;', solution='4x=12;x=3', answer='3', level=2)
    """
    return _draw(rng, level, apply)


def check(completion: str, answer: str) -> bool:
    """True when the last move of the completion says that x is the answer.

    >>> check("3x=15;x=5", "5"), check("3x=15", "5"), check("5", "5")
    (True, False, False)
    """
    return completion.strip().rpartition(";")[2] == f"x={answer}"


def _wrong(fact: Fact) -> list[int]:
    return mistakes.near(apply(fact), 1, 9 if fact.operation == "-x" else LIMIT)


def faults(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> dict[Fact, mistakes.Fault]:
    """The teacher's table of faulty facts; see `faults.table` for the arguments.

    Returns:
        For each faulty fact a wrong value in 1..LIMIT (1..9 for multiples of x), near the right
        one, and the probability that the teacher writes it.
    """
    stream = f"equations/faults/{seed}"
    return mistakes.table(FACTS, wrong=_wrong, stream=stream, share=share, odds=odds)


def teacher(
    seed: int, *, share: float = mistakes.SHARE, odds: Sequence[float] = mistakes.ODDS
) -> Draw:
    """A function like `problem` whose solutions carry the mistakes of `faults(seed, ...)`.

    A mistake is carried on: the moves after it work with the wrong number. Problems for which that
    leaves the range or the length are drawn again. `answer` stays the exact one.
    """
    table = faults(seed, share=share, odds=odds)

    def draw(rng: random.Random, level: int) -> Problem:
        def believe(fact: Fact) -> int:
            return mistakes.believe(rng, table, fact, apply(fact))

        return _draw(rng, level, believe)

    return draw


TASK = Task("equations", LEVELS, problem, check, ALPHABET, teacher)
