"""Lengths of pairs that are not there: what `sage-jax compile` plans rows by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sage_jax import config
from sage_jax.data import pack, steps
from sage_jax.models import attention, attention_tpu
from sage_jax.runtime import sharing

STEPS = 4  # whose rows are laid out, to count what attention computes in them
PAIRS = 2**16  # as many as in a usual data set, whose longest pair sets the length of rows
SIGMA = 0.5


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Lengths of the pairs of a data set, with the names of `encode.EncodedPairs`."""

    start_N2: np.ndarray  # int64 [N, 2], tokens of the prompt
    lengths_N2: np.ndarray  # int64 [N, 2], tokens of prompt and answer
    said: str  # how they came about, for the reader of a report

    def __len__(self) -> int:
        return len(self.start_N2)

    @property
    def common_N(self) -> np.ndarray:
        """int64 [N], tokens of the prompt, which both sides have in common."""
        return self.start_N2[:, 0]

    def row_lengths(self, shared: bool) -> np.ndarray:
        """int64 [N], tokens of each pair in a row, with its prompt once if `shared`."""
        return self.lengths_N2.sum(axis=1) - (self.common_N if shared else 0)

    def sequence(self, i: int, side: int) -> tuple[np.ndarray, int]:
        """Tokens of one side of pair i, all 0, and where its answer begins."""
        return np.zeros(self.lengths_N2[i, side], np.int32), int(self.start_N2[i, side])


def pairs(
    max_length: int,
    *,
    length_mean: float | None = None,
    length_sigma: float | None = None,
    prompt_share: float = 0.0,
) -> Pairs:
    """Pairs of stated lengths, always the same for the same arguments.

    Args:
      max_length: most tokens of a sequence, which is a prompt and one answer; longer answers are
        cut, and prompts at half of it.
      length_mean: tokens of a sequence before it is cut; None: each is `max_length` long.
      length_sigma: standard deviation of the logarithm of a prompt's or an answer's length; None:
        `SIGMA`.
      prompt_share: of the tokens of a sequence, in [0, 1).

    Returns:
      Prompts and answers of independent log-normal lengths, at least 1 token each; without a mean,
      one pair of full length.

    Raises:
      ValueError: a value out of its range, or a spread without a mean.

    >>> pairs(100).row_lengths(True).tolist()
    [200]
    >>> found = pairs(4096, length_mean=1000, prompt_share=0.4)
    >>> [round(float(x.mean()), -1) for x in (found.lengths_N2, found.row_lengths(True))]
    [1000.0, 1600.0]
    """
    if not 0 <= prompt_share < 1:
        raise ValueError(
            f"--prompt_share={prompt_share} is not in [0, 1): it is the prompt's share of the "
            f"tokens of a sequence."
        )
    if length_mean is None:
        if length_sigma is not None:
            raise ValueError(
                f"--length_sigma={length_sigma} needs --length_mean, the mean tokens of a "
                f"sequence; without it each has data.max_length={max_length}."
            )
        start = np.full((1, 2), round(prompt_share * max_length))
        said = f"every sequence {max_length} tokens long, the most that data.max_length admits"
        return Pairs(start, np.full((1, 2), max_length), said + _prompts(prompt_share))
    sigma = SIGMA if length_sigma is None else length_sigma
    if not 1 <= length_mean <= max_length or sigma < 0:
        raise ValueError(
            f"--length_mean={length_mean:g}, --length_sigma={sigma:g}: the mean must be between 1 "
            f"and data.max_length={max_length}, and the deviation of its logarithm at least 0."
        )
    rng = np.random.default_rng(0)

    def drawn(mean: float, shape: tuple[int, ...]) -> np.ndarray:
        found = rng.lognormal(np.log(max(mean, 1.0)) - sigma**2 / 2, sigma, shape)
        return np.maximum(found.astype(np.int64), 1)

    prompt_N1 = np.minimum(drawn(length_mean * prompt_share, (PAIRS, 1)), max(max_length // 2, 1))
    prompt_N1 = prompt_N1 if prompt_share else np.zeros_like(prompt_N1)
    answer_N2 = drawn(length_mean * (1 - prompt_share), (PAIRS, 2))
    lengths_N2 = np.minimum(prompt_N1 + answer_N2, max_length)
    said = (
        f"log-normal lengths, mean {length_mean:g} tokens a sequence (sigma {sigma:g}), cut at "
        f"{max_length}"
    )
    start_N2 = np.repeat(prompt_N1, 2, axis=1)
    return Pairs(start_N2, lengths_N2, said + _prompts(prompt_share))


def _prompts(share: float) -> str:
    return f", {100 * share:.3g} % of them the prompt's" if share else ", without prompts"


def shares(run: config.Run, model: Any, found: Pairs) -> bool:
    """Whether a run with such pairs has rows with shared prompts, by data.share_prompts."""
    return sharing.shares_prompts(run, model, found)  # type: ignore[arg-type]


def keys_computed(
    found: Pairs,
    shape: steps.Shape,
    batch_pairs: int,
    *,
    parts: int,
    stretches: int,
    block: int,
    passes: Callable[[attention.Visible], list[tuple[Any, ...]]] = lambda seen: [seen],
) -> float:
    """Keys that attention in blocks computes for a query, on the device with the most of them.

    The rows of the first `STEPS` steps are laid out as a run lays them out, and the blocks counted
    that some query of a block sees; without the windows that some layers have.

    Args:
      found: the pairs.
      shape: of the rows that they lie in.
      batch_pairs: pairs in a step.
      parts: devices that share the rows of a batch.
      stretches: devices that share the tokens of a row.
      block: queries and keys of a block.
      passes: the first and the last key of every query, for each time that the kernels run.

    Returns:
      The mean over the steps and the runs. Queries that fill up blocks count, too.
    """
    length_N = found.row_lengths(shape.share)
    several = STEPS if len(found) > batch_pairs else 1
    order = np.arange(several * batch_pairs) % len(found)
    pair_KB = steps.split(length_N, order, shape.every, batch_pairs)
    most = []
    placed = steps.place(length_N, pair_KB, shape)
    lengths_K = steps.lengths(found, placed, shape)  # type: ignore[arg-type]
    for pair_RS, needed in zip(placed, lengths_K.tolist(), strict=True):
        length = max(shape.row_length, needed)
        one = pack.collate(found, pair_RS, length, share=shape.share)  # type: ignore[arg-type]
        seen = attention.causal(*map(jnp.asarray, (one.segment_RT, one.position_RT)))
        if one.shared is not None:
            first_RT, last_RT = map(jnp.asarray, one.shared[:2])
            seen = attention.Visible(first_RT, last_RT, seen.position_RT, last_RT)
        cut = (shape.rows, stretches, length // stretches)
        fill = ((0, 0), (0, 0), (0, -cut[2] % block))
        runs = passes(seen)
        blocks_CRI = np.zeros(())
        for ranges in runs:
            first, last = (jnp.pad(jnp.reshape(x, cut), fill, mode="edge") for x in ranges[:2])
            blocks_CRI = blocks_CRI + np.stack(
                [
                    attention_tpu.seen_blocks(first[:, c], last[:, c], length, block).sum(axis=2)
                    for c in range(stretches)
                ]
            )
        each = blocks_CRI.reshape(stretches, parts, -1).mean(axis=2) / len(runs)
        most.append(block * each.max())
    return float(np.mean(most))
