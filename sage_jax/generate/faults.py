"""Systematic mistakes: what a misinformed teacher believes, and how often it shows.

A task's *facts* are its smallest steps, hashable and few enough that each comes up often. A table
of faults makes a fixed share of them wrong. A model trained on the resulting solutions is right on
problems without faulty facts (trivial), wavers on those whose fault shows half of the time
(uncertain), and is sure of the wrong answer on the rest (confidently wrong).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

F = TypeVar("F", bound=Hashable)

SLIP = 5  # how far a wrong value is off; less, and two mistakes often cancel
SHARE = 0.4  # of the facts, unless told otherwise
ODDS = (0.8, 0.6, 0.4)


class Fault(NamedTuple):
    """What the teacher believes about a faulty fact, and how often it shows."""

    value: int
    probability: float


def near(right: int, low: int, high: int) -> list[int]:
    """The values in low..high that are wrong by at most SLIP.

    >>> near(2, 0, 20)
    [0, 1, 3, 4, 5, 6, 7]
    """
    return [v for v in range(low, high + 1) if 0 < abs(v - right) <= SLIP]


def table(
    facts: Sequence[F],
    *,
    wrong: Callable[[F], Sequence[int]],
    stream: str,
    share: float = SHARE,
    odds: Sequence[float] = ODDS,
) -> dict[F, Fault]:
    """Faults of a share of the facts.

    Args:
        facts: all facts of a task, in a fixed order, without repetition.
        wrong: the values that a fault of a fact may take; at least one, none of them right.
        stream: names the random numbers, "TASK/faults/SEED".
        share: share of the facts that is faulty, in [0, 1].
        odds: probabilities that a fault shows; the faulty facts take turns over them.

    Returns:
        For each faulty fact one fixed wrong value and the probability that the teacher writes it.

    Raises:
        ValueError: the share or a probability lies outside [0, 1], or there is no probability.

    >>> table(["1+1", "1+2"], wrong=lambda fact: [7], stream="docs", share=0.5, odds=[1.0])
    {'1+1': Fault(value=7, probability=1.0)}
    """
    if not 0 <= share <= 1 or not odds or not all(0 <= p <= 1 for p in odds):
        raise ValueError(
            f"faults(share={share}, odds={odds}): the share and every probability lie in [0, 1], "
            "and there is at least one probability."
        )
    rng = random.Random(stream)
    order = list(facts)
    rng.shuffle(order)
    return {
        fact: Fault(rng.choice(wrong(fact)), odds[i % len(odds)])
        for i, fact in enumerate(order[: round(share * len(order))])
    }


def believe(rng: random.Random, table: Mapping[F, Fault], fact: F, right: int) -> int:
    """The value that the teacher writes for a fact: the right one, unless a fault shows.

    >>> believe(random.Random(0), {"1+1": Fault(3, 1.0)}, "1+1", 2)
    3
    """
    fault = table.get(fact)
    return fault.value if fault is not None and rng.random() < fault.probability else right
