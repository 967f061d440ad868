"""How much of the accelerator's measured matrix-product rate do a train and a score step reach?

    python benchmarks/mfu.py --out=benchmarks/results/mfu.json                  # an accelerator
    python benchmarks/mfu.py --model=smollm2_135m --dtype=float32 --tokens=2048 --out=...   # a CPU

First the ceiling: products of the dtype of the model, large square ones and those of its layers.
Then attention back ends, each checked against the dense form before it is timed, and the floor:
all products of a step with its weights, and its attention, each alone, as if there were nothing
else to do. Then whole steps at the best of them: scoring, training, and training with one thing
changed at a time. FLOPs are those of the real tokens and the keys that they see: padding and
recomputation do not count. Everything is written as soon as it is known; what the time limit
leaves no room for is not begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import ours
import race
from absl import flags

from sage_jax import batch, head, logprobs, product, step
from sage_jax.models import attention

PARTS = ("attention", "floor", "steps")  # after the ceiling


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    race.arguments(parser)
    parser.set_defaults(length_mean=512.0, pairs=0, batch_pairs=0)
    parser.add_argument("--model", default="qwen2p5_1p5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384, help="of a train step")
    parser.add_argument("--score-tokens", type=int, default=32768, help="of a scoring batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernels", default="", help="'' = those of the platform")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts, by comma; floor needs attention"
    )
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if set(args.only) - set(PARTS) or ("floor" in args.only and "attention" not in args.only):
        parser.error(f"--only: any of {', '.join(PARTS)}, and attention with floor")
    return args


class Report:
    """What is known, written whenever something is added."""

    def __init__(self, path: str, limit: float, about: dict[str, Any]):
        self.path, self.until = path, time.perf_counter() + limit
        self.known: dict[str, Any] = {
            "question": __doc__.split("\n")[0],
            "settings": about,
            "machine": common.machine(),
        }

    def add(self, name: str, value: Any) -> None:
        self.known[name] = value
        print(f"{name}: {json.dumps(value)}", file=sys.stderr, flush=True)
        if self.path:
            pathlib.Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(self.path).write_text(json.dumps(self.known, indent=1) + "\n")

    def part(self, name: str, run: Callable[[], Any], needs: float = 0.0) -> Any:
        """Runs a part if there is time, and reports its failure as its result."""
        if time.perf_counter() + needs > self.until:
            self.add(name, {"skipped": "no time left"})
            return None
        began = time.perf_counter()
        try:
            value = run()
        except Exception as e:  # what one part cannot do says nothing of the others
            traceback.print_exc()
            value = {"failed": f"{type(e).__name__}: {str(e)[:600]}"}
        if isinstance(value, dict):
            value["seconds_in_all"] = round(time.perf_counter() - began, 1)
        self.add(name, value)
        gc.collect()
        return value


def seconds(fn: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Median of calls, each long enough for a clock."""
    jax.block_until_ready(fn(*args))
    began = time.perf_counter()
    jax.block_until_ready(fn(*args))
    count = max(1, int(0.02 / max(time.perf_counter() - began, 1e-6)))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(count):
            out = fn(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / count)
    return statistics.median(times)


def ceiling(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """FLOP/s of matrix products, on random numbers."""
    spec, dtype = model.spec, jnp.dtype(args.dtype)
    square = 8192 if jax.default_backend() != "cpu" else 1536
    tokens = min(args.tokens, 8192)
    shapes = {
        "square": (square, square, square),
        "mlp": (tokens, spec.d_model, spec.d_ff),
        "head": (min(tokens, 1024), spec.d_model, spec.vocab),
    }
    out = {}
    for name, (m, k, n) in shapes.items():
        a, b = (
            jax.random.normal(jax.random.key(i), shape, dtype)
            for i, shape in enumerate(((m, k), (k, n)))
        )
        fn = jax.jit(
            lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)
        )
        out[name] = 2.0 * m * k * n / seconds(fn, a, b, repeats=args.repeats)
    return {"flops_per_second": out, "ceiling": max(out.values())}


def rows_of(args: argparse.Namespace, model: Any, tokens: int, **options: Any) -> ours.Ours:
    """One batch of about so many tokens."""
    rough = argparse.Namespace(**vars(args) | {"pairs": 4 * max(4, tokens // 256)})
    rows = race.rows(rough, model.spec.vocab)
    share = options.get("share", True)
    sizes = [race.tokens_of(row) - (len(row["prompt_ids"]) if share else 0) for row in rows]
    count = max(1, int(np.searchsorted(np.cumsum(sizes), tokens, side="right")))
    return ours.make(model, rows[:count], count, **options)


def attention_part(args: argparse.Namespace, model: Any, names: list[str], report: Report) -> str:
    """Times each back end on the layer's shapes; returns the fastest that is right."""
    spec = model.spec
    mine = rows_of(args, model, args.tokens)
    rows = mine.batches[0]
    dtype = jnp.dtype(args.dtype)

    def place(name: str) -> attention.Placement:
        return dataclasses.replace(mine.model.place, name=name)

    def inputs(length: int):
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(1, length, n, spec.head_dim) for n in (spec.heads, *[spec.kv_heads] * 2)]
        arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
        slope = jax.random.normal(keys[3], (1, length, spec.heads * spec.head_dim), dtype)
        return arrays, slope

    def visible(length: int) -> attention.Visible:
        first, last = (jnp.asarray(x)[:, :length] for x in rows.shared[:2])
        last = jnp.minimum(last, length - 1)  # a range that is cut off is still a range
        position = jnp.asarray(rows.position_RT)[:, :length]
        return attention.Visible(first, last, position, jax.lax.cummax(last, axis=1))

    def program(name: str, length: int, dtype_: Any = None):
        seen = visible(length)

        def run(arrays, slope):
            cast = [x.astype(dtype_ or dtype) for x in arrays]
            out, pull = jax.vjp(
                lambda *a: attention.attend(*a, seen, scale=spec.head_dim**-0.5, place=place(name)),
                *cast,
            )
            return out, *pull(slope.astype(out.dtype))

        return jax.jit(run)

    short = min(2048, rows.tokens_RT.shape[1])
    wanted = program("dense", short, jnp.float32)(*inputs(short))
    length = rows.tokens_RT.shape[1]
    best, least = "blocks", float("inf")

    def one(name: str) -> dict[str, Any]:
        found = program(name, short)(*inputs(short))
        error = max(
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b))
            for a, b in zip(found, wanted, strict=True)
        )
        right = error < (2e-2 if dtype == jnp.bfloat16 else 1e-4)
        arrays, slope = inputs(length)
        seen = visible(length)
        forward = jax.jit(
            lambda *a: attention.attend(*a, seen, scale=spec.head_dim**-0.5, place=place(name))
        )
        return {
            "error": error,
            "right": right,
            "tokens": length,
            "forward_milliseconds": 1e3 * seconds(forward, *arrays, repeats=args.repeats),
            "both_milliseconds": 1e3 * seconds(program(name, length), arrays, slope,
                                               repeats=args.repeats),
        }  # fmt: skip

    for name in names:
        found = report.part(f"attention {name}", functools.partial(one, name), needs=10)
        if found and found.get("right") and found["both_milliseconds"] < least:
            best, least = name, found["both_milliseconds"]
    return best


def floor(
    args: argparse.Namespace, model: Any, top: float, attention_: dict[str, Any]
) -> dict[str, Any]:
    """MFU of steps that were their products with weights and their attention, each by itself.

    Norms, softmax, rotations and the optimizer come on top.

    Args:
        args: of the command line.
        model: whose step.
        top: FLOP/s of the ceiling.
        attention_: what `attention_part` measured of the back end in use, on the rows of training.
    """
    dtype = jnp.dtype(args.dtype)
    kernels: dict[tuple[int, int], int] = {}  # (in, out) -> how many
    for path, x in jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(model.init, jax.random.key(0))
    ):
        if "'kernel'" in jax.tree_util.keystr(path):
            size = (x.shape[-2], x.shape[-1])
            kernels[size] = kernels.get(size, 0) + int(np.prod(x.shape[:-2]))

    def alone(positions: int, width: int, out: int, backward: bool) -> float:
        shapes = {"x": (positions, width), "w": (width, out), "y": (positions, out)}
        x, w, y = (
            jax.random.normal(jax.random.key(i), shape, dtype)
            for i, shape in enumerate(shapes.values())
        )
        time_of = functools.partial(seconds, repeats=args.repeats)

        def product_of(x, w):  # in the form in which a step has it
            return product.matmul(x, w, jax.default_backend())

        taken = time_of(jax.jit(product_of), x, w)
        if backward:
            taken += time_of(jax.jit(lambda x, w, y: jax.vjp(product_of, x, w)[1](y)), x, w, y)
        return taken

    out = {}
    for name, tokens in (("score", args.score_tokens), ("train", args.tokens)):
        mine = rows_of(args, model, tokens)
        rows = mine.batches[0]
        counted = int(np.asarray(logprobs.targets(rows)[2]).sum())
        all_of = {size: (rows.tokens_RT.size, often) for size, often in kernels.items()}
        all_of[model.spec.d_model, model.spec.vocab] = (counted, 1)
        backward = name == "train"
        taken = sum(
            often * alone(positions, *size, backward) for size, (positions, often) in all_of.items()
        )
        times = 3.0 if backward else 1.0
        flops = times * mine.useful_flops(rows)
        real = int((np.asarray(rows.segment_RT) > 0).sum())
        weights = times * model.forward_flops(real, 0, counted)
        of = attention_["both_milliseconds" if backward else "forward_milliseconds"] / 1e3
        attended = model.spec.layers * of * rows.tokens_RT.size / attention_["tokens"]
        out[name] = {
            "seconds_products": taken,
            "seconds_attention": attended,
            "mfu_of_the_products": weights / taken / top,
            "mfu": flops / (taken + attended) / top,
        }
    return out


def score(args: argparse.Namespace, model: Any, params: Any, top: float, **options: Any):
    mine = rows_of(args, dataclasses.replace(model, remat="none"), args.score_tokens, **options)
    rows = jax.device_put(mine.batches[0])
    cast = params
    if jax.default_backend() != "cpu":  # as `runtime.forward` does
        cast = jax.tree.map(lambda x: x.astype(jnp.dtype(args.dtype)) if x.ndim > 2 else x, params)
    fn = mine.stats.lower(cast, None, rows).compile()
    taken = seconds(fn, cast, None, rows, repeats=args.repeats)
    return figures(mine, mine.batches[0], taken, 1.0, top)


def figures(mine: ours.Ours, rows: batch.PackedBatch, taken: float, times: float, top: float):
    flops = times * mine.useful_flops(rows)
    tokens = int((np.asarray(rows.segment_RT) > 0).sum())
    given = int(mine.pairs.lengths_N2.sum())
    return {
        "milliseconds": 1e3 * taken,
        "pairs": len(mine.pairs),
        "tokens": tokens,
        "tokens_given": given,  # with the prompt on both sides
        "row_length": rows.tokens_RT.shape[1],
        "tokens_given_per_second": given / taken,
        "padding_fraction": 1 - tokens / rows.tokens_RT.size,
        "flops_per_second": flops / taken,
        "mfu": flops / taken / top,
    }


def train(args: argparse.Namespace, model: Any, params: Any, top: float, **options: Any):
    """The state is made anew, so that two never share the memory."""
    mine = rows_of(args, model, args.tokens, **options)
    rows = jax.device_put(mine.batches[0])
    tx = mine.optimizer()
    state = jax.jit(lambda p: step.init_state(jax.tree.map(jnp.copy, p), tx))(params)
    compiled = mine.train_step().lower(state, None, rows).compile()
    found = compiled.memory_analysis()
    held = [state]
    del state

    def call():
        held[0], output = compiled(held[0], None, rows)
        return output.metrics["loss"]

    taken = seconds(call, repeats=args.repeats)
    out = figures(mine, mine.batches[0], taken, 3.0, top)
    if found is not None:
        out["temporary_bytes"] = found.temp_size_in_bytes
    return out


def main() -> None:
    args = parse()
    flags.FLAGS(sys.argv[:1])  # tokamax reads flags of its own, which argparse knows nothing of
    report = Report(args.out, args.time_limit, vars(args) | {"out": ""})
    model = ours.model_of(args.model, dtype=args.dtype)
    top = report.part("ceiling", lambda: ceiling(args, model))["ceiling"]
    platform = jax.default_backend()
    names = args.kernels.split(",") if args.kernels else {
        "gpu": ["triton", "tokamax", "blocks"], "tpu": ["splash", "blocks"],
    }.get(platform, ["blocks"])  # fmt: skip
    best = names[0]
    if "attention" in args.only:
        best = attention_part(args, model, names, report)
        report.add("attention used", best)
        if "floor" in args.only:
            known = report.known[f"attention {best}"]
            report.part("floor", lambda: floor(args, model, top, known), needs=30)
    if "steps" not in args.only:
        return
    model = dataclasses.replace(model, place=attention.Placement(best))
    params = jax.jit(model.init)(jax.random.key(0))
    parameters = sum(x.size for x in jax.tree.leaves(params))
    report.add("parameters", parameters)
    run = functools.partial(train, args, model, params, top)
    report.part("score", lambda: score(args, model, params, top), needs=30)
    report.part("train", run, needs=40)
    report.part("train without shared prompts", lambda: run(share=False), needs=40)
    small = head.Memory(chunk=2**26, kept=0)
    report.part("train with a head of 64 MiB", lambda: run(budget=small), needs=40)
    for remat in ("full", "none"):
        other = dataclasses.replace(model, remat=remat)
        report.part(
            f"train with remat {remat}",
            lambda other=other: train(args, other, params, top),
            needs=40,
        )
    report.part(
        "score without shared prompts",
        lambda: score(args, model, params, top, share=False),
        needs=30,
    )


if __name__ == "__main__":
    main()
