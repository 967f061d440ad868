"""Evaluation during a run: greedy accuracy on problems, loss and rewards on held-out pairs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sage_jax import config, step
from sage_jax.data import encode
from sage_jax.generate import evaluate, problem, tasks, verify
from sage_jax.report import progress
from sage_jax.runtime import setup

Check = Callable[[str, str], bool]


def load_problems(
    source: str, count: int, *, split: str, seed: int, verifier: str = "auto"
) -> tuple[list[problem.Problem], Check, str]:
    """Problems and how their answers are checked.

    Args:
        source: "task:NAME", or a .jsonl file of {"prompt", "answer"} and optionally "level".
        count: the most problems.
        split: the task's split.
        seed: of the task's problems.
        verifier: "auto" uses the task's own check, and "math" for files.

    Returns:
        The problems, the check, and the task's name.

    Raises:
        ValueError: no such task or file, or a row without prompt or answer.
    """
    if source.startswith("task:"):
        task = tasks.resolve(source.removeprefix("task:"))
        check = task.check if verifier == "auto" else verify.VERIFIERS[verifier]
        return tasks.problems(task, count=count, seed=seed, split=split), check, task.name
    path = pathlib.Path(setup.find(source))
    found: list[problem.Problem] = []
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
    kind = "math" if verifier == "auto" else verifier
    return found, verify.VERIFIERS[kind], path.stem


def as_prompts(problems: list[problem.Problem], tokenizer: Any) -> list[problem.Problem]:
    """Text prompts as a user's message where the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return problems
    return [
        p._replace(prompt=[{"role": "user", "content": p.prompt}])  # type: ignore[arg-type]
        if isinstance(p.prompt, str)
        else p
        for p in problems
    ]


class Evaluator:
    """What a run measures on held-out data; called with parameters, returns `eval_*` numbers."""

    def __init__(
        self,
        run: config.Run,
        policy: setup.Policy,
        passes: setup.Passes | None = None,
        pairs: encode.EncodedPairs | None = None,
    ):
        self.run, self.policy, self.passes, self.pairs = run, policy, passes, pairs
        self.problems: list[problem.Problem] = []
        if run.eval.problems:
            problems, self.check, _ = load_problems(
                run.eval.problems, run.eval.count, split=run.eval.split, seed=run.eval.seed,
                verifier=run.eval.verify,
            )  # fmt: skip
            self.problems = as_prompts(problems, policy.tokenizer)
        self.reference = None
        if pairs is not None and passes is not None:
            start = setup.stored_stats(run, policy, passes, pairs, "held-out pairs")
            self.reference = setup.reference_logps(run, policy, passes, pairs, start)
        self.last: evaluate.GreedyResult | None = None

    def __call__(self, params: Any) -> dict[str, float]:
        """Evaluates; every key starts with `eval_`."""
        row: dict[str, float] = {}
        if self.problems:
            found = self.greedy(params)
            row |= {
                "eval_accuracy": found.overall.mean,
                "eval_accuracy_low": found.overall.low,
                "eval_accuracy_high": found.overall.high,
                "eval_unfinished": float(found.unfinished),
            }
            row |= {f"eval_accuracy_level_{k}": a.mean for k, a in found.by_level.items()}
        if self.pairs is not None:
            row |= self.preferences(params)
        return row

    def greedy(self, params: Any) -> evaluate.GreedyResult:
        """Greedy answers to the problems, checked."""
        settings = self.run.eval
        with progress.Progress(len(self.problems), "evaluating", "problems") as bar:
            self.last = evaluate.greedy_accuracy(
                self.policy.model,
                params,
                self.policy.tokenizer,
                self.problems,
                check=self.check,
                max_new_tokens=settings.max_new_tokens,
                batch=settings.batch,
                progress=lambda done, _: bar.update(done - bar.done),
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
        return {f"eval_{k}": float(v) for k, v in found.items()}
