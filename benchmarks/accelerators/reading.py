"""What an optimized program does, read from its text, `compiled.as_text()`."""

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from benchmarks import hlo

_FREE_CALLS = ("ConcatBitcast",)  # on a TPU: arrays that lie one after the other anyway
_BRANCHES = "branch_computations|true_computation|false_computation"


class Reading(NamedTuple):
    """What a program does.

    Attributes:
        bytes: Read from and written to the device's memory. On a TPU without what stays on the
            chip.
        kernels: Instructions that compute or move something.
        conditionals: Those that choose a branch.
        cycles: What the TPU's compiler expects; 0 elsewhere.
        collectives: How often each of `hlo.COLLECTIVES` runs.
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


def read(text: str) -> Reading:
    """Counts what the main computation does, and what it calls."""
    computations, main = hlo.computations(text)

    def of(name: str) -> Reading:
        total, types = Reading(), {x.name: x.type for x in computations[name]}
        for x in computations[name]:
            if x.operation == "conditional":
                branches = map(of, x.called(_BRANCHES))
                cheaper = min(branches, key=lambda branch: (branch.bytes, branch.kernels))
                total = total.plus(cheaper).plus(Reading(kernels=1, conditionals=1))
            elif x.operation in ("call", "while"):
                for called in x.called("to_apply|body"):
                    total = total.plus(of(called))
            elif not _is_free(x):
                total = total.plus(_of_one(x, types))
        return total

    return of(main)


def _of_one(x: hlo.Instruction, types: dict[str, str]) -> Reading:
    kind = x.operation.removesuffix("-start")
    expected = re.search(r'"estimated_cycles":"?(\d+)', x.attributes)
    return Reading(
        bytes=_moved(x, types),
        kernels=1,
        cycles=int(expected[1]) if expected else 0,
        collectives=Counter([kind] if kind in hlo.COLLECTIVES else []),
    )


def _moved(x: hlo.Instruction, types: dict[str, str]) -> float:
    if x.operation in ("copy-start", "slice-start"):
        # (target, source, ...) and ((source), target, ...): what arrives, off the chip or on it.
        target = hlo.arrays(x.type)[0 if x.operation == "copy-start" else 1]
        return target.bytes * (1 if _on_chip(target) else 2)
    return _size(x.type) + sum(_size(types.get(name, "")) for name in x.operands)


def _is_free(x: hlo.Instruction) -> bool:
    if x.operation == "custom-call":
        return any(f'"{name}"' in x.attributes for name in _FREE_CALLS)
    return x.operation in hlo.FREE or x.operation.endswith("-done")


def _size(type_: str) -> float:
    """Bytes in the device's memory of all arrays of a type."""
    return sum(x.bytes for x in hlo.arrays(type_) if not _on_chip(x))


def _on_chip(array: hlo.Array) -> bool:
    return "S(1)" in array.layout
