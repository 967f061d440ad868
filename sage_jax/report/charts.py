"""Which metrics of a run are charted, in what order, and what they mean in plain words."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sage_jax.report import plots

Rows = list[dict[str, Any]]

_SMOOTHED = 40  # a curve of more points is drawn with its moving mean
_NOT_CHARTED = r"step|pairs|flops|epoch|num_tokens|eval_accuracy(_low|_high)?"


class Chart(NamedTuple):
    """One chart over the steps: which metrics it shows, and what they mean in plain words."""

    section: str
    title: str
    pattern: str  # regular expression that a metric's whole name matches
    unit: str
    words: str
    percent: bool = False
    each: str = ""  # what a metric whose name ends in a number is one of
    alone: bool = False  # of the main run only, not of its twin
    noisy: bool = True  # long curves get a moving mean


CHARTS = (  # first match wins; what matches none is shown under its own name at the end
    Chart("Training", "Loss", r"loss", "nats a pair",
          "What training minimises. For the sigmoid loss it starts at 0.693, a coin's toss between "
          "the two answers, and falls as the model prefers the chosen ones. Each step sees other "
          "pairs, hence the scatter; the strong line is the moving mean."),
    Chart("Training", "Reward margin", r"rewards/margins", "nats × beta",
          "How much more than the reference the model favours the chosen answer over the rejected "
          "one. Healthy runs rise slowly; a steep rise means that the learning rate is high."),
    Chart("Training", "Rewards", r"rewards/(chosen|rejected)", "nats × beta",
          "The same for either side. Both may fall, as long as the rejected side falls faster; a "
          "chosen side that plunges warns of a model that forgets how to write good answers."),
    Chart("Training", "Pairs ranked rightly", r"rewards/accuracies", "share of the batch",
          "Share of a step's pairs whose chosen answer has the higher reward. It is 0 at step 0 "
          "by definition. Selected pairs are the hard ones, so a selecting run stays lower here "
          "than a uniform one and may still learn more.", True),
    Chart("Training", "Change against the reference", r"displacement/(chosen|rejected)",
          "nats a token",
          "What a token of these answers gained (above 0) or lost (below) against the reference. "
          "DPO only asks for a gap between the two lines: when both fall, the model unlearns the "
          "chosen answers too. This is no KL divergence: the answers are the data's, not the "
          "model's."),
    Chart("Training", "Change of the chosen answers, running mean", r"displacement/chosen_mean",
          "nats a token",
          "What the warning goes by: there is one when the line falls below "
          "-config.loss.displacement_limit.", noisy=False),
    Chart("Training", "Weight of the added NLL term", r"loss/nll_weight", "",
          "0 or config.loss.nll_weight while the chosen answers hold, config.loss.nll_auto while "
          "they do not.", noisy=False),
    Chart("Training", "Log-probabilities a token", r"logps/(chosen|rejected)_per_token",
          "nats a token",
          "How likely the model finds the tokens of the answers; 0 would be certainty. Each step "
          "sees other pairs: the change against the reference is the better guide."),
    Chart("Training", "Log-probabilities", r"logps/(chosen|rejected)", "nats a completion",
          "The same for whole answers."),
    Chart("Training", "Tokens predicted rightly", r"mean_token_accuracy", "share of tokens",
          "Share of the chosen answers' tokens that are the model's first guess.", True),
    Chart("Training", "Entropy", r"entropy", "nats a token",
          "How undecided the model is about the next token. A fall to 0 is a collapse into "
          "repetition."),
    Chart("Training", "Logits", r"logits/(chosen|rejected)", "",
          "Mean output before the softmax; of use only to notice drifts."),
    Chart("Training", "Gradient norm", r"grad_norm", "",
          "Size of the update that a step asks for, before clipping. Spikes point to odd pairs."),
    Chart("Training", "Learning rate", r"learning_rate", "", "The schedule that was set.",
          noisy=False),
    Chart("Distance from the reference", "KL divergence, a token", r"eval_kl_per_token",
          "nats a token",
          "How far what the model writes has moved from the reference, measured on answers that "
          "it wrote itself, at temperature 1, to prompts of the training data. Estimator: arXiv "
          "2504.10637."),
    Chart("Distance from the reference", "KL divergence, an answer", r"eval_kl(_error)?",
          "nats an answer",
          "The same for whole answers, with its standard error over the prompts."),
    Chart("Held-out pairs", "Loss on held-out pairs", r"eval_loss", "nats a pair",
          "The loss on pairs that are never trained on. When it turns up while the training loss "
          "falls, the model is memorising."),
    Chart("Held-out pairs", "Held-out pairs ranked rightly", r"eval_rewards/accuracies", "share",
          "Share of held-out pairs whose chosen answer gained more than the rejected one.", True),
    Chart("Held-out pairs", "Rewards on held-out pairs", r"eval_rewards/.*", "nats × beta",
          "As in training, on pairs that are never trained on."),
    Chart("Held-out pairs", "Accuracy by level", r"eval_accuracy_level_\d+", "share",
          "Share of problems solved, by difficulty: where the gain comes from.", True,
          each="level", alone=True),
    Chart("Selection", "Score: selected against all", r"selection/score_.*", "",
          "Mean score of the pairs that were selected and of all candidates. High scores are "
          "confident, reliable errors, the pairs that have most to teach.", alone=True),
    Chart("Selection", "Margin: selected against all", r"selection/likelihood_margin_.*", "nats",
          "How much likelier the model finds the chosen answer. Below 0 the model is wrong. The "
          "gap between the lines shows how much harder the selected pairs are.", alone=True),
    Chart("Selection", "Uncertainty of the margin", r"selection/margin_error_.*", "nats",
          "Standard error of the margin from its tokens. Selected pairs should not be the "
          "shakiest ones: their errors are meant to be reliable.", alone=True),
    Chart("Selection", "Candidates and selected pairs",
          r"selection/(pool|selected|left_out_as_noise|suspected)", "pairs",
          "How many pairs each round looked at, how many it trained on, and how many it left out "
          "because they look mislabelled; and how many of all pairs do.", alone=True),
    Chart("Curriculum", "Competence by stratum", r"curriculum/competence_\d+", "share",
          "Probability that the model prefers the chosen answer, for each difficulty stratum "
          "(0 is the easiest). A stratum at the top is mastered.", True,
          each="stratum", alone=True),
    Chart("Curriculum", "Share of the draw by stratum", r"curriculum/share_\d+", "share",
          "Where the candidates of a round come from. The mixture moves to strata that are not "
          "mastered yet; each keeps a floor.", True, each="stratum", alone=True),
    Chart("Speed", "Seconds a step", r"perf/step_time", "seconds",
          "Without the first step, which includes compilation."),
    Chart("Speed", "Tokens a second", r"perf/tokens_per_second", "tokens/s",
          "Real tokens, without padding."),
    Chart("Speed", "Shares of the work",
          r"perf/(padding_fraction|scoring(_seconds)?_fraction|data_wait_fraction|mfu)", "share",
          "padding_fraction: share of a batch that is empty; scoring_fraction: share of all "
          "floating-point operations spent on scoring; scoring_seconds_fraction: of the time; "
          "data_wait_fraction: of the training time, waiting for a batch; mfu: share of the "
          "hardware's peak.", True),
    Chart("Spent so far", "Seconds", r"perf/seconds(_\w+)?", "seconds",
          "Cumulative. The line without a part's name is the device's time: sampling, scoring and "
          "training, without evaluation and compilation. drawing is the host's.", noisy=False),
    Chart("Spent so far", "Floating-point operations", r"flops_\w+", "",
          "Cumulative, for each part of the work. The reference pass, which every method needs, "
          "is not among them.", noisy=False),
)  # fmt: skip


def accuracy(runs: dict[str, Rows]) -> str:
    """Held-out accuracy against steps, pairs, FLOPs and seconds, every run in the same charts.

    Args:
        runs: rows of metrics by the name of the run.

    Returns:
        `<figure>` elements, "" if no row has `eval_accuracy`.
    """
    figures = ""
    for key, title, label in (
        ("step", "optimizer steps", "optimizer steps"),
        ("pairs", "pairs trained", "pairs trained"),
        ("flops", "total compute", "floating-point operations, scoring counted"),
        ("perf/seconds", "device time", "seconds of scoring and training"),
    ):
        lines = []
        for name, rows in runs.items():
            seen = [r for r in rows if r.get("eval_accuracy") is not None and key in r]
            low, high = ([r.get(f"eval_accuracy_{end}") for r in seen] for end in ("low", "high"))
            x, y = [r[key] for r in seen], [r["eval_accuracy"] for r in seen]
            lines.append(plots.Series(name, x, y, low, high))
        figures += _figure(
            plots.line_chart(
                lines, title=f"Held-out accuracy against {title}", x_label=label,
                y_label="problems solved", percent=True,
            )
        )  # fmt: skip
    return figures


def sections(runs: dict[str, Rows]) -> dict[str, str]:
    """All other metrics, by section.

    Args:
        runs: rows of metrics by the name of the run, the main one first.

    Returns:
        `<figure>` elements by the title of their section, without empty sections.
    """
    names = dict.fromkeys(key for rows in runs.values() for row in rows for key in row)
    left = [key for key in names if not re.fullmatch(_NOT_CHARTED, key)]
    found: dict[str, str] = {}
    for chart in CHARTS:
        keys = [key for key in left if re.fullmatch(chart.pattern, key)]
        left = [key for key in left if key not in keys]
        found[chart.section] = found.get(chart.section, "") + _figure(
            _curves(runs, keys, chart), chart.words
        )
    other = [Chart("Other metrics", key, key, "", "") for key in left]
    found["Other metrics"] = "".join(_figure(_curves(runs, [c.title], c)) for c in other)
    return {section: figures for section, figures in found.items() if figures}


def _curves(runs: dict[str, Rows], keys: Sequence[str], chart: Chart) -> str:
    shared = _shared(keys) if len(keys) > 1 else None
    shown = dict(list(runs.items())[:1]) if chart.alone else runs
    lines = []
    for number, (run, rows) in enumerate(shown.items()):
        for place, key in enumerate(sorted(keys, key=_natural)):
            seen = [row for row in rows if isinstance(row.get(key), int | float)]
            if chart.section == "Speed":
                seen = seen[1:]
            part = key[shared:].replace("_", " ") if shared is not None else ""
            part = f"{chart.each} {part}" if part.isdigit() else part
            line = plots.Series(
                ", ".join(filter(None, [part, run if len(shown) > 1 or not part else ""])),
                [row["step"] for row in seen],
                [row[key] for row in seen],
                smooth=len(seen) // 12 if chart.noisy and len(seen) > _SMOOTHED else 1,
            )
            if len(keys) > 1:  # one colour a metric; each twin has dashes of its own
                line = line._replace(colour=place, dash=number)
            lines.append(line)
    return plots.line_chart(
        lines, title=chart.title, x_label="optimizer steps", y_label=chart.unit,
        percent=chart.percent,
    )  # fmt: skip


def _shared(keys: Sequence[str]) -> int:
    """How many characters all keys begin with."""
    same = [len(set(letters)) == 1 for letters in zip(*keys, strict=False)]
    return same.index(False) if False in same else len(same)


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts level 2 before level 10."""
    return [(int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", key)]


def _figure(chart: str, words: str = "") -> str:
    caption = f"<figcaption>{html.escape(words)}</figcaption>" if words else ""
    return f"<figure>{chart}{caption}</figure>" if chart else ""
