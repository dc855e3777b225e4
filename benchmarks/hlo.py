"""The text of an optimized program, `compiled.as_text()`, as instructions."""

import math
import re
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
FREE = {"after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
"""What neither computes nor moves anything."""


class Instruction(NamedTuple):
    """One line.

    Attributes:
        name: Its name.
        type: Its type, as text; see `arrays`.
        operation: What it does.
        operands: The names of what it reads.
        attributes: The rest of the line.
    """

    name: str
    type: str
    operation: str
    operands: list[str]
    attributes: str

    def called(self, keys: str) -> list[str]:
        """The computations that it calls, by attributes of these names ("a|b")."""
        found = re.findall(rf"(?:{keys})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return [name for some in found for name in re.findall(r"[\w.\-]+", some[0] or some[1])]


class Array(NamedTuple):
    """An array of a type.

    Attributes:
        entries: How many.
        bytes: Its size.
        layout: What stands in braces behind its shape.
    """

    entries: int
    bytes: float
    layout: str


def arrays(type_: str) -> list[Array]:
    """The arrays of a type, which may be a tuple."""
    found = []
    for kind, dims, layout in _SHAPE.findall(type_):
        bits = re.search(r"\d+", kind)
        width = 8 if kind == "pred" else int(bits[0]) if bits else 0
        entries = math.prod(int(length) for length in dims.split(",") if length)
        found.append(Array(entries, entries * width / 8, layout))
    return found


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the main one."""
    found: dict[str, list[Instruction]] = {}
    main = current = ""
    for line in text.splitlines():
        if not current:
            if head := _HEAD.match(line):
                current = head[2]
                found[current] = []
                main = current if head[1] else main
        elif line.startswith("}"):
            current = ""
        elif instruction := _INSTRUCTION.match(line):
            found[current].append(_instruction(*instruction.groups()))
    return found, main


def _instruction(name: str, rest: str) -> Instruction:
    """Of "type operation(operands), attributes" the parts."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start:end])
    return Instruction(name, shapes, rest[:start], operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"a bracket is not closed: {text[start : start + 80]}")
