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

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5,
    "s2": 0.25, "u2": 0.25, "f4e2m1fn": 0.5,
}  # fmt: skip
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
class Shape:
    """One array of a program, without its layout."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # memory space; 0 = the device's main memory

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return self.size * BYTES.get(self.dtype, 1)  # f8 kinds and tokens


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, tuples flattened
    operands: tuple[str, ...]
    rest: str  # attributes, metadata and backend configuration

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression found among the attributes."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else None

    @property
    def source(self) -> str:
        """The path of the operation in the traced program."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass
class Computation:
    """A named block of instructions."""

    name: str
    instructions: dict[str, Instruction]
    root: str = ""

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read one."""
        return [i for i in self.instructions.values() if name in i.operands]


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
        self.computations, self.entry = _parse(text)
        self.keys = keys
        self.unknown_trips = unknown_trips
        self.unknown_loops: list[str] = []

    def walk(self) -> Iterator[tuple[Computation, Instruction, float, bool]]:
        """Every instruction that runs: its computation, how often, and whether inside a fusion."""
        yield from self._walk(self.computations[self.entry], 1.0, False)

    def _walk(self, computation: Computation, times: float, fused: bool) -> Iterator:
        for one in computation.instructions.values():
            yield computation, one, times, fused
            for name, factor, inside in self._called(computation, one):
                called = self.computations.get(name)
                if called is not None:
                    yield from self._walk(called, times * factor, fused or inside)

    def _called(self, at: Computation, one: Instruction) -> list[tuple[str, float, bool]]:
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
        one = at.instructions[name]
        known = one.attribute(r'known_trip_count[^}]*?"?n"?:"?(\d+)')
        if known:
            return int(known)
        condition = self.computations.get(one.attribute(r"condition=%?([\w.\-]+)") or "")
        body = self.computations.get(one.attribute(r"body=%?([\w.\-]+)") or "")
        if condition is None or body is None:
            return None
        bound = _bound(condition, self.computations)
        if bound is None:
            return None
        index, limit = bound
        first = _constant(at, _element(at, one.operands[0], index)) or 0
        step = _increment(body, index, self.computations) or 1
        return max(0, math.ceil((limit - first) / step))

    def _trips(self, at: Computation, one: Instruction) -> float:
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
            flops += times * _flops(at, one)
            if not fused:
                moved += times * self._traffic(at, one)
                cycles += times * float(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            found = _collective(at, one, times)
            if found is not None:
                # A collective spread over several fusions appears once in each of its parts.
                channel = one.attribute(r"channel_id=(\d+)") if fused else None
                sent[f"{found.kind} {channel}" if channel else f"{at.name} {one.name}"] = found
            if one.opcode == "custom-call":
                cost = _custom_cost(one) or _attention_cost(at, one, self.keys)
                if cost is not None:
                    flops += times * cost[0]
                elif "kernel" in one.rest or "tpu_custom_call" in one.rest:
                    opaque.append(one.source or one.name)
        return Totals(
            flops, moved, cycles, tuple(sent.values()), tuple(dict.fromkeys(opaque)),
            tuple(self.unknown_loops),
        )  # fmt: skip

    def arrays(self) -> Iterator[tuple[Instruction, Shape]]:
        """Every array that the program makes, also inside fusions."""
        for computation in self.computations.values():
            for one in computation.instructions.values():
                for shape in one.shapes:
                    yield one, shape

    def _traffic(self, at: Computation, one: Instruction) -> float:
        """Bytes of main memory that an operation reads and writes."""
        if one.opcode in _NO_TRAFFIC or one.opcode.endswith("-done"):
            return 0.0
        if one.opcode == "custom-call":
            cost = _custom_cost(one)
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
        self, at: Computation, one: Instruction, inner: Computation, written: float
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

    def _read(self, inner: Computation, number: int, size: float) -> float:
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


def _size(at: Computation, name: str) -> float:
    found = at.instructions.get(name)
    return sum(_main(shape) for shape in found.shapes) if found else 0.0


def _parameter(inner: Computation, number: int) -> str | None:
    """The name of a computation's parameter."""
    for inside in inner.instructions.values():
        if inside.opcode == "parameter" and inside.operands[0] == str(number):
            return inside.name
    return None


def _through(inner: Computation, name: str) -> Iterator[tuple[Instruction, str]]:
    """Users of an array, seen through changes of its form."""
    for user in inner.users(name):
        if user.opcode in ("bitcast", "reshape", "copy"):
            yield from _through(inner, user.name)
        else:
            yield user, name


# -- cost of one instruction ---------------------------------------------------------------------


def _flops(at: Computation, one: Instruction) -> float:
    if one.opcode == "dot":
        left = at.instructions[one.operands[0]].shapes[0].dims
        axes = _numbers(one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        return 2.0 * one.shapes[0].size * math.prod(left[axis] for axis in axes)
    if one.opcode == "convolution":
        return _convolution_flops(at, one)
    return 0.0


def _convolution_flops(at: Computation, one: Instruction) -> float:
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


def _custom_cost(one: Instruction) -> tuple[float, float] | None:
    """FLOPs and bytes that a kernel declares."""
    found = one.attribute(r'"cost_estimate":\{([^}]*)\}')
    if found is None:
        return None
    numbers = dict(re.findall(r'"(\w+)":"?(\d+)', found))
    return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0))


def _attention_cost(at: Computation, one: Instruction, keys: float) -> tuple[float, float] | None:
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


def _collective(at: Computation, one: Instruction, times: float) -> Collective | None:
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
        return tuple(_numbers(plain.group(1)))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = _numbers(iota.group(1)), _numbers(iota.group(2))
        order = _numbers(iota.group(3)) if iota.group(3) else list(range(len(dims)))
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


# -- loops ---------------------------------------------------------------------------------------


def _bound(condition: Computation, all_: dict[str, Computation]) -> tuple[int, int] | None:
    """Which element of the carry counts, and the limit that it stays below."""
    root = condition.instructions[condition.root]
    operands, opcode, rest = root.operands, root.opcode, root.rest
    if opcode == "fusion":
        inner = all_.get(root.attribute(r"calls=%?([\w.\-]+)") or "")
        if inner is None:
            return None
        root = inner.instructions[inner.root]
        opcode, rest = root.opcode, root.rest
        if opcode != "compare":
            return None
        found: list[str] = []
        for name in root.operands:  # the fusion's parameters, in terms of its operands
            inside = inner.instructions[name]
            if inside.opcode != "parameter":
                constant = _constant(inner, name)
                found.append("" if constant is None else f"={constant}")
            else:
                found.append(operands[int(re.sub(r"\D", "", inside.operands[0]))])
        operands = tuple(found)
    if opcode != "compare" or len(operands) != 2:
        return None
    direction = re.search(r"direction=(\w+)", rest)
    limit = _limit(condition, operands[1])
    counter = condition.instructions.get(_origin(condition, operands[0]))
    if counter is None or counter.opcode != "get-tuple-element" or limit is None:
        return None
    if direction is None or direction.group(1) not in ("LT", "NE", "LE"):
        return None
    index = int(counter.attribute(r"index=(\d+)") or 0)
    return index, limit + (direction.group(1) == "LE")


def _limit(at: Computation, name: str) -> int | None:
    return int(name[1:]) if name.startswith("=") else _constant(at, name)


def _origin(at: Computation, name: str) -> str:
    """Where an array comes from, seen through copies."""
    found = at.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert", "copy-done"):
        name = found.operands[0]
        found = at.instructions.get(name)
        if found is not None and found.opcode == "copy-start":
            name = found.operands[0]
            found = at.instructions.get(name)
    return name


def _constant(at: Computation, name: str | None) -> int | None:
    if name is None:
        return None
    found = at.instructions.get(_origin(at, name))
    if found is None or found.opcode != "constant":
        return None
    value = found.operands[0] if found.operands else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _element(at: Computation, name: str, index: int) -> str | None:
    """What an element of a tuple was made of."""
    found = at.instructions.get(_origin(at, name))
    if found is None or found.opcode != "tuple" or index >= len(found.operands):
        return None
    return found.operands[index]


def _increment(body: Computation, index: int, all_: dict[str, Computation]) -> int | None:
    """By how much a body advances an element of its carry."""
    made = _element(body, body.root, index)
    found = body.instructions.get(_origin(body, made)) if made else None
    if found is not None and found.opcode == "fusion":
        inner = all_.get(found.attribute(r"calls=%?([\w.\-]+)") or "")
        if inner is None:
            return None
        root = inner.instructions[inner.root]
        if root.opcode != "add":
            return None
        for name in root.operands:
            inside = inner.instructions[name]
            if inside.opcode == "constant":
                return _constant(inner, name)
            if inside.opcode == "parameter":
                outer = found.operands[int(re.sub(r"\D", "", inside.operands[0]))]
                value = _constant(body, outer)
                if value is not None:
                    return value
        return None
    if found is None or found.opcode != "add":
        return None
    steps = [_constant(body, name) for name in found.operands]
    return next((s for s in steps if s is not None), None)


# -- text ----------------------------------------------------------------------------------------

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += text[place] in "({["
        depth -= text[place] in ")}]"
        if not depth:
            return place + 1
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        numbers = _numbers(dims.replace("<=", ""))
        found.append(Shape(dtype, tuple(numbers), int(space.group(1)) if space else 0))
    return tuple(found)


def _instruction(line: str) -> tuple[bool, Instruction] | None:
    head = _LINE.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    opcode, closing = rest[:opening], _closing(rest, opening)
    inside = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing - 1])
    if opcode in ("parameter", "constant"):
        operands: tuple[str, ...] = (inside.strip(),)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
            part.strip().split(" ")[-1] for part in inside.split(",") if part.strip()
        )
    one = Instruction(head.group(2), opcode, _shapes(kind), operands, rest[closing:])
    return head.group(1) is not None, one


def _joined(text: str) -> Iterator[str]:
    """Lines, with the attributes of an instruction that go on in the next ones."""
    held = ""
    for line in text.splitlines():
        if _LINE.match(line) or _HEAD.match(line) or line.rstrip() == "}" or not line:
            if held:
                yield held
            held = line
        else:
            held += line
    yield held


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _joined(text):
        head = _HEAD.match(line)
        if head:
            current = Computation(head.group(2), {})
            computations[current.name] = current
            entry = current.name if head.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None:
            found = _instruction(line)
            if found is not None:
                is_root, one = found
                current.instructions[one.name] = one
                current.root = one.name if is_root else current.root
    if not entry:
        raise ValueError("The text holds no ENTRY computation. Give Compiled.as_text().")
    return computations, entry
