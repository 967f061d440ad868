"""Evaluation during a run: greedy accuracy on problems, loss and rewards on held-out pairs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sage_jax import config, step
from sage_jax.data import encode
from sage_jax.generate import evaluate, problem, prompting, tasks, verify
from sage_jax.report import progress
from sage_jax.runtime import forward, hosts, setup

Check = Callable[[str, str], bool]
_TURNS = 20  # how many times the problems asked for are drawn, to replace those already seen


def load_problems(
    source: str, count: int, *, split: str, seed: int, verifier: str = "auto", start: int = 0
) -> tuple[list[problem.Problem], Check, str]:
    """Problems and how their answers are checked.

    Args:
        source: "task:NAME", or a .jsonl file of {"prompt", "answer"} and optionally "level".
        count: the most problems.
        split: the task's split.
        seed: of the task's problems.
        verifier: "auto" uses the task's own check, and "math" for files.
        start: number of the task's first problem.

    Returns:
        The problems, the check, and the task's name.

    Raises:
        ValueError: no such task or file, or a row without prompt or answer.
    """
    found = _load_problems(source, count, split, seed, verifier, start)
    hosts.same(f"problems of {source}", found[0])
    return found


def _load_problems(
    source: str, count: int, split: str, seed: int, verifier: str, start: int
) -> tuple[list[problem.Problem], Check, str]:
    if source.startswith("task:"):
        task = tasks.resolve(source.removeprefix("task:"))
        check = task.check if verifier == "auto" else verify.VERIFIERS[verifier]
        drawn = tasks.problems(task, count=count, seed=seed, start=start, split=split)
        return drawn, check, task.name
    path = pathlib.Path(setup.find(source))
    found: list[problem.Problem] = []
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give 'task:NAME' or a .jsonl file of problems.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(found) == count:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found.append(
                    problem.Problem(
                        row["prompt"], row.get("solution", ""), str(row["answer"]),
                        int(row.get("level", 1)),
                    )
                )  # fmt: skip
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as e:
                raise ValueError(
                    f"{path}:{number}: {type(e).__name__}: {e}. Expected a JSON object with "
                    f"'prompt' (text or messages) and 'answer'."
                ) from e
    if not found:
        raise ValueError(f"{path} holds no problem. Expected lines of {{'prompt', 'answer'}}.")
    check = verify.VERIFIERS["math" if verifier == "auto" else verifier]
    check("", found[0].answer)  # raises now when it cannot work, not after hours
    return found, check, path.stem


class Held(NamedTuple):
    """Problems to evaluate on, as the model is asked them."""

    problems: list[problem.Problem]
    check: Check
    seen: int  # problems that training data hold, and which are therefore not among these


def held_out(run: config.Run, tokenizer: Any, trained: encode.EncodedPairs | None) -> Held | None:
    """The problems of config.eval, without those whose prompt is in the training data.

    A built-in task gives others in their place.

    Args:
        run: the settings.
        tokenizer: of the model.
        trained: the training data; None when there are none to compare with.

    Returns:
        None when config.eval.problems is empty.

    Raises:
        ValueError: as `load_problems`, or no problem is left.
    """
    settings = run.eval
    if not settings.problems:
        return None
    known = set() if trained is None else prompt_ids(trained)
    kept: list[problem.Problem] = []
    seen = 0
    for turn in range(_TURNS if settings.problems.startswith("task:") else 1):
        problems, check, _ = load_problems(
            settings.problems, settings.count, split=settings.split, seed=settings.seed,
            verifier=settings.verify, start=turn * settings.count,
        )  # fmt: skip
        asked = prompting.ask(tokenizer, [p.prompt for p in problems])
        encoded = prompting.encode_prompts(tokenizer, asked)
        for one, ids in zip(problems, encoded, strict=True):
            if len(kept) == settings.count:
                break
            if np.asarray(ids, np.int32).tobytes() in known:
                seen += 1
            else:
                kept.append(one)
        if len(kept) == settings.count:
            break
    if not kept:
        raise ValueError(
            f"All {seen} problems of config.eval.problems={settings.problems!r} are prompts of the "
            f"training data. Evaluate on others, or set it to ''."
        )
    return Held(kept, check, seen)


def prompt_ids(pairs: encode.EncodedPairs) -> set[bytes]:
    """The prompts of a data set, each as the bytes of its token ids (int32)."""
    found = set()
    for i in range(len(pairs)):
        ids, start = pairs.sequence(i, 0)
        found.add(np.asarray(ids[:start], np.int32).tobytes())
    return found


class Evaluator:
    """What a run measures on held-out data; called with parameters, returns `eval_*` numbers.

    Args:
        run: the settings.
        policy: the model that reference and vocabulary come from.
        held: problems, from `held_out`.
        passes: forward passes over `pairs`.
        pairs: held-out pairs.
        other: the reference, when it is not the policy.
        aside: inside a training that has its own progress.
        divergence: more of what parameters give, the `eval_kl*` of `divergence.Divergence`.
    """

    def __init__(
        self,
        run: config.Run,
        policy: setup.Policy,
        held: Held | None,
        passes: forward.Passes | None = None,
        pairs: encode.EncodedPairs | None = None,
        other: setup.Policy | None = None,
        aside: bool = False,
        divergence: Callable[[Any], dict[str, float]] | None = None,
    ):
        self.run, self.policy, self.passes, self.pairs = run, policy, passes, pairs
        self.held, self.aside, self.divergence = held, aside, divergence
        self.reference = None
        if pairs is not None and passes is not None:
            start = forward.stored_stats(run, policy, passes, pairs, "held-out pairs")
            self.reference = forward.reference_logps(run, policy, passes, pairs, start, other)
        self.last: evaluate.GreedyResult | None = None

    def __call__(self, params: Any) -> dict[str, float]:
        """Evaluates; every key starts with `eval_`."""
        row: dict[str, float] = {}
        if self.held is not None:
            found = self.greedy(params, self.held)
            row |= {
                "eval_accuracy": found.overall.mean,
                "eval_accuracy_low": found.overall.low,
                "eval_accuracy_high": found.overall.high,
                "eval_unfinished": float(found.unfinished),
            }
            row |= {f"eval_accuracy_level_{k}": a.mean for k, a in found.by_level.items()}
        if self.pairs is not None:
            row |= self.preferences(params)
        if self.divergence is not None:
            row |= self.divergence(params)
        return row

    def greedy(self, params: Any, held: Held) -> evaluate.GreedyResult:
        """Greedy answers to the problems, checked."""
        settings = self.run.eval
        total = len(held.problems)
        with progress.Progress(total, "evaluating", "problems", aside=self.aside) as bar:
            self.last = evaluate.greedy_accuracy(
                self.policy.model,
                self.policy.whole(params),
                self.policy.tokenizer,
                held.problems,
                check=held.check,
                max_new_tokens=settings.max_new_tokens,
                batch=settings.batch,
                progress=lambda done, _: bar.update(done - bar.done),
                rows=self.policy.rows,
            )
        return self.last

    def preferences(self, params: Any) -> dict[str, float]:
        """Loss and rewards on the held-out pairs, the mean over pairs."""
        assert self.pairs is not None and self.passes is not None and self.reference is not None
        stats = self.passes.stats(params, self.pairs, np.arange(len(self.pairs)))
        loss = setup.make_loss(self.run)
        loss_N = step.pair_losses(loss, stats, self.reference)
        metrics = step.pair_metrics(stats, self.reference, np.ones(len(self.pairs)), loss.beta)
        found = jax.device_get({"loss": loss_N.mean(), **metrics})
        # Of the model alone: against itself as the reference, rewards are 0.
        found["likelihood_accuracy"] = evaluate.preference_accuracy(stats.logps).mean
        return {f"eval_{k}": float(v) for k, v in found.items()}
