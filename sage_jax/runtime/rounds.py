"""What happens between two rounds, on the host: draw a pool, score it, select, plan the rows.

All of it is numpy and a function of its arguments. The plan that comes out is kept in the
checkpoint, so that a resumed run trains the same pairs without scoring anything again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from sage_jax import config, curriculum, losses, scores, selection
from sage_jax.data import encode, pack

# Columns that "auto" takes for the difficulty, and the sign that makes larger mean harder.
DIFFICULTY_COLUMNS = (("difficulty", 1.0), ("level", 1.0), ("pass_rate", -1.0))


class Round(NamedTuple):
    """One round, ready to train. Everything a checkpoint needs of it is an array."""

    number: int
    pool_P: np.ndarray  # int64, the pairs that were drawn
    pair_KRS: np.ndarray  # int32, the rows of each of the K steps, -1 = empty slot
    competence_K: np.ndarray  # float64, running competence per stratum, after this round's draw


class Drawn(NamedTuple):
    """What the selection saw and did, for the log of the round."""

    stratum_P: np.ndarray
    pairs: scores.PairScores | None
    selection: selection.Selection
    share_K: np.ndarray
    population_K: np.ndarray


def difficulty(
    pairs: encode.EncodedPairs, memory: curriculum.Memory | None, source: str
) -> np.ndarray:
    """Difficulty of every pair, larger = harder.

    Args:
        pairs: the data set.
        memory: remembered margins, which start as the reference's; not needed for a data column.
        source: a data column, "margin", or "auto" for the first known column that is complete.

    Returns:
        float64 [N].

    Raises:
        ValueError: the data has no such column, or it has gaps.
    """
    if source == "auto":
        for name, sign in DIFFICULTY_COLUMNS:
            if name in pairs.columns and np.isfinite(pairs.columns[name]).all():
                return sign * pairs.columns[name]
        source = "margin"
    if source == "margin":
        assert memory is not None
        return -np.nan_to_num(memory.likelihood_margin.astype(np.float64))
    if source not in pairs.columns:
        raise ValueError(
            f"config.curriculum.difficulty={source!r} is no numeric column of the data, which has "
            f"{', '.join(sorted(pairs.columns)) or 'none'}. Use one of them, 'margin' or 'auto'."
        )
    missing = int((~np.isfinite(pairs.columns[source])).sum())
    if missing:
        raise ValueError(
            f"config.curriculum.difficulty={source!r}: {missing} of {len(pairs)} pairs have no "
            f"value in that column. Fill it, or use 'margin'."
        )
    return dict(DIFFICULTY_COLUMNS).get(source, 1.0) * pairs.columns[source]


def remembered_scores(
    memory: curriculum.Memory, index_P: np.ndarray, loss: losses.Loss, run: config.Run
) -> scores.PairScores:
    """Scores from the last known margins: no forward pass at all."""
    chosen = run.selection
    reward, likelihood = memory.reward_margin[index_P], memory.likelihood_margin[index_P]
    error = memory.margin_error[index_P]
    if chosen.stability == "rounds":
        error = scores.round_variance_error(
            memory.mean[index_P], memory.m2[index_P], memory.visits[index_P]
        )
    rescore = scores.make_rescore_fn(
        loss,
        margin=chosen.margin,
        kappa=chosen.kappa,
        damping=chosen.damping,
        temperature=chosen.temperature,
    )
    return jax.device_get(rescore(reward, likelihood, error))


def next_round(
    number: int,
    memory: curriculum.Memory,
    competence_K: np.ndarray | None,
    *,
    run: config.Run,
    pairs: encode.EncodedPairs,
    shape: pack.RowShape,
    score_pool: Callable[[np.ndarray], scores.PairScores] | None,
) -> tuple[Round, Drawn]:
    """Draws, scores and selects a round and plans its rows.

    Args:
        number: of the round, from 0.
        memory: what is known of every pair.
        competence_K: running competence per stratum; None before the first round.
        run: the settings.
        pairs: the data set.
        shape: static shape of the rows.
        score_pool: scores of drawn pairs, `index_P -> PairScores`; None: nothing is scored.

    Returns:
        The round, and what the selection saw.
    """
    settings = run.curriculum
    hard_N = difficulty(pairs, memory, settings.difficulty)
    stratum_N = curriculum.stratify(hard_N, settings.strata)
    strata = int(stratum_N.max()) + 1
    now_K = curriculum.competence(memory, stratum_N, strata)
    if competence_K is None or len(competence_K) != strata:
        competence_K = now_K
    competence_K = curriculum.running_competence(competence_K, now_K, settings.decay)
    population_K = np.bincount(stratum_N, minlength=strata) / len(stratum_N)
    share_K = curriculum.mixture(
        competence_K, population_K, floor=settings.floor, sharpness=settings.sharpness
    )
    size = settings.pool_size or len(pairs)
    pool_P = curriculum.draw(memory.drawn, stratum_N, share_K, size, seed=run.seed, round=number)
    scored = score_pool(pool_P) if score_pool else None
    rng = np.random.default_rng(np.random.SeedSequence([run.seed, number, 1]))
    chosen = _select(pool_P, stratum_N[pool_P], scored, memory, run, rng)
    order_K = rng.permutation(pool_P[chosen.selected_P])
    pair_KRS = pack.plan(
        pairs.lengths_N2,
        order_K,
        row_length=shape.row_length,
        rows=shape.rows,
        slots=shape.slots,
        batch_pairs=run.train.batch_pairs,
    )
    if not len(pair_KRS):
        raise ValueError(
            f"{len(order_K)} pairs were selected from {len(pool_P)}, fewer than one batch of "
            f"config.train.batch_pairs={run.train.batch_pairs}. Lower it, or raise selection.keep."
        )
    drawn = Drawn(stratum_N[pool_P], scored, chosen, share_K, population_K)
    return Round(number, pool_P, pair_KRS, competence_K), drawn


def _select(pool_P, stratum_P, scored, memory, run, rng) -> selection.Selection:
    chosen = run.selection
    if chosen.name == "uniform":
        everything = np.ones(len(pool_P), bool)
        return selection.Selection(everything, np.full(len(pool_P), "all", "<U10"))
    selector = selection.resolve(chosen.name)
    # The guard needs reward margins that have moved: at the start they are all 0.
    begun = bool((memory.trained[pool_P] > 0).any())
    return selection.select_pool(
        selector(scored if scored is not None else _blank(len(pool_P)), rng),
        stratum_P,
        pool_P,
        keep=chosen.keep,
        uniform_share=chosen.uniform_share if chosen.name != "random" else 0.0,
        rng=rng,
        reward_margin_P=memory.reward_margin[pool_P] if chosen.noise_quantile and begun else None,
        noise_quantile=chosen.noise_quantile if begun else 0.0,
    )


def _blank(count: int) -> scores.PairScores:
    return scores.PairScores(*(np.zeros(count, np.float32) for _ in scores.PairScores._fields))


def log_rows(round_: Round, drawn: Drawn, origin: list[str]) -> list[dict]:
    """One row a candidate, for `selection/round_*.jsonl`."""
    rows = []
    for place, index in enumerate(round_.pool_P):
        row = {
            "pair": int(index),
            "origin": origin[index],
            "stratum": int(drawn.stratum_P[place]),
            "selected": bool(drawn.selection.selected_P[place]),
            "why": str(drawn.selection.reason_P[place]),
        }
        if drawn.pairs is not None:
            row |= {k: float(v[place]) for k, v in drawn.pairs._asdict().items()}
        rows.append(row)
    return rows


def metrics(round_: Round, drawn: Drawn) -> dict[str, float]:
    """`selection/*` and `curriculum/*` of a round, as logged in the row of its first step."""
    selected = drawn.selection.selected_P
    row = {
        "selection/pool": float(len(selected)),
        "selection/selected": float(selected.sum()),
        "selection/left_out_as_noise": float((drawn.selection.reason_P == "noise").sum()),
    }
    if drawn.pairs is not None:
        for name in ("likelihood_margin", "margin_error", "score"):
            values = getattr(drawn.pairs, name)
            row[f"selection/{name}_selected"] = float(values[selected].mean())
            row[f"selection/{name}_pool"] = float(values.mean())
    for k, (competence, share) in enumerate(zip(round_.competence_K, drawn.share_K, strict=True)):
        row[f"curriculum/competence_{k}"] = float(competence)
        row[f"curriculum/share_{k}"] = float(share)
    return row
