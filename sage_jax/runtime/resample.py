"""Iterated alignment: every few rounds new pairs from the policy in training (online DPO).

At such a round boundary the policy samples answers to training problems; they are verified, made
into pairs, written to `WORKDIR/resampled/round_00004.jsonl` and merged into the data set, with the
log-probs of the reference and, in the memory, the margins of the policy as it is now.

A resampling is a function of the weights, the seed and its number. A checkpoint names the files
that its data set is made of, by digest: a resumed run reads them back, and samples anew, with the
same outcome, what came after the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sage_jax import config, curriculum, losses, rules, step
from sage_jax.data import encode, merge, records, steps
from sage_jax.generate import pairs as pair_makers
from sage_jax.report import progress, writers
from sage_jax.runtime import counters, forward, hosts, resample_plan, setup


class Data(NamedTuple):
    """A data set and what is known of each of its pairs, in one order."""

    pairs: encode.EncodedPairs
    reference: np.ndarray  # float32 [N, 2], nats
    memory: curriculum.Memory
    rule: dict[str, np.ndarray]  # state of the selection rule; names in _N have one entry a pair


class Entry(NamedTuple):
    """A resampling as a checkpoint names it."""

    round: int  # the round that it came before
    digest: str  # of the file


class Grown(NamedTuple):
    """A data set after a resampling, what happened, and what it cost."""

    data: Data
    entry: Entry
    metrics: dict[str, float]
    flops_sampling: float  # answers, and the reference's pass over the new pairs
    flops_scoring: float
    seconds_sampling: float
    seconds_scoring: float


class StoppedError(Exception):
    """The run was told to stop while it sampled."""


class Resampler:
    """Owner of what a resampling needs; a run and its twin share it.

    Args:
        run: the settings.
        policy: the model that training starts from; its tokenizer encodes the pairs.
        passes: forward passes with the run's rows.
        other: the reference, when it is not the policy that training starts from.
        problems: from `resample_plan.load_problems`.
        capacity: tokens of the longest pair that fits into a row.
    """

    def __init__(
        self,
        run: config.Run,
        policy: setup.Policy,
        passes: forward.Passes,
        other: setup.Policy | None,
        problems: resample_plan.Problems,
        capacity: int,
    ):
        self.policy, self.passes, self.problems, self.capacity = policy, passes, problems, capacity
        self.reference = other or policy
        self.reference_passes = (
            passes
            if other is None
            else forward.Passes(other, passes.mesh, passes.shape, passes.whole)
        )
        self.least = -int(-run.train.batch_pairs // config.kept_share(run))

    def grow(
        self,
        run: config.Run,
        workdir: pathlib.Path,
        number: int,
        params: Any,
        data: Data,
        *,
        loss: losses.Loss,
        score_fn: step.ScoreFn,
        stopped: Callable[[], bool],
    ) -> Grown:
        """Samples pairs before round `number`, writes them to their file and merges them.

        Args:
            run: the settings of the run or of its twin.
            workdir: its directory.
            number: of the round to come, a multiple of config.rounds.resample.
            params: the policy's weights now.
            data: the data set so far.
            loss, score_fn: of the run.
            stopped: whether to give up.

        Returns:
            The data set with the new pairs, and what it took.

        Raises:
            StoppedError: `stopped()` came true; nothing has changed.
        """
        start = time.perf_counter()
        rows, tally = self._sample(run, number // run.rounds.resample, params, stopped)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        text, tally = hosts.agree((text, tally))  # a check of answers may run out of time
        if writers.first_process():
            writers.write_text(path(workdir, number), text)
        merged = self._merge(run, data.pairs, text, number)
        new = encode.take(merged.pairs, np.arange(len(merged.stays), len(merged.pairs)))
        reference = self._reference_logps(run, new)
        flops = self.policy.model.forward_flops(tally.tokens, tally.attended, tally.new_tokens)
        plan = steps.plan_pass(new, np.arange(len(new)), self.passes.whole)
        flops += counters.flops(self.reference.model, new, plan, self.passes.whole)
        sampled = time.perf_counter()
        memory = curriculum.grow(curriculum.recall(data.memory, merged.stays), len(new))
        flops_scoring = 0.0
        if len(new) and looks_at_margins(run):
            memory = self._remember(run, memory, params, new, reference, score_fn, number)
            flops_scoring = counters.flops(self.policy.model, new, plan, self.passes.whole)
        rule = _grown_rule(run, loss, data.rule, memory, merged.stays)
        reference = np.concatenate([data.reference[merged.stays], reference])
        return Grown(
            Data(merged.pairs, reference, memory, rule),
            Entry(number, digest(text)),
            _metrics(tally, merged, text.count("\n"), len(data.pairs)),
            flops,
            flops_scoring,
            sampled - start,
            time.perf_counter() - sampled,
        )

    def replay(
        self,
        run: config.Run,
        workdir: pathlib.Path,
        pairs: encode.EncodedPairs,
        entries: list[Entry],
    ) -> encode.EncodedPairs:
        """The data set of a checkpoint, from the files of its resamplings.

        Raises:
            ValueError: a file is missing, or not what it was.
        """
        for entry in entries:
            file = path(workdir, entry.round)
            text = hosts.on_first(functools.partial(_text, file))
            if text is None or digest(text) != entry.digest:
                raise ValueError(
                    f"{file} is {'missing' if text is None else 'not what it was'}: the checkpoint "
                    f"of this run was trained on the pairs that it held. Put the file back, or "
                    f"start in another --workdir."
                )
            pairs = self._merge(run, pairs, text, entry.round).pairs
        return pairs

    def _sample(self, run, number, params, stopped) -> tuple[list[dict], pair_makers.Yield]:
        settings, tokenizer = run.sample, self.policy.tokenizer
        problems = resample_plan.draw(self.problems, run, tokenizer, number)
        if not problems:  # a part of the file that is held out
            return [], pair_makers.make_pairs([], [], check=self.problems.check, task="")[1]
        total = len({str(p.prompt) for p in problems}) * settings.per_problem
        with progress.Progress(total, "sampling", "answers", aside=True) as bar:

            def update(done: int, _: int) -> None:
                bar.update(done - bar.done)
                if stopped():
                    raise StoppedError

            return pair_makers.sample_pairs(
                self.policy.model, self.policy.whole(params), tokenizer, problems,
                check=self.problems.check, task=self.problems.task,
                max_new_tokens=run.eval.max_new_tokens, samples=settings.per_problem,
                per_problem=settings.pairs_per_problem, temperature=settings.temperature,
                top_p=settings.top_p, seed=seed(run.seed, number), batch=run.eval.batch,
                progress=update, rows=self.policy.rows,
            )  # fmt: skip

    def _merge(self, run, pairs, text: str, number: int) -> merge.Merged:
        rows = [json.loads(line) for line in text.split("\n") if line]
        if not rows:
            return merge.Merged(pairs, np.arange(len(pairs)), np.zeros(0, np.int64), 0, 0)
        new = encode.encode(
            records.read(rows), self.policy.tokenizer, max_length=run.data.max_length
        )
        # Relative to the workdir: the logs of a run do not depend on where it lies.
        name = path("", number).as_posix()
        new = dataclasses.replace(new, origin=[f"{name}:{i + 1}" for i in new.row_N])
        return merge.merge(
            pairs, new, capacity=self.capacity, replace=run.rounds.replace, least=self.least
        )

    def _reference_logps(self, run, new: encode.EncodedPairs) -> np.ndarray:
        if not len(new):
            return np.zeros((0, 2), np.float32)
        stats = forward.stored_stats(
            run, self.reference, self.reference_passes, new, "reference", aside=True
        )
        return np.asarray(stats.logps)

    def _remember(self, run, memory, params, new, reference, score_fn, number) -> curriculum.Memory:
        everything = np.arange(len(new))
        stats = self.passes.stats(
            params, new, everything,
            logit_norm="logit_norm" in run.selection.stability, light=True,
        )  # fmt: skip
        found = jax.device_get(score_fn(stats, reference))
        behind = len(memory.visits) - len(new) + everything
        return curriculum.remember(memory, behind, found, round=number, trained=False)


def _text(file: pathlib.Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _grown_rule(run, loss, state, memory: curriculum.Memory, stays: np.ndarray) -> dict:
    """The rule's state with what it would have begun with for the new pairs."""
    init = rules.resolve(run.selection.name).init
    per_pair = [name for name in state if name.endswith("_N")]
    if init is None or not per_pair:
        return state
    new = curriculum.recall(memory, np.arange(len(stays), len(memory.visits)))
    first = init(rules.candidates(None, new, loss=loss))
    return state | {
        name: np.concatenate([state[name][stays], np.asarray(first[name])]) for name in per_pair
    }


def looks_at_margins(run: config.Run) -> bool:
    """Whether a run needs margins of its pairs: plain DPO neither ranks, leans nor guards.

    >>> looks_at_margins(config.resolve({"selection": {"name": "uniform"}}))
    False
    """
    plain = run.selection.name == "uniform" and run.selection.guard == "off"
    return not plain or run.curriculum.sharpness > 0


def path(workdir: str | pathlib.Path, number: int) -> pathlib.Path:
    """Where the pairs sampled before a round are written.

    >>> path("runs/a", 4).as_posix()
    'runs/a/resampled/round_00004.jsonl'
    """
    return pathlib.Path(workdir) / "resampled" / f"round_{number:05d}.jsonl"


def seed(seed: int, number: int) -> int:
    """The seed of a resampling's answers: other ones for every run and every resampling.

    >>> seed(0, 1) == seed(0, 1) != seed(0, 2)
    True
    """
    return int(np.random.SeedSequence([seed, number, 3]).generate_state(1)[0] >> 1)


def digest(text: str) -> str:
    """Hash of a file's content."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def nothing_new(number: int, found: dict[str, float]) -> str:
    """What a person is told when no pair came of a resampling, from its metrics.

    >>> counts = {"problems": 9, "no_right": 7, "no_wrong": 2, "unfinished": 1, "duplicates": 0}
    >>> nothing_new(4, {f"resample/{key}": value for key, value in counts.items()})[:53]
    'Round 4: no new pairs. Of 9 problems 7 had no right a'
    """
    what = {key.removeprefix("resample/"): value for key, value in found.items()}
    return (
        f"Round {number}: no new pairs. Of {what['problems']:.0f} problems {what['no_right']:.0f} "
        f"had no right answer and {what['no_wrong']:.0f} no wrong one; {what['unfinished']:.0f} "
        f"answers were cut, {what['duplicates']:.0f} pairs were known. The data stay as they are."
    )


def _metrics(
    tally: pair_makers.Yield, merged: merge.Merged, rows: int, before: int
) -> dict[str, float]:
    joined, stayed = len(merged.joins), len(merged.stays)
    return {
        "resample/problems": float(tally.problems),
        "resample/pass_rate": tally.pass_rate,
        "resample/no_right": float(tally.no_right),
        "resample/no_wrong": float(tally.no_wrong),
        "resample/unfinished": float(tally.unfinished),
        "resample/pairs": float(joined),
        "resample/duplicates": float(merged.duplicates),
        "resample/too_long": float(rows - joined - merged.duplicates),
        "resample/removed": float(before - stayed),
        "resample/data": float(len(merged.pairs)),
    }
