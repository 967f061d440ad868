"""The machine that `sage-jax compile` compiles for: a TPU topology, or virtual CPU devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from sage_jax.runtime import chips


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine to compile for."""

    name: str
    devices: Sequence[Any]
    chip: chips.Chip | None  # None: virtual CPU devices, which have no data sheet
    coordinates: tuple[tuple[int, ...], ...]  # of each device, in the order of `devices`
    extent: tuple[int, ...]

    @property
    def usable_bytes(self) -> float:
        """Main memory of a device that a program may use; CPU devices share that of the host."""
        if self.chip is not None:
            return self.chip.usable_bytes
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return pages * size / len(self.devices)


def target(name: str) -> Target:
    """The devices of a topology.

    Args:
        name: "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "v4:2x2x2", "tpu7x:2x2x1" or "cpu:8" (virtual
            devices). Before anything else in the process touches JAX's devices.

    Raises:
        ValueError: a name that is none of these, or a topology that the TPU compiler refuses.
        ImportError: no libtpu.
    """
    kind, _, size = name.partition(":")
    if kind not in (*chips.TPUS, "cpu") or not re.fullmatch(r"\d+(x\d+)*", size):
        raise ValueError(
            f"--topology={name} is not a topology. Write the kind of chip ("
            f"{', '.join((*chips.TPUS, 'cpu'))}), a colon and its size: v5e:16x16, v5p:4x4x4, "
            f"cpu:8."
        )
    if kind == "cpu":
        return _cpu_target(name, math.prod(int(n) for n in size.split("x")))
    os.environ |= {  # libtpu would ask the metadata server of a cloud machine
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for TPUs, and none is used
    }
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as e:
        if importable("libtpu"):
            said = (str(e).splitlines() or [""])[0]
            raise ValueError(f"--topology={name}: libtpu refuses it: {said}") from e
        raise ImportError(
            f"--topology={name} needs the TPU compiler: pip install 'sage_jax[tpu]', or pip "
            f"install libtpu. No TPU is needed."
        ) from e
    devices: list[Any] = list(found.devices)
    places = tuple(tuple(int(n) for n in d.coords) for d in devices)
    extent = tuple(max(c[axis] for c in places) + 1 for axis in range(len(places[0])))
    return Target(name, devices, chips.TPUS[kind], places, extent)


def importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _cpu_target(name: str, count: int) -> Target:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the process has its devices already: then there are enough, or not
        pass
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise ValueError(
            f"--topology={name}: this process has {len(devices)} CPU devices already. Run the "
            f"command in a process of its own."
        )
    return Target(name, devices, None, tuple((i,) for i in range(count)), (count,))
