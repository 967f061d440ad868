"""Does SAGE need less than uniform DPO on the quickstart's task?

    python benchmarks/quickstart_compare.py --seeds=0,1,2 --out=OUT.json
    python benchmarks/quickstart_compare.py --world=fresh --seeds=0,1,2,3,4 --out=OUT.json

All methods start from one decoder and one set of pairs and take the same number of optimizer steps;
every point of a curve carries the steps, pairs, total FLOPs and device seconds (scoring counted)
behind it. Differences are paired by seed. With the decoder and pairs of the package a seed changes
the order of the data and the held-out problems. With `--world=fresh` it is a world of its own: a
new faulty teacher, a decoder supervised by it, and pairs sampled from that decoder (three minutes
more each). Beside OUT.json come OUT.md and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "selection"))

import common  # noqa: E402
import curves  # noqa: E402
import lab  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {  # settings besides those of configs/quickstart.py
    "sage": {},
    "sage_fresh": {"selection.refresh": 1.0},
    "sage_memory": {"selection.refresh": 0.0},
    "uniform": {"selection.name": "uniform"},
    "random": {"selection.name": "random", "curriculum.sharpness": 0.0},
    "gradient": {"selection.name": "gradient", "selection.uniform_share": 0.0,
                 "curriculum.sharpness": 0.0, "selection.margin": "reward"},
}  # fmt: skip
RUN: dict[str, Any] = {"compare.uniform": False, "eval.kl_prompts": 0}  # of every method
COLUMNS = {  # of the table: what `curves.compare` found, its heading, and whether it has a sign
    "accuracy_before": ("before", False),
    "accuracy_after": ("after", False),
    "minus_uniform_over_step": ("− uniform, mean over steps", True),
    "minus_uniform_over_flops": ("− uniform, mean over FLOPs", True),
    "step_to_95": ("steps to 95 % of uniform's best gain", False),
    "flops_to_95": ("FLOPs for that", False),
}


def make_world(directory: pathlib.Path, seed: int) -> dict[str, Any]:
    """Supervises a decoder on a new teacher and samples pairs from it; returns settings."""
    from sage_jax.runtime import modes

    base = {"seed": seed, "eval.count": 8}
    found = {
        "model.path": str(directory / "base" / "export"),
        "data.train": str(directory / "pairs" / "pairs.jsonl"),
    }
    if not pathlib.Path(found["data.train"]).exists():
        modes.sft(lab.load("quickstart_base", base), directory / "base")
        sampling = lab.load("quickstart_base", base | {"model.path": found["model.path"]})
        modes.sample(sampling, directory / "pairs")
    return found


def train(settings: dict[str, Any], workdir: pathlib.Path) -> list[curves.Point]:
    """The curve of one run."""
    from sage_jax.runtime import modes

    modes.train(lab.load("quickstart", settings), workdir)
    if not (workdir / "summary.json").exists():
        sys.exit("stopped before the end; nothing was written")
    with (workdir / "metrics.jsonl").open() as lines:
        return curves.points([json.loads(line) for line in lines])


def arguments() -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """The command line, and the methods that it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--world", choices=("fresh", "shipped"), default="shipped")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; 0 = the config's")
    parser.add_argument("--lr", type=float, default=0.0, help="for all methods; 0 = the config's")
    parser.add_argument("--split", default="test", help="test, or eval for choosing settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...",
                        help="another method: SAGE with settings changed")  # fmt: skip
    parser.add_argument("--worlds", default="", help="directory where worlds are kept")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    variants = {}
    for variant in args.variant:
        name, _, changes = variant.partition(":")
        variants[name] = dict(lab.setting(change) for change in changes.split(","))
    known, names = METHODS | variants, [*args.methods.split(","), *variants]
    if "uniform" not in names or set(names) - set(known):
        parser.error(f"--methods must hold uniform and be among {', '.join(METHODS)}")
    return args, {name: known[name] for name in names}


def main() -> None:
    args, methods = arguments()
    shared = RUN | {"eval.split": args.split}
    if args.steps:
        shared["train.steps"] = args.steps
    if args.lr:
        shared["optim.lr"] = args.lr
    shared |= dict(lab.setting(change) for change in args.set)
    found: dict[str, dict[int, list[curves.Point]]] = {name: {} for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as scratch:
        worlds = pathlib.Path(args.worlds or scratch)
        for seed in lab.numbers(args.seeds):
            settings = shared | {"seed": seed, "eval.seed": seed}
            if args.world == "fresh":
                settings |= make_world(worlds / f"world_{seed}", seed)
            for name, changes in methods.items():
                start = time.perf_counter()
                workdir = pathlib.Path(scratch) / f"{name}_{seed}"
                found[name][seed] = train(settings | changes, workdir)
                seconds[name].append(time.perf_counter() - start)
                print(f"seed {seed} {name}: {found[name][seed][-1]}", file=sys.stderr, flush=True)
    summary = {name: curves.compare(by_seed, found["uniform"]) for name, by_seed in found.items()}
    rows = [
        [name, *(curves.text(row.get(key), sign=sign) for key, (_, sign) in COLUMNS.items())]
        for name, row in summary.items()
    ]
    table = curves.markdown(["method", *(title for title, _ in COLUMNS.values())], rows)
    result = {
        "world": args.world, "settings": shared, "methods": methods, "summary": summary,
        "seconds": seconds, "curves": found,
    }  # fmt: skip
    if args.out:
        lab.write(args.out, __doc__.split("\n")[0], [table], result)
        path = pathlib.Path(args.out).with_suffix(".png")
        curves.plot({"arithmetic": found}, path, ("step", "pairs", "flops"))
    else:
        common.write("", {"question": __doc__.split("\n")[0]} | result)
    print(table, file=sys.stderr)


if __name__ == "__main__":
    main()
