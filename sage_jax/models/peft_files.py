"""Adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from typing import Any

import numpy as np

from sage_jax.models import hf, lora, names, tensors
from sage_jax.models import spec as spec_lib

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora"}
_HARMLESS = {  # where an adapter comes from and how it was trained, not what it computes
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern",
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "ensure_weight_tying",
    "runtime_config",
}  # fmt: skip
_MUST_BE: dict[str, tuple] = {  # what would change it; anything else has to be empty
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # else the base changes
}
_PREFIX = "base_model.model."


def is_adapter(where: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (pathlib.Path(where) / CONFIG).is_file()


def read(directory: str | os.PathLike[str], spec: spec_lib.ModelSpec) -> tuple[lora.Lora, Any]:
    """Reads an adapter.

    Args:
      directory: what PEFT's `save_pretrained` wrote.
      spec: the model that the adapter is for.

    Returns:
      What the adapter is like, and its tree as numpy float32 arrays.

    Raises:
      ValueError: files are missing; a setting would change what the adapter computes in a way that
        is not implemented, or the tensors do not fit the model; the message names it.
    """
    where = pathlib.Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (where / name).is_file():
            raise ValueError(
                f"{where} has no {name}. Give a directory that PEFT's save_pretrained wrote."
            )
    config = hf.read_json(where / CONFIG)
    _check(config, where / CONFIG)
    stored = _load(where / WEIGHTS)
    tree: dict[str, Any] = {}
    found: list[str] = []
    for path, row in _linear(spec).items():
        one = _parameter(stored, row, spec, where, dora=bool(config["use_dora"]))
        if one:
            found.append(path.removeprefix("layers/"))
            lora.put(tree, path, one)
    expected = {key for path in found for key in _keys(_linear(spec)["layers/" + path], spec)}
    extra = sorted(name for name in stored if _module(name) not in expected)
    if extra or not found:
        raise ValueError(
            f"{where}: {len(extra)} tensors of the adapter have no place in a {spec.family} model "
            f"of {spec.layers} layers, the first {extra[:3]}. Adapters of linear maps inside the "
            f"layers are read, of all layers."
        )
    settings = lora.Lora(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets="^(" + "|".join(map(re.escape, found)) + ")$",
        rank_stabilised=bool(config["use_rslora"]),
        dora=bool(config["use_dora"]),
    )
    ranks = {node["lora_a"].shape[-1] for _, node in lora.walk(tree)}
    if ranks != {settings.rank}:
        raise ValueError(f"{where}: r={settings.rank}, but its tensors have rank {sorted(ranks)}.")
    return settings, tree


def _check(config: dict[str, Any], file: pathlib.Path) -> None:
    for key in ("use_rslora", "use_dora"):
        config.setdefault(key, False)
    if config.get("peft_type") != "LORA" or not config.get("r") or not config.get("lora_alpha"):
        raise ValueError(
            f"{file}: peft_type={config.get('peft_type')!r} with r={config.get('r')!r} and "
            f"lora_alpha={config.get('lora_alpha')!r} is not a LoRA adapter, the only kind that is "
            f"read."
        )
    for key, value in config.items():
        if key in _READ | _HARMLESS:
            continue
        allowed = _MUST_BE.get(key, (None, False, [], {}, ""))
        if value not in allowed:
            raise ValueError(
                f"{file}: {key}={value!r} changes what the adapter computes and is not supported; "
                f"only {allowed[0]!r} is. Merge it into its base with PEFT, and load the result."
            )


def _load(file: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors

    with safetensors.safe_open(file, framework="numpy") as handle:
        return {name: np.asarray(handle.get_tensor(name), np.float32) for name in handle.keys()}


def _linear(spec: spec_lib.ModelSpec) -> dict[str, names.Tensor]:
    """Path of every linear map that may have an adapter, with the row of its kernel."""
    found = {row.path.removesuffix("/kernel"): row for row, _ in tensors.present(spec)}
    return {
        path: row for path, row in found.items() if lora.LINEAR.match(path) and row.stacked == 1
    }


def _module(name: str) -> str:
    return re.split(r"\.lora_(?:A|B|magnitude_vector)", name)[0]


def _keys(row: names.Tensor, spec: spec_lib.ModelSpec) -> list[str]:
    """The module of a linear map in each layer."""
    module = _PREFIX + row.hf.removesuffix(".weight")
    return [module.format(layer) for layer in range(spec.layers)]


def _parameter(
    stored: dict[str, np.ndarray],
    row: names.Tensor,
    spec: spec_lib.ModelSpec,
    where: pathlib.Path,
    *,
    dora: bool,
) -> dict[str, np.ndarray]:
    """The adapter of one linear map, stacked over layers; empty if it has none."""
    modules = _keys(row, spec)
    has = [f"{module}.lora_A.weight" in stored for module in modules]
    if not any(has):
        return {}
    shape = tensors.shapes(spec)[row.path]
    wide, narrow = shape[-2:]
    cut = slice(row.start, row.start + narrow) if row.total else slice(None)
    out: dict[str, list[np.ndarray]] = {"lora_a": [], "lora_b": []}
    try:
        for module in modules:
            out["lora_a"].append(stored[f"{module}.lora_A.weight"].T)
            out["lora_b"].append(stored[f"{module}.lora_B.weight"][cut].T)
            if dora:
                key = f"{module}.lora_magnitude_vector"
                vector = stored[key] if key in stored else stored[f"{key}.weight"]
                out.setdefault("lora_norm", []).append(vector[cut])
    except KeyError as e:
        raise ValueError(
            f"{where}: the tensor {e.args[0]!r} is missing. An adapter has to have both matrices "
            f"in every layer."
        ) from e
    found = {name: np.stack(parts) for name, parts in out.items()}
    if found["lora_a"].shape[1] != wide or found["lora_b"].shape[2] != narrow:
        raise ValueError(
            f"{where}: {modules[0]} maps {found['lora_a'].shape[1]} to {found['lora_b'].shape[2]} "
            f"channels, but the model {wide} to {narrow}. It is an adapter of another model."
        )
    return found


def write(
    directory: str | os.PathLike[str],
    spec: spec_lib.ModelSpec,
    adapter: Any,
    settings: lora.Lora,
    *,
    base: str = "",
) -> pathlib.Path:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads, and `read` too.

    Where a file holds several linear maps in one tensor (Phi-3's qkv_proj), their adapters become
    one of a larger rank, block by block; PEFT loads it, `read` does not. With several processes
    every one must call this; the first writes.

    Args:
      directory: where to; made if absent.
      spec: the model.
      adapter: its tree.
      settings: what it is like.
      base: name or path of the base model, for PEFT.

    Returns:
      The directory.

    Raises:
      ValueError: DoRA of a part only of such a tensor.
    """
    import jax
    from safetensors import numpy as safetensors

    where = pathlib.Path(directory)
    rows = _linear(spec)
    groups: dict[str, list[tuple[names.Tensor, dict[str, np.ndarray]]]] = {}
    for path, node in lora.walk(adapter):
        leaves = {name: tensors.fetch(leaf) for name, leaf in node.items()}
        groups.setdefault(rows[path].hf, []).append((rows[path], leaves))
    out: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for name, members in groups.items():
        parts = _fuse(members, spec, settings) if members[0][0].total else members[0][1]
        rank = parts["lora_a"].shape[-1]
        module = name.removesuffix(".weight")
        if rank != settings.rank:
            grown = rank / settings.rank
            ranks[module.split(".")[-1]] = rank
            alphas[module.split(".")[-1]] = settings.alpha * (
                math.sqrt(grown) if settings.rank_stabilised else grown
            )
        for layer in range(spec.layers):
            at = _PREFIX + module.format(layer)
            out[f"{at}.lora_A.weight"] = np.ascontiguousarray(parts["lora_a"][layer].T)
            out[f"{at}.lora_B.weight"] = np.ascontiguousarray(parts["lora_b"][layer].T)
            if settings.dora:
                out[f"{at}.lora_magnitude_vector"] = np.ascontiguousarray(parts["lora_norm"][layer])
    if jax.process_index() != 0:
        return where
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha if settings.alpha % 1 else int(settings.alpha),
        "target_modules": sorted({name.split(".")[-2] for name in groups}),
        "use_rslora": settings.rank_stabilised,
        "use_dora": settings.dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    where.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(out, where / WEIGHTS, metadata={"format": "pt"})
    (where / WEIGHTS).chmod(0o644)
    (where / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return where


def _fuse(
    members: list[tuple[names.Tensor, dict[str, np.ndarray]]],
    spec: spec_lib.ModelSpec,
    settings: lora.Lora,
) -> dict[str, np.ndarray]:
    """One adapter for several maps of the same input: their inputs side by side, outputs apart."""
    total = members[0][0].total
    if settings.dora and sum(node["lora_norm"].shape[1] for _, node in members) != total:
        raise ValueError(
            f"{members[0][0].hf}: DoRA of some of the maps that this tensor holds cannot be "
            f"written for PEFT. Target all of them, or export the merged model."
        )
    rank = settings.rank * len(members)
    a = np.concatenate([node["lora_a"] for _, node in members], axis=-1)
    b = np.zeros((spec.layers, rank, total), np.float32)
    norm = np.zeros((spec.layers, total), np.float32)
    for i, (row, node) in enumerate(members):
        columns = slice(row.start, row.start + node["lora_b"].shape[2])
        b[:, i * settings.rank : (i + 1) * settings.rank, columns] = node["lora_b"]
        if settings.dora:
            norm[:, columns] = node["lora_norm"]
    return {"lora_a": a, "lora_b": b, "lora_norm": norm}
