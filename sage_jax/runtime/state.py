"""The train state of a run: its optimizer, its shapes, and where each leaf of it lives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from sage_jax import config, optim, rules, step
from sage_jax.runtime import mesh as meshes


def make_optimizer(run: config.Run):
    """The optimizer and its schedule, with warm-up in steps."""
    settings = dataclasses.asdict(run.optim)
    settings["warmup"] = round(run.optim.warmup * run.train.steps)
    return _optimizer(**settings, steps=run.train.steps)


_optimizer = functools.lru_cache(maxsize=64)(optim.make)  # the same functions for the same settings


def beta_alpha(run: config.Run) -> float | None:
    """How far beta follows the batches, where the selection rule adapts it."""
    return rules.resolve(run.selection.name).beta_alpha


def init_state(run: config.Run, params: Any, tx) -> step.TrainState:
    """The state of a run before its first step."""
    return step.init_state(params, tx, adaptive_beta=beta_alpha(run) is not None)


def state_shardings(run: config.Run, tx, params: Any, mesh: jax.sharding.Mesh) -> step.TrainState:
    """Where the train state lives: moments beside their weights."""
    placed = meshes.shardings(params, mesh)
    whole: Any = meshes.replicated(mesh)
    moments = meshes.state_shardings(tx, params, mesh)
    beta = () if beta_alpha(run) is None else step.BetaState(whole)
    return step.TrainState(whole, placed, moments, beta)


def abstract_state(run: config.Run, params: Any, mesh: jax.sharding.Mesh) -> step.TrainState:
    """Shapes and shardings of the train state of a run, to restore a checkpoint by."""
    tx, _ = make_optimizer(run)
    shapes = jax.eval_shape(lambda p: init_state(run, p, tx), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(run, tx, params, mesh),
    )
