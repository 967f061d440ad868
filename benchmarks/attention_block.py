"""Which blocks should attention compute on a CPU, by the length of sequences?

    python benchmarks/attention_block.py

Forward and backward pass of one layer's attention over a row of packed sequences, all equally long,
with blocks of 32 and of 64 queries and keys; medians of turns taken in one run. The rule that comes
of it is `attention.block_for`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from sage_jax.models import attention

# Channels of a head, heads, key heads: a toy's, SmolLM2-135M's, Qwen2.5-1.5B's.
SHAPES = {"toy": (16, 4, 2), "small": (32, 4, 2), "smollm2": (64, 9, 3), "qwen2": (128, 12, 2)}
BLOCKS = (attention.SHORT_BLOCK, attention.BLOCK)


def program(shape: tuple[int, int, int], row: int, tokens: int, block: int) -> Any:
    """A call of the gradient, compiled and warmed up."""
    width, heads, key_heads = shape
    rng = np.random.default_rng(0)
    index = np.arange(row)
    seen = attention.causal(
        jnp.asarray(index // tokens + 1)[None], jnp.asarray(index % tokens, jnp.int32)[None]
    )
    given = [
        jnp.asarray(rng.standard_normal((1, row, n, width)), jnp.float32)
        for n in (heads, key_heads, key_heads)
    ]
    place = attention.Placement("blocks", block=block)

    @jax.jit
    @jax.grad
    def slope(arrays: list[jax.Array]) -> jax.Array:
        out = attention.attend(*arrays, seen, scale=width**-0.5, place=place)
        return jnp.square(out).sum()

    def call() -> None:
        jax.block_until_ready(slope(given))

    call()
    call()
    return call


def one(shape: tuple[int, int, int], args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Milliseconds by block."""
    calls = {block: program(shape, args.row, tokens, block) for block in BLOCKS}
    times: dict[int, list[float]] = {block: [] for block in BLOCKS}
    for _ in range(args.repeats):
        for block, call in calls.items():
            began = time.perf_counter()
            call()
            times[block].append(1e3 * (time.perf_counter() - began))
    median = {block: statistics.median(found) for block, found in times.items()}
    short, long = (median[block] for block in BLOCKS)
    return {"tokens": tokens, "milliseconds": median, "ratio": short / long,
            "taken": attention.block_for(shape[0], tokens)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="40,80,160,320,640", help="of a sequence")
    parser.add_argument("--row", type=int, default=2048, help="tokens")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    for name in args.shapes.split(","):
        if name not in SHAPES:
            parser.error(f"--shapes: {name!r} is none of {', '.join(SHAPES)}")
        result[name] = [one(SHAPES[name], args, int(n)) for n in args.tokens.split(",")]
        for row in result[name]:
            print(f"{name:8} {row['tokens']:5} tokens: {row['ratio']:.2f} of the time of blocks of "
                  f"{BLOCKS[1]}, {row['taken']} taken", flush=True)  # fmt: skip
    if args.out:
        common.write(args.out, {"row": args.row, "channels, heads, key heads": SHAPES,
                                "results": result})  # fmt: skip


if __name__ == "__main__":
    main()
