"""Rebuilds what the quickstart ships: a small decoder and preference pairs sampled from it.

    sage-jax sft    --config=configs/quickstart_base.py --workdir=runs/base
    sage-jax sample --config=configs/quickstart_base.py --workdir=runs/base_pairs \
                    --config.model.path=runs/base/export

The decoder learns from a teacher with systematic mistakes (sage_jax/generate/arithmetic.py), so it
is sure of some wrong steps, wavers on others and has mastered the rest.
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "new"
    c.model.layers, c.model.d_model, c.model.d_ff = 3, 128, 256
    c.model.heads, c.model.kv_heads = 4, 2
    c.data.train = "task:arithmetic"
    c.task.count, c.task.teacher = 64_000, True
    c.task.faulty_share, c.task.fault_odds = 0.4, "0.8,0.6,0.4"
    c.loss.name, c.selection.name = "sft", "uniform"
    c.optim.lr, c.optim.min_lr_ratio, c.optim.b2 = 3e-3, 0.05, 0.95
    c.train.steps, c.train.batch_pairs = 1000, 64
    c.eval.problems = c.sample.problems = "task:arithmetic"
    c.eval.count, c.eval.max_new_tokens = 800, 48
    c.sample.count, c.sample.per_problem = 6000, 8
    c.checkpoint.every = 500
    c.export.dtype = "bfloat16"
    return c
