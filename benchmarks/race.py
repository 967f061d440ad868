"""Trainers that take turns on the same pairs, each in a process of its own.

The parent tells one process at a time to take some steps and reads what they took; so whatever
slows the machine down slows all of them, and each one's memory is its own. Where two do not fit
side by side, they run one after the other.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MARK = "race:"  # begins the lines that belong to the parent; libraries print others


def arguments(parser: argparse.ArgumentParser) -> None:
    """The rows, the same for every benchmark that compares trainers."""
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--batch-pairs", type=int, default=8, help="pairs in a step")
    parser.add_argument("--length-mean", type=float, default=171, help="tokens of a side")
    parser.add_argument("--length-sigma", type=float, default=0.5, help="of their logarithm")
    parser.add_argument("--prompt-share", type=float, default=0.415, help="of a side's tokens")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a side, at most")
    parser.add_argument("--seed", type=int, default=0)


def rows(args: argparse.Namespace, vocabulary: int) -> list[dict[str, list[int]]]:
    """Pre-tokenised pairs with log-normal lengths; rejected answers are a fifth longer than chosen.

    At the defaults a pair has about 342 tokens: a prompt of 71, answers of 90 and 110.
    """
    rng = np.random.default_rng(args.seed)
    answer = args.length_mean * (1 - args.prompt_share)

    def ids(mean: float, most: int) -> list[int]:
        sigma = args.length_sigma
        drawn = int(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma))
        return rng.integers(10, vocabulary, min(max(drawn, 2), most)).tolist()

    out = []
    for _ in range(args.pairs):
        prompt = ids(args.length_mean * args.prompt_share, args.max_length // 2)
        left = args.max_length - len(prompt)
        out.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": ids(0.9 * answer, left),
                "rejected_ids": ids(1.1 * answer, left),
            }
        )
    return out


def tokens_of(row: Mapping[str, list[int]]) -> int:
    """Tokens of both sequences, the prompt counted twice: what a trainer is given."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


# ------------------------------------------------------------------------------ in the process


def answer(**values: Any) -> None:
    print(MARK + json.dumps(values), flush=True)


def turns():
    """Yields the number of steps of each turn, until the parent ends the race."""
    for line in sys.stdin:
        word = line.split()
        if word[0] == "end":
            return
        yield int(word[1])


def peak_bytes() -> int:
    """The most memory this process has held: on a GPU there, else in RAM."""
    try:
        import jax

        found = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in found:
            return int(found["peak_bytes_in_use"])
    except ImportError:
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------- in the parent


class Runner:
    """A trainer in its process."""

    def __init__(self, command: list[str], env: Mapping[str, str], log: pathlib.Path):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = log.open("w")
        self._process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._file, text=True,
        )  # fmt: skip
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._file.close()
        end = "\n".join(self.log.read_text().splitlines()[-12:])
        raise RuntimeError(f"A trainer ended early; the end of {self.log}:\n{end}")

    def take(self, steps: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"go {steps}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.flush()
        last = self._read()
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._file.close()
        return last

    def kill(self) -> None:
        self._process.kill()
        self._file.close()


def race(
    starts: Mapping[str, Callable[[], Runner]],
    *,
    steps: int,
    repeats: int,
    apart: bool,
    note: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
) -> dict[str, dict[str, Any]]:
    """Lets trainers take turns of some steps, after one that is not counted.

    Args:
        starts: starts each one.
        steps: steps of a turn.
        repeats: turns that count.
        apart: one after the other instead of in turns.
        note: told what is known of each as soon as it is.

    Returns:
        For each: what it says of itself, the seconds of its turns, and its peak memory.
    """
    out: dict[str, dict[str, Any]] = {}
    groups = [[name] for name in starts] if apart else [list(starts)]
    for names in groups:
        runners: dict[str, Runner] = {}
        try:
            for name in names:
                began = time.perf_counter()
                runners[name] = starts[name]()
                out[name] = {
                    "about": runners[name].about,
                    "seconds_to_start": time.perf_counter() - began,
                    "turns": [],
                }
            for turn in range(repeats + 1):
                for name in names[:: 1 if turn % 2 else -1]:
                    found = runners[name].take(steps)
                    if turn:
                        out[name]["turns"].append(found)
                        note(name, out[name])
            for name in names:
                out[name] |= runners[name].end()
                note(name, out[name])
        finally:
            for runner in runners.values():
                runner.kill()
    return out
