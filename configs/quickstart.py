"""A small decoder gets better at multi-step arithmetic, with SAGE and with uniform DPO beside it.

    sage-jax train --config=configs/quickstart.py --workdir=runs/quickstart

Model and pairs come with the package; configs/quickstart_base.py rebuilds both.
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "package:sage_jax/assets/quickstart"
    c.data.train = "package:sage_jax/assets/quickstart/pairs.jsonl"
    c.loss.beta, c.loss.nll_weight = 0.3, 0.5
    c.optim.lr = 5e-5
    c.optim.schedule = "constant"
    c.train.steps, c.train.batch_pairs = 200, 32
    c.eval.problems = "task:arithmetic"
    c.eval.count, c.eval.every, c.eval.max_new_tokens = 800, 25, 48
    c.eval.batch = 200
    c.checkpoint.every = 50
    c.compare.uniform = True
    return c
