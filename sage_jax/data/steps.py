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

from sage_jax.data import encode, groups, pack

FACTORS = (1, 2, 3)  # row lengths to choose from, in longest pairs, where short rows are cheaper
SIZES = 4  # row lengths in use, at most; each is a program to compile
MOST_KEYS = 4.0  # for each token of a row: problems of long prompts and short answers need many
DRAWS = 20  # batches that say what there is to save in a step
LOOKED_AT = 2**15  # pairs that say what there is to save in a pass


class Shape(NamedTuple):
    """The static shapes of a batch on a mesh, and what decides which pairs a step takes."""

    row_length: int  # tokens in a row, nearly always
    rows: int  # rows in a batch, over all processes; a multiple of what the devices divide by
    slots: int  # most pairs in a row
    every: tuple[pack.RowShape, ...]  # the same on every mesh: what a step has to fit into
    sizes: tuple[int, ...] = ()  # row lengths in use, ascending; () = row_length alone
    share: bool = False  # both completions of a pair share one prompt
    # Pairs of one problem share their prompt and completions, too, in rows with room for so many
    # keys a token; 0: they do not.
    keys: float = 0.0

    def keys_of(self, length: int) -> int:
        """Keys of a row of so many tokens; 0 where they are those of its tokens."""
        return -(-int(np.ceil(length * self.keys)) // 8) * 8

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
    price: float = 0.0,
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
      price: tokens that a further row length has to save a step, for the program that it takes.

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
        pack.even(
            lengths_N2, batch_pairs=batch_pairs, rows=rows, sizes=SIZES, unit=unit, price=price
        )
        for rows in sorted(counts)
    ]
    # Where rows are not long, the least that is not much more than another, in shorter rows.
    best = min(
        tried, key=lambda one: (round(np.log(one.row_length * one.rows) / 0.05), one.row_length)
    )
    return Shape(best.row_length, best.rows, best.slots, every, best.sizes, share)


def tokens(pairs: encode.EncodedPairs, pair_KRS: np.ndarray, shape: Shape) -> np.ndarray:
    """Tokens of each row of a plan, int64 [K, R], without padding; arguments as in `lengths`."""
    if shape.keys:
        return groups.work(pairs, pair_KRS, grouped=True).tokens.astype(np.int64)
    return np.where(pair_KRS >= 0, pairs.row_lengths(shape.share)[pair_KRS], 0).sum(axis=2)


def needed(pairs: encode.EncodedPairs, pair_KRS: np.ndarray, shape: Shape) -> np.ndarray:
    """Length that each row of a plan has to have, int64 [K, R]; arguments as in `lengths`.

    Parts that the plan made of one problem may lie side by side. Together they have fewer tokens
    than by themselves, but hardly fewer keys.
    """
    if not shape.keys:
        return tokens(pairs, pair_KRS, shape)
    found = groups.work(pairs, pair_KRS, grouped=True)
    return np.ceil(np.maximum(found.tokens, found.keys / shape.keys)).astype(np.int64)


def lengths(pairs: encode.EncodedPairs, pair_KRS: np.ndarray, shape: Shape) -> np.ndarray:
    """Length of the rows of each batch of a plan, int64 [K].

    Args:
      pairs: the data set.
      pair_KRS: int [K, R, S], indices of pairs, -1 for an empty slot; all rows of the batches, so
        that every process comes to the same lengths.
      shape: of the rows.
    """
    most_K = needed(pairs, pair_KRS, shape).max(axis=1)
    sizes = sorted({*shape.sizes, shape.packed.row_length})
    return np.array(sizes)[np.minimum(np.searchsorted(sizes, most_K), len(sizes) - 1)]


def of_problems(
    pairs: encode.EncodedPairs, shape: Shape, batch_pairs: int, *, least: float = 0.0
) -> tuple[Shape, Shape]:
    """Shapes of rows that hold pairs of one problem together, where that saves tokens.

    Args:
      pairs: the data set.
      shape: of the steps of a mesh, from lengths with shared prompts.
      batch_pairs: pairs in a step.
      least: share of the tokens that has to be saved, in [0, 1).

    Returns:
      The shape for steps, in which few problems meet unless they are few; and the one for passes
      over many pairs. Either is `shape` itself where less would be saved: of the rows of passes
      over these pairs, or of the row length that random steps need.
    """
    some = np.arange(min(len(pairs), LOOKED_AT))
    problems = len(np.unique(pairs.problem_N[some]))
    if shape.slots < 2 or problems == len(some) or problems > (1 - least) * len(some):
        return shape, shape
    free = groups.items(pairs, some, row_length=shape.row_length, slots=2**30, keys=MOST_KEYS)
    most = max(item.keys / item.tokens for item in free)
    keys = float(np.ceil(64 * most)) / 64  # exact in binary
    dense = max(len(item.pairs) / item.tokens for item in free)
    slots = min(max(shape.slots, int(np.ceil(shape.row_length * dense))), 4 * shape.slots)
    slots = pack.round_slots(slots)
    passes = shape._replace(keys=keys, slots=slots)
    room = [int(lengths(pairs, plan_pass(pairs, some, one), one).sum()) for one in (shape, passes)]
    if room[1] >= room[0] or room[1] > (1 - least) * room[0]:
        passes = shape
    grouped = shape._replace(keys=keys)
    long, short = (
        int(needed(pairs, drawn(pairs, one, batch_pairs), one).max()) for one in (shape, grouped)
    )
    short = pack.round_up(short, pack.grain(short))
    most = min(long, shape.row_length)
    if short >= most or short > (1 - least) * most:
        return shape, passes
    return grouped._replace(sizes=tuple(sorted({*grouped.sizes, shape.row_length, short}))), passes


def drawn(pairs: encode.EncodedPairs, shape: Shape, batch_pairs: int) -> np.ndarray:
    """The rows of some steps of random pairs, int32 [K, R, S], always the same ones."""
    rng, size = np.random.default_rng(0), min(batch_pairs, len(pairs))
    pair_KB = np.stack([rng.choice(len(pairs), size, replace=False) for _ in range(DRAWS)])
    length_N = pairs.row_lengths(shape.share)
    return place(length_N, pair_KB, shape, pairs if shape.keys else None)


def plan_pass(pairs: encode.EncodedPairs, index_P: np.ndarray, shape: Shape) -> np.ndarray:
    """The rows of a pass over some pairs, int32 [K, R, S].

    They have the usual length, unless a pair is longer, as one may be that came later.
    """
    length_N = pairs.row_lengths(shape.share)
    longest = max(shape.row_length, int(length_N[index_P].max(initial=0)))
    longest = min(longest, shape.packed.row_length)
    if shape.keys:
        return groups.plan(
            pairs, index_P, row_length=longest, rows=shape.rows, slots=shape.slots, keys=shape.keys
        )
    return pack.plan(length_N, index_P, row_length=longest, rows=shape.rows, slots=shape.slots)


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


def place(
    lengths_N2: np.ndarray,
    pair_KB: np.ndarray,
    shape: Shape,
    together: encode.EncodedPairs | None = None,
) -> np.ndarray:
    """The rows of steps on a mesh.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence; or [N], tokens of each pair in a row.
      pair_KB: int [K, B], from `split`.
      shape: of the mesh, from the same lengths.
      together: the data set, to put pairs of one problem into one row where they have room there.

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
        if together is not None:
            rows = groups.together(
                together, pairs, row_length=longest, rows=shape.rows, slots=shape.slots,
                keys=shape.keys,
            )  # fmt: skip
            if rows is not None:
                pair_KRS[k] = rows
                continue
        plan = _plan(np.asarray(lengths_N2)[pairs], longest, shape.rows, shape.slots)
        if (plan >= 0).sum() < len(pairs):
            raise ValueError(
                f"The {len(pairs)} pairs of step {k} do not fit into {shape.rows} rows of "
                f"{longest} tokens. Give the shape that `shape` made of the same lengths."
            )
        pair_KRS[k] = np.where(plan >= 0, pairs[plan], -1)
    return pair_KRS
