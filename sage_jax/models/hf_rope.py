"""The rotary settings of config.json, in both spellings of transformers, to ours and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sage_jax.models import spec as spec_lib
from sage_jax.models.rope import RopeScaling

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS: dict[str, set[str]] = {  # what each kind reads besides
    "default": {"factor", "original_max_position_embeddings"},  # transformers reads neither
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate", "original_max_position_embeddings",
    },
    "longrope": {
        "factor", "attention_factor", "short_factor", "long_factor",
        "original_max_position_embeddings",
    },
}  # fmt: skip


def parse(
    config: Mapping[str, Any], family: spec_lib.Family, origin: str
) -> tuple[float, RopeScaling | None, float, float]:
    """Reads the rotary settings.

    Args:
      config: config.json over the family's defaults.
      family: its family.
      origin: the file, for messages.

    Returns:
      The base, the scaling, the base of layers with a window (0: the same), and the share of a
      head's channels that turn.

    Raises:
      ValueError: for a kind or a field that is not supported, or one that is missing.
    """
    given = config.get("rope_parameters") or {}
    local = 0.0
    if family.local_rope:
        nested = given if set(given) & {"full_attention", "sliding_attention"} else {}
        sliding = nested.get("sliding_attention") or {}
        local = float(sliding.get("rope_theta") or config["rope_local_base_freq"])
        kind = _kind(sliding)
        if kind != "default":
            raise ValueError(
                f"{origin}: rope_parameters.sliding_attention has rope_type={kind!r}; only "
                f"'default' is supported for layers with a window."
            )
        given = nested.get("full_attention") or ({} if nested else given)
    rope = {
        k: v for k, v in {**given, **(config.get("rope_scaling") or {})}.items() if v is not None
    }
    theta = float(rope.get("rope_theta") or config["rope_theta"])
    share = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and not family.partial_rotary:
        raise ValueError(
            f"{origin}: partial_rotary_factor={share!r} is not supported for this family; only 1 "
            f"is."
        )
    return theta, _scaling(rope, config, origin), local, share


def _kind(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return "longrope" if kind == "su" else str(kind)  # its first name, in Phi-3's files


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any], origin: str) -> RopeScaling | None:
    kind = _kind(rope)
    if kind not in _KEYS:
        raise ValueError(
            f"{origin}: rope_type={kind!r} is not supported. Supported are {', '.join(_KEYS)}."
        )
    unknown = sorted(set(rope) - _COMMON - _KEYS[kind])
    if unknown:
        raise ValueError(
            f"{origin}: {', '.join(unknown)} of the rotary settings is not known for rope type "
            f"{kind!r}; it might change the outputs."
        )
    original = int(
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return RopeScaling("linear", factor=float(rope["factor"]))
        if kind == "llama3":
            return RopeScaling(
                "llama3",
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=original,
            )
        stretch = float(rope.get("factor") or config["max_position_embeddings"] / original)
        attention = rope.get("attention_factor")
        if kind == "yarn":
            if attention is None:
                attention = _yarn_attention(stretch, rope)
            return RopeScaling(
                "yarn",
                factor=stretch,
                original_max_positions=original,
                beta_fast=float(rope.get("beta_fast") or 32),
                beta_slow=float(rope.get("beta_slow") or 1),
                truncate=bool(rope.get("truncate", True)),
                attention_factor=float(attention),
            )
        if attention is None:
            attention = longrope_attention(stretch, original)
        return RopeScaling(
            "longrope",
            factor=stretch,
            original_max_positions=original,
            factors=tuple(map(float, rope["short_factor"])),
            long_factors=tuple(map(float, rope["long_factor"])),
            attention_factor=float(attention),
        )
    except KeyError as e:
        raise ValueError(
            f"{origin}: rope type {kind!r} needs {e.args[0]!r}, which is missing."
        ) from e


def _yarn_attention(factor: float, rope: Mapping[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(one) / scale(all_dim) if one and all_dim else scale(1.0)


def longrope_attention(factor: float, original: int) -> float:
    """What longrope multiplies queries and keys by, where config.json does not say."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def write(spec: spec_lib.ModelSpec) -> dict[str, Any]:
    """The rotary settings of a model under the keys of transformers 4 and 5.

    Raises:
      ValueError: the rotary factors came from a GGUF file and match no named scaling.
    """
    scaling = _write_scaling(spec.rope_scaling)
    main = {"rope_theta": spec.rope_theta, **(scaling or {"rope_type": "default"})}
    out: dict[str, Any] = {"rope_theta": spec.rope_theta, "rope_scaling": scaling}
    if spec_lib.FAMILIES[spec.family].partial_rotary:
        share = spec.rotated / spec.head_dim
        out["partial_rotary_factor"] = main["partial_rotary_factor"] = share
    if scaling and scaling["rope_type"] == "longrope":
        assert spec.rope_scaling is not None
        out["original_max_position_embeddings"] = spec.rope_scaling.original_max_positions
        own = longrope_attention(
            spec.max_positions / spec.rope_scaling.original_max_positions,
            spec.rope_scaling.original_max_positions,
        )
        short = {"type": "longrope"} | {k: scaling[k] for k in ("short_factor", "long_factor")}
        # transformers 4 wants these three keys and no other; they say it all in most models.
        out["rope_scaling"] = short if scaling["attention_factor"] == own else scaling
    if spec_lib.FAMILIES[spec.family].local_rope:
        local = {"rope_type": "default", "rope_theta": spec.local_rope_theta}
        out["rope_local_base_freq"] = spec.local_rope_theta
        main = {"full_attention": main, "sliding_attention": local}
    return out | {"rope_parameters": main}


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return out
    original = {"original_max_position_embeddings": scaling.original_max_positions}
    if scaling.kind == "llama3":
        return out | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            **original,
        }
    attention = {"attention_factor": scaling.attention_factor}
    if scaling.kind == "yarn":
        betas = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        cut = {} if scaling.truncate else {"truncate": False}
        return out | betas | cut | original | attention
    if scaling.kind == "longrope":
        return out | original | attention | {
            "short_factor": list(scaling.factors), "long_factor": list(scaling.long_factors),
        }  # fmt: skip
    raise ValueError(
        "The model's rotary factors come from a GGUF file and match no llama3 scaling, which "
        "config.json cannot express. Load the model from its Hugging Face directory to export it."
    )
