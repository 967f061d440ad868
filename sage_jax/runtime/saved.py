"""What a checkpoint holds of a run besides its train state, and whether it is that of this run."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sage_jax import config, curriculum
from sage_jax.runtime import counters, displacement, resample, rounds


class Saved(NamedTuple):
    """The part of a run that lives on the host."""

    memory: curriculum.Memory
    round: rounds.Round | None  # None before the first one
    round_metrics: dict[str, float]
    counters: counters.Counters
    guard: displacement.Guard
    resampled: Sequence[resample.Entry]
    reference: np.ndarray | None  # [N, 2], log-probs of pairs that were sampled on the way, or None
    content: dict[str, str]  # digests by setting, of what has to be the same when the run goes on


def pack(saved: Saved, run: config.Run) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and JSON.

    Args:
        saved: what is to be kept.
        run: the settings, which are kept with it.
    """
    arrays = {f"memory.{k}": v for k, v in saved.memory._asdict().items()}
    if saved.round is not None:
        fields = saved.round._asdict()
        del fields["number"]  # in the JSON
        rule = fields.pop("rule")
        arrays |= {f"round.{k}": np.asarray(v) for k, v in fields.items()}
        arrays |= {f"rule.{k}": v for k, v in rule.items()}
    if saved.reference is not None:
        arrays["data.reference"] = saved.reference
    return arrays, {
        "config": config.as_dict(run),
        "content": saved.content,
        "counters": dataclasses.asdict(saved.counters),
        "round": -1 if saved.round is None else saved.round.number,
        "round_metrics": saved.round_metrics,
        "guard": saved.guard._asdict(),
        "resampled": [entry._asdict() for entry in saved.resampled],
    }


def unpack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Saved:
    """Undoes `pack`."""
    parts: dict[str, dict[str, Any]] = {"memory": {}, "round": {}, "rule": {}, "data": {}}
    for name, value in arrays.items():
        kind, _, field = name.partition(".")
        parts[kind][field] = value
    round_ = None
    if meta["round"] >= 0:
        round_ = rounds.Round(number=meta["round"], rule=parts["rule"], **parts["round"])
    return Saved(
        curriculum.Memory(**parts["memory"]),
        round_,
        meta["round_metrics"],
        counters.Counters(**meta["counters"]),
        displacement.restore(meta["guard"]),
        [resample.Entry(**entry) for entry in meta["resampled"]],
        parts["data"].get("reference"),
        meta["content"],
    )


def refuse_changes(old: dict[str, Any], new: dict[str, Any], workdir: pathlib.Path) -> None:
    """Raises ValueError when a workdir holds a run of another objective; names the keys.

    Args:
        old: settings as JSON, with the mode where it is known.
        new: likewise, of the command.
        workdir: named in the message.
    """
    if old.get("mode") != new.get("mode"):
        raise ValueError(
            f"{workdir} holds a run of the mode {old.get('mode')!r}, not {new.get('mode')!r}. Use "
            f"another --workdir."
        )
    changed = config.changed_keys(old, new)
    if changed:
        what = ", ".join(f"config.{k} was {a!r}, now {b!r}" for k, (a, b) in changed.items())
        raise ValueError(
            f"{workdir} holds a run with other settings: {what}. Use another --workdir, or the "
            f"settings that it was started with."
        )


def refuse_content(old: dict[str, str], new: dict[str, str], workdir: pathlib.Path) -> None:
    """Raises ValueError when what a setting names has changed since; digests by setting."""
    for what, digest in new.items():
        if old[what] != digest:
            raise ValueError(
                f"{workdir} holds a run of other content: config.{what} has the same name as when "
                f"it started, but not the same content. Use another --workdir."
            )
