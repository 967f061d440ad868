"""Evaluation by generating answers, and preference accuracy; both with confidence intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from sage_jax.generate import prompting, sampler
from sage_jax.generate.problem import Problem

Check = Callable[[str, str], bool]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of successes with its 95 % interval."""

    mean: float
    low: float
    high: float
    right: int
    count: int


class GreedyResult(NamedTuple):
    """What `greedy_accuracy` returns."""

    overall: Accuracy
    by_level: dict[int, Accuracy]
    right_P: np.ndarray  # bool, per problem, for paired comparisons of two models
    unfinished: int  # completions cut at max_new_tokens
    completions: list[str]


def wilson(right: int, count: int, z: float = 1.959964) -> Accuracy:
    """A share and its Wilson score interval, which is sane at 0 and 1 and for small counts.

    Args:
        right: successes.
        count: trials; 0 gives the interval [0, 1] and mean nan.
        z: quantile of the normal distribution, 1.96 for 95 %.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    >>> wilson(0, 10).low, round(wilson(0, 10).high, 3)
    (0.0, 0.278)

    Raises:
        ValueError: right outside 0..count.
    """
    if not 0 <= right <= count:
        raise ValueError(f"right={right} of count={count}: right must lie in 0..count.")
    if count == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0, 0)
    share = right / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == count else centre + half
    return Accuracy(share, low, high, right, count)


def greedy_accuracy(
    model: Any,
    params: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    check: Check,
    max_new_tokens: int,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    rows: NamedSharding | None = None,
) -> GreedyResult:
    """Greedy answers to problems, checked; overall and for each level.

    A chat model, one whose tokenizer has a chat template, is asked in a user's turn.

    Args:
        model, params, tokenizer: the model, see `sampler.generate`.
        problems: at least one.
        check: (completion, answer) -> right?, e.g. `task.check` or one of `verify.VERIFIERS`.
        max_new_tokens: the most tokens of an answer.
        batch: problems decoded at a time.
        progress: called as `progress(done, total)`.
        rows: how sequences are split over devices, see `sampler.generate`.

    Raises:
        ValueError: no problems.
    """
    if not problems:
        raise ValueError("There are no problems to evaluate on; give at least one.")
    answers = sampler.generate(
        model,
        params,
        tokenizer,
        prompting.ask(tokenizer, [problem.prompt for problem in problems]),
        max_new_tokens=max_new_tokens,
        batch=batch,
        progress=progress,
        rows=rows,
    )
    first = [completions[0] for completions in answers]
    right_P = np.array(
        [check(c.text, problem.answer) for c, problem in zip(first, problems, strict=True)]
    )
    level_P = np.array([problem.level for problem in problems])
    by_level = {
        int(level): wilson(int(right_P[level_P == level].sum()), int((level_P == level).sum()))
        for level in np.unique(level_P)
    }
    return GreedyResult(
        overall=wilson(int(right_P.sum()), len(right_P)),
        by_level=by_level,
        right_P=right_P,
        unfinished=sum(not completion.finished for completion in first),
        completions=[completion.text for completion in first],
    )


def preference_accuracy(
    logps_N2: jax.Array | np.ndarray,
    ref_logps_N2: jax.Array | np.ndarray | None = None,
) -> Accuracy:
    """Share of pairs whose chosen completion is preferred to the rejected one.

    Args:
        logps_N2: float [N, 2], summed log-probabilities in nats (side 0 = chosen), as in
            `SequenceStats.logps`.
        ref_logps_N2: the reference's; with it the comparison is of log-ratios, that is of implicit
            rewards (`rewards/accuracies`), without it of the policy's own likelihoods.

    Ties count as wrong, so a policy that equals its reference has accuracy 0.

    >>> preference_accuracy(np.array([[-1.0, -2.0], [-3.0, -2.5]])).mean
    0.5
    """
    value_N2 = np.asarray(logps_N2, np.float64)
    if ref_logps_N2 is not None:
        value_N2 = value_N2 - np.asarray(ref_logps_N2, np.float64)
    return wilson(int((value_N2[:, 0] > value_N2[:, 1]).sum()), len(value_N2))
