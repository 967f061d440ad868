"""The runs of several experiments in one pool, in the order given, until the time is up.

    python benchmarks/selection/several.py --processes=14 --minutes=8 \\
        "small.py --conditions=exact chosen" "flips.py --seeds=0,1,2"

No core waits for the last run of an experiment, and a machine that is only lent for some minutes
is used to the end. Each finished run leaves its record under `--scratch`; afterwards the commands
themselves find these there, run what is missing, and write their tables.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import shlex

import lab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commands", nargs="+", help='"small.py ...", "flips.py ...", ...')
    parser.add_argument("--scratch", default="runs/selection", help="worlds and runs are kept here")
    parser.add_argument("--processes", type=int, default=lab.cores())
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="begin none after these; 0 = all"
    )
    args = parser.parse_args()
    jobs: list[lab.Job] = []
    for command in args.commands:
        name, *options = shlex.split(command)
        jobs += importlib.import_module(name.removesuffix(".py")).plan(options)
    done = lab.run_all(pathlib.Path(args.scratch), jobs, args.processes, args.minutes)
    print(f"{len(done)} of {len(set(jobs))} runs are there.")


if __name__ == "__main__":
    main()
