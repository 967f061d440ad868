"""Reads the text of a compiled XLA program: what it computes, moves and sends, loops counted.

XLA's own `cost_analysis()` counts the body of a loop once. Training loops over layers, chunks of
tokens and parts of a batch, so its totals are short by those factors. This module multiplies by
trip counts; everything is per device, as the program of one device is what is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

from sage_jax.runtime import hlo_cost, hlo_loops, hlo_text

Shape = hlo_text.Shape
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_MAIN_MEMORY = (0, None)  # memory spaces of a layout: S(1) is on-chip, S(2) holds flags
_NO_TRAFFIC = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "opt-barrier partition-id replica-id add-dependency domain async-done async-update".split()
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication of a program, in all its repetitions."""

    kind: str
    shapes: tuple[Shape, ...]  # of the result
    group: tuple[int, ...]  # the devices of one group, as numbers of the mesh in row order
    groups: int  # devices in a group
    count: float  # how often a step runs it
    bytes: float  # what one run brings together on a device: the larger of input and result
    source: str

    @property
    def total_bytes(self) -> float:
        """Bytes of a step."""
        return self.count * self.bytes


@dataclasses.dataclass(frozen=True)
class Totals:
    """What one device does in one run of the program."""

    flops: float  # of matrix products and convolutions, 2 per multiply-add
    main_bytes: float  # read from and written to main memory, each operation on its own
    cycles: float  # the compiler's own estimate, collectives not counted; 0 where it gives none
    collectives: tuple[Collective, ...]
    opaque: tuple[str, ...]  # custom calls whose cost is unknown
    unknown_loops: tuple[str, ...]  # loops whose trip count the text does not say


class Program:
    """A parsed program.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
        unknown_trips: from the path of a loop that ends by a condition on data to its trip count.
        keys: that attention kernels without a cost of their own compute for a query.

    >>> text = '''HloModule m
    ... ENTRY %main (a: f32[2,3]) -> f32[2,4] {
    ...   %a = f32[2,3]{1,0} parameter(0)
    ...   %w = f32[3,4]{1,0} constant({...})
    ...   ROOT %d = f32[2,4]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }'''
    >>> Program(text).totals().flops
    48.0
    """

    def __init__(
        self,
        text: str,
        *,
        unknown_trips: Callable[[str], float] = lambda _: 1.0,
        keys: float = 0.0,
    ):
        self.computations, self.entry = hlo_text.parse(text)
        self.keys = keys
        self.unknown_trips = unknown_trips
        self.unknown_loops: list[str] = []

    def walk(self) -> Iterator[tuple[hlo_text.Computation, hlo_text.Instruction, float, bool]]:
        """Every instruction that runs: its computation, how often, and whether inside a fusion."""
        yield from self._walk(self.computations[self.entry], 1.0, False)

    def _walk(self, computation: hlo_text.Computation, times: float, fused: bool) -> Iterator:
        for one in computation.instructions.values():
            yield computation, one, times, fused
            for name, factor, inside in self._called(computation, one):
                called = self.computations.get(name)
                if called is not None:
                    yield from self._walk(called, times * factor, fused or inside)

    def _called(
        self, at: hlo_text.Computation, one: hlo_text.Instruction
    ) -> list[tuple[str, float, bool]]:
        if one.opcode == "while":
            body = one.attribute(r"body=%?([\w.\-]+)") or ""
            return [(body, self._trips(at, one), False)]
        if one.opcode == "fusion":
            return [(one.attribute(r"calls=%?([\w.\-]+)") or "", 1.0, True)]
        if one.opcode in ("call", "async-start", "custom-call"):
            name = one.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
            return [(name, 1.0, False)] if name else []
        if one.opcode == "conditional":
            names = one.attribute(r"branch_computations=\{([^}]*)\}") or ""
            branches = [n.strip().lstrip("%") for n in names.split(",") if n.strip()]
            for key in ("true_computation", "false_computation"):
                branch = one.attribute(rf"{key}=%?([\w.\-]+)")
                branches += [branch] if branch else []
            return [(name, 1.0, False) for name in branches]
        return []

    @functools.cache  # noqa: B019  a program lives as long as the command that reads it
    def _trip_count(self, computation: str, name: str) -> int | None:
        at = self.computations[computation]
        return hlo_loops.trip_count(self.computations, at, at.instructions[name])

    def _trips(self, at: hlo_text.Computation, one: hlo_text.Instruction) -> float:
        found = self._trip_count(at.name, one.name)
        if found is None:
            label = one.source or one.name
            if label not in self.unknown_loops:
                self.unknown_loops.append(label)
            return float(self.unknown_trips(label))
        return float(found)

    def totals(self) -> Totals:
        """Adds up the program."""
        flops = moved = cycles = 0.0
        sent: dict[str, Collective] = {}
        opaque: list[str] = []
        for at, one, times, fused in self.walk():
            flops += times * hlo_cost.flops(at, one)
            if not fused:
                moved += times * self._traffic(at, one)
                cycles += times * float(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            found = _collective(at, one, times)
            if found is not None:
                # A collective spread over several fusions appears once in each of its parts.
                channel = one.attribute(r"channel_id=(\d+)") if fused else None
                sent[f"{found.kind} {channel}" if channel else f"{at.name} {one.name}"] = found
            if one.opcode == "custom-call":
                cost = hlo_cost.custom(one) or hlo_cost.attention(at, one, self.keys)
                if cost is not None:
                    flops += times * cost[0]
                elif "kernel" in one.rest or "tpu_custom_call" in one.rest:
                    opaque.append(one.source or one.name)
        return Totals(
            flops, moved, cycles, tuple(sent.values()), tuple(dict.fromkeys(opaque)),
            tuple(self.unknown_loops),
        )  # fmt: skip

    def arrays(self) -> Iterator[tuple[hlo_text.Instruction, Shape]]:
        """Every array that the program makes, also inside fusions."""
        for computation in self.computations.values():
            for one in computation.instructions.values():
                for shape in one.shapes:
                    yield one, shape

    def _traffic(self, at: hlo_text.Computation, one: hlo_text.Instruction) -> float:
        """Bytes of main memory that an operation reads and writes."""
        if one.opcode in _NO_TRAFFIC or one.opcode.endswith("-done"):
            return 0.0
        if one.opcode == "custom-call":
            cost = hlo_cost.custom(one)
            if cost is not None:
                return cost[1]
            if one.attribute(r'custom_call_target="(\w+)"') in ("AllocateBuffer", "ConcatBitcast"):
                return 0.0
        results = one.shapes[:2] if one.opcode.endswith("-start") else one.shapes
        written = sum(_main(shape) for shape in results)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        if one.opcode in ("slice-start", "dynamic-slice-start"):  # ((operands), result, ...)
            return 2 * one.shapes[1].bytes if len(one.shapes) > 1 else written
        if one.opcode.endswith("-start"):
            return written  # the result holds the operand as well
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = one.operands[1 if one.opcode == "dynamic-update-slice" else -1]
            return 2 * _size(at, update)
        if one.opcode != "fusion":
            return written + sum(_size(at, name) for name in one.operands)
        inner = self.computations.get(one.attribute(r"calls=%?([\w.\-]+)") or "")
        if inner is None:
            return written + sum(_size(at, name) for name in one.operands)
        return self._fusion_traffic(at, one, inner, written)

    def _fusion_traffic(
        self,
        at: hlo_text.Computation,
        one: hlo_text.Instruction,
        inner: hlo_text.Computation,
        written: float,
    ) -> float:
        """A fusion reads what its slices take, and writes in place what it updates."""
        updates = [i for i in inner.instructions.values() if i.opcode == "dynamic-update-slice"]
        for update in updates:  # the result is the updated array, of which only a part is written
            whole = sum(s.bytes for s in update.shapes)
            part = sum(s.bytes for s in inner.instructions[update.operands[1]].shapes)
            written += part - whole if written >= whole else 0.0
        return written + sum(
            self._read(inner, number, _size(at, operand))
            for number, operand in enumerate(one.operands)
        )

    def _read(self, inner: hlo_text.Computation, number: int, size: float) -> float:
        """Bytes that a fused computation reads of a parameter of some size."""
        name = _parameter(inner, number)
        if not size or name is None:
            return size
        total = 0.0
        for user, via in _through(inner, name):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(s.bytes for s in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == via:
                continue
            elif user.opcode == "fusion":
                called = self.computations.get(user.attribute(r"calls=%?([\w.\-]+)") or "")
                if called is None:
                    return size
                places = [n for n, operand in enumerate(user.operands) if operand == via]
                total += sum(self._read(called, n, size) for n in places)
            else:
                return size
        return min(size, total)


def _main(shape: Shape) -> float:
    return shape.bytes if shape.space in _MAIN_MEMORY else 0.0


def _size(at: hlo_text.Computation, name: str) -> float:
    found = at.instructions.get(name)
    return sum(_main(shape) for shape in found.shapes) if found else 0.0


def _parameter(inner: hlo_text.Computation, number: int) -> str | None:
    """The name of a computation's parameter."""
    for inside in inner.instructions.values():
        if inside.opcode == "parameter" and inside.operands[0] == str(number):
            return inside.name
    return None


def _through(inner: hlo_text.Computation, name: str) -> Iterator[tuple[hlo_text.Instruction, str]]:
    """Users of an array, seen through changes of its form."""
    for user in inner.users(name):
        if user.opcode in ("bitcast", "reshape", "copy"):
            yield from _through(inner, user.name)
        else:
            yield user, name


def _collective(
    at: hlo_text.Computation, one: hlo_text.Instruction, times: float
) -> Collective | None:
    kind = one.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    shapes = tuple(s for s in one.shapes if s.dims or kind == "all-reduce")
    read = sum(
        s.bytes
        for name in one.operands
        if name in at.instructions
        for s in at.instructions[name].shapes
    )
    results = sum(s.bytes for s in shapes)
    if one.opcode.endswith("-start"):  # its result is (operands, results, ...)
        results = results - read if results > read else results
    group = _group(one.rest)
    return Collective(
        kind, shapes, group, max(len(group), 1), times, max(read, results), one.source
    )


def _group(attributes: str) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the forms that XLA prints."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return tuple(map(int, pairs.groups()))
    plain = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if plain:
        return tuple(hlo_text.numbers(plain.group(1)))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = hlo_text.numbers(iota.group(1)), hlo_text.numbers(iota.group(2))
        order = hlo_text.numbers(iota.group(3)) if iota.group(3) else list(range(len(dims)))
        return _first_along(dims, order, shape[-1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    if named:
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        return _named_group(sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named.group(3)))
    return ()


def _named_group(sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> tuple[int, ...]:
    """Devices along some axes of a mesh; an axis may be cut: 'x':(before)size."""
    strides, stride = {}, 1
    for name, size in reversed(sizes.items()):
        strides[name], stride = stride, stride * size
    members = [0]
    for name, before, part in axes:
        count = int(part) if part else sizes[name]
        step = strides[name] * (sizes[name] // (int(before or 1) * count))
        members = [m + i * step for m in members for i in range(count)]
    return tuple(members)


def _first_along(dims: list[int], order: list[int], count: int) -> tuple[int, ...]:
    """The first `count` numbers of an iota of `dims`, transposed by `order`."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    members = [0]
    for axis in order:
        members = [m + i * strides[axis] for m in members for i in range(dims[axis])]
    return tuple(members[:count])
