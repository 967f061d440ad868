"""The round loop: draw, score, select, train, remember; interrupted anywhere, it goes on the same.

A row `step: s` of metrics.jsonl describes the policy after s updates: the loss and rewards on the
batch of update s + 1, taken before it, and the evaluation if one is due. So step 0 is the reference
itself, and the last row holds the final evaluation alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import batch, config, curriculum, logprobs, optim, scores, selection, step
from sage_jax.data import encode, pipeline
from sage_jax.report import progress, writers
from sage_jax.runtime import checkpoint, rounds, setup
from sage_jax.runtime import mesh as meshes

Evaluate = Callable[[Any], dict[str, float]]


@dataclasses.dataclass
class Counters:
    """What has been spent so far; in every checkpoint."""

    step: int = 0
    position: int = 0  # steps done in the current round
    pairs: int = 0
    tokens: int = 0
    flops_scoring: float = 0.0
    flops_training: float = 0.0
    seconds_drawing: float = 0.0
    seconds_scoring: float = 0.0
    seconds_training: float = 0.0


class Outcome(NamedTuple):
    """The end of a run, or of the part of it that a SIGTERM allowed."""

    params: Any
    counters: Counters
    finished: bool
    rows: list[dict[str, Any]]  # of metrics.jsonl


class Pending(NamedTuple):
    """A step whose results are still on the device."""

    step: int
    row: dict[str, Any]
    pair_RS: np.ndarray
    output: step.StepOutput


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM and the first Ctrl-C, so that the loop can save before it ends."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pair_flops(policy: setup.Policy, pairs: encode.EncodedPairs) -> np.ndarray:
    """Floating-point operations of one forward pass over each pair, float64 [N]."""
    lengths = pairs.lengths_N2.astype(np.float64)
    per_token = policy.model.forward_flops(1, 0)
    per_score = policy.model.forward_flops(0, 1)
    return (lengths * per_token + lengths * (lengths + 1) / 2 * per_score).sum(axis=1)


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


class Trainer:
    """Owner of one training run in one directory: its state, memory, files and checkpoints."""

    def __init__(
        self,
        run: config.Run,
        workdir: pathlib.Path,
        *,
        policy: setup.Policy,
        passes: setup.Passes,
        pairs: encode.EncodedPairs,
        start: logprobs.SequenceStats | None,
        reference: np.ndarray,
        evaluate: Evaluate,
        label: str,
    ):
        self.run, self.workdir, self.label = run, workdir, label
        self.policy, self.passes, self.pairs = policy, passes, pairs
        self.start, self.reference, self.evaluate = start, reference, evaluate
        self.loss = setup.make_loss(run)
        self.score_fn = setup.make_score_fn(run, self.loss)
        self.flops_N = pair_flops(policy, pairs)
        self._build_step()
        self.memory = self._first_memory()
        self.round: rounds.Round | None = None
        self.round_metrics: dict[str, float] = {}
        self.counters = Counters()
        self.pending: Pending | None = None
        self.clock = time.perf_counter()

    def _build_step(self) -> None:
        run, mesh = self.run, self.passes.mesh
        tx, schedule = make_optimizer(run)
        self.learning_rate = np.asarray(jax.vmap(schedule)(jnp.arange(run.train.steps)))
        state = state_shardings(tx, self.policy.params, mesh)
        # A copy: the step donates its state, and the reference weights outlive this run.
        self.state = jax.jit(
            lambda p: step.init_state(jax.tree.map(jnp.copy, p), tx), out_shardings=state
        )(self.policy.params)
        uses_scores = run.selection.name in selection.NEEDS_SCORES or run.curriculum.sharpness > 0
        weigh = None
        if run.selection.soft:
            weigh = lambda pairs, weight: selection.soft_weights(  # noqa: E731
                pairs.score, run.selection.soft, weight
            )
        train_step = step.make_train_step(
            self.policy.logps_fn(logit_norm=run.selection.stability == "logit_norm"),
            self.loss,
            tx,
            score_fn=self.score_fn if uses_scores else None,
            weight_fn=weigh,
            nll_weight=run.loss.nll_weight,
            token_weighted=run.loss.name == "sft",
            accumulate=run.train.accumulate,
        )
        self.train_step = jax.jit(
            train_step,
            in_shardings=(state, None, meshes.batch_sharding(mesh)),
            out_shardings=(state, meshes.replicated(mesh)),
            donate_argnums=0,
        )

    def _first_memory(self) -> curriculum.Memory:
        """The pass over the starting policy has already scored every pair."""
        memory = curriculum.init_memory(len(self.pairs))
        if self.start is None:
            return memory
        first = jax.device_get(self.score_fn(self.start, self.reference))
        return curriculum.remember(
            memory, np.arange(len(self.pairs)), first, round=-1, trained=False
        )

    # -- a round ---------------------------------------------------------------------------------

    def _score_pool(self, index_P: np.ndarray) -> scores.PairScores:
        if self.run.selection.scoring == "memory":
            return rounds.remembered_scores(self.memory, index_P, self.loss, self.run)
        start = time.perf_counter()
        stats = self.passes.stats(
            self.state.params,
            self.pairs,
            index_P,
            logit_norm=self.run.selection.stability == "logit_norm",
        )
        found = jax.device_get(self.score_fn(stats, self.reference[index_P]))
        number = self.round.number + 1 if self.round else 0
        self.memory = curriculum.remember(self.memory, index_P, found, round=number, trained=False)
        self.counters.flops_scoring += float(self.flops_N[index_P].sum())
        self.counters.seconds_scoring += time.perf_counter() - start
        if self.run.selection.stability == "rounds":
            return rounds.remembered_scores(self.memory, index_P, self.loss, self.run)
        return found

    def _next_round(self) -> None:
        start, scored_before = time.perf_counter(), self.counters.seconds_scoring
        needs_scores = self.run.selection.name in selection.NEEDS_SCORES
        self.round, drawn = rounds.next_round(
            self.round.number + 1 if self.round else 0,
            self.memory,
            self.round.competence_K if self.round else None,
            run=self.run,
            pairs=self.pairs,
            shape=self.passes.shape,
            score_pool=self._score_pool if needs_scores else None,
        )
        self.memory = curriculum.note_drawn(self.memory, self.round.pool_P)
        self.counters.position = 0
        self.round_metrics = rounds.metrics(self.round, drawn)
        writers.write_selection(
            self.workdir, self.round.number, rounds.log_rows(self.round, drawn, self.pairs.origin)
        )
        spent = time.perf_counter() - start - (self.counters.seconds_scoring - scored_before)
        self.counters.seconds_drawing += spent
        self.clock = time.perf_counter()

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(self, checkpoints: checkpoint.Checkpoints) -> None:
        self._flush()
        if checkpoints.latest() == self.counters.step:
            return
        arrays = {f"memory.{k}": v for k, v in self.memory._asdict().items()}
        if self.round is not None:
            arrays |= {
                f"round.{k}": np.asarray(v)
                for k, v in self.round._asdict().items()
                if k != "number"
            }
        meta = {
            "config": config.as_dict(self.run),
            "counters": dataclasses.asdict(self.counters),
            "round": self.round.number if self.round else -1,
            "round_metrics": self.round_metrics,
        }
        checkpoints.save(self.counters.step, self.state, arrays, meta)

    def _restore(self, checkpoints: checkpoint.Checkpoints, at: int) -> None:
        self.state, arrays, meta = checkpoints.restore(at, self.state)
        refuse_changes(meta["config"], config.as_dict(self.run), self.workdir)
        parts: dict[str, dict[str, Any]] = {"memory": {}, "round": {}}
        for name, value in arrays.items():
            kind, _, field = name.partition(".")
            parts[kind][field] = value
        self.memory = curriculum.Memory(**parts["memory"])
        if meta["round"] >= 0:
            self.round = rounds.Round(number=meta["round"], **parts["round"])
        self.counters = Counters(**meta["counters"])
        self.round_metrics = meta["round_metrics"]

    # -- rows ------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Takes the last step's results from the device: a row, and fresh margins to remember."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        output = jax.device_get(pending.output)
        found = {k: float(v) for k, v in output.metrics.items()}
        if not math.isfinite(found["loss"]) or not math.isfinite(found["grad_norm"]):
            raise FloatingPointError(
                f"Step {pending.step}: the loss is {found['loss']} and the gradient norm "
                f"{found['grad_norm']}. Nothing of this step was saved. Lower config.optim.lr="
                f"{self.run.optim.lr:g}, or check the pairs of this step in selection/."
            )
        # From the end of one step to that of the next; evaluation and drawing set the clock anew.
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.counters.seconds_training += seconds
        tokens = int(found.pop("num_tokens"))
        self.counters.tokens += tokens
        self.writer.write(
            pending.row
            | found
            | {
                "num_tokens": self.counters.tokens,
                "perf/step_time": seconds,
                "perf/tokens_per_second": tokens / seconds,
            }
        )
        real = pending.pair_RS >= 0
        if output.pairs is not None:
            values = scores.PairScores(*(np.asarray(v)[real] for v in output.pairs))
            assert self.round is not None
            self.memory = curriculum.remember(
                self.memory, pending.pair_RS[real], values, round=self.round.number, trained=True
            )

    def _row(self) -> dict[str, Any]:
        spent = self.counters
        total = spent.flops_scoring + spent.flops_training
        return {
            "step": spent.step,
            "epoch": spent.pairs / len(self.pairs),
            "pairs": spent.pairs,
            "flops": total,
        }

    # -- the loop --------------------------------------------------------------------------------

    def train(self, stopped: Callable[[], bool]) -> Outcome:
        """Trains to the last step, or until `stopped()`; resumes from the latest checkpoint."""
        settings = self.run.checkpoint
        with checkpoint.Checkpoints(
            self.workdir / "checkpoints", keep=settings.keep, every=settings.every
        ) as checkpoints:
            at = checkpoints.latest()
            if at is not None:
                self._restore(checkpoints, at)
            self.writer = writers.MetricsWriter(self.workdir / "metrics.jsonl", (at or 0) - 1)
            steps = self.run.train.steps
            self.clock = time.perf_counter()
            with (
                self.writer,
                progress.Progress(steps, self.label, "steps", start=self.counters.step) as bar,
            ):
                while self.counters.step < steps and not stopped():
                    if self.round is None or self.counters.position == len(self.round.pair_KRS):
                        self._flush()
                        self._next_round()
                    self._train_round(bar, checkpoints, stopped)
                self._flush()
                finished = self.counters.step == steps
                if finished:
                    self.writer.write(self._row() | self.evaluate(self.state.params))
                self._save(checkpoints)
        rows = writers.read_rows(self.workdir / "metrics.jsonl")
        return Outcome(self.state.params, self.counters, finished, rows)

    def _train_round(self, bar, checkpoints, stopped) -> None:
        assert self.round is not None
        run, mesh = self.run, self.passes.mesh
        left = run.train.steps - self.counters.step
        plan = self.round.pair_KRS[: self.counters.position + left]
        batches = pipeline.batches(
            self.pairs, plan, self.passes.shape.row_length,
            ref_logps_N2=self.reference, start=self.counters.position,
        )  # fmt: skip
        with contextlib.closing(batches):
            for rows in batches:
                now = self.counters.step
                row = self._row() | {"learning_rate": float(self.learning_rate[now])}
                if self.counters.position == 0:
                    row |= self.round_metrics
                if now == 0 or (run.eval.every and now % run.eval.every == 0):
                    self._flush()
                    row |= self.evaluate(self.state.params)
                    self.clock = time.perf_counter()
                self.state, output = self.train_step(self.state, None, meshes.put(rows, mesh))
                self._flush()  # the step before, while this one runs
                self._account(rows, row)
                self.pending = Pending(now, row, np.asarray(rows.pair_RS), output)
                bar.update(1)
                if checkpoints.due(self.counters.step):
                    self._save(checkpoints)
                if stopped():
                    return

    def _account(self, rows: batch.PackedBatch, row: dict[str, Any]) -> None:
        """Counts a step's work, and what the row says of it."""
        spent = self.counters
        index = np.asarray(rows.pair_RS)[np.asarray(rows.pair_RS) >= 0]
        spent.step, spent.position = spent.step + 1, spent.position + 1
        spent.pairs += len(index)
        spent.flops_training += 3.0 * float(self.flops_N[index].sum())  # forward + 2 x backward
        total = spent.flops_scoring + spent.flops_training
        row |= {
            "perf/padding_fraction": float((rows.segment_RT == 0).mean()),
            "perf/scoring_fraction": spent.flops_scoring / total,
        }


def refuse_changes(old: dict[str, Any], new: dict[str, Any], workdir: pathlib.Path) -> None:
    """Raises when a workdir holds a run of another objective; names the keys."""
    changed = config.changed_keys(old, new)
    if changed:
        what = ", ".join(f"config.{k} was {a!r}, now {b!r}" for k, (a, b) in changed.items())
        raise ValueError(
            f"{workdir} holds a run with other settings: {what}. Use another --workdir, or the "
            f"settings that it was started with."
        )
