"""Reads the text of a compiled XLA program into computations of instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5,
    "s2": 0.25, "u2": 0.25, "f4e2m1fn": 0.5,
}  # fmt: skip


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


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


def numbers(text: str) -> list[int]:
    """The numbers of a list with commas."""
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
        sizes = numbers(dims.replace("<=", ""))
        found.append(Shape(dtype, tuple(sizes), int(space.group(1)) if space else 0))
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


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one that runs.

    Raises:
        ValueError: none of them is said to be the one that runs.
    """
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
