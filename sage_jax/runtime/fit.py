"""The largest size whose program fits a memory, in few compilations."""

from __future__ import annotations

import math
from collections.abc import Callable

GUESSES = 3  # at most, after the two programs that the line goes through


def largest(
    bytes_of: Callable[[int], float], limit: float, *, now: int, bytes_now: float, most: int
) -> tuple[int, int]:
    """The most units that fit, and how many programs it took to know.

    Memory grows by about the same bytes with every unit, so two programs give the line, and one
    more confirms what it says, or corrects it. The search ends at `most`.

    Args:
        bytes_of: compiles the program of so many units and returns the bytes that it needs.
        limit: bytes that there are.
        now: units of a program that is known already, at least 1.
        bytes_now: which it needs; inf: the compiler refused it and did not say.
        most: units that are tried: where memory hardly grows with them, the line has no end.

    Returns:
        0 units where not even one fits.

    >>> largest(lambda units: 30.0 + 2.5 * units, 1000.0, now=4, bytes_now=40.0, most=999)
    (388, 2)
    >>> largest(lambda units: 9.0 + max(units - 2, 0) ** 2, 99.0, now=1, bytes_now=9.0, most=64)
    (3, 3)
    >>> largest(lambda units: 30.0, 1000.0, now=4, bytes_now=30.0, most=64)
    (64, 2)
    """
    known = {now: bytes_now} if math.isfinite(bytes_now) else {}
    tried = 0

    def fits(units: int) -> bool:
        nonlocal tried
        if units not in known:
            known[units] = bytes_of(units)
            tried += 1
        return known[units] <= limit

    if not fits(1):
        return 0, tried
    if now == 1:
        fits(2)
    low, high = min(known), max(known)
    slope = max((known[high] - known[low]) / (high - low), 1.0) if high > low else 1.0
    guess = min(max(1, int((limit - known[low]) / slope) + low), max(most, now))
    best = max(units for units in known if fits(units))
    for _ in range(GUESSES):
        if guess <= best:
            break
        if fits(guess):
            best = guess
            break
        slope = (known[guess] - known[best]) / (guess - best)  # above 0: one fits, one does not
        guess = min(guess - 1, best + int((limit - known[best]) / slope))
    return best, tried
