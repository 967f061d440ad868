"""Qwen2.5-1.5B, all weights, on the eight chips of one v5e host, pairs of 2 x 2048 tokens.

    sage-jax compile --config=configs/qwen2_1p5b_v5e8.py --topology=v5e:2x4
    sage-jax train   --config=configs/qwen2_1p5b_v5e8.py --workdir=runs/qwen \
                     --config.model.path=/models/Qwen2.5-1.5B-Instruct \
                     --config.data.train=pairs.jsonl
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "spec:qwen2p5_1p5b"
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.max_length = 2048
    c.train.batch_pairs = 32
    c.mesh.data, c.mesh.fsdp = 1, 8
    c.optim.lr = 5e-7
    c.eval.max_new_tokens, c.eval.batch = 512, 64
    return c
