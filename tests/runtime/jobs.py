"""Small runs of the quickstart's decoder, loaded inside this process."""

import pathlib

import pytest

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.runtime import dataset, forward, setup
from sage_jax.runtime import mesh as meshes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def small_run(settings, **changes):
    """The quickstart's config with settings changed, as the launcher reads it."""
    given = [f"--config.{k}={v}" for k, v in (settings | changes).items()]
    command = ["train", f"--config={ROOT / 'configs/quickstart.py'}", "--workdir=x", *given]
    return config.resolve(launcher.parse(command)[1])


def loaded(run, base):
    """A model, its data and its reference log-probs, as a run has them on all virtual devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(base))
        mesh = meshes.make_mesh()
        policy = setup.load_policy(run, mesh)
        pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
        passes = forward.Passes(policy, mesh, setup.row_shape(run, pairs.lengths_N2, mesh))
        stats = forward.stored_stats(run, policy, passes, pairs, "reference")
    return {"policy": policy, "passes": passes, "pairs": pairs, "start": stats,
            "reference": stats.logps}  # fmt: skip
