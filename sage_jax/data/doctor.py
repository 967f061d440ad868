"""What a data set is like, before any time is spent on training with it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sage_jax.data import encode, records

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


def report(rows: records.Records, encoded: encode.EncodedPairs) -> tuple[dict[str, Any], str]:
    """Counts, lengths and defects of a data set.

    Args:
      rows: what `records.read` returned.
      encoded: what `encode.encode` made of them.

    Returns:
      A JSON-serialisable dict, whose "warnings" say what needs attention, and the same as lines
      for a terminal.
    """
    supervised = int(sum(row.rejected is None for row in rows.rows))
    completion_N2 = np.maximum(encoded.lengths_N2 - encoded.start_N2, 0)
    duplicates = len(encoded) - len(np.unique(encoded.digest_N16, axis=0))
    found: dict[str, Any] = {
        "rows": len(rows),
        "pairs": len(encoded),
        "supervised": supervised,
        "conversational": int(sum(row.conversational for row in rows.rows)),
        "tokens": len(encoded.tokens),
        "skipped": dict(rows.skipped),
        "skipped_examples": list(rows.examples),
        "ignored_columns": dict(rows.ignored_columns),
        "dropped": dict(encoded.dropped),
        "cut": dict(encoded.cut),
        "boundary_merges": encoded.merges,
        "empty_answers": int(sum(_has_empty_answer(row) for row in rows.rows)),
        "duplicates": duplicates,
        **_content_defects(encoded),
        "chosen_longer": _share(completion_N2[:, 0] > completion_N2[:, 1])
        if not supervised
        else None,
        "length_quantiles": {
            "at": list(QUANTILES),
            "prompt": _quantiles(encoded.start_N2[:, 0]),
            "chosen": _quantiles(completion_N2[:, 0]),
            "rejected": _quantiles(completion_N2[:, 1]),
            "pair": _quantiles(encoded.lengths_N2.sum(axis=1)),
        },
        "columns": {name: _summary(column) for name, column in encoded.columns.items()},
    }
    found["warnings"] = _warnings(found)
    return found, _text(found)


def _content_defects(encoded: encode.EncodedPairs) -> dict[str, int]:
    """Pairs whose sides are the same, and pairs that stand there in both orders."""
    identical, prompts = 0, set()
    seen: Counter[tuple[bytes, bytes]] = Counter()
    for i in range(len(encoded)):
        (chosen, start), (rejected, _) = encoded.sequence(i, 0), encoded.sequence(i, 1)
        prompts.add(chosen[:start].tobytes())
        identical += np.array_equal(chosen, rejected)
        seen[chosen.tobytes(), rejected.tobytes()] += 1
    both = sum(n for (a, b), n in seen.items() if a != b and (b, a) in seen)
    return {"distinct_prompts": len(prompts), "identical_sides": identical, "contradictory": both}


def _has_empty_answer(row: records.Record) -> bool:
    def empty(side: Any) -> bool:
        if side is None:
            return False
        if isinstance(side, str):
            return not side.strip()
        return not any(turn.get("tool_calls") or turn.get("content") for turn in side)

    return row.ids is None and (empty(row.chosen) or empty(row.rejected))


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, QUANTILES)]


def _share(values: np.ndarray) -> float:
    return float(np.mean(values))


def _summary(column: np.ndarray) -> dict[str, float]:
    known = column[~np.isnan(column)]
    missing = int(len(column) - len(known))
    if not len(known):
        return {"missing": missing}
    low, mean, high = float(known.min()), float(known.mean()), float(known.max())
    return {"missing": missing, "min": low, "mean": mean, "max": high}


def _warnings(found: dict[str, Any]) -> list[str]:
    pairs = found["pairs"]
    longer = found["chosen_longer"]
    checks = (
        (sum(found["skipped"].values()), "rows were skipped as malformed"),
        (sum(found["dropped"].values()), "pairs were dropped; raise max_length or shorten prompts"),
        (sum(found["cut"].values()), "sequences were cut and lost their end; raise max_length"),
        (found["boundary_merges"], "prompts are no prefix of the whole in tokens"),
        (found["identical_sides"], "pairs have the same tokens on both sides and teach nothing"),
        (found["contradictory"], "pairs stand there in both orders"),
        (found["duplicates"], "pairs repeat an earlier one"),
        (found["empty_answers"], "rows have an empty answer"),
    )
    lines = [f"{count} {what}." for count, what in checks if count]
    if longer is not None and not 0.3 <= longer <= 0.7 and pairs >= 50:
        lines.append(
            f"The chosen side is the longer one in {longer:.0%} of pairs: length alone tells the "
            "sides apart; consider a length-normalised loss."
        )
    return lines


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['rows']} rows, {found['pairs']} encoded, {found['tokens']} tokens, "
        f"{found['distinct_prompts']} distinct prompts"
    ]
    lines.append(
        f"{found['conversational']} conversational, {found['supervised']} supervised (no rejected "
        "side)"
    )
    lengths = found["length_quantiles"]
    lines.append("tokens    " + "".join(f"{f'{q:.0%}':>8}" for q in lengths["at"]))
    for name in ("prompt", "chosen", "rejected", "pair"):
        lines.append(f"{name:<10}" + "".join(f"{value:>8.0f}" for value in lengths[name]))
    for name in ("skipped", "dropped", "cut", "ignored_columns"):
        for what, count in sorted(found[name].items()):
            lines.append(f"{name.replace('_', ' ')}: {what} ({count})")
    for name, summary in found["columns"].items():
        values = ", ".join(f"{key} {value:g}" for key, value in summary.items())
        lines.append(f"column {name}: {values}")
    lines += [f"  {example}" for example in found["skipped_examples"]]
    lines += [f"warning: {line}" for line in found["warnings"]] or ["no warnings"]
    return "\n".join(lines)
