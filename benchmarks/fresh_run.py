"""How long does a stranger wait? A config from an empty virtual environment to its last line.

    python benchmarks/fresh_run.py --config=quickstart --out=benchmarks/results/quickstart.json
    python benchmarks/fresh_run.py --config=smollm2_arithmetic --no-install --out=OUT.json

Reference log-probs and encoded data are computed anew: the run gets a cache of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv

import common

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="quickstart", help="name of a file in configs/")
    parser.add_argument("--no-install", action="store_true", help="use the python that runs this")
    parser.add_argument("--out", default="")
    args, overrides = parser.parse_known_args()
    if importlib.util.find_spec("jax") is None:  # the machine is described by it, after the run
        parser.error(f"{sys.executable} has no jax. Use a Python in which sage_jax is installed.")
    result: dict[str, object] = {"question": __doc__.split("\n")[0]}
    with tempfile.TemporaryDirectory() as scratch:
        python, workdir = sys.executable, pathlib.Path(scratch) / "run"
        if not args.no_install:
            start = time.perf_counter()
            venv.create(pathlib.Path(scratch) / "venv", with_pip=True)
            python = str(pathlib.Path(scratch) / "venv/bin/python")
            subprocess.run([python, "-m", "pip", "install", "-q", "-e", str(ROOT)], check=True)
            result["install_seconds"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        config = ROOT / "configs" / f"{args.config}.py"
        ran = subprocess.run(
            [python, "-m", "sage_jax", "train", f"--config={config}", f"--workdir={workdir}",
             *overrides],
            env=os.environ | {"SAGE_JAX_CACHE": str(pathlib.Path(scratch) / "cache")},
            capture_output=True, text=True, cwd=scratch, check=False,
        )  # fmt: skip
        if ran.returncode:
            sys.exit(ran.stdout + ran.stderr)
        result["run_seconds"] = round(time.perf_counter() - start, 1)
        result["load_average"] = os.getloadavg()
        result["overrides"] = overrides
        result["summary"] = json.loads((workdir / "summary.json").read_text())
        result["printed"] = ran.stdout.replace(str(workdir), f"runs/{args.config}").splitlines()
    common.write(args.out, result)


if __name__ == "__main__":
    main()
