"""The jitted programs of a run: what the loop runs is what `sage-jax compile` compiles.

Each takes a `setup.Policy` whose weights may be arrays or `jax.ShapeDtypeStruct`s; only their
shapes are read here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sage_jax import config, losses, selection, step
from sage_jax.models import lora, quantised
from sage_jax.runtime import mesh as meshes
from sage_jax.runtime import setup, state

# Programs of a kind that a process keeps: runs that are alike, one after another, trace and compile
# them once. All that a program depends on is an argument of what is cached.
KEPT = 16


class _Flat(NamedTuple):
    """A tree of hashable leaves as something hashable."""

    leaves: tuple[Any, ...]
    structure: Any

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)


def _flat(tree: Any) -> _Flat:
    leaves, structure = jax.tree.flatten(tree)
    return _Flat(tuple(leaves), structure)


def train_step(
    run: config.Run,
    policy: setup.Policy,
    mesh: jax.sharding.Mesh,
    tx: optax.GradientTransformation,
    loss: losses.Loss,
    score_fn: step.ScoreFn,
) -> Any:
    """The optimizer step `(state, frozen, rows, step.Now) -> (state, StepOutput)`.

    `frozen` is that of the policy: None, or the weights below its adapters.

    Args:
        run: the settings.
        policy: the model, and its weights or their shapes.
        mesh: where everything lives.
        tx: the optimizer, from `state.make_optimizer`.
        loss: the pair loss.
        score_fn: scores of pairs, left out of the program where nothing reads them.

    Returns:
        The jitted step, which donates its state.
    """
    uses_scores = (
        config.needs_scores(run) or run.curriculum.sharpness > 0 or run.selection.soft != 0
    ) or run.selection.guard != "off"
    return _train_step(
        policy.form,
        mesh,
        _flat(state.state_shardings(run, tx, policy.params, mesh)),
        tx,
        loss,
        score_fn if uses_scores else None,
        logit_norm="logit_norm" in run.selection.stability,
        # -1: each round's, in `step.Now`
        soft=max(run.selection.soft, 0.0) if run.selection.soft else None,
        nll_weight=run.loss.nll_weight,
        token_weighted=run.loss.name == "sft",
        accumulate=run.train.accumulate,
        beta_alpha=state.beta_alpha(run),
        penalty_weight=setup.router_aux(run, policy.model),
    )


@functools.lru_cache(maxsize=KEPT)
def _train_step(
    form: setup.Policy,
    mesh: jax.sharding.Mesh,
    flat: _Flat,
    tx: optax.GradientTransformation,
    loss: losses.Loss,
    score_fn: step.ScoreFn | None,
    *,
    logit_norm: bool,
    soft: float | None,
    penalty_weight: float,
    **settings: Any,
) -> Any:
    def weigh(pairs, weight, tau=soft):
        return selection.soft_weights(pairs.score, tau, weight)

    train = step.make_train_step(
        form.logps_fn(logit_norm=logit_norm, penalty=penalty_weight > 0),
        loss,
        tx,
        score_fn=score_fn,
        weight_fn=None if soft is None else weigh,
        penalty_weight=penalty_weight,
        **settings,
    )
    placed = flat.tree
    return jax.jit(
        train,
        in_shardings=(placed, None, meshes.batch_sharding(mesh), None),
        out_shardings=(placed, meshes.replicated(mesh)),
        donate_argnums=0,
    )


def now(run: config.Run, *, nll_weight: Any = 0.0, soft: Any = 0.0) -> step.Now:
    """What of a step may change in this run; the rest is constant in its program."""
    return step.Now(
        nll_weight if run.loss.nll_auto else None, soft if run.selection.soft == -1 else None
    )


def stats_step(
    policy: setup.Policy,
    mesh: jax.sharding.Mesh,
    *,
    logit_norm: bool = False,
    light: bool = False,
    dtype: str = "",
) -> Any:
    """The forward pass `(params, frozen, rows) -> SequenceStats`: reference, evaluation, scoring.

    Args:
        policy: the model, and its weights or their shapes.
        mesh: where everything lives.
        logit_norm, light: see `logprobs.make_logps_fn`.
        dtype: of the matmuls; "" is the model's. Others take weights that `forward.cast` prepared.
    """
    params = policy.params
    if dtype == "int8":
        params = jax.eval_shape(quantised.for_scoring, params)
    placed = _flat(meshes.shardings(params, mesh))
    return _stats_step(policy.form, mesh, placed, logit_norm, light, dtype)


@functools.lru_cache(maxsize=KEPT)
def _stats_step(
    form: setup.Policy,
    mesh: jax.sharding.Mesh,
    flat: _Flat,
    logit_norm: bool,
    light: bool,
    dtype: str,
) -> Any:
    return jax.jit(
        step.make_stats_step(form.logps_fn(logit_norm=logit_norm, light=light, dtype=dtype)),
        in_shardings=(flat.tree, None, meshes.batch_sharding(mesh)),
        out_shardings=meshes.replicated(mesh),
    )


def sampler(
    policy: setup.Policy, *, prompts: int, prompt_length: int, max_new_tokens: int
) -> tuple[Any, tuple[Any, ...]]:
    """Greedy decoding of evaluations, and the shapes that it takes.

    Args:
        policy: the model, and its weights or their shapes.
        prompts: decoded at a time.
        prompt_length: tokens, padding counted.
        max_new_tokens: of an answer.

    Returns:
        The jitted function and its abstract arguments.
    """
    from sage_jax.generate import sampler as samplers

    ends = policy.model.spec.eos_ids or (0,)
    program = samplers.compiled(policy.model, max_new_tokens, ends, 0.0, 1.0, policy.rows)
    bits = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), prompts)))
    shape = (prompts, prompt_length)
    params = policy.params if policy.lora is None else lora.lay(policy.frozen, policy.params)
    arguments = (
        params,
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=policy.rows),
        jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=policy.rows),
        jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=policy.rows),
    )
    return program, arguments
