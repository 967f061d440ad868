"""Model families as data: what sets an architecture apart, and the shape of one model.

A new family is an entry in `FAMILIES` and a row in `names.py` for every tensor that is called
otherwise; nothing in `decoder.py` and `layers.py` asks which family it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sage_jax.models import rope

RopeScaling = rope.RopeScaling
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one architecture apart from the others. The defaults are those of Llama."""

    architecture: str  # class name in transformers
    attention_bias: bool | None = False  # bias of q, k and v; None: the config says
    output_bias: bool = False  # o has a bias too whenever q, k and v have
    mlp_bias: bool | None = False  # None: the config says
    norms: str = "before"  # of attention and MLP: "before" them, "after" them, or "both"
    norm_offset: float = 0.0  # added to the stored scale of every norm
    qk_norm: str = ""  # norm of queries and keys: "" none, over a "head", over the "whole" vector
    embed_scaled: bool = False  # embeddings are multiplied by sqrt(d_model)
    partial_rotary: bool = False  # some channels of a head may stay unrotated
    local_rope: bool = False  # layers with a window have a rotary base of their own
    experts: bool = False  # a router and experts take the place of the MLP
    norm_topk: bool | None = True  # a token's expert weights sum to 1; None: the config says
    windows: str = ""  # how config.json says which layers have a window, see `hf_config`
    activation_key: str = "hidden_act"  # in config.json
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] = ()  # further keys of config.json that are read
    gguf: str | None = None  # architecture in GGUF files; None: not read from there
    gguf_permuted: bool = False  # GGUF stores the rows of q and k in llama.cpp's order


_DEFAULTS: dict[str, Any] = {  # what transformers assumes where config.json is silent
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_GEMMA: dict[str, Any] = _DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES: dict[str, Family] = {  # by model_type
    "llama": Family(
        architecture="LlamaForCausalLM",
        attention_bias=None,
        output_bias=True,
        mlp_bias=None,
        defaults=_DEFAULTS | {"max_position_embeddings": 2048},
        gguf="llama",
        gguf_permuted=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        windows="all",
        defaults=_DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        keys=("sliding_window",),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        attention_bias=True,
        windows="upper",
        defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        gguf="qwen2",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        attention_bias=None,
        output_bias=True,
        qk_norm="head",
        windows="upper",
        defaults=_DEFAULTS
        | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        gguf="qwen3",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        attention_bias=None,
        output_bias=True,
        qk_norm="head",
        experts=True,
        norm_topk=None,
        windows="switch",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        keys=("moe_intermediate_size", "num_experts", "num_local_experts", "norm_topk_prob"),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        experts=True,
        windows="all",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        keys=("num_local_experts", "num_experts", "sliding_window"),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        attention_bias=None,
        output_bias=True,
        norms="both",
        norm_offset=1.0,
        embed_scaled=True,
        windows="alternating",
        activation_key="hidden_activation",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        attention_bias=None,
        output_bias=True,
        norms="both",
        norm_offset=1.0,
        qk_norm="head",
        embed_scaled=True,
        local_rope=True,
        windows="alternating",
        activation_key="hidden_activation",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        keys=("rope_local_base_freq",),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        attention_bias=None,
        output_bias=True,
        mlp_bias=None,
        windows="nope",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        keys=("no_rope_layers", "no_rope_layer_interval"),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        attention_bias=None,
        output_bias=True,
        norms="after",
        qk_norm="whole",
        defaults=_DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        partial_rotary=True,
        windows="all",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        keys=("original_max_position_embeddings", "partial_rotary_factor", "sliding_window"),
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder: everything that decides its parameters and its outputs.

    >>> spec = ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
    >>> spec.head_dim, spec.attention_bias, spec.tied
    (8, False, True)
    """

    vocab: int
    d_model: int
    d_ff: int  # of each expert, where there are experts
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
    activation: str = "silu"  # of the MLP, one of ACTIVATIONS
    windows: tuple[int, ...] = ()  # positions that each layer sees, its own included; 0 = all
    unrotated: tuple[bool, ...] = ()  # layers without rotary positions
    local_rope_theta: float = 0.0  # base of the layers that have a window; 0: as the others
    rotary_width: int = 0  # channels of a head that turn; 0: all
    query_scalar: float = 0.0  # attention logits are divided by its root; 0: head_dim
    attention_softcap: float = 0.0  # x becomes cap * tanh(x / cap); 0 = off
    final_softcap: float = 0.0  # the same, of the output logits
    experts: int = 0
    experts_per_token: int = 0
    norm_topk: bool = True  # the weights of a token's experts sum to 1
    router_aux: float = 0.0  # weight of the load-balancing loss that the config recommends

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is unknown. Use one of {sorted(FAMILIES)}.")
        family = FAMILIES[self.family]
        fill = object.__setattr__
        fill(self, "kv_heads", self.kv_heads or self.heads)
        fill(self, "head_dim", self.head_dim or self.d_model // self.heads)
        for name in ("rotary_width", "query_scalar"):  # the same model has one spelling
            if getattr(self, name) == self.head_dim:
                fill(self, name, 0)
        for name, empty in (("windows", 0), ("unrotated", False)):
            found = getattr(self, name)
            if not any(found):
                found = (empty,) * self.layers
            fill(self, name, tuple(found))
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
        self._check(family)

    def _check(self, family: Family) -> None:
        for name in ("vocab", "d_model", "d_ff", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; "
                f"each key-value head must serve the same number of query heads."
            )
        for name in ("head_dim", "rotary_width"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} is odd; rotary positions turn pairs of "
                    f"channels, so choose an even one."
                )
        if self.rotary_width > self.head_dim:
            raise ValueError(
                f"rotary_width={self.rotary_width} is more than head_dim={self.head_dim}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is unknown. Use one of {', '.join(ACTIVATIONS)}."
            )
        for name in ("windows", "unrotated"):
            if len(getattr(self, name)) != self.layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; a model of {self.layers} "
                    f"layers needs as many."
                )
        if family.experts != bool(self.experts) or not (
            bool(self.experts) <= self.experts_per_token <= self.experts
        ):
            raise ValueError(
                f"experts={self.experts} with experts_per_token={self.experts_per_token} fits no "
                f"{self.family} model: "
                + (
                    "it has experts, and a token goes to one of them at least."
                    if family.experts
                    else "it has no experts."
                )
            )
        scaling = self.rope_scaling
        for name in ("factors", "long_factors") if scaling is not None else ():
            numbers = getattr(scaling, name)
            if numbers and len(numbers) != self.rotated // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {len(numbers)} numbers; {self.rotated} rotated "
                    f"channels need {self.rotated // 2}."
                )

    @property
    def rotated(self) -> int:
        """Channels of a head that turn with the position."""
        return self.rotary_width or self.head_dim

    @property
    def attention_scale(self) -> float:
        """Factor of the attention logits."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return bool(self.attention_bias) and FAMILIES[self.family].output_bias

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer, the tokenizer's own first."""
        return (() if self.eos_id is None else (self.eos_id,)) + self.other_eos_ids

    @property
    def rotations(self) -> tuple[str, ...]:
        """How each layer rotates: "main", "local" (a base of its own) or "none"."""

        def one(window: int, off: bool) -> str:
            return "none" if off else "local" if window and self.local_rope_theta else "main"

        return tuple(map(one, self.windows, self.unrotated))
