"""Lengths into rows of one length: the ways of packing that plans are made with.

A place is (row, slot), or (batch, row, slot); a row has room for so many tokens and has so many
slots. All of them are functions of their arguments alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def batches(
    length_P: list[int], row_length: int, rows: int, slots: int, batch_pairs: int
) -> list[tuple[int, int, int]]:
    """Places (batch, row, slot) of consecutive pairs, batch after batch."""
    placed: list[tuple[int, int, int]] = []
    k = 0
    while len(length_P) - len(placed) >= batch_pairs:
        lengths = length_P[len(placed) : len(placed) + batch_pairs]
        even = balanced(lengths, row_length, rows, slots)
        if even:
            placed += [(k, *spot) for spot in even]
            k += 1
            continue
        longest_first = sorted(range(batch_pairs), key=lambda i: -lengths[i])
        found = first_fit([lengths[i] for i in longest_first], row_length, rows, slots)
        if len(found) == batch_pairs:
            spots = dict(zip(longest_first, found, strict=True))
            placed += [(k, *spots[i]) for i in range(batch_pairs)]
        else:  # the pairs that come first must not wait for those that come later
            placed += [(k, *spot) for spot in first_fit(lengths, row_length, rows, slots)]
        k += 1
    return placed


def balanced(
    lengths: Sequence[int], row_length: int, rows: int, slots: int
) -> list[tuple[int, int]]:
    """Row and slot of each length, the longest first on the emptiest row; [] if they do not fit."""
    heap = [(0, row) for row in range(rows)]
    used = [0] * rows
    placed = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not heap or heap[0][0] + lengths[i] > row_length:
            return []
        load, row = heap[0]
        placed[i] = (row, used[row])
        used[row] += 1
        if used[row] < slots:
            heapq.heapreplace(heap, (load + lengths[i], row))
        else:
            heapq.heappop(heap)
    return placed


def evenly(
    length_P: list[int], row_length: int, rows: int, slots: int
) -> list[tuple[int, int, int]]:
    """Places of all pairs in as few batches as hold them, spread evenly over these."""
    if not length_P:
        return []
    least = max(-(-sum(length_P) // (rows * row_length)), -(-len(length_P) // (rows * slots)))
    full = fill(length_P, row_length, rows, slots)
    for count in range(least, max(k for k, _, _ in full) + 1):
        even = balanced(length_P, row_length, count * rows, slots)
        if even:
            return [(row // rows, row % rows, slot) for row, slot in even]
    even = balanced(length_P, row_length, (max(k for k, _, _ in full) + 1) * rows, slots)
    return [(row // rows, row % rows, slot) for row, slot in even] if even else full


def first_fit(
    lengths: Sequence[int], row_length: int, rows: int, slots: int
) -> list[tuple[int, int]]:
    """Row and slot for each length in turn, up to the first that fits nowhere."""
    free, used = [row_length] * rows, [0] * rows
    placed = []
    for length in lengths:
        for row in range(rows):
            if free[row] >= length and used[row] < slots:
                placed.append((row, used[row]))
                free[row] -= length
                used[row] += 1
                break
        else:
            return placed
    return placed


def fill(length_P: list[int], row_length: int, rows: int, slots: int) -> list[tuple[int, int, int]]:
    """Places (batch, row, slot) of all pairs in as few rows as they go, longest pair first.

    Rows with n free tokens form a stack; a bit mask says which stacks are not empty, so the
    fullest row that still fits is found without a search over the rows.
    """
    stacks: list[list[int]] = [[] for _ in range(row_length + 1)]
    used: list[int] = []
    mask = 0
    spots: list[tuple[int, int]] = [(0, 0)] * len(length_P)
    for p in sorted(range(len(length_P)), key=lambda p: -length_P[p]):
        length = length_P[p]
        fitting = mask >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = stacks[free].pop()
            mask ^= 0 if stacks[free] else 1 << free
        else:
            row, free = len(used), row_length
            used.append(0)
        spots[p] = (row, used[row])
        used[row] += 1
        free -= length
        if used[row] < slots:
            stacks[free].append(row)
            mask |= 1 << free
    return [(row // rows, row % rows, slot) for row, slot in spots]
