"""Forward passes over pairs: the reference, held-out pairs, and the scores of a drawn pool."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import config, curriculum, logprobs, losses, scores
from sage_jax.data import encode, pipeline, steps
from sage_jax.models import quantised
from sage_jax.report import progress
from sage_jax.runtime import (
    ahead,
    counters,
    dataset,
    hosts,
    programs,
    reference,
    rounds,
    setup,
    sharing,
)  # fmt: skip
from sage_jax.runtime import mesh as meshes


class Passes:
    """Jitted forward passes over a data set, whose weights are an argument.

    Args:
        policy: the model.
        mesh: the devices.
        shape: of the rows of a step.
        whole: of the rows of these passes; None: the same.

    Attributes:
        flops: floating-point operations of the passes so far.
    """

    def __init__(
        self,
        policy: setup.Policy,
        mesh: jax.sharding.Mesh,
        shape: steps.Shape,
        whole: steps.Shape | None = None,
    ):
        self.mesh, self.shape, self.whole = mesh, shape, whole or shape
        self.flops = 0.0
        self.rows_L = meshes.local_rows(mesh, shape.rows)
        self._casts: dict[str, Any] = {}
        self._policy = policy
        self._programs: dict[tuple[bool, bool, str], ahead.Programs] = {}
        self.seconds_compiling = 0.0

    def _program(
        self, key: tuple[bool, bool, str], wanted: Sequence[int], params: Any, frozen: Any
    ) -> ahead.Programs:
        """A program that is compiled for rows of these lengths."""
        if key not in self._programs:
            logit_norm, light, dtype = key
            self._programs[key] = ahead.Programs(
                programs.stats_step(
                    self._policy, self.mesh, logit_norm=logit_norm, light=light, dtype=dtype
                )
            )
        self.seconds_compiling += self._programs[key].compile(
            wanted, lambda n: (params, frozen, ahead.rows_of(self.whole, n, self.mesh))
        )
        return self._programs[key]

    def _cast(self, weights: Any, dtype: str) -> Any:
        if dtype not in self._casts:
            fn = functools.partial(cast, dtype=dtype)
            placed = meshes.shardings(jax.eval_shape(fn, weights), self.mesh)
            self._casts[dtype] = jax.jit(fn, out_shardings=placed)
        return self._casts[dtype](weights)

    def stats(
        self,
        params: Any,
        pairs: encode.EncodedPairs,
        index_P: np.ndarray,
        *,
        logit_norm: bool = False,
        light: bool = False,
        dtype: str = "",
        bar: progress.Progress | None = None,
    ) -> logprobs.SequenceStats:
        """Sums over the completions of some pairs.

        Args:
            params: the weights.
            pairs: the data set.
            index_P: int, which of its pairs.
            logit_norm, light: see `logprobs.make_logps_fn`.
            dtype: of the matmuls; "" is the model's. The weights are cast once for the whole pass,
                on CPUs layer by layer.
            bar: shows how far the pass is.

        Returns:
            float32 [P, 2], in the order of `index_P`.
        """
        frozen = self._policy.frozen
        # Of bfloat16 weights of all layers XLA's CPU backend makes float32 ones, as a whole, before
        # it takes a layer's: there each layer's are rounded as they are used.
        if dtype and (dtype == "int8" or self.mesh.devices.flat[0].platform != "cpu"):
            params, frozen = self._cast((params, frozen), dtype)
        shape = self.whole
        # The device is at work while the host takes what came before. But on CPUs two programs at
        # once may meet in another order on another process, and wait for each other for ever.
        at_once = 0 if hosts.several() and jax.default_backend() == "cpu" else 1
        plan = steps.plan_pass(pairs, index_P, shape)
        self.flops += counters.flops(self._policy.model, pairs, plan, shape)
        place_N = np.full(len(pairs), -1, np.int64)
        place_N[index_P] = np.arange(len(index_P))
        out = logprobs.SequenceStats(
            *(np.zeros((len(index_P), 2), np.float32) for _ in logprobs.SequenceStats._fields)
        )

        def take(pair_RS: np.ndarray, found: logprobs.SequenceStats) -> None:
            real = pair_RS >= 0
            where = place_N[pair_RS[real]]
            for target, value in zip(out, jax.device_get(found), strict=True):
                target[where] = value[real]
            if bar is not None:
                bar.update(int(real.sum()))

        started: collections.deque = collections.deque()
        program = self._program(
            (logit_norm, light, dtype), ahead.lengths(plan, pairs, shape), params, frozen
        )
        batches = pipeline.batches(pairs, plan, shape.row_length, rows_L=self.rows_L, shape=shape)
        for pair_RS, rows in zip(plan, batches, strict=True):
            given = meshes.put(rows, self.mesh, shape.rows)
            started.append((pair_RS, program(rows.tokens_RT.shape[1], params, frozen, given)))
            if len(started) > at_once:
                take(*started.popleft())
        for one in started:
            take(*one)
        return out


def cast(weights: tuple[Any, Any], dtype: str) -> tuple[Any, Any]:
    """Trained and frozen weights as a pass in `dtype` takes them.

    Matrices in that dtype; the scales of norms and what is quantised stay, as the model reads them.
    "int8": the linear maps in the layers, see `quantised.for_scoring`.
    """
    if dtype == "int8":
        params, frozen = weights
        return quantised.for_scoring(params), frozen and quantised.for_scoring(frozen)

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = meshes.leaf_name(path)
        kept = "norm" in name or name.rsplit("/", 1)[-1] in quantised.LEAVES
        return leaf if kept else leaf.astype(jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(one, weights)


class Scored(NamedTuple):
    """What is known of a pool, and what it took to know it."""

    pairs: scores.PairScores  # of the pool
    memory: curriculum.Memory  # with the margins that were computed
    flops: float = 0.0  # 0: nothing was computed
    seconds: float = 0.0  # without compilation
    seconds_compiling: float = 0.0


class Scorer:
    """Scores drawn pools by the settings of a run: from the memory, a forward pass, or both."""

    def __init__(
        self,
        run: config.Run,
        policy: setup.Policy,
        passes: Passes,
        pairs: encode.EncodedPairs,
        reference_N2: np.ndarray,
        loss: losses.Loss,
    ):
        self.run, self.loss, self.reference_N2 = run, loss, reference_N2
        if run.selection.scoring_dtype == "int8":
            quantised.library()  # not there: better now than after the first round
        self.passes, self.pairs = passes, pairs
        # Dozens of small operations, which take as long as a batch when they are not one program.
        self.score_fn = jax.jit(setup.make_score_fn(run, loss))
        self.rescore = jax.jit(rounds.make_rescore_fn(run, loss))
        self._sizes: set[int] = set()  # of passes whose scores have been compiled
        if run.selection.scoring_tokens:
            self.pairs = dataset.first_tokens(pairs, run.selection.scoring_tokens)
            shapes = sharing.shapes(
                run, policy.model, passes.mesh, self.pairs, share=passes.shape.share
            )
            self.passes = Passes(policy, passes.mesh, *shapes)
        self.whole_N = (self.pairs.lengths_N2 == pairs.lengths_N2).all(axis=1)

    def __call__(
        self,
        params: Any,
        memory: curriculum.Memory,
        index_P: np.ndarray,
        *,
        number: int,
        moved: bool = True,
    ) -> Scored:
        """Scores a pool.

        Args:
            params: the weights now.
            memory: what is remembered of every pair.
            index_P: int, the pairs of the pool.
            number: of the round.
            moved: whether the weights have changed since the memory was filled. Before the first
                step what is remembered is exact, and nothing is computed.
        """
        chosen = self.run.selection
        share = chosen.refresh if moved else 0.0
        place = rounds.stalest(memory.last_round[index_P], share, seed=self.run.seed, number=number)
        if not len(place):
            return Scored(self._remembered(memory, index_P), memory)
        start, before = time.perf_counter(), self.passes.seconds_compiling
        flops = self.passes.flops
        index = index_P[place]
        stats = self.passes.stats(
            params, self.pairs, index,
            logit_norm="logit_norm" in chosen.stability, light=True, dtype=chosen.scoring_dtype,
        )  # fmt: skip
        compiling = self.passes.seconds_compiling - before + self._compile(stats, len(index))
        found = jax.device_get(self.score_fn(stats, self.reference_N2[index]))
        whole = self.whole_N[index]
        memory = curriculum.remember(
            memory, index[whole], scores.PairScores(*(x[whole] for x in found)), round=number
        )
        pairs = self._remembered(memory, index_P)
        if not whole.all():
            pairs = self._capped(pairs, found, place, whole)
        return Scored(
            pairs,
            memory,
            self.passes.flops - flops,
            time.perf_counter() - start - compiling,
            compiling,
        )

    def _compile(self, stats: logprobs.SequenceStats, size: int) -> float:
        """Compiles the scores of a pass of a new size; returns the seconds that took."""
        start = time.perf_counter()
        if size not in self._sizes:
            self._sizes.add(size)
            self.score_fn(stats, np.zeros((size, 2), np.float32))
        return time.perf_counter() - start

    def _remembered(self, memory: curriculum.Memory, index_P: np.ndarray) -> scores.PairScores:
        return rounds.remembered_scores(memory, index_P, self.loss, self.run, self.rescore)

    def _capped(
        self, known: scores.PairScores, found: scores.PairScores, place: np.ndarray, whole: Any
    ) -> scores.PairScores:
        """Ranks cut pairs by the part that was read; their reward margins stay the remembered ones.

        A margin of the first tokens is another quantity than that of the whole completions, which
        the memory holds and which the reference's log-probs belong to: it serves this round only.
        """
        margin, error = np.array(known.likelihood_margin), np.array(known.margin_error)
        margin[place[~whole]] = found.likelihood_margin[~whole]
        error[place[~whole]] = found.margin_error[~whole]
        return jax.device_get(self.rescore(known.reward_margin, margin, error))


def stored_stats(
    run: config.Run,
    policy: setup.Policy,
    passes: Passes,
    pairs: encode.EncodedPairs,
    label: str,
    spent: counters.Counters | None = None,
    *,
    aside: bool = False,
) -> logprobs.SequenceStats:
    """What a model says of every pair: from the store where it is known, else computed and kept.

    For the reference this is its log-probs; for the policy that training starts from, it fills the
    memory, so that the first selection costs no pass of its own. Mostly the two are one. What had
    to be computed is added to `spent`, compilation and the check of stored values with it. `aside`
    as in `progress.Progress`.
    """
    logit_norm = "logit_norm" in run.selection.stability
    store = reference.Store(setup.cache_directory(run.reference.store, "reference"))
    # The dtype policy and what is stored are part of the key: other numbers, another space.
    space = reference.space(policy.fingerprint, run.model.dtype, logit_norm=logit_norm)

    def compute(index: np.ndarray) -> logprobs.SequenceStats:
        few = aside or len(index) <= run.reference.spot_check  # the check of what is stored
        began, before = time.perf_counter(), passes.flops
        with progress.Progress(len(index), label, "pairs", aside=few) as bar:
            found = passes.stats(policy.params, pairs, index, logit_norm=logit_norm, bar=bar)
        if spent is not None:
            spent.pairs_reference += len(index)
            spent.flops_reference += passes.flops - before
            spent.seconds_reference += time.perf_counter() - began
        return found

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
    spent: counters.Counters | None = None,
) -> np.ndarray:
    """Reference log-probs, float32 [N, 2]: of `other`, else of the starting policy.

    Values that came with pre-tokenised rows take precedence; zeros when there is no starting policy
    to speak of, in supervised training.
    """
    if start is None:
        return np.zeros((len(pairs), 2), np.float32)
    logps = np.asarray(start.logps)
    if other is not None:
        theirs = Passes(other, passes.mesh, passes.shape, passes.whole)
        logps = np.asarray(stored_stats(run, other, theirs, pairs, "reference", spent).logps)
    if pairs.ref_logps_N2 is not None:
        logps = np.where(np.isfinite(pairs.ref_logps_N2), pairs.ref_logps_N2, logps)
    return logps
