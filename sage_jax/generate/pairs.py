"""On-policy preference pairs: several checked answers to a problem, a right against a wrong one."""

from __future__ import annotations

import json
import math
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax.sharding import NamedSharding

from sage_jax.generate import prompting, sampler
from sage_jax.generate.problem import Problem

Check = Callable[[str, str], bool]


class Yield(NamedTuple):
    """What became of the problems."""

    problems: int
    with_pairs: int
    no_wrong: int  # no wrong answer was sampled: nothing to reject
    no_right: int  # no right answer was sampled: nothing to choose
    pairs: int
    pass_rate: float  # share of right answers among all sampled
    unfinished: int  # answers cut at the length limit; never used in a pair
    # What the model read and wrote for it, in the terms of `models.Model.forward_flops`.
    tokens: int = 0  # of prompts and answers, every answer with a prompt of its own
    attended: int = 0  # query-key pairs
    new_tokens: int = 0  # sampled ones, ends counted


def sample_pairs(
    model: Any,
    params: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    check: Check,
    task: str,
    max_new_tokens: int,
    samples: int = 8,
    per_problem: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    rows: NamedSharding | None = None,
) -> tuple[list[dict[str, Any]], Yield]:
    """Samples answers from the policy and makes verified pairs of them.

    Args:
        model, params, tokenizer: the policy, see `sampler.generate`.
        problems: the problems; one that comes up twice is used once.
        check: (completion, answer) -> right?
        task: the task's name, a column of the pairs.
        max_new_tokens: the most tokens of an answer.
        samples: answers per problem, at least 2.
        per_problem: the most pairs of one problem.
        temperature: above 0, or all answers would be the same.
        top_p: nucleus sampling, 1 = off.
        seed: of the sampling and of the choice of pairs.
        batch: answers decoded at a time.
        progress: called as `progress(done, total)`.
        rows: how sequences are split over devices, see `sampler.generate`.

    Returns:
        Records {"prompt", "chosen", "rejected", "pass_rate", "level", "task", "answer"} in the
        order of the problems (conversational when the tokenizer has a chat template), and counts.

    Raises:
        ValueError: fewer than 2 samples, no pair per problem, or temperature 0.
    """
    if samples < 2 or per_problem < 1 or temperature <= 0:
        raise ValueError(
            f"samples={samples}, per_problem={per_problem}, temperature={temperature}: pairs need "
            "at least 2 samples, at least 1 pair per problem and a temperature above 0."
        )
    problems = list({str(problem.prompt): problem for problem in problems}.values())
    prompts = prompting.ask(tokenizer, [problem.prompt for problem in problems])
    answers = sampler.generate(
        model,
        params,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
        batch=batch,
        progress=progress,
        rows=rows,
    )
    records, tally = make_pairs(
        problems, answers, check=check, task=task, per_problem=per_problem, seed=seed
    )
    if prompting.is_chat(tokenizer):
        records = [_conversational(record) for record in records]
    prompt_P = [len(ids) for ids in prompting.encode_prompts(tokenizer, prompts)]
    return records, tally._replace(**_work(prompt_P, answers))


def _work(
    prompt_P: Sequence[int], answers: Sequence[Sequence[sampler.Completion]]
) -> dict[str, int]:
    """Tokens that went through the model; each answer's prompt is read anew."""
    total = [
        (prompt + c.tokens, c.tokens + c.finished)
        for prompt, completions in zip(prompt_P, answers, strict=True)
        for c in completions
    ]
    return {
        "tokens": sum(n for n, _ in total),
        "attended": sum(n * (n + 1) // 2 for n, _ in total),
        "new_tokens": sum(new for _, new in total),
    }


def make_pairs(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[sampler.Completion]],
    *,
    check: Check,
    task: str,
    per_problem: int = 1,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], Yield]:
    """The pure part of `sample_pairs`: from sampled answers to records.

    Equal texts count once as candidates, but every time in the pass rate. Of a problem's right and
    wrong texts, `per_problem` different pairs are drawn at random; no text serves twice before
    all of its side have served once. Answers without an end, or empty, are never used: training on
    them would teach not to stop.
    """
    records: list[dict[str, Any]] = []
    no_wrong = no_right = hits = total = unfinished = 0
    for number, (problem, completions) in enumerate(zip(problems, answers, strict=True)):
        ended = {c.text: check(c.text, problem.answer) for c in completions if c.finished}
        right = sum(c.finished and ended[c.text] for c in completions)
        hits, total = hits + right, total + len(completions)
        unfinished += sum(not c.finished for c in completions)
        chosen = [text for text, ok in ended.items() if ok and text]
        rejected = [text for text, ok in ended.items() if not ok and text]
        no_right += not chosen
        no_wrong += bool(chosen) and not rejected
        columns = {
            "pass_rate": right / len(completions),
            "level": problem.level,
            "task": task,
            "answer": problem.answer,
        }
        rng = random.Random(f"pairs/{seed}/{number}")
        records += [
            {"prompt": problem.prompt, "chosen": win, "rejected": lose} | columns
            for win, lose in _match(rng, chosen, rejected, per_problem)
        ]
    return records, Yield(
        problems=len(problems),
        with_pairs=len(problems) - no_right - no_wrong,
        no_wrong=no_wrong,
        no_right=no_right,
        pairs=len(records),
        pass_rate=hits / max(total, 1),
        unfinished=unfinished,
    )


def _match(
    rng: random.Random, chosen: list[str], rejected: list[str], most: int
) -> list[tuple[str, str]]:
    """At most `most` different pairs, each side's texts taking turns."""
    if not chosen or not rejected:
        return []
    rng.shuffle(chosen)
    rng.shuffle(rejected)
    wins, losses = len(chosen), len(rejected)
    # Walking both lists at once comes back to the first pair after lcm steps: then shift one.
    turn = math.lcm(wins, losses)
    return [
        (chosen[i % wins], rejected[(i + i // turn) % losses])
        for i in range(min(most, wins * losses))
    ]


def _conversational(record: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return record | {key: prompting.as_chat(record[key], role) for key, role in roles.items()}


def write_jsonl(
    path: str | os.PathLike[str],
    records: Iterable[dict[str, Any]],
    *,
    default: Callable[[Any], Any] | None = None,
) -> int:
    """Writes records to a JSONL file, whole or not at all; returns how many.

    `default` gives what `json` can write for what it cannot.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=default) + "\n")
            count += 1
    partial.replace(path)
    return count
