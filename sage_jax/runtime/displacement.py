"""The displacement guard: watches whether training unlearns the chosen answers, and says so once.

DPO rewards the gap between two answers, so both may become less likely at once (likelihood
displacement: Razin et al. 2024, arXiv 2410.08847; Pal et al. 2024, arXiv 2402.13228). The guard
keeps a running mean of what the chosen answers lost against the reference, in nats a token, and
switches an added NLL term on when that passes a limit and off below half of it.

All of it is a function of the rows of a run and sits in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sage_jax import config

DECAY = 0.9  # of the running means, a step: about the last ten steps count
_FIRST = 5  # steps before which a mean says nothing
_LAG = 2  # steps between what is seen and what it switches: results come one step late


class Guard(NamedTuple):
    """What the guard remembers; JSON types only."""

    steps: int = 0
    chosen: float = 0.0  # decayed sums over steps, of changes in nats a token
    rejected: float = 0.0
    weight: float = 0.0  # the decayed count of steps
    on: bool = False  # the NLL term, from step `since`
    was_on: bool = False  # before it
    since: int = 0
    causes: tuple[str, ...] = ()  # what has been said
    warnings: tuple[str, ...] = ()

    @property
    def chosen_mean(self) -> float:
        """Running mean of what the chosen answers gained against the reference, nats a token."""
        return self.chosen / self.weight if self.weight else 0.0

    @property
    def rejected_mean(self) -> float:
        """The same for the rejected answers."""
        return self.rejected / self.weight if self.weight else 0.0

    def nll_on(self, step: int) -> bool:
        """Whether a step has the NLL term; the same whether or not later steps were seen."""
        return self.on if step >= self.since else self.was_on


def restore(values: Mapping[str, Any]) -> Guard:
    """The guard of a checkpoint's JSON.

    >>> restore(Guard(causes=("chosen",))._asdict() | {"causes": ["chosen"]}).causes
    ('chosen',)
    """
    lists = {key: tuple(values[key]) for key in ("causes", "warnings")}
    return Guard(**{**values, **lists})


def watch(guard: Guard, step: int, row: Mapping[str, float], run: config.Run) -> Guard:
    """Takes in the metrics of one step.

    Args:
        guard: what is known of the steps before.
        step: the number of this one.
        row: with `displacement/chosen` and `displacement/rejected`.
        run: the settings; `loss.displacement_limit` and `loss.nll_auto` count.

    Returns:
        The new guard. Its `warnings` are longer when there is something new to say.

    >>> run, guard = config.Run(), Guard()
    >>> for step in range(8):
    ...     row = {"displacement/chosen": -0.1 * step, "displacement/rejected": -0.3 * step}
    ...     guard = watch(guard, step, row, run)
    >>> len(guard.warnings), guard.warnings[0][:62]
    (1, 'Step 4: the chosen answers have become less likely than under ')
    """
    guard = guard._replace(
        steps=guard.steps + 1,
        chosen=DECAY * guard.chosen + row["displacement/chosen"],
        rejected=DECAY * guard.rejected + row["displacement/rejected"],
        weight=DECAY * guard.weight + 1.0,
    )
    limit = run.loss.displacement_limit
    if not limit or guard.steps < _FIRST:
        return guard
    lost = -guard.chosen_mean
    if lost > limit:
        guard = _say(guard, "chosen", _chosen_text(guard, step, run))
    if run.loss.nll_auto:
        now = lost > (limit / 2 if guard.on else limit)
        if now != guard.on:
            guard = guard._replace(on=now, was_on=guard.on, since=step + _LAG)
    return guard


def watch_evaluation(guard: Guard, step: int, row: Mapping[str, float], run: config.Run) -> Guard:
    """Takes in an evaluation, whose `eval_kl_per_token` is held against `eval.kl_limit`."""
    far = row["eval_kl_per_token"] if "eval_kl_per_token" in row else 0.0
    if not run.eval.kl_limit or far <= run.eval.kl_limit:
        return guard
    text = (
        f"Step {step}: what the model writes has moved {far:.2f} nats a token "
        f"({row['eval_kl']:.1f} an answer) away from the reference, more than config.eval.kl_limit="
        f"{run.eval.kl_limit:g}. Look at its answers for repetition and lost skills; lower "
        f"config.optim.lr={run.optim.lr:g}, raise config.loss.beta={run.loss.beta:g}, or train "
        f"fewer steps."
    )
    return _say(guard, "kl", text)


def _say(guard: Guard, cause: str, text: str) -> Guard:
    if cause in guard.causes:
        return guard
    return guard._replace(causes=(*guard.causes, cause), warnings=(*guard.warnings, text))


def _chosen_text(guard: Guard, step: int, run: config.Run) -> str:
    lost, other = -guard.chosen_mean, -guard.rejected_mean
    text = (
        f"Step {step}: the chosen answers have become less likely than under the reference by "
        f"{lost:.3f} nats a token (mean of the last steps; the rejected ones by {other:.3f}), more "
        f"than config.loss.displacement_limit={run.loss.displacement_limit:g}"
    )
    if other > lost:
        text += ", while their margin grows: the model unlearns both answers. "
    else:
        text += ", and more so than the rejected ones: the run diverges. "
    loss, lower = run.loss, f"lower config.optim.lr={run.optim.lr:g}."
    if loss.nll_auto:
        return f"{text}From step {step + _LAG} on config.loss.nll_auto={loss.nll_auto:g} holds it."
    if loss.nll_weight:
        return f"{text}Raise config.loss.nll_weight={loss.nll_weight:g} or {lower}"
    return f"{text}Set config.loss.nll_weight=0.5 (or config.loss.nll_auto=0.5) or {lower}"
