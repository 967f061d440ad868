"""Architectures by name, for work that needs shapes and no weights: `model.path = "spec:NAME"`.

Sizes as in the config.json that each model's publisher ships; the tests hold the number of
parameters against the published one.
"""

from __future__ import annotations

import difflib

from sage_jax.models import spec as spec_lib

PREFIX = "spec:"

_LLAMA31_ROPE = spec_lib.RopeScaling(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)
SPECS: dict[str, spec_lib.ModelSpec] = {
    "smollm2_135m": spec_lib.ModelSpec(  # HuggingFaceTB/SmolLM2-135M-Instruct
        vocab=49152, d_model=576, d_ff=1536, layers=30, heads=9, kv_heads=3, rope_theta=1e5,
        norm_eps=1e-5, tied=True, max_positions=8192,
    ),
    "qwen2p5_1p5b": spec_lib.ModelSpec(  # Qwen/Qwen2.5-1.5B-Instruct
        vocab=151936, d_model=1536, d_ff=8960, layers=28, heads=12, kv_heads=2, rope_theta=1e6,
        norm_eps=1e-6, tied=True, family="qwen2", max_positions=32768,
    ),
    "qwen2p5_7b": spec_lib.ModelSpec(  # Qwen/Qwen2.5-7B-Instruct
        vocab=152064, d_model=3584, d_ff=18944, layers=28, heads=28, kv_heads=4, rope_theta=1e6,
        norm_eps=1e-6, tied=False, family="qwen2", max_positions=32768,
    ),
    "llama3_8b": spec_lib.ModelSpec(  # meta-llama/Meta-Llama-3-8B-Instruct
        vocab=128256, d_model=4096, d_ff=14336, layers=32, heads=32, kv_heads=8, rope_theta=5e5,
        norm_eps=1e-5, tied=False, max_positions=8192,
    ),
    "llama3p1_8b": spec_lib.ModelSpec(  # meta-llama/Llama-3.1-8B-Instruct
        vocab=128256, d_model=4096, d_ff=14336, layers=32, heads=32, kv_heads=8, rope_theta=5e5,
        rope_scaling=_LLAMA31_ROPE, norm_eps=1e-5, tied=False, max_positions=131072,
    ),
    "llama3_70b": spec_lib.ModelSpec(  # meta-llama/Meta-Llama-3-70B-Instruct
        vocab=128256, d_model=8192, d_ff=28672, layers=80, heads=64, kv_heads=8, rope_theta=5e5,
        norm_eps=1e-5, tied=False, max_positions=8192,
    ),
}  # fmt: skip


def named(path: str) -> spec_lib.ModelSpec | None:
    """The architecture that a model path names, None for a path to weights.

    Raises:
      ValueError: no such name.

    >>> named("spec:qwen2p5_1p5b").layers, named("/models/mine")
    (28, None)
    """
    if not path.startswith(PREFIX):
        return None
    name = path.removeprefix(PREFIX)
    if name not in SPECS:
        near = difflib.get_close_matches(name, SPECS, n=1, cutoff=0.0)
        raise ValueError(
            f"model path {path!r} names none of the known architectures ({', '.join(SPECS)}). Did "
            f"you mean {PREFIX}{near[0]}?"
        )
    return SPECS[name]
