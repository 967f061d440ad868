"""Settings: declared in `schema`, checked in `checks`, made into a run here.

`default()` turns the dataclasses of `schema` into the `ConfigDict` that config files change and the
command line overrides; `resolve()` turns that back into a frozen, checked `Run`. Nothing below the
launcher sees a `ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from sage_jax.config import checks
from sage_jax.config.checks import SAMPLED_COLUMNS, kept_share, needs_scores, sample_source
from sage_jax.config.schema import (
    KNOWS_LITTLE,
    ON_POLICY,
    OTHERS,
    POOL_BATCHES,
    REFRESH,
    SOFT,
    Lora,
    Run,
    Selection,
    as_dict,
    describe,
    flatten,
    replace,
)

__all__ = [
    "KNOWS_LITTLE",
    "ON_POLICY",
    "OTHERS",
    "POOL_BATCHES",
    "REFRESH",
    "RESUMABLE",
    "SAMPLED_COLUMNS",
    "SOFT",
    "Lora",
    "Run",
    "Selection",
    "as_dict",
    "changed_keys",
    "default",
    "describe",
    "flatten",
    "kept_share",
    "nearest",
    "needs_scores",
    "replace",
    "resolve",
    "sample_source",
    "sampled",
    "settle_data",
]

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


def default() -> config_dict.ConfigDict:
    """Every key with its default value; config files start from here.

    >>> default().loss.beta
    0.1
    """
    return config_dict.ConfigDict(dataclasses.asdict(Run()))


def nearest(key: str, keys: Iterable[str]) -> str:
    """A hint that names the valid key most like a mistyped one."""
    keys = list(keys)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    by_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return (by_leaf or close or [""])[0]


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
    run = _settle(_section(Run, config, ""))
    checks.check(run)
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
    chosen = run.selection
    told = chosen.temperature != 1 or chosen.length_normalised or chosen.scoring_tokens
    compares = run.loss.name not in ("simpo", "sft")  # with a reference
    if chosen.margin == "auto" and (chosen.name != "sage" or told or not compares):
        changes["selection.margin"] = "likelihood"
    if run.selection.soft == -1 and (run.selection.name != "sage" or run.train.accumulate > 1):
        changes["selection.soft"] = 0.0
    if not run.selection.guard:  # plain DPO trains on everything, unless told otherwise
        changes["selection.guard"] = "off" if plain else "auto"
    if plain:  # a config that compares a selection with plain DPO turns into it by one setting
        changes["compare.uniform"] = False
    return replace(run, **changes)


def sampled(columns: Mapping[str, Any]) -> bool:
    """Whether pairs were made of the policy's own answers: all carry its `pass_rate`.

    >>> sampled({"pass_rate": [0.5, 0.25]}), sampled({"pass_rate": [0.5, float("nan")]})
    (True, False)
    """
    rate = columns.get("pass_rate")
    return rate is not None and all(math.isfinite(x) for x in rate)


def settle_data(run: Run, columns: Mapping[str, Any]) -> Run:
    """The run with what the data decide: `selection.kappa`, `keep`, `uniform_share` and `margin`.

    The -1 of `selection.soft` stays where rounds decide: for pairs of the policy's own answers.

    Pairs made of the policy's own answers carry its `pass_rate`. There the tokens' doubt says which
    errors are chance, and some pairs teach much more than others. Where the chosen answers come
    from elsewhere, doubt says less than the margin itself, and every pair teaches something: three
    quarters of a pool, half of them at random, were what lost to plain DPO on no task
    (benchmarks/results/selection/exact_settings.md). That is for `sage`, and for `random` beside
    it; other rules keep what they rank highest of any data.

    A policy that gets less than `KNOWS_LITTLE` of its answers right learns from what it has not
    moved on yet rather than from what it is surest of: there the reward margin ranks
    (benchmarks/results/selection/several_kinds.md).

    Args:
        run: the settings.
        columns: the numeric columns of the data, float [N] each, nan where a row has none.

    >>> settle_data(Run(), {"pass_rate": [0.5, 0.25]}).selection.kappa
    2.0
    >>> settle_data(Run(), {"level": [1.0, 2.0]}).selection.kappa
    0.0
    >>> settle_data(Run(), {"pass_rate": [0.5, 0.25]}).selection.margin
    'likelihood'
    >>> settle_data(Run(), {"pass_rate": [0.25, 0.25]}).selection.margin
    'reward'
    """
    wanted = dict(ON_POLICY if sampled(columns) else OTHERS)
    if run.selection.name not in ("sage", "random"):  # random: its twin
        wanted |= {k: v for k, v in ON_POLICY.items() if k != "kappa"}
    left: dict[str, Any] = {
        f"selection.{k}": v for k, v in wanted.items() if getattr(run.selection, k) == -1
    }
    if run.selection.soft == -1 and not sampled(columns):
        left["selection.soft"] = 0.0
    if run.selection.margin == "auto":
        rate = columns.get("pass_rate", ()) if sampled(columns) else ()
        little = len(rate) > 0 and sum(rate) / len(rate) < KNOWS_LITTLE
        left["selection.margin"] = "reward" if little else "likelihood"
    return replace(run, **left)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs differ and which a resumed run may not change."""
    flat_old, flat_new = flatten(old), flatten(new)
    free = tuple(k for k in RESUMABLE if k != "sample." or not flat_new["rounds.resample"])
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key) and not key.startswith(free)
    }
