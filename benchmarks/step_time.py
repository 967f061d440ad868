"""What does selection cost a train step?

    python benchmarks/step_time.py --out=benchmarks/results/step_time.json

Four programs take turns on the same packed pairs, so that ratios are of one run:

    plain       DPO written out by hand with optax; knows nothing of scores
    scores_off  `step.make_train_step` without a score function: uniform selection
    scores_on   the same with one: every step refreshes what the selection knows
    scoring     `step.make_score_step`: a scoring pass of its own, rows filled to the end

The two first compute the same numbers, which is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sage_jax
from sage_jax import batch, logprobs, losses, models, optim, scores, step
from sage_jax.data import encode, pack, records

QUICKSTART = pathlib.Path(sage_jax.__file__).parent / "assets" / "quickstart"
BETA = 0.5


def quickstart(pairs: int) -> tuple[models.Model, Any, encode.EncodedPairs]:
    """The decoder and pairs of the package."""
    model, params = models.load(str(QUICKSTART))
    rows = records.read(str(QUICKSTART / "pairs.jsonl"))
    rows = dataclasses.replace(rows, rows=rows.rows[:pairs])
    tokenizer = models.load_tokenizer(str(QUICKSTART))
    return model, params, encode.encode(rows, tokenizer, max_length=512)


def smollm2(pairs: int) -> tuple[models.Model, Any, encode.EncodedPairs]:
    """A decoder of SmolLM2-135M's shape with random weights, and random tokens."""
    spec = models.ModelSpec(
        vocab=49152, d_model=576, d_ff=1536, layers=30, heads=9, kv_heads=3, rope_theta=100_000.0
    )
    model = models.Model(spec)
    rng = np.random.default_rng(0)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(0, spec.vocab, rng.integers(least, most)).tolist()

    rows = [
        {"prompt_ids": ids(30, 50), "chosen_ids": ids(20, 60), "rejected_ids": ids(20, 60)}
        for _ in range(pairs)
    ]
    encoded = encode.encode(records.read(rows), None, max_length=256)
    return model, model.init(jax.random.key(0)), encoded


SIZES = {  # name -> (model, parameters and pairs; pairs in a step; steps timed at once)
    "quickstart": (quickstart, 32, 4),
    "smollm2": (smollm2, 4, 1),
}


def hidden_fn(model: models.Model) -> Callable[..., jax.Array]:
    return lambda params, _, rows: model.hidden(
        params, *map(jnp.asarray, (rows.tokens_RT, rows.position_RT, rows.segment_RT))
    )


def plain_dpo(model: models.Model, tx: optax.GradientTransformation):
    """A DPO step over packed rows without any of the library's losses, scores and steps."""

    def per_sequence(params, rows: batch.PackedBatch) -> dict[str, jax.Array]:
        targets_RT, segment_RT, mask_RT = logprobs.targets(rows)
        hidden_RTD = hidden_fn(model)(params, None, rows)
        tokens = logprobs.token_stats(hidden_RTD, model.head(params), targets_RT)
        count, slots = rows.pair_RS.shape

        def total(values_RT):
            one = lambda v, s: jax.ops.segment_sum(v, s, num_segments=2 * slots + 1)  # noqa: E731
            sums = jax.vmap(one)(jnp.where(mask_RT > 0, values_RT, 0.0), segment_RT)
            return sums[:, 1:].reshape(count, slots, 2)

        return {
            "logps": total(tokens.logp_RT),
            "tokens": total(mask_RT),
            "entropy": total(tokens.entropy_RT),
            "mean_logit": total(tokens.mean_logit_RT),
            "hits": total(tokens.hit_RT),
        }

    def objective(params, rows: batch.PackedBatch):
        sums = per_sequence(params, rows)
        reward_RS2 = BETA * (sums["logps"] - rows.ref_logps_RS2)
        loss_RS = -jax.nn.log_sigmoid(reward_RS2[..., 0] - reward_RS2[..., 1])
        weight_RS = jnp.where(rows.pair_RS >= 0, rows.weight_RS, 0.0)
        loss = jnp.sum(loss_RS * weight_RS) / jnp.maximum(weight_RS.sum(), 1e-8)
        return loss, (sums, reward_RS2)

    def train(state: step.TrainState, frozen: Any, rows: batch.PackedBatch):
        grad_fn = jax.value_and_grad(objective, has_aux=True)
        (loss, (sums, reward_RS2)), grads = grad_fn(state.params, rows)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        metrics |= plain_metrics(sums, reward_RS2, rows)
        return step.TrainState(state.step + 1, params, opt_state), metrics

    return train


def plain_metrics(sums, reward_RS2, rows: batch.PackedBatch) -> dict[str, jax.Array]:
    """What TRL logs of a step."""
    real_RS1 = ((rows.pair_RS >= 0) & (rows.weight_RS > 0)).astype(jnp.float32)[..., None]
    count = jnp.maximum(real_RS1.sum(), 1.0)
    tokens_2 = jnp.sum(sums["tokens"] * real_RS1, axis=(0, 1))

    def mean(x_RS2):
        return jnp.sum(x_RS2 * real_RS1, axis=(0, 1)) / count

    def per_token(name):
        return jnp.sum(sums[name] * real_RS1, axis=(0, 1)) / jnp.maximum(tokens_2, 1.0)

    reward_2, logps_2, logit_2 = mean(reward_RS2), mean(sums["logps"]), per_token("mean_logit")
    tie = step.TIE * BETA * sums["tokens"].sum(-1)
    right_RS = (reward_RS2[..., 0] - reward_RS2[..., 1] > tie).astype(jnp.float32)
    entropy = jnp.sum(sums["entropy"] * real_RS1) / jnp.maximum(tokens_2.sum(), 1.0)
    return {
        "num_tokens": jnp.sum(rows.segment_RT > 0).astype(jnp.float32),
        "rewards/chosen": reward_2[0],
        "rewards/rejected": reward_2[1],
        "rewards/accuracies": jnp.sum(right_RS * real_RS1[..., 0]) / count,
        "rewards/margins": reward_2[0] - reward_2[1],
        "logps/chosen": logps_2[0],
        "logps/rejected": logps_2[1],
        "logits/chosen": logit_2[0],
        "logits/rejected": logit_2[1],
        "entropy": entropy,
        "mean_token_accuracy": per_token("hits")[0],
    }


def packed(
    encoded: encode.EncodedPairs, batch_pairs: int, *, fill: bool
) -> tuple[batch.PackedBatch, float]:
    """A batch, and the pairs that one holds on average.

    A train step takes `batch_pairs` pairs; a scoring pass fills rows of the same shape.
    """
    lengths_N2, order_N = encoded.lengths_N2, np.arange(len(encoded))
    shape = pack.shape(lengths_N2, batch_pairs=batch_pairs, factors=(1, 2, 3))
    exactly = None if fill else batch_pairs
    plan = pack.plan(lengths_N2, order_N, **shape._asdict(), batch_pairs=exactly)
    ref_logps_N2 = np.zeros((len(encoded), 2))  # of no consequence for the time
    rows = pack.collate(encoded, plan[0], shape.row_length, ref_logps_N2)
    return jax.device_put(rows), float(np.sum(plan >= 0) / len(plan))


def repeated(train: Any, state: step.TrainState, rows: batch.PackedBatch, count: int) -> Any:
    """A call that takes some steps from where the last call ended; the state is donated."""
    held = [jax.tree.map(jnp.copy, state)]

    def call():
        for _ in range(count):
            held[0], seen = train(held[0], None, rows)
        return held[0], seen

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=tuple(SIZES), default="quickstart")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    make, batch_pairs, count = SIZES[args.model]
    model, params, encoded = make(16 * batch_pairs)
    loss = losses.sigmoid(BETA)
    tx, _ = optim.make(lr=1e-5, schedule="constant", warmup=0, steps=10**6)
    logps_fn = logprobs.make_logps_fn(hidden_fn(model), lambda p, _: model.head(p))
    score_fn = scores.make_score_fn(loss)
    rows, train_pairs = packed(encoded, batch_pairs, fill=False)
    score_rows, score_pairs = packed(encoded, batch_pairs, fill=True)
    stats_step = jax.jit(step.make_stats_step(logps_fn))
    rows = rows._replace(ref_logps_RS2=stats_step(params, None, rows).logps)

    state = step.init_state(params, tx)
    steps = {
        "plain": plain_dpo(model, tx),
        "scores_off": step.make_train_step(logps_fn, loss, tx),
        "scores_on": step.make_train_step(logps_fn, loss, tx, score_fn=score_fn),
    }
    programs = {
        name: jax.jit(fn, donate_argnums=0).lower(state, None, rows).compile()
        for name, fn in steps.items()
    }
    scoring = jax.jit(step.make_score_step(logps_fn, score_fn))
    programs["scoring"] = scoring.lower(params, None, score_rows).compile()

    calls = {name: repeated(programs[name], state, rows, count) for name in steps}
    (_, written), (_, ours) = calls["plain"](), calls["scores_off"]()
    for name, value in written.items():  # grad_norm and the effect of the first steps too
        np.testing.assert_allclose(ours.metrics[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    calls["scoring"] = lambda: [programs["scoring"](params, None, score_rows) for _ in range(count)]
    seconds = common.interleaved_seconds(calls, repeats=args.repeats, warmup=1)

    pairs = dict.fromkeys(steps, train_pairs) | {"scoring": score_pairs}
    per_pair = {name: [t / count / pairs[name] for t in seconds[name]] for name in calls}
    ratios = {
        "scores_off_to_plain": common.median_ratio(per_pair["scores_off"], per_pair["plain"]),
        "scores_on_to_off": common.median_ratio(per_pair["scores_on"], per_pair["scores_off"]),
        "scoring_to_train": common.median_ratio(per_pair["scoring"], per_pair["scores_off"]),
    }
    flops = {
        name: (program.cost_analysis() or {}).get("flops") for name, program in programs.items()
    }
    result = {
        "question": __doc__.split("\n")[0],
        "settings": vars(args) | {"batch_pairs": batch_pairs, "steps_at_once": count},
        "rows": dict(zip(("rows", "row_length"), rows.tokens_RT.shape, strict=True)),
        "pairs_in_a_batch": pairs,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "milliseconds_per_pair": {k: 1e3 * statistics.median(v) for k, v in per_pair.items()},
        "ratios_of_time_per_pair": ratios,
        "xla_flops": flops,  # of programs whose loops are counted once: to compare, not to sum
    }
    print(ratios, file=sys.stderr)
    common.write(args.out, result)


if __name__ == "__main__":
    main()
