"""From records to the flat arrays of token ids that everything after reads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sage_jax.data import cache, texts
from sage_jax.data import records as records_lib

CHUNK = 2048  # rows whose texts are in memory at once
ON_LONG = ("cut", "drop")
VERSION = 1  # of the rules below: raise it when the same rows would give other ids
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of N pairs, one after the other in flat arrays.

    Sequence q = 2 * i + side is `tokens[offset[q] : offset[q + 1]]`, prompt and completion; the
    rejected side of a supervised example is empty.

    Attributes:
      tokens: int32 [total].
      offset: int64 [2N + 1].
      start_N2: int32 [N, 2], index inside the sequence of its first completion token, at least 1
        (0 for an empty side).
      digest_N16: uint8 [N, 16], hash of the pair's ids and starts: its identity, wherever it
        stands and whatever file it comes from.
      columns: numbers the rows carried, float64 [N], nan where a row had none.
      origin: "file:line" of each pair.
      row_N: int64 [N], index of each pair in the records it was encoded from.
      ref_logps_N2: float32 [N, 2] log-probabilities in nats that came with pre-tokenised rows, nan
        where a row had none or was cut; None if no row had any.
      dropped: pairs left out, by reason.
      cut: sequences shortened to the maximum length, by side.
      merges: pairs whose prompt, tokenised alone, is no prefix of the whole.
      skipped, ignored_columns: what reading the records left out.
    """

    tokens: np.ndarray
    offset: np.ndarray
    start_N2: np.ndarray
    digest_N16: np.ndarray
    columns: dict[str, np.ndarray]
    origin: list[str]
    row_N: np.ndarray
    ref_logps_N2: np.ndarray | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    merges: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    ignored_columns: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.start_N2)

    @property
    def lengths_N2(self) -> np.ndarray:
        """int64 [N, 2], tokens of each sequence, prompt included."""
        return np.diff(self.offset).reshape(-1, 2)

    @functools.cached_property
    def common_N(self) -> np.ndarray:
        """int64 [N], leading prompt tokens that both sides of a pair have in common."""
        begin_N2 = self.offset[:-1].reshape(-1, 2)
        most_N = self.start_N2.min(axis=1).astype(np.int64)
        pair = np.repeat(np.arange(len(self)), most_N)
        ends = np.cumsum(most_N)
        at = np.arange(len(pair)) - np.repeat(ends - most_N, most_N)
        differ = self.tokens[begin_N2[pair, 0] + at] != self.tokens[begin_N2[pair, 1] + at]
        common_N = most_N.copy()
        np.minimum.at(common_N, pair[differ], at[differ])
        return common_N

    @functools.cached_property
    def problem_N(self) -> np.ndarray:
        """int64 [N], the same number for pairs whose prompts are the same tokens.

        A pair whose two sides have different prompts has a number of its own.
        """
        number_of: dict[bytes, int] = {}
        problem_N = np.arange(len(self))
        whole_N = (self.start_N2 == self.common_N[:, None]).all(axis=1)
        for i in np.flatnonzero(whole_N).tolist():
            begin = self.offset[2 * i]
            prompt = self.tokens[begin : begin + self.common_N[i]].tobytes()
            problem_N[i] = number_of.setdefault(prompt, i)
        return problem_N

    @functools.cached_property
    def answer_N2(self) -> np.ndarray:
        """int64 [N, 2], the same number for the same completions of one problem.

        A problem with a single pair has two answers, even if they are equal.
        """
        number_of: dict[tuple[int, bytes], int] = {}
        answer_N2 = np.arange(2 * len(self)).reshape(-1, 2)
        several_N = np.bincount(self.problem_N, minlength=len(self))[self.problem_N] > 1
        for i in np.flatnonzero(several_N).tolist():
            for side in (0, 1):
                known = (int(self.problem_N[i]), self.sequence(i, side)[0].tobytes())
                answer_N2[i, side] = number_of.setdefault(known, 2 * i + side)
        return answer_N2

    def row_lengths(self, shared: bool) -> np.ndarray:
        """int64 [N], tokens of each pair in a row, with its prompt once if `shared`."""
        both_N = self.lengths_N2.sum(axis=1)
        return both_N - self.common_N if shared else both_N

    def sequence(self, i: int, side: int) -> tuple[np.ndarray, int]:
        """Token ids (int32) of one side of pair i, and where its completion begins."""
        q = 2 * i + side
        return self.tokens[self.offset[q] : self.offset[q + 1]], int(self.start_N2[i, side])


def encode(
    records: records_lib.Records,
    tokenizer: Any,
    *,
    max_length: int,
    append_eos: bool = True,
    on_long: str = "cut",
) -> EncodedPairs:
    """Tokenises records.

    Standard rows are tokenised as prompt + completion with the tokenizer's special tokens, and end
    with EOS (appended where missing). Conversational rows are rendered by the chat template, which
    places all special tokens itself. A prompt of no tokens becomes BOS, or EOS where there is no
    BOS, since the first token of a completion needs something to be predicted from. Pre-tokenised
    rows are taken as they are.

    A pair whose prompt alone reaches `max_length` is dropped. Otherwise a longer side is cut at its
    end, by itself, which leaves at least one completion token; `on_long="drop"` drops the pair
    instead. Both are counted.

    Args:
      records: what `records.read` returned.
      tokenizer: a transformers tokenizer, with a chat template for conversational rows; may be
        None if all rows are pre-tokenised.
      max_length: most tokens of prompt and completion together.
      append_eos: whether standard completions end with EOS.
      on_long: "cut" or "drop".

    Returns:
      The encoded pairs, in the order of the records.

    Raises:
      ValueError: if a row cannot be rendered, an option is out of range, or no pair is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no completion; give at least 2 tokens.")
    if on_long not in ON_LONG:
        raise ValueError(f"on_long={on_long!r} is unknown; expected 'cut' or 'drop'.")
    rows = records.rows
    if tokenizer is None and any(row.ids is None for row in rows):
        raise ValueError("Rows of text need a tokenizer; give one, or pre-tokenised rows.")
    builder = _Builder(max_length, drop_long=on_long == "drop")
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        for i, sides in enumerate(texts.sides(chunk, tokenizer, append_eos), first):
            builder.add(i, rows[i], sides)
    if builder.lost_at is not None:
        i, lost = builder.lost_at
        log.warning(
            "The prompt is not a prefix of prompt + completion in tokens in %d of %d pairs, first "
            "at %s, where %r is lost at its end: the chat template renders it differently, or "
            "tokens merge across the boundary. Completions start where the two diverge.",
            builder.merges,
            len(rows),
            rows[i].origin,
            tokenizer.decode(lost),
        )
    return builder.build(records, max_length)


class _Builder:
    """Collects encoded rows into flat arrays, cutting and dropping by the length rules."""

    def __init__(self, max_length: int, *, drop_long: bool):
        self.max_length, self.drop_long = max_length, drop_long
        self.parts: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.starts: list[tuple[int, int]] = []
        self.digests: list[bytes] = []
        self.kept: list[int] = []
        self.whole: list[bool] = []  # neither side was cut
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.merges = 0
        self.lost_at: tuple[int, Sequence[int]] | None = None

    def add(self, i: int, row: records_lib.Record, sides: texts.Sides) -> None:
        if sides.lost:
            self.merges += 1
            self.lost_at = self.lost_at or (i, sides.lost)
        sequences = [sides.chosen] if sides.rejected is None else [sides.chosen, sides.rejected]
        reason = self._why_dropped(sequences, sides.start)
        if reason:
            self.dropped[reason] += 1
            return
        long = [len(ids) > self.max_length for ids in sequences]
        self.cut.update(
            side for side, cut in zip(("chosen", "rejected"), long, strict=False) if cut
        )
        arrays = [np.asarray(ids[: self.max_length], np.int32) for ids in sequences]
        starts = (sides.start, sides.start if len(arrays) == 2 else 0)
        arrays += [np.zeros(0, np.int32)] * (2 - len(arrays))
        self.digests.append(_digest(arrays[0], arrays[1], starts))
        self.parts += arrays
        self.lengths += [len(arrays[0]), len(arrays[1])]
        self.starts.append(starts)
        self.kept.append(i)
        self.whole.append(not any(long))

    def _why_dropped(self, sequences: Sequence[Sequence[int]], start: int) -> str | None:
        if start >= self.max_length:
            return "prompt reaches max_length"
        if any(len(ids) <= start for ids in sequences):
            return "empty completion"
        if self.drop_long and any(len(ids) > self.max_length for ids in sequences):
            return "longer than max_length"
        return None

    def build(self, records: records_lib.Records, max_length: int) -> EncodedPairs:
        if not self.kept:
            raise ValueError(
                f"max_length={max_length} leaves none of {len(records)} pairs "
                f"({dict(self.dropped)}); raise it."
            )
        rows = [records.rows[i] for i in self.kept]
        names = sorted({name for row in rows for name in row.columns})
        columns = {
            name: np.array([row.columns.get(name, np.nan) for row in rows], np.float64)
            for name in names
        }
        return EncodedPairs(
            tokens=np.concatenate(self.parts),
            offset=np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64),
            start_N2=np.array(self.starts, np.int32),
            digest_N16=np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, 16).copy(),
            columns=columns,
            origin=[row.origin for row in rows],
            row_N=np.array(self.kept, np.int64),
            ref_logps_N2=_ref_logps(rows, self.whole),
            dropped=dict(self.dropped),
            cut=dict(self.cut),
            merges=self.merges,
            skipped=dict(records.skipped),
            ignored_columns=dict(records.ignored_columns),
        )


def _digest(chosen: np.ndarray, rejected: np.ndarray, starts: Sequence[int]) -> bytes:
    head = np.array([len(chosen), len(rejected), *starts], np.int32)
    content = head.tobytes() + chosen.tobytes() + rejected.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def digests(pairs: EncodedPairs) -> np.ndarray:
    """The digests of pairs whose ids or starts were changed, uint8 [N, 16]."""
    found = [
        _digest(pairs.sequence(i, 0)[0], pairs.sequence(i, 1)[0], pairs.start_N2[i])
        for i in range(len(pairs))
    ]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16).copy()


def _ref_logps(rows: Sequence[records_lib.Record], whole: Sequence[bool]) -> np.ndarray | None:
    """Log-probabilities that came with the rows; those of a cut row belong to other tokens."""
    given = np.full((len(rows), 2), np.nan, np.float32)
    for i, (row, uncut) in enumerate(zip(rows, whole, strict=True)):
        if row.ids is not None and row.ids.ref_logps is not None and uncut:
            given[i] = row.ids.ref_logps
    return None if np.isnan(given).all() else given


def encode_cached(
    source: records_lib.Source | records_lib.Records,
    tokenizer: Any,
    *,
    cache_dir: str | Path,
    max_length: int,
    append_eos: bool = True,
    on_long: str = "cut",
    format: str = "auto",
    on_bad_row: str = "error",
) -> EncodedPairs:
    """`encode` of what `records.read` gives for a source, made once and kept on disk.

    The entry is found by content: the bytes of the source, the tokenizer with its chat template,
    and the options. On a hit the source is not even parsed.

    Args:
      source: what `records.read` takes, or the records it returned (then `format` and
        `on_bad_row` are those it was read with, and are ignored here).
      cache_dir: directory of the cache.
      tokenizer, max_length, append_eos, on_long: as in `encode`.
      format, on_bad_row: as in `records.read`.

    Returns:
      The encoded pairs, the same whether they come from the cache or not.

    Raises:
      ValueError: as `encode` and `records.read` do.
    """
    options = {"max_length": max_length, "append_eos": append_eos, "on_long": on_long}
    reading = {"format": format, "on_bad_row": on_bad_row}
    if isinstance(source, records_lib.Records):
        content = source.fingerprint
    else:
        content = records_lib.fingerprint(source, **reading)
    name = cache.key(
        version=VERSION,
        source=content,
        tokenizer=tokenizer_fingerprint(tokenizer),
        **options,
    )
    found = cache.fetch(cache_dir, name)
    if found is not None:
        return _from_cache(*found)
    rows = source
    if not isinstance(rows, records_lib.Records):
        rows = records_lib.read(rows, **reading)
    encoded = encode(rows, tokenizer, max_length=max_length, append_eos=append_eos, on_long=on_long)
    cache.store(cache_dir, name, *_to_cache(encoded))
    return encoded


def take(pairs: EncodedPairs, index: Sequence[int] | np.ndarray) -> EncodedPairs:
    """Some pairs of a data set, in the order of `index`; its counts stay those of the whole.

    >>> rows = [{"prompt_ids": [i], "chosen_ids": [2], "rejected_ids": [3]} for i in (7, 8, 9)]
    >>> pairs = encode(records_lib.read(rows), None, max_length=4)
    >>> take(pairs, [2, 0]).tokens.tolist()
    [9, 2, 9, 3, 7, 2, 7, 3]
    """
    index_M = np.asarray(index, np.int64)
    length_Q = pairs.lengths_N2[index_M].reshape(-1)
    offset = np.concatenate([[0], np.cumsum(length_Q)]).astype(np.int64)
    first_Q = (2 * index_M[:, None] + np.arange(2)).reshape(-1)
    # Where each token comes from: the start of its sequence, and its place inside.
    place = np.repeat(pairs.offset[first_Q] - offset[:-1], length_Q) + np.arange(offset[-1])
    given = pairs.ref_logps_N2
    return dataclasses.replace(
        pairs,
        tokens=pairs.tokens[place],
        offset=offset,
        start_N2=pairs.start_N2[index_M],
        digest_N16=pairs.digest_N16[index_M],
        columns={name: column[index_M] for name, column in pairs.columns.items()},
        origin=[pairs.origin[i] for i in index_M],
        row_N=pairs.row_N[index_M],
        ref_logps_N2=None if given is None else given[index_M],
    )


def concatenate(first: EncodedPairs, second: EncodedPairs) -> EncodedPairs:
    """The pairs of two data sets as one, those of `first` in front; counts add up.

    A column that only one of them has is nan for the pairs of the other. `row_N` and `origin` go on
    naming the records that each pair was encoded from.

    >>> rows = [{"prompt_ids": [i], "chosen_ids": [2], "rejected_ids": [3]} for i in (7, 8)]
    >>> one, other = (encode(records_lib.read([row]), None, max_length=4) for row in rows)
    >>> concatenate(one, other).offset.tolist()
    [0, 2, 4, 6, 8]
    """

    def joined(a: np.ndarray | None, b: np.ndarray | None, *shape: int) -> np.ndarray:
        a = np.full((len(first), *shape), np.nan) if a is None else a
        b = np.full((len(second), *shape), np.nan) if b is None else b
        return np.concatenate([a, b])

    def added(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *(k for k in b if k not in a)]}

    given = None
    if first.ref_logps_N2 is not None or second.ref_logps_N2 is not None:
        given = joined(first.ref_logps_N2, second.ref_logps_N2, 2).astype(np.float32)
    return EncodedPairs(
        tokens=np.concatenate([first.tokens, second.tokens]),
        offset=np.concatenate([first.offset, first.offset[-1] + second.offset[1:]]),
        start_N2=np.concatenate([first.start_N2, second.start_N2]),
        digest_N16=np.concatenate([first.digest_N16, second.digest_N16]),
        columns={
            name: joined(first.columns.get(name), second.columns.get(name))
            for name in sorted({*first.columns, *second.columns})
        },
        origin=[*first.origin, *second.origin],
        row_N=np.concatenate([first.row_N, second.row_N]),
        ref_logps_N2=given,
        dropped=added(first.dropped, second.dropped),
        cut=added(first.cut, second.cut),
        merges=first.merges + second.merges,
        skipped=added(first.skipped, second.skipped),
        ignored_columns=added(first.ignored_columns, second.ignored_columns),
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides how a tokenizer turns text and chats into ids; "" for None."""
    if tokenizer is None:
        return ""
    import transformers

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # left over from earlier calls, without effect
    return cache.key(
        backend=backend,
        template=tokenizer.chat_template,
        special={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        transformers=transformers.__version__,
    )


ARRAY_FIELDS = ("tokens", "offset", "start_N2", "digest_N16", "row_N", "ref_logps_N2")


def _to_cache(encoded: EncodedPairs) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    values = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)}
    arrays = {f"columns/{name}": column for name, column in values.pop("columns").items()}
    for name in ARRAY_FIELDS:
        array = values.pop(name)
        arrays.update({} if array is None else {name: array})
    return arrays, values


def _from_cache(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> EncodedPairs:
    columns = {
        name.removeprefix("columns/"): array
        for name, array in sorted(arrays.items())
        if name.startswith("columns/")
    }
    fields: dict[str, Any] = {name: arrays.get(name) for name in ARRAY_FIELDS}
    return EncodedPairs(columns=columns, **fields, **meta)
