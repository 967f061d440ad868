"""Which pairs share a row: planned once per round from lengths, on the host, and the same on all.

Both sides of a pair lie in one row. A run's batches have a few static shapes, which differ in the
length of the rows: the pairs of a step are spread evenly over its rows, and the shortest length
that holds them is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sage_jax import batch
from sage_jax.data import bins, encode, layout

SIMULATED_BATCHES = 200


LONG = 0  # among the factors of `shape`: as few rows as there may be, each as long as it takes


class RowShape(NamedTuple):
    """The static shapes of a run's batches."""

    row_length: int  # tokens in a row, at most
    rows: int  # rows in a batch, over all processes
    slots: int  # most pairs in a row
    sizes: tuple[int, ...] = ()  # the row lengths in use, ascending, row_length last; () = it alone


def _each(lengths: np.ndarray) -> np.ndarray:
    """Tokens of each pair in a row, from those or from the lengths of both sequences."""
    lengths = np.asarray(lengths)
    return lengths.sum(axis=1) if lengths.ndim == 2 else lengths


def shape(
    lengths_N2: np.ndarray,
    *,
    batch_pairs: int,
    multiple: int = 8,
    rows_multiple: int = 1,
    packing: bool = True,
    factors: Sequence[int] = (1,),
    overflow: float = 0.02,
    sizes: int = 1,
) -> RowShape:
    """The batch shape that holds `batch_pairs` pairs drawn at random, nearly always.

    Rows are as long as the longest pair, or a multiple of it where that saves tokens. Their number
    is found by packing batches drawn with a fixed seed. A batch that needs more closes early in
    `plan`, with fewer pairs.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence; or [N], tokens of each pair in a row.
      batch_pairs: pairs in a batch.
      multiple: rows are a multiple of this many tokens long.
      rows_multiple: the number of rows is a multiple of this: devices that share the row axis.
      packing: False gives each pair a row of its own.
      factors: row lengths to try, in longest pairs; the batch of fewest tokens wins. Attention
        costs of some kernels grow with the row; where they do not, `LONG` alone wastes least.
      overflow: share of random batches that may need more rows, in [0, 1).
      sizes: row lengths in use, of `LONG` rows; each is a program to compile.

    Returns:
      The shape.

    >>> shape(np.array([[10, 12], [3, 4], [4, 3], [5, 6]]), batch_pairs=2, packing=False)
    RowShape(row_length=24, rows=2, slots=1, sizes=())
    """
    length_N = _each(lengths_N2)
    if batch_pairs < 1 or len(length_N) == 0:
        raise ValueError(
            f"batch_pairs={batch_pairs} of {len(length_N)} pairs gives no batch; both must be >= 1."
        )
    longest = int(length_N.max())
    if not packing:
        return RowShape(round_up(longest, multiple), round_up(batch_pairs, rows_multiple), 1)
    drawn = _draw(length_N, batch_pairs)
    tried = []
    for factor in factors:
        if factor == LONG:
            tried.append(_even(drawn, longest, rows_multiple, sizes, float(length_N.mean())))
            continue
        row_length = round_up(factor * longest, multiple)
        rows, slots = _rows_needed(drawn, row_length, 1 - overflow)
        tried.append(RowShape(row_length, round_up(rows, rows_multiple), slots))
    return min(tried, key=lambda found: (found.row_length * found.rows, found.row_length))


def even(
    lengths_N2: np.ndarray,
    *,
    batch_pairs: int,
    rows: int,
    sizes: int = 4,
    unit: int = 1,
    price: float = 0.0,
) -> RowShape:
    """The shape of so many rows that holds any batch of no more tokens than random ones have.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence; or [N], tokens of each pair in a row.
      batch_pairs: pairs in a batch.
      rows: rows in a batch.
      sizes: row lengths in use, at most. The last holds any batch that one row of `capacity` tokens
        holds; with several rows it is seldom needed.
      unit: row lengths are multiples of this.
      price: tokens that a further row length has to save a batch, for the program that it takes.

    Returns:
      The shape; its `slots` hold any batch.

    >>> even(np.full(9, 40), batch_pairs=4, rows=2, sizes=2)
    RowShape(row_length=80, rows=2, slots=4, sizes=(80, 120))
    """
    length_N = _each(lengths_N2)
    drawn, longest = _draw(length_N, batch_pairs), int(length_N.max())
    found = _even(drawn, longest, rows, sizes - (rows > 1), float(length_N.mean()), price)
    # Longest first on the emptiest row: none gets more than the mean and one pair (Graham, 1969).
    surest = -(-capacity(length_N, batch_pairs) // rows) + (longest if rows > 1 else 0)
    levels = [*(found.sizes or (found.row_length,)), round_up(surest, grain(surest))]
    levels = sorted({round_up(length, unit) for length in levels})
    usual = round_up(found.row_length, unit)
    return RowShape(usual, rows, round_slots(max(found.slots, batch_pairs)), tuple(levels))


def capacity(lengths_N2: np.ndarray, batch_pairs: int) -> int:
    """Most tokens that `batch_pairs` pairs drawn at random have together, of many draws."""
    most = max(int(lengths.sum()) for lengths in _draw(_each(lengths_N2), batch_pairs))
    return max(most, int(_each(lengths_N2).max()))


def _draw(length_N: np.ndarray, batch_pairs: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    repeat = batch_pairs > len(length_N)
    return [rng.choice(length_N, batch_pairs, replace=repeat) for _ in range(SIMULATED_BATCHES)]


def _even(
    drawn: Sequence[np.ndarray],
    longest: int,
    rows: int,
    sizes: int,
    mean: float,
    price: float = 0.0,
) -> RowShape:
    """As few rows as there may be, and the row lengths that waste least on these batches."""
    loads, slots = [], 1
    for lengths in drawn:
        placed = bins.balanced(lengths.tolist(), 2**62, rows, len(lengths))
        load = np.zeros(rows, np.int64)
        np.add.at(load, [row for row, _ in placed], lengths)
        loads.append(round_up(int(load.max()), grain(int(load.max()))))
        slots = max(slots, max(slot for _, slot in placed) + 1)
    chosen = _levels(np.maximum(loads, round_up(longest, grain(longest))), sizes, price / rows)
    slots = max(slots, -(-int(1.5 * chosen[-1]) // max(int(mean), 1)))
    return RowShape(chosen[-1], rows, slots, chosen if len(chosen) > 1 else ())


def grain(length: int) -> int:
    """What a row length is a multiple of: kernels work in blocks."""
    return 8 if length <= 256 else 64 if length <= 1024 else 128


def _levels(loads: np.ndarray, count: int, price: float = 0.0) -> tuple[int, ...]:
    """The lengths, the largest load among them, that hold loads with the least room left.

    There are at most `count`, and each but the first saves more than `price` a load.

    >>> _levels(np.array([1, 1, 9, 10]), 3), _levels(np.array([1, 1, 9, 10]), 3, price=0.5)
    ((1, 9, 10), (1, 10))
    """
    value, times = np.unique(loads, return_counts=True)
    below = np.concatenate([[0], np.cumsum(times)])
    n = len(value)
    # best[i]: the least sum of lengths for the i smallest loads; path[i]: the levels that give it
    best = np.concatenate([[0.0], np.full(n, np.inf)])
    path: list[tuple[int, ...]] = [()] * (n + 1)
    for _ in range(min(count, n)):
        new, new_path = best.copy(), list(path)
        for i in range(1, n + 1):
            cost = best[:i] + value[i - 1] * (below[i] - below[:i])
            j = int(cost.argmin())
            if cost[j] < new[i]:
                new[i], new_path[i] = cost[j], (*path[j], int(value[i - 1]))
        if best[n] - new[n] <= price * len(loads):
            break
        best, path = new, new_path
    return path[n]


def _rows_needed(drawn: Sequence[np.ndarray], row_length: int, quantile: float) -> tuple[int, int]:
    """Rows that the given share of batches needs, and the most pairs seen in a row."""
    rows, slots = [], 1
    for lengths in drawn:
        longest_first = np.sort(lengths)[::-1].tolist()
        placed = bins.first_fit(longest_first, row_length, len(lengths), len(lengths))
        rows.append(max(row for row, _ in placed) + 1)
        slots = max(slots, max(slot for _, slot in placed) + 1)
    return int(np.quantile(rows, quantile, method="higher")), slots


def round_up(value: int, multiple: int) -> int:
    """The next multiple of a number.

    >>> round_up(9, 8)
    16
    """
    return -(-value // multiple) * multiple


def round_slots(slots: int) -> int:
    """Slots of a row, a multiple of 8 where they are many: data sets alike share their programs.

    >>> round_slots(3), round_slots(57)
    (3, 64)
    """
    return slots if slots <= 8 else round_up(slots, 8)


def plan(
    lengths_N2: np.ndarray,
    order: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    sizes: Sequence[int] = (),
    batch_pairs: int | None = None,
) -> np.ndarray:
    """Places pairs in the rows of K batches.

    With `batch_pairs` the pairs keep their order and each batch holds exactly that many, unless
    they do not fit into its rows: then the batch closes early and the next one begins with the pair
    that did not fit. Pairs left over at the end, fewer than a batch, are not placed. Without it
    every pair is placed and rows are filled as far as they go; the last batch has empty rows.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence; or [N], tokens of each pair in a row.
      order: indices of the pairs to place, int [P].
      row_length: tokens in a row.
      rows: rows in a batch (R).
      slots: most pairs in a row (S).
      sizes: shorter row lengths, which `row_length` chooses from for each batch of the plan; the
        plan is the same whatever they are, so a `RowShape` can be given whole.
      batch_pairs: pairs in a batch.

    Returns:
      int32 [K, R, S]: indices of pairs, -1 for an empty slot. A function of the arguments alone.

    Raises:
      ValueError: if a pair is longer than a row, or the rows have fewer slots than a batch pairs.

    Rows of a batch are filled evenly, longest pair first (Graham, 1969); where that does not fit,
    by first-fit decreasing (Johnson, 1973).

    >>> lengths = np.array([[4, 4], [2, 2], [2, 2]])
    >>> plan(lengths, [0, 1, 2], row_length=8, rows=2, slots=2, batch_pairs=3).tolist()
    [[[0, -1], [1, 2]]]
    """
    if sizes and max(sizes) > row_length:
        raise ValueError(f"sizes={tuple(sizes)} must not exceed row_length={row_length}.")
    pair_P = np.asarray(order, np.int64)
    length_P = _each(lengths_N2)[pair_P]
    if len(pair_P) and length_P.max() > row_length:
        i = int(length_P.argmax())
        raise ValueError(
            f"pair {pair_P[i]} has {length_P[i]} tokens and a row {row_length}; both sides must "
            "fit into one row. Raise row_length or lower max_length."
        )
    if batch_pairs is None:
        placed = bins.evenly(length_P.tolist(), row_length, rows, slots)
    else:
        if not 1 <= batch_pairs <= rows * slots:
            raise ValueError(
                f"batch_pairs={batch_pairs} must be between 1 and rows * slots = {rows * slots}."
            )
        placed = bins.batches(length_P.tolist(), row_length, rows, slots, batch_pairs)
    steps = max((k for k, _, _ in placed), default=-1) + 1
    pair_KRS = np.full((steps, rows, slots), -1, np.int32)
    if placed:  # placed[p] is the place of the p-th pair; pairs after the last are left over
        pair_KRS[tuple(np.array(placed).T)] = pair_P[: len(placed)]
    return pair_KRS


def row_length(pair_RS: np.ndarray, lengths_N2: np.ndarray, shape: RowShape) -> int:
    """The shortest of a shape's row lengths that holds the pairs of a batch.

    Args:
      pair_RS: int [R, S], indices of pairs, -1 for an empty slot; all rows of the batch, so that
        every process comes to the same length.
      lengths_N2: as given to `plan`.
      shape: the static shapes.

    >>> row_length(np.array([[0, 1]]), np.array([3, 4]), RowShape(16, 1, 2, (8, 16)))
    8
    """
    length_N = _each(lengths_N2)
    most = int(np.where(pair_RS >= 0, length_N[pair_RS], 0).sum(axis=1).max())
    return next((size for size in shape.sizes if size >= most), shape.row_length)


def collate(
    encoded: encode.EncodedPairs,
    pair_RS: np.ndarray,
    row_length: int,
    ref_logps_N2: np.ndarray | None = None,
    weight_N: np.ndarray | None = None,
    share: bool = False,
    keys: int = 0,
) -> batch.PackedBatch:
    """Builds the batch of one step of a plan.

    Args:
      encoded: the data set.
      pair_RS: int [R, S], indices of pairs, -1 for an empty slot.
      row_length: tokens in a row.
      ref_logps_N2: float [N, 2], reference log-probabilities in nats; nan if None, so that a loss
        that needs them is nan, and not that of a reference that finds everything certain.
      weight_N: float [N], weights of the pairs in the loss; 1 if None.
      share: both completions of a pair share one prompt, see `batch.Shared`; the plan has to be
        made with the lengths `encoded.row_lengths(True)`.
      keys: where prompts are shared: pairs of one problem that follow each other in a row share it,
        too, see `groups.plan`, and a row has room for so many keys; 0 = they do not.

    Returns:
      A batch of numpy arrays.

    Raises:
      ValueError: an array of another shape.
    """
    if pair_RS.ndim != 2:
        raise ValueError(
            f"pair_RS has the shape {list(pair_RS.shape)} and has to be [R, S], one batch of a "
            f"plan [K, R, S]: plan[0]."
        )
    count = len(encoded)
    for name, given, wanted in (
        ("ref_logps_N2", ref_logps_N2, (count, 2)),
        ("weight_N", weight_N, (count,)),
    ):
        if given is not None and np.shape(given) != wanted:
            raise ValueError(
                f"{name} has the shape {list(np.shape(given))}; for {count} pairs it has to be "
                f"{list(wanted)}, one row a pair of the data set and not of the batch."
            )
    rows, slots = pair_RS.shape
    out = batch.empty(rows, row_length, slots)
    told = layout.shared(encoded, pair_RS, out, keys) if share else None
    if not share:
        layout.apart(encoded, pair_RS, out)
    filled = pair_RS >= 0
    index = np.where(filled, pair_RS, 0)
    weight = np.ones(len(encoded)) if weight_N is None else np.asarray(weight_N)
    unknown = ref_logps_N2 is None
    ref = np.full((len(encoded), 2), np.nan) if unknown else np.asarray(ref_logps_N2)
    return out._replace(
        pair_RS=pair_RS.astype(np.int32),
        ref_logps_RS2=np.where(filled[..., None], ref[index], 0).astype(np.float32),
        weight_RS=np.where(filled, weight[index], 0).astype(np.float32),
        shared=told,
    )


def padding_fraction(pair_KRS: np.ndarray, lengths_N2: np.ndarray, shape: RowShape | int) -> float:
    """Share of the planned tokens that are padding, in [0, 1].

    >>> padding_fraction(np.array([[[0, -1]]]), np.array([[2, 1]]), 4)
    0.25
    """
    if isinstance(shape, int):
        shape = RowShape(shape, pair_KRS.shape[1], pair_KRS.shape[2])
    room = sum(row_length(pair_RS, lengths_N2, shape) for pair_RS in pair_KRS) * pair_KRS.shape[1]
    if room == 0:
        return 0.0
    return float(1 - _each(lengths_N2)[pair_KRS[pair_KRS >= 0]].sum() / room)
