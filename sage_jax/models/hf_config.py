"""Hugging Face's config.json to `ModelSpec` and back.

Version 4 of transformers writes `rope_theta`, `rope_scaling` and `torch_dtype`; version 5 writes
`rope_parameters` and `dtype`. Both are read; `to_hf` writes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_jax.models import spec as spec_lib

_SIZES = {  # ModelSpec field: config.json key; a file without one of these is refused
    "vocab": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}


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
        raise ValueError(
            f"{origin}: model_type={name!r} is not supported. Supported are "
            f"{', '.join(sorted(known))}."
        )
    architectures = config.get("architectures") or [known[name]]
    if list(architectures) != [known[name]]:
        raise ValueError(
            f"{origin}: architectures={architectures!r} is not supported; a {name} model must be "
            f"a {known[name]}."
        )
    return str(name)


def _check_fields(config: Mapping[str, Any], name: str, origin: str) -> None:
    for field, allowed in spec_lib.FAMILIES[name].required.items():
        if field in config and config[field] not in allowed:
            raise ValueError(
                f"{origin}: {field}={config[field]!r} changes what a {name} model computes and is "
                f"not supported. Only {field}={allowed[0]!r} is."
            )
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"{origin}: layer_types holds {sorted(kinds)}; only 'full_attention' is supported."
        )
    missing = [key for key in _SIZES.values() if config.get(key) is None]
    if missing:
        raise ValueError(
            f"{origin}: {', '.join(missing)} is missing. Is this the config.json of a {name} model?"
        )


def _rope(config: Mapping[str, Any], origin: str) -> tuple[float, spec_lib.RopeScaling | None]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or config["rope_theta"])
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"{origin}: rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']!r} is "
            f"not supported; only 1 is."
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, spec_lib.RopeScaling("linear", factor=float(rope["factor"]))
        if kind == "llama3":
            return theta, spec_lib.RopeScaling(
                "llama3",
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=int(rope["original_max_position_embeddings"]),
            )
    except KeyError as e:
        raise ValueError(
            f"{origin}: rope type {kind!r} needs {e.args[0]!r}, which is missing."
        ) from e
    raise ValueError(
        f"{origin}: rope_type={kind!r} is not supported. Supported are default, linear and llama3."
    )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


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
    config = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    theta, scaling = _rope(config, origin)
    eos = _ids(config.get("eos_token_id"))
    eos += tuple(i for i in _ids((generation or {}).get("eos_token_id")) if i not in eos)
    return spec_lib.ModelSpec(
        **{field: int(config[key]) for field, key in _SIZES.items()},
        kv_heads=int(config.get("num_key_value_heads") or 0),
        head_dim=int(config.get("head_dim") or 0),
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
    )


def to_hf(spec: spec_lib.ModelSpec, *, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that makes transformers (4 or 5) build the same model.

    Args:
      spec: the model.
      dtype: name of the dtype its weights are written in.

    Returns:
      A dict ready for `json.dump`; `from_hf` reads it back to an equal spec.

    Raises:
      ValueError: if the rotary factors came from a GGUF file and match no named scaling.

    >>> spec = spec_lib.ModelSpec(vocab=8, d_model=4, d_ff=8, layers=1, heads=2)
    >>> from_hf(to_hf(spec)) == spec
    True
    """
    family = spec_lib.FAMILIES[spec.family]
    eos = list(spec.eos_ids)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        **{key: getattr(spec, field) for field, key in _SIZES.items()},
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
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
    scaling = _scaling_to_hf(spec.rope_scaling)
    config["rope_theta"] = spec.rope_theta
    config["rope_scaling"] = scaling
    config["rope_parameters"] = {
        "rope_theta": spec.rope_theta,
        **(scaling or {"rope_type": "default"}),
    }
    return config


def _scaling_to_hf(scaling: spec_lib.RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "llama3":
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    raise ValueError(
        "The model's rotary factors come from a GGUF file and match no llama3 scaling, which "
        "config.json cannot express. Load the model from its Hugging Face directory to export it."
    )
