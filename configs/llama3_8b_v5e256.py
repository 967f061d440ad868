"""Llama-3-8B, all weights, on a v5e pod of 256 chips, pairs of 2 x 4096 tokens.

    sage-jax compile --config=configs/llama3_8b_v5e256.py --topology=v5e:16x16
    sage-jax train   --config=configs/llama3_8b_v5e256.py --workdir=runs/llama \
                     --config.checkpoint.directory=gs://bucket/llama \
                     --config.model.path=/models/Meta-Llama-3-8B-Instruct \
                     --config.data.train=pairs.jsonl
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "spec:llama3_8b"
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.max_length = 4096
    c.train.batch_pairs = 256
    c.mesh.data, c.mesh.fsdp = 1, 256
    c.optim.lr = 5e-7
    c.eval.max_new_tokens, c.eval.batch = 1024, 256
    return c
