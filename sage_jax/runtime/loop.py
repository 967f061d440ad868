"""The round loop: draw, score, select, train, remember; interrupted anywhere, it goes on the same.

A row `step: s` of metrics.jsonl describes the policy after s updates: the loss and rewards on the
batch of update s + 1, taken before it, and the evaluation if one is due. So step 0 is the reference
itself, and the last row holds the final evaluation alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import batch, config, curriculum, logprobs, noise, scores, step
from sage_jax.data import encode, pipeline, steps
from sage_jax.report import progress, writers
from sage_jax.runtime import (
    ahead,
    checkpoint,
    counters,
    displacement,
    forward,
    hosts,
    programs,
    resample,
    rounds,
    saved,
    setup,
    state,
    suspicion,
)  # fmt: skip
from sage_jax.runtime import mesh as meshes

Evaluate = Callable[[Any], dict[str, float]]


class Outcome(NamedTuple):
    """The end of a run, or of the part of it that a SIGTERM allowed."""

    params: Any
    counters: counters.Counters
    finished: bool
    rows: list[dict[str, Any]]  # of metrics.jsonl
    warnings: tuple[str, ...]  # of the displacement guard
    earlier: float  # seconds of the commands before this one, when it resumed
    flips: noise.Flips | None = None  # what became known of the labels; None: nothing watched them


class Pending(NamedTuple):
    """A step whose results are still on the device."""

    step: int
    row: dict[str, Any]
    flops: float
    pair_RS: np.ndarray
    output: step.StepOutput


class Trainer:
    """Owner of one training run in one directory: its state, memory, files and checkpoints."""

    def __init__(
        self,
        run: config.Run,
        workdir: pathlib.Path,
        *,
        policy: setup.Policy,
        passes: forward.Passes,
        pairs: encode.EncodedPairs,
        start: logprobs.SequenceStats | None,
        reference: np.ndarray,
        evaluate: Evaluate,
        label: str,
        began: float | None = None,
        spent: counters.Counters | None = None,
        resampler: resample.Resampler | None = None,
    ):
        """Makes the first state.

        Of what is not obvious: `began` is the perf_counter at the command's start, `spent` holds
        what the reference pass cost.
        """
        self.began = time.perf_counter() if began is None else began
        self.earlier = 0.0
        run = config.settle_data(run, pairs.columns)
        self.run, self.workdir, self.label = run, workdir, label
        self.policy, self.passes, self.pairs = policy, passes, pairs
        self.start, self.reference, self.evaluate = start, reference, evaluate
        self.first_pairs, self.resampler = pairs, resampler
        self.resampled: list[resample.Entry] = []
        self.loss = setup.make_loss(run)
        self.score_fn = setup.make_score_fn(run, self.loss)
        self.flops_N = counters.pair_flops(policy.model, pairs, shared=passes.shape.share)
        self.scorer = forward.Scorer(run, policy, passes, pairs, reference, self.loss)
        self.peak_flops = counters.peak_flops(run.model.dtype)
        self._build_step()
        self.memory = self._first_memory()
        self.round: rounds.Round | None = None
        self.round_metrics: dict[str, float] = {}
        self.spent = counters.Counters() if spent is None else spent
        self.counters = dataclasses.replace(self.spent)
        self.guard = displacement.Guard()
        self.say: Callable[[str], None] = print
        self.note: dict[str, str] = {}  # behind the progress
        self.pending: Pending | None = None
        self.clock = time.perf_counter()

    def _build_step(self) -> None:
        run, mesh = self.run, self.passes.mesh
        tx, schedule = state.make_optimizer(run)
        self.learning_rate = np.asarray(jax.vmap(schedule)(jnp.arange(run.train.steps)))
        placed = state.state_shardings(run, tx, self.policy.params, mesh)
        # A copy: the step donates its state, and the reference weights outlive this run.
        self.state = jax.jit(
            lambda p: state.init_state(run, jax.tree.map(jnp.copy, p), tx), out_shardings=placed
        )(self.policy.params)
        self.train_step = ahead.Programs(
            programs.train_step(run, self.policy, mesh, tx, self.loss, self.score_fn)
        )

    def _now(self) -> step.Now:
        """What may change from step to step, in the step to come."""
        loss, soft = self.run.loss, self.round.soft if self.round else None
        on = self.guard.nll_on(self.counters.step)
        return programs.now(
            self.run,
            nll_weight=np.float32(loss.nll_auto if on else loss.nll_weight),
            soft=np.float32(0.0 if soft is None else soft),
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
        found = self.scorer(
            self.state.params,
            self.memory,
            index_P,
            number=self.round.number + 1 if self.round else 0,
            moved=self.counters.step > 0,
        )
        self.memory = found.memory
        self.counters.flops_scoring += found.flops
        self.counters.seconds_scoring += found.seconds
        self.counters.seconds_compiling += found.seconds_compiling
        return found.pairs

    def _hold(self, pairs: encode.EncodedPairs, reference: np.ndarray) -> None:
        """Takes another data set; the memory, which is as long, is taken beside it."""
        self.pairs, self.reference = pairs, reference
        self.flops_N = counters.pair_flops(self.policy.model, pairs, shared=self.passes.shape.share)
        self.scorer = forward.Scorer(
            self.run, self.policy, self.passes, pairs, reference, self.loss
        )

    def _resample(self, stopped: Callable[[], bool]) -> dict[str, float]:
        """New pairs of the policy, where the round to come is due for them; `resample/*`."""
        number, every = self.round.number + 1 if self.round else 0, self.run.rounds.resample
        if self.resampler is None or self.round is None or number % every:
            return {}
        grown = self.resampler.grow(
            self.run, self.workdir, number, self.state.params,
            resample.Data(self.pairs, self.reference, self.memory, self.round.rule),
            loss=self.loss, score_fn=self.score_fn, stopped=stopped,
        )  # fmt: skip
        self._hold(grown.data.pairs, grown.data.reference)
        self.memory = grown.data.memory
        self.round = self.round._replace(rule=grown.data.rule)
        self.resampled.append(grown.entry)
        for name in ("flops_sampling", "flops_scoring", "seconds_sampling", "seconds_scoring"):
            spent = getattr(self.counters, name) + getattr(grown, name)
            setattr(self.counters, name, spent)
        if not grown.metrics["resample/pairs"]:
            self.say(resample.nothing_new(number, grown.metrics))
        return grown.metrics

    def _next_round(self) -> None:
        counted, start = self.counters, time.perf_counter()
        before = counted.seconds_scoring + counted.seconds_compiling
        needs_scores = config.needs_scores(self.run)
        self.round, drawn = rounds.next_round(
            self.round.number + 1 if self.round else 0,
            self.memory,
            self.round.competence_K if self.round else None,
            self.round.rule if self.round else None,
            run=self.run,
            loss=self.loss,
            pairs=self.pairs,
            shape=self.passes.shape,
            score_pool=self._score_pool if needs_scores else None,
            held=self.round.held if self.round else None,
        )
        self.round = hosts.agree(self.round)
        self.memory = curriculum.note_drawn(self.memory, self.round.pool_P)
        self.counters.position = 0
        self.round_metrics = rounds.metrics(self.round, drawn, self.run)
        self._suspect(drawn.flips)
        writers.write_selection(
            self.workdir, self.round.number, rounds.log_rows(self.round, drawn, self.pairs.origin)
        )
        elsewhere = counted.seconds_scoring + counted.seconds_compiling - before
        counted.seconds_drawing += time.perf_counter() - start - elsewhere
        self.clock = time.perf_counter()

    def _suspect(self, flips: noise.Flips | None) -> noise.Flips | None:
        """Lists the pairs that look flipped, where anything is known of that."""
        if flips is not None:
            suspicion.write(self.workdir, flips, self.memory, self.pairs, self.reference)
        return flips

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(self, checkpoints: checkpoint.Checkpoints) -> None:
        self._flush()
        if checkpoints.latest() == self.counters.step:
            return
        self.counters.seconds = self.earlier + time.perf_counter() - self.began
        kept = saved.Saved(
            self.memory, self.round, self.round_metrics, self.counters, self.guard, self.resampled,
            self.reference if self.resampled else None, self._content(),
        )  # fmt: skip
        checkpoints.save(self.counters.step, self.state, *saved.pack(kept, self.run))

    def _content(self) -> dict[str, str]:
        """What has to be the same when a run goes on, besides its settings."""
        pairs = hashlib.blake2b(self.first_pairs.digest_N16.tobytes(), digest_size=16).hexdigest()
        return {"data.train": pairs, "model.path": self.policy.fingerprint}

    def _restore(self, checkpoints: checkpoint.Checkpoints, at: int) -> None:
        self.state, arrays, meta = checkpoints.restore(at, self.state)
        saved.refuse_changes(meta["config"], config.as_dict(self.run), self.workdir)
        kept = saved.unpack(arrays, meta)
        saved.refuse_content(kept.content, self._content(), self.workdir)
        self.resampled = list(kept.resampled)
        if self.resampled:
            assert self.resampler is not None and kept.reference is not None
            pairs = self.resampler.replay(self.run, self.workdir, self.pairs, self.resampled)
            self._hold(pairs, kept.reference)
        self.memory, self.round, self.round_metrics = kept.memory, kept.round, kept.round_metrics
        self.counters, self.guard = kept.counters, kept.guard
        self.counters.add_reference(self.spent)
        self.earlier = self.counters.seconds

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
        found = self._watch(pending.step, found)
        clock = self.counters.clock()  # like the whole row: before this step
        # From the end of one step to that of the next; evaluation and drawing set the clock anew.
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.counters.seconds_training += seconds
        tokens = int(found.pop("num_tokens"))
        self.counters.tokens += tokens
        self.writer.write(
            pending.row
            | found
            | clock
            | {
                "num_tokens": self.counters.tokens,
                **counters.speed(tokens, pending.flops, seconds, self.peak_flops),
                **counters.peak_bytes(),
            }
        )
        self.note["loss"] = f"{found['loss']:.4f}"
        real = pending.pair_RS >= 0
        if output.pairs is not None:
            values = scores.PairScores(*(np.asarray(v)[real] for v in output.pairs))
            assert self.round is not None
            self.memory = curriculum.remember(
                self.memory, pending.pair_RS[real], values, round=self.round.number, trained=True
            )

    def _watch(self, number: int, found: dict[str, float]) -> dict[str, float]:
        """Tells the guard of a step; without a reference there is no displacement."""
        if self.run.loss.name == "sft":
            return {k: v for k, v in found.items() if not k.startswith("displacement/")}
        self._tell(displacement.watch(self.guard, number, found, self.run))
        return found | {"displacement/chosen_mean": self.guard.chosen_mean}

    def _tell(self, guard: displacement.Guard) -> None:
        """Takes the guard's next state, and says what is new in it."""
        for text in guard.warnings[len(self.guard.warnings) :]:
            self.say(f"Warning ({self.label}). {text}")
        self.guard = guard

    def _evaluated(self) -> dict[str, float]:
        found = hosts.agree(self.evaluate(self.state.params))
        step_now = self.counters.step
        self._tell(displacement.watch_evaluation(self.guard, step_now, found, self.run))
        if "eval_accuracy" in found:
            self.note["accuracy"] = f"{found['eval_accuracy']:.3f}"
        return found

    # -- the loop --------------------------------------------------------------------------------

    def train(self, stopped: Callable[[], bool]) -> Outcome:
        """Trains to the last step, or until `stopped()`; resumes from the latest checkpoint."""
        settings = self.run.checkpoint
        with checkpoint.Checkpoints(
            checkpoint.directory(self.run, self.workdir),
            keep=settings.keep,
            every=settings.every,
        ) as checkpoints:
            at = hosts.agree(checkpoints.latest())
            if at is not None:
                self._restore(checkpoints, at)
            self.writer = writers.MetricsWriter(self.workdir / "metrics.jsonl", (at or 0) - 1)
            steps = self.run.train.steps
            self.clock = time.perf_counter()
            with (
                self.writer,
                progress.Progress(steps, self.label, "steps", start=self.counters.step) as bar,
            ):
                self.say = bar.say
                while self.counters.step < steps and not stopped():
                    if self.round is None or self.counters.position == len(self.round.pair_KB):
                        self._flush()
                        try:
                            found = self._resample(stopped)
                        except resample.StoppedError:
                            break
                        self._next_round()
                        self.round_metrics |= found
                    self._train_round(bar, checkpoints, stopped)
                self._flush()
                finished = self.counters.step == steps
                if finished:
                    row = self.counters.row(len(self.pairs)) | self._evaluated()
                    self.writer.write(row | self.counters.clock())
                    bar.update(0, self._notes())
                self._save(checkpoints)
        flips = None
        if (self.memory.trained > 0).any():
            held = self.round.held if self.round else None
            flips = self._suspect(suspicion.detect(self.memory, self.run, self.pairs, held))
        rows = hosts.on_first(lambda: writers.read_rows(self.workdir / "metrics.jsonl"))
        return Outcome(
            self.state.params, self.counters, finished, rows, self.guard.warnings, self.earlier,
            flips,
        )  # fmt: skip

    def _train_round(self, bar, checkpoints, stopped) -> None:
        assert self.round is not None
        run, mesh = self.run, self.passes.mesh
        left = run.train.steps - self.counters.step
        shape, done = self.passes.shape, self.counters.position
        plan = self.round.pair_KB[done : done + left]
        length_N = self.pairs.row_lengths(shape.share)
        placed = steps.place(length_N, plan, shape, self.pairs if shape.keys else None)
        tokens_K = steps.tokens(self.pairs, placed, shape).sum(axis=1)
        batches = pipeline.batches(
            self.pairs, placed, shape.row_length,
            ref_logps_N2=self.reference, rows_L=self.passes.rows_L, shape=shape,
        )  # fmt: skip
        with contextlib.closing(batches):
            self._compile(ahead.lengths(placed, self.pairs, shape), bar)
            for pair_B, pair_RS, tokens in zip(plan, placed, tokens_K, strict=True):
                rows, waited = self._next_batch(batches)
                now = self.counters.step
                row = self.counters.row(len(self.pairs))
                row["learning_rate"] = float(self.learning_rate[now])
                if self.counters.position == 0:
                    row |= self.round_metrics
                if now == 0 or (run.eval.every and now % run.eval.every == 0):
                    self._flush()
                    row |= self._evaluated()
                    self.clock = time.perf_counter()
                changing = self._now()
                if changing.nll_weight is not None:
                    row["loss/nll_weight"] = float(changing.nll_weight)
                given = meshes.put(rows, mesh, shape.rows)
                length = rows.tokens_RT.shape[1]
                self.state, output = self.train_step(
                    length, self.state, self.policy.frozen, given, changing
                )
                self._flush()  # the step before, while this one runs
                self.counters.seconds_waiting += waited
                flops = counters.train_passes(self.run) * self._flops(pair_RS)
                self.counters.count(int((pair_B >= 0).sum()), flops)
                row["perf/padding_fraction"] = 1 - float(tokens) / (shape.rows * length)
                row["perf/scoring_fraction"] = self.counters.flops_scoring / self.counters.flops
                row["perf/scoring_seconds_fraction"] = self.counters.scoring_seconds_fraction
                row["perf/data_wait_fraction"] = self.counters.data_wait_fraction
                self.pending = Pending(now, row, flops, pair_RS, output)
                bar.update(1, self._notes())
                if checkpoints.due(self.counters.step):
                    self._save(checkpoints)
                if stopped():
                    return

    def _flops(self, pair_RS: np.ndarray) -> float:
        """Of a forward pass over the rows of a step."""
        return counters.flops(
            self.policy.model, self.pairs, pair_RS[None], self.passes.shape, self.flops_N
        )

    def _compile(self, wanted: Sequence[int], bar: progress.Progress) -> None:
        """Compiles the step for the row lengths of a round; that is no time of a step."""
        new = self.train_step.missing(wanted)
        if not new:
            return
        self._flush()
        mesh, shape = self.passes.mesh, self.passes.shape
        named = ", ".join(map(str, new))
        self.say(f"compiling the train step for rows of {named} tokens")
        seconds = self.train_step.compile(
            new,
            lambda length: (
                self.state, self.policy.frozen, ahead.rows_of(shape, length, mesh), self._now()
            ),
        )  # fmt: skip
        self.say(f"compiled in {progress.duration(seconds)}")
        self.counters.seconds_compiling += seconds
        bar.leave_out(seconds)
        self.clock = time.perf_counter()

    def _next_batch(self, batches: Iterator[batch.PackedBatch]) -> tuple[batch.PackedBatch, float]:
        """The next batch, and the seconds that it was waited for."""
        start = time.perf_counter()
        return next(batches), time.perf_counter() - start

    def _notes(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.note.items())
