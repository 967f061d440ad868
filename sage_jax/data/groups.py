"""Pairs of one problem in one row, where its prompt and each of its completions is computed once.

Which pairs follow each other in a row says it all: those of one problem lie together, see
`layout.shared`. So a plan with groups has the form of any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sage_jax.data import encode, layout, pack


class Work(NamedTuple):
    """What rows hold: float64 of the shape of `pair` without its last axis."""

    tokens: np.ndarray  # that go through the layers
    attended: np.ndarray  # query-key pairs
    head: np.ndarray  # tokens that go through the head
    keys: np.ndarray  # with copies of those of shared prompts


def work(encoded: encode.EncodedPairs, pair: np.ndarray, *, grouped: bool) -> Work:
    """What the rows of a plan compute, where prompts are shared.

    Args:
      encoded: the data set.
      pair: int [..., S], indices of pairs, -1 for an empty slot.
      grouped: pairs of one problem that follow each other in a row share its prompt and their
        completions; else each pair has its own.

    Returns:
      float64 [...] counts for each row.
    """
    pair_MS = np.asarray(pair).reshape(-1, pair.shape[-1])
    row_P, _ = np.nonzero(pair_MS >= 0)
    pair_P = pair_MS[pair_MS >= 0]
    new_P = np.ones(len(pair_P), bool)
    answer_P2 = np.arange(2 * len(pair_P)).reshape(-1, 2)
    if grouped:
        problem_P = encoded.problem_N[pair_P]
        new_P[1:] = (np.diff(problem_P) != 0) | (np.diff(row_P) != 0)
        answer_P2 = encoded.answer_N2[pair_P]
    group_P = np.cumsum(new_P) - 1
    # Each completion of a group once.
    once = np.unique(
        np.stack([np.repeat(group_P, 2), answer_P2.ravel()]), axis=1, return_index=True
    )[1]
    start_P2, all_P2 = encoded.start_N2[pair_P], encoded.lengths_N2[pair_P]
    prompt_P = encoded.common_N[pair_P].astype(np.float64)
    own_Q = (all_P2 - prompt_P[:, None]).ravel()[once]
    prompt_Q, row_Q = np.repeat(prompt_P, 2)[once], np.repeat(row_P, 2)[once]
    copies_P = (np.bincount(np.repeat(group_P, 2)[once])[group_P] + 1) // 2

    def over_rows(of_prompts: np.ndarray, of_answers: np.ndarray) -> np.ndarray:
        size = len(pair_MS)
        found = np.bincount(row_P[new_P], of_prompts[new_P], minlength=size)
        return (found + np.bincount(row_Q, of_answers, minlength=size)).reshape(pair.shape[:-1])

    return Work(
        over_rows(prompt_P, own_Q),
        over_rows(prompt_P * (prompt_P + 1) / 2, own_Q * prompt_Q + own_Q * (own_Q + 1) / 2),
        over_rows(np.zeros(len(pair_P)), (all_P2 - start_P2).ravel()[once].astype(np.float64)),
        over_rows(copies_P * prompt_P, own_Q),
    )


class Item(NamedTuple):
    """Pairs of one problem that go into one row together."""

    pairs: list[int]
    tokens: int
    keys: int


def items(
    encoded: encode.EncodedPairs,
    order: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    slots: int,
    keys: float,
) -> list[Item]:
    """Pairs by their problems; a problem that is too much for a row comes in several parts.

    Args:
      encoded: the data set.
      order: indices of pairs, int [P], all different.
      row_length: the most tokens of an item.
      slots: the most pairs of an item.
      keys: the most keys of an item for each of its tokens, at least 1.

    Returns:
      The items, in the order of each one's first pair.
    """
    order_P = np.asarray(order, np.int64)
    by_problem: dict[int, list[int]] = {}
    for i, problem in zip(order_P.tolist(), encoded.problem_N[order_P].tolist(), strict=True):
        by_problem.setdefault(problem, []).append(i)
    return [
        item
        for pairs in by_problem.values()
        for item in _parts(encoded, pairs, row_length, slots, keys)
    ]


def _parts(
    encoded: encode.EncodedPairs, pairs: list[int], row_length: int, slots: int, keys: float
) -> list[Item]:
    """The items of one problem's pairs."""
    prompt = int(encoded.common_N[pairs[0]])
    found: list[Item] = []
    part: list[int] = []
    own: dict[int, int] = {}  # the part's completions and their tokens

    def item(part: list[int], own: dict[int, int]) -> Item:
        total = sum(own.values())
        return Item(part, prompt + total, layout.keys_of(prompt, total, len(own)))

    # Those with the same chosen answer side by side, so that they are parted last.
    for i in sorted(pairs, key=lambda i: encoded.answer_N2[i].tolist()):
        sizes = (encoded.offset[2 * i + 1 : 2 * i + 3] - encoded.offset[2 * i : 2 * i + 2]) - prompt
        new = dict(zip(encoded.answer_N2[i].tolist(), sizes.tolist(), strict=True))
        more = item([*part, i], own | new)
        if part and (
            len(part) == slots or more.tokens > row_length or more.keys > keys * more.tokens
        ):
            found.append(item(part, own))
            part, own = [], {}
        part, own = [*part, i], own | new
    return [*found, item(part, own)]


def plan(
    encoded: encode.EncodedPairs,
    order: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    keys: float,
) -> np.ndarray:
    """As `pack.plan` without `batch_pairs`, with the pairs of a problem together.

    Args:
      encoded: the data set.
      order: indices of the pairs to place, int [P].
      row_length: tokens in a row.
      rows: rows in a batch (R).
      slots: most pairs in a row (S).
      keys: keys that a row has room for, for each of its tokens.

    Returns:
      int32 [K, R, S]: indices of pairs, -1 for an empty slot.
    """
    found = items(encoded, order, row_length=row_length, slots=slots, keys=keys)
    return _expanded(found, _placed(found, row_length, rows, slots, None), slots)


def together(
    encoded: encode.EncodedPairs,
    pairs: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    keys: float,
) -> np.ndarray | None:
    """The pairs of one batch with those of a problem together, int32 [R, S]; None: no room.

    Args are those of `plan`.
    """
    found = items(encoded, pairs, row_length=row_length, slots=slots, keys=keys)
    placed = _placed(found, row_length, rows, slots, len(found))[:1]
    if (placed >= 0).sum() < len(found):
        return None
    return _expanded(found, placed, slots)[0]


def _placed(
    found: list[Item], row_length: int, rows: int, slots: int, batch_items: int | None
) -> np.ndarray:
    # An item takes at least the room of as many pairs as it has: then rows that are not too long
    # have no more pairs than slots.
    count = np.array([len(item.pairs) for item in found], np.int64)
    tokens = np.array([item.tokens for item in found], np.int64)
    length = np.maximum(tokens, -(-count * row_length // slots))
    return pack.plan(
        length, range(len(found)), row_length=row_length, rows=rows, slots=slots,
        batch_pairs=batch_items,
    )  # fmt: skip


def _expanded(found: list[Item], item_KRS: np.ndarray, slots: int) -> np.ndarray:
    """The pairs in the place of the items."""
    pair_KRS = np.full((*item_KRS.shape[:2], slots), -1, np.int32)
    for k, r in np.argwhere((item_KRS >= 0).any(axis=2)).tolist():
        pairs = [i for n in item_KRS[k, r] if n >= 0 for i in found[n].pairs]
        pair_KRS[k, r, : len(pairs)] = pairs
    return pair_KRS
