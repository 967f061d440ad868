"""Every setting, with its default and meaning; and the checks that a run makes before it starts.

The dataclasses below are the only place where a setting is declared. `default()` turns them into
the `ConfigDict` that config files change and the command line overrides; `resolve()` turns that
back into a frozen, checked `Run`. Nothing below the launcher sees a `ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from sage_jax import losses, noise, rules, scores


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
    # Computes the prompt of a pair once for both answers: on, off or auto (where it saves tokens).
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
    # longest unseen pairs first; 0 = remembered margins alone, 1 = the whole pool afresh; -1 = 3/16
    # for a rule that reads scores, 0 for others
    # Of the matmuls of that pass: bfloat16, "" = model.dtype, or int8 for those inside the layers
    scoring_dtype: str = ""  # (weights by column, inputs by token; needs the extra qlora)
    scoring_tokens: int = 0  # completion tokens of each side that it reads; 0 = all
    margin: str = "likelihood"  # "likelihood": policy alone; "reward": against the reference
    kappa: float = -1.0  # standard errors added to the margin; -1 = 2 with a pass_rate, 0 without
    damping: float = 0.1  # delta in signal^2 / (curvature + delta)
    temperature: float = 1.0  # scale of the likelihood margin
    length_normalised: bool = False  # likelihood margin from means over tokens
    # Sources of the error, whose variances add up: token_error, logit_norm, rounds, joined by "+";
    stability: str = "token_error"  # or none
    # Pairs left out once training began: off, quantile (the lowest quarter of reward margins),
    # suspects (labels that look flipped, see noise.py), auto (these, if there are enough of them).
    guard: str = ""  # "" = auto with a selection, off with "uniform"
    soft: float = 0.0  # exponent of in-step weights ~ score^soft; 0 = off


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


# A resumed run may change these; everything else would make it another run. What `sample.` says is
# part of the run where rounds.resample is set.
RESUMABLE = (
    "checkpoint.",
    "mesh.",
    "train.compile_cache",
    "reference.store",
    "reference.spot_check",
    "data.cache",
    "compare.",
    "eval.batch",
    "sample.",
    "export.",
)

# What -1 stands for, with the tables behind it in benchmarks/results/selection.
POOL_BATCHES = 16  # curriculum.pool_size, for a rule that reads scores
REFRESH = 3 / 16  # selection.refresh, for such a rule: three of these batches
ON_POLICY = {"kappa": 2.0, "keep": 0.33, "uniform_share": 0.0}  # selection.*, with a pass_rate
OTHERS = {"kappa": 0.0, "keep": 0.75, "uniform_share": 0.5}  # and without

_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "dense", "blocks", "triton", "tokamax", "splash"),
    "export.dtype": ("float32", "bfloat16", "float16"),
    "data.on_bad_row": ("error", "skip"),
    "data.share_prompts": ("auto", "on", "off"),
    "loss.name": tuple(losses.LOSSES),
    "selection.scoring_dtype": ("", "bfloat16", "int8"),
    "selection.margin": ("likelihood", "reward"),
    "selection.guard": ("", *noise.GUARDS),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.name": ("adamw", "adafactor"),
    "optim.moments_dtype": ("float32", "bfloat16"),
    "eval.split": ("train", "eval", "test"),
    "rounds.replace": ("none", "oldest", "all"),
    "lora.base": ("float32", "bfloat16", "int8", "nf4"),
    "eval.verify": ("auto", "exact", "number", "math"),
}
_POSITIVE = (
    "model.layers model.d_model model.d_ff model.heads model.kv_heads data.max_length task.count "
    "loss.beta selection.damping selection.temperature curriculum.strata optim.lr train.steps "
    "train.batch_pairs train.accumulate eval.count eval.max_new_tokens eval.batch sample.count "
    "sample.per_problem sample.pairs_per_problem checkpoint.every checkpoint.keep"
).split()
_NOT_NEGATIVE = (
    "seed eval.seed data.limit loss.gamma loss.nll_weight loss.displacement_limit loss.nll_auto "
    "eval.kl_prompts eval.kl_limit selection.soft curriculum.pool_size "
    "selection.scoring_tokens optim.eps optim.weight_decay optim.clip_norm eval.every "
    "curriculum.sharpness reference.spot_check sample.temperature rounds.resample"
).split()
_SHARES = (  # key, lowest, whether the lowest is allowed, whether 1 is
    ("task.faulty_share", 0.0, True, True),
    ("loss.label_smoothing", 0.0, True, False),
    ("selection.refresh", 0.0, True, True),
    ("curriculum.floor", 0.0, True, True),
    ("curriculum.decay", 0.0, True, False),
    ("optim.warmup", 0.0, True, True),
    ("optim.min_lr_ratio", 0.0, True, True),
    ("optim.b1", 0.0, True, False),
    ("optim.b2", 0.0, True, False),
    ("sample.top_p", 0.0, False, True),
)


SAMPLED_COLUMNS = ("level", "pass_rate")  # numbers that sampled pairs carry


def default() -> config_dict.ConfigDict:
    """Every key with its default value; config files start from here.

    >>> default().loss.beta
    0.1
    """
    return config_dict.ConfigDict(dataclasses.asdict(Run()))


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


def nearest(key: str, keys: Iterable[str]) -> str:
    """A hint that names the valid key most like a mistyped one."""
    keys = list(keys)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    by_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return (by_leaf or close or [""])[0]


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


def _typed(key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        article = "an" if kind is int else "a"
        raise ValueError(f"config.{key}={value!r} is not {article} {kind.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config.{key}={value} is not a finite number.")
    return value


def _section(cls: type, config: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in config.items():
        if key not in hints:
            raise ValueError(f"config.{prefix}{key} is not a setting of sage_jax.")
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = (
            _section(hints[key], value, f"{key}.")
            if nested
            else _typed(f"{prefix}{key}", value, hints[key])
        )
    return cls(**values)


def _in_range(value: float, lowest: float, low_ok: bool, one_ok: bool) -> bool:
    return (value > lowest or (low_ok and value == lowest)) and (
        value < 1 or (one_ok and value == 1)
    )


def resolve(config: Any) -> Run:
    """Checks a config and freezes it.

    Args:
        config: a ConfigDict or nested dict with the keys of `default()`; missing keys keep their
            default.

    Returns:
        The checked run.

    Raises:
        ValueError: with the key, its value, the rule and the fix.

    >>> resolve({"loss": {"beta": 0.5}}).loss.beta
    0.5
    """
    unknown = set(flatten(config)) - set(flatten(default()))
    for key in sorted(unknown):
        hint = nearest(key, flatten(default()))
        raise ValueError(f"config.{key} is not a setting. The nearest is config.{hint}.")
    run = _settle(_section(Run, config, ""))
    flat = flatten(as_dict(run))
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            hint = difflib.get_close_matches(str(flat[key]), choices, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"config.{key}={flat[key]!r} is not one of {', '.join(choices)}. "
                f"Did you mean {hint!r}?"
            )
    for keys, low in ((_POSITIVE, "above 0"), (_NOT_NEGATIVE, "0 or more")):
        for key in keys:
            if not (flat[key] > 0 or (flat[key] == 0 and keys is _NOT_NEGATIVE)):
                raise ValueError(f"config.{key}={flat[key]} has to be {low}.")
    for key, lowest, low_ok, one_ok in _SHARES:
        value = flat[key]
        if not _in_range(value, lowest, low_ok, one_ok):
            raise ValueError(
                f"config.{key}={value} has to be in {'[' if low_ok else '('}{lowest:g}, "
                f"1{']' if one_ok else ')'}."
            )
    _check_together(run)
    return run


def _settle(run: Run) -> Run:
    """Settings that follow the selection, where -1 or "" leaves them to it."""
    plain, scored = run.selection.name == "uniform", needs_scores(run)
    changes: dict[str, Any] = {}
    if run.curriculum.sharpness == -1:
        changes["curriculum.sharpness"] = 0.0 if plain else 1.0
    if run.curriculum.pool_size == -1:
        changes["curriculum.pool_size"] = POOL_BATCHES * run.train.batch_pairs if scored else 0
    if run.selection.refresh == -1:
        changes["selection.refresh"] = REFRESH if scored else 0.0
    if not run.selection.guard:  # plain DPO trains on everything, unless told otherwise
        changes["selection.guard"] = "off" if plain else "auto"
    if plain:  # a config that compares a selection with plain DPO turns into it by one setting
        changes["compare.uniform"] = False
    return replace(run, **changes)


def _check_lora(run: Run) -> None:
    own, plain = dataclasses.asdict(run.lora), dataclasses.asdict(Lora())
    adapted = run.lora.rank or run.lora.path
    if run.lora.base != Lora.base and not adapted:
        raise ValueError(
            f"config.lora.base={run.lora.base!r} is about frozen weights, and without adapters all "
            f"are trained. Set config.lora.rank, to 16 say, or leave it at {Lora.base!r}."
        )
    if run.lora.base == "nf4" and run.selection.scoring_dtype == "int8":
        raise ValueError(
            "config.selection.scoring_dtype='int8' would round the weights of config.lora.base="
            "'nf4' once more. Use lora.base='int8', or another scoring_dtype."
        )
    free = ("path", "base")
    changed = [f"lora.{k}={v!r}" for k, v in own.items() if v != plain[k] and k not in free]
    if run.lora.path and changed:
        raise ValueError(
            f"config.{changed[0]} is set, but the adapter of config.lora.path={run.lora.path!r} "
            f"says what it is like. Leave the other settings of lora out."
        )
    if changed and not run.lora.rank:
        raise ValueError(f"config.{changed[0]} needs adapters: set config.lora.rank, to 16 say.")
    if adapted and run.model.path == "new":
        raise ValueError(
            "config.lora adapts trained weights, and config.model.path='new' has none. Give a "
            "model, or set config.lora.rank=0."
        )
    if run.model.router_aux != -1 and run.model.router_aux < 0:
        raise ValueError(
            f"config.model.router_aux={run.model.router_aux} has to be 0 or more, or -1 for what "
            f"the model's config.json says."
        )


def _check_together(run: Run) -> None:
    """Rules that join several keys. A setting that cannot apply is an error, never ignored."""
    chosen = run.selection
    _check_rule(run)
    _check_resampling(run)
    _check_scoring(run)
    _check_guard(run)
    _check_lora(run)
    for axis, size in dataclasses.asdict(run.mesh).items():
        if size == 0 or size < -1:
            raise ValueError(f"config.mesh.{axis}={size} has to be above 0, or -1 for the rest.")
    if run.model.d_model % run.model.heads or run.model.heads % run.model.kv_heads:
        raise ValueError(
            f"config.model.heads={run.model.heads} has to divide model.d_model={run.model.d_model} "
            f"and be a multiple of model.kv_heads={run.model.kv_heads}."
        )
    pool = run.curriculum.pool_size
    if pool and pool * kept_share(run) < run.train.batch_pairs:
        raise ValueError(
            f"config.selection.keep={kept_share(run)} keeps {pool * kept_share(run):.1f} pairs of "
            f"a pool of {pool}, fewer than one batch of {run.train.batch_pairs}. Raise "
            f"selection.keep to {min(1.0, run.train.batch_pairs / pool):.2f} or "
            f"curriculum.pool_size to {-int(-run.train.batch_pairs // kept_share(run))}."
        )
    for key in ("b2", "eps") if run.optim.name == "adafactor" else ():
        if getattr(run.optim, key) != getattr(Optim, key):
            raise ValueError(
                f"config.optim.{key}={getattr(run.optim, key)} does nothing for optim.name="
                f"'adafactor'. Use 'adamw', or leave it at {getattr(Optim, key)}."
            )
    if run.loss.label_smoothing and run.loss.name not in ("sigmoid", "robust"):
        raise ValueError(
            f"config.loss.label_smoothing={run.loss.label_smoothing} does nothing for "
            f"loss.name={run.loss.name!r}. Use sigmoid or robust, or set it to 0."
        )
    if run.loss.gamma != Loss.gamma and run.loss.name != "simpo":
        raise ValueError(
            f"config.loss.gamma={run.loss.gamma} does nothing for loss.name={run.loss.name!r}. Use "
            f"simpo, or leave it at {Loss.gamma}."
        )
    if chosen.soft and chosen.name == "uniform":
        raise ValueError(
            f"config.selection.soft={chosen.soft} weighs pairs by score, which selection.name="
            f"'uniform' does not compute. Set selection.soft=0 or another selection.name."
        )
    if chosen.soft and run.train.accumulate > 1:
        raise ValueError(
            f"config.selection.soft={chosen.soft} weighs the pairs of a step among each other, and "
            f"train.accumulate={run.train.accumulate} cuts it into parts that depend on the "
            f"devices. Set train.accumulate=1, or selection.soft=0."
        )
    if run.loss.name == "sft" and chosen.name != "uniform":
        raise ValueError(
            f"config.selection.name={chosen.name!r} needs pairs, and loss.name='sft' trains on "
            f"single answers. Set selection.name='uniform'."
        )
    if run.loss.name == "sft" and chosen.guard not in ("", "off"):
        raise ValueError(
            f"config.selection.guard={chosen.guard!r} compares two answers, and loss.name='sft' "
            f"trains on single ones. Set it to 'off'."
        )


def _check_guard(run: Run) -> None:
    """The displacement guard, the divergence and the twins."""
    loss, name = run.loss, run.selection.name
    if loss.nll_auto and not loss.displacement_limit:
        raise ValueError(
            f"config.loss.nll_auto={loss.nll_auto} is switched on by loss.displacement_limit, "
            f"which is 0. Set the limit to 0.1, or nll_auto to 0."
        )
    if 0 < loss.nll_auto <= loss.nll_weight:
        raise ValueError(
            f"config.loss.nll_auto={loss.nll_auto} replaces loss.nll_weight={loss.nll_weight} "
            f"when chosen answers fall, so it has to be larger. Raise it, or set it to 0."
        )
    if loss.nll_auto and loss.name == "sft":
        raise ValueError(
            f"config.loss.nll_auto={loss.nll_auto} does nothing for loss.name='sft', which has no "
            f"reference. Set it to 0."
        )
    if run.eval.kl_limit != Eval.kl_limit and run.eval.kl_limit and not run.eval.kl_prompts:
        raise ValueError(
            f"config.eval.kl_limit={run.eval.kl_limit} is held against eval_kl_per_token, which "
            f"eval.kl_prompts=0 leaves out. Set kl_prompts to 32, or kl_limit to 0."
        )
    if run.compare.random and name == "random":
        raise ValueError(
            "config.compare.random=True compares selection.name='random' with itself. Set "
            "compare.random to False."
        )


def _check_rule(run: Run) -> None:
    """The selection rule exists, reads the column that is set, and fits the loss."""
    chosen = run.selection
    rule = rules.resolve(chosen.name)  # raises with the valid names
    if chosen.column and rule.column == "unused":
        readers = ", ".join(name for name, r in rules.RULES.items() if r.column != "unused")
        raise ValueError(
            f"config.selection.column={chosen.column!r} does nothing for selection.name="
            f"{chosen.name!r}. Set it to '', or use a rule that reads it: {readers}."
        )
    if not chosen.column and rule.column == "required":
        raise ValueError(
            f"config.selection.column='' names no data column, and selection.name={chosen.name!r} "
            f"reads one. Set it to a numeric column of the data, or use another rule."
        )
    if rule.beta_alpha is not None and run.loss.name not in losses.BETA_SCALES_REWARDS:
        raise ValueError(
            f"config.selection.name={chosen.name!r} changes beta from batch to batch, and "
            f"loss.name={run.loss.name!r} does not only scale its rewards by it. Use one of "
            f"{', '.join(losses.BETA_SCALES_REWARDS)}, or another rule."
        )
    if rule.beta_alpha is not None and run.train.accumulate > 1:
        raise ValueError(
            f"config.train.accumulate={run.train.accumulate} cuts a batch into parts, and "
            f"selection.name={chosen.name!r} sets beta by the mean margin of the whole batch. Set "
            f"train.accumulate=1, or use another rule."
        )


def _check_scoring(run: Run) -> None:
    """The settings of the scoring pass say something, and what it computes can be compared."""
    chosen = run.selection
    sources = scores.stability_sources(chosen.stability)
    for key, rule, fits in (
        ("kappa", "0 or more", chosen.kappa >= 0),
        ("keep", "in (0, 1]", 0 < chosen.keep <= 1),
        ("uniform_share", "in [0, 1]", 0 <= chosen.uniform_share <= 1),
    ):
        if not fits and getattr(chosen, key) != -1:
            raise ValueError(
                f"config.selection.{key}={getattr(chosen, key)} has to be {rule}, or -1 to follow "
                f"the data."
            )
    if chosen.refresh and not needs_scores(run):
        raise ValueError(
            f"config.selection.refresh={chosen.refresh} scores pairs, which selection.name="
            f"{chosen.name!r} does not read. Set selection.refresh=0, or another selection.name."
        )
    for key in ("scoring_dtype", "scoring_tokens"):
        if getattr(chosen, key) and not chosen.refresh:
            raise ValueError(
                f"config.selection.{key}={getattr(chosen, key)!r} is about the scoring pass, and "
                f"with selection.refresh=0 there is none. Raise selection.refresh, or leave "
                f"selection.{key} at {getattr(Selection, key)!r}."
            )
    if not chosen.scoring_tokens:
        return
    if chosen.refresh < 1:
        raise ValueError(
            f"config.selection.scoring_tokens={chosen.scoring_tokens} gives margins of the first "
            f"tokens, which do not compare with remembered ones of whole completions. Set "
            f"selection.refresh=1, or scoring_tokens=0."
        )
    if scores.ROUNDS in sources:
        raise ValueError(
            f"config.selection.scoring_tokens={chosen.scoring_tokens} gives margins of the first "
            f"tokens, and selection.stability={chosen.stability!r} the error of whole ones. Use "
            f"another selection.stability, or scoring_tokens=0."
        )
    if chosen.margin == "reward" or rules.resolve(chosen.name).needs_reference:
        raise ValueError(
            f"config.selection.scoring_tokens={chosen.scoring_tokens} gives no reward margins, as "
            f"the reference's log-probs are of whole completions, and selection.name="
            f"{chosen.name!r} with selection.margin={chosen.margin!r} ranks by them. Set "
            f"scoring_tokens=0."
        )


def sample_source(run: Run) -> str:
    """Where the problems come from that pairs are sampled for: "task:NAME" or a .jsonl file.

    Raises:
        ValueError: there are none, or answers that are all the same can make no pair.
    """
    settings = run.sample
    source = settings.problems or run.eval.problems
    if not source:
        raise ValueError("config.sample.problems is empty. Give 'task:NAME' or a .jsonl file.")
    if not settings.problems and not source.startswith("task:"):
        raise ValueError(
            "config.sample.problems is empty, and the file config.eval.problems is for evaluation. "
            "Give problems to make training pairs of: 'task:NAME' or another .jsonl file."
        )
    if settings.per_problem < 2 or settings.temperature == 0:
        raise ValueError(
            f"config.sample.per_problem={settings.per_problem}, config.sample.temperature="
            f"{settings.temperature:g}: a pair needs two different answers. Sample at least 2, at "
            f"a temperature above 0."
        )
    return source


def _check_resampling(run: Run) -> None:
    """New pairs can be sampled, and everything that reads the data can read them."""
    every, replace = run.rounds.resample, run.rounds.replace
    if not every:
        if replace != Rounds.replace:
            raise ValueError(
                f"config.rounds.replace={replace!r} does nothing without new pairs. Set "
                f"config.rounds.resample to a number of rounds, or leave it at {Rounds.replace!r}."
            )
        return
    if run.loss.name == "sft":
        raise ValueError(
            f"config.rounds.resample={every} makes pairs, and loss.name='sft' trains on single "
            f"answers. Set it to 0."
        )
    sample_source(run)
    column, hard = run.selection.column, run.curriculum.difficulty
    for key, name, others in (
        ("selection.column", column, ("",)),
        ("curriculum.difficulty", hard, ("auto", "margin")),
    ):
        if name not in (*others, *SAMPLED_COLUMNS):
            raise ValueError(
                f"config.{key}={name!r} is a column that the pairs sampled for config.rounds."
                f"resample={every} do not have; theirs are {', '.join(SAMPLED_COLUMNS)}. Use one "
                f"of these, or {others[-1]!r}."
            )


def needs_scores(run: Run) -> bool:
    """Whether the selection reads scores, so that the pool has to have them.

    >>> needs_scores(resolve({"selection": {"name": "random"}}))
    False
    """
    return rules.resolve(run.selection.name).scores_with(run.selection.column)


def sampled(columns: Mapping[str, Any]) -> bool:
    """Whether pairs were made of the policy's own answers: all carry its `pass_rate`.

    >>> sampled({"pass_rate": [0.5, 0.25]}), sampled({"pass_rate": [0.5, float("nan")]})
    (True, False)
    """
    rate = columns.get("pass_rate")
    return rate is not None and all(math.isfinite(x) for x in rate)


def settle_data(run: Run, columns: Mapping[str, Any]) -> Run:
    """The run with the -1 of `selection.kappa`, `keep`, `uniform_share` replaced, by the data.

    Pairs made of the policy's own answers carry its `pass_rate`. There the tokens' doubt says which
    errors are chance, and some pairs teach much more than others. Where the chosen answers come
    from elsewhere, doubt says less than the margin itself, and every pair teaches something: three
    quarters of a pool, half of them at random, were what lost to plain DPO on no task
    (benchmarks/results/selection/exact_settings.md). That is for `sage`, and for `random` beside
    it; other rules keep what they rank highest of any data.

    Args:
        run: the settings.
        columns: the numeric columns of the data, float [N] each, nan where a row has none.

    >>> settle_data(Run(), {"pass_rate": [0.5, 0.25]}).selection.kappa
    2.0
    >>> settle_data(Run(), {"level": [1.0, 2.0]}).selection.kappa
    0.0
    """
    wanted = dict(ON_POLICY if sampled(columns) else OTHERS)
    if run.selection.name not in ("sage", "random"):  # random: its twin
        wanted |= {k: v for k, v in ON_POLICY.items() if k != "kappa"}
    left = {f"selection.{k}": v for k, v in wanted.items() if getattr(run.selection, k) == -1}
    return replace(run, **left)


def kept_share(run: Run) -> float:
    """The share of a pool that is trained on; `uniform` trains on all of it.

    The smaller of the two that it may become where it still follows the data.
    """
    if run.selection.name == "uniform":
        return 1.0
    return run.selection.keep if run.selection.keep != -1 else ON_POLICY["keep"]


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs differ and which a resumed run may not change."""
    flat_old, flat_new = flatten(old), flatten(new)
    free = tuple(k for k in RESUMABLE if k != "sample." or not flat_new["rounds.resample"])
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key) and not key.startswith(free)
    }


def describe() -> str:
    """Every key with its default and its comment, as `python -m sage_jax.config` prints it."""
    import inspect

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


if __name__ == "__main__":
    print(describe())
