"""The task "one_digit": one-digit sums, differences, products and word problems, asked in words.

It is for chat models that are too small for more: SmolLM2-135M-Instruct answers about half of the
sums and products rightly, so its samples give right and wrong answers to the same problem. The
answer is the last number of the completion.

    level 1 sums, 2 differences, 3 products, 4 "buys more", 5 "bags with"
"""

from __future__ import annotations

import random
import string

from sage_jax.generate import verify
from sage_jax.generate.problem import Problem, Task

_ENDING = " Think step by step, and end with the number."
_NAMES = ("Ali", "Lena", "Mia", "Ravi", "Tom", "Zoe")
_THINGS = ("apples", "books", "coins", "pens", "stickers")


def problem(rng: random.Random, level: int) -> Problem:
    """A problem of one kind, see the top of this module.

    >>> problem(random.Random("docs"), 1).prompt
    'Calculate 7 + 7. Think step by step, and end with the number.'
    """
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    if level == 2:
        a, b = max(a, b), min(a, b)
    question, sign, value = {
        1: (f"Calculate {a} + {b}.", "+", a + b),
        2: (f"What is {a} minus {b}?", "-", a - b),
        3: (f"What is {a} * {b}?", "*", a * b),
        4: (f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
            "+", a + b),
        5: (f"There are {a} bags with {b} {thing} in each bag. How many {thing} are there "
            "in total?", "*", a * b),
    }[level]  # fmt: skip
    return Problem(question + _ENDING, f"{a} {sign} {b} = {value}", str(value), level)


def check(completion: str, answer: str) -> bool:
    """True when the last number of the completion is the answer.

    >>> check("4 + 3 makes 7.", "7"), check("7, because 4 + 3", "7")
    (True, False)
    """
    return verify.verify("number", completion, answer)


TASK = Task("one_digit", (1, 2, 3, 4, 5), problem, check, string.printable)
