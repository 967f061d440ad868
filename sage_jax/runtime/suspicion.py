"""Suspected label flips of a run: found in its memory, left out by the guard, written for people.

All of it is a function of the memory and of what is held of earlier estimates; both are in the
checkpoint: a resumed run suspects whom it would have suspected.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

from sage_jax import config, curriculum, noise
from sage_jax.data import encode
from sage_jax.report import writers


def detect(
    memory: curriculum.Memory,
    run: config.Run,
    pairs: encode.EncodedPairs,
    held: noise.Held | None = None,
) -> noise.Flips:
    """What the remembered margins, and estimates made earlier in the run, say about the labels.

    The share of flips is estimated over all pairs: those that a selection has trained or scored
    lately are no fair sample of them. A pair that nothing has seen since the start is not accused;
    nor does it count where drift alone decides, which is that of pairs seen since.
    No estimate is held of pairs that are not all the policy's own answers: where chosen ones come
    from elsewhere, a policy is surely wrong of whole kinds of problems until it has learned them.
    """
    chosen, own = run.selection, config.sampled(pairs.columns)
    nats: np.ndarray | float = 1.0 / chosen.temperature
    if chosen.length_normalised:
        nats = nats * np.maximum((pairs.lengths_N2 - pairs.start_N2).mean(axis=1), 1.0)
    held = held or noise.Held()
    seen_N = memory.last_round >= 0
    evidence_NE = noise.evidence(
        memory.likelihood_margin, memory.reward_margin, memory.margin_error, run.loss.beta, nats
    )
    if held.ignorant:
        evidence_NE = np.where(seen_N[:, None], evidence_NE[:, 1:], np.nan)
    flips = noise.detect(evidence_NE, held if own else noise.Held(ignorance=held.ignorance))
    if not own:
        flips = flips._replace(held=noise.Held(ignorance=held.ignorance))
    return flips._replace(posterior_N=np.where(seen_N, flips.posterior_N, np.nan))


def left_out(
    pool_P: np.ndarray, memory: curriculum.Memory, guard: str, flips: noise.Flips | None
) -> np.ndarray:
    """The pairs of a pool that the guard keeps from training, bool [P].

    >>> left_out(np.array([1, 0]), curriculum.init_memory(2), "auto", None).tolist()
    [False, False]
    """
    if guard == "quantile":
        return noise.lowest(memory.reward_margin[pool_P], pool_P)
    if flips is not None and (guard == "suspects" or (guard == "auto" and flips.many)):
        return flips.suspected_N[pool_P]
    return np.zeros(len(pool_P), bool)


def soft_exponent(run: config.Run, flips: noise.Flips | None) -> float:
    """The exponent of the weights in the steps of a round: `selection.soft`, where it is -1 by what
    is known of the labels.

    Weights by score put what looks most wrong first, which is right of labels that can be trusted
    and the worst of flipped ones. So they wait until something is known, and stop where more than
    few labels look flipped, be that well supported or not, or where the policy cannot judge them.

    >>> soft_exponent(config.Run(), None)
    0.0
    """
    if run.selection.soft != -1:
        return run.selection.soft
    if flips is None or not np.isfinite(flips.log_odds_N).any():
        return 0.0  # nothing is known
    unsure = flips.many or flips.held.ignorant or flips.share >= noise.LEAST_SHARE
    return 0.0 if unsure else config.SOFT


def path(workdir: pathlib.Path) -> pathlib.Path:
    """Where the suspected pairs are listed.

    >>> path(pathlib.Path("runs/a")).as_posix()
    'runs/a/selection/suspects.jsonl'
    """
    return workdir / "selection" / "suspects.jsonl"


def rows(
    flips: noise.Flips,
    memory: curriculum.Memory,
    pairs: encode.EncodedPairs,
    reference_N2: np.ndarray,
) -> list[dict]:
    """One row a suspected pair, the most suspicious first.

    `neighbours_reward_margin` is the mean over the 50 pairs that are nearest in the margin under
    the reference: how far pairs have come that were as hard at the start.
    """
    index = np.flatnonzero(flips.suspected_N)
    index = index[np.lexsort((index, -flips.posterior_N[index]))]
    reward = memory.reward_margin.astype(np.float64)
    others = noise.neighbours_mean(reward, reference_N2[:, 0] - reference_N2[:, 1], index)
    return [
        {
            "pair": int(i),
            "origin": pairs.origin[i],
            "posterior": float(flips.posterior_N[i]),
            "log_odds": float(flips.log_odds_N[i]),
            "reward_margin": float(reward[i]),
            "neighbours_reward_margin": float(other),
            "likelihood_margin": float(memory.likelihood_margin[i]),
            "margin_error": float(memory.margin_error[i]),
            "trained": int(memory.trained[i]),
        }
        for i, other in zip(index, others, strict=True)
    ]


def write(
    workdir: pathlib.Path,
    flips: noise.Flips,
    memory: curriculum.Memory,
    pairs: encode.EncodedPairs,
    reference_N2: np.ndarray,
) -> None:
    """Writes `selection/suspects.jsonl`, whole or not at all."""
    found = (writers.plain(row) for row in rows(flips, memory, pairs, reference_N2))
    if writers.first_process():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        writers.write_text(path(workdir), "".join(lines))
