"""The optimizer: AdamW or Adafactor with clipping, warm-up and a schedule, as one optax chain."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {  # of the part done after warm-up
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: jnp.ones_like(done),
}
NO_DECAY = r"norm|bias|scale"


def learning_rate(
    *, lr: float, name: str = "cosine", warmup: int, steps: int, min_lr_ratio: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0, then decay to `min_lr_ratio * lr` at `steps`, as transformers does it.

    Update number t (from 0) takes lr * t / warmup while t < warmup, and after that
    lr * (r + (1 - r) * f(done)), with done = (t - warmup) / (steps - warmup), at most 1.

    Args:
        lr: peak learning rate, positive.
        name: one of `SCHEDULES`.
        warmup: updates of warm-up, fewer than `steps`; 0 starts at the peak.
        steps: updates in all.
        min_lr_ratio: what is left of the peak at the end, in [0, 1].

    Returns:
        A function from the number of the update to the learning rate, float32 [].

    Raises:
        ValueError: a setting outside its range.

    >>> rate = learning_rate(lr=1.0, name="linear", warmup=2, steps=4)
    >>> [float(rate(t)) for t in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if name not in SCHEDULES:
        raise ValueError(f"optim.schedule={name!r} must be one of {', '.join(SCHEDULES)}.")
    if not (lr > 0 and 0 <= min_lr_ratio <= 1):
        raise ValueError(
            f"optim.lr={lr} must be positive and optim.min_lr_ratio={min_lr_ratio} in [0, 1]. "
            f"For full fine-tuning start from lr 5e-7."
        )
    if not 0 <= warmup < steps:
        raise ValueError(
            f"optim.warmup={warmup} updates must lie in [0, {steps}), the number of updates. "
            f"Use {max(steps, 0) // 10}, a tenth of them."
        )
    decay = SCHEDULES[name]

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
        peak_part = min_lr_ratio + (1 - min_lr_ratio) * decay(done)
        return lr * jnp.where(count < warmup, count / max(warmup, 1), peak_part)

    return rate


def decay_mask(params: Any) -> Any:
    """Which leaves weight decay applies to: not to norms, biases and vectors.

    By name first, because stacked layers make a norm's scale a matrix.

    Args:
        params: any tree of arrays.

    Returns:
        A tree of bool of the same structure.

    >>> decay_mask({"q": {"kernel": jnp.ones((2, 2))}, "norm": jnp.ones((4, 2)), "s": jnp.ones(2)})
    {'norm': False, 'q': {'kernel': True}, 's': False}
    """

    def decays(path, leaf) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.ndim(leaf) > 1 and re.search(NO_DECAY, name, re.IGNORECASE) is None

    return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `most`.

    On a CPU by one factor: of optax's division XLA makes an array as large as the gradients, which
    is written and read again, a fifth of the bytes that an update moves.

    >>> clipped, _ = clip_by_global_norm(1.0).update(jnp.array([3.0, 4.0]), optax.EmptyState())
    >>> [round(float(x), 3) for x in clipped]
    [0.6, 0.8]
    """
    plain = optax.clip_by_global_norm(most)

    def scaled(updates: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.lax.platform_dependent(
            updates, cpu=scaled, default=lambda x: plain.update(x, state)[0]
        ), state

    return optax.GradientTransformation(plain.init, update)


def make(
    *,
    lr: float,
    schedule: str = "cosine",
    warmup: int,
    steps: int,
    min_lr_ratio: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    decay_mask: Callable[[Any], Any] = decay_mask,
    name: str = "adamw",
    moments_dtype: str = "float32",
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW or Adafactor with clipping by the global norm, and the learning-rate schedule.

    Args:
        lr: peak learning rate.
        schedule: one of `SCHEDULES`.
        warmup: updates of warm-up.
        steps: updates in all.
        min_lr_ratio: what is left of the peak at the end.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of that mean.
        weight_decay: decoupled, multiplied by the learning rate.
        clip_norm: largest global norm of the gradients; 0 switches clipping off.
        decay_mask: from parameters to a tree of bool, True where weight decay applies.
        name: "adamw", or "adafactor": in place of the mean of a matrix's squared gradients, the
            means of its rows and columns. `b2` and `eps` are then those of its paper.
        moments_dtype: of the mean of gradients. Their squares stay in float32: at b2 = 0.999 a
            step changes them by less than bfloat16 can tell.

    Returns:
        The optax transformation and the schedule inside it (for the metrics).

    Raises:
        ValueError: a setting outside its range.

    Source: Loshchilov & Hutter 2019 (decoupled weight decay); Pascanu et al. 2013 (clipping);
    Shazeer & Stern 2018 (Adafactor, arXiv 1804.04235).

    >>> tx, rate = make(lr=0.1, schedule="constant", warmup=0, steps=10)
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    >>> [round(float(x), 4) for x in updates]
    [-0.1, -0.1]
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0):
        raise ValueError(
            f"optim.b1={b1} and optim.b2={b2} must lie in [0, 1), and optim.eps={eps} must be "
            f"positive. Defaults are 0.9, 0.999 and 1e-8."
        )
    if not (weight_decay >= 0 and clip_norm >= 0):
        raise ValueError(
            f"optim.weight_decay={weight_decay} and optim.clip_norm={clip_norm} must not be "
            f"negative. Use 0 to switch either off."
        )
    if name not in ("adamw", "adafactor") or moments_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"optim.name={name!r} must be 'adamw' or 'adafactor', and optim.moments_dtype="
            f"{moments_dtype!r} 'float32' or 'bfloat16'."
        )
    rate = learning_rate(
        lr=lr, name=schedule, warmup=warmup, steps=steps, min_lr_ratio=min_lr_ratio
    )
    chain = [clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "adamw":
        chain.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=moments_dtype))
    else:
        chain += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
        if b1:
            chain.append(optax.ema(b1, debias=False, accumulator_dtype=moments_dtype))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    chain.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*chain), rate
