"""What does a train step cost as sequences, steps and models grow?

    python benchmarks/scaling.py --out=benchmarks/results/scaling.json

One thing grows at a time, from the same middle: tokens of a side, pairs in a step (all in one row),
width and depth of the model. Each point is a whole optimizer step on packed pairs with shared
prompts, in milliseconds a pair and in achieved FLOP/s of the real tokens; where the step is as
good as its matrix products, the latter does not depend on the point.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import common
import jax
import jax.numpy as jnp
import mfu
import ours
import race

from sage_jax import models, step

MIDDLE = {"length": 128, "pairs": 8, "width": 256, "layers": 4}
POINTS = {
    "length": (64, 128, 256, 512, 1024),
    "pairs": (2, 8, 32, 128),
    "width": (128, 256, 512),
    "layers": (2, 4, 8),
}


def point(args: argparse.Namespace, **sizes: int) -> dict[str, Any]:
    at = MIDDLE | sizes
    width = at["width"]
    spec = models.ModelSpec(
        vocab=args.vocabulary, d_model=width, d_ff=8 * width // 3 // 32 * 32,
        layers=at["layers"], heads=width // 32, kv_heads=max(1, width // 64),
    )  # fmt: skip
    model = models.Model(spec, dtype=args.dtype)
    settings = argparse.Namespace(
        **vars(args) | {"pairs": at["pairs"], "length_mean": at["length"], "max_length": 10**5}
    )
    mine = ours.make(model, race.rows(settings, spec.vocab), at["pairs"])
    rows = jax.device_put(mine.batches[0])
    params = jax.jit(model.init)(jax.random.key(0))
    state = jax.jit(lambda p: step.init_state(jax.tree.map(jnp.copy, p), mine.optimizer()))(params)
    program = mine.train_step().lower(state, None, rows).compile()
    held = [state]

    def call():
        held[0], output = program(held[0], None, rows)
        return output.metrics["loss"]

    taken = mfu.seconds(call, repeats=args.repeats)
    memory = program.memory_analysis()
    return at | {
        "row_length": rows.tokens_RT.shape[1],
        "padding_fraction": mine.padding,
        "milliseconds_per_pair": 1e3 * taken / at["pairs"],
        "flops_per_second": 3.0 * mine.useful_flops(mine.batches[0]) / taken,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    race.arguments(parser)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="of " + ", ".join(POINTS))
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name in args.only.split(",") if args.only else POINTS:
        found[name] = [point(args, **{name: value}) for value in POINTS[name]]
        print(name, [round(p["milliseconds_per_pair"], 1) for p in found[name]], file=sys.stderr)
    result = {"question": __doc__.split("\n")[0], "settings": vars(args), "points": found}
    common.write(args.out, result)


if __name__ == "__main__":
    main()
