"""Programs that a process keeps: shared by runs that are alike, and by no others."""

import jax
import pytest

from sage_jax import config
from sage_jax.models import catalog
from sage_jax.runtime import lowering, programs, setup, state
from sage_jax.runtime import mesh as meshes

NAME = sorted(catalog.SPECS)[0]


def made(devices=1, **changes):
    """The train step and the forward pass of a run, of which only shapes are there."""
    run = config.replace(
        config.resolve({"model": {"path": f"spec:{NAME}"}, "train": {"batch_pairs": 8}}), **changes
    )
    run = config.settle_data(run, {})
    mesh = meshes.make_mesh(devices=jax.devices()[:devices])
    policy = lowering.abstract_policy(run, mesh)
    tx, _ = state.make_optimizer(run)
    loss = setup.make_loss(run)
    train = programs.train_step(run, policy, mesh, tx, loss, setup.make_score_fn(run, loss))
    return train, programs.stats_step(policy, mesh)


def test_runs_alike_share_their_programs():
    one = made()
    assert made(**{"seed": 5, "eval.every": 7, "checkpoint.every": 3, "selection.keep": 0.5}) == one


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.beta": 0.3}, {"loss.name": "ipo"}, {"loss.nll_weight": 0.5}, {"loss.nll_auto": 0.5},
        {"optim.lr": 3e-4}, {"optim.warmup": 0.4}, {"optim.name": "adafactor"}, {"train.steps": 7},
        {"train.accumulate": 2}, {"selection.soft": 0.7}, {"selection.kappa": 2.0},
        {"selection.damping": 0.5}, {"selection.stability": "logit_norm"},
        {"selection.temperature": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_the_step_makes_another_step(changes):
    (train, stats), (other, other_stats) = made(), made(**changes)
    assert (other is train) == ("loss.nll_auto" in changes)  # that is an argument of the step
    assert other_stats is stats


@pytest.mark.parametrize(
    "changes",
    [{"model.remat": "full"}, {"model.dtype": "bfloat16"}, {"lora.rank": 2}, {"devices": 2},
     {"model.attention": "blocks"}],
    ids=str,
)  # fmt: skip
def test_another_model_or_mesh_makes_other_programs(changes):
    assert not set(made()) & set(made(**changes))
