"""A training loop of one's own, from the functional API alone: python examples/custom_loop.py

DPO on a few pairs with a pretrained model: reference log-probs once, then steps that weigh pairs by
their SAGE score. No config, no workdir, no mesh: arrays in, arrays out.
"""

import jax
import numpy as np

from sage_jax import batch, logprobs, losses, models, optim, scores, selection, step

MODEL = "package:sage_jax/assets/quickstart"
PAIRS = [  # prompt, chosen, rejected
    ("1+2=", "3;", "4;"),
    ("7-3=", "4;", "5;"),
    ("2*4=", "8;", "6;"),
    ("9-9=", "0;", "1;"),
]


def pack(tokenizer, pairs, length=32):
    """One pair a row: the chosen sequence, then the rejected one."""
    rows = batch.empty(len(pairs), length, slots=1)
    for row, (prompt, *answers) in enumerate(pairs):
        end = 0
        for side, answer in enumerate(answers):
            ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
            start, end = end, end + len(ids)
            rows.tokens_RT[row, start:end] = ids
            rows.position_RT[row, start:end] = np.arange(len(ids))
            rows.segment_RT[row, start:end] = batch.segment_id(0, side)
            known = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            rows.completion_RT[row, start + known : end] = True
        rows.pair_RS[row, 0], rows.weight_RS[row, 0] = row, 1.0
    return rows


def main(steps=20):
    model, params = models.load(MODEL)
    rows = pack(models.load_tokenizer(MODEL), PAIRS)
    logps_fn = logprobs.make_logps_fn(
        lambda params, _, b: model.hidden(params, b.tokens_RT, b.position_RT, b.segment_RT),
        lambda params, _: model.head(params),
    )
    reference = jax.jit(step.make_stats_step(logps_fn))(params, None, rows).logps
    rows = rows._replace(ref_logps_RS2=reference)
    loss = losses.sigmoid(beta=0.3)
    tx, _ = optim.make(lr=1e-4, schedule="constant", warmup=0, steps=steps)
    train = step.make_train_step(
        logps_fn, loss, tx, score_fn=scores.make_score_fn(loss),
        weight_fn=lambda pairs, weight: selection.soft_weights(pairs.score, 1.0, weight),
    )  # fmt: skip
    train, state, rows_seen = jax.jit(train), step.init_state(params, tx), []
    for _ in range(steps):
        state, output = train(state, None, rows)
        rows_seen.append({k: float(v) for k, v in output.metrics.items()})
    print(f"loss {rows_seen[0]['loss']:.4f} -> {rows_seen[-1]['loss']:.4f}")
    return rows_seen


if __name__ == "__main__":
    main()
