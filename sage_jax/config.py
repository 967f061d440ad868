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
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from sage_jax import losses, selection


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = ""  # Hugging Face directory, .gguf file, "package:NAME", or "new" (from scratch)
    tokenizer: str = ""  # tokenizer directory; "" = the one beside the model
    dtype: str = "float32"  # of the matmuls inside the model: float32 or bfloat16
    # What the backward pass recomputes: "none", all but the "dots", "full" (least memory).
    remat: str = "dots"
    layers: int = 4  # the following shape a model from scratch (model.path = "new") only
    d_model: int = 96
    d_ff: int = 256
    heads: int = 4
    kv_heads: int = 2


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


@dataclasses.dataclass(frozen=True)
class Selection:
    name: str = "sage"  # see selection.SELECTORS; "uniform" trains on everything drawn
    keep: float = 0.5  # share of the pool that is trained on; "uniform" takes all of it
    uniform_share: float = 0.5  # share of the kept pairs drawn uniformly, whatever their score
    scoring: str = "memory"  # "memory": margins remembered from training; "fresh": a forward pass
    margin: str = "likelihood"  # "likelihood": policy alone; "reward": against the reference
    kappa: float = 2.0  # standard errors added to the margin; 0 when chosen answers are gold
    damping: float = 0.1  # delta in signal^2 / (curvature + delta)
    temperature: float = 1.0  # scale of the likelihood margin
    length_normalised: bool = False  # likelihood margin from means over tokens
    stability: str = "token_error"  # source of the error: token_error, logit_norm, rounds, none
    noise_quantile: float = 0.0  # share of lowest reward margins left out, once training began
    soft: float = 0.0  # exponent of in-step weights ~ score^soft; 0 = off


@dataclasses.dataclass(frozen=True)
class Curriculum:
    pool_size: int = 0  # candidates drawn each round; 0 = the whole data set
    strata: int = 4  # difficulty strata
    difficulty: str = "auto"  # data column, "margin" (reference's), or "auto" (column if present)
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


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 100  # optimizer steps
    batch_pairs: int = 128  # pairs in a step
    accumulate: int = 1  # parts of a step computed one after the other


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


@dataclasses.dataclass(frozen=True)
class Sample:
    problems: str = ""  # like eval.problems; "" = the training split of eval.problems
    count: int = 1024  # problems
    per_problem: int = 8  # answers sampled for each
    pairs_per_problem: int = 1  # pairs made of them at the most
    temperature: float = 1.0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reference:
    path: str = ""  # reference model; "" = the model that training starts from
    store: str = ""  # directory of reference log-probs; "" = $SAGE_JAX_CACHE or ~/.cache/sage_jax
    spot_check: int = 4  # stored pairs recomputed at start


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 100  # steps; one more is written at the end and on SIGTERM
    keep: int = 2  # checkpoints kept


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices that split the batch; -1 = the rest
    fsdp: int = 1  # devices that split batch and parameters
    tensor: int = 1  # devices that split heads and channels


@dataclasses.dataclass(frozen=True)
class Export:
    dtype: str = "float32"  # of the exported weights: float32 or bfloat16


@dataclasses.dataclass(frozen=True)
class Compare:
    uniform: bool = False  # afterwards, train uniform DPO at equal total FLOPs, scoring counted


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
    reference: Reference = Reference()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    export: Export = Export()
    compare: Compare = Compare()


# A resumed run may change these; everything else would make it another run.
RESUMABLE = (
    "checkpoint.",
    "mesh.",
    "reference.store",
    "reference.spot_check",
    "data.cache",
    "compare.",
    "eval.batch",
    "sample.",
    "export.",
)

_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "export.dtype": ("float32", "bfloat16"),
    "data.on_bad_row": ("error", "skip"),
    "loss.name": tuple(losses.LOSSES),
    "selection.scoring": ("memory", "fresh"),
    "selection.margin": ("likelihood", "reward"),
    "selection.stability": ("token_error", "logit_norm", "rounds", "none"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "eval.split": ("train", "eval", "test"),
    "eval.verify": ("auto", "exact", "number", "math"),
}
_POSITIVE = (
    "model.layers model.d_model model.d_ff model.heads model.kv_heads data.max_length task.count "
    "loss.beta selection.damping selection.temperature curriculum.strata optim.lr train.steps "
    "train.batch_pairs train.accumulate eval.count eval.max_new_tokens eval.batch sample.count "
    "sample.per_problem sample.pairs_per_problem checkpoint.every checkpoint.keep mesh.fsdp "
    "mesh.tensor"
).split()
_NOT_NEGATIVE = (
    "seed eval.seed data.limit loss.gamma loss.nll_weight selection.soft curriculum.pool_size "
    "optim.eps optim.weight_decay optim.clip_norm eval.every "
    "reference.spot_check sample.temperature"
).split()
_SHARES = (  # key, lowest, whether the lowest is allowed, whether 1 is
    ("task.faulty_share", 0.0, True, True),
    ("loss.label_smoothing", 0.0, True, False),
    ("selection.keep", 0.0, False, True),
    ("selection.uniform_share", 0.0, True, True),
    ("selection.noise_quantile", 0.0, True, False),
    ("curriculum.floor", 0.0, True, True),
    ("curriculum.decay", 0.0, True, False),
    ("optim.warmup", 0.0, True, True),
    ("optim.min_lr_ratio", 0.0, True, True),
    ("optim.b1", 0.0, True, False),
    ("optim.b2", 0.0, True, False),
    ("sample.top_p", 0.0, False, True),
)


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
    run = _section(Run, config, "")
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
        if not (
            (value > lowest or (low_ok and value == lowest))
            and (value < 1 or (one_ok and value == 1))
        ):
            raise ValueError(
                f"config.{key}={value} has to be in {'[' if low_ok else '('}{lowest:g}, "
                f"1{']' if one_ok else ')'}."
            )
    _check_together(run)
    if run.curriculum.sharpness == -1:
        sharpness = 0.0 if run.selection.name == "uniform" else 1.0
        run = replace(run, **{"curriculum.sharpness": sharpness})
    return run


def _check_together(run: Run) -> None:
    """Rules that join several keys. A setting that cannot apply is an error, never ignored."""
    chosen = run.selection
    selection.resolve(chosen.name)  # raises with the valid names
    if run.curriculum.sharpness < 0 and run.curriculum.sharpness != -1:
        raise ValueError(
            f"config.curriculum.sharpness={run.curriculum.sharpness} has to be 0 or more, or -1 to "
            f"follow the selection."
        )
    if run.mesh.data == 0 or run.mesh.data < -1:
        raise ValueError(f"config.mesh.data={run.mesh.data} has to be above 0, or -1 for the rest.")
    if run.model.d_model % run.model.heads or run.model.heads % run.model.kv_heads:
        raise ValueError(
            f"config.model.heads={run.model.heads} has to divide model.d_model={run.model.d_model} "
            f"and be a multiple of model.kv_heads={run.model.kv_heads}."
        )
    pool = run.curriculum.pool_size
    if pool and pool * kept_share(run) < run.train.batch_pairs:
        raise ValueError(
            f"config.selection.keep={chosen.keep} keeps {pool * kept_share(run):.1f} pairs of a "
            f"pool of {pool}, fewer than one batch of {run.train.batch_pairs}. Raise "
            f"selection.keep to {min(1.0, run.train.batch_pairs / pool):.2f} or "
            f"curriculum.pool_size to {-int(-run.train.batch_pairs // kept_share(run))}."
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
    if run.loss.name == "sft" and chosen.name != "uniform":
        raise ValueError(
            f"config.selection.name={chosen.name!r} needs pairs, and loss.name='sft' trains on "
            f"single answers. Set selection.name='uniform'."
        )


def needs_scores(run: Run) -> bool:
    """Whether the selection reads scores; one of a user's own always does.

    >>> needs_scores(resolve({"selection": {"name": "random"}}))
    False
    """
    name = run.selection.name
    return name in selection.NEEDS_SCORES or name not in selection.SELECTORS


def kept_share(run: Run) -> float:
    """The share of a pool that is trained on; `uniform` trains on all of it."""
    return 1.0 if run.selection.name == "uniform" else run.selection.keep


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs differ and which a resumed run may not change."""
    flat_old, flat_new = flatten(old), flatten(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key) and not key.startswith(RESUMABLE)
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
