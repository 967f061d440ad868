"""Where every parameter lives in a file: one table for reading and writing all formats."""

from __future__ import annotations

import functools
from typing import NamedTuple

from sage_jax.models import spec as spec_lib


class Tensor(NamedTuple):
    """One parameter and its names; a `{}` stands for the layer, a second one for the expert."""

    path: str  # in our tree
    hf: str
    gguf: str
    transposed: bool = False  # files hold [out, in], we hold [in, out]
    start: int = 0  # of a tensor that holds several parameters: where this one begins in axis 0
    total: int = 0  # and how long that axis is; 0: the tensor is this parameter

    @property
    def stacked(self) -> int:
        """Leading axes of the parameter that a file keeps as tensors of their own."""
        return self.hf.count("{}")


def _linear(path: str, hf: str, gguf: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{path}/kernel", f"{hf}.weight", f"{gguf}.weight", transposed=True),
        Tensor(f"{path}/bias", f"{hf}.bias", f"{gguf}.bias"),
    )


def _scale(path: str, hf: str, gguf: str) -> Tensor:
    return Tensor(f"{path}/scale", f"{hf}.weight", f"{gguf}.weight")


_LAYER = "model.layers.{}"
TENSORS: tuple[Tensor, ...] = (
    Tensor("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    _scale("layers/attention_norm", f"{_LAYER}.input_layernorm", "blk.{}.attn_norm"),
    *_linear("layers/attention/q", f"{_LAYER}.self_attn.q_proj", "blk.{}.attn_q"),
    *_linear("layers/attention/k", f"{_LAYER}.self_attn.k_proj", "blk.{}.attn_k"),
    *_linear("layers/attention/v", f"{_LAYER}.self_attn.v_proj", "blk.{}.attn_v"),
    *_linear("layers/attention/o", f"{_LAYER}.self_attn.o_proj", "blk.{}.attn_output"),
    _scale("layers/attention/q_norm", f"{_LAYER}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    _scale("layers/attention/k_norm", f"{_LAYER}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    _scale("layers/mlp_norm", f"{_LAYER}.post_attention_layernorm", "blk.{}.ffn_norm"),
    *_linear("layers/mlp/gate", f"{_LAYER}.mlp.gate_proj", "blk.{}.ffn_gate"),
    *_linear("layers/mlp/up", f"{_LAYER}.mlp.up_proj", "blk.{}.ffn_up"),
    *_linear("layers/mlp/down", f"{_LAYER}.mlp.down_proj", "blk.{}.ffn_down"),
    Tensor("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    Tensor("lm_head/kernel", "lm_head.weight", "output.weight", transposed=True),
)
# Norms after attention and MLP, and between them when there are four to a layer.
_BOTH_NORMS = (
    _scale("layers/attention_post_norm", f"{_LAYER}.post_attention_layernorm", ""),
    _scale("layers/mlp_norm", f"{_LAYER}.pre_feedforward_layernorm", ""),
    _scale("layers/mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm", ""),
)
_QWEN_EXPERTS = (
    Tensor("layers/mlp/router/kernel", f"{_LAYER}.mlp.gate.weight", "", True),
    *(
        Tensor(
            f"layers/mlp/experts/{part}/kernel",
            f"{_LAYER}.mlp.experts.{{}}.{part}_proj.weight",
            "",
            True,
        )
        for part in ("gate", "up", "down")
    ),
)
_MIXTRAL_EXPERTS = (
    Tensor("layers/mlp/router/kernel", f"{_LAYER}.block_sparse_moe.gate.weight", "", True),
    *(
        Tensor(
            f"layers/mlp/experts/{part}/kernel",
            f"{_LAYER}.block_sparse_moe.experts.{{}}.{name}.weight",
            "",
            True,
        )
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
)
CHANGED: dict[str, tuple[Tensor, ...]] = {  # by family: rows in the place of those of `TENSORS`
    "gemma2": _BOTH_NORMS,
    "gemma3_text": _BOTH_NORMS,
    "olmo2": (_BOTH_NORMS[0], _BOTH_NORMS[2]),
    "qwen3_moe": _QWEN_EXPERTS,
    "mixtral": _MIXTRAL_EXPERTS,
}
FUSED: dict[str, dict[str, tuple[str, ...]]] = {  # by family: one tensor for several parameters
    "phi3": {
        f"{_LAYER}.self_attn.qkv_proj.weight": tuple(
            f"layers/attention/{part}/kernel" for part in "qkv"
        ),
        f"{_LAYER}.mlp.gate_up_proj.weight": ("layers/mlp/gate/kernel", "layers/mlp/up/kernel"),
    }
}


@functools.cache
def rows(spec: spec_lib.ModelSpec) -> tuple[Tensor, ...]:
    """The table for a model: every parameter that one of its family may have.

    >>> spec = spec_lib.ModelSpec(vocab=8, d_model=4, d_ff=6, layers=1, heads=2, family="phi3")
    >>> [(row.path, row.start, row.total) for row in rows(spec) if "gate_up" in row.hf]
    [('layers/mlp/gate/kernel', 0, 12), ('layers/mlp/up/kernel', 6, 12)]
    """
    table = {row.path: row for row in TENSORS}
    table |= {row.path: row for row in CHANGED.get(spec.family, ())}
    heads, groups = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    wide = {"q": heads, "k": groups, "v": groups, "gate": spec.d_ff, "up": spec.d_ff}
    for name, paths in FUSED.get(spec.family, {}).items():
        sizes = [wide[path.split("/")[-2]] for path in paths]
        for i, path in enumerate(paths):
            table[path] = Tensor(path, name, "", True, sum(sizes[:i]), sum(sizes))
    return tuple(table.values())
