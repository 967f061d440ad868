"""Hugging Face's config.json to `ModelSpec` and back.

Version 4 of transformers writes `rope_theta`, `rope_scaling` and `torch_dtype`; version 5 writes
`rope_parameters` and `dtype`. Both are read; `to_hf` writes both.

A field that nothing here reads and that is not known to be harmless is refused: it might change
what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_jax.models import hf_rope
from sage_jax.models import spec as spec_lib

_SIZES = {  # ModelSpec field: config.json key; a file without one of these is refused
    "vocab": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
ACTIVATIONS = {  # config.json: ours
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_READ = {
    "model_type", "architectures", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "rms_norm_eps", "tie_word_embeddings", "attention_bias", "bos_token_id", "eos_token_id",
    "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters", "layer_types",
    "original_max_position_embeddings",
}  # fmt: skip
_READ_BY = {  # by the way in which a family says which layers have a window
    "": set(),
    "all": {"sliding_window"},
    "upper": {"sliding_window", "use_sliding_window", "max_window_layers"},
    "switch": {"sliding_window", "use_sliding_window"},
    "alternating": {
        "sliding_window", "sliding_window_pattern", "query_pre_attn_scalar",
        "final_logit_softcapping", "attn_logit_softcapping",
    },
    "nope": {"sliding_window", "use_sliding_window", "max_window_layers"},
}  # fmt: skip
_MUST_BE: dict[str, tuple] = {  # fields that change results, and the values that we compute
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "max_window_layers": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (True, None),
    "add_cross_attention": (False, None),
    "is_decoder": (True, False, None),
    "is_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0, None),  # the next four: in training only, which does without
    "attention_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "clip_qkv": (None,),
    "num_nextn_predict_layers": (0, None),
}
_HARMLESS = {  # say how a model was made, is stored or is run, not what it computes
    "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "cache_implementation",
    "exported_by", "name_or_path", "return_dict", "output_attentions", "output_hidden_states",
    "torchscript", "id2label", "label2id", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id",
    "chunk_size_feed_forward",
    "tie_encoder_decoder", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "diversity_penalty",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "cross_attention_hidden_size", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "attn_implementation", "is_llama_config", "hidden_act",
}  # fmt: skip


def family_of(config: Mapping[str, Any], origin: str) -> str:
    """The name of the family a config belongs to.

    Args:
      config: a parsed config.json.
      origin: where it comes from, for messages.

    Returns:
      A key of `spec.FAMILIES`.

    Raises:
      ValueError: if the architecture is not one of them.
    """
    known = {name: family.architecture for name, family in spec_lib.FAMILIES.items()}
    name = config.get("model_type")
    if name not in known:
        hint = " Save its text model alone." if "text_config" in config else ""
        raise ValueError(
            f"{origin}: model_type={name!r} is not supported. Supported are "
            f"{', '.join(sorted(known))}.{hint}"
        )
    architectures = config.get("architectures") or [known[name]]
    if list(architectures) != [known[name]]:
        raise ValueError(
            f"{origin}: architectures={architectures!r} is not supported; a {name} model must be "
            f"a {known[name]}."
        )
    return str(name)


def _check_fields(config: Mapping[str, Any], name: str, origin: str) -> None:
    family = spec_lib.FAMILIES[name]
    read = _READ | _READ_BY[family.windows] | set(_SIZES.values()) | set(family.keys)
    read |= {family.activation_key}
    if family.experts:
        read |= {"num_experts_per_tok"}
    if family.mlp_bias is None:
        read |= {"mlp_bias"}
    for field, value in config.items():
        if field in read or field in _HARMLESS or field.startswith("_"):
            continue
        if field not in _MUST_BE:
            raise ValueError(
                f"{origin}: {field}={value!r} is not known for a {name} model, and might change "
                f"what it computes. If it does not, take it out of the file."
            )
        if value not in _MUST_BE[field]:
            raise ValueError(
                f"{origin}: {field}={value!r} changes what a {name} model computes and is not "
                f"supported. Only {field}={_MUST_BE[field][0]!r} is."
            )
    missing = [key for key in _SIZES.values() if config.get(key) is None]
    if missing:
        raise ValueError(
            f"{origin}: {', '.join(missing)} is missing. Is this the config.json of a {name} model?"
        )
    only = family.attention_bias
    if only is not None and bool(config.get("attention_bias") or only) != only:
        raise ValueError(
            f"{origin}: attention_bias={config['attention_bias']!r}, but a {name} model always has "
            f"attention_bias={only}."
        )
    if family.local_rope and config.get("attn_logit_softcapping") is not None:
        raise ValueError(  # transformers stores it and computes without it
            f"{origin}: attn_logit_softcapping={config['attn_logit_softcapping']!r} is not "
            f"supported for a {name} model; only null is."
        )
    if "head_dim" in config and config["head_dim"] is None and "head_dim" in family.defaults:
        raise ValueError(f"{origin}: head_dim is null; a {name} model needs a number.")


def _windows(config: Mapping[str, Any], family: spec_lib.Family, origin: str) -> tuple[int, ...]:
    """The window of every layer, 0 = none."""
    count = int(config["num_hidden_layers"])
    window = config.get("sliding_window")
    if family.windows in ("upper", "switch", "nope") and not config.get("use_sliding_window"):
        window = None
    given = config.get("layer_types")
    unknown = sorted(set(given or ()) - {"full_attention", "sliding_attention"})
    if unknown or (given and len(given) != count):
        raise ValueError(
            f"{origin}: layer_types holds {unknown or len(given or ())}; a model of {count} layers "
            f"needs as many of 'full_attention' and 'sliding_attention'."
        )
    if family.windows in ("", "all", "switch"):
        local = [window is not None] * count
    elif given:
        local = [kind == "sliding_attention" for kind in given]
    elif family.windows == "upper":
        first = int(config.get("max_window_layers") or 28)
        local = [window is not None and i >= first for i in range(count)]
    elif family.windows == "alternating":
        local = [(i + 1) % int(config["sliding_window_pattern"]) != 0 for i in range(count)]
    else:
        local = [window is not None and off for off in _unrotated(config, family)]
    if given and [kind == "sliding_attention" for kind in given] != local:
        raise ValueError(
            f"{origin}: layer_types and sliding_window={config.get('sliding_window')!r} say "
            f"different things about which layers have a window."
        )
    if any(local) and not window:
        raise ValueError(
            f"{origin}: some layers have a window, but sliding_window="
            f"{config.get('sliding_window')!r} gives no size or is switched off."
        )
    return tuple(int(window or 0) if one else 0 for one in local)


def _unrotated(config: Mapping[str, Any], family: spec_lib.Family) -> tuple[bool, ...]:
    count = int(config["num_hidden_layers"])
    if family.windows != "nope":
        return (False,) * count
    rotates = config.get("no_rope_layers")  # 1: the layer rotates, in spite of the name
    if rotates is None:
        every = int(config["no_rope_layer_interval"])
        rotates = [int((i + 1) % every != 0) for i in range(count)]
    return tuple(not one for one in rotates[:count])


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


_NULLABLE = {"sliding_window", "final_logit_softcapping", "attn_logit_softcapping"}


def from_hf(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    *,
    origin: str = "config.json",
) -> spec_lib.ModelSpec:
    """Reads a Hugging Face config.

    Args:
      config: a parsed config.json, as transformers 4 or 5 writes it.
      generation: a parsed generation_config.json; its end-of-answer ids are added.
      origin: where the config comes from, for messages.

    Returns:
      The spec.

    Raises:
      ValueError: for another architecture, or a field that would change the outputs in a way that
        is not implemented; the message names the field.

    >>> from_hf({"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8,
    ...          "num_hidden_layers": 1, "num_attention_heads": 2}).rope_theta
    10000.0
    """
    name = family_of(config, origin)
    _check_fields(config, name, origin)
    family = spec_lib.FAMILIES[name]
    given_heads = "num_key_value_heads" in config  # null there means: as many as heads
    config = {
        **family.defaults,
        **{k: v for k, v in config.items() if v is not None or k in _NULLABLE},
        **({"num_key_value_heads": config["num_key_value_heads"]} if given_heads else {}),
    }
    theta, scaling, local_theta, share = hf_rope.parse(config, family, origin)
    activation = config[family.activation_key]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{origin}: {family.activation_key}={activation!r} is not supported. Supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    eos = _ids(config.get("eos_token_id"))
    eos += tuple(i for i in _ids((generation or {}).get("eos_token_id")) if i not in eos)
    sizes: dict[str, Any] = {field: int(config[key]) for field, key in _SIZES.items()}
    if "moe_intermediate_size" in family.defaults:
        sizes["d_ff"] = int(config["moe_intermediate_size"])
    head_dim = int(config.get("head_dim") or sizes["d_model"] // sizes["heads"])
    extra: dict[str, Any] = {}
    if family.experts:
        named = "num_experts" if "num_experts" in family.defaults else "num_local_experts"
        other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[named]
        extra |= {
            "experts": int(config.get(other) or config[named]),
            "experts_per_token": int(config["num_experts_per_tok"]),
            "norm_topk": bool(config["norm_topk_prob"])
            if family.norm_topk is None
            else family.norm_topk,
            "router_aux": float(config["router_aux_loss_coef"]),
        }
    return spec_lib.ModelSpec(
        **sizes,
        kv_heads=int(config.get("num_key_value_heads") or 0),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config["rms_norm_eps"]),
        tied=bool(config["tie_word_embeddings"]),
        attention_bias=None
        if family.attention_bias is not None
        else bool(config["attention_bias"]),
        mlp_bias=None if family.mlp_bias is not None else bool(config["mlp_bias"]),
        family=name,
        max_positions=int(config["max_position_embeddings"]),
        bos_id=config.get("bos_token_id"),
        eos_id=eos[0] if eos else None,
        other_eos_ids=eos[1:],
        pad_id=config.get("pad_token_id"),
        activation=ACTIVATIONS[activation],
        windows=_windows(config, family, origin),
        unrotated=_unrotated(config, family),
        local_rope_theta=local_theta,
        rotary_width=int(head_dim * share),
        query_scalar=float(config.get("query_pre_attn_scalar") or 0.0),
        attention_softcap=float(config.get("attn_logit_softcapping") or 0.0),
        final_softcap=float(config.get("final_logit_softcapping") or 0.0),
        **extra,
    )


def to_hf(spec: spec_lib.ModelSpec, *, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that makes transformers (4 or 5) build the same model.

    Args:
      spec: the model.
      dtype: name of the dtype its weights are written in.

    Returns:
      A dict ready for `json.dump`; `from_hf` reads it back to an equal spec.

    Raises:
      ValueError: if the rotary factors came from a GGUF file and match no named scaling, or the
        layers differ in a way that no config of the family says.

    >>> spec = spec_lib.ModelSpec(vocab=8, d_model=4, d_ff=8, layers=1, heads=2)
    >>> from_hf(to_hf(spec)) == spec
    True
    """
    family = spec_lib.FAMILIES[spec.family]
    eos = list(spec.eos_ids)
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[spec.activation]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        **{key: getattr(spec, field) for field, key in _SIZES.items()},
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        family.activation_key: activation,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": spec.bos_id,
        "eos_token_id": eos if len(eos) > 1 else spec.eos_id,
        "pad_token_id": spec.pad_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if family.attention_bias is None:
        config["attention_bias"] = spec.attention_bias
    if family.mlp_bias is None:
        config["mlp_bias"] = spec.mlp_bias
    if family.experts:
        named = "num_experts" if "num_experts" in family.defaults else "num_local_experts"
        config |= {
            named: spec.experts,
            "num_experts_per_tok": spec.experts_per_token,
            "router_aux_loss_coef": spec.router_aux,
        }
        if family.norm_topk is None:
            config["norm_topk_prob"] = spec.norm_topk
        if "moe_intermediate_size" in family.defaults:
            config["moe_intermediate_size"] = spec.d_ff
    config |= hf_rope.write(spec) | _layers_to_hf(spec, family)
    if from_hf(config) != spec:
        raise ValueError(
            f"The layers of this model (windows={spec.windows}, unrotated={spec.unrotated}) are "
            f"none that a {spec.family} config can describe, so it cannot be exported."
        )
    return config


def _layers_to_hf(spec: spec_lib.ModelSpec, family: spec_lib.Family) -> dict[str, Any]:
    """What says how the layers of a model differ, and how its logits are bounded."""
    window = max(spec.windows) or None
    if family.windows == "":
        return {}
    out: dict[str, Any] = {"sliding_window": window}
    if family.windows in ("upper", "nope", "alternating"):
        out["layer_types"] = [
            "sliding_attention" if one else "full_attention" for one in spec.windows
        ]
    if family.windows in ("upper", "switch", "nope"):
        out["use_sliding_window"] = window is not None
    if family.windows == "upper":
        full = [i for i, one in enumerate(spec.windows) if one]
        out["max_window_layers"] = full[0] if full else spec.layers
    if family.windows == "nope":
        out["no_rope_layers"] = [int(not one) for one in spec.unrotated]
    if family.windows == "alternating":
        out |= {
            "query_pre_attn_scalar": spec.query_scalar or spec.head_dim,
            "attn_logit_softcapping": spec.attention_softcap or None,
            "final_logit_softcapping": spec.final_softcap or None,
        }
        if out["query_pre_attn_scalar"] % 1 == 0:  # transformers 5 wants an integer
            out["query_pre_attn_scalar"] = int(out["query_pre_attn_scalar"])
    return out
