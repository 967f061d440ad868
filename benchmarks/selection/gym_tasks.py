"""Six tasks of `reasoning-gym`, graded, with worked solutions, in this project's task interface.

    pip install 'reasoning-gym>=0.1.25'

Questions and answers are the package's. The working is ours, written from the metadata of each
entry, except for `gsm_symbolic`, whose own chain of thought is taken. Every solution ends in "The
answer is N.", and is refused when N is not the answer that the package gives for the entry.
Questions that ask for the result alone lose that sentence.

    chain_sum         60 + 93 - 16           two terms of two digits ... six of three
    basic_arithmetic  -9 - 7 - -7 * ( 3 + 2 )           two ... six terms, one operation a line
    simple_equations  Solve for k: 18*k + 2 = 344       two ... four terms, up to 10 ... up to 100
    products          58 * 93                           partial products
    gcd               841, 549                          Euclid's algorithm, up to 50 ... up to 5000
    gsm_symbolic      word problems; a level is a number of lines of working, two ... six or seven

`task:gym_tasks:CHAIN_SUM` is a source of problems where this folder is on PYTHONPATH.
"""

from __future__ import annotations

import ast
import importlib
import operator
import random
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sage_jax.generate import verify
from sage_jax.generate.problem import Problem, Task

Entry = Mapping[str, Any]  # what the package gives: question, answer, metadata
Worked = tuple[list[str], str]  # lines of working, and the result that they arrive at

LEVELS = (1, 2, 3, 4, 5)
_PATIENCE = 2000  # entries drawn for one problem of a level, at most
_ALONE = re.compile(r" Give only the [a-z A-Z]+ as your final answer\.$")
_ROUNDED = re.compile(r"\.\d{5}")  # 10.416666666666664, in some of the word problems
_OPERATIONS: dict[type, tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}


class UndeterminedError(ValueError):
    """An entry that has no one answer; the package makes one in some ten thousand."""


# -- working, from the metadata of an entry --------------------------------------------------------


def chain_sum(entry: Entry) -> Worked:
    """A running total.

    >>> chain_sum({"metadata": {"expression": "44 + 27 - 33"}})
    (['44 + 27 = 71', '71 - 33 = 38'], '38')
    """
    first, *rest = entry["metadata"]["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return lines, str(total)


def basic_arithmetic(entry: Entry) -> Worked:
    """One operation a line, the expression written anew: innermost first, from the left.

    >>> basic_arithmetic({"metadata": {"expression": "( -9 - 7 ) * ( 3 + -1 )"}})[0]
    ['= -16 * (3 + -1)', '= -16 * 2', '= -32']
    """
    node: ast.expr = _signed(ast.parse(entry["metadata"]["expression"], mode="eval").body)
    lines = []
    while not isinstance(node, ast.Constant):
        node = _reduced(node)
        lines.append(f"= {ast.unparse(node)}")
    return lines, str(node.value)


def _signed(node: ast.expr) -> ast.expr:
    """Negative numbers as numbers, not as operations."""
    if isinstance(node, ast.UnaryOp):
        inner = _signed(node.operand)
        if isinstance(node.operand, ast.Constant):
            return ast.Constant(-node.operand.value)  # type: ignore[operator]
        return ast.UnaryOp(ast.USub(), inner)
    if isinstance(node, ast.BinOp):
        return ast.BinOp(_signed(node.left), node.op, _signed(node.right))
    return node


def _reduced(node: ast.expr) -> ast.expr:
    """The expression after one operation."""
    if isinstance(node, ast.UnaryOp):
        if isinstance(node.operand, ast.Constant):
            return ast.Constant(-node.operand.value)  # type: ignore[operator]
        return ast.UnaryOp(node.op, _reduced(node.operand))
    assert isinstance(node, ast.BinOp)
    if not isinstance(node.left, ast.Constant):
        return ast.BinOp(_reduced(node.left), node.op, node.right)
    if not isinstance(node.right, ast.Constant):
        return ast.BinOp(node.left, node.op, _reduced(node.right))
    apply = _OPERATIONS[type(node.op)][1]
    return ast.Constant(apply(node.left.value, node.right.value))  # type: ignore[arg-type]


def simple_equations(entry: Entry) -> Worked:
    """The number to the right, then the division.

    >>> simple_equations({"metadata": {"equation": "25 - 3*k = 10", "variable": "k"}})
    (['-3*k = 10 - 25 = -15', 'k = -15 / -3 = 5'], '5')
    """
    left, _, right = entry["metadata"]["equation"].partition(" = ")
    name, value = entry["metadata"]["variable"], int(right)
    at = [_value(ast.parse(left, mode="eval").body, x) for x in (0, 1, 2)]
    number, factor = at[0], at[1] - at[0]
    if at[2] - at[1] != factor:
        raise ValueError(f"{left!r} is not linear in {name}.")
    if factor == 0:
        raise UndeterminedError(f"{left} = {right} holds for every {name} or for none.")
    lines, term = [], name if factor == 1 else f"{factor}*{name}"
    if number:
        sign, rest = "-" if number > 0 else "+", value - number
        lines.append(f"{term} = {value} {sign} {abs(number)} = {rest}")
        value = rest
    if factor != 1:
        lines.append(f"{name} = {value} / {factor} = {value // factor}")
    if value % factor:
        raise ValueError(f"{left} = {right} has no whole solution.")
    return lines, str(value // factor)


def _value(node: ast.expr, x: int) -> int:
    """An expression at x, which stands for whatever name is in it."""
    if isinstance(node, ast.Name):
        return x
    if isinstance(node, ast.Constant):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, x)
    assert isinstance(node, ast.BinOp)
    return _OPERATIONS[type(node.op)][1](_value(node.left, x), _value(node.right, x))


def products(entry: Entry) -> Worked:
    """Partial products by the digits of the next factor.

    >>> products({"metadata": {"expression": "58 * 93"}})[0]
    ['58 * 93 = 58 * 90 + 58 * 3 = 5220 + 174 = 5394']
    """
    total, *rest = (int(x) for x in entry["metadata"]["expression"].split(" * "))
    lines = []
    for factor in rest:
        digits = str(factor)
        parts = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]
        line = f"{total} * {factor}"
        if len(parts) > 1:
            line += " = " + " + ".join(f"{total} * {part}" for part in parts)
            line += " = " + " + ".join(str(total * part) for part in parts)
        lines.append(f"{line} = {total * factor}")
        total *= factor
    return lines, str(total)


def gcd(entry: Entry) -> Worked:
    """Euclid's algorithm: the larger by the smaller, until nothing remains.

    >>> gcd({"metadata": {"numbers": [18, 60]}})
    (['60 = 3 * 18 + 6', '18 = 3 * 6 + 0'], '6')
    """
    low, high = sorted(entry["metadata"]["numbers"])
    lines = []
    while low:
        quotient, rest = divmod(high, low)
        lines.append(f"{high} = {quotient} * {low} + {rest}")
        high, low = low, rest
    return lines, str(high)


def gsm_symbolic(entry: Entry) -> Worked:
    """The package's own chain of thought, whose last line is "#### RESULT".

    >>> gsm_symbolic({"metadata": {"answer_cot": "He drank 8*3=24 ccs.\\n#### 24"}})
    (['He drank 8*3=24 ccs.'], '24')
    """
    *lines, last = entry["metadata"]["answer_cot"].split("\n")
    return lines, last.removeprefix("#### ")


# -- tasks -----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A data set of the package, graded."""

    work: Callable[[Entry], Worked]
    settings: Mapping[int, Mapping[str, Any]]  # of the data set, by level
    fits: Callable[[int, list[str]], bool] = lambda level, lines: True  # else another is drawn


def _exactly(**values: tuple[int, ...]) -> dict[int, dict[str, int]]:
    """Settings min_X = max_X of each level, from X = its values."""
    return {
        level: {f"{end}_{k}": v[i] for k, v in values.items() for end in ("min", "max")}
        for i, level in enumerate(LEVELS)
    }


_PLAIN = {"operators": ("+", "-", "*")}  # the package's division rounds, which it does not say
_VALUES = (10, 20, 20, 50, 100)
SOURCES: dict[str, Source] = {
    "chain_sum": Source(chain_sum, _exactly(terms=(2, 3, 4, 4, 6), digits=(2, 2, 2, 3, 3))),
    "basic_arithmetic": Source(
        basic_arithmetic,
        {k: v | _PLAIN for k, v in _exactly(terms=(2, 3, 4, 5, 6), digits=(1,) * 5).items()},
    ),
    "simple_equations": Source(
        simple_equations,
        {k: v | {"max_value": _VALUES[k - 1]} for k, v in _exactly(terms=(2, 2, 3, 4, 4)).items()},
    ),
    "products": Source(products, _exactly(terms=(3, 2, 2, 3, 2), digits=(1, 2, 3, 2, 4))),
    "gcd": Source(
        gcd, {k: {"max_value": v} for k, v in zip(LEVELS, (50, 100, 300, 1000, 5000), strict=True)}
    ),
    "gsm_symbolic": Source(
        gsm_symbolic,
        {level: {} for level in LEVELS},
        lambda level, lines: (
            level == min(len(lines) - 1, 5)
            and len(lines) < 8
            and not any(_ROUNDED.search(line) for line in lines)
        ),
    ),
}


def question(entry: Entry) -> str:
    """What is asked, without the wish for a bare result.

    >>> question({"question": "Find it: 4, 6. Give only the GCD as your final answer."})
    'Find it: 4, 6.'
    """
    return _ALONE.sub("", entry["question"].strip())


def problem(entry: Entry, source: Source, level: int) -> Problem | None:
    """An entry as a problem of a level; None if its working does not fit, or misses the answer.

    Only the package's own working (`gsm_symbolic`) may miss; what has no one answer has no working.

    >>> entry = {"question": "60 + 9 =", "answer": "69", "metadata": {"expression": "60 + 9"}}
    >>> problem(entry, SOURCES["chain_sum"], 1).solution
    '60 + 9 = 69\\nThe answer is 69.'

    Raises:
        ValueError: working of ours does not arrive at the package's answer.
    """
    try:
        lines, result = source.work(entry)
    except UndeterminedError:
        return None
    if not verify.number(result, entry["answer"]):
        if source.work is gsm_symbolic:
            return None
        raise ValueError(
            f"The working of {entry['question']!r} arrives at {result}, and the package's answer "
            f"is {entry['answer']}."
        )
    if not source.fits(level, lines):
        return None
    solution = "\n".join([*lines, f"The answer is {entry['answer']}."])
    return Problem(question(entry), solution, entry["answer"], level)


def check(completion: str, answer: str) -> bool:
    """True when the last number of the completion is the answer.

    >>> check("44 + 27 = 71\\nThe answer is 71.", "71")
    True
    """
    return verify.number(completion, answer)


def package() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as e:
        raise ValueError(
            "The tasks of gym_tasks need reasoning-gym: pip install 'sage_jax[benchmarks]'. Files "
            "of problems, once written, do not."
        ) from e


def make_task(name: str, source: Source) -> Task:
    """The task of a data set of the package."""

    def draw(rng: random.Random, level: int) -> Problem:
        create = package().create_dataset
        for _ in range(_PATIENCE):
            entry = create(name, size=1, seed=rng.getrandbits(31), **source.settings[level])[0]
            found = problem(entry, source, level)
            if found is not None:
                return found
        raise ValueError(f"No entry of {name!r} fits level {level} in {_PATIENCE} draws.")

    return Task(name, LEVELS, draw, check, string.printable)


TASKS = {name: make_task(name, source) for name, source in SOURCES.items()}
CHAIN_SUM, BASIC_ARITHMETIC, SIMPLE_EQUATIONS, PRODUCTS, GCD, GSM_SYMBOLIC = TASKS.values()
