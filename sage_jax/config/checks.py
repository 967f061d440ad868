"""The rules that settings have to keep, alone and together, each with its fix.

A setting that cannot apply is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib

from sage_jax import losses, noise, rules, scores
from sage_jax.config.schema import (
    ON_POLICY,
    OTHERS,
    Eval,
    Lora,
    Loss,
    Optim,
    Rounds,
    Run,
    Selection,
    as_dict,
    flatten,
)

SAMPLED_COLUMNS = ("level", "pass_rate")  # numbers that sampled pairs carry
_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "dense", "blocks", "triton", "tokamax", "splash"),
    "export.dtype": ("float32", "bfloat16", "float16"),
    "data.on_bad_row": ("error", "skip"),
    "data.share_prompts": ("auto", "problem", "pair", "off"),
    "loss.name": tuple(losses.LOSSES),
    "selection.scoring_dtype": ("", "bfloat16", "int8"),
    "selection.margin": ("auto", "likelihood", "reward"),
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
    "eval.kl_prompts eval.kl_limit curriculum.pool_size "
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


def check(run: Run) -> None:
    """Raises what is wrong with the settings of a run.

    Raises:
        ValueError: with the key, its value, the rule and the fix.
    """
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


def _in_range(value: float, lowest: float, low_ok: bool, one_ok: bool) -> bool:
    return (value > lowest or (low_ok and value == lowest)) and (
        value < 1 or (one_ok and value == 1)
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
    # Which share these two keep the data says; `dataset.check_pairs` asks again when they are read.
    follows = chosen.keep == -1 and chosen.name in ("sage", "random")
    if pool and pool * (OTHERS["keep"] if follows else kept_share(run)) < run.train.batch_pairs:
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
        ("soft", "0 or more", chosen.soft >= 0),
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


def needs_scores(run: Run) -> bool:
    """Whether the selection reads scores, so that the pool has to have them.

    >>> needs_scores(Run(selection=Selection(name="random")))
    False
    """
    return rules.resolve(run.selection.name).scores_with(run.selection.column)


def kept_share(run: Run) -> float:
    """The share of a pool that is trained on; `uniform` trains on all of it.

    The smaller of the two that it may become where it still follows the data.
    """
    if run.selection.name == "uniform":
        return 1.0
    return run.selection.keep if run.selection.keep != -1 else ON_POLICY["keep"]
