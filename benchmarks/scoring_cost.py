"""What does each way of scoring a pool cost, and how well does it rank?

    python benchmarks/scoring_cost.py --out=benchmarks/results/scoring_cost.json

Cost, on two shapes: the quickstart's decoder and pairs, and a decoder as wide as SmolLM2-135M with
its vocabulary, rows of 512 tokens and few layers. Train steps and the scoring of a whole pool take
turns, the latter as a run does it: packing, casting, the passes, the scores. `full` is the pass of
the reference, with every statistic; the others are settings of config.selection.

Effect, on the quickstart: after some steps on uniform pairs, the ranks that each way gives a pool
are held against those of a full float32 pass, by Spearman's correlation and by the share of the
top half that is the same (0.5 = chance); `margin_off` is the mean difference of the margins, nats.
`start` remembers the margins from before the first step, `memory` those that training refreshed;
refresh starts from either.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from sage_jax import __main__ as launcher
from sage_jax import config, curriculum, models, rules, scores
from sage_jax.data import encode, pack, records, steps
from sage_jax.runtime import counters, dataset, forward, loop, programs, setup, sharing, state
from sage_jax.runtime import mesh as meshes

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS: dict[str, dict[str, Any]] = {  # settings of config.selection; capped ones come with the data
    "memory": {"refresh": 0.0},
    "refresh_25": {"refresh": 0.25},
    "refresh_50": {"refresh": 0.5},
    "refresh_100": {"refresh": 1.0},
    "bfloat16": {"refresh": 1.0, "scoring_dtype": "bfloat16"},
    "int8": {"refresh": 1.0, "scoring_dtype": "int8"},
}


class Job(NamedTuple):
    """A model and its data, as a run holds them."""

    run: config.Run
    policy: setup.Policy
    passes: forward.Passes
    pairs: encode.EncodedPairs
    start: Any  # what the starting policy says of every pair


def make_job(run: config.Run, policy: setup.Policy, pairs: encode.EncodedPairs) -> Job:
    run, mesh = config.settle_data(run, pairs.columns), meshes.make_mesh()
    shapes = sharing.shapes(run, policy.model, mesh, pairs)
    passes = forward.Passes(policy, mesh, *shapes)
    return Job(
        run, policy, passes, pairs, passes.stats(policy.params, pairs, np.arange(len(pairs)))
    )


def quickstart(args: argparse.Namespace) -> Job:
    _, found, _ = launcher.parse(["train", f"--config={ROOT / 'configs/quickstart.py'}"])
    run = config.replace(
        config.resolve(found),
        **{
            "data.limit": 2 * args.pool,
            "curriculum.pool_size": args.pool,
            "compare.uniform": False,
        },
    )
    policy = setup.load_policy(run, meshes.make_mesh())
    pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
    return make_job(run, policy, pairs)


def smollm2(args: argparse.Namespace) -> Job:
    """Random weights and tokens; prompts are a bit more than half of the tokens."""
    spec = models.ModelSpec(
        vocab=args.vocab, d_model=576, d_ff=1536, layers=args.layers, heads=9, kv_heads=3,
        rope_theta=100_000.0,
    )  # fmt: skip
    model, rng, most = models.Model(spec), np.random.default_rng(0), args.length // 2

    def ids(least: int, up_to: int) -> list[int]:
        return rng.integers(0, spec.vocab, rng.integers(least, up_to + 1)).tolist()

    rows = [
        {
            "prompt_ids": ids(most // 4, most // 2),
            "chosen_ids": ids(most // 8, most // 2),
            "rejected_ids": ids(most // 8, most // 2),
        }
        for _ in range(args.smollm2_pairs)
    ]
    pairs = encode.encode(records.read(rows), None, max_length=most)
    run = config.resolve({"train": {"batch_pairs": 4}})
    policy = setup.Policy(model, model.init(jax.random.key(0)), None, "random")
    return make_job(run, policy, pairs)


def ways(job: Job) -> dict[str, config.Run]:
    """The settings to compare; completions are capped at quartiles of their lengths."""
    lengths = (job.pairs.lengths_N2 - job.pairs.start_N2).ravel()
    found = dict(WAYS)
    for share in (25, 50, 75):
        cap = int(np.quantile(lengths, share / 100))
        found[f"capped_{share}"] = {"refresh": 1.0, "scoring_tokens": cap}
    return {
        name: dataclasses.replace(job.run, selection=dataclasses.replace(job.run.selection, **s))
        for name, s in found.items()
    }


def scorer(job: Job, run: config.Run) -> forward.Scorer:
    return forward.Scorer(
        run, job.policy, job.passes, job.pairs, job.start.logps, setup.make_loss(run)
    )


def first_memory(job: Job) -> curriculum.Memory:
    found = jax.device_get(
        setup.make_score_fn(job.run, setup.make_loss(job.run))(job.start, job.start.logps)
    )
    index_N = np.arange(len(job.pairs))
    return curriculum.remember(curriculum.init_memory(len(job.pairs)), index_N, found, round=-1)


# -- cost ----------------------------------------------------------------------------------------


def train_call(job: Job, count: int) -> tuple[Callable[[], Any], float]:
    """Some train steps on one batch, as a run takes them, and the pairs in it."""
    run, mesh, shape = job.run, job.passes.mesh, job.passes.shape
    loss = setup.make_loss(run)
    tx, _ = state.make_optimizer(config.replace(run, **{"train.steps": 10**6}))
    placed = state.state_shardings(run, tx, job.policy.params, mesh)
    train = programs.train_step(run, job.policy, mesh, tx, loss, setup.make_score_fn(run, loss))
    length_N = job.pairs.row_lengths(shape.share)
    plan = steps.place(length_N, np.arange(run.train.batch_pairs)[None], shape)
    length = int(steps.lengths(job.pairs, plan, shape)[0])
    rows = pack.collate(job.pairs, plan[0], length, job.start.logps, share=shape.share)
    rows = meshes.put(rows, mesh)
    held = [
        jax.jit(
            lambda p: state.init_state(run, jax.tree.map(jnp.copy, p), tx), out_shardings=placed
        )(job.policy.params)
    ]

    def call():
        for _ in range(count):
            held[0], seen = train(held[0], None, rows, programs.now(run))
        return held[0], seen

    return call, float((plan[0] >= 0).sum() * count)


def costs(job: Job, pool: int, updates: int, repeats: int) -> dict[str, Any]:
    """Seconds of scoring a pool, by the pair, over those of a train step."""
    index_P, memory = np.arange(min(pool, len(job.pairs))), first_memory(job)
    call, trained = train_call(job, updates)
    calls: dict[str, Callable[[], Any]] = {
        "train": call,
        "full": lambda: job.passes.stats(job.policy.params, job.pairs, index_P),
    }
    shape = job.passes.shape
    full_N = counters.pair_flops(job.policy.model, job.pairs, shared=shape.share)
    flops = {"full": float(full_N[index_P].sum())}
    for name, run in ways(job).items():
        one = scorer(job, run)
        calls[name] = lambda one=one: one(job.policy.params, memory, index_P, number=1).pairs
        flops[name] = one(job.policy.params, memory, index_P, number=1).flops
    seconds = common.interleaved_seconds(calls, repeats=repeats, warmup=1)
    per_pair = {k: [t / len(index_P) for t in v] for k, v in seconds.items()}
    per_pair["train"] = [t / trained for t in seconds["train"]]
    trained_flops = 3.0 * float(full_N[index_P].sum())
    return {
        "rows": {
            "row_length": shape.row_length,
            "rows": shape.rows,
            "slots": shape.slots,
            "sizes": shape.sizes,
            "share": shape.share,
        },
        "pool": len(index_P),
        "parameters": sum(x.size for x in jax.tree.leaves(job.policy.params)),
        "tokens_of_a_pair": float(job.pairs.lengths_N2.sum() / len(job.pairs)),
        "completion_share": float(
            (job.pairs.lengths_N2 - job.pairs.start_N2).sum() / job.pairs.lengths_N2.sum()
        ),
        "scoring_tokens": {k: r.selection.scoring_tokens for k, r in ways(job).items()},
        "milliseconds_per_pair": {k: 1e3 * statistics.median(v) for k, v in per_pair.items()},
        "seconds_to_train": {
            k: common.median_ratio(v, per_pair["train"])
            for k, v in per_pair.items()
            if k != "train"
        },
        "flops_to_train": {k: v / trained_flops for k, v in flops.items()},
    }


# -- effect --------------------------------------------------------------------------------------


def ranks(found: scores.PairScores, memory: curriculum.Memory, index_P: np.ndarray) -> np.ndarray:
    known = rules.candidates(found, curriculum.recall(memory, index_P), pair_P=index_P)
    return np.asarray(rules.sage(known, np.random.default_rng(0)))


def agreement(mine_P: np.ndarray, exact_P: np.ndarray) -> dict[str, float]:
    half = len(exact_P) // 2
    top = [set(np.argsort(-x, kind="stable")[:half].tolist()) for x in (mine_P, exact_P)]
    return {
        "spearman": float(scipy.stats.spearmanr(mine_P, exact_P).statistic),
        "top_half": len(top[0] & top[1]) / half,
    }


def after_steps(job: Job, updates: int, seed: int) -> loop.Trainer:
    """The trainer after some steps on uniform pairs."""
    # Shares that lean by nothing: plain epochs, and every step still returns its margins.
    run = config.replace(
        job.run,
        **{"seed": seed, "train.steps": updates, "selection.name": "uniform",
           "curriculum.sharpness": 1e-12, "checkpoint.every": 10**6},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(sys.stderr):
        trainer = loop.Trainer(
            run, pathlib.Path(workdir), policy=job.policy, passes=job.passes, pairs=job.pairs,
            start=job.start, reference=job.start.logps, evaluate=lambda _: {}, label="uniform",
        )  # fmt: skip
        trainer.train(lambda: False)
    return trainer


def effects(job: Job, updates: int, seed: int) -> dict[str, dict[str, float]]:
    """Ranks of a pool after some steps on uniform pairs, against those of an exact pass."""
    trainer = after_steps(job, updates, seed)
    params = trainer.state.params
    rng = np.random.default_rng(seed)
    index_P = rng.permutation(len(job.pairs))[: job.run.curriculum.pool_size]
    stats = job.passes.stats(params, job.pairs, index_P)
    score_fn = setup.make_score_fn(job.run, setup.make_loss(job.run))
    exact = jax.device_get(score_fn(stats, job.start.logps[index_P]))
    memories = {"memory": trainer.memory, "start": first_memory(job)}
    exact_P = ranks(exact, trainer.memory, index_P)
    number = trainer.round.number + 1 if trainer.round else 0
    found = {}
    for name, way in ways(job).items():
        one = scorer(job, config.replace(way, seed=seed))
        partial = way.selection.refresh < 1
        for kind in ("memory", "start") if partial else ("memory",):
            known = one(params, memories[kind], index_P, number=number)
            key = kind if name == "memory" else name + ("_of_start" if kind == "start" else "")
            found[key] = agreement(ranks(known.pairs, known.memory, index_P), exact_P)
            off_P = known.pairs.likelihood_margin - exact.likelihood_margin
            found[key]["margin_off"] = float(np.abs(off_P).mean())
    return found


def over_seeds(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {
        way: {
            k: {"mean": statistics.fmean(x), "least": min(x), "most": max(x)}
            for k in found[0][way]
            for x in [[one[way][k] for one in found]]
        }
        for way in found[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="quickstart,smollm2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--pool", type=int, default=1024, help="pairs of the quickstart's pool")
    parser.add_argument("--timed", type=int, default=256, help="of them, pairs that are timed")
    parser.add_argument("--steps", type=int, default=60, help="train steps before ranks are held")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--smollm2-pairs", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2, help="of the decoder like SmolLM2")
    parser.add_argument("--length", type=int, default=512, help="tokens of its rows")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    result: dict[str, Any] = {"question": __doc__.split("\n")[0], "settings": vars(args)}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SAGE_JAX_CACHE"] = cache
        if "quickstart" in args.shapes:
            job = quickstart(args)
            result["cost_quickstart"] = costs(job, args.timed, 4, args.repeats)
            seeds = [int(s) for s in args.seeds.split(",")]
            result["effect_quickstart"] = over_seeds([effects(job, args.steps, s) for s in seeds])
            print(result["cost_quickstart"]["seconds_to_train"], file=sys.stderr)
        if "smollm2" in args.shapes:
            job = smollm2(args)
            result["cost_smollm2"] = costs(job, args.smollm2_pairs, 1, max(3, args.repeats // 3))
            print(result["cost_smollm2"]["seconds_to_train"], file=sys.stderr)
    common.write(args.out, result)


if __name__ == "__main__":
    main()
