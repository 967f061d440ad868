"""What the stages of `medium.py` leave for each other: problems, pairs, curves; and its time limit.

Reads and writes files; nothing here trains.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import gym_tasks

from sage_jax import config
from sage_jax.generate import chars, pairs, problem, prompting, tasks, verify

CODE = 100  # a row's level in a file is CODE * task + level, so that a run tells the tasks apart


class Limit:
    """Stops a training when time is up, as SIGTERM does: it saves, and the program ends."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._told = False

    def stop_if_over(self) -> None:
        if self._told or time.monotonic() > self._end:
            self.stop()

    def stop(self) -> NoReturn:
        sys.exit("Stopped and saved. The same command goes on from there.")

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """While a training runs, which catches the signal itself once its steps have begun.

        A signal that comes before (loading, the reference's pass) is sent again; one that comes
        after does not kill the export.
        """
        timer: threading.Timer | None = None

        def send_in(seconds: float) -> None:
            nonlocal timer
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()

        def note(number: int, frame: Any) -> None:
            self._told = True
            send_in(1.0)

        before = signal.signal(signal.SIGTERM, note)
        send_in(min(max(self._end - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
        try:
            yield
        finally:
            assert timer is not None
            timer.cancel()
            signal.signal(signal.SIGTERM, before)


def need(path: pathlib.Path, stage: str) -> None:
    """Raises when what a stage leaves is not there."""
    if not path.exists():
        raise ValueError(f"{path} does not exist. Run --stage={stage} with this workdir first.")


def setting(change: str) -> tuple[str, Any]:
    """A `key=value` of the command line; values are JSON, or text.

    >>> setting("train.steps=5"), setting("model.dtype=float32")
    (('train.steps', 5), ('model.dtype', 'float32'))
    """
    key, _, value = change.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def write_json(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# -- problems --------------------------------------------------------------------------------------


def find_task(name: str) -> problem.Task:
    """A task of reasoning-gym, a built-in one, or "module:attribute"."""
    return gym_tasks.TASKS[name] if name in gym_tasks.TASKS else tasks.resolve(name)


def write_problems(
    directory: pathlib.Path,
    names: list[str],
    *,
    seed: int,
    levels: int,
    counts: dict[str, int],
    chat: bool,
) -> None:
    """Writes sft.jsonl, sample.jsonl (training split), eval.jsonl and test.jsonl of a seed.

    Args:
        directory: of the seed.
        names: the tasks; their rows take turns.
        seed: of the problems.
        levels: the first levels of each task.
        counts: rows of each file, over all tasks.
        chat: worked solutions as turns of a chat.

    Raises:
        ValueError: other problems are there, or a task cannot be had.
    """
    about = {"tasks": names, "seed": seed, "levels": levels, "counts": counts, "chat": chat}
    if (directory / "problems.json").exists():
        found = json.loads((directory / "problems.json").read_text())
        if {k: found[k] for k in about} != about:
            raise ValueError(f"{directory} holds problems of {found}. Use another --workdir.")
        return
    for kind, split in {"sft": "train", "sample": "train", "eval": "eval", "test": "test"}.items():
        of_task = []
        for place, name in enumerate(names):
            task = find_task(name)
            share = len(range(place, counts[kind], len(names)))  # adds up to the count
            drawn = problem.problems(
                task, count=share, seed=seed, split=split, levels=list(task.levels)[:levels],
                draw=task.problem if kind == "sft" else None,  # a stream of its own
            )  # fmt: skip
            of_task.append([_row(p, place, kind == "sft", chat) for p in drawn])
        rows = [row for turn in itertools.zip_longest(*of_task) for row in turn if row]
        pairs.write_jsonl(directory / f"{kind}.jsonl", rows)
    used = {n: gym_tasks.package().__version__ for n in names if n in gym_tasks.TASKS}
    write_json(directory / "problems.json", about | {"reasoning_gym": used})


def _row(one: problem.Problem, place: int, worked: bool, chat: bool) -> dict[str, Any]:
    level = CODE * place + one.level
    if not worked:
        return {"prompt": one.prompt, "answer": one.answer, "level": level}
    prompt, completion = one.prompt, one.solution
    if chat:
        return {
            "prompt": prompting.as_chat(prompt),
            "completion": prompting.as_chat(completion, "assistant"),
            "level": level,
        }
    return {"prompt": prompt, "completion": completion, "level": level}


def write_tokenizer(problems: pathlib.Path, directory: pathlib.Path) -> None:
    """A tokenizer of the characters that problems and solutions use."""
    if directory.exists():
        return
    used: set[str] = set()
    for name in ("sft", "sample", "eval", "test"):
        for row in read_rows(problems / f"{name}.jsonl"):
            used |= set(row["prompt"]) | set(row.get("completion", "")) | set(row.get("answer", ""))
    chars.write(directory, "".join(sorted(used)))


# -- pairs -----------------------------------------------------------------------------------------


def finish_pairs(sampled: pathlib.Path, out: pathlib.Path, names: list[str]) -> None:
    """Sampled pairs with their task, and their level within it."""
    rows = [
        row | {"task": names[row["level"] // CODE], "level": row["level"] % CODE}
        for row in read_rows(sampled)
    ]
    pairs.write_jsonl(out, rows)


def describe_pairs(data: pathlib.Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Pairs of each task, their pass rate, and where the two verifiers disagree.

    Accuracy is measured by the last number of an answer, pairs are sampled by math-verify: the
    pairs in which the last number says otherwise are counted.
    """
    found = {n: {"pairs": 0, "pass_rate": 0.0, "disagree": 0} for n in names}
    for row in read_rows(data):
        of = found[row["task"]]
        right, wrong = (_text(row[side]) for side in ("chosen", "rejected"))
        of["pairs"] += 1
        of["pass_rate"] += row["pass_rate"]
        of["disagree"] += not verify.number(right, row["answer"]) or verify.number(
            wrong, row["answer"]
        )
    for of in found.values():
        of["pass_rate"] /= max(of["pairs"], 1)
    return found


def _text(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


# -- results ---------------------------------------------------------------------------------------


def curve(metrics: pathlib.Path, problems: pathlib.Path, names: list[str]) -> list[dict[str, Any]]:
    """Every evaluation of a run: what had been spent, accuracy overall and of each task."""
    count = collections.Counter(row["level"] for row in read_rows(problems))
    points = []
    for row in read_rows(metrics):
        if "eval_accuracy" not in row:
            continue
        point = {"step": row["step"], "pairs": row["pairs"], "flops": row["flops"],
                 "seconds": row["perf/seconds"], "accuracy": row["eval_accuracy"],
                 "unfinished": row["eval_unfinished"]}  # fmt: skip
        point["tasks"], point["levels"] = {}, {}
        for place, name in enumerate(names):
            mine = {k: n for k, n in count.items() if k // CODE == place}
            found = {k: row[f"eval_accuracy_level_{k}"] for k in mine}
            right = sum(found[k] * n for k, n in mine.items())
            point["tasks"][name] = right / sum(mine.values())
            point["levels"][name] = {k % CODE: found[k] for k in sorted(found)}
        points.append(point)
    return points


def shared_settings(run: config.Run) -> dict[str, Any]:
    """The settings in which methods, seeds and splits have to agree."""
    own = ("seed", "selection.", "curriculum.", "optim.lr", "data.", "model.path", "reference.",
           "eval.problems", "eval.count", "eval.batch")  # fmt: skip
    flat = config.flatten(config.as_dict(run))
    return {k: v for k, v in flat.items() if not k.startswith(own)}


def best_rate(results: pathlib.Path, method: str) -> float:
    """The learning rate with the highest mean accuracy over steps, on the validation split."""
    scores: dict[float, dict[int, float]] = collections.defaultdict(dict)
    for path in sorted(results.glob(f"eval_seed_*_{method}_lr_*.json")):
        one = json.loads(path.read_text())
        if one["method"] == method:
            scores[one["lr"]][one["seed"]] = mean_accuracy(one["curve"])
    seeds = {frozenset(by_seed) for by_seed in scores.values()}
    if len(seeds) != 1:
        raise ValueError(
            f"{results} holds no grid of {method} with the same seeds for every learning rate. Run "
            f"--stage=grid, or give --lr."
        )
    return max(scores, key=lambda rate: sum(scores[rate].values()))


def mean_accuracy(points: list[dict[str, Any]]) -> float:
    """Mean of a curve over its steps, by the trapezium rule."""
    total = sum(
        (b["step"] - a["step"]) * (a["accuracy"] + b["accuracy"]) / 2
        for a, b in itertools.pairwise(points)
    )
    return total / (points[-1]["step"] - points[0]["step"])
