"""FLOPs of one instruction of a compiled program, and what kernels say of themselves."""

from __future__ import annotations

import math
import re

from sage_jax.runtime import hlo_text


def flops(at: hlo_text.Computation, one: hlo_text.Instruction) -> float:
    """FLOPs of a matrix product or a convolution; 0 of anything else."""
    if one.opcode == "dot":
        left = at.instructions[one.operands[0]].shapes[0].dims
        axes = hlo_text.numbers(one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        return 2.0 * one.shapes[0].size * math.prod(left[axis] for axis in axes)
    if one.opcode == "convolution":
        return _convolution_flops(at, one)
    return 0.0


def _convolution_flops(at: hlo_text.Computation, one: hlo_text.Instruction) -> float:
    """Multiply-adds on real elements; TPUs write batched matrix products as dilated windows."""
    left, right = (at.instructions[name].shapes[0].dims for name in one.operands[:2])
    labels = one.attribute(r"dim_labels=(\S+?)(?:,|$|\s)") or ""
    lhs, rhs, out = re.split(r"_|->", labels)
    window = {
        key: re.findall(r"-?\d+(?:_-?\d+)?", value)
        for key, value in re.findall(
            r"(\w+)=([\dx_\-]+)", one.attribute(r"window=\{([^}]*)\}") or ""
        )
    }
    result = one.shapes[0].dims
    total = 2.0 * result[out.index("b")] * result[out.index("f")]
    total *= right[rhs.index("i")]
    spatial = sorted(letter for letter in lhs if letter.isdigit())
    for n, letter in enumerate(spatial):

        def setting(name: str, default: str, n: int = n) -> str:
            return window[name][n] if name in window else default

        low = int(setting("pad", "0_0").split("_")[0])
        stride, base = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
        spread = int(setting("rhs_dilate", "1"))
        length = (left[lhs.index(letter)] - 1) * base + 1
        taps = right[rhs.index(letter)]
        total *= sum(
            1
            for place in range(result[out.index(letter)])
            for tap in range(taps)
            if 0 <= (at_ := place * stride + tap * spread - low) < length and at_ % base == 0
        )
    return total / max(1, int(one.attribute(r"batch_group_count=(\d+)") or 1))


def custom(one: hlo_text.Instruction) -> tuple[float, float] | None:
    """FLOPs and bytes that a kernel declares."""
    found = one.attribute(r'"cost_estimate":\{([^}]*)\}')
    if found is None:
        return None
    numbers = dict(re.findall(r'"(\w+)":"?(\d+)', found))
    return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0))


def attention(
    at: hlo_text.Computation, one: hlo_text.Instruction, keys: float
) -> tuple[float, float] | None:
    """FLOPs of JAX's splash attention, which declares none and takes its blocks from the data.

    The gradient of queries takes three matrix products, that of keys and values four.
    """
    if not keys or ("splash_m" not in one.name and "splash_m" not in one.source):
        return None
    given = [at.instructions[n].shapes[0] for n in one.operands if n in at.instructions]
    dims = [a.dims for a in given if len(a.dims) == 3 and a.dtype in ("bf16", "f32")]
    if len(dims) < 2:
        return None
    heads, queries, width = dims[0]
    which = f"{one.name} {one.source}"
    products = 4 if "dkv" in which else 3 if "_dq" in which else 2
    return 2.0 * width * heads * queries * keys * products, 0.0
