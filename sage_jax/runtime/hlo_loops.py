"""How often the loops of a compiled program run, where their conditions say it."""

from __future__ import annotations

import math
import re

from sage_jax.runtime import hlo_text


def trip_count(
    computations: dict[str, hlo_text.Computation],
    at: hlo_text.Computation,
    one: hlo_text.Instruction,
) -> int | None:
    """How often a `while` runs its body; None where the text does not say.

    Args:
        computations: of the program, by name.
        at: the computation that the loop is in.
        one: the loop.
    """
    known = one.attribute(r'known_trip_count[^}]*?"?n"?:"?(\d+)')
    if known:
        return int(known)
    condition = computations.get(one.attribute(r"condition=%?([\w.\-]+)") or "")
    body = computations.get(one.attribute(r"body=%?([\w.\-]+)") or "")
    if condition is None or body is None:
        return None
    bound = _bound(condition, computations)
    if bound is None:
        return None
    index, limit = bound
    first = _constant(at, _element(at, one.operands[0], index)) or 0
    step = _increment(body, index, computations) or 1
    return max(0, math.ceil((limit - first) / step))


def _bound(
    condition: hlo_text.Computation, all_: dict[str, hlo_text.Computation]
) -> tuple[int, int] | None:
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


def _limit(at: hlo_text.Computation, name: str) -> int | None:
    return int(name[1:]) if name.startswith("=") else _constant(at, name)


def _origin(at: hlo_text.Computation, name: str) -> str:
    """Where an array comes from, seen through copies."""
    found = at.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert", "copy-done"):
        name = found.operands[0]
        found = at.instructions.get(name)
        if found is not None and found.opcode == "copy-start":
            name = found.operands[0]
            found = at.instructions.get(name)
    return name


def _constant(at: hlo_text.Computation, name: str | None) -> int | None:
    if name is None:
        return None
    found = at.instructions.get(_origin(at, name))
    if found is None or found.opcode != "constant":
        return None
    value = found.operands[0] if found.operands else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _element(at: hlo_text.Computation, name: str, index: int) -> str | None:
    """What an element of a tuple was made of."""
    found = at.instructions.get(_origin(at, name))
    if found is None or found.opcode != "tuple" or index >= len(found.operands):
        return None
    return found.operands[index]


def _increment(
    body: hlo_text.Computation, index: int, all_: dict[str, hlo_text.Computation]
) -> int | None:
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
