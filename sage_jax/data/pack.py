"""Which pairs share a row: planned once per round from lengths, on the host, and the same on all.

Both sides of a pair lie in one row, and every batch has one static shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sage_jax import batch
from sage_jax.data import encode

SIMULATED_BATCHES = 200


class RowShape(NamedTuple):
    """The static shape of a batch."""

    row_length: int  # tokens in a row
    rows: int  # rows in a batch, over all processes
    slots: int  # most pairs in a row


def shape(
    lengths_N2: np.ndarray,
    *,
    batch_pairs: int,
    multiple: int = 8,
    rows_multiple: int = 1,
    packing: bool = True,
    factors: Sequence[int] = (1,),
    overflow: float = 0.02,
) -> RowShape:
    """The batch shape that holds `batch_pairs` pairs drawn at random, nearly always.

    Rows are as long as the longest pair, or a multiple of it where that saves tokens. Their number
    is found by packing batches drawn with a fixed seed. A batch that needs more closes early in
    `plan`, with fewer pairs.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence.
      batch_pairs: pairs in a batch.
      multiple: rows are a multiple of this many tokens long.
      rows_multiple: the number of rows is a multiple of this: devices that share the row axis.
      packing: False gives each pair a row of its own.
      factors: row lengths to try, in longest pairs; the batch of fewest tokens wins. Attention
        costs grow with the row, so long rows pay only where pairs are short or batches small.
      overflow: share of random batches that may need more rows, in [0, 1).

    Returns:
      The shape.

    >>> shape(np.array([[10, 12], [3, 4], [4, 3], [5, 6]]), batch_pairs=2, packing=False)
    RowShape(row_length=24, rows=2, slots=1)
    """
    length_N = np.asarray(lengths_N2).sum(axis=1)
    if batch_pairs < 1 or len(length_N) == 0:
        raise ValueError(
            f"batch_pairs={batch_pairs} of {len(length_N)} pairs gives no batch; both must be >= 1."
        )
    longest = int(length_N.max())
    if not packing:
        return RowShape(_round_up(longest, multiple), _round_up(batch_pairs, rows_multiple), 1)
    rng = np.random.default_rng(0)
    repeat = batch_pairs > len(length_N)
    drawn = [rng.choice(length_N, batch_pairs, replace=repeat) for _ in range(SIMULATED_BATCHES)]
    tried = []
    for factor in factors:
        row_length = _round_up(factor * longest, multiple)
        rows, slots = _rows_needed(drawn, row_length, 1 - overflow)
        tried.append(RowShape(row_length, _round_up(rows, rows_multiple), slots))
    return min(tried, key=lambda found: (found.row_length * found.rows, found.row_length))


def _rows_needed(drawn: Sequence[np.ndarray], row_length: int, quantile: float) -> tuple[int, int]:
    """Rows that the given share of batches needs, and the most pairs seen in a row."""
    rows, slots = [], 1
    for lengths in drawn:
        longest_first = np.sort(lengths)[::-1].tolist()
        placed = _first_fit(longest_first, row_length, len(lengths), len(lengths))
        rows.append(max(row for row, _ in placed) + 1)
        slots = max(slots, max(slot for _, slot in placed) + 1)
    return int(np.quantile(rows, quantile, method="higher")), slots


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan(
    lengths_N2: np.ndarray,
    order: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    batch_pairs: int | None = None,
) -> np.ndarray:
    """Places pairs in the rows of K batches.

    With `batch_pairs` the pairs keep their order and each batch holds exactly that many, unless
    they do not fit into its rows: then the batch closes early and the next one begins with the pair
    that did not fit. Pairs left over at the end, fewer than a batch, are not placed. Without it
    every pair is placed and rows are filled as far as they go; the last batch has empty rows.

    Args:
      lengths_N2: integers [N, 2], tokens of each sequence.
      order: indices of the pairs to place, int [P].
      row_length: tokens in a row.
      rows: rows in a batch (R).
      slots: most pairs in a row (S).
      batch_pairs: pairs in a batch.

    Returns:
      int32 [K, R, S]: indices of pairs, -1 for an empty slot. A function of the arguments alone.

    Raises:
      ValueError: if a pair is longer than a row, or the rows have fewer slots than a batch pairs.

    Source: first-fit decreasing, as in bin packing (Johnson, 1973).

    >>> lengths = np.array([[4, 4], [2, 2], [2, 2]])
    >>> plan(lengths, [0, 1, 2], row_length=8, rows=2, slots=2, batch_pairs=3).tolist()
    [[[0, -1], [1, 2]]]
    """
    pair_P = np.asarray(order, np.int64)
    length_P = np.asarray(lengths_N2).sum(axis=1)[pair_P]
    if len(pair_P) and length_P.max() > row_length:
        i = int(length_P.argmax())
        raise ValueError(
            f"pair {pair_P[i]} has {length_P[i]} tokens and a row {row_length}; both sides must "
            "fit into one row. Raise row_length or lower max_length."
        )
    if batch_pairs is None:
        placed = _fill(length_P.tolist(), row_length, rows, slots)
    else:
        if not 1 <= batch_pairs <= rows * slots:
            raise ValueError(
                f"batch_pairs={batch_pairs} must be between 1 and rows * slots = {rows * slots}."
            )
        placed = _batches(length_P.tolist(), row_length, rows, slots, batch_pairs)
    steps = max((k for k, _, _ in placed), default=-1) + 1
    pair_KRS = np.full((steps, rows, slots), -1, np.int32)
    if placed:  # placed[p] is the place of the p-th pair; pairs after the last are left over
        pair_KRS[tuple(np.array(placed).T)] = pair_P[: len(placed)]
    return pair_KRS


def _batches(
    length_P: list[int], row_length: int, rows: int, slots: int, batch_pairs: int
) -> list[tuple[int, int, int]]:
    """Places (batch, row, slot) of consecutive pairs, batch after batch."""
    placed: list[tuple[int, int, int]] = []
    k = 0
    while len(length_P) - len(placed) >= batch_pairs:
        lengths = length_P[len(placed) : len(placed) + batch_pairs]
        longest_first = sorted(range(batch_pairs), key=lambda i: -lengths[i])
        found = _first_fit([lengths[i] for i in longest_first], row_length, rows, slots)
        if len(found) == batch_pairs:
            spots = dict(zip(longest_first, found, strict=True))
            placed += [(k, *spots[i]) for i in range(batch_pairs)]
        else:  # the pairs that come first must not wait for those that come later
            placed += [(k, *spot) for spot in _first_fit(lengths, row_length, rows, slots)]
        k += 1
    return placed


def _first_fit(
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


def _fill(
    length_P: list[int], row_length: int, rows: int, slots: int
) -> list[tuple[int, int, int]]:
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


def collate(
    encoded: encode.EncodedPairs,
    pair_RS: np.ndarray,
    row_length: int,
    ref_logps_N2: np.ndarray | None = None,
    weight_N: np.ndarray | None = None,
) -> batch.PackedBatch:
    """Builds the batch of one step of a plan.

    Args:
      encoded: the data set.
      pair_RS: int [R, S], indices of pairs, -1 for an empty slot.
      row_length: tokens in a row.
      ref_logps_N2: float [N, 2], reference log-probabilities in nats; 0 if None.
      weight_N: float [N], weights of the pairs in the loss; 1 if None.

    Returns:
      A batch of numpy arrays.
    """
    rows, slots = pair_RS.shape
    out = batch.empty(rows, row_length, slots)
    tokens_RT, position_RT, segment_RT, completion_RT = (np.asarray(leaf) for leaf in out[:4])
    for r in range(rows):
        at = 0
        for s in np.flatnonzero(pair_RS[r] >= 0).tolist():
            for side in (batch.CHOSEN, batch.REJECTED):
                ids, start = encoded.sequence(int(pair_RS[r, s]), side)
                end = at + len(ids)
                if end > row_length:
                    raise ValueError(
                        f"row {r} of the plan needs {end} tokens or more, row_length={row_length}; "
                        "plan and collate must be given the same row_length."
                    )
                tokens_RT[r, at:end] = ids
                position_RT[r, at:end] = np.arange(len(ids))
                segment_RT[r, at:end] = batch.segment_id(s, side)
                completion_RT[r, at + start : end] = True
                at = end
    filled = pair_RS >= 0
    index = np.where(filled, pair_RS, 0)
    weight = np.ones(len(encoded)) if weight_N is None else np.asarray(weight_N)
    ref = np.zeros((len(encoded), 2)) if ref_logps_N2 is None else np.asarray(ref_logps_N2)
    return batch.PackedBatch(
        tokens_RT=tokens_RT,
        position_RT=position_RT,
        segment_RT=segment_RT,
        completion_RT=completion_RT,
        pair_RS=pair_RS.astype(np.int32),
        ref_logps_RS2=np.where(filled[..., None], ref[index], 0).astype(np.float32),
        weight_RS=np.where(filled, weight[index], 0).astype(np.float32),
    )


def padding_fraction(pair_KRS: np.ndarray, lengths_N2: np.ndarray, row_length: int) -> float:
    """Share of the planned tokens that are padding, in [0, 1].

    >>> padding_fraction(np.array([[[0, -1]]]), np.array([[2, 1]]), row_length=4)
    0.25
    """
    rows = pair_KRS.size // max(pair_KRS.shape[-1], 1)
    if rows == 0:
        return 0.0
    length_N = np.asarray(lengths_N2).sum(axis=1)
    return float(1 - length_N[pair_KRS[pair_KRS >= 0]].sum() / (rows * row_length))
