"""The train state of a run: its optimizer, its shapes, and where each leaf of it lives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from sage_jax import config, optim, step
from sage_jax.runtime import mesh as meshes


def make_optimizer(run: config.Run):
    """The optimizer and its schedule, with warm-up in steps."""
    settings = dataclasses.asdict(run.optim)
    settings["warmup"] = round(run.optim.warmup * run.train.steps)
    return optim.make(**settings, steps=run.train.steps)


def state_shardings(tx, params: Any, mesh: jax.sharding.Mesh) -> step.TrainState:
    """Where the train state lives: moments beside their weights."""
    placed = meshes.shardings(params, mesh)
    whole: Any = meshes.replicated(mesh)
    return step.TrainState(whole, placed, meshes.state_shardings(tx, params, mesh))


def abstract_state(run: config.Run, params: Any, mesh: jax.sharding.Mesh) -> step.TrainState:
    """Shapes and shardings of the train state of a run, to restore a checkpoint by."""
    tx, _ = make_optimizer(run)
    shapes = jax.eval_shape(lambda p: step.init_state(p, tx), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(tx, params, mesh),
    )
