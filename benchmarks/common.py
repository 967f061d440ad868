"""What every benchmark needs: the machine's name, medians, and a JSON file at the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# XLA allocates a program's temporaries at every call. glibc maps large ones afresh and unmaps them
# afterwards, so on a CPU the kernel clears every page again in every step. With these settings in
# the environment variable GLIBC_TUNABLES it keeps them, in huge pages (host_memory.py).
KEEP_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    import jax

    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "devices": [d.device_kind for d in jax.devices()],
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "commit": commit(),
    }


def commit() -> str:
    """The checked-out commit, with + when files differ from it; "" where there is no git.

    A copy without a .git names it in the environment variable SAGE_JAX_COMMIT.
    """
    if named := os.environ.get("SAGE_JAX_COMMIT"):
        return named
    here = pathlib.Path(__file__).parent
    if shutil.which("git") is None:
        return ""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "-uno") else ""
    )


def median_seconds(fn: Callable[[], Any], *, repeats: int, warmup: int = 2) -> float:
    """Median wall time of a call whose result is waited for."""
    import jax

    for _ in range(warmup):
        jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved_seconds(
    fns: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Wall times of calls that take turns, so that what slows the machine down slows all of them.

    Every other turn goes backwards, so that none profits from its place.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(warmup + repeats):
        for name in list(fns)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(fns[name]())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios turn by turn: both sides of each were measured side by side."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def write(path: str | None, result: dict[str, Any]) -> None:
    """Prints the result as JSON, or writes it to a file."""
    text = json.dumps({"command": " ".join(sys.argv), "machine": machine()} | result, indent=1)
    if path:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(text + "\n")
        print(f"wrote {path}", file=sys.stderr)
    else:
        print(text)
