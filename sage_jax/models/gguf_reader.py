"""Models from GGUF files: metadata to a spec, quantised blocks to float32."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np

from sage_jax.models import decoder, names, quantised, rope, tensors
from sage_jax.models import spec as spec_lib

_MUST_BE = {  # {architecture}.key: the only values that leave the outputs as we compute them
    "expert_count": (0, None),
    "attention.sliding_window": (0, None),
    "attention.causal": (True, None),
    "attention.clamp_kqv": (0.0, None),
    "logit_scale": (1.0, 0.0, None),
    "residual_scale": (1.0, 0.0, None),
    "embedding_scale": (1.0, 0.0, None),
    "attention.scale": (0.0, None),
    "use_parallel_residual": (False, None),
}


def metadata(file: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Opens a GGUF file.

    Args:
      file: path of the file.

    Returns:
      `gguf.GGUFReader` (tensors stay on disk until used), and the metadata as Python values.

    Raises:
      ValueError: if the file is not GGUF or is one part of several.
    """
    return _open(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # parsing takes seconds; a model and its tokenizer come in turn
def _open(file: pathlib.Path, changed_ns: int) -> tuple[Any, dict[str, Any]]:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError) as e:
        raise ValueError(f"{file} is not a readable GGUF file ({e}). Copy it again.") from e
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("split.count", 1) > 1:
        raise ValueError(
            f"{file} is one of {fields['split.count']} parts. Join them first: "
            f"llama-gguf-split --merge."
        )
    return reader, fields


def read(
    file: pathlib.Path,
    place: tensors.Place | None = None,
    how: quantised.How = quantised.FLOAT32,
) -> tuple[spec_lib.ModelSpec, decoder.Params]:
    """Reads a model.

    Args:
      file: a GGUF file of a supported architecture, in any quantisation the `gguf` package can
        undo.
      place: where the parameters go, as in `models.load`.
      how: how they are held, see `quantised.plan`.

    Returns:
      The spec and the parameters.

    Raises:
      ValueError: for other architectures or quantisations, settings that would change the
        outputs, and missing or superfluous tensors.
    """
    reader, fields = metadata(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    spec = _spec(file, fields, stored)
    expected = [row.gguf.format(*at) for row, at in tensors.slices(spec)]
    tensors.check_names(expected, stored, str(file), "Its metadata")
    permuted = spec_lib.FAMILIES[spec.family].gguf_permuted

    def shape(row: names.Tensor, at: tensors.At) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(stored[row.gguf.format(*at)].shape))

    def part(row: names.Tensor, at: tensors.At, index: tensors.Index) -> np.ndarray:
        """Blocks run along the last axis: whole rows are undone, and cut afterwards."""
        rows: Any = index[0]
        side = row.path.split("/")[-2]
        if permuted and side in ("q", "k"):
            count = shape(row, at)[0]
            order = _unpermute(np.arange(count), spec.heads if side == "q" else spec.kv_heads)
            rows = order[rows]
        value = _dequantise(file, stored[row.gguf.format(*at)], rows)
        return value[(slice(None), *index[1:])]

    return spec, tensors.assemble(spec, tensors.Source(shape, part), str(file), place, how)


def _dequantise(file: pathlib.Path, tensor: Any, rows: Any = slice(None)) -> np.ndarray:
    """A tensor as float32, or some of its rows: of a vector, these are its elements."""
    import gguf

    try:
        value = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError as e:
        raise ValueError(
            f"{file}: {tensor.name} is quantised as {tensor.tensor_type.name}, which the gguf "
            f"package cannot undo. Use a Q8_0, Q4_K or F16 file of the model."
        ) from e
    return np.asarray(value, np.float32)


def _shortest(value: float) -> float:
    """The decimal number that a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order: it interleaves the two halves of every rotary head."""
    shape = value.shape
    value = value.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return value.swapaxes(1, 2).reshape(shape)


def _spec(file: pathlib.Path, fields: dict[str, Any], stored: dict[str, Any]) -> spec_lib.ModelSpec:
    name = fields.get("general.architecture")
    known = {f.gguf: model for model, f in spec_lib.FAMILIES.items() if f.gguf}
    if name not in known:
        raise ValueError(
            f"{file}: general.architecture={name!r} is not supported. Supported are "
            f"{', '.join(sorted(known))}."
        )
    family = spec_lib.FAMILIES[known[name]]
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in fields.items()
        if key.startswith(f"{name}.")
    }
    for key, allowed in _MUST_BE.items():
        if key in own and own[key] not in allowed:
            raise ValueError(
                f"{file}: {name}.{key}={own[key]!r} changes what the model computes and is not "
                f"supported."
            )
    needed = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    missing = [f"{name}.{key}" for key in needed if key not in own]
    missing += [key for key in ("token_embd.weight",) if key not in stored]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} is missing; the file is not a whole model.")
    heads = int(own["attention.head_count"])
    width = int(own.get("attention.key_length", own["embedding_length"] // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, width) != width:
            raise ValueError(
                f"{file}: {name}.{key}={own[key]}, but heads are {width} wide; only equal widths "
                f"are supported."
            )
    theta = _shortest(own.get("rope.freq_base", 10000.0))
    special = {
        part: fields.get(f"tokenizer.ggml.{part}_token_id")
        for part in ("bos", "eos", "eot", "padding")
    }
    more = () if special["eot"] in (None, special["eos"]) else (special["eot"],)
    return spec_lib.ModelSpec(
        vocab=int(stored["token_embd.weight"].shape[1]),
        d_model=int(own["embedding_length"]),
        d_ff=int(own["feed_forward_length"]),
        layers=int(own["block_count"]),
        heads=heads,
        kv_heads=int(own.get("attention.head_count_kv", heads)),
        head_dim=width,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, name, own, stored, theta, width),
        norm_eps=_shortest(own.get("attention.layer_norm_rms_epsilon", 1e-5)),
        tied="output.weight" not in stored,
        attention_bias="blk.0.attn_q.bias" in stored or family.attention_bias,
        mlp_bias="blk.0.ffn_gate.bias" in stored,
        family=known[name],
        max_positions=int(own.get("context_length", 2048)),
        bos_id=special["bos"],
        eos_id=special["eos"],
        other_eos_ids=more,
        pad_id=special["padding"],
    )


def _rope_scaling(
    file: pathlib.Path,
    name: str,
    own: dict[str, Any],
    stored: dict[str, Any],
    theta: float,
    width: int,
) -> rope.RopeScaling | None:
    kind = own.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{file}: {name}.rope.scaling.type={kind!r} is not supported; only linear is."
        )
    factor = _shortest(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)))
    if kind == "linear" or factor not in (0.0, 1.0):
        return rope.RopeScaling("linear", factor=factor)
    if "rope_freqs.weight" not in stored:
        return None
    factors = _dequantise(file, stored["rope_freqs.weight"]).astype(np.float64)
    return _named_scaling(factors, theta, width)


def _named_scaling(factors: np.ndarray, theta: float, width: int) -> rope.RopeScaling:
    """The llama3 scaling these divisors come from, so that config.json can express it.

    GGUF keeps the divisors only. The largest is the factor; Llama 3.1 to 3.3 all use the
    frequency factors 1 and 4, so only the original context length has to be tried.
    """
    plain = rope.frequencies(theta, width)
    for power in range(10, 21):
        scaling = rope.RopeScaling(
            "llama3",
            factor=float(np.round(factors.max(), 4)),
            original_max_positions=2**power,
        )
        if np.allclose(scaling.divisors(plain), factors, rtol=1e-5):
            return scaling
    return rope.RopeScaling("factors", factors=tuple(factors.tolist()))
