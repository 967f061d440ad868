"""The pairs of a run: where they come from, parts of them, and what a run cannot train on."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from sage_jax import config
from sage_jax.data import encode
from sage_jax.runtime import hosts, setup


def sources(run: config.Run, source: str) -> list[str] | list[dict[str, Any]]:
    """What `records.read` takes: files, or the worked solutions of a built-in task."""
    if not source:
        raise ValueError("config.data.train is empty. Give a .jsonl, .json or .parquet file.")
    if not source.startswith("task:"):
        return [setup.find(path.strip()) for path in source.split(",") if path.strip()]
    from sage_jax.generate import tasks

    teacher = None
    if run.task.teacher:
        odds = tuple(float(p) for p in run.task.fault_odds.split(","))
        teacher = {"seed": run.seed, "share": run.task.faulty_share, "odds": odds}
    task = tasks.resolve(source.removeprefix("task:"))
    return tasks.supervised(task, count=run.task.count, seed=run.seed, teacher=teacher)


def load_pairs(run: config.Run, tokenizer: Any, source: str) -> encode.EncodedPairs:
    """Reads and encodes a data set; the encoded form is cached by content.

    Raises:
        ValueError: a bad row, a missing file, or no usable row at all.
    """
    found = encode.encode_cached(
        sources(run, source),
        tokenizer,
        max_length=run.data.max_length,
        format=run.data.format,
        on_bad_row=run.data.on_bad_row,
        cache_dir=setup.cache_directory(run.data.cache, "encoded"),
    )
    found = first_pairs(found, run.data.limit) if run.data.limit else found
    hosts.same(f"pairs of {source}", hashlib.blake2b(found.digest_N16.tobytes()).hexdigest())
    return found


def first_pairs(pairs: encode.EncodedPairs, count: int) -> encode.EncodedPairs:
    """The first `count` pairs of an encoded data set."""
    count = min(count, len(pairs))
    given = pairs.ref_logps_N2
    return dataclasses.replace(
        pairs,
        tokens=pairs.tokens[: pairs.offset[2 * count]],
        offset=pairs.offset[: 2 * count + 1],
        start_N2=pairs.start_N2[:count],
        digest_N16=pairs.digest_N16[:count],
        columns={name: column[:count] for name, column in pairs.columns.items()},
        origin=pairs.origin[:count],
        row_N=pairs.row_N[:count],
        ref_logps_N2=None if given is None else given[:count],
    )


def first_tokens(pairs: encode.EncodedPairs, count: int) -> encode.EncodedPairs:
    """The pairs with the first `count` tokens of each completion, for scoring alone.

    Reference log-probs that came with the rows are left out: they are of whole completions.
    """
    lengths_N2 = np.minimum(pairs.lengths_N2, pairs.start_N2 + count)
    begin = np.repeat(pairs.offset[:-1], pairs.lengths_N2.ravel())
    limit = np.repeat(lengths_N2.ravel(), pairs.lengths_N2.ravel())
    short = dataclasses.replace(
        pairs,
        tokens=pairs.tokens[np.arange(len(pairs.tokens)) - begin < limit],
        offset=np.concatenate([[0], np.cumsum(lengths_N2)]).astype(np.int64),
        ref_logps_N2=None,
    )
    return dataclasses.replace(short, digest_N16=encode.digests(short))


def check_pairs(run: config.Run, pairs: encode.EncodedPairs, *, sft: bool) -> None:
    """Refuses data that the run cannot train on, before anything is written.

    Raises:
        ValueError: answers without a rejected side, or fewer pairs than a batch.
    """
    if not sft:
        check_sides(pairs, "data.train", ", or use the mode: sage-jax sft")
    pool = run.curriculum.pool_size or len(pairs)
    if round(min(pool, len(pairs)) * config.kept_share(run)) < run.train.batch_pairs:
        raise ValueError(
            f"config.train.batch_pairs={run.train.batch_pairs} is more than the "
            f"{min(pool, len(pairs)) * config.kept_share(run):.0f} pairs selected from a pool of "
            f"{min(pool, len(pairs))}{left_out(pairs)}. Lower it, or raise selection.keep or "
            f"curriculum.pool_size."
        )


def left_out(pairs: encode.EncodedPairs) -> str:
    """What reading and encoding left out and why, to be appended to a line; "" for nothing."""
    lost = [f"{n} {why}" for why, n in pairs.dropped.items() if n]
    lost += [f"{n} bad rows: {why}" for why, n in pairs.skipped.items() if n]
    return f"; left out: {', '.join(lost)}" if lost else ""


def check_ids(pairs: encode.EncodedPairs, policy: setup.Policy) -> None:
    """Refuses token ids that the model has no embedding for: it would give nan, or another's.

    Raises:
        ValueError: names the first such row and id, and the vocabulary.
    """
    wrong = np.flatnonzero(pairs.tokens >= policy.model.spec.vocab)
    if len(wrong):
        i = int(np.searchsorted(pairs.offset, wrong[0], side="right") - 1) // 2
        raise ValueError(
            f"{pairs.origin[i]}: token id {pairs.tokens[wrong[0]]}, and the model has a vocabulary "
            f"of {policy.model.spec.vocab}. Give pre-tokenised rows the ids of this model, and a "
            f"config.model.tokenizer that belongs to it."
        )


def check_sides(pairs: encode.EncodedPairs, key: str, otherwise: str = "") -> None:
    """Refuses rows without a rejected answer.

    Raises:
        ValueError: names the setting, the number of such rows and the first of them.
    """
    single = np.flatnonzero(pairs.lengths_N2[:, 1] == 0)
    if len(single):
        raise ValueError(
            f"config.{key}: {len(single)} of {len(pairs)} rows have no rejected answer, the first "
            f"is {pairs.origin[single[0]]}. Give preference pairs{otherwise}."
        )
