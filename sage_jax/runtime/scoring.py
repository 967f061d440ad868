"""`sage-jax score`: the selection alone, for people who train elsewhere."""

from __future__ import annotations

import datetime
import decimal
import json
import pathlib
from typing import Any

import jax
import numpy as np

from sage_jax import config, curriculum, logprobs, noise, rules, scores, selection, step
from sage_jax.data import encode, records
from sage_jax.generate import pairs as pair_makers
from sage_jax.report import progress, writers
from sage_jax.runtime import dataset, forward, hosts, rounds, setup, sharing, suspicion


def score(run: config.Run, workdir: pathlib.Path) -> int:
    """Scores data.train with the model in one forward pass, and selects.

    Writes `scores.jsonl`, a row for every pair, and `selected.jsonl`, the selected rows as they
    stood in the source.

    Raises:
        ValueError: a rule that ranks nothing, or a result that is already there.
    """
    rule = rules.resolve(run.selection.name)
    if rule.rank is rules.random:
        ranking = ", ".join(name for name, r in rules.RULES.items() if r.rank is not rules.random)
        raise ValueError(
            f"config.selection.name={run.selection.name!r} does not score. Use one of {ranking}."
        )
    if "rounds" in run.selection.stability:
        raise ValueError(
            f"config.selection.stability={run.selection.stability!r} needs margins of several "
            f"rounds of training. Use 'token_error', 'logit_norm' or 'none'."
        )
    guard = run.selection.guard
    if guard in ("quantile", "suspects") and not run.reference.path:
        raise ValueError(
            f"config.selection.guard={guard!r} reads reward margins, which compare with a "
            f"reference. Give config.reference.path, or set it to 'off'."
        )
    if run.selection.margin == "reward" and not run.reference.path:
        raise ValueError(
            "config.selection.margin='reward' compares with a reference. Give "
            "config.reference.path, or use 'likelihood'."
        )
    if rule.needs_reference and config.needs_scores(run) and not run.reference.path:
        raise ValueError(
            f"config.selection.name={run.selection.name!r} reads reward margins, which compare "
            f"with a reference. Give config.reference.path, or use another rule."
        )
    refresh = run.selection.refresh
    if refresh not in (0.0, 1.0, config.REFRESH):  # what stands in a config meant for training
        raise ValueError(
            f"config.selection.refresh={refresh} is about the passes between the rounds of a "
            f"training, and this mode scores every pair once. Leave it at -1."
        )
    for key in ("scoring_dtype", "scoring_tokens"):
        if getattr(run.selection, key) != getattr(config.Selection, key):
            raise ValueError(
                f"config.selection.{key}={getattr(run.selection, key)!r} is about the passes "
                f"between the rounds of a training, and this mode scores every pair once. Leave it "
                f"at {getattr(config.Selection, key)!r}."
            )
    hosts.on_first(lambda: _check_new(workdir))
    mesh = setup.make_mesh(run)
    tokenizer = setup.load_tokenizer(run)
    pairs = dataset.load_pairs(run, tokenizer, run.data.train)
    hosts.on_first(lambda: _check_rows(run))
    if run.selection.margin == "auto":  # the other one says what training has moved
        run = config.replace(run, **{"selection.margin": "likelihood"})
    run = config.settle_data(run, pairs.columns)
    dataset.check_sides(pairs, "data.train")
    rounds.rule_column(run, pairs)
    policy = setup.fitted(setup.load_policy(run, mesh, tokenizer), pairs.lengths_N2)
    dataset.check_ids(pairs, policy)
    other = setup.load_reference(run, policy, mesh)
    passes = forward.Passes(policy, mesh, *sharing.shapes(run, policy.model, mesh, pairs))
    stats = forward.stored_stats(run, policy, passes, pairs, "scoring")
    ref = forward.reference_logps(run, policy, passes, pairs, stats, other)
    loss = setup.make_loss(run)
    score_fn = setup.make_score_fn(run, loss)
    found = jax.device_get(score_fn(stats, ref))

    memory = curriculum.remember(
        curriculum.init_memory(len(pairs)), np.arange(len(pairs)), found, round=0, trained=False
    )
    hard_N = rounds.difficulty(pairs, memory, run.curriculum.difficulty)
    stratum_N = curriculum.stratify(hard_N, run.curriculum.strata)
    rng = np.random.default_rng(np.random.SeedSequence([run.seed, 0, 1]))
    index_N = np.arange(len(pairs))
    # Without a reference nothing has moved against it, and the guard "auto" has nothing to go by.
    flips = moved(run, pairs, memory, score_fn, stats, ref) if run.reference.path else None
    priority_N = rounds.rank(
        index_N, found, memory, None, run=run, loss=loss, pairs=pairs, rng=rng
    ).priority_P
    chosen = selection.select_pool(
        priority_N,
        stratum_N,
        index_N,
        keep=run.selection.keep,
        uniform_share=run.selection.uniform_share,
        rng=rng,
        noisy_P=suspicion.left_out(index_N, memory, guard, flips),
    )
    if hosts.first():
        _write(workdir, run, pairs, stats, found, stratum_N, priority_N, chosen)
    return 0


def moved(
    run: config.Run,
    pairs: encode.EncodedPairs,
    memory: curriculum.Memory,
    score_fn: step.ScoreFn,
    stats: logprobs.SequenceStats,
    ref_logps_N2: np.ndarray,
) -> noise.Flips:
    """Which labels look flipped to a policy that has been trained from the reference.

    Whether its margins can judge labels is read off the reference's, as a training asks its policy
    before the first step.
    """
    start = jax.device_get(score_fn(stats._replace(logps=ref_logps_N2), ref_logps_N2))
    held = noise.at_start(start.likelihood_margin, memory.margin_error)
    return suspicion.detect(memory, run, pairs, held)


def _check_new(workdir: pathlib.Path) -> None:
    for name in ("scores.jsonl", "selected.jsonl", "config.json"):  # the last: of any other run
        if (workdir / name).exists():
            raise ValueError(
                f"{workdir / name} exists. Name another --workdir; nothing was overwritten."
            )


def _raw_rows(run: config.Run) -> list[Any]:
    """The rows of the source as they stand there, without the bad ones: `row_N` counts those."""
    rows = [row for _, row in records.raw(dataset.sources(run, run.data.train))]
    if run.data.on_bad_row == "error":
        return rows  # none is bad

    def usable(row: Any) -> bool:
        try:
            records.read([row], format=run.data.format)
        except ValueError:
            return False
        return True

    return [row for row in rows if usable(row)]


def _text(value: Any) -> str:
    """What JSON has no form for and is plain text elsewhere: dates, times and exact decimals."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise TypeError(f"is a {type(value).__name__}")


def _check_rows(run: config.Run) -> None:
    """Whether JSON holds the rows of the source, which may be Parquet, before they are scored."""
    for origin, row in records.raw(dataset.sources(run, run.data.train)):
        for column, value in row.items() if isinstance(row, dict) else ():
            try:
                json.dumps(value, default=_text)
            except TypeError as e:
                raise ValueError(
                    f"{origin}: column {column!r} {e}, which selected.jsonl cannot hold. Leave the "
                    f"column out of the data; scores.jsonl names each row by file and line."
                ) from e


def _write(workdir, run, pairs: encode.EncodedPairs, stats, found: scores.PairScores, stratum_N,
           priority_N: np.ndarray, chosen: selection.Selection) -> None:  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    raw = _raw_rows(run)
    rows, kept = [], []
    for i, origin in enumerate(pairs.origin):
        row: dict[str, Any] = {
            "origin": origin,
            "stratum": int(stratum_N[i]),
            "selected": bool(chosen.selected_P[i]),
            "why": str(chosen.reason_P[i]),
            "priority": float(priority_N[i]) if np.isfinite(priority_N[i]) else None,
            "chosen_logps": float(stats.logps[i, 0]),
            "rejected_logps": float(stats.logps[i, 1]),
            "chosen_tokens": int(stats.tokens[i, 0]),
            "rejected_tokens": int(stats.tokens[i, 1]),
        }
        rows.append(row | {k: float(v[i]) for k, v in found._asdict().items()})
        if row["selected"]:
            kept.append(raw[pairs.row_N[i]])
    pair_makers.write_jsonl(workdir / "scores.jsonl", rows)
    pair_makers.write_jsonl(workdir / "selected.jsonl", kept, default=_text)
    writers.write_json(workdir / "config.json", {"mode": "score"} | config.as_dict(run))
    found_why = np.where(chosen.selected_P, "selected: ", "left out: ") + chosen.reason_P
    counts = np.unique(found_why, return_counts=True)
    print(progress.table(["why", "pairs"], [[w, str(n)] for w, n in zip(*counts, strict=True)]))
    print(f"\nscores   {workdir / 'scores.jsonl'}\nselected {workdir / 'selected.jsonl'} "
          f"({len(kept)} of {len(rows)} rows, unchanged)")  # fmt: skip
