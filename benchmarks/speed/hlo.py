"""What an optimized program does to the leaves of a tree, read from its text.

A program of XLA is a main computation and others that it calls. What a condition chooses between
runs rarely here (a norm that is out of range is measured again) and is counted by itself.
"""

import math
import re
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}


class Work(NamedTuple):
    """What a program does.

    Attributes:
        reductions: Reductions that read a whole leaf.
        reductions_rarely: Those that only a condition may choose.
        collectives: Exchanges between devices.
        kernels: Instructions of the main computation that compute or move something.
        leaf_bytes: Bytes of whole leaves that those read and write.
    """

    reductions: int
    reductions_rarely: int
    collectives: int
    kernels: int
    leaf_bytes: int


class _Instruction(NamedTuple):
    name: str
    shapes: list[tuple[str, int]]  # dtype and entries of each output
    operation: str
    operands: list[str]
    called: list[str]


def work(text: str, leaf_sizes: set[int]) -> Work:
    """Counts what a program does.

    Args:
        text: The optimized program, `compiled.as_text()`.
        leaf_sizes: Numbers of entries of the leaves: an array of such a size is taken for one.
    """
    computations, main = _computations(text)
    shapes = {x.name: x.shapes for body in computations.values() for x in body}

    def leaves(instruction: _Instruction) -> int:
        """Bytes of the leaves among operands and outputs."""
        read = [shape for name in instruction.operands for shape in shapes.get(name, [])]
        return sum(_bytes(*x) for x in read + instruction.shapes if x[1] in leaf_sizes)

    def reads_leaf(instruction: _Instruction) -> bool:
        if instruction.operation not in ("reduce", "reduce-window"):
            return False
        return any(size in leaf_sizes for _, size in shapes.get(instruction.operands[0], []))

    always = _reached(computations, main)
    by_place = {True: 0, False: 0}
    collectives = 0
    for name, body in computations.items():
        by_place[name in always] += sum(map(reads_leaf, body))
        collectives += sum(x.operation.removesuffix("-start") in _COLLECTIVES for x in body)
    running = [x for x in computations[main] if x.operation not in _FREE]
    # A condition hands leaves to the branch that it chooses, and reads none.
    moving = [x for x in running if x.operation != "conditional"]
    return Work(
        by_place[True], by_place[False], collectives, len(running), sum(map(leaves, moving))
    )


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    main = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            computations[current] = []
            main = current if head[1] else main
        elif current and (found := _INSTRUCTION.match(line)):
            name, outputs, operation, operands, rest = found.groups()
            sizes = [(kind, _entries(shape)) for kind, shape in _SHAPE.findall(outputs)]
            names = re.findall(r"%([\w.\-]+)", operands)
            computations[current].append(
                _Instruction(name, sizes, operation, names, _CALLED.findall(rest))
            )
    return computations, main


def _reached(computations: dict[str, list[_Instruction]], start: str) -> set[str]:
    """The computations that run at every step: branches of a condition are not followed."""
    reached, open_ends = {start}, [start]
    while open_ends:
        for instruction in computations[open_ends.pop()]:
            new = {x for x in instruction.called if x in computations} - reached
            reached |= new
            open_ends += new
    return reached


def _entries(shape: str) -> int:
    return math.prod(int(length) for length in shape.split(",") if length)


def _bytes(kind: str, entries: int) -> int:
    bits = re.search(r"\d+", kind)
    return entries * (max(int(bits[0]) // 8, 1) if bits else 1)
