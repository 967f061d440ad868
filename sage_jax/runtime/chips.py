"""What accelerators can do: the figures behind rooflines, model FLOPs utilisation and fits.

Per *device* as JAX counts them: a chip, except on TPU v4 (as `v4:` topologies name it) and TPU7x,
whose chips are two devices each.

Sources: Google's pages of each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; peak, HBM
and interconnect per chip); NVIDIA's data sheets of A100, H100 and H200. `usable_bytes` is what
libtpu 0.0.52 says when a program asks for more: "exceeds available HBM (15.75G)".
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device."""

    name: str
    flops: float  # dense bfloat16 FLOP/s
    memory_bandwidth: float  # main memory, bytes/s
    usable_bytes: float  # of main memory, after what the system keeps
    link_bandwidth: float = 0.0  # bytes/s of one inter-chip link in one direction
    torus_side: int = 0  # an axis of this many chips (or a multiple of it) is a ring
    clock: float = 1.0  # Hz of the matrix units: what the compiler's cycles are worth


# The clock follows from the peak: FLOP/s = units x side^2 x 2 x clock.
TPUS = {  # by the name in a topology: "v5e:16x16"
    "v4": Chip("TPU v4 core", 137.5e12, 614e9, 15.25 * GIB, 50e9, 4, 1.05e9),
    "v5e": Chip("TPU v5e", 197e12, 819e9, 15.75 * GIB, 50e9, 16, 1.5e9),
    "v5p": Chip("TPU v5p", 459e12, 2765e9, 95.73 * GIB, 100e9, 4, 1.75e9),
    "v6e": Chip("TPU v6e", 918e12, 1640e9, 31.24 * GIB, 100e9, 16, 1.75e9),
    "tpu7x": Chip("TPU7x core", 1153.5e12, 3690e9, 94.74 * GIB, 100e9, 4, 2.2e9),
}
# Dense bfloat16 FLOP/s by `jax.Device.device_kind`, whole chips where JAX shows chips.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e",
          "TPU7x": "tpu7x"}  # fmt: skip


def usable_bytes(kind: str) -> float:
    """Main memory of a device by its `device_kind`, 0 where it is not known.

    >>> usable_bytes("TPU v5 lite") / GIB
    15.75
    """
    return TPUS[_KINDS[kind]].usable_bytes if kind in _KINDS else 0.0


def ring_bandwidth(
    chip: Chip, coordinates: list[tuple[int, ...]], extent: tuple[int, ...]
) -> float:
    """Bytes/s at which a device of a group takes in what the others send.

    A group along one axis of the torus uses the links of that axis, both directions where the axis
    closes to a ring; a group over several axes uses the links of all. Never contended: a bound.

    Args:
        chip: the chip.
        coordinates: of the group's devices.
        extent: size of the whole topology along each axis.

    >>> ring_bandwidth(TPUS["v5e"], [(0, 0), (1, 0), (2, 0)], (16, 16)) / 1e9
    100.0
    >>> ring_bandwidth(TPUS["v5e"], [(0, 0), (0, 1)], (2, 4)) / 1e9
    50.0
    """
    total = 0.0
    for axis, size in enumerate(extent):
        if len({c[axis] for c in coordinates}) > 1:
            ring = chip.torus_side and size % chip.torus_side == 0
            total += chip.link_bandwidth * (2 if ring else 1)
    return total or chip.link_bandwidth
