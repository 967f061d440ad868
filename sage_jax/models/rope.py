"""Rotary positions: frequencies, how they are stretched for long contexts, and the rotation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

KINDS = ("linear", "llama3", "yarn", "longrope", "factors")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed for contexts longer than those trained on.

    `linear` divides all by `factor`; `llama3` divides the low ones by `factor` and blends between
    two wavelengths; `yarn` divides those that turn less than `beta_slow` times in the original
    context, keeps those that turn more than `beta_fast` times, and blends between; `longrope`
    divides each by its own number, one set for sequences up to the original context and one for
    longer ones; `factors` divides each by its own number (what a GGUF file stores).

    Source: `llama3` as in transformers' `modeling_rope_utils`; `yarn`: Peng et al. 2023 (arXiv
    2309.00071); `longrope`: Ding et al. 2024 (arXiv 2402.13753).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    factors: tuple[float, ...] = ()  # longrope: of sequences within the original context
    long_factors: tuple[float, ...] = ()  # longrope: of longer ones
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: whether the blend begins and ends at whole channels
    attention_factor: float = 1.0  # multiplies queries and keys (yarn, longrope)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"rope_scaling.kind={self.kind!r} is unknown. Use one of {', '.join(KINDS)}."
            )

    def divisors(
        self, frequency: np.ndarray, *, theta: float = 0.0, long: bool = False
    ) -> np.ndarray:
        """What to divide each frequency by.

        Args:
          frequency: float64 [W / 2], radians per position.
          theta: the base they come from; yarn needs it.
          long: longrope's factors for sequences beyond the original context.

        Returns:
          float64 [W / 2].
        """
        if self.kind == "linear":
            return np.full_like(frequency, self.factor)
        if self.kind in ("factors", "longrope"):
            return np.asarray(self.long_factors if long else self.factors, np.float64)
        if self.kind == "yarn":
            kept = 1.0 - self._ramp(len(frequency), theta)
            return 1.0 / ((1.0 - kept) / self.factor + kept)
        wavelength = 2 * np.pi / frequency
        turns = self.original_max_positions / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)

    def _ramp(self, count: int, theta: float) -> np.ndarray:
        """0 where yarn keeps a frequency, 1 where it divides it."""

        def channel(turns: float) -> float:
            return (count * math.log(self.original_max_positions / (turns * 2 * math.pi))) / (
                math.log(theta)
            )

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        high += 0.001 if low == high else 0
        return np.clip((np.arange(count) - low) / (high - low), 0.0, 1.0)


def frequencies(theta: float, width: int) -> np.ndarray:
    """Unscaled rotary frequencies of `width` rotated channels, float64 [width / 2]."""
    return theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)


def scaled_frequencies(
    theta: float, width: int, scaling: RopeScaling | None, *, long: bool = False
) -> np.ndarray:
    """Angular frequencies of the rotary embedding, radians per position.

    Args:
      theta: base.
      width: channels of a head that turn, even.
      scaling: how the frequencies are slowed, if at all.
      long: see `RopeScaling.divisors`.

    Returns:
      float64 [width / 2].

    Source: Su et al. 2021 (arXiv 2104.09864).

    >>> scaled_frequencies(100.0, 4, None).tolist()
    [1.0, 0.1]
    """
    frequency = frequencies(theta, width)
    if scaling is None:
        return frequency
    return frequency / scaling.divisors(frequency, theta=theta, long=long)
