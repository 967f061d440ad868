"""PEFT on adapters of ours and of its own making: `python peft_logits.py FOLDER`.

Each folder in FOLDER holds `base`, `ours` (an adapter) and `tokens.npy`. Writes `found.npy`, the
logits with our adapter; `theirs`, an adapter that PEFT makes with the same settings, nothing of it
0; and `theirs.npy`, the logits with that one.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np


def main(folder: str) -> None:
    """Runs all cases."""
    import peft
    import torch
    import transformers

    def load(where: pathlib.Path):  # type: ignore[no-untyped-def]
        return transformers.AutoModelForCausalLM.from_pretrained(
            where, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def logits(model, tokens: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()

    for case in sorted(pathlib.Path(folder).iterdir()):
        tokens = np.load(case / "tokens.npy")
        ours = peft.PeftModel.from_pretrained(load(case / "base"), case / "ours")
        np.save(case / "found.npy", logits(ours, tokens))
        said = json.loads((case / "ours" / "adapter_config.json").read_text())
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=said["r"],
            lora_alpha=said["lora_alpha"],
            target_modules=said["target_modules"],
            use_rslora=said["use_rslora"],
            use_dora=said["use_dora"],
            lora_dropout=0.05,
        )
        torch.manual_seed(0)
        theirs = peft.get_peft_model(load(case / "base"), config).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        theirs.save_pretrained(case / "theirs")
        np.save(case / "theirs.npy", logits(theirs, tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
