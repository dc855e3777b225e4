"""Whether the limits of `gates.toml` hold.

A time is judged by the median over all rounds of all attempts. Not by the best attempt: the best
of three is below a limit by luck the more often the noisier the machine is. After an attempt the
gates are settled whose limit lies outside the 95% interval of the median, on whichever side; the
others are run again, three times in all, and then the median decides. So a busy machine costs
time, and favors neither answer.

A thousand leaves take up to minutes to compile, so there one pair is the attempt, and it is
repeated only while the median is within a factor `CLOSE` of the limit. One pair is off by that
much only where other processes take most of the machine.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.speed import contenders, programs, race, trees
from benchmarks.speed.contenders import Contender
from benchmarks.speed.gates import Gate
from benchmarks.speed.measuring import Tick
from benchmarks.speed.programs import Program
from benchmarks.speed.trees import Tree

ATTEMPTS = 3
CLOSE = 2

Measured = dict[tuple[Gate, str], dict[str, Any]]
"""What was measured for a gate and a contender."""


def judge(gates: list[Gate], rounds: int, tick: Tick = lambda what: None) -> list[dict[str, Any]]:
    """Measures what the gates need, and no more.

    Args:
        gates: The limits.
        rounds: Rounds of an attempt at a time.
        tick: Called with what was done.

    Returns:
        For each gate and contender what was measured and whether it holds, in order.
    """
    found: Measured = {}
    by_place: dict[tuple[str, str], list[Gate]] = defaultdict(list)
    for gate in gates:
        by_place[gate.place].append(gate)
    for (tree_name, dtype), here in by_place.items():
        found |= _found(trees.named(tree_name), dtype, here, rounds, tick)
    return [
        {
            "gate": gate.name,
            "measure": gate.measure,
            "contender": name,
            "against": gate.against,
            "tree": gate.tree,
            "dtype": gate.dtype,
            "limit": gate.limit,
            "why": gate.why,
            "missed": gate.missed,
            **found[gate, name],
            "holds": bool(found[gate, name]["measured"] <= gate.limit),
        }
        for gate in gates
        for name in gate.contenders
    ]


def _found(tree: Tree, dtype: str, gates: list[Gate], rounds: int, tick: Tick) -> Measured:
    """What the gates of one tree and dtype measure."""
    found: Measured = {}
    built = [gate for gate in gates if gate.measure != "compile time"]
    made: dict[str, Program] = {}
    for contender in _needed(built):
        made[contender.name] = programs.build(contender, tree, dtype)
        tick(f"{tree.title}, {dtype}: {contender.name} compiled")
    size = tree.entries * jax.numpy.dtype(dtype).itemsize
    for gate in built:
        for name in gate.contenders if gate.measure != "time" else ():
            found[gate, name] = {"measured": _static(gate, made, name, size)}
    timed = [gate for gate in built if gate.measure == "time"]
    if timed:
        arena = race.Arena(tree, dtype)
        steps = {x.name: arena.step_of(made[x.name]) for x in _needed(timed)}
        found |= _timed(timed, steps, rounds, lambda: tick(f"{tree.title}, {dtype}: rounds"))
    compiled = [gate for gate in gates if gate.measure == "compile time"]
    found |= _compile_times(compiled, tree, dtype, tick)
    return found


def _needed(gates: list[Gate]) -> list[Contender]:
    names = {name for gate in gates for name in (*gate.contenders, gate.against)}
    return [contender for name, contender in contenders.known().items() if name in names]


def _static(gate: Gate, made: dict[str, Program], name: str, gradient_bytes: int) -> float:
    """What compiling told."""
    if gate.measure == "temporary memory":
        return made[name].temporary_bytes / gradient_bytes
    one, other = made[name].bytes_accessed, made[gate.against].bytes_accessed
    if one is None or other is None:
        raise ValueError(f"{gate.name}: XLA does not tell the bytes accessed on this device")
    return one / other


def _timed(
    gates: list[Gate], steps: dict[str, Callable[[], None]], rounds: int, tick: Callable[[], Any]
) -> Measured:
    ratios: dict[tuple[Gate, str], list[float]] = defaultdict(list)
    unsettled = [(gate, name) for gate in gates for name in gate.contenders]
    for attempt in range(ATTEMPTS):
        names = {x for gate, name in unsettled for x in (name, gate.against)}
        if not names:
            break
        seconds = race.take_turns(
            {name: step for name, step in steps.items() if name in names},
            rounds,
            seed=attempt,
            tick=tick,
        )
        for gate, name in unsettled:
            ratios[gate, name] += race.paired(seconds, name, gate.against)
        unsettled = [(gate, name) for gate, name in unsettled if _open(ratios[gate, name], gate)]
    return {
        key: {
            "measured": race.median(values),
            "interval": list(race.interval(values)),
            "rounds": len(values),
        }
        for key, values in ratios.items()
    }


def _open(ratios: list[float], gate: Gate) -> bool:
    low, high = race.interval(ratios)
    return low <= gate.limit <= high


def _compile_times(gates: list[Gate], tree: Tree, dtype: str, tick: Tick) -> Measured:
    ratios: dict[tuple[Gate, str], list[float]] = defaultdict(list)
    unsettled = [(gate, name) for gate in gates for name in gate.contenders]
    for _ in range(ATTEMPTS):
        names = {x for gate, name in unsettled for x in (name, gate.against)}
        seconds: race.Seconds = {}
        for name in sorted(names):
            program = programs.build(contenders.known()[name], tree, dtype)
            seconds[name] = [program.lowering_seconds + program.compile_seconds]
            tick(f"{tree.title}, {dtype}: {name} compiled")
        for gate, name in unsettled:
            ratios[gate, name] += race.paired(seconds, name, gate.against)
        unsettled = [key for key in unsettled if _close(ratios[key], key[0].limit)]
    return {
        key: {"measured": race.median(values), "rounds": len(values), "ratios": values}
        for key, values in ratios.items()
    }


def _close(ratios: list[float], limit: float) -> bool:
    return limit / CLOSE <= race.median(ratios) <= limit * CLOSE
