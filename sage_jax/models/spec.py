"""Model families as data: what a config means, which fields it must hold, how tensors are called.

A new family is an entry in `FAMILIES` and, where it adds a tensor, a row in `TENSORS`; nothing in
`decoder.py` asks which family it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one architecture apart from the others."""

    architecture: str  # class name in transformers
    attention_bias: bool | None  # bias of q, k and v; None: the config says
    output_bias: bool  # o has a bias too whenever q, k and v have
    mlp_bias: bool | None  # None: the config says
    defaults: Mapping[str, Any]  # what transformers assumes where config.json is silent
    required: Mapping[str, tuple]  # fields that change results, and the values we compute
    gguf_permuted: bool  # GGUF stores the rows of q and k in llama.cpp's order


_REQUIRED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (True, None),
    "add_cross_attention": (False, None),
}
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        attention_bias=None,
        output_bias=True,
        mlp_bias=None,
        defaults=_DEFAULTS | {"max_position_embeddings": 2048},
        required=_REQUIRED | {"sliding_window": (None,)},
        gguf_permuted=True,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        attention_bias=True,
        output_bias=False,
        mlp_bias=False,
        defaults=_DEFAULTS | {"max_position_embeddings": 32768},
        required=_REQUIRED | {"use_sliding_window": (False, None)},
        gguf_permuted=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed for contexts longer than those trained on.

    `linear` divides all by `factor`; `llama3` divides the low ones by `factor` and blends between
    two wavelengths; `factors` divides each by its own number (what a GGUF file stores).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    factors: tuple[float, ...] = ()

    def divisors(self, frequency: np.ndarray) -> np.ndarray:
        """What to divide each frequency (radians per position) by, float64 [E / 2]."""
        if self.kind == "linear":
            return np.full_like(frequency, self.factor)
        if self.kind == "factors":
            return np.asarray(self.factors, np.float64)
        wavelength = 2 * np.pi / frequency
        turns = self.original_max_positions / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder: everything that decides its parameters and its outputs.

    >>> spec = ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    >>> spec.head_dim, spec.attention_bias, spec.tied
    (8, False, True)
    """

    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: d_model // heads
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = True  # the output matrix is the embedding
    attention_bias: bool | None = None  # None: what the family has (llama: no bias)
    mlp_bias: bool | None = None
    family: str = "llama"
    max_positions: int = 2048
    bos_id: int | None = None
    eos_id: int | None = None
    other_eos_ids: tuple[int, ...] = ()  # further ids that end an answer
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is unknown. Use one of {sorted(FAMILIES)}.")
        family = FAMILIES[self.family]
        fill = object.__setattr__
        fill(self, "kv_heads", self.kv_heads or self.heads)
        fill(self, "head_dim", self.head_dim or self.d_model // self.heads)
        for name, fixed in (
            ("attention_bias", family.attention_bias),
            ("mlp_bias", family.mlp_bias),
        ):
            value = getattr(self, name)
            if value is None:
                fill(self, name, bool(fixed))
            elif fixed is not None and value != fixed:
                raise ValueError(
                    f"{name}={value}, but family {self.family!r} always has {name}={fixed}. "
                    f"Leave {name} out or choose another family."
                )
        for name in ("vocab", "d_model", "d_ff", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; "
                f"each key-value head must serve the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary positions turn pairs of channels, "
                f"so choose an even one."
            )
        scaling = self.rope_scaling
        if scaling and scaling.kind not in ("linear", "llama3", "factors"):
            raise ValueError(
                f"rope_scaling.kind={scaling.kind!r} is unknown. Use linear, llama3 or factors."
            )

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return bool(self.attention_bias) and FAMILIES[self.family].output_bias

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer, the tokenizer's own first."""
        return (() if self.eos_id is None else (self.eos_id,)) + self.other_eos_ids
