"""What iterated alignment needs before a run: the problems, room in the rows, the uniform twin."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from sage_jax import config
from sage_jax.data import encode
from sage_jax.generate import problem, prompting
from sage_jax.runtime import counters, evaluation, rounds

AFTER_ANSWER = 8  # tokens that a chat template may add to an answer


class Problems(NamedTuple):
    """What the policy is asked: training problems, without those that are held out."""

    fixed: list[problem.Problem] | None  # all of a file; None: a task's, new ones each time
    check: evaluation.Check
    task: str
    held: frozenset[bytes]  # token ids of the prompts that are evaluated on


def load_problems(
    run: config.Run,
    tokenizer: Any,
    held: evaluation.Held | None,
    held_out: encode.EncodedPairs | None,
) -> Problems:
    """The problems of config.sample, checked.

    Args:
        run: the settings, with config.rounds.resample set.
        tokenizer: of the model.
        held, held_out: problems and pairs that the run is evaluated on.

    Raises:
        ValueError: as `evaluation.load_problems`, or no problem is left to sample from.
    """
    source = config.sample_source(run)
    drawn = source.startswith("task:")
    found, check, task = evaluation.load_problems(
        source, run.sample.count if drawn else sys.maxsize, split="train", seed=0,
        verifier=run.eval.verify,
    )  # fmt: skip
    known = evaluation.prompt_ids(held_out) if held_out is not None else set()
    asked = [p.prompt for p in held.problems] if held is not None else []
    known |= {_ids(tokenizer, prompt) for prompt in prompting.ask(tokenizer, asked)}
    problems = Problems(None if drawn else found, check, task, frozenset(known))
    if not draw(problems, run, tokenizer, 1):
        raise ValueError(
            f"config.rounds.resample={run.rounds.resample} samples from {source!r}, and none of "
            f"its problems can be used: they are among those that the run is evaluated on, or "
            f"their prompts reach config.data.max_length={run.data.max_length}. Set "
            f"config.sample.problems to others."
        )
    return problems


def draw(problems: Problems, run: config.Run, tokenizer: Any, number: int) -> list[problem.Problem]:
    """The problems of resampling `number`, from 1.

    A task gives new ones each time, from a stream that neither `sage-jax sample` nor supervised
    data draw from: its seed is negative. A file is gone through in turn, and begun again at its
    end. Held-out problems, and prompts that leave no room for an answer, are left out.
    """
    count, first = run.sample.count, (number - 1) * run.sample.count
    if problems.fixed is None:
        found, _, _ = evaluation.load_problems(
            config.sample_source(run), count, split="train", seed=-1 - run.seed, start=first
        )
    else:
        size = len(problems.fixed)
        found = [problems.fixed[(first + i) % size] for i in range(min(count, size))]
    usable = []
    asked = prompting.ask(tokenizer, [p.prompt for p in found])
    for one, encoded in zip(found, prompting.encode_prompts(tokenizer, asked), strict=True):
        ids = np.asarray(encoded, np.int32).tobytes()
        if ids not in problems.held and len(ids) // 4 < run.data.max_length:
            usable.append(one)
    return usable


def _ids(tokenizer: Any, prompt: prompting.Prompt) -> bytes:
    return np.asarray(prompting.encode_prompt(tokenizer, prompt), np.int32).tobytes()


def planned(
    run: config.Run,
    tokenizer: Any,
    pairs: encode.EncodedPairs,
    problems: Problems,
    length_N: np.ndarray,
) -> np.ndarray:
    """Lengths that rows are planned for: the pairs of the data, and the longest to expect.

    That has the longest prompt among the data, the file's problems or the first of the task's, and
    two answers as long as they can be sampled. Rows have one shape for the whole run: a pair with a
    still longer prompt may not fit, and then it is left out and counted.

    Returns:
        int64 [N + 1].
    """
    known = draw(problems, run, tokenizer, 1) if problems.fixed is None else problems.fixed
    asked = prompting.ask(tokenizer, [p.prompt for p in known])
    prompt = max(len(_ids(tokenizer, one)) // 4 for one in asked)
    prompt = max(prompt, int(pairs.start_N2.max()))
    side = min(run.data.max_length, prompt + run.eval.max_new_tokens + AFTER_ANSWER)
    return np.concatenate([length_N, [2 * side]])


def settled(run: config.Run, pairs: encode.EncodedPairs) -> config.Run:
    """The settings with the difficulty that "auto" means for the data that the run starts with.

    Merging could otherwise complete a column, or open gaps in one, and so change what the strata
    mean in the middle of the run.

    Raises:
        ValueError: the difficulty comes from a column that sampled pairs do not have.
    """
    found = rounds.difficulty_source(pairs, run.curriculum.difficulty)
    if found not in ("margin", *config.SAMPLED_COLUMNS):
        raise ValueError(
            f"config.curriculum.difficulty={run.curriculum.difficulty!r} takes the column "
            f"{found!r} of the data, which pairs sampled for config.rounds.resample="
            f"{run.rounds.resample} do not have. Set it to 'margin'."
        )
    return config.replace(run, **{"curriculum.difficulty": found})


def twin_pool(run: config.Run, count: int) -> int:
    """Pool size of the uniform twin, which trains on whole pools: what the run selects of its own.

    So their rounds have as many steps, and they sample new pairs as often.
    """
    return round(config.kept_share(run) * min(run.curriculum.pool_size or count, count))


def twin_steps(
    run: config.Run, rows: list[dict[str, Any]], spent: counters.Counters, per_step: float
) -> int:
    """Steps in which the twin spends the FLOPs of a run, sampling at the run's mean cost counted.

    Args:
        run: the settings of the twin, with its pool size.
        rows: of the run's metrics.jsonl.
        spent: what the run has spent.
        per_step: FLOPs of one of the twin's steps.
    """
    times = sum("resample/pairs" in row for row in rows)
    each = spent.flops_sampling / max(times, 1)
    apart = run.rounds.resample * (run.curriculum.pool_size // run.train.batch_pairs)
    steps = 1
    while (steps + 1) * per_step + steps // apart * each <= spent.flops + per_step / 2:
        steps += 1
    return steps
