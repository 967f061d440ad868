"""Where the tokens of planned pairs lie in their rows, and what each of them sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sage_jax import batch
from sage_jax.data import encode


def apart(encoded: encode.EncodedPairs, pair_RS: np.ndarray, out: batch.PackedBatch) -> None:
    """Fills the tokens of empty rows with sequences that lie in order, each with its own prompt."""
    tokens_RT, position_RT, segment_RT, completion_RT = (np.asarray(leaf) for leaf in out[:4])
    for r, pair_S in enumerate(pair_RS):
        at = 0
        for s in np.flatnonzero(pair_S >= 0).tolist():
            for side in (batch.CHOSEN, batch.REJECTED):
                ids, start = encoded.sequence(int(pair_S[s]), side)
                end = at + len(ids)
                _check_room(r, end, tokens_RT.shape[1])
                tokens_RT[r, at:end] = ids
                position_RT[r, at:end] = np.arange(len(ids))
                segment_RT[r, at:end] = batch.segment_id(s, side)
                completion_RT[r, at + start : end] = True
                at = end


def shared(
    encoded: encode.EncodedPairs, pair_RS: np.ndarray, out: batch.PackedBatch, keys: int = 0
) -> batch.Shared:
    """Fills the tokens of empty rows in which completions share a prompt, see `batch.Shared`.

    Args:
      encoded: the data set.
      pair_RS: int [R, S], indices of pairs, -1 for an empty slot.
      out: empty rows of numpy arrays.
      keys: of a row, in which pairs of one problem that lie side by side share its prompt; 0: each
        pair has a prompt of its own, and a row as many keys as tokens.

    Returns:
      What the tokens see.
    """
    rows, length = out.tokens_RT.shape
    told = unshared(rows, length, pair_RS.shape[1], keys)
    first_RT, last_RT, source_RT, key_RX, sequence_RS2 = map(_array, told)
    for r, pair_S in enumerate(pair_RS):
        tokens_T, position_T, segment_T, completion_T = (np.asarray(x)[r] for x in out[:4])
        row = _Row(
            tokens_T, position_T, segment_T, completion_T, first_RT[r], last_RT[r], source_RT[r],
            None if key_RX is None else key_RX[r],
        )  # fmt: skip
        at, key = 0, 0
        for slots in _problems(encoded, pair_S) if keys else _each(pair_S):
            answers, of_S2 = _answers(encoded, pair_S, slots, once=keys > 0)
            if sequence_RS2 is not None:
                sequence_RS2[r, slots] = of_S2
            common = int(encoded.common_N[pair_S[slots[0]]])
            own = sum(len(answer.ids) - common for answer in answers)
            _check_room(r, at + common + own, length)
            if keys and key + keys_of(common, own, len(answers)) > keys:
                raise ValueError(
                    f"row {r} of the plan needs more than {keys} keys; plan and collate must be "
                    f"given the same shape."
                )
            at, key = _fill(row, answers, common, at, key)
        if keys:  # padding sees the key before it: nothing real sees padding
            first_RT[r, at:] = last_RT[r, at:] = max(key - 1, 0)
    return told


def unshared(rows: int, length: int, slots: int, keys: int = 0) -> batch.Shared:
    """`batch.Shared` of empty rows: each token sees itself, and each sequence lies by itself."""
    itself_RT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    none = batch.Shared(itself_RT, itself_RT.copy(), np.zeros_like(itself_RT))
    if not keys:
        return none
    own_RS2 = np.tile(np.arange(2 * slots, dtype=np.int32).reshape(slots, 2), (rows, 1, 1))
    return none._replace(key_RX=np.zeros((rows, keys), np.int32), sequence_RS2=own_RS2)


def _array(leaf: Any) -> Any:
    return None if leaf is None else np.asarray(leaf)


def keys_of(prompt: Any, own: Any, answers: Any) -> Any:
    """Keys of one problem: of `answers` completions with `own` tokens together.

    >>> keys_of(10, 50, 2), keys_of(10, 50, 3)
    (60, 70)
    """
    return own + (answers + 1) // 2 * prompt


class _Row(NamedTuple):
    """One row's arrays, [T]; the last one, of the keys, [X]."""

    tokens: np.ndarray
    position: np.ndarray
    segment: np.ndarray
    completion: np.ndarray
    first: np.ndarray
    last: np.ndarray
    source: np.ndarray
    key: np.ndarray | None


class _Answer(NamedTuple):
    ids: np.ndarray  # of prompt and completion
    start: int  # of the completion
    segment: int


def _each(pair_S: np.ndarray) -> Iterator[list[int]]:
    """The slots of a row, one by one."""
    return ([s] for s in np.flatnonzero(pair_S >= 0).tolist())


def _problems(encoded: encode.EncodedPairs, pair_S: np.ndarray) -> list[list[int]]:
    """The slots of a row, those together that follow each other and whose pairs share a prompt."""
    slots = np.flatnonzero(pair_S >= 0)
    problem = encoded.problem_N[pair_S[slots]]
    parts = np.split(slots, np.flatnonzero(np.diff(problem)) + 1)
    return [part.tolist() for part in parts if len(part)]


def _answers(
    encoded: encode.EncodedPairs, pair_S: np.ndarray, slots: list[int], *, once: bool
) -> tuple[list[_Answer], list[list[int]]]:
    """The sequences of some pairs, equal ones `once`; and which one each side of a slot is.

    A sequence is numbered like the first slot and side that it belongs to, 2 * slot + side.
    """
    answers, number_of, of_S2 = [], {}, []
    for s in slots:
        i, of_2 = int(pair_S[s]), []
        for side in (batch.CHOSEN, batch.REJECTED):
            segment = batch.segment_id(s, side)
            known = int(encoded.answer_N2[i, side]) if once else segment
            if known not in number_of:
                number_of[known] = segment - 1
                answers.append(_Answer(*encoded.sequence(i, side), segment))
            of_2.append(number_of[known])
        of_S2.append(of_2)
    return answers, of_S2


def _fill(row: _Row, answers: list[_Answer], common: int, at: int, key: int) -> tuple[int, int]:
    """Lays one problem into a row; the token and the key behind it.

    Args:
      row: the arrays to fill.
      answers: sequences with their first `common` tokens in common.
      common: tokens of the prompt.
      at: where the first token goes.
      key: where its key goes.
    """
    prompt = at + len(answers[0].ids) - common  # begins behind the first completion
    _put(row, slice(prompt, prompt + common), answers[0].ids[:common], 0, answers[0].segment)
    for n, answer in enumerate(answers):
        size = len(answer.ids) - common
        if n % 2 == 0:  # reversed, in front of the prompt or of a copy of its keys
            here, of_prompt = slice(at, at + size), slice(key + size, key + size + common)
            _put(row, here, answer.ids[common:], common, answer.segment, backwards=True)
            row.first[here], row.last[here] = np.arange(key, key + size), of_prompt.stop - 1
            before = np.arange(at + 1, at + size + 1)
            if size:
                before[-1] = prompt + common - 1
            _keys(row, key, np.arange(at, at + size))
            _keys(row, of_prompt.start, np.arange(prompt, prompt + common))
            if n == 0:
                at = prompt + common
                row.first[prompt:at] = of_prompt.start
                row.last[prompt:at] = np.arange(of_prompt.start, of_prompt.stop)
            else:
                at += size
        else:  # behind it
            here = slice(at, at + size)
            _put(row, here, answer.ids[common:], common, answer.segment)
            row.first[here], row.last[here] = of_prompt.start, np.arange(key, key + size)
            before = np.arange(at - 1, at + size - 1)
            if size:
                before[0] = prompt + common - 1
            _keys(row, key, np.arange(at, at + size))
            at += size
        row.completion[here] = row.position[here] >= answer.start
        row.source[here] = np.where(row.completion[here], before, 0)
        key = of_prompt.stop if n % 2 == 0 else key + size
    return at, key


def _put(
    row: _Row, here: slice, ids: np.ndarray, position: int, segment: int, *, backwards: bool = False
) -> None:
    step = -1 if backwards else 1
    row.tokens[here] = ids[::step]
    row.position[here] = np.arange(position, position + len(ids))[::step]
    row.segment[here] = segment


def _keys(row: _Row, key: int, tokens: np.ndarray) -> None:
    if row.key is not None:
        row.key[key : key + len(tokens)] = tokens


def _check_room(row: int, end: int, row_length: int) -> None:
    if end > row_length:
        raise ValueError(
            f"row {row} of the plan needs {end} tokens or more, row_length={row_length}; plan and "
            "collate must be given the same row_length, and lengths with or without shared prompts."
        )
