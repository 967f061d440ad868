"""Every setting, with its default and meaning: the only place where one is declared."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = ""  # Hugging Face directory, .gguf file, "package:NAME", or "new" (from scratch);
    # for sage-jax compile also "spec:NAME", an architecture of models/catalog.py
    tokenizer: str = ""  # tokenizer directory; "" = the one beside the model
    dtype: str = "float32"  # of the matmuls inside the model: float32 or bfloat16
    # What the backward pass recomputes: "none", all but the "dots", "full" (least memory).
    remat: str = "dots"
    layers: int = 4  # the following shape a model from scratch (model.path = "new") only
    d_model: int = 96
    d_ff: int = 256
    heads: int = 4
    kv_heads: int = 2
    # How attention is computed: auto (by platform and length of the rows), dense, blocks, triton
    # (NVIDIA), tokamax (NVIDIA, a package of its own) or splash (TPU).
    attention: str = "auto"
    router_aux: float = 0.0  # weight of the load-balancing loss of a mixture of experts; 0 = off,
    # -1 = what the model's config.json says (router_aux_loss_coef)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: only they are trained, the weights of model.path stay as they are."""

    rank: int = 0  # 0 = no adapters, unless lora.path names some
    alpha: float = 16.0  # adapters count alpha / rank
    targets: str = "attention/[qkvo]|mlp/"  # regular expression, searched in the names of the
    # linear maps of a layer: attention/q, k, v, o and mlp/gate, up, down
    rank_stabilised: bool = False  # alpha / sqrt(rank) instead
    dora: bool = False  # train the lengths of the output columns apart from their directions
    path: str = ""  # start from an adapter of PEFT (a directory), which says all of the above
    # How the frozen weights are held: float32, bfloat16, or (QLoRA; needs the extra qlora) those of
    base: str = "float32"  # the linear maps in the layers in int8 or nf4


@dataclasses.dataclass(frozen=True)
class Data:
    train: str = ""  # preference pairs: .jsonl, .json, .parquet or a directory; several by comma
    eval: str = ""  # held-out preference pairs for eval_loss and eval_rewards/*; "" = none
    format: str = "auto"  # row format; "auto" recognises it row by row
    on_bad_row: str = "error"  # "error" stops at the first bad row, "skip" drops and counts them
    max_length: int = 1024  # tokens of prompt + completion, per side
    packing: bool = True  # several pairs in a row; false = one pair a row
    limit: int = 0  # use the first rows only; 0 = all
    cache: str = ""  # directory of encoded data sets; "" = $SAGE_JAX_CACHE or ~/.cache/sage_jax
    # Computes a prompt once for both answers of a pair ("pair"), and for all pairs of it in a row,
    # each of their answers once ("problem"); "off", or "auto": where it saves tokens.
    share_prompts: str = "auto"


@dataclasses.dataclass(frozen=True)
class Task:
    """Of data.train = "task:NAME", a built-in task's worked solutions for `sage-jax sft`."""

    count: int = 20000  # problems
    teacher: bool = False  # solutions of a teacher with systematic mistakes; false = exact ones
    faulty_share: float = 0.3  # share of the facts that the teacher gets wrong
    fault_odds: str = "1.0,0.5"  # how often, in turn


@dataclasses.dataclass(frozen=True)
class Loss:
    name: str = "sigmoid"  # see losses.LOSSES
    beta: float = 0.1  # scale of the implicit rewards
    label_smoothing: float = 0.0  # probability that a label is flipped (sigmoid, robust)
    gamma: float = 0.5  # target margin (simpo)
    nll_weight: float = 0.0  # weight of the chosen completions' mean negative log-likelihood
    displacement_limit: float = 0.1  # nats a token that chosen answers may lose against the
    # reference (running mean) before a warning; 0 = no guard
    nll_auto: float = 0.0  # nll_weight while more than that limit is lost, until half; 0 = off


@dataclasses.dataclass(frozen=True)
class Selection:
    name: str = "sage"  # see rules.RULES, or "module:function"; "uniform" trains on all drawn
    column: str = ""  # data column that dual_margin, rho, implicit_gap, easy_half read; "" = none
    keep: float = -1.0  # share of the pool that is trained on ("uniform": all of it); -1 = 0.33,
    # but 0.75 where sage meets pairs without the pass_rate that sage-jax sample gives the policy's
    # own answers: those all teach something
    uniform_share: float = -1.0  # share of the kept pairs drawn uniformly, whatever their score;
    # -1 = 0, but 0.5 for sage and pairs without a pass_rate
    refresh: float = -1.0  # share of the pool that a forward pass scores before each round, the
    # longest unseen pairs first; 0 = remembered margins alone, 1 = the whole pool afresh; -1 = 1/8
    # for a rule that reads scores, 0 for others
    # Of the matmuls of that pass: bfloat16, "" = model.dtype, or int8 for those inside the layers
    scoring_dtype: str = ""  # (weights by column, inputs by token; needs the extra qlora)
    scoring_tokens: int = 0  # completion tokens of each side that it reads; 0 = all
    # "likelihood": of the policy alone; "reward": against the reference; "auto": that for sage and
    # pairs whose pass_rate is below 0.3 on average, of a policy that knows little; else likelihood
    margin: str = "auto"
    kappa: float = -1.0  # standard errors added to the margin; -1 = 2 with a pass_rate, 0 without
    damping: float = 0.1  # delta in signal^2 / (curvature + delta)
    temperature: float = 1.0  # scale of the likelihood margin
    length_normalised: bool = False  # likelihood margin from means over tokens
    # Sources of the error, whose variances add up: token_error, logit_norm, rounds, joined by "+";
    stability: str = "token_error"  # or none
    # Pairs left out once training began: off, quantile (the lowest quarter of reward margins),
    # suspects (labels that look flipped, see noise.py), auto (these, if there are enough of them).
    guard: str = ""  # "" = auto with a selection, off with "uniform"
    soft: float = -1.0  # exponent of in-step weights ~ score^soft; 0 = off; -1 = 0.5 for sage and
    # pairs with a pass_rate, in rounds whose labels are known and hardly any looks flipped; else 0


@dataclasses.dataclass(frozen=True)
class Curriculum:
    pool_size: int = -1  # candidates drawn each round; 0 = the whole data set; -1 = 16 batches
    # for a rule that reads scores (short rounds keep them fresh), the whole data set for others
    strata: int = 4  # difficulty strata
    difficulty: str = "auto"  # data column, "margin" (reference), or "auto": the first complete one
    # of difficulty, pass_rate and level, else the margin
    floor: float = 0.5  # share of its natural size that every stratum keeps
    sharpness: float = -1.0  # how fast the mixture leaves mastered strata; 0 = natural shares;
    # -1 = 1 with a selection, 0 with selection.name="uniform", which then is plain DPO
    decay: float = 0.5  # of the running competence, per round


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 5e-7  # peak learning rate
    schedule: str = "cosine"  # cosine, linear or constant
    warmup: float = 0.1  # share of the steps
    min_lr_ratio: float = 0.0  # final over peak learning rate
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # not on norms, biases
    clip_norm: float = 1.0  # of the global gradient; 0 = off
    # adamw, or adafactor, which keeps row and column sums of the squares in place of each (b2 and
    name: str = "adamw"  # eps do nothing for it): for a model of 8 bytes a parameter less
    moments_dtype: str = "float32"  # of the mean of gradients: float32 or bfloat16


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 100  # optimizer steps
    batch_pairs: int = 128  # pairs in a step
    accumulate: int = 1  # parts of a step computed one after the other
    # Directory of compiled programs, so that a run that goes on compiles nothing again; "workdir"
    compile_cache: str = "workdir"  # = its own compiled/, "" = as JAX is configured


@dataclasses.dataclass(frozen=True)
class Eval:
    problems: str = ""  # "task:NAME" or a .jsonl of {"prompt", "answer"}; "" = no greedy accuracy
    count: int = 512  # problems
    split: str = "eval"  # of a built-in task: train, eval or test (never used for a decision)
    seed: int = 0  # of a built-in task's problems
    every: int = 0  # steps between evaluations; 0 = only before and after
    verify: str = "auto"  # how answers are checked: exact, number, math, or the task's own (auto)
    max_new_tokens: int = 64
    batch: int = 128  # prompts decoded at a time
    kl_prompts: int = 32  # training prompts answered anew for eval_kl to the reference; 0 = none
    kl_limit: float = 0.5  # eval_kl_per_token, nats, above which there is a warning; 0 = never


@dataclasses.dataclass(frozen=True)
class Sample:
    problems: str = ""  # like eval.problems; "" = the training split of eval.problems
    count: int = 1024  # problems
    per_problem: int = 8  # answers sampled for each
    pairs_per_problem: int = 1  # pairs made of them at the most
    temperature: float = 1.0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Iterated alignment: pairs of the policy in training, by the settings of `sample`."""

    resample: int = 0  # rounds from one sampling of new pairs to the next; 0 = never
    replace: str = "none"  # older pairs that leave for new ones: none, oldest (as many), all


@dataclasses.dataclass(frozen=True)
class Reference:
    path: str = ""  # reference model; "" = the model that training starts from
    store: str = ""  # directory of reference log-probs; "" = $SAGE_JAX_CACHE or ~/.cache/sage_jax
    spot_check: int = 4  # stored pairs recomputed at start


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 100  # steps; one more is written at the end and on SIGTERM
    keep: int = 2  # checkpoints kept
    # Where those of this run lie: a directory that all hosts see, or a URI (gs://bucket/run,
    # s3://bucket/run); "" = WORKDIR/checkpoints
    directory: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices that split the batch; -1 = the rest, here or of one other axis
    fsdp: int = 1  # devices that split batch and parameters
    tensor: int = 1  # devices that split heads and channels
    context: int = 1  # devices that split the tokens of a row, for long ones


@dataclasses.dataclass(frozen=True)
class Export:
    dtype: str = "float32"  # of the exported weights: float32, bfloat16 or float16
    check: bool = True  # read the files again and compare logits; holds the weights twice


@dataclasses.dataclass(frozen=True)
class Compare:
    """Twins, trained afterwards at equal total FLOPs, scoring counted, and reported beside it."""

    uniform: bool = False  # DPO on everything drawn; idle where the run itself is that
    random: bool = False  # the same curriculum and keep share, chosen at random


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked run. One field a section; each section is a frozen dataclass."""

    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    task: Task = Task()
    loss: Loss = Loss()
    selection: Selection = Selection()
    curriculum: Curriculum = Curriculum()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    sample: Sample = Sample()
    rounds: Rounds = Rounds()
    reference: Reference = Reference()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    export: Export = Export()
    lora: Lora = Lora()
    compare: Compare = Compare()


# What -1 stands for, with the tables behind it in benchmarks/results/selection.
POOL_BATCHES = 16  # curriculum.pool_size, for a rule that reads scores
REFRESH = 1 / 8  # selection.refresh, for such a rule: two of these batches
ON_POLICY = {"kappa": 2.0, "keep": 0.33, "uniform_share": 0.0}  # selection.*, with a pass_rate
OTHERS = {"kappa": 0.0, "keep": 0.75, "uniform_share": 0.5}  # and without
SOFT = 0.5  # selection.soft=-1 where it acts
KNOWS_LITTLE = 0.3  # mean pass_rate below which selection.margin="auto" is "reward"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings as a flat dict of dotted keys.

    >>> flatten({"a": {"b": 1}})
    {'a.b': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_dict(run: Run) -> dict[str, Any]:
    """The settings of a run as nested plain dicts, for config.json."""
    return dataclasses.asdict(run)


def replace(run: Run, **changes: Any) -> Run:
    """A run with dotted settings changed: `replace(run, **{"train.steps": 5})`."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            value = dataclasses.replace(getattr(run, section), **{name: value})
        run = dataclasses.replace(run, **{section: value})
    return run


def describe() -> str:
    """Every key with its default and its comment, as `python -m sage_jax.config` prints it."""
    lines = []
    for section in dataclasses.fields(Run):
        value = getattr(Run(), section.name)
        if not dataclasses.is_dataclass(value):
            lines.append(f"config.{section.name} = {value!r}")
            continue
        source = inspect.getsource(type(value)).splitlines()
        for line in source[2:]:
            if '"""' in line or not line.strip():
                continue
            name, _, rest = line.strip().partition(":")
            _, _, comment = rest.partition("  # ")
            if not line.strip().startswith("#") and hasattr(value, name):
                lines.append(f"config.{section.name}.{name} = {getattr(value, name)!r}")
                lines[-1] += f"  # {comment}" if comment else ""
            else:
                lines.append(" " * 8 + line.strip())
    return "\n".join(lines)
