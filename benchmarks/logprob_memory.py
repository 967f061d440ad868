"""What do log-probabilities cost when the logits of whole rows are never held?

    python benchmarks/logprob_memory.py --out=benchmarks/results/logprob_memory.json

Forward and backward pass of the log-prob head alone: temporary bytes of the compiled program and
seconds. Whole float32 logits with `log_softmax` against `logprobs.token_stats` with its own chunks,
and over budgets of bytes for a chunk. All variants run in turn, so that ratios are of one run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from typing import Any

import common
import jax
import jax.numpy as jnp

from sage_jax import logprobs

Objective = Any  # (hidden_RTD, head_DV, targets_RT) -> (sum of log-probs, whatever else it knows)


def whole(hidden_RTD, head_DV, targets_RT):
    """The log-probabilities as most code computes them."""
    logits = jnp.einsum("rtd,dv->rtv", hidden_RTD, head_DV, preferred_element_type=jnp.float32)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets_RT[..., None], axis=-1)
    return logp.sum(), ()


def chunked(chunk: int | None = None, *, everything: bool = False) -> Objective:
    """Ours; `everything` also returns entropy, hits and mean logit, which the train step logs."""

    def objective(hidden_RTD, head_DV, targets_RT):
        stats = logprobs.token_stats(hidden_RTD, head_DV, targets_RT, chunk=chunk)
        return stats.logp_RT.sum(), stats if everything else ()

    return objective


def variants(args: argparse.Namespace) -> dict[str, Objective]:
    found = {
        "whole_logits": whole,
        "default_chunk": chunked(),
        "default_chunk_all_statistics": chunked(everything=True),
    }
    for budget in map(int, args.budgets.split(",")):
        chunk = logprobs.chunk_length(args.rows, args.length, args.vocabulary, budget * 2**20)
        found[f"budget_{budget}MiB"] = chunked(chunk)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--budgets", default="4,16,64,256", help="MiB of logits in a chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (args.rows, args.length, args.width), args.dtype)
    head = 0.05 * jax.random.normal(keys[1], (args.width, args.vocabulary), args.dtype)
    targets = jax.random.randint(keys[2], (args.rows, args.length), 0, args.vocabulary)
    compiled, table = {}, {}
    for name, objective in variants(args).items():
        both = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        compiled[name] = both.lower(hidden, head, targets).compile()
        memory: Any = compiled[name].memory_analysis()
        table[name] = {"temporary_bytes": memory.temp_size_in_bytes}

    calls = {k: functools.partial(fn, hidden, head, targets) for k, fn in compiled.items()}
    seconds = common.interleaved_seconds(calls, repeats=args.repeats, warmup=1)
    for name, row in table.items():
        row["seconds"] = statistics.median(seconds[name])
        row["bytes_to_whole"] = row["temporary_bytes"] / table["whole_logits"]["temporary_bytes"]
        row["seconds_to_whole"] = common.median_ratio(seconds[name], seconds["whole_logits"])
        print(name, {k: float(f"{v:.4g}") for k, v in row.items()}, file=sys.stderr)
    common.write(
        args.out,
        {
            "question": __doc__.split("\n")[0],
            "settings": vars(args),
            "default_chunk_tokens": logprobs.chunk_length(args.rows, args.length, args.vocabulary),
            "variants": table,
        },
    )


if __name__ == "__main__":
    main()
