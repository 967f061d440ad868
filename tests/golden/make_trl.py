"""Writes trl.json: what TRL's DPOTrainer computes on a tiny model, to compare ours with.

    python tests/golden/make_trl.py            (needs the extra `parity`: torch, trl)

The model's weights and the rows come from seeded numpy, so that both sides build them without the
other's library. torch, transformers and TRL are imported inside the functions that need them: the
tests read `CONFIG`, `RUN`, `weights`, `rows` and `loss_grid` from here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import types
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("trl.json")
PAD, EOS, FIRST = 0, 1, 2  # token ids: padding, end of sequence, the first of the words

CONFIG = {  # of the tiny model, in the words of a Hugging Face config.json
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
RUN = {
    "steps": 5,
    "batch_pairs": 4,
    "beta": 0.5,
    "lr": 3e-3,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,  # large enough that a wrong decay mask shows after five steps
    "clip_norm": 1.0,
}
METRICS = (
    *("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
)
PAIRWISE = (  # losses with a value of their own for each pair; the aot family sorts the batch
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
BATCHWISE = ("aot", "aot_unpaired")
SETTINGS = ({"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.5, "label_smoothing": 0.25})
SIMPO = ({"beta": 2.0, "gamma": 0.5}, {"beta": 10.0, "gamma": 3.0})  # gamma: margin of the rewards


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of the tiny Llama under Hugging Face's names, float32, [out, in].

    Larger than an initialisation would make them, so that attention is far from uniform and the
    five steps meet gradients of different sizes.
    """
    rng = np.random.default_rng(seed)
    d, ff, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    q = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]

    def matrix(out: int, into: int) -> np.ndarray:
        return (rng.standard_normal((out, into)) * into**-0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(d)).astype(np.float32)

    state = {"model.embed_tokens.weight": matrix(vocab, d) * np.float32(d**0.5 * 0.5)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}.items():
            state[f"{at}self_attn.{name}_proj.weight"] = matrix(*shape)
        for name, shape in {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}.items():
            state[f"{at}mlp.{name}_proj.weight"] = matrix(*shape)
        state[f"{at}input_layernorm.weight"] = norm()
        state[f"{at}post_attention_layernorm.weight"] = norm()
    state["model.norm.weight"] = norm()
    state["lm_head.weight"] = matrix(vocab, d)
    return state


def rows(seed: int = 1) -> list[dict[str, list[int]]]:
    """Pre-tokenised pairs of uneven lengths, in the order in which both sides train on them."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(FIRST, CONFIG["vocab_size"], rng.integers(low, high + 1)).tolist()

    return [
        {
            "prompt_ids": words(1, 9),
            "chosen_ids": [*words(1, 14), EOS],
            "rejected_ids": [*words(1, 14), EOS],
        }
        for _ in range(RUN["steps"] * RUN["batch_pairs"])
    ]


def loss_grid() -> dict[str, list]:
    """Log-probabilities of 24 pairs that cross all regions of the losses: nats, [pair][side]."""
    rng = np.random.default_rng(2)
    ref = -rng.uniform(2.0, 60.0, (24, 2))
    ratio = rng.normal(0.0, 1.0, (24, 2)) * np.geomspace(0.01, 80.0, 24)[:, None]
    ratio[0] = 0.0  # policy = reference, where every run starts
    ratio[1] = [5.0, -5.0]  # margin 10: on the hinge's kink at beta 0.1

    def exact(x: np.ndarray) -> list:  # multiples of 2^-10: exact in float32, differences too
        return (np.round(x * 1024) / 1024).tolist()

    return {
        "logps": exact(ref + ratio),
        "ref_logps": exact(ref),
        "tokens": rng.integers(1, 40, (24, 2)).tolist(),
    }


def probe(size: int) -> np.ndarray:
    """A fixed vector: the dot product with it changes when any two entries are swapped."""
    return np.random.default_rng(3).standard_normal(size)


def summary(value: np.ndarray) -> dict[str, Any]:
    """What the golden file keeps of a tensor: norm, dot product with `probe`, a few entries."""
    flat = np.asarray(value, np.float64).ravel()
    some = np.linspace(0, flat.size - 1, 6).astype(int)
    return {
        "norm": float(np.linalg.norm(flat)),
        "probe": float(flat @ probe(flat.size)),
        "entries": flat[some].tolist(),
    }


def _tokenizer():
    """Word i is the token i: TRL tokenises text itself, so the ids have to be written as text."""
    import tokenizers
    import transformers

    vocabulary = {"<pad>": PAD, "</s>": EOS}
    vocabulary |= {f"w{i}": i for i in range(FIRST, CONFIG["vocab_size"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


def _text_rows() -> list[dict[str, str]]:
    def text(ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids if i != EOS)  # TRL appends the EOS

    return [
        {
            "prompt": text(row["prompt_ids"]).strip(),
            "chosen": text(row["chosen_ids"]),
            "rejected": text(row["rejected_ids"]),
        }
        for row in rows()
    ]


def _model():
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    state = {name: torch.from_numpy(value) for name, value in weights().items()}
    model.load_state_dict(state, strict=True)
    return model.float()


def _settings(output_dir: str):
    """RUN in TRL's words, and everything off that would change the numbers."""
    import trl

    return trl.DPOConfig(
        output_dir=output_dir,
        max_steps=RUN["steps"],
        per_device_train_batch_size=RUN["batch_pairs"],
        train_sampling_strategy="sequential",
        beta=RUN["beta"],
        learning_rate=RUN["lr"],
        adam_beta1=RUN["b1"],
        adam_beta2=RUN["b2"],
        adam_epsilon=RUN["eps"],
        weight_decay=RUN["weight_decay"],
        max_grad_norm=RUN["clip_norm"],
        optim="adamw_torch",
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _trainer(output_dir: str):
    """A DPOTrainer in the order of the rows that keeps each step's gradients, before clipping."""
    import datasets
    import trl

    class Recording(trl.DPOTrainer):
        gradients: list[dict[str, np.ndarray]]

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            self.gradients.append({n: p.grad.numpy().copy() for n, p in model.named_parameters()})
            return loss

    trainer = Recording(
        model=_model(),
        ref_model=_model(),
        args=_settings(output_dir),
        train_dataset=datasets.Dataset.from_list(_text_rows()),
        processing_class=_tokenizer(),
    )
    trainer.gradients = []
    return trainer


def _five_steps(trainer) -> dict[str, Any]:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    seen = [{name: row[name] for name in columns} for row in trainer.train_dataset]
    if seen != rows():
        raise RuntimeError("TRL tokenised the rows into other ids than rows() gives.")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    final = {n: p.detach().numpy() for n, p in trainer.model.named_parameters()}
    return {
        "metrics": [{name: entry[name] for name in METRICS} for entry in logged],
        "first_gradient": {n: summary(g) for n, g in trainer.gradients[0].items()},
        "final_weights": {n: summary(w) for n, w in final.items()},
        "weights": {n: summary(w) for n, w in weights().items()},
    }


def _loss_values(trainer, name: str, setting: dict[str, float], pairs: list[int]) -> dict[str, Any]:
    """TRL's own loss code on given log-probabilities, in float64, with its derivatives.

    A stand-in for the model returns the log-probabilities, so the code of `_compute_loss` from the
    log-ratios on is run as it is.
    """
    import torch

    grid = {k: torch.tensor(v, dtype=torch.float64)[pairs] for k, v in loss_grid().items()}
    tokens_B2 = grid["tokens"].long()
    logps_B2 = grid["logps"].requires_grad_()
    length = int(tokens_B2.max())
    # rows of [chosen..., rejected...]; a one-token prompt, so that targets 0..n-1 count
    count = tokens_B2.T.reshape(-1, 1)
    mask = (torch.arange(length) < count).double()
    per_token = logps_B2.T.reshape(-1, 1) / count * mask
    inputs = {
        "input_ids": torch.zeros(len(count), length + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(count), length + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long(),
        "ref_chosen_logps": grid["ref_logps"][:, 0],
        "ref_rejected_logps": grid["ref_logps"][:, 1],
    }
    nothing = torch.zeros_like(mask)
    outputs = types.SimpleNamespace(
        log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    trainer.precompute_ref_logps = True
    trainer.beta, trainer.label_smoothing = setting["beta"], setting["label_smoothing"]
    loss = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    (slope_B2,) = torch.autograd.grad(loss, logps_B2)
    chosen_B, rejected_B = slope_B2.T.tolist()
    return {"value": loss.item(), "chosen": chosen_B, "rejected": rejected_B}


def _losses(trainer) -> list[dict[str, Any]]:
    """One entry a loss type and setting: values and derivatives by the log-probabilities."""
    everyone = list(range(len(loss_grid()["logps"])))
    table = []
    for setting in SETTINGS:
        for name in PAIRWISE:
            each = [_loss_values(trainer, name, setting, [i]) for i in everyone]
            entry = {
                "value": [x["value"] for x in each],
                "chosen": [x["chosen"][0] for x in each],
                "rejected": [x["rejected"][0] for x in each],
            }
            table.append({"name": name, **setting, **entry})
        for name in (*BATCHWISE, "sft"):  # sft: TRL's mean is over the tokens of the whole batch
            whole = _loss_values(trainer, name, setting, everyone)
            table.append({"name": f"{name}/batch", **setting, **whole})
    return table


def _simpo() -> list[dict[str, Any]]:
    """SimPO, which TRL keeps in its CPOTrainer: on mean log-probabilities, without a reference."""
    import torch
    from trl.experimental import cpo

    grid = loss_grid()
    mean_B2 = torch.tensor(grid["logps"], dtype=torch.float64) / torch.tensor(grid["tokens"])
    table = []
    for setting in SIMPO:
        trainer = types.SimpleNamespace(
            alpha=0.0,
            beta=setting["beta"],
            simpo_gamma=setting["gamma"],
            loss_type="simpo",
            label_smoothing=0.0,
            accelerator=types.SimpleNamespace(device="cpu"),
        )
        value_B, *_ = cpo.CPOTrainer.cpo_loss(trainer, mean_B2[:, 0], mean_B2[:, 1])
        table.append({"name": "simpo", **setting, "value": value_B.tolist()})
    return table


def recompute() -> dict[str, Any]:
    """Everything in trl.json, from the libraries installed here."""
    # Set before the first import: nothing is fetched, nothing is reported.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    import transformers
    import trl

    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder)
        run = _five_steps(trainer)
        table = _losses(trainer)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
    return {"versions": versions, **run, "losses": table, "simpo": _simpo()}


def shorten(value: Any) -> Any:
    """Ten significant digits, more than float32 has; keeps the file small."""
    if isinstance(value, dict):
        return {key: shorten(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shorten(entry) for entry in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def to_text(golden: dict[str, Any]) -> str:
    """JSON with one line an entry of each section, so that a diff shows what changed."""
    sections = []
    for name, section in golden.items():
        if isinstance(section, dict):
            lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in section.items()]
            opening, closing = "{", "}"
        else:
            lines = [json.dumps(entry) for entry in section]
            opening, closing = "[", "]"
        body = ",\n  ".join(lines)
        sections.append(f"{json.dumps(name)}: {opening}\n  {body}\n {closing}")
    return "{\n " + ",\n ".join(sections) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=GOLDEN, help="file to write")
    out = parser.parse_args().out
    out.write_text(to_text(shorten(recompute())))
    print(f"wrote {out}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
