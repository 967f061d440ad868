"""What a completion has to look like in a row with shared prompts, for tests of both layouts."""

import numpy as np


def check_sequence(rows, r, seen, ids, start):
    """The keys that the last token of a sequence sees are its tokens; returns them in order."""
    in_order = seen[np.argsort(rows.position_RT[r, seen])]
    np.testing.assert_array_equal(rows.tokens_RT[r, in_order], ids)
    np.testing.assert_array_equal(rows.position_RT[r, in_order], np.arange(len(ids)))
    np.testing.assert_array_equal(rows.completion_RT[r, in_order], np.arange(len(ids)) >= start)
    np.testing.assert_array_equal(
        rows.shared.source_RT[r, in_order[start:]], in_order[start - 1 : -1]
    )
    return in_order
