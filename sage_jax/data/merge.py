"""New pairs and a data set as one: what joins, what leaves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sage_jax.data import encode


class Merged(NamedTuple):
    """A data set with new pairs behind the old ones, and who is in it."""

    pairs: encode.EncodedPairs
    stays: np.ndarray  # int64, indices of the old pairs that stay
    joins: np.ndarray  # int64, indices of the new pairs that join
    duplicates: int
    too_long: int


def merge(
    old: encode.EncodedPairs,
    new: encode.EncodedPairs,
    *,
    capacity: int,
    replace: str,
    least: int,
) -> Merged:
    """Old and new pairs as one data set; a function of its arguments alone.

    Args:
        old: the data set, oldest pairs first.
        new: the pairs to merge.
        capacity: tokens of the longest pair that fits into a row; longer ones are left out.
        replace: "none": all old pairs stay; "oldest": as many of the oldest leave as new ones
            join; "all": all leave, if a new one joins.
        least: pairs that the data set has to have; so many of the newest old ones stay.

    Returns:
        The merged data set, without exact duplicates among or of the new pairs.
    """
    fits = new.lengths_N2.sum(axis=1) <= capacity
    known = set() if replace == "all" else {d.tobytes() for d in old.digest_N16}
    joins, duplicates = [], 0
    for i in np.flatnonzero(fits):
        digest = new.digest_N16[i].tobytes()
        duplicates += digest in known
        if digest not in known:
            joins.append(i)
            known.add(digest)
    stays, index = np.arange(len(old)), np.array(joins, np.int64)
    if replace == "all":  # a pair that was sampled again counts among the new ones
        stays = np.array([i for i in stays if old.digest_N16[i].tobytes() not in known], np.int64)
    if replace != "none" and joins:
        leaving = len(joins) if replace == "oldest" else len(stays)
        stays = stays[max(0, min(leaving, len(stays) + len(joins) - least)) :]
    merged = encode.concatenate(encode.take(old, stays), encode.take(new, index))
    return Merged(merged, stays, index, duplicates, int((~fits).sum()))
