"""What an optimized program does to the leaves of a tree, read from its text.

A program of XLA is a main computation and others that it calls. What a condition chooses between
runs rarely here (a norm that is out of range is measured again) and is counted by itself.
"""

from typing import NamedTuple

from benchmarks import hlo

_CALLED = "calls|to_apply|body|condition"


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


def work_of(text: str, leaf_sizes: set[int]) -> Work:
    """Counts what a program does.

    Args:
        text: The optimized program, `compiled.as_text()`.
        leaf_sizes: Numbers of entries of the leaves: an array of such a size is taken for one.
    """
    computations, main = hlo.computations(text)
    arrays = {x.name: hlo.arrays(x.type) for body in computations.values() for x in body}

    def leaves(x: hlo.Instruction) -> float:
        """Bytes of the leaves among operands and outputs."""
        moved = [array for name in [x.name, *x.operands] for array in arrays.get(name, [])]
        return sum(array.bytes for array in moved if array.entries in leaf_sizes)

    def reads_leaf(x: hlo.Instruction) -> bool:
        if x.operation not in ("reduce", "reduce-window"):
            return False
        return any(array.entries in leaf_sizes for array in arrays.get(x.operands[0], []))

    always = _reached(computations, main)
    by_place = {True: 0, False: 0}
    collectives = 0
    for name, body in computations.items():
        by_place[name in always] += sum(map(reads_leaf, body))
        collectives += sum(x.operation.removesuffix("-start") in hlo.COLLECTIVES for x in body)
    running = [x for x in computations[main] if x.operation not in hlo.FREE]
    # A condition hands leaves to the branch that it chooses, and reads none.
    moving = [x for x in running if x.operation != "conditional"]
    return Work(
        by_place[True], by_place[False], collectives, len(running), int(sum(map(leaves, moving)))
    )


def _reached(computations: dict[str, list[hlo.Instruction]], start: str) -> set[str]:
    """The computations that run at every step: branches of a condition are not followed."""
    reached, open_ends = {start}, [start]
    while open_ends:
        for instruction in computations[open_ends.pop()]:
            new = {x for x in instruction.called(_CALLED) if x in computations} - reached
            reached |= new
            open_ends += new
    return reached
