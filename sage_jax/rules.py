"""Selection rules: what is known of a pool of pairs in, priorities out, on the host.

A rule is a pure function of `Candidates` and a generator. What it has to carry from round to round
it returns as state, arrays that go into the checkpoint. `selection.select_pool` turns priorities
into a choice; `RULES` names the published rules, and `resolve` finds your own by "module:function".
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sage_jax import curriculum, losses, scores

Array = jax.Array | np.ndarray
State = Mapping[str, Any]  # of numbers and arrays

# How a rule uses the data column named by selection.column. "instead": it takes the place of the
# scores, which then are not computed.
COLUMN = ("unused", "optional", "instead", "required")
MOMENTUM = 0.9  # of running means over rounds: beta-DPO's
LEAST_MARGIN = -2.0  # in BeeS, a margin from which on the label counts as wrong for certain
CERTAIN = 30  # in BeeS, at least so many pairs lie above the margin that counts as certain


class Candidates(NamedTuple):
    """What a rule is given of a pool of P pairs: numpy, one entry a pair."""

    pair_P: np.ndarray  # int64, index in the data set
    pairs: scores.PairScores  # float32 each, nan where nothing was scored
    memory: curriculum.Memory  # what is remembered of these pairs
    loss_P: np.ndarray  # float64, the loss at the pair's reward margin
    beta: float  # rewards per nat: reward margin / beta is the implicit margin in nats
    column_P: np.ndarray | None  # float64, the data column of selection.column
    state: State  # the rule's own, as it returned it in the round before


class Ranked(NamedTuple):
    """What a rule says of a pool; a rule without state may return the priorities alone."""

    priority_P: np.ndarray  # float64, larger first; nan = not known yet: only by chance
    state: State


Rank = Callable[[Candidates, np.random.Generator], np.ndarray | Ranked]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A selection rule.

    Attributes:
        rank: (candidates, rng) -> priorities [P], or `Ranked` where the rule has a state.
        init: the state before the first round, from what is known of all pairs of the data set;
            None = no state. An array of one entry a pair has a name that ends in _N, and grows
            with the data set.
        needs_scores: whether `Candidates.pairs` has to be filled; if not, nothing is scored for it,
            and the memory's margins are refreshed only where something else needs them.
        needs_reference: whether it reads reward margins, which compare with a reference.
        column: how it uses the data column of selection.column, one of `COLUMN`.
        ordered: train the chosen pairs in order of priority instead of at random.
        beta_alpha: alpha of an adaptive beta in the train step (`step.make_train_step`); None = a
            constant one.

    Raises:
        ValueError: `column` is none of `COLUMN`.

    >>> by_level = Rule(lambda c, rng: c.column_P, needs_scores=False, column="required")
    >>> by_level.ordered
    False
    """

    rank: Rank
    init: Callable[[Candidates], State] | None = None
    needs_scores: bool = True
    needs_reference: bool = False
    column: str = "unused"
    ordered: bool = False
    beta_alpha: float | None = None

    def __post_init__(self):
        if self.column not in COLUMN:
            raise ValueError(f"column={self.column!r} of a rule must be one of {', '.join(COLUMN)}")

    def scores_with(self, column: str) -> bool:
        """Whether it needs scores when selection.column is this ("" = none)."""
        return self.needs_scores and not (self.column == "instead" and column)


def candidates(
    pairs: scores.PairScores | None,
    memory: curriculum.Memory,
    *,
    pair_P: np.ndarray | None = None,
    loss: losses.Loss | None = None,
    column_P: np.ndarray | None = None,
    state: State | None = None,
) -> Candidates:
    """Puts together what a rule is given.

    Args:
        pairs: scores of the P pairs; None = nothing was scored, and all of them are nan.
        memory: what is remembered of the same P pairs (`curriculum.recall`).
        pair_P: int, their indices in the data set; counted from 0 when left out.
        loss: of the run; the sigmoid loss when left out.
        column_P: float64, values of a data column.
        state: the rule's own.

    >>> candidates(None, curriculum.init_memory(2), column_P=np.array([0.5, 1.0])).pair_P.tolist()
    [0, 1]
    """
    count, loss = len(memory.visits), loss or losses.sigmoid()
    known = memory.reward_margin if pairs is None else pairs.reward_margin
    half_P = np.asarray(known, np.float32) / 2
    if pairs is None:
        nothing = np.full(count, np.nan, np.float32)
        pairs = scores.PairScores(*(nothing.copy() for _ in scores.PairScores._fields))
    return Candidates(
        pair_P=np.arange(count) if pair_P is None else np.asarray(pair_P),
        pairs=scores.PairScores(*map(np.asarray, pairs)),
        memory=memory,
        loss_P=np.asarray(loss.value(half_P, -half_P), np.float64),
        beta=loss.beta,
        column_P=column_P,
        state={} if state is None else state,
    )


def ranked(rule: Rule, known: Candidates, rng: np.random.Generator) -> Ranked:
    """Applies a rule; its state comes back as arrays, ready for a checkpoint.

    Raises:
        ValueError: the rule needs a data column and there is none, or it returned something else
            than a number for every pair.

    >>> known = candidates(None, curriculum.init_memory(2), column_P=np.array([3.0, 5.0]))
    >>> found = ranked(Rule(lambda c, rng: -c.column_P), known, np.random.default_rng(0))
    >>> found.priority_P.tolist(), found.state
    ([-3.0, -5.0], {})
    """
    if rule.column == "required" and known.column_P is None:
        raise ValueError(
            "The rule reads a data column, and Candidates.column_P is None. Give `candidates` the "
            "column's values, one for each pair; of a run, set selection.column."
        )
    found = rule.rank(known, rng)
    if not isinstance(found, Ranked):
        found = Ranked(found, known.state)
    priority_P = np.asarray(found.priority_P, np.float64)
    if priority_P.shape != known.pair_P.shape:
        raise ValueError(
            f"The rule of selection.name returned priorities of the shape {priority_P.shape} for "
            f"{len(known.pair_P)} pairs. Return one number for each, nan where it is not known."
        )
    return Ranked(priority_P, {name: np.asarray(value) for name, value in found.state.items()})


# --- the rules ---


def sage(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """Highest SAGE score first; equal scores by the lower pessimistic margin.

    The first pair is the most wrong, but too uncertain of it to come before the second.

    >>> margin, error = np.array([-4.0, 0.0, 3.0]), np.array([3.0, 0.5, 0.5])
    >>> pairs = scores.make_rescore_fn(losses.sigmoid())(margin, margin, error)
    >>> sage(candidates(pairs, curriculum.init_memory(3)), np.random.default_rng(0)).tolist()
    [1.0, 2.0, 0.0]
    """
    return _dense_rank(known.pairs.score, -known.pairs.pessimistic_margin)


def random(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """A random order: the twin that a claim about a score has to beat. Costs nothing.

    >>> priority_P = random(candidates(None, curriculum.init_memory(3)), np.random.default_rng(0))
    >>> np.argsort(-priority_P).tolist()
    [0, 1, 2]
    """
    return rng.random(len(known.pair_P))


def gradient(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """Largest gradient signal first; equal signals by the lower margin. No curvature, no doubt.

    >>> margin = np.array([-4.0, 0.0, 3.0])
    >>> pairs = scores.make_rescore_fn(losses.sigmoid())(margin, margin, np.zeros(3))
    >>> gradient(candidates(pairs, curriculum.init_memory(3)), np.random.default_rng(0)).tolist()
    [2.0, 1.0, 0.0]
    """
    return _dense_rank(known.pairs.gradient_signal, -known.pairs.margin)


def hard_first(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """Lowest margin first.

    >>> margin = np.array([-4.0, 0.0, 3.0])
    >>> pairs = scores.make_rescore_fn(losses.sigmoid())(margin, margin, np.zeros(3))
    >>> hard_first(candidates(pairs, curriculum.init_memory(3)), np.random.default_rng(0)).tolist()
    [2.0, 1.0, 0.0]
    """
    return _dense_rank(-known.pairs.margin)


def max_curvature(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """Most undecided first: largest curvature, then the margin nearest 0.

    >>> margin = np.array([-4.0, 0.0, 3.0])
    >>> pairs = scores.make_rescore_fn(losses.sigmoid())(margin, margin, np.zeros(3))
    >>> known = candidates(pairs, curriculum.init_memory(3))
    >>> max_curvature(known, np.random.default_rng(0)).tolist()
    [0.0, 2.0, 1.0]
    """
    return _dense_rank(known.pairs.curvature, -np.abs(known.pairs.margin))


def implicit_gap(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """Lowest signed implicit margin first: the pairs that DPO finds hardest.

    The margin is that of the data column (of a seed run, as published), else the policy's own now.

    Source: Qi et al. 2025, "Difficulty-based preference data selection by DPO implicit reward gap",
    arXiv 2508.04149.

    >>> known = candidates(None, curriculum.init_memory(3), column_P=np.array([0.5, -1.0, 2.0]))
    >>> implicit_gap(known, np.random.default_rng(0)).tolist()
    [1.0, 2.0, 0.0]
    """
    margin_P = _moved_margin(known) if known.column_P is None else known.column_P
    return _dense_rank(-margin_P)


def dual_margin(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """BeeS: an external and the implicit margin agree that the chosen answer is better.

    p = p1 p2 / (p1 p2 + (1-p1)(1-p2)), where a margin m gives p_i = (clip(m, L, U) - L) / (U - L).
    The choice of L and U is ours: L is `LEAST_MARGIN`, and U is a margin that `CERTAIN` pairs of
    the pool reach, but not below half of the largest, nor above it. The implicit margin is in nats,
    the external one in the units of the data column.

    Returns:
        The log-odds of p, which rank like p and do not saturate.

    Source: Deng et al. 2025, "Less is more: improving LLM alignment via preference data selection",
    arXiv 2502.14560, eq. 3.

    >>> margin = np.array([-0.1, 0.2, 0.2])
    >>> pairs = scores.make_rescore_fn(losses.sigmoid(0.1))(margin, margin, np.zeros(3))
    >>> known = candidates(pairs, curriculum.init_memory(3), loss=losses.sigmoid(0.1),
    ...                    column_P=np.array([4.0, 0.0, 1.0]))
    >>> np.argsort(-dual_margin(known, np.random.default_rng(0))).tolist()
    [2, 1, 0]
    """
    assert known.column_P is not None
    implicit_P = _moved_margin(known) / known.beta
    return _margin_log_odds(implicit_P) + _margin_log_odds(known.column_P)


def easy_half(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """Selective DPO: the easiest pairs, trained from easy to hard.

    Difficulty is a data column (a held-out loss, as published; larger = harder), else minus the
    likelihood margin of the policy at the start. It stays the same over all rounds: the state that
    `first_difficulty` makes before training, for `candidates(..., state=...)`.

    Raises:
        ValueError: there is neither a column nor that state.

    Source: Gao et al. 2025, "Principled data selection for alignment: the hidden risks of difficult
    examples", arXiv 2502.09650.

    >>> known = candidates(None, curriculum.init_memory(3), column_P=np.array([0.5, 0.1, 2.0]))
    >>> easy_half(known, np.random.default_rng(0)).tolist()
    [1.0, 2.0, 0.0]
    """
    if known.column_P is not None:
        return _dense_rank(-known.column_P)
    if "difficulty_N" not in known.state:
        raise ValueError(
            "easy_half has neither a column nor the difficulty of before training. Give "
            "candidates(...) column_P, or the state that first_difficulty made at the start."
        )
    return _dense_rank(-np.asarray(known.state["difficulty_N"])[known.pair_P])


def first_difficulty(known: Candidates) -> State:
    """The state of `easy_half`: the difficulty of every pair before training.

    >>> memory = curriculum.init_memory(2)._replace(likelihood_margin=np.float32([1.5, -2.0]))
    >>> first_difficulty(candidates(None, memory))["difficulty_N"].tolist()
    [-1.5, 2.0]
    """
    if known.column_P is not None:
        return {}
    return {"difficulty_N": -np.asarray(known.memory.likelihood_margin, np.float64)}


def beta_dpo(known: Candidates, rng: np.random.Generator) -> Ranked:
    """Beta-DPO's filter: sampled without replacement, in proportion to exp(-((M - M0) / s0)² / 2).

    M is the reward margin, M0 and s0 are running mean and standard deviation over pools. (The
    authors filter every batch after its forward pass; here a round filters its pool before it.)
    The first pool whose margins differ sets them, instead of one step away from 0: a pool comes
    rarely. Priorities are log-weights with Gumbel noise, whose top k are that sample. The other
    half of the method, a beta for every batch, is `step.adapt_beta`.

    Source: Wu et al. 2024, "beta-DPO: direct preference optimization with dynamic beta",
    arXiv 2407.08639; Kool et al. 2019 for the Gumbel top-k.

    >>> margin = np.array([-1.0, 0.0, 4.0])
    >>> pairs = scores.make_rescore_fn(losses.sigmoid())(margin, margin, np.zeros(3))
    >>> state = beta_dpo(candidates(pairs, curriculum.init_memory(3)), np.random.default_rng(0))[1]
    >>> round(state["margin_mean"], 3), round(state["margin_std"], 3)
    (1.0, 2.646)
    """
    margin_P = np.asarray(known.pairs.reward_margin, np.float64)
    finite = margin_P[np.isfinite(margin_P)]
    state = dict(known.state)
    now = {"margin_mean": float(finite.mean()), "margin_std": float(finite.std(ddof=1))} if len(
        finite) > 1 else {}  # fmt: skip
    if now and now["margin_std"] > 0:
        state = {k: MOMENTUM * state.get(k, v) + (1 - MOMENTUM) * v for k, v in now.items()}
    log_weight_P = np.where(np.isfinite(margin_P), 0.0, np.nan)
    if state:
        log_weight_P = -0.5 * ((margin_P - state["margin_mean"]) / state["margin_std"]) ** 2
    return Ranked(log_weight_P + rng.gumbel(size=len(margin_P)), state)


def rho(known: Candidates, rng: np.random.Generator) -> np.ndarray:
    """RHO-loss: largest reducible loss first, the loss now minus the held-out loss of the column.

    Source: Mindermann et al. 2022, "Prioritized training on points that are learnable, worth
    learning, and not yet learnt", arXiv 2206.07137, eq. 3.

    >>> known = candidates(None, curriculum.init_memory(2)._replace(reward_margin=np.zeros(2)),
    ...                    column_P=np.array([0.2, 0.7]))
    >>> rho(known, np.random.default_rng(0)).round(3).tolist()
    [0.493, -0.007]
    """
    assert known.column_P is not None
    return known.loss_P - known.column_P


RULES: dict[str, Rule] = {
    "sage": Rule(sage),
    # With keep = 1 there is nothing to choose; below 1 it is a random part.
    "uniform": Rule(random, needs_scores=False),
    "random": Rule(random, needs_scores=False),
    "gradient": Rule(gradient),
    "hard_first": Rule(hard_first),
    "max_curvature": Rule(max_curvature),
    "implicit_gap": Rule(implicit_gap, needs_reference=True, column="instead"),
    "dual_margin": Rule(dual_margin, needs_reference=True, column="required"),
    "easy_half": Rule(
        easy_half, first_difficulty, needs_scores=False, column="optional", ordered=True
    ),
    "beta_dpo": Rule(beta_dpo, needs_reference=True, beta_alpha=0.6),
    "rho": Rule(rho, needs_reference=True, column="required"),
}


def resolve(name: str) -> Rule:
    """The rule of that name: one of `RULES`, or your own as "module:function".

    What is found there is a `Rule`, or a function of (Candidates, rng) that returns priorities; the
    latter gets scores, and the data column if selection.column names one.

    Raises:
        ValueError: no such rule, module or function.

    >>> resolve("hard_first") is RULES["hard_first"]
    True
    >>> resolve("sage_jax.rules:gradient").rank is gradient
    True
    """
    if name in RULES:
        return RULES[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, RULES, 1)
        raise ValueError(
            f"selection.name={name!r} must be one of {', '.join(RULES)}, or your own as "
            f"'module:function'.{f' Did you mean {near[0]!r}?' if near else ''}"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise ValueError(
            f"selection.name={name!r} cannot be loaded ({e}). Write 'module:function' with a "
            f"module that can be imported from here (PYTHONPATH) and a function that it defines."
        ) from e
    if isinstance(found, Rule):
        return found
    if not callable(found):
        raise ValueError(
            f"selection.name={name!r} must be a function of (Candidates, rng), or a rules.Rule."
        )
    return Rule(found, column="optional")


# --- their parts ---


def _dense_rank(*keys_P: Array) -> np.ndarray:
    """Dense rank by the first key, ties by the next: float64, larger keys rank higher; nan stays.

    Ranks instead of scores, because a float32 score saturates: beyond 17 nats every wrong pair has
    the same one, and the keys after it still know the order.
    """
    keys = [np.asarray(key, np.float64) for key in keys_P]
    order = np.lexsort(keys[::-1])
    differs = np.zeros(len(order), bool)
    for key in keys:
        differs[1:] |= key[order][1:] != key[order][:-1]
    rank = np.empty(len(order))
    rank[order] = np.cumsum(differs)
    return np.where(np.isnan(np.sum(keys, axis=0)), np.nan, rank)


def _moved_margin(known: Candidates) -> np.ndarray:
    """Reward margins, nan where training has not moved the pair from the reference's 0."""
    margin_P = np.asarray(known.pairs.reward_margin, np.float64)
    return np.where((known.memory.trained == 0) & (margin_P == 0), np.nan, margin_P)


def _margin_log_odds(margin_P: np.ndarray) -> np.ndarray:
    """Log-odds of BeeS's preference probability of each margin; nan stays."""
    finite = np.sort(margin_P[np.isfinite(margin_P)])
    if not len(finite):
        return np.full(len(margin_P), np.nan)
    certain = finite[-CERTAIN] if len(finite) >= CERTAIN else -np.inf
    upper = min(max(certain, finite[-1] / 2), finite[-1])
    upper = max(upper, LEAST_MARGIN + 1)
    share_P = (np.clip(margin_P, LEAST_MARGIN, upper) - LEAST_MARGIN) / (upper - LEAST_MARGIN)
    tiny = np.finfo(np.float64).eps
    share_P = np.clip(share_P, tiny, 1 - tiny)  # 0 and 1 together would be 0 / 0
    return np.log(share_P) - np.log1p(-share_P)
