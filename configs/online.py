"""The quickstart with pairs that keep up with the policy: online DPO.

    sage-jax train --config=configs/online.py --workdir=runs/online

Every other round the policy of that moment answers new problems. The answers are checked, made into
pairs, written to WORKDIR/resampled/ and merged into the data.
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "package:sage_jax/assets/quickstart"
    c.data.train = "package:sage_jax/assets/quickstart/pairs.jsonl"
    c.loss.beta, c.loss.nll_weight = 0.3, 0.5
    c.optim.lr, c.optim.schedule = 5e-5, "constant"
    c.train.steps, c.train.batch_pairs = 200, 32
    c.curriculum.pool_size = 1024  # longer rounds, as every other one begins with a sampling
    c.eval.problems = c.sample.problems = "task:arithmetic"
    c.eval.count, c.eval.every, c.eval.max_new_tokens = 800, 25, 48
    c.eval.batch = 200
    c.rounds.resample = 2
    c.sample.count, c.sample.per_problem = 256, 8
    c.checkpoint.every = 50
    return c
