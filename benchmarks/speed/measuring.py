"""All figures of one tree in one dtype, as JSON has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.speed import machine, programs, race, torch_side
from benchmarks.speed.contenders import FLOOR, GLOBAL, SGD, Contender
from benchmarks.speed.programs import Program
from benchmarks.speed.trees import Tree

OPTAX = "optax"
REFERENCES = (SGD, FLOOR, OPTAX, GLOBAL)
"""What times are divided by; "optax" is Optax's method of the same meaning."""

PROFILED_ROUNDS = 3

Tick = Callable[[str], Any]


def measure(
    tree: Tree,
    dtype: str,
    contenders: list[Contender],
    rounds: int,
    tick: Tick = lambda what: None,
    profile: Path | None = None,
    with_torch: bool = True,
) -> dict[str, Any]:
    """Compiles all contenders and has them take turns.

    Args:
        tree: The parameters.
        dtype: Of parameters and gradient.
        contenders: Who; SGD, the floor and the clip by the global norm are among them.
        rounds: How many steps each is timed for.
        tick: Called with what was done, once for each contender and each round.
        profile: A folder for the trace of some further rounds.
        with_torch: Whether PyTorch takes part, where it is installed.
    """
    arena = race.Arena(tree, dtype)
    built: dict[str, Program] = {}
    steps: dict[str, Callable[[], None]] = {}
    for contender in contenders:
        program = built[contender.name] = programs.build(contender, tree, dtype)
        steps[contender.name] = arena.step_of(program)
        tick(f"{contender.name} compiled")
    seconds = race.take_turns(steps, rounds, tick=lambda: tick("rounds"))
    if profile is not None:
        with jax.profiler.trace(str(profile)):
            race.take_turns(steps, PROFILED_ROUNDS)
    in_torch = torch_side.step_of(tree, dtype) if with_torch else None
    if in_torch is not None:
        # Afterwards: PyTorch's threads keep waiting for work, which slows the next step of JAX.
        seconds |= race.take_turns({torch_side.NAME: in_torch}, rounds)
    size = tree.entries * jax.numpy.dtype(dtype).itemsize
    counterparts = {x.name: x.counterpart for x in contenders}
    counterparts[torch_side.NAME] = None
    return {
        "tree": tree.name,
        "title": f"{tree.title}, {dtype}",
        "dtype": dtype,
        "parameters": tree.entries,
        "leaves": len(tree.shapes),
        "gradient_bytes": size,
        "rounds": rounds,
        "contenders": {
            name: {
                "milliseconds": race.spread([1e3 * x for x in seconds[name]])._asdict(),
                "ratios": _ratios(seconds, name, counterparts[name]),
                "seconds": [round(x, 7) for x in seconds[name]],
                **(figures(built[name], size) if name in built else {}),
            }
            for name in seconds
        },
        # Read and written at the least: the gradient twice, the parameters, and those again.
        "floor_bytes_per_second": 4 * size / race.median(seconds[FLOOR]),
    }


def figures(program: Program, gradient_bytes: int) -> dict[str, Any]:
    """What compiling told; shares and passes are multiples of the gradient's size."""
    accessed = program.bytes_accessed
    return {
        "temporary_bytes": program.temporary_bytes,
        "temporary_share": program.temporary_bytes / gradient_bytes,
        "bytes_accessed": accessed,
        "accessed_share": None if accessed is None else accessed / gradient_bytes,
        "passes": program.work.leaf_bytes / gradient_bytes,
        "reductions": program.work.reductions,
        "reductions_rarely": program.work.reductions_rarely,
        "collectives": program.work.collectives,
        "kernels": program.work.kernels,
        "lowering_seconds": program.lowering_seconds,
        "compile_seconds": program.compile_seconds,
    }


def header(device: Any, command: list[str], entries: int) -> dict[str, Any]:
    """What stands above all tables."""
    return {
        "benchmark": "speed",
        "command": command,
        "machine": machine.description(device) | {"torch": torch_side.version()},
        "bandwidth": machine.bandwidth(entries),
    }


def _ratios(seconds: race.Seconds, name: str, counterpart: str | None) -> dict[str, Any]:
    names = {x: counterpart if x == OPTAX else x for x in REFERENCES}
    return {
        reference: race.spread(race.paired(seconds, name, against))._asdict()
        for reference, against in names.items()
        if against in seconds
    }
