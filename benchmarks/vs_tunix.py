"""How fast is a DPO step beside tunix's?

    python benchmarks/vs_tunix.py --tunix-python=OTHER/bin/python --out=vs_tunix.json

tunix (google-tunix) needs packages of its own, so its process may run in another environment. Both
train all weights with AdamW on the same pairs in the same steps, from random weights of the same
architecture, in float32 on a CPU. tunix runs its reference model in every step, as it has to. It
compiles for every shape of a batch: each is padded to its own longest prompt and answer, rounded
up, and all shapes are compiled before the clock runs. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import race

SIZES = {  # layers, vocabulary, width, MLP, heads, key heads, width of a head, rope, epsilon
    "tiny": (2, 512, 64, 128, 4, 2, 16, 10_000, 1e-6),
    "smollm2_135m": (30, 49152, 576, 1536, 9, 3, 64, 100_000, 1e-5),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    race.arguments(parser)
    parser.add_argument("--model", choices=tuple(SIZES), default="smollm2_135m")
    parser.add_argument("--tunix-python", default=sys.executable)
    parser.add_argument("--grain", type=int, default=64, help="lengths of tunix's batches are"
                        " multiples of this")  # fmt: skip
    parser.add_argument("--remat", action="store_true", help="tunix recomputes its layers")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--apart", action="store_true", help="not in turns")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="")
    return parser.parse_args()


def work_tunix(args: argparse.Namespace) -> None:
    import jax
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft.dpo import dpo_trainer

    layers, vocabulary, width, mlp, heads, groups, head, rope, epsilon = SIZES[args.model]
    remat = llama.RematConfig.DECODER if args.remat else llama.RematConfig.NONE
    config = llama.ModelConfig(
        num_layers=layers, vocab_size=vocabulary, embed_dim=width, hidden_dim=mlp,
        num_heads=heads, head_dim=head, num_kv_heads=groups, rope_theta=rope, norm_eps=epsilon,
        weight_tying=True, remat_config=remat,
    )  # fmt: skip
    policy, reference = (llama.Llama3(config, rngs=nnx.Rngs(0)) for _ in range(2))
    rows = race.rows(args, vocabulary)
    size = args.batch_pairs
    given = [padded(rows[k : k + size], args.grain) for k in range(0, len(rows) - size + 1, size)]
    shapes = {(x["prompt_ids"].shape, x["chosen_ids"].shape): k for k, x in enumerate(given)}
    made = [dpo_trainer.TrainingInput(**x) for x in given]
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param)))

    def batches():
        for k in shapes.values():
            yield made[k]
        jax.block_until_ready(nnx.state(policy))
        race.answer(parameters=parameters, programs=[list(map(list, s)) for s in shapes],
                    padding_fraction=padding(rows, given, size))  # fmt: skip
        at = 0
        for count in race.turns():
            began = time.perf_counter()
            for _ in range(count):
                yield made[at % len(made)]
                at += 1
            jax.block_until_ready(nnx.state(policy))
            race.answer(seconds=time.perf_counter() - began, pairs=count * size)
        race.answer(peak_bytes=race.peak_bytes())

    settings = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**9, max_steps=10**9, max_inflight_computations=1, beta=0.1
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    trainer = dpo_trainer.DPOTrainer(policy, reference, tx, settings)
    trainer.train(batches())


def padded(rows: list[dict[str, list[int]]], grain: int) -> dict[str, np.ndarray]:
    """A batch as tunix wants it: prompts padded on the left, answers on the right."""
    out = {}
    answers = max(max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows)
    for name, most in (("prompt", max(len(r["prompt_ids"]) for r in rows)),
                       ("chosen", answers), ("rejected", answers)):  # fmt: skip
        length = -(-most // grain) * grain
        ids = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            n = len(row[f"{name}_ids"])
            place = slice(length - n, length) if name == "prompt" else slice(0, n)
            ids[i, place], mask[i, place] = row[f"{name}_ids"], True
        out[f"{name}_ids"], out[f"{name}_mask"] = ids, mask
    return out


def padding(rows: list[dict[str, list[int]]], given: list[dict[str, Any]], size: int) -> float:
    room = sum(
        x["prompt_ids"].size * 2 + x["chosen_ids"].size + x["rejected_ids"].size for x in given
    )
    return 1 - sum(race.tokens_of(row) for row in rows[: len(given) * size]) / room


def main() -> None:
    args = parse()
    if args.worker == "tunix":
        work_tunix(args)
        return
    import common
    import vs_trl

    if args.worker:
        vs_trl.work_ours(argparse.Namespace(**vars(args), dtype="float32", kernel="auto", sizes=4))
        return
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="vs_tunix_"))
    rows = race.rows(args, SIZES[args.model][1])
    tokens = sum(race.tokens_of(row) for row in rows) / len(rows)
    known: dict[str, Any] = {}

    def start(worker: str):
        env = dict(os.environ)
        env.setdefault("GLIBC_TUNABLES", common.KEEP_MEMORY)  # for both: it speeds both up
        python = args.tunix_python if worker == "tunix" else sys.executable
        command = [python, __file__, *sys.argv[1:], f"--worker={worker}"]
        return lambda: race.Runner(command, env, scratch / f"{worker}.log")

    def note(name: str, found: dict[str, Any]) -> None:
        known[name] = vs_trl.summary(found, tokens)
        if args.out:
            pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"question": __doc__.split("\n")[0], "settings": vars(args),
                               "machine": common.machine(), "tokens_per_pair": tokens} | known,
                              indent=1)  # fmt: skip
            pathlib.Path(args.out).write_text(text + "\n")

    race.race({name: start(name) for name in ("ours", "tunix")}, steps=args.steps,
              repeats=args.repeats, apart=args.apart, note=note)  # fmt: skip
    ours, theirs = known["ours"], known["tunix"]
    known["pairs_per_second_ours_to_tunix"] = (
        statistics.median(ours["pairs_per_second_of_turns"])
        / statistics.median(theirs["pairs_per_second_of_turns"])
        if args.apart
        else common.median_ratio(
            ours["pairs_per_second_of_turns"], theirs["pairs_per_second_of_turns"]
        )
    )
    known["peak_bytes_ours_to_tunix"] = ours["peak_bytes"] / theirs["peak_bytes"]
    note("ours", known["ours"] | {"turns": []})
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
