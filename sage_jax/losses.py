"""Preference losses, each with its value and its first two derivatives in closed form.

A loss is a function of two *rewards*, one per side of a pair: `beta` times a log-ratio (or a
log-probability) of the chosen and of the rejected completion. What the scores need is how the loss
bends along the *margin* m = chosen - rejected, that is along the path (chosen + t/2, rejected -
t/2). So every loss carries a slope and a curvature along that path:

    slope     = (d/dc - d/dr) loss / 2
    curvature = (d²/dc² - 2 d²/dcdr + d²/dr²) loss / 4

For a loss f(m) of the margin alone they are f'(m) and f''(m).

Values agree with TRL 1.16's `DPOTrainer` (and its `CPOTrainer` for simpo), pair by pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray | float
PairFn = Callable[[Array, Array], jax.Array]

INPUTS = ("log_ratio", "log_ratio_mean", "logp", "logp_mean")
# Losses on which beta acts by scaling the rewards alone, so that scaled rewards are another beta.
BETA_SCALES_REWARDS = ("sigmoid", "robust", "hinge", "apo_zero", "apo_down", "nca_pair")


@dataclasses.dataclass(frozen=True)
class Loss:
    """A preference loss of (chosen reward, rejected reward), elementwise in float32.

    Calling it gives its value; with the second argument left out, the first one is the margin, so
    `jax.grad(losses.sigmoid())` is the derivative by the margin.

    Attributes:
        name: what it is called in configs and metrics.
        beta: factor between log-probabilities (nats) and rewards; positive.
        value: (chosen, rejected) -> loss, any common shape.
        slope: (chosen, rejected) -> derivative along the margin.
        curvature: (chosen, rejected) -> second derivative along the margin.
        input: which log-probabilities become rewards, one of `INPUTS`; see `rewards`.

    >>> round(float(sigmoid()(0.0)), 4), float(sigmoid().slope(0.0, 0.0))
    (0.6931, -0.5)
    """

    name: str
    beta: float
    value: PairFn
    slope: PairFn
    curvature: PairFn
    input: str = "log_ratio"

    def __post_init__(self):
        _check_beta(self.beta)
        if self.input not in INPUTS:
            raise ValueError(
                f"input={self.input!r} of loss {self.name!r} must be one of {', '.join(INPUTS)}."
            )

    @property
    def needs_reference(self) -> bool:
        """Whether rewards compare with a reference model's log-probabilities."""
        return self.input.startswith("log_ratio")

    def __call__(self, chosen: Array, rejected: Array = 0.0) -> jax.Array:
        return self.value(chosen, rejected)


def rewards(
    loss: Loss, logps: Array, ref_logps: Array | None, tokens: Array
) -> tuple[jax.Array, jax.Array]:
    """Rewards of both sides: beta times the log-probabilities that `loss.input` names.

    "log_ratio" takes policy minus reference, summed over completion tokens; "logp" the policy
    alone; the forms with "_mean" divide by the side's number of completion tokens. A side without
    tokens (a supervised example has no rejected side) gets reward exactly 0 and no gradient.

    Args:
        loss: the loss that will consume the rewards.
        logps: float32 [..., 2], policy log-probabilities summed over completion tokens, nats.
        ref_logps: float32 [..., 2], the reference's; None if the loss needs no reference.
        tokens: [..., 2], completion tokens of each side.

    Returns:
        (chosen, rejected), float32 [...] each.

    Raises:
        ValueError: the loss needs reference log-probabilities and got None, or an array has not
            two sides in its last axis or another shape than `logps`.

    >>> chosen, rejected = rewards(ipo(0.5), np.ones((1, 2)), np.zeros((1, 2)), np.array([[2, 4]]))
    >>> chosen.tolist(), rejected.tolist()
    ([0.25], [0.125])
    """
    if loss.needs_reference and ref_logps is None:
        raise ValueError(
            f"loss {loss.name!r} compares with a reference, but ref_logps is None. "
            f"Pass the reference's log-probabilities or choose a loss without one, such as simpo."
        )
    tokens = jnp.asarray(tokens)
    value = jnp.asarray(logps, jnp.float32)
    reference = jnp.asarray(ref_logps, jnp.float32) if loss.needs_reference else value
    shapes = value.shape, reference.shape, tokens.shape
    if value.shape[-1:] != (2,) or len(set(shapes)) > 1:  # they would broadcast into other pairs
        raise ValueError(
            f"logps, ref_logps and tokens have the shapes {', '.join(map(str, shapes))}. Give all "
            f"of them one shape, [..., 2] with the chosen side first."
        )
    if loss.needs_reference:
        value = value - reference
    if loss.input.endswith("_mean"):
        value = value / jnp.maximum(tokens, 1)
    value = jnp.where(tokens > 0, loss.beta * value, 0.0)
    return value[..., 0], value[..., 1]


def nll(logps: Array, tokens: Array) -> jax.Array:
    """Mean negative log-probability per completion token, nats; 0 for a side without tokens.

    Added to a preference loss with a factor, it keeps the chosen completion likely (RPO).

    Args:
        logps: float32, any shape, log-probabilities summed over completion tokens, nats.
        tokens: the same shape, completion tokens.

    Source: Pang et al. 2024, "Iterative Reasoning Preference Optimization".

    >>> nll(np.array([-6.0, 0.0]), np.array([3, 0])).tolist()
    [2.0, -0.0]
    """
    return -jnp.asarray(logps, jnp.float32) / jnp.maximum(jnp.asarray(tokens), 1)


def sigmoid(beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """DPO: -log σ(m). With label smoothing ε: -(1-ε) log σ(m) - ε log σ(-m), bounded below.

    Args:
        beta: positive.
        label_smoothing: assumed rate of flipped labels, in [0, 0.5).

    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023 (conservative DPO).

    >>> round(float(sigmoid()(0.0)), 4), float(sigmoid()(1000.0))
    (0.6931, 0.0)
    """
    return _smoothed("sigmoid", beta, label_smoothing, 0.0, "log_ratio")


def simpo(beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> Loss:
    """SimPO: -log σ(m - γ) on mean log-probabilities, without a reference.

    Args:
        beta: positive; larger than for DPO, because the rewards are means over tokens.
        gamma: target margin, in units of reward.
        label_smoothing: as in `sigmoid`.

    Source: Meng et al. 2024, eq. 6.

    >>> round(float(simpo(gamma=1.0)(1.0)), 4)
    0.6931
    """
    return _smoothed("simpo", beta, label_smoothing, gamma, "logp_mean")


def robust(beta: float = 0.1, label_smoothing: float = 0.1) -> Loss:
    """Robust DPO: an unbiased estimate of the clean loss when a share ε of labels is flipped.

    [-(1-ε) log σ(m) + ε log σ(-m)] / (1-2ε). It falls without bound for large margins.

    Source: Chowdhury et al. 2024, "Provably Robust DPO".

    >>> round(float(robust(label_smoothing=0.2)(0.0)), 4)
    0.6931
    """
    eps = _check_smoothing(label_smoothing)
    clean, flipped = (1 - eps) / (1 - 2 * eps), eps / (1 - 2 * eps)
    return _margin_loss(
        "robust",
        beta,
        lambda m: clean * jax.nn.softplus(-m) - flipped * jax.nn.softplus(m),
        lambda m: -clean * jax.nn.sigmoid(-m) - flipped * jax.nn.sigmoid(m),
        _bell,  # the weights differ by exactly 1, so the curvature is that of the clean loss
    )


def ipo(beta: float = 0.1) -> Loss:
    """IPO: (m/β - 1/(2β))², on log-ratios averaged over tokens as its authors do.

    Source: Azar et al. 2023, eq. 17.

    >>> float(ipo(beta=0.5)(0.5)), float(ipo(beta=0.5)(0.0))
    (0.0, 1.0)
    """
    _check_beta(beta)
    scale = 1.0 / beta
    return _margin_loss(
        "ipo",
        beta,
        lambda m: jnp.square((m - 0.5) * scale),
        lambda m: 2 * scale * scale * (m - 0.5),
        lambda m: jnp.full_like(m, 2 * scale * scale),
        input="log_ratio_mean",
    )


def hinge(beta: float = 0.1) -> Loss:
    """Hinge: max(0, 1 - m). Slope -1 below margin 1, else 0; no curvature anywhere.

    Source: Zhao et al. 2023 (SLiC-HF), on DPO's rewards.

    >>> hinge()(np.array([-1.0, 3.0])).tolist()
    [2.0, 0.0]
    """
    return _margin_loss(
        "hinge",
        beta,
        lambda m: jax.nn.relu(1 - m),
        lambda m: jnp.where(m < 1, -1.0, 0.0),
        jnp.zeros_like,
    )


def apo_zero(beta: float = 0.1) -> Loss:
    """APO-zero: 1 - σ(c) + σ(r): raise the chosen, lower the rejected completion.

    For pairs whose chosen completions are better than what the model would write.

    Source: D'Oosterlinck et al. 2024, eq. 7.

    >>> float(apo_zero()(0.0))
    1.0
    """
    return _pair_loss(
        "apo_zero",
        beta,
        lambda c, r: jax.nn.sigmoid(-c) + jax.nn.sigmoid(r),
        lambda c, r: -(_bell(c) + _bell(r)) / 2,
        lambda c, r: (_bell_slope(r) - _bell_slope(c)) / 4,
    )


def apo_down(beta: float = 0.1) -> Loss:
    """APO-down: σ(c) + 1 - σ(c - r): lower both completions, the rejected one more.

    For pairs whose chosen completions are worse than what the model would write.

    Source: D'Oosterlinck et al. 2024, eq. 8.

    >>> float(apo_down()(0.0))
    1.0
    """
    return _pair_loss(
        "apo_down",
        beta,
        lambda c, r: jax.nn.sigmoid(c) + jax.nn.sigmoid(r - c),
        lambda c, r: _bell(c) / 2 - _bell(c - r),
        lambda c, r: _bell_slope(c) / 4 - _bell_slope(c - r),
    )


def sppo_hard(beta: float = 0.1) -> Loss:
    """SPPO with hard labels: (c/β - 1/(2β))² + (r/β + 1/(2β))².

    Source: Wu et al. 2024, eq. 4.7, with win probability 1 for the chosen completion.

    >>> float(sppo_hard(beta=0.5)(0.5, -0.5))
    0.0
    """
    _check_beta(beta)
    scale = 1.0 / beta
    return _pair_loss(
        "sppo_hard",
        beta,
        lambda c, r: jnp.square((c - 0.5) * scale) + jnp.square((r + 0.5) * scale),
        lambda c, r: scale * scale * (c - r - 1),
        lambda c, r: jnp.full_like(c - r, scale * scale),
    )


def nca_pair(beta: float = 0.1) -> Loss:
    """NCA for pairs: -log σ(c) - ½ log σ(-c) - ½ log σ(-r): anchors the chosen likelihood.

    Source: Chen et al. 2024 (noise contrastive alignment), with two completions.

    >>> round(float(nca_pair()(0.0)), 4)  # 2 log 2
    1.3863
    """
    softplus, sigma = jax.nn.softplus, jax.nn.sigmoid
    return _pair_loss(
        "nca_pair",
        beta,
        lambda c, r: softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r),
        lambda c, r: (1.5 * sigma(c) - 1 - 0.5 * sigma(r)) / 2,
        lambda c, r: (1.5 * _bell(c) + 0.5 * _bell(r)) / 4,
    )


def sft() -> Loss:
    """Supervised fine-tuning: minus the mean log-probability of the chosen completion.

    One value per example. TRL's `sft` averages over all chosen tokens of the batch instead, which
    is the mean of these values with the numbers of tokens as weights.

    >>> float(sft()(-2.0))
    2.0
    """
    return _pair_loss(
        "sft",
        1.0,
        lambda c, r: -c + jnp.zeros_like(r),
        lambda c, r: jnp.full_like(c - r, -0.5),
        lambda c, r: jnp.zeros_like(c - r),
        input="logp_mean",
    )


LOSSES: dict[str, Callable[..., Loss]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "sft": sft,
}


def from_margin(
    fn: Callable[[jax.Array], jax.Array],
    beta: float,
    name: str = "custom",
    input: str = "log_ratio",
) -> Loss:
    """A loss from your own function of the margin; slope and curvature by autodiff.

    Args:
        fn: float32 [] -> float32 [], written with jax.numpy and twice differentiable.
        beta: factor between nats and rewards; positive.
        name: shown in metrics.
        input: which log-probabilities become rewards, one of `INPUTS`.

    >>> squared = from_margin(lambda m: (m - 1) ** 2, beta=0.1)
    >>> float(squared.slope(0.0, 0.0)), float(squared.curvature(0.0, 0.0))
    (-2.0, 2.0)
    """
    return _margin_loss(
        name,
        beta,
        _elementwise(fn),
        _elementwise(jax.grad(fn)),
        _elementwise(jax.grad(jax.grad(fn))),
        input=input,
    )


def from_pair(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    beta: float,
    name: str = "custom",
    input: str = "log_ratio",
) -> Loss:
    """A loss from your own function of (chosen, rejected) rewards; derivatives by autodiff.

    Args:
        fn: (float32 [], float32 []) -> float32 [], written with jax.numpy, twice differentiable.
        beta: factor between nats and rewards; positive.
        name: shown in metrics.
        input: which log-probabilities become rewards, one of `INPUTS`.

    >>> loss = from_pair(lambda c, r: c**2 + 3 * r**2, beta=0.1)
    >>> float(loss.slope(1.0, 1.0)), float(loss.curvature(1.0, 1.0))
    (-2.0, 2.0)
    """

    def along_margin(c, r):  # the loss on the path that moves both sides apart
        return lambda t: fn(c + t / 2, r - t / 2)

    return _pair_loss(
        name,
        beta,
        _elementwise(fn),
        _elementwise(lambda c, r: jax.grad(along_margin(c, r))(0.0)),
        _elementwise(lambda c, r: jax.grad(jax.grad(along_margin(c, r)))(0.0)),
        input=input,
    )


def _smoothed(name: str, beta: float, label_smoothing: float, shift: float, input: str) -> Loss:
    """-(1-ε) log σ(m - shift) - ε log σ(shift - m)."""
    eps = _check_smoothing(label_smoothing)
    softplus, sigma = jax.nn.softplus, jax.nn.sigmoid
    return _margin_loss(
        name,
        beta,
        lambda m: (1 - eps) * softplus(shift - m) + eps * softplus(m - shift),
        lambda m: -(1 - eps) * sigma(shift - m) + eps * sigma(m - shift),
        lambda m: _bell(m - shift),
        input=input,
    )


def _margin_loss(name, beta, value, slope, curvature, input="log_ratio") -> Loss:
    def of_margin(fn):
        return lambda c, r: fn(jnp.asarray(c, jnp.float32) - jnp.asarray(r, jnp.float32))

    return Loss(name, beta, of_margin(value), of_margin(slope), of_margin(curvature), input)


def _pair_loss(name, beta, value, slope, curvature, input="log_ratio") -> Loss:
    def of_pair(fn):
        return lambda c, r: fn(jnp.asarray(c, jnp.float32), jnp.asarray(r, jnp.float32))

    return Loss(name, beta, of_pair(value), of_pair(slope), of_pair(curvature), input)


def _elementwise(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Maps a function of scalars over arrays of any shape, so that a user's may hold `lax.cond`."""

    def mapped(*args):
        arrays = jnp.broadcast_arrays(*args)
        flat = jax.vmap(fn)(*(x.reshape(-1) for x in arrays))
        return flat.reshape(arrays[0].shape)

    return mapped


def _bell(x: jax.Array) -> jax.Array:
    """σ'(x) = σ(x)σ(-x). The product keeps its digits far out, where σ(1-σ) cancels to 0."""
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _bell_slope(x: jax.Array) -> jax.Array:
    """σ''(x) = σ'(x)(1 - 2σ(x)), and 1 - 2σ(x) = -tanh(x/2)."""
    return -_bell(x) * jnp.tanh(x / 2)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"loss.beta={beta} must be positive: it turns nats into rewards. Try 0.1.")


def _check_smoothing(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"loss.label_smoothing={label_smoothing} must lie in [0, 0.5): it is the assumed share "
            f"of flipped labels, and at one half the labels say nothing. Try 0.1."
        )
    return label_smoothing
