"""What the experiments here share: small worlds, runs on every core, and their records.

A *world* is what a seed makes: a teacher with systematic mistakes, a decoder of 0.1 M parameters
supervised by it, and preference pairs of that decoder's own answers. A *job* is one training run
in a world, through the launcher's own path. Jobs are kept by their settings under `--scratch`, so
an experiment that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import queue
import random
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import curves  # noqa: E402
import judge  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "selection"
TASKS = ("arithmetic", "equations")

# The decoder, its teacher and the pairs, on top of configs/quickstart_base.py.
BASE: dict[str, Any] = {
    "model.layers": 2, "model.d_model": 64, "model.d_ff": 192,
    "train.steps": 800, "train.batch_pairs": 64, "task.count": 51_200,
    "eval.count": 8,
}  # fmt: skip
# A training run, on top of configs/quickstart.py.
RUN: dict[str, Any] = {
    "compare.uniform": False, "checkpoint.every": 100_000,
    "eval.kl_prompts": 0,
    "eval.count": 400, "eval.every": 20, "eval.batch": 100,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run: where, and with which settings besides those of all."""

    task: str
    seed: int
    settings: tuple[tuple[str, Any], ...]  # sorted, so that a job has one key
    flips: float = 0.0  # share of the pairs whose label is flipped
    chosen: str = "policy"  # or "exact" chosen answers, or the "static" selection of the pairs
    split: str = "test"
    model: str = ""  # settings of the world, as JSON, on top of `BASE`
    judge: int = 0  # steps from one look at the suspected flips to the next; 0 = none (judge.py)


# What a task needs besides: equations of so small a decoder take longer, and a mistake spoils more.
BASE_OF: dict[str, dict[str, Any]] = {
    "equations": {"train.steps": 1200, "task.count": 76_800, "task.faulty_share": 0.25},
    "euclid:TASK": {"train.steps": 1200, "task.count": 76_800, "task.faulty_share": 0.25,
                    "eval.max_new_tokens": 80},
    "mixed:TASK": {"train.steps": 2400, "task.count": 153_600, "task.faulty_share": 0.25,
                   "eval.max_new_tokens": 80},
}  # fmt: skip
# And its runs.
RUN_OF: dict[str, dict[str, Any]] = {
    task: {"eval.max_new_tokens": 80} for task in ("euclid:TASK", "mixed:TASK")
}


def job(task: str, seed: int, settings: dict[str, Any], **more: Any) -> Job:
    """A `Job` from a dict of settings."""
    return Job(task, seed, tuple(sorted(settings.items())), **more)


def load(name: str, overrides: dict[str, Any]):
    """A checked run: a config file of the repository with settings changed."""
    from sage_jax import __main__ as launcher
    from sage_jax import config

    _, found, _ = launcher.parse(["train", f"--config={ROOT / 'configs' / name}.py"])
    for key, value in overrides.items():
        section, _, leaf = key.rpartition(".")
        target = found[section] if section else found
        target[leaf] = value
    return config.resolve(found)


def world_path(scratch: pathlib.Path, task: str, seed: int, model: str = "") -> pathlib.Path:
    """The directory of a world."""
    digest = hashlib.blake2b(json.dumps(_base(task, model)).encode(), digest_size=4).hexdigest()
    return scratch / "worlds" / f"{task.replace(':', '_')}_{seed}_{digest}"


def _base(task: str, model: str) -> dict[str, Any]:
    return BASE | BASE_OF.get(task, {}) | (json.loads(model) if model else {})


def make_world(scratch: pathlib.Path, task: str, seed: int, model: str = "") -> pathlib.Path:
    """The world of a seed: `base/export` and `pairs.jsonl` in a directory; made once."""
    from sage_jax.runtime import modes

    changes, where = _base(task, model), world_path(scratch, task, seed, model)
    if (where / "pairs.jsonl").exists():
        return where
    partial = where.with_name(f"{where.name}.{os.getpid()}")  # another process may make it, too
    shutil.rmtree(partial, ignore_errors=True)
    named = {f"{k}.problems": f"task:{task}" for k in ("eval", "sample")}
    settings = changes | named | {"data.train": f"task:{task}", "seed": seed}
    with _quiet():
        modes.sft(load("quickstart_base", settings), partial / "base")
        settings["model.path"] = str(partial / "base" / "export")
        modes.sample(load("quickstart_base", settings), partial / "sampled")
    shutil.copy(partial / "sampled" / "pairs.jsonl", partial / "pairs.jsonl")
    try:
        partial.rename(where)
    except OSError:
        if not (where / "pairs.jsonl").exists():
            raise
        shutil.rmtree(partial)  # the other one was first
    return where


def pairs_path(world: pathlib.Path, flips: float, chosen: str) -> pathlib.Path:
    return world / f"pairs_{chosen}_{flips:g}.jsonl"


def pairs_file(
    world: pathlib.Path, seed: int, flips: float, chosen: str, task: str
) -> pathlib.Path:
    """The world's pairs, or those of `_exact` or `_static`, with flipped labels if asked for.

    Flipped pairs are marked in the column `flipped`, which no selection reads.
    """
    path = pairs_path(world, flips, chosen)
    if path.exists():
        return path
    if chosen == "exact":
        rows = _exact(world, seed, task)
    elif chosen == "static":
        rows = _static(world)
    else:
        rows = [json.loads(line) for line in (world / "pairs.jsonl").open()]
    rng = random.Random(f"flips/{seed}")
    flipped = set(rng.sample(range(len(rows)), round(flips * len(rows))))
    for i, row in enumerate(rows):
        row["flipped"] = int(i in flipped)
        if i in flipped:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)
    return path


def _exact(world: pathlib.Path, seed: int, task: str) -> list[dict[str, Any]]:
    """Ground truth against the policy: worked solutions chosen, its wrong answers rejected.

    One answer is sampled to each training problem; those that are right make no pair. Problems
    that the policy never solves are among them, which on-policy pairs cannot hold.
    """
    from sage_jax import models
    from sage_jax.generate import sampler, tasks

    base = load("quickstart_base", BASE)
    of = tasks.resolve(task)
    problems = tasks.problems(of, count=base.sample.count, seed=seed, split="train")
    problems = list({problem.prompt: problem for problem in problems}.values())
    model, params = models.load(world / "base" / "export")
    tokenizer = models.load_tokenizer(world / "base" / "export")
    answers = sampler.generate(
        model, params, tokenizer, [problem.prompt for problem in problems], temperature=1.0,
        max_new_tokens=base.eval.max_new_tokens, seed=seed, batch=base.eval.batch,
    )  # fmt: skip
    return [
        {"prompt": problem.prompt, "chosen": problem.solution, "rejected": answer.text,
         "level": problem.level, "task": task, "answer": problem.answer}
        for problem, (answer,) in zip(problems, answers, strict=True)
        if answer.finished and answer.text and not of.check(answer.text, problem.answer)
    ]  # fmt: skip


def _static(world: pathlib.Path) -> list[dict[str, Any]]:
    """What `sage-jax score` selects before training, by the settings of `RUN`."""
    from sage_jax.runtime import modes

    where = world / f"scored.{os.getpid()}"
    settings = RUN | {"model.path": str(world / "base" / "export"),
                      "data.train": str(world / "pairs.jsonl"),
                      "reference.store": str(world / "reference")}  # fmt: skip
    with _quiet():
        modes.score(load("quickstart", settings), where)
    return [json.loads(line) for line in (where / "selected.jsonl").open()]


def checked(scratch: pathlib.Path, job: Job) -> tuple[Any, str]:
    """The run of a job, and the key of its record: of all settings as the run will have them.

    So a changed default is another run, and a setting at its default none.
    """
    from sage_jax import config

    world = world_path(scratch, job.task, job.seed, job.model)
    settings = RUN | RUN_OF.get(job.task, {}) | {
        "model.path": str(world / "base" / "export"),
        "data.train": str(pairs_path(world, job.flips, job.chosen)),
        "eval.problems": f"task:{job.task}", "eval.split": job.split,
        "seed": job.seed, "eval.seed": job.seed,
        "reference.store": str(scratch / "reference"), "data.cache": str(scratch / "encoded"),
    } | dict(job.settings)  # fmt: skip
    run = load("quickstart", settings)
    columns = {} if job.chosen == "exact" else {"pass_rate": [0.5]}
    settled = config.settle_data(run, columns)
    if run.selection.margin == "auto":  # by the pass rates of a world that may not be made yet
        settled = config.replace(settled, **{"selection.margin": "auto"})
    return run, hashlib.blake2b(repr(settled).encode(), digest_size=10).hexdigest()


def _record(scratch: pathlib.Path, key: str) -> pathlib.Path:
    return scratch / "runs" / f"{key}.json"


def finished(scratch: pathlib.Path, job: Job) -> dict[str, Any] | None:
    """What a run of this job left, if it was judged where that is asked for."""
    record = _record(scratch, checked(scratch, job)[1])
    if not record.exists():
        return None
    found = json.loads(record.read_text())
    return found if not job.judge or "detector" in found else None


def run_job(scratch: pathlib.Path, job: Job) -> dict[str, Any]:
    """Trains one job, or returns what it left before: its curve and what it spent."""
    from sage_jax import config
    from sage_jax.runtime import modes

    if found := finished(scratch, job):
        return found
    world = make_world(scratch, job.task, job.seed, job.model)
    pairs_file(world, job.seed, job.flips, job.chosen, job.task)
    run, key = checked(scratch, job)
    if job.judge:
        run = config.replace(run, **{"checkpoint.every": job.judge, "checkpoint.keep": 1000})
    record = _record(scratch, key)
    workdir = scratch / "workdirs" / f"{key}.{os.getpid()}"
    shutil.rmtree(workdir, ignore_errors=True)
    start = time.perf_counter()
    with _quiet():
        modes.train(run, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    found = {
        "job": dataclasses.asdict(job),
        "curve": curves.points(rows),
        "summary": json.loads((workdir / "summary.json").read_text()),
        "rewards/margins": [row["rewards/margins"] for row in rows if "rewards/margins" in row],
        "seconds": time.perf_counter() - start,
        "machine": common.machine(),
    }
    if job.judge:
        found["detector"] = judge.judged(workdir, run, job.judge)
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(record)
    shutil.rmtree(workdir)
    return found


def _quiet():
    return contextlib.redirect_stdout(io.StringIO())


def _start(cores: Any, scratch: str) -> None:
    """A worker keeps to one core: two runs at once then do not wait for each other's threads."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    sys.stderr = open(os.devnull, "w")  # progress of many runs at once
    import jax

    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(scratch) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def workers(scratch: pathlib.Path, processes: int) -> Any:
    """A pool of processes, each on a core of its own; to be used in a `with`."""
    os.environ.setdefault("GLIBC_TUNABLES", common.KEEP_MEMORY)  # for the workers
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for i in range(processes):
        cores.put(usable[i % len(usable)])
    return context.Pool(processes, _start, (cores, str(scratch)))


def run_all(
    scratch: pathlib.Path, jobs: Iterable[Job], processes: int, minutes: float = 0.0
) -> dict[Job, dict]:
    """Runs jobs side by side, each on a core of its own, in order as far as their worlds are there.

    Every finished run leaves its record at once, and those that have one are not run again. With
    `minutes`, nothing is begun after these, and what is there is returned.
    """
    alike: dict[str, list[Job]] = {}
    for j in jobs:
        alike.setdefault(checked(scratch, j)[1], []).append(j)
    # One run for all jobs that are the same; judged if one of them asks for it.
    first = {key: max(same, key=lambda j: j.judge) for key, same in alike.items()}
    done: dict[Job, dict] = {}
    left: dict[str, Job] = {}
    for key, j in first.items():
        if found := finished(scratch, j):
            done |= dict.fromkeys(alike[key], found)
        else:
            left[key] = j
    worlds = list(dict.fromkeys(_world(j) for j in left.values()))
    absent = set(worlds)
    began, ended, running = time.perf_counter(), queue.SimpleQueue[Any](), 0
    with workers(scratch, processes) as pool:
        while True:
            while running < processes and not (
                minutes and time.perf_counter() - began > 60 * minutes
            ):
                ready = (key for key, j in left.items() if _world(j) not in absent)
                task: tuple[Any, ...]
                if worlds:
                    task = (_make, scratch, worlds.pop(0))
                elif (key := next(ready, None)) is not None:
                    task = (_run, scratch, key, left.pop(key))
                else:
                    break
                pool.apply_async(*task[:1], task[1:], {}, ended.put, ended.put)
                running += 1
            if not running:
                return done
            found, running = ended.get(), running - 1
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, tuple) and len(found) == 3:
                absent.discard(found)
                _say(f"world: {found[0]} seed {found[1]}, {len(absent)} left", began)
                continue
            key, result = found
            done |= dict.fromkeys(alike[key], result)
            what, last = first[key], result["curve"][-1]["accuracy"]
            _say(f"run {len(first) - len(left) - running} of {len(first)}: {what.task} seed "
                 f"{what.seed} {last:.3f}", began)  # fmt: skip


def _world(job: Job) -> tuple[str, int, str]:
    return job.task, job.seed, job.model


def _make(scratch: pathlib.Path, world: tuple[str, int, str]) -> tuple[str, int, str]:
    make_world(scratch, *world)
    return world


def _run(scratch: pathlib.Path, key: str, job: Job) -> tuple[str, dict[str, Any]]:
    return key, run_job(scratch, job)


def _say(text: str, began: float) -> None:
    print(f"{time.perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="worlds; 0-4 chose nothing")
    parser.add_argument("--task", default=",".join(TASKS), help="names, or module:attribute")
    parser.add_argument("--scratch", default="runs/selection", help="worlds and runs are kept here")
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--out", default=str(RESULTS / out))
    parser.add_argument("--steps", type=int, default=200)
    return parser


def cores() -> int:
    """Cores that this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def setting(change: str) -> tuple[str, Any]:
    """A `key=value` of the command line; values are JSON, or text."""
    key, _, value = change.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def write(
    path: str,
    question: str,
    tables: Sequence[str],
    result: dict[str, Any],
    done: Mapping[Job, dict[str, Any]] | None = None,
) -> None:
    """JSON and its tables as Markdown, side by side, with the machines that made the runs."""
    made_on = [r["machine"] for r in done.values()] if done else [common.machine()]
    machines = {json.dumps(m, sort_keys=True): m for m in made_on}
    common.write(path, {"question": question} | result | {"machines": list(machines.values())})
    where = ", ".join(sorted({
        f"one core a run of {about['cpu']}, JAX {about['jax']}, commit {about['commit']}"
        for about in machines.values()
    }))  # fmt: skip
    head = f"# {question}\n\n`{' '.join(['python', *sys.argv])}` on {where}.\n\n"
    pathlib.Path(path).with_suffix(".md").write_text(head + "\n\n".join(tables) + "\n")
