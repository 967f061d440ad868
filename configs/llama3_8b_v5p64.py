"""Llama-3.1-8B, all weights, on 64 chips of v5p, pairs of 2 x 32768 tokens.

    sage-jax compile --config=configs/llama3_8b_v5p64.py --topology=v5p:4x4x4
    sage-jax train   --config=configs/llama3_8b_v5p64.py --workdir=runs/llama \
                     --config.checkpoint.directory=gs://bucket/llama \
                     --config.model.path=/models/Llama-3.1-8B-Instruct \
                     --config.data.train=pairs.jsonl

A row holds both answers, up to 65536 tokens, and is cut over four chips.
"""

from sage_jax import config


def get_config():
    c = config.default()
    c.model.path = "spec:llama3p1_8b"
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.max_length = 32768
    c.train.batch_pairs = 16
    c.mesh.data, c.mesh.fsdp, c.mesh.context = 1, 16, 4
    c.optim.lr = 5e-7
    c.eval.max_new_tokens, c.eval.batch = 1024, 64
    return c
