"""Forward passes over a whole data set: the reference, fresh scores, held-out pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sage_jax import config, logprobs, step
from sage_jax.data import encode, pack, pipeline
from sage_jax.report import progress
from sage_jax.runtime import mesh as meshes
from sage_jax.runtime import reference, setup


class Passes:
    """Jitted forward passes over a data set, whose weights are an argument."""

    def __init__(self, policy: setup.Policy, mesh: jax.sharding.Mesh, shape: pack.RowShape):
        self.mesh, self.shape = mesh, shape
        rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
        placed = meshes.shardings(policy.params, mesh)
        self._jit = functools.partial(
            jax.jit, in_shardings=(placed, None, rows), out_shardings=whole
        )
        self._plain = self._jit(step.make_stats_step(policy.logps_fn()))
        self._normed: Callable[..., Any] | None = None
        self._policy = policy

    def stats(
        self,
        params: Any,
        pairs: encode.EncodedPairs,
        index_P: np.ndarray,
        *,
        logit_norm: bool = False,
        bar: progress.Progress | None = None,
    ) -> logprobs.SequenceStats:
        """Sums over the completions of some pairs, float32 [P, 2] in the order of `index_P`."""
        if logit_norm and self._normed is None:
            self._normed = self._jit(step.make_stats_step(self._policy.logps_fn(logit_norm=True)))
        run = self._normed if logit_norm else self._plain
        assert run is not None
        shape = self.shape
        plan = pack.plan(
            pairs.lengths_N2, index_P, row_length=shape.row_length, rows=shape.rows,
            slots=shape.slots,
        )  # fmt: skip
        place_N = np.full(len(pairs), -1, np.int64)
        place_N[index_P] = np.arange(len(index_P))
        out = logprobs.SequenceStats(
            *(np.zeros((len(index_P), 2), np.float32) for _ in logprobs.SequenceStats._fields)
        )
        batches = pipeline.batches(pairs, plan, shape.row_length)
        for rows in batches:
            got = jax.device_get(run(params, None, meshes.put(rows, self.mesh)))
            real = rows.pair_RS >= 0
            where = place_N[rows.pair_RS[real]]
            for target, value in zip(out, got, strict=True):
                target[where] = value[real]
            if bar is not None:
                bar.update(int(real.sum()))
        return out


def stored_stats(
    run: config.Run,
    policy: setup.Policy,
    passes: Passes,
    pairs: encode.EncodedPairs,
    label: str,
) -> logprobs.SequenceStats:
    """What a model says of every pair: from the store where it is known, else computed and kept.

    For the reference this is its log-probs; for the policy that training starts from, it fills the
    memory, so that the first selection costs no pass of its own. Mostly the two are one.
    """
    logit_norm = run.selection.stability == "logit_norm"
    store = reference.Store(setup.cache_directory(run.reference.store, "reference"))
    # The dtype policy and what is stored are part of the key: other numbers, another space.
    space = reference.space(policy.fingerprint, run.model.dtype, logit_norm=logit_norm)

    def compute(index: np.ndarray) -> logprobs.SequenceStats:
        few = len(index) <= run.reference.spot_check  # the check of what is stored
        with progress.Progress(len(index), label, "pairs", aside=few) as bar:
            return passes.stats(policy.params, pairs, index, logit_norm=logit_norm, bar=bar)

    return reference.fill(
        store, space, pairs.digest_N16, compute, spot_check=run.reference.spot_check
    )


def reference_logps(
    run: config.Run,
    policy: setup.Policy,
    passes: Passes,
    pairs: encode.EncodedPairs,
    start: logprobs.SequenceStats | None,
    other: setup.Policy | None,
) -> np.ndarray:
    """Reference log-probs, float32 [N, 2]: of `other`, else of the starting policy.

    Values that came with pre-tokenised rows take precedence; zeros when there is no starting policy
    to speak of, in supervised training.
    """
    if start is None:
        return np.zeros((len(pairs), 2), np.float32)
    logps = np.asarray(start.logps)
    if other is not None:
        theirs = Passes(other, passes.mesh, passes.shape)
        logps = np.asarray(stored_stats(run, other, theirs, pairs, "reference").logps)
    if pairs.ref_logps_N2 is not None:
        logps = np.where(np.isfinite(pairs.ref_logps_N2), pairs.ref_logps_N2, logps)
    return logps
