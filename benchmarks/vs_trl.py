"""How fast is a DPO step beside TRL's?

    python benchmarks/vs_trl.py --pairs=32 --batch-pairs=4 --dtype=bfloat16 \\
        --trl=float32:1,bfloat16:1,bfloat16:4                                       # CPU, 135 M
    python benchmarks/vs_trl.py --model=qwen2p5_1p5b --apart --trl=bfloat16:8,autocast:8   # a GPU

Both train all weights with AdamW and gradient clipping on the same pairs in the same steps, from
random weights of the same architecture, with reference log-probabilities computed beforehand.
TRL gets the settings that are fastest on this machine: each of `--trl` (compute dtype and pairs in
a micro-batch; the latter trades padding for size) takes a turn first, and the best goes into the
race. A turn is all pairs once (or `--steps`); the first one, which warms up every length of rows,
is not counted, nor is compilation.
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

import race

CONFIGS: dict[str, tuple[str, dict]] = {  # as Hugging Face calls what models.catalog has
    "tiny": (
        "llama",
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2_135m": (
        "llama",
        {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "rope_theta": 1e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
    "qwen2p5_1p5b": (
        "qwen2",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
            "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
        },
    ),
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    race.arguments(parser)
    parser.add_argument("--model", choices=tuple(CONFIGS), default="smollm2_135m")
    parser.add_argument("--dtype", default="", help="ours; '' = float32 on a CPU, else bfloat16")
    parser.add_argument("--trl", default="float32:1,float32:8,bfloat16:1,bfloat16:8")
    parser.add_argument("--steps", type=int, default=0, help="of a turn; 0: all pairs once")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--apart", action="store_true", help="not in turns: where memory is short")
    parser.add_argument("--checkpointing", action="store_true", help="TRL recomputes activations")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds; what is left is"
                        " not started")  # fmt: skip
    parser.add_argument("--kernel", default="auto", help="our attention back end")
    parser.add_argument("--sizes", type=int, default=4, help="row lengths that ours compiles")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    args.steps = args.steps or args.pairs // args.batch_pairs
    return args


# ------------------------------------------------------------------------------------ trainers


def work_ours(args: argparse.Namespace) -> None:
    import common
    import jax
    import ours

    from sage_jax import models, step

    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if args.model == "tiny":
        spec = models.ModelSpec(vocab=512, d_model=64, d_ff=128, layers=2, heads=4, kv_heads=2)
        model = models.Model(spec, dtype=dtype)
    else:
        model = ours.model_of(args.model, dtype=dtype, kernel=args.kernel)
    rows = race.rows(args, model.spec.vocab)
    mine = ours.make(model, rows, args.batch_pairs, sizes=args.sizes)
    params = jax.jit(model.init)(jax.random.key(0))
    for k, rows in enumerate(mine.batches):
        found = jax.device_get(mine.stats(params, None, rows).logps)
        mine.batches[k] = rows._replace(ref_logps_RS2=found)
    mine.stats.clear_cache()
    state = jax.jit(lambda p: step.init_state(p, mine.optimizer()), donate_argnums=0)(params)
    train = mine.train_step()
    programs = ours.compiled(train, mine, state, None)
    at, first = 0, None
    race.answer(
        dtype=dtype, padding_fraction=mine.padding, programs=sorted(programs),
        machine=common.machine(),  # said by the process that has the device
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    )  # fmt: skip
    for count in race.turns():
        began, pairs = time.perf_counter(), 0
        for _ in range(count):
            rows = mine.batches[at % len(mine.batches)]
            state, output = programs[rows.tokens_RT.shape[1]](state, None, rows)
            pairs += int((rows.pair_RS >= 0).sum())
            at += 1
        loss = float(output.metrics["loss"])  # waits
        first = loss if first is None else first
        race.answer(seconds=time.perf_counter() - began, pairs=pairs, loss=loss)
    race.answer(peak_bytes=race.peak_bytes(), loss_of_first_turn=first)


def work_trl(args: argparse.Namespace) -> None:
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    _, dtype, micro = args.worker.split(":")
    family, sizes = CONFIGS[args.model]
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    datasets.disable_progress_bars()
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # autocast keeps float32
    with torch.device("cuda" if cuda else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=stored, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    rows = race.rows(args, sizes["vocab_size"])

    class Trainer(trl.DPOTrainer):
        """Takes the token ids as they are, in order, and steps when told to."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Turns(transformers.TrainerCallback):
        left, began, order, losses = 0, 0.0, None, []

        def on_step_begin(self, arguments, state, control, **kwargs):
            if self.left:
                return
            self.order = self.order or race.turns()
            self.left = next(self.order, 0)
            if not self.left:
                race.answer(peak_bytes=race.peak_bytes(), loss_of_first_turn=self.losses[0])
                os._exit(0)
            self.count, self.began = self.left, time.perf_counter()

        def on_step_end(self, arguments, state, control, **kwargs):
            self.left -= 1
            if self.left:
                return
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.began
            control.should_log = True
            self.losses.append(None)
            race.answer(seconds=seconds, pairs=self.count * args.batch_pairs)

        def on_log(self, arguments, state, control, logs=None, **kwargs):
            if self.losses and self.losses[-1] is None and "loss" in (logs or {}):
                self.losses[-1] = logs["loss"]

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=int(micro),
            gradient_accumulation_steps=args.batch_pairs // int(micro),
            max_steps=10**6,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            beta=0.1,
            max_length=args.max_length,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=int(micro),
            bf16=dtype in ("bfloat16", "autocast"),
            use_cpu=not cuda,
            gradient_checkpointing=args.checkpointing,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        race.answer(
            dtype=dtype, micro_batch=int(micro), trl=trl.__version__, torch=torch.__version__,
            parameters=sum(p.numel() for p in model.parameters()),
        )  # fmt: skip
        trainer.train()


# -------------------------------------------------------------------------------------- parent


def summary(found: dict[str, Any], tokens_per_pair: float) -> dict[str, Any]:
    """Medians over the turns."""
    rate = [turn["pairs"] / turn["seconds"] for turn in found["turns"]]
    out = {key: value for key, value in found.items() if key != "turns"}
    if rate:
        out["pairs_per_second"] = statistics.median(rate)
        out["pairs_per_second_of_turns"] = rate
        # With the prompt counted on both sides, whoever computes it once.
        out["tokens_per_second"] = statistics.median(rate) * tokens_per_pair
    return out


def main() -> None:
    args = parse()
    if args.worker:
        work_ours(args) if args.worker == "ours" else work_trl(args)
        return
    began = time.perf_counter()
    import common

    scratch = pathlib.Path(tempfile.mkdtemp(prefix="vs_trl_"))
    vocabulary = CONFIGS[args.model][1]["vocab_size"]
    rows = race.rows(args, vocabulary)
    tokens = sum(race.tokens_of(row) for row in rows) / len(rows)
    known: dict[str, Any] = {}

    def start(worker: str):
        env = dict(os.environ, TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
        if worker == "ours":
            env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
            if "GLIBC_TUNABLES" not in env:
                env["GLIBC_TUNABLES"] = common.KEEP_MEMORY
        else:
            env["JAX_PLATFORMS"] = "cpu"
        command = [sys.executable, __file__, *sys.argv[1:], f"--worker={worker}"]
        return lambda: race.Runner(command, env, scratch / f"{worker.replace(':', '_')}.log")

    def write() -> None:
        result = {
            "question": __doc__.split("\n")[0],
            "settings": {k: v for k, v in vars(args).items() if k != "worker"},
            "tokens_per_pair": tokens,
        } | known
        if args.out:
            pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")

    def note(name: str, found: dict[str, Any]) -> None:
        known[name] = summary(found, tokens)
        write()

    def in_time() -> bool:
        return time.perf_counter() - began < args.time_limit

    candidates = [f"trl:{x}" for x in args.trl.split(",") if x]
    if args.apart:  # ours first: what is known of it stands, whatever becomes of the others
        race.race({"ours": start("ours")}, steps=args.steps, repeats=args.repeats, apart=True,
                  note=note)  # fmt: skip
    probes: dict[str, float] = {}
    for name in candidates:
        if not in_time():
            break
        try:
            repeats = args.repeats if args.apart else 1
            found = race.race({name: start(name)}, steps=args.steps, repeats=repeats, apart=True,
                              note=note)  # fmt: skip
            probes[name] = known[name]["pairs_per_second"]
            del found
        except RuntimeError as e:
            known[name] = {"failed": str(e)[-2000:]}
            print(e, file=sys.stderr)
        write()
    known["trl_settings_tried"] = probes
    if not probes:
        write()
        raise SystemExit("No setting of TRL ran.")
    best = max(probes, key=lambda name: probes[name])
    if not args.apart:
        race.race({"ours": start("ours"), best: start(best)}, steps=args.steps,
                  repeats=args.repeats, apart=False, note=note)  # fmt: skip
    ours_, theirs = known["ours"], known[best]
    if args.apart:
        ratio = ours_["pairs_per_second"] / theirs["pairs_per_second"]
    else:
        ratio = common.median_ratio(
            ours_["pairs_per_second_of_turns"], theirs["pairs_per_second_of_turns"]
        )
    known["best_of_trl"] = best
    known["pairs_per_second_ours_to_trl"] = ratio
    known["peak_bytes_ours_to_trl"] = ours_["peak_bytes"] / theirs["peak_bytes"]
    write()
    last = ("best_of_trl", "pairs_per_second_ours_to_trl", "peak_bytes_ours_to_trl")
    print(json.dumps({name: known[name] for name in last}), file=sys.stderr)
    if not args.out:
        print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
