"""Which pairs each step trains, whatever devices train them; and the rows they lie in on a mesh.

A batch has as many rows as the devices divide by, so the shape differs from one mesh to another.
The pairs of a step must not: a run that goes on elsewhere trains what it would have trained here.
So a step takes the next pairs as long as their tokens together stay under a capacity that follows
from the lengths alone, and the rows of every mesh have room for any such step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sage_jax.data import pack

FACTORS = (1, 2, 3)  # row lengths to choose from, in longest pairs, where short rows are cheaper
SIZES = 4  # row lengths in use, each of them a program to compile


class Shape(NamedTuple):
    """The static shapes of a batch on a mesh, and what decides which pairs a step takes."""

    row_length: int  # tokens in a row, nearly always
    rows: int  # rows in a batch, over all processes; a multiple of what the devices divide by
    slots: int  # most pairs in a row
    every: tuple[pack.RowShape, ...]  # the same on every mesh: what a step has to fit into
    sizes: tuple[int, ...] = ()  # row lengths in use, ascending; () = row_length alone
    share: bool = False  # both completions of a pair share one prompt

    def length_of(self, pair_RS: np.ndarray, length_N: np.ndarray) -> int:
        """Tokens in a row of the batch that holds these pairs."""
        return pack.row_length(pair_RS, length_N, self.packed)

    @property
    def packed(self) -> pack.RowShape:
        """Of these rows alone."""
        most = max((self.row_length, *self.sizes))
        return pack.RowShape(most, self.rows, self.slots, self.sizes)


def shape(
    lengths_N2: np.ndarray,
    *,
    batch_pairs: int,
    packing: bool = True,
    rows_multiple: int = 1,
    unit: int = 1,
    long: bool = False,
    share: bool = False,
) -> Shape:
    """The shape of fewest tokens on a mesh.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence; or [N], tokens of each pair in a row.
      batch_pairs: pairs in a step.
      packing: False gives each pair a row of its own.
      rows_multiple: the number of rows is a multiple of this: devices that share the row axis,
        times the parts of a step.
      unit: the length of rows is a multiple of this.
      long: as few rows as there may be, for attention whose costs do not grow with the row.
      share: the lengths are of rows with shared prompts.

    >>> one = shape(np.full((9, 2), 20), batch_pairs=3)
    >>> one[:3], shape(np.full((9, 2), 20), batch_pairs=3, rows_multiple=2)[:3]
    ((40, 3, 3), (40, 4, 3))
    >>> one.every
    (RowShape(row_length=120, rows=1, slots=3, sizes=()),)
    """
    longest = int((lengths_N2.sum(axis=1) if lengths_N2.ndim == 2 else lengths_N2).max())
    if not packing:
        alone = pack.shape(lengths_N2, batch_pairs=batch_pairs, packing=False)
        rows = -(-batch_pairs // rows_multiple) * rows_multiple
        length = -(-alone.row_length // unit) * unit
        return Shape(length, rows, 1, (alone,), (), share)
    most = pack.capacity(lengths_N2, batch_pairs)
    every = (pack.RowShape(most, 1, batch_pairs),)
    counts = {rows_multiple}
    if not long:
        needed = [-(-most // (factor * longest)) for factor in FACTORS]
        counts |= {-(-rows // rows_multiple) * rows_multiple for rows in needed}
    tried = [
        pack.even(lengths_N2, batch_pairs=batch_pairs, rows=rows, sizes=SIZES, unit=unit)
        for rows in sorted(counts)
    ]
    # Where rows are not long, the least that is not much more than another, in shorter rows.
    best = min(
        tried, key=lambda one: (round(np.log(one.row_length * one.rows) / 0.05), one.row_length)
    )
    return Shape(best.row_length, best.rows, best.slots, every, best.sizes, share)


def split(
    lengths_N2: np.ndarray,
    order: Sequence[int] | np.ndarray,
    every: Sequence[pack.RowShape],
    batch_pairs: int,
) -> np.ndarray:
    """The pairs of each step, in order; a function of the arguments alone, on every mesh.

    A step holds `batch_pairs` pairs unless they do not fit into the rows of one of the shapes:
    then it closes early, and the next one begins with the pair that did not fit. Pairs left over
    at the end, fewer than a batch, are in no step.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence.
      order: indices of the pairs to place, int [P].
      every: the shapes that the step has to fit into, `Shape.every`.
      batch_pairs: pairs in a step.

    Returns:
      int32 [K, batch_pairs]: indices of pairs, -1 behind those of a step that closed early.

    >>> shapes = (pack.RowShape(8, 2, 2),)
    >>> split(np.full((5, 2), 4), [4, 3, 2, 1], shapes, 2).tolist()
    [[4, 3], [2, 1]]
    >>> split(np.array([[4, 4], [3, 3], [3, 3], [2, 2]]), [0, 1, 2, 3], shapes, 3).tolist()
    [[0, 1, -1]]
    """
    pair_P = np.asarray(order, np.int64)
    lengths_P2 = np.asarray(lengths_N2)[pair_P]
    found, at = [], 0
    while len(pair_P) - at >= batch_pairs:
        count = batch_pairs
        # What does not fit is cut off; what is left has to fit everywhere, too.
        while (fit := min(_fits(lengths_P2[at : at + count], one) for one in every)) < count:
            count = fit
        step = np.full(batch_pairs, -1, np.int32)
        step[:count] = pair_P[at : at + count]
        found.append(step)
        at += count
    return np.array(found, np.int32).reshape(len(found), batch_pairs)


def _fits(lengths_B2: np.ndarray, one: pack.RowShape) -> int:
    """How many of these pairs, from the first on, fit into a batch together."""
    return int((_plan(lengths_B2, one.row_length, one.rows, one.slots) >= 0).sum())


def _plan(lengths_B2: np.ndarray, row_length: int, rows: int, slots: int) -> np.ndarray:
    count = len(lengths_B2)
    return pack.plan(
        lengths_B2, range(count), row_length=row_length, rows=rows, slots=slots, batch_pairs=count
    )[0]


def place(lengths_N2: np.ndarray, pair_KB: np.ndarray, shape: Shape) -> np.ndarray:
    """The rows of steps on a mesh.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence.
      pair_KB: int [K, B], from `split`.
      shape: of the mesh, from the same lengths.

    Returns:
      int32 [K, R, S]: indices of pairs, -1 for an empty slot.

    Raises:
      ValueError: a step does not fit, because the shape belongs to other lengths.

    >>> lengths = np.full((4, 2), 4)
    >>> place(lengths, np.array([[2, 0]]), Shape(16, 2, 2, ())).tolist()
    [[[2, -1], [0, -1]]]
    """
    pair_KRS = np.full((len(pair_KB), shape.rows, shape.slots), -1, np.int32)
    longest = shape.packed.row_length
    for k, step in enumerate(np.asarray(pair_KB)):
        pairs = step[step >= 0]
        plan = _plan(np.asarray(lengths_N2)[pairs], longest, shape.rows, shape.slots)
        if (plan >= 0).sum() < len(pairs):
            raise ValueError(
                f"The {len(pairs)} pairs of step {k} do not fit into {shape.rows} rows of "
                f"{longest} tokens. Give the shape that `shape` made of the same lengths."
            )
        pair_KRS[k] = np.where(plan >= 0, pairs[plan], -1)
    return pair_KRS
