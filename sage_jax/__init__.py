"""Preference alignment that spends gradients where they count.

The modules named here are the functional API: pure functions of arrays, which need jax, numpy and
optax alone. The folders beside them (data, models, runtime, generate, report) are what the
`sage-jax` command is made of; they import what they need when they are used.
"""

from sage_jax import (
    batch,
    curriculum,
    logprobs,
    losses,
    noise,
    optim,
    rules,
    scores,
    selection,
    step,
)

__version__ = "0.1.0"

__all__ = [
    "batch",
    "curriculum",
    "logprobs",
    "losses",
    "noise",
    "optim",
    "rules",
    "scores",
    "selection",
    "step",
]
