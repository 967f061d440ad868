"""What is saved where several pairs share a prompt, and how much faster is a scoring pass?

    python benchmarks/shared_problems.py --out=benchmarks/results/shared_problems.json

The quickstart's decoder answers problems of its task eight times each, and 1, 2, 4 or 8 pairs at
the most are made of the answers to one, as `sage-jax sample` makes them
(`sample.pairs_per_problem`). For each setting of `data.share_prompts`: tokens that a pair costs in
the rows of a pass over all pairs (`pass_tokens`, and with padding `pass_room`) and in train steps
of 32 random pairs (`step_tokens`), of a run's own planner; and the seconds of a scoring pass over a
pool, in turns, with the quickstart's decoder and with one as wide as SmolLM2-135M (four layers,
random weights). `ratio` is the time of `pair` over that of `problem`, turn by turn; `off` computes
each prompt twice. `given` are the pairs of SmolLM2-135M that come with the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
from typing import Any

import common
import jax
import numpy as np

from sage_jax import __main__ as launcher
from sage_jax import config, models
from sage_jax.data import encode, records, steps
from sage_jax.generate import pairs as pair_makers
from sage_jax.generate import prompting, sampler
from sage_jax.runtime import dataset, evaluation, forward, setup, sharing
from sage_jax.runtime import mesh as meshes

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = ("off", "pair", "problem")


def quickstart() -> config.Run:
    _, found, _ = launcher.parse(["train", f"--config={ROOT / 'configs/quickstart.py'}"])
    return config.resolve(found)


def sampled(run: config.Run, policy: setup.Policy, args: argparse.Namespace) -> dict[int, list]:
    """Records by the most pairs of a problem, all of the same answers."""
    problems, check, name = evaluation.load_problems(
        "task:arithmetic", args.problems, split="train", seed=1
    )
    problems = list({str(problem.prompt): problem for problem in problems}.values())
    answers = sampler.generate(
        policy.model, policy.params, policy.tokenizer,
        prompting.ask(policy.tokenizer, [problem.prompt for problem in problems]),
        max_new_tokens=run.eval.max_new_tokens, temperature=1.0, top_p=1.0, samples=8, seed=1,
        batch=run.eval.batch, rows=policy.rows,
    )  # fmt: skip
    return {
        most: pair_makers.make_pairs(problems, answers, check=check, task=name, per_problem=most)[0]
        for most in args.most
    }


def shapes_of(
    run: config.Run, policy: setup.Policy, pairs: encode.EncodedPairs, setting: str
) -> tuple[steps.Shape, steps.Shape]:
    """Of steps and of passes, as a run has them."""
    run = config.replace(run, **{"data.share_prompts": setting})
    return sharing.shapes(run, policy.model, policy.mesh, pairs)


def tokens(run: config.Run, policy: setup.Policy, pairs: encode.EncodedPairs) -> dict[str, Any]:
    """Tokens a pair in the rows of a pass and of steps, for every setting."""
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "problems": len(np.unique(pairs.problem_N)),
        "completions": len(np.unique(pairs.answer_N2)),
    }
    for setting in SETTINGS:
        of_step, of_pass = shapes_of(run, policy, pairs, setting)
        plan = steps.plan_pass(pairs, np.arange(len(pairs)), of_pass)
        drawn = steps.drawn(pairs, of_step, run.train.batch_pairs)
        room = steps.lengths(pairs, plan, of_pass).sum() * of_pass.rows
        found[setting] = {
            "pass_tokens": steps.tokens(pairs, plan, of_pass).sum() / len(pairs),
            "pass_room": room / len(pairs),
            "step_tokens": steps.tokens(pairs, drawn, of_step).sum() / (drawn >= 0).sum(),
            "grouped": {"pass": bool(of_pass.keys), "step": bool(of_step.keys)},
        }
    for key in ("pass_tokens", "pass_room", "step_tokens"):
        found[f"{key}_saved"] = 1 - found["problem"][key] / found["pair"][key]
    return found


def wide(policy: setup.Policy) -> setup.Policy:
    """SmolLM2-135M's width with four layers of random weights, and the quickstart's tokenizer."""
    spec = models.ModelSpec(
        vocab=policy.model.spec.vocab, d_model=576, d_ff=1536, layers=4, heads=9, kv_heads=3
    )
    model = dataclasses.replace(policy.model, spec=spec)
    return dataclasses.replace(policy, model=model, params=model.init(jax.random.key(0)))


def seconds(
    run: config.Run, policy: setup.Policy, pairs: encode.EncodedPairs, repeats: int
) -> dict[str, Any]:
    """Of a scoring pass over all the pairs, for every setting."""
    everything = np.arange(len(pairs))
    stats: dict[str, Any] = {}

    def scoring(setting: str) -> Any:
        passes = forward.Passes(
            policy, policy.mesh, *shapes_of(run, policy, pairs, setting)
        )  # fmt: skip

        def run_pass() -> None:
            stats[setting] = passes.stats(policy.params, pairs, everything, light=True)

        return run_pass

    times = common.interleaved_seconds(
        {setting: scoring(setting) for setting in SETTINGS}, repeats=repeats
    )
    apart = [
        float(np.abs(stats[setting].logps - stats["off"].logps).max()) for setting in SETTINGS[1:]
    ]
    return {
        "pairs": len(pairs),
        **{setting: statistics.median(times[setting]) for setting in SETTINGS},
        "ratio": common.median_ratio(times["pair"], times["problem"]),
        "ratio_off": common.median_ratio(times["off"], times["problem"]),
        "most_nats_apart": max(apart),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--problems", type=int, default=1500)
    parser.add_argument("--most", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--pool", type=int, default=512, help="pairs of a timed pass")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    run = quickstart()
    mesh = meshes.make_mesh()
    policy = setup.load_policy(run, mesh)
    result: dict[str, Any] = {"tokens": {}, "seconds": {}}
    for most, rows in sampled(run, policy, args).items():
        pairs = encode.encode(records.read(rows), policy.tokenizer, max_length=run.data.max_length)
        result["tokens"][str(most)] = tokens(run, policy, pairs)
        if most == 1:
            continue  # nothing to share
        pool = encode.take(pairs, np.arange(min(args.pool, len(pairs))))
        timed = (
            {"quickstart": policy, "wide": wide(policy)} if most == 4 else {"quickstart": policy}
        )
        result["seconds"][str(most)] = {
            name: seconds(run, one, pool, args.repeats) for name, one in timed.items()
        }
    given = config.resolve(
        launcher.parse(["train", f"--config={ROOT / 'configs/smollm2_arithmetic.py'}"])[1]
    )
    pairs = dataset.load_pairs(given, setup.load_tokenizer(given), given.data.train)
    result["tokens"]["given"] = tokens(given, policy, pairs)
    common.write(args.out, result)


if __name__ == "__main__":
    main()
