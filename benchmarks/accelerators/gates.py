"""The limits for accelerators in `benchmarks/gates.toml`, and whether they hold."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed.gates import FILE

LIMITS = ("passes", "kernels", "temporaries", "cycles", "operations")


class Gate(NamedTuple):
    """Limits of some methods on one device, on the tree of 16 leaves, or on a slice.

    Attributes:
        device: Name of the target.
        methods: Whom it binds.
        limits: From one of `LIMITS` to the largest value: `passes`, `kernels` and `temporaries` (a
            share of the gradient) as they are, `cycles` and `operations` over Optax's.
        missed: Why some are known not to hold, by method.
    """

    device: str
    methods: tuple[str, ...]
    limits: Mapping[str, float]
    missed: Mapping[str, str]


def load(file: Path = FILE) -> list[Gate]:
    """The gates of a file.

    Raises:
        ValueError: If one of them says what there is not.
    """
    found = []
    for entry in tomllib.loads(file.read_text(encoding="utf-8")).get("accelerator", []):
        unknown = entry.keys() - {"device", "methods", "missed", *LIMITS}
        if unknown:
            raise ValueError(f"{file}: there is no {sorted(unknown)[0]!r} in [[accelerator]]")
        limits = {name: entry[name] for name in LIMITS if name in entry}
        found.append(
            Gate(entry["device"], tuple(entry["methods"]), limits, entry.get("missed", {}))
        )
    return found


def broken(device: str, name: str, ours: Any, optax: Any, gates: list[Gate]) -> list[str]:
    """What does not hold of one method, a phrase each.

    Whatever its limits, nothing is conditional, and on a slice nothing is gathered or exchanged and
    devices talk no more often than with Optax.
    """
    values = {
        "passes": ours["passes"],
        "kernels": ours["kernels"],
        "temporaries": ours["temporary_share"],
        "cycles": ours["cycles"] / optax["cycles"] if optax["cycles"] else 0.0,
        "operations": ours["kernels"] / optax["kernels"],
    }
    said = []
    for gate in gates:
        if gate.device == device and name in gate.methods:
            for limit, most in gate.limits.items():
                if values[limit] > most:
                    said.append(f"{limit} {values[limit]:.3g}, at most {most:g}")
    if ours["conditionals"] and device.endswith("h100"):
        said.append("conditionals")
    for kind, count in ours["collectives"].items():
        most = optax["collectives"].get(kind, 0) if kind == "all-reduce" else 0
        if count > most:
            said.append(f"{count} {kind}, at most {most}")
    return said


def known(device: str, name: str, gates: list[Gate]) -> str:
    """Why a gate of a method is known not to hold; "" where it should."""
    of_it = (gate for gate in gates if gate.device == device and name in gate.missed)
    return next((gate.missed[name] for gate in of_it), "")
