"""What happens between two rounds, on the host: draw a pool, score it, select, plan the steps.

All of it is numpy and a function of its arguments. The plan that comes out is kept in the
checkpoint, so that a resumed run trains the same pairs without scoring anything again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from sage_jax import config, curriculum, losses, noise, rules, scores, selection
from sage_jax.data import encode, steps
from sage_jax.runtime import hosts, suspicion

# Columns that "auto" takes for the difficulty, and the sign that makes larger mean harder.
# A pass rate says how hard a problem is for this policy; a level, for people.
DIFFICULTY_COLUMNS = (("difficulty", 1.0), ("pass_rate", -1.0), ("level", 1.0))


class Round(NamedTuple):
    """One round, ready to train. Everything a checkpoint needs of it is an array."""

    number: int
    pool_P: np.ndarray  # int64, the pairs that were drawn
    pair_KB: np.ndarray  # int32, the pairs of each of the K steps, -1 behind those of a short one
    competence_K: np.ndarray  # float64, running competence per stratum, after this round's draw
    rule: dict[str, np.ndarray]  # state of the selection rule, after this round's ranking
    held_3: np.ndarray | None = None  # float64, `noise.Held` after this round's look at the labels
    soft: np.ndarray | None = None  # float64 [], exponent of the weights inside its steps

    @property
    def held(self) -> noise.Held:
        return noise.Held() if self.held_3 is None else noise.Held(*map(float, self.held_3))


class Drawn(NamedTuple):
    """What the selection saw and did, for the log of the round."""

    stratum_P: np.ndarray
    pairs: scores.PairScores | None
    selection: selection.Selection
    share_K: np.ndarray
    population_K: np.ndarray
    priority_P: np.ndarray | None  # of the rule; None where nothing was ranked
    flips: noise.Flips | None  # of all pairs; None where nothing is known yet


def difficulty_source(pairs: encode.EncodedPairs, source: str) -> str:
    """What "auto" stands for: the first known column that is complete, else "margin"."""
    if source != "auto":
        return source
    for name, _ in DIFFICULTY_COLUMNS:
        if name in pairs.columns and np.isfinite(pairs.columns[name]).all():
            return name
    return "margin"


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
    source = difficulty_source(pairs, source)
    if source == "margin":
        assert memory is not None
        return -np.nan_to_num(memory.likelihood_margin.astype(np.float64))
    column_N = _complete(
        pairs,
        source,
        "curriculum.difficulty",
        "Use one of them, 'margin' or 'auto'",
        "use 'margin'",
    )
    return dict(DIFFICULTY_COLUMNS).get(source, 1.0) * column_N


def _complete(
    pairs: encode.EncodedPairs, name: str, key: str, known: str, instead: str
) -> np.ndarray:
    """A data column without gaps, float64 [N]; an error names the setting and what else to do."""
    if name not in pairs.columns:
        raise ValueError(
            f"config.{key}={name!r} is no numeric column of the data, which has "
            f"{', '.join(sorted(pairs.columns)) or 'none'}. {known}."
        )
    missing = int((~np.isfinite(pairs.columns[name])).sum())
    if missing:
        raise ValueError(
            f"config.{key}={name!r}: {missing} of {len(pairs)} pairs have no value in that "
            f"column. Fill it, or {instead}."
        )
    return pairs.columns[name]


def remembered_scores(
    memory: curriculum.Memory,
    index_P: np.ndarray,
    loss: losses.Loss,
    run: config.Run,
    rescore: Callable[..., scores.PairScores] | None = None,
) -> scores.PairScores:
    """Scores from the last known margins: no forward pass at all.

    `rescore` is `make_rescore_fn(run, loss)`, jitted by a caller who scores many pools of one size.
    """
    chosen = run.selection
    reward, likelihood = memory.reward_margin[index_P], memory.likelihood_margin[index_P]
    error = memory.margin_error[index_P]
    sources = scores.stability_sources(chosen.stability)
    if scores.ROUNDS in sources:
        over_rounds = scores.round_variance_error(
            memory.mean[index_P], memory.m2[index_P], memory.visits[index_P]
        )
        error = over_rounds if len(sources) == 1 else np.hypot(error, over_rounds)
    rescore = rescore or make_rescore_fn(run, loss)
    return jax.device_get(rescore(reward, likelihood, error))


_rescore_fn = functools.lru_cache(maxsize=64)(scores.make_rescore_fn)  # as `setup.make_score_fn`


def make_rescore_fn(run: config.Run, loss: losses.Loss) -> Callable[..., scores.PairScores]:
    """`scores.make_rescore_fn` of the settings."""
    chosen = run.selection
    return _rescore_fn(
        loss,
        margin=chosen.margin,
        kappa=chosen.kappa,
        damping=chosen.damping,
        temperature=chosen.temperature,
    )


def stalest(last_round_P: np.ndarray, share: float, *, seed: int, number: int) -> np.ndarray:
    """Places of the pool's pairs that were seen longest ago; equals come in random order.

    Args:
        last_round_P: int, the round in which each pair of the pool was last seen.
        share: of the pool, in [0, 1]; a pair is taken where the share is a part of one.
        seed: of the run.
        number: of the round.

    Returns:
        int64, increasing.

    >>> stalest(np.array([2, -1, 1, 2]), 0.5, seed=0, number=3).tolist()
    [1, 2]
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, number, 2]))
    order = np.lexsort((rng.random(len(last_round_P)), last_round_P))
    return np.sort(order[: math.ceil(share * len(last_round_P) - 1e-9)])


def next_round(
    number: int,
    memory: curriculum.Memory,
    competence_K: np.ndarray | None,
    rule_state: rules.State | None,
    *,
    run: config.Run,
    loss: losses.Loss,
    pairs: encode.EncodedPairs,
    shape: steps.Shape,
    score_pool: Callable[[np.ndarray], scores.PairScores] | None,
    held: noise.Held | None = None,
) -> tuple[Round, Drawn]:
    """Draws, scores and selects a round and cuts it into steps, the same on every mesh.

    Args:
        number: of the round, from 0.
        memory: what is known of every pair.
        competence_K: running competence per stratum; None before the first round.
        rule_state: state of the selection rule; None before the first round.
        run: the settings.
        loss: of the run.
        pairs: the data set.
        shape: of the rows that the pairs of a step have to fit into.
        score_pool: scores of drawn pairs, `index_P -> PairScores`; None: nothing is scored.
        held: the last round's `held`; None before the first.

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
    pool_P = hosts.agree(pool_P)  # what is scored is the same everywhere, however margins round
    scored = score_pool(pool_P) if score_pool else None
    rng = np.random.default_rng(np.random.SeedSequence([run.seed, number, 1]))
    ranked = None
    if run.selection.name != "uniform":
        ranked = rank(pool_P, scored, memory, rule_state, run=run, loss=loss, pairs=pairs, rng=rng)
    priority_P = ranked.priority_P if ranked else None
    # At the start reward margins are 0, or say how policy and reference were made.
    begun, flips = bool((memory.trained > 0).any()), None
    if held is None:
        held = noise.Held()
        if not begun:
            held = noise.at_start(memory.likelihood_margin, memory.margin_error)
    if begun:
        flips = suspicion.detect(memory, run, pairs, held)
        held = flips.held
    chosen = select(pool_P, stratum_N[pool_P], priority_P, memory, run, rng, flips)
    order_K = rng.permutation(np.flatnonzero(chosen.selected_P))
    if priority_P is not None and rules.resolve(run.selection.name).ordered:
        order_K = order_K[np.argsort(-priority_P[order_K], kind="stable")]  # nan sorts last
    order_K = pool_P[order_K]
    length_N = pairs.row_lengths(shape.share)
    pair_KB = steps.split(length_N, order_K, shape.every, run.train.batch_pairs)
    if not len(pair_KB):
        raise ValueError(
            f"{len(order_K)} pairs were selected from {len(pool_P)}, fewer than one batch of "
            f"config.train.batch_pairs={run.train.batch_pairs}. Lower it, or raise selection.keep."
        )
    drawn = Drawn(stratum_N[pool_P], scored, chosen, share_K, population_K, priority_P, flips)
    state = dict(ranked.state) if ranked else {}
    soft = np.array(suspicion.soft_exponent(run, flips))
    return Round(number, pool_P, pair_KB, competence_K, state, np.array(held), soft), drawn


def rule_column(run: config.Run, pairs: encode.EncodedPairs) -> np.ndarray | None:
    """The data column that the selection rule reads, float64 [N]; None when none is named.

    Raises:
        ValueError: the data has no such column, or it has gaps.
    """
    name = run.selection.column
    if not name:
        return None
    other = "use a rule that needs no column"
    return _complete(pairs, name, "selection.column", "Use one of them, or add it", other)


def rank(
    pool_P: np.ndarray,
    scored: scores.PairScores | None,
    memory: curriculum.Memory,
    state: rules.State | None,
    *,
    run: config.Run,
    loss: losses.Loss,
    pairs: encode.EncodedPairs,
    rng: np.random.Generator,
) -> rules.Ranked:
    """Priorities of a pool by the rule of the settings, and the rule's next state."""
    rule, column_N = rules.resolve(run.selection.name), rule_column(run, pairs)
    if state is None and rule.init is not None:
        state = rule.init(rules.candidates(None, memory, loss=loss, column_P=column_N))
    known = rules.candidates(
        scored,
        curriculum.recall(memory, pool_P),
        pair_P=pool_P,
        loss=loss,
        column_P=None if column_N is None else column_N[pool_P],
        state=state,
    )
    return rules.ranked(rule, known, rng)


def select(
    pool_P: np.ndarray,
    stratum_P: np.ndarray,
    priority_P: np.ndarray | None,
    memory: curriculum.Memory,
    run: config.Run,
    rng: np.random.Generator,
    flips: noise.Flips | None = None,
) -> selection.Selection:
    """The pairs of a pool that are trained; without priorities all that the guard leaves."""
    chosen = run.selection
    begun = bool((memory.trained[pool_P] > 0).any())
    noisy_P = suspicion.left_out(pool_P, memory, chosen.guard if begun else "off", flips)
    if priority_P is None:
        return selection.Selection(~noisy_P, np.where(noisy_P, "noise", "all").astype("<U10"))
    return selection.select_pool(
        priority_P,
        stratum_P,
        pool_P,
        keep=chosen.keep,
        uniform_share=chosen.uniform_share if chosen.name != "random" else 0.0,
        rng=rng,
        noisy_P=noisy_P,
    )


def log_rows(round_: Round, drawn: Drawn, origin: list[str]) -> list[dict]:
    """One row a candidate, for `selection/round_*.jsonl`."""
    pool = round_.pool_P.tolist()
    columns = {
        "pair": pool,
        "origin": [origin[index] for index in pool],
        "stratum": drawn.stratum_P.tolist(),
        "selected": drawn.selection.selected_P.tolist(),
        "why": drawn.selection.reason_P.tolist(),
    }
    if drawn.priority_P is not None:
        columns["priority"] = np.asarray(drawn.priority_P, float).tolist()
    if drawn.pairs is not None:
        columns |= {k: np.asarray(v, float).tolist() for k, v in drawn.pairs._asdict().items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def metrics(round_: Round, drawn: Drawn, run: config.Run) -> dict[str, float]:
    """`selection/*` and `curriculum/*` of a round, as logged in the row of its first step."""
    selected = drawn.selection.selected_P
    row = {
        "selection/pool": float(len(selected)),
        "selection/selected": float(selected.sum()),
        "selection/left_out_as_noise": float((drawn.selection.reason_P == "noise").sum()),
    }
    if drawn.flips is not None:
        row["selection/suspected"] = float(drawn.flips.suspected_N.sum())
        row["selection/flip_share"] = drawn.flips.share
    if run.selection.soft and round_.soft is not None:
        row["selection/soft"] = float(round_.soft)
    if drawn.pairs is not None:
        for name in ("likelihood_margin", "margin_error", "score"):
            values = getattr(drawn.pairs, name)
            row[f"selection/{name}_selected"] = float(values[selected].mean())
            row[f"selection/{name}_pool"] = float(values.mean())
    row |= {f"selection/{k}": float(v) for k, v in round_.rule.items() if np.ndim(v) == 0}
    for k, (competence, share) in enumerate(zip(round_.competence_K, drawn.share_K, strict=True)):
        row[f"curriculum/competence_{k}"] = float(competence)
        row[f"curriculum/share_{k}"] = float(share)
    return row
