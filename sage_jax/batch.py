"""What one step sees: rows of packed preference pairs, as arrays.

Array names end in their axes. The letters mean the same everywhere in the package:

    N  pairs in the data set          B  pairs or sequences, unpacked
    P  pairs in a round's pool        D  width of the model
    R  rows of a batch                V  size of the vocabulary
    T  tokens in a row                K  strata, or a count named where it is used
    S  pair slots in a row            2  sides of a pair: 0 chosen, 1 rejected

Both sides of a pair lie in one row, so a sequence's log-probability is a sum inside that row and
never crosses a device boundary. A padded batch is the case S = 1; a supervised example is a pair
whose rejected side has no tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray

CHOSEN, REJECTED = 0, 1


class Shared(NamedTuple):
    """Of rows in which completions share one prompt; int32.

    A pair lies there as [chosen reversed | prompt | rejected]. So what a token sees is one range: a
    chosen token sees from itself to the prompt's end, the others from the prompt's start to
    themselves. The prompt carries the segment of the first completion.

    Several pairs of one problem lie as [c0 reversed | prompt | c1 | c2 reversed | c3 | ...], each
    completion c once, however many of these pairs it is in. To keep what a token sees one range,
    the keys of the prompt are copied between further completions: [c0 reversed | prompt | c1] [c2
    reversed | copy | c3] ... So nothing but keys and values is there twice, and a kernel that takes
    ranges of keys takes these.
    """

    first_RT: Array  # [R, T], index of the first key that a token sees
    last_RT: Array  # [R, T], of the last one
    source_RT: Array  # [R, T], the token whose hidden state predicts it; 0 where it does not count
    # [R, X], the token whose key it is; None: the keys of a row are those of its tokens, in order.
    key_RX: Array | None = None
    # [R, S, 2], the slot and side under which the completion of a pair lies in the row, as
    # 2 * slot + side; None: each under its own.
    sequence_RS2: Array | None = None


class PackedBatch(NamedTuple):
    """Rows of packed pairs; every leaf has the row axis first, so one sharding rule serves all."""

    tokens_RT: Array  # int32, token ids; 0 where there is padding
    position_RT: Array  # int32, position inside the sequence, restarts at 0 for each
    segment_RT: Array  # int32, 0 = padding, 1 + 2 * slot + side otherwise
    completion_RT: Array  # bool, true at tokens whose log-probability counts
    pair_RS: Array  # int32, index of the pair in the data set, -1 = empty slot
    ref_logps_RS2: Array  # float32, reference log-probabilities in nats, summed over tokens
    weight_RS: Array  # float32, weight of the pair in the loss, 0 for empty slots
    shared: Shared | None = None  # None: each sequence has its own prompt and lies in order


def segment_id(slot: int, side: int) -> int:
    """The id that marks the tokens of one side of the pair in a slot of its row.

    >>> [segment_id(slot, side) for slot in range(2) for side in (CHOSEN, REJECTED)]
    [1, 2, 3, 4]
    """
    return 1 + 2 * slot + side


def empty(rows: int, length: int, slots: int) -> PackedBatch:
    """A batch of `rows` empty rows of `length` tokens and `slots` pair slots, as numpy arrays.

    Empty rows fill up the last batch of a pass: they carry weight 0 and pair -1, and add exactly 0
    to every sum.

    >>> empty(2, 8, 1).pair_RS.tolist()
    [[-1], [-1]]
    """
    return PackedBatch(
        tokens_RT=np.zeros((rows, length), np.int32),
        position_RT=np.zeros((rows, length), np.int32),
        segment_RT=np.zeros((rows, length), np.int32),
        completion_RT=np.zeros((rows, length), bool),
        pair_RS=np.full((rows, slots), -1, np.int32),
        ref_logps_RS2=np.zeros((rows, slots, 2), np.float32),
        weight_RS=np.zeros((rows, slots), np.float32),
    )
