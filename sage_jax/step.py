"""Pure training, scoring and evaluation steps. The caller jits them, with shardings and donation.

The train step returns, beside the new state, one `PairScores` a pair: training itself refreshes
what the selection knows, and no forward pass is spent on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sage_jax import batch as batches
from sage_jax import logprobs, losses, scores

Array = batches.Array
ScoreFn = Callable[[logprobs.SequenceStats, Array], scores.PairScores]
WeightFn = Callable[..., Array]  # (scores, weight_RS) or (scores, weight_RS, exponent)


# Two rewards closer than this many nats a token are a tie: the policy and its reference run in
# other rows and other programs, so equal weights give log-probs that differ in the last bits.
# Measured in float32: 0 in rows of the same shape; else at most 3e-7 (0.4 M parameters) and 1.4e-6
# (SmolLM2-135M, 504-token rows, 8 at once against 2 x 2).
TIE = 1e-5
BETA_MOMENTUM, LEAST_BETA = 0.9, 1e-3  # of beta-DPO, as in its authors' code


class BetaState(NamedTuple):
    """What an adaptive beta carries from step to step."""

    margin_mean: jax.Array  # float32 [], running mean of the batches' implicit margins, nats


class TrainState(NamedTuple):
    """Everything a step changes. Frozen weights are an argument, not state."""

    step: jax.Array  # int32 []
    params: Any  # what is trained: all weights, or adapters
    opt_state: optax.OptState
    beta: BetaState | tuple[()] = ()  # () with a constant beta


class Now(NamedTuple):
    """What may change from step to step without a new compilation; None is not in the program."""

    nll_weight: float | Array | None = None  # float32 []; None = that which the step was made with
    soft: float | Array | None = None  # float32 [], exponent that `weight_fn` is given


class StepOutput(NamedTuple):
    """What a train step reports; nothing here is needed for the next step."""

    metrics: dict[str, Array]  # float32 [], the field's usual names
    pairs: scores.PairScores | None  # float32 [R, S] each; None without a score function


def init_state(
    params: Any, tx: optax.GradientTransformation, *, adaptive_beta: bool = False
) -> TrainState:
    """The state before the first step; `adaptive_beta` if the step has a `beta_alpha`.

    >>> init_state({"w": jnp.ones(2)}, optax.sgd(0.1)).step
    Array(0, dtype=int32)
    """
    beta = BetaState(jnp.zeros(())) if adaptive_beta else ()
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), beta)


def adapt_beta(
    state: BetaState, margin: Array, weight: Array, *, beta: float, alpha: float
) -> tuple[Array, BetaState]:
    """Beta-DPO's beta of a batch: beta (1 + alpha (mean margin - M0)), at least `LEAST_BETA`.

    M0 is a running mean with momentum `BETA_MOMENTUM`, from 0 on, which already holds this batch.
    So a batch that is easier than those before it pulls less far, and a harder one further.

    Args:
        state: of the step before.
        margin: float32 [...], implicit margins (a_w - r_w) - (a_l - r_l) in nats, as in the
            authors' code; without gradient.
        weight: float32 [...]; pairs with weight 0 are left out, others count alike.
        beta: the constant one that is adapted.
        alpha: how far; 0 leaves beta exactly as it is.

    Returns:
        The factor float32 [] on rewards, this batch's beta over the constant one, and the state.

    Source: Wu et al. 2024, "beta-DPO: direct preference optimization with dynamic beta",
    arXiv 2407.08639.

    >>> factor, state = adapt_beta(BetaState(jnp.zeros(())), jnp.array([1.0, 3.0]), jnp.ones(2),
    ...                            beta=0.1, alpha=0.5)
    >>> print(f"{factor:.2f} {state.margin_mean:.2f}")  # 1 + 0.5 (2 - 0.2)
    1.90 0.20
    """
    real = (weight > 0).astype(jnp.float32)
    # An empty batch has no margin: then M0 stays.
    mean = jnp.sum(margin * real) / jnp.maximum(real.sum(), 1.0)
    mean = jnp.where(real.sum() > 0, mean, state.margin_mean)
    running = BETA_MOMENTUM * state.margin_mean + (1 - BETA_MOMENTUM) * mean
    factor = jnp.maximum(1 + alpha * (mean - running), min(LEAST_BETA / beta, 1.0))
    return factor, BetaState(running)


def _pair_weight(batch: batches.PackedBatch, tokens_RS: Array | None) -> Array:
    weight_RS = jnp.where(batch.pair_RS >= 0, batch.weight_RS, 0.0)
    return weight_RS if tokens_RS is None else weight_RS * tokens_RS


def _chosen_tokens(batch: batches.PackedBatch) -> Array:
    _, segment_RT, mask_RT = logprobs.targets(batch)
    tokens_RS2 = logprobs.segment_sums(mask_RT, segment_RT, batch.pair_RS.shape[1])
    return logprobs.of_pairs(tokens_RS2, batch)[..., batches.CHOSEN]


def pair_losses(
    loss: losses.Loss,
    stats: logprobs.SequenceStats,
    ref_logps: Array,
    *,
    nll_weight: float | Array = 0.0,
    reward_factor: Array | None = None,
) -> Array:
    """The loss of each pair, unreduced.

    Args:
        loss: one of `losses.LOSSES`, or a user's own.
        stats: float32 [..., 2] sums of the policy.
        ref_logps: float32 [..., 2], nats; ignored by losses that need no reference.
        nll_weight: weight of the added mean negative log-likelihood of the chosen completion
            (RPO, arXiv 2404.19733 eq. 3); a traced scalar may change without a new compilation.
        reward_factor: float32 [], scales both rewards: another beta, for the losses in
            `losses.BETA_SCALES_REWARDS`. None = 1.

    Returns:
        float32 [...], one loss per pair.

    >>> z = jnp.zeros((1, 2)); stats = logprobs.SequenceStats(z, z + 1, z, z, z, z, z)
    >>> [round(float(x), 4) for x in pair_losses(losses.sigmoid(), stats, z)]
    [0.6931]
    """
    chosen, rejected = losses.rewards(loss, stats.logps, ref_logps, stats.tokens)
    if reward_factor is not None:
        chosen, rejected = chosen * reward_factor, rejected * reward_factor
    value = loss.value(chosen, rejected)
    if not isinstance(nll_weight, int | float) or nll_weight:
        value = value + nll_weight * losses.nll(stats.logps[..., 0], stats.tokens[..., 0])
    return value


def pair_metrics(
    stats: logprobs.SequenceStats, ref_logps: Array, weight: Array, beta: float
) -> dict[str, Array]:
    """Means over pairs under the names that preference trainers share.

    Args:
        stats: float32 [..., 2] sums of the policy.
        ref_logps: float32 [..., 2], nats.
        weight: float32 [...]; pairs with weight 0 are left out, others count alike.
        beta: scale of the rewards, beta * (log pi - log pi_ref), raw sums whichever loss is used.

    Returns:
        `rewards/*`, `logps/*` (means of token sums, nats), `logits/*` (means over completion
        tokens), `entropy` (nats per token, both sides), `mean_token_accuracy` (chosen side),
        `logps/*_per_token` (nats per completion token) and `displacement/*`, by how much that
        differs from the reference on the same completions. The latter is no KL divergence: the
        completions come from the data, not from the policy.
        `rewards/accuracies` counts rewards larger by more than rounding (`TIE`), so a policy equal
        to its reference logs 0.

    >>> z = jnp.zeros((3, 2)); stats = logprobs.SequenceStats(z, z + 1, z, z, z, z, z)
    >>> float(pair_metrics(stats, z, jnp.ones(3), 0.1)["rewards/accuracies"])
    0.0
    """
    real = (weight > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(), 1.0)
    ratio = stats.logps - ref_logps
    reward = beta * ratio
    right = ratio[..., 0] - ratio[..., 1] > TIE * stats.tokens.sum(-1)

    def over_pairs(x):
        return jnp.sum(jnp.where(real > 0, x, 0.0)) / count

    def over_tokens(x, sides):
        total = jnp.sum(stats.tokens[..., sides] * real[..., None])
        kept = jnp.where(real[..., None] > 0, x[..., sides], 0.0)
        return jnp.sum(kept) / jnp.maximum(total, 1.0)

    chosen, rejected, both = slice(0, 1), slice(1, 2), slice(0, 2)
    return {
        "rewards/chosen": over_pairs(reward[..., 0]),
        "rewards/rejected": over_pairs(reward[..., 1]),
        "rewards/accuracies": over_pairs(right),
        "rewards/margins": over_pairs(reward[..., 0] - reward[..., 1]),
        "logps/chosen": over_pairs(stats.logps[..., 0]),
        "logps/rejected": over_pairs(stats.logps[..., 1]),
        "logps/chosen_per_token": over_tokens(stats.logps, chosen),
        "logps/rejected_per_token": over_tokens(stats.logps, rejected),
        "displacement/chosen": over_tokens(ratio, chosen),
        "displacement/rejected": over_tokens(ratio, rejected),
        "logits/chosen": over_tokens(stats.mean_logit, chosen),
        "logits/rejected": over_tokens(stats.mean_logit, rejected),
        "entropy": over_tokens(stats.entropy, both),
        "mean_token_accuracy": over_tokens(stats.hits, chosen),
    }


def make_train_step(
    logps_fn: logprobs.LogpsFn,
    loss: losses.Loss,
    tx: optax.GradientTransformation,
    *,
    score_fn: ScoreFn | None = None,
    weight_fn: WeightFn | None = None,
    nll_weight: float = 0.0,
    token_weighted: bool = False,
    accumulate: int = 1,
    beta_alpha: float | None = None,
    penalty_weight: float = 0.0,
):
    """Makes one optimizer step over packed rows.

    Args:
        logps_fn: `(params, frozen, batch) -> SequenceStats` of [R, S, 2] arrays.
        loss: the pair loss.
        tx: the optimizer.
        score_fn: scores each pair from the statistics of this very forward pass; None leaves
            scoring out of the compiled program.
        weight_fn: soft selection, `(scores, weight_RS) -> weight_RS`, applied without gradient to
            the pairs of one accumulation part. The loss is divided by the sum of the weights that
            it was given: a function that lowers their sum, such as a mask, makes a smaller step.
            Needs `score_fn`. Where `Now.soft` is given, it is
            the third argument.
        nll_weight: see `pair_losses`.
        token_weighted: weight pairs by their chosen tokens, so that the `sft` loss is a mean over
            tokens.
        accumulate: parts that the rows are cut into, one after the other inside the step.
            Gradients add up to those of the whole batch.
        beta_alpha: adapts beta to each batch, see `adapt_beta`; None = a constant beta. Needs a
            state made with `adaptive_beta`, and reports `selection/beta`.
        penalty_weight: adds this times a scalar that `logps_fn` returns beside its statistics, such
            as the load balance of experts, and reports that as `router_aux`; 0 = it returns
            statistics alone.

    Returns:
        An un-jitted `step(state, frozen, batch, now=Now()) -> (TrainState, StepOutput)`.

    Raises:
        ValueError: `weight_fn` without `score_fn`, rows that `accumulate` does not divide, or an
            adaptive beta of parts or of a loss that beta does more to than scale its rewards.

    >>> rows = batches.empty(1, 8, 1)  # one pair: prompt 1 2, chosen 3 3, rejected 4 4
    >>> rows.tokens_RT[0] = [1, 2, 3, 3, 1, 2, 4, 4]
    >>> rows.segment_RT[0] = [1, 1, 1, 1, 2, 2, 2, 2]
    >>> rows.completion_RT[0] = [False, False, True, True] * 2
    >>> rows.pair_RS[0], rows.weight_RS[0] = 0, 1.0
    >>> params = {"embed": jnp.eye(5)}  # a model whose hidden state is its token's embedding
    >>> logps_fn = logprobs.make_logps_fn(lambda p, _, batch: p["embed"][batch.tokens_RT],
    ...                                   lambda p, _: p["embed"].T)
    >>> rows = rows._replace(ref_logps_RS2=make_stats_step(logps_fn)(params, None, rows).logps)
    >>> loss, tx = losses.sigmoid(0.1), optax.sgd(1.0)
    >>> train = make_train_step(logps_fn, loss, tx, score_fn=scores.make_score_fn(loss))
    >>> state = init_state(params, tx)
    >>> for _ in range(3):
    ...     state, output = jax.jit(train)(state, None, rows)
    ...     print(f"{output.metrics['loss']:.4f} {float(output.pairs.score[0, 0]):.4f}")
    0.6931 0.0693
    0.6785 0.0454
    0.6643 0.0287
    """
    if weight_fn is not None and score_fn is None:
        raise ValueError("weight_fn needs the scores of score_fn. Give both, or neither.")
    if beta_alpha is not None and (accumulate > 1 or loss.name not in losses.BETA_SCALES_REWARDS):
        raise ValueError(
            f"beta_alpha={beta_alpha} needs accumulate=1, not {accumulate}, because beta follows "
            f"the whole batch, and one of the losses {', '.join(losses.BETA_SCALES_REWARDS)}, not "
            f"{loss.name!r}. Change these, or leave beta_alpha at None."
        )

    def adapted(beta, stats, ref_RS2, weight_RS):
        if beta_alpha is None:
            return None, beta
        ratio = stats.logps - ref_RS2
        margin_RS = ratio[..., 0] - ratio[..., 1]
        return adapt_beta(beta, margin_RS, weight_RS, beta=loss.beta, alpha=beta_alpha)

    def part_objective(params, frozen, part, total_weight, now, beta):
        found: Any = logps_fn(params, frozen, part)
        stats, penalty = found if penalty_weight else (found, None)
        seen = jax.lax.stop_gradient(stats)
        pairs = None if score_fn is None else score_fn(seen, part.ref_logps_RS2)
        weight_RS = _pair_weight(part, seen.tokens[..., 0] if token_weighted else None)
        if weight_fn is not None and pairs is not None:
            weight_RS = weight_fn(pairs, weight_RS, *(() if now.soft is None else (now.soft,)))
        # The reference of a pair without weight may be unknown, and nan would reach the gradient.
        ref_RS2 = jnp.where(weight_RS[..., None] > 0, part.ref_logps_RS2, 0.0)
        factor, beta = adapted(beta, seen, ref_RS2, weight_RS)
        loss_RS = pair_losses(loss, stats, ref_RS2, nll_weight=now.nll_weight, reward_factor=factor)
        # where, not *: an empty slot adds exactly 0, whatever the loss makes of its zeros.
        loss_RS = jnp.where(weight_RS > 0, loss_RS, 0.0)
        value = jnp.sum(loss_RS * weight_RS) / total_weight
        if penalty is not None:  # the parts' mean, kept row by row like the other results
            value = value + penalty_weight * penalty / accumulate
            penalty = jnp.broadcast_to(penalty, part.tokens_RT.shape[:1])
        return value, (seen, pairs, factor, beta, penalty)

    grad_fn = jax.value_and_grad(part_objective, has_aux=True)

    def whole(params, frozen, batch, *now):
        if accumulate == 1:
            return grad_fn(params, frozen, batch, *now)
        rows = batch.tokens_RT.shape[0]
        if rows % accumulate:
            raise ValueError(
                f"{rows} rows do not divide into {accumulate} accumulation parts. Choose a "
                f"train.accumulate that divides the rows of a step."
            )
        parts = jax.tree.map(
            lambda x: x.reshape(accumulate, rows // accumulate, *x.shape[1:]), batch
        )

        def body(carry, part):
            (value, aux), grads = grad_fn(params, frozen, part, *now)
            return jax.tree.map(jnp.add, carry, (value, grads)), aux

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (value, grads), aux = jax.lax.scan(body, zero, parts)
        return (value, jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), aux)), grads

    def step(
        state: TrainState,
        frozen: Any,
        batch: batches.PackedBatch,
        now: Now = Now(),  # noqa: B008, immutable
    ):
        if now.nll_weight is None:
            now = now._replace(nll_weight=nll_weight)
        if now.soft is not None and weight_fn is None:
            raise ValueError("Now.soft is for weight_fn, which this step was made without.")
        if (beta_alpha is None) == isinstance(state.beta, BetaState):
            raise ValueError(
                f"beta_alpha={beta_alpha} needs a state made with init_state(..., adaptive_beta="
                f"{beta_alpha is not None}); this one has beta={state.beta}."
            )
        weight_RS = _pair_weight(batch, _chosen_tokens(batch) if token_weighted else None)
        total_weight = jnp.maximum(weight_RS.sum(), 1e-8)
        (value, (stats, pairs, factor, beta, penalty)), grads = whole(
            state.params, frozen, batch, total_weight, now, state.beta
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "num_tokens": jnp.sum(batch.segment_RT > 0).astype(jnp.float32),
            **pair_metrics(stats, batch.ref_logps_RS2, weight_RS, loss.beta),
        }
        if penalty is not None:
            metrics["router_aux"] = jnp.mean(penalty)
        if factor is not None:
            metrics["selection/beta"] = loss.beta * factor
        return TrainState(state.step + 1, params, opt_state, beta), StepOutput(metrics, pairs)

    return step


def make_stats_step(logps_fn: logprobs.LogpsFn):
    """Makes a forward-only `step(params, frozen, batch) -> SequenceStats` of [R, S, 2] arrays.

    The reference pass and the preference evaluation are this step.

    >>> rows = batches.empty(1, 8, 1)  # one pair: prompt 1 2, chosen 3 3, rejected 4 4
    >>> rows.tokens_RT[0] = [1, 2, 3, 3, 1, 2, 4, 4]
    >>> rows.segment_RT[0] = [1, 1, 1, 1, 2, 2, 2, 2]
    >>> rows.completion_RT[0] = [False, False, True, True] * 2
    >>> rows.pair_RS[0], rows.weight_RS[0] = 0, 1.0
    >>> embed = jnp.zeros((5, 2))  # a model that finds each of 5 tokens equally likely
    >>> logps_fn = logprobs.make_logps_fn(lambda p, _, b: p[b.tokens_RT], lambda p, _: p.T)
    >>> stats = make_stats_step(logps_fn)(embed, None, rows)
    >>> (stats.logps / jnp.log(5)).tolist(), stats.tokens.tolist()
    ([[[-2.0, -2.0]]], [[[2.0, 2.0]]])
    """

    def step(params: Any, frozen: Any, batch: batches.PackedBatch) -> logprobs.SequenceStats:
        return jax.lax.stop_gradient(logps_fn(params, frozen, batch))

    return step


def make_score_step(logps_fn: logprobs.LogpsFn, score_fn: ScoreFn):
    """Makes a forward-only `step(params, frozen, batch) -> PairScores` of [R, S] arrays.

    >>> def logps_fn(params, frozen, batch):  # a real one comes from logprobs.make_logps_fn
    ...     zero = jnp.zeros((1, 1, 2))
    ...     return logprobs.SequenceStats(params * jnp.array([-3.0, -2.0]) + zero, zero + 2,
    ...                                   zero + 0.5, zero, zero, zero, zero)
    >>> rows = batches.empty(1, 8, 1)._replace(pair_RS=jnp.array([[7]]))
    >>> score = jax.jit(make_score_step(logps_fn, scores.make_score_fn(losses.sigmoid(0.1))))
    >>> pairs = score(1.0, None, rows)
    >>> pairs.likelihood_margin.tolist(), pairs.margin_error.tolist()
    ([[-1.0]], [[1.0]])
    """

    def step(params: Any, frozen: Any, batch: batches.PackedBatch) -> scores.PairScores:
        stats = jax.lax.stop_gradient(logps_fn(params, frozen, batch))
        return score_fn(stats, batch.ref_logps_RS2)

    return step


def make_eval_step(logps_fn: logprobs.LogpsFn, loss: losses.Loss):
    """Makes a forward-only evaluation step.

    Args:
        logps_fn: as in `make_train_step`.
        loss: the pair loss to report.

    Returns:
        An un-jitted `step(params, frozen, batch) -> (SequenceStats, loss_RS)`. Unreduced, so that
        the mean over many batches is the mean over pairs, not over batches.

    >>> def logps_fn(params, frozen, batch):  # a real one comes from logprobs.make_logps_fn
    ...     zero = jnp.zeros((1, 1, 2))
    ...     return logprobs.SequenceStats(params * jnp.array([-3.0, -2.0]) + zero, zero + 2,
    ...                                   zero + 0.5, zero, zero, zero, zero)
    >>> rows = batches.empty(1, 8, 1)._replace(pair_RS=jnp.array([[7]]))
    >>> stats, loss_RS = jax.jit(make_eval_step(logps_fn, losses.sigmoid(0.1)))(1.0, None, rows)
    >>> stats.logps.tolist(), [round(float(x), 4) for x in loss_RS[0]]  # ln(1 + exp(0.1))
    ([[[-3.0, -2.0]]], [0.7444])
    """

    def step(params: Any, frozen: Any, batch: batches.PackedBatch):
        stats = jax.lax.stop_gradient(logps_fn(params, frozen, batch))
        loss_RS = pair_losses(loss, stats, batch.ref_logps_RS2)
        return stats, jnp.where(batch.pair_RS >= 0, loss_RS, 0.0)

    return step
