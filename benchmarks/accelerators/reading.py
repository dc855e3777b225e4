"""What an optimized program does, read from its text, `compiled.as_text()`."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_FREE = {"after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
_FREE_CALLS = ("ConcatBitcast",)  # on a TPU: arrays that lie one after the other anyway
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class Reading(NamedTuple):
    """What a program does.

    Attributes:
        bytes: Read from and written to the device's memory. On a TPU without what stays on the
            chip.
        kernels: Instructions that compute or move something.
        conditionals: Those that choose a branch.
        cycles: What the TPU's compiler expects; 0 elsewhere.
        collectives: How often each of `COLLECTIVES` runs.
    """

    bytes: float = 0.0
    kernels: int = 0
    conditionals: int = 0
    cycles: int = 0
    collectives: Mapping[str, int] = MappingProxyType({})

    def plus(self, other: "Reading") -> "Reading":
        """Both, one after the other."""
        together = Counter(self.collectives) + Counter(other.collectives)
        return Reading(
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.conditionals + other.conditionals,
            self.cycles + other.cycles,
            together,
        )


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: list[str]
    attributes: str


def read(text: str) -> Reading:
    """Counts what the main computation does, and what it calls."""
    computations, main = _computations(text)

    def of(name: str) -> Reading:
        total, types = Reading(), {x.name: x.type for x in computations[name]}
        for x in computations[name]:
            if x.operation == "conditional":
                branches = [
                    of(branch)
                    for branch in _called(
                        x, "branch_computations|true_computation|false_computation"
                    )
                ]
                cheaper = min(branches, key=lambda branch: (branch.bytes, branch.kernels))
                total = total.plus(cheaper).plus(Reading(kernels=1, conditionals=1))
            elif x.operation in ("call", "while"):
                for called in _called(x, "to_apply|body"):
                    total = total.plus(of(called))
            elif not _is_free(x):
                total = total.plus(_of_one(x, types))
        return total

    return of(main)


_BRANCHES = "branch_computations|true_computation|false_computation"


def _of_one(x: _Instruction, types: dict[str, str]) -> Reading:
    kind = x.operation.removesuffix("-start")
    expected = re.search(r'"estimated_cycles":"?(\d+)', x.attributes)
    return Reading(
        bytes=_moved(x, types),
        kernels=1,
        cycles=int(expected[1]) if expected else 0,
        collectives=Counter([kind] if kind in COLLECTIVES else []),
    )


def _moved(x: _Instruction, types: dict[str, str]) -> float:
    if x.operation in ("copy-start", "slice-start"):
        # (target, source, ...) and ((source), target, ...): what arrives, off the chip or on it.
        arrays = _SHAPE.findall(x.type)
        target = arrays[0 if x.operation == "copy-start" else 1]
        return _bytes(*target[:2]) * (1 if _on_chip(target[2]) else 2)
    return _size(x.type) + sum(_size(types.get(name, "")) for name in x.operands)


def _is_free(x: _Instruction) -> bool:
    if x.operation == "custom-call":
        return any(f'"{name}"' in x.attributes for name in _FREE_CALLS)
    return x.operation in _FREE or x.operation.endswith("-done")


def _called(x: _Instruction, keys: str) -> list[str]:
    found = re.findall(rf"(?:{keys})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", x.attributes)
    return [name for some in found for name in re.findall(r"[\w.\-]+", some[0] or some[1])]


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    main = current = ""
    for line in text.splitlines():
        if not current:
            if head := _HEAD.match(line):
                current = head[2]
                computations[current] = []
                main = current if head[1] else main
        elif line.startswith("}"):
            current = ""
        elif found := _INSTRUCTION.match(line):
            computations[current].append(_instruction(*found.groups()))
    return computations, main


def _instruction(name: str, rest: str) -> _Instruction:
    """Of "type operation(operands), attributes" the parts."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start:end])
    return _Instruction(name, shapes, rest[:start], operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"a bracket is not closed: {text[start : start + 80]}")


def _size(shapes: str) -> float:
    """Bytes in the device's memory of all arrays of a type."""
    found = _SHAPE.findall(shapes)
    return sum(_bytes(kind, dims) for kind, dims, layout in found if not _on_chip(layout))


def _on_chip(layout: str) -> bool:
    return "S(1)" in layout


def _bytes(kind: str, dims: str) -> float:
    bits = re.search(r"\d+", kind)
    width = 8 if kind == "pred" else int(bits[0]) if bits else 0
    return math.prod(int(length) for length in dims.split(",") if length) * width / 8
