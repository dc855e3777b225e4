"""Methods at work: compiled once, warmed up, read, and compared with their clips."""

import copy
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from oracles import clips, methods

import optclip
from helpers import strategies
from helpers.registry import METHODS, Method
from helpers.samples import quick_jit
from optclip.testing._samples import ROUNDOFF, is_flushed, slack


def each(wanted: Callable[[Method], bool]) -> Any:
    """One test for each method that is `wanted`."""
    return pytest.mark.parametrize("method", list(filter(wanted, METHODS)), ids=str)


each_method = each(lambda method: True)
each_method_with_numbers = each(lambda method: bool(method.traced))
each_method_without_memory = each(lambda method: not method.has_memory)
each_method_with_a_threshold = each(lambda method: bool(method.traced) and not method.has_memory)
each_method_with_detail = each(lambda m: m.takes("detail"))


LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)
WARM_UP = 60
"""Ordinary steps that a method with memory has seen before it is put to the test."""

DEFAULTS = {"nonfinite": "propagate", "detail": False}

_PROGRAMS: dict[Any, Any] = {}


def compiled(method: Method, **changes: Any) -> Any:
    """The method's `update`, compiled; the same function for the same arguments."""
    changes = {name: value for name, value in changes.items() if DEFAULTS[name] != value}
    key = (str(method), *sorted(changes.items()))
    if key not in _PROGRAMS:
        _PROGRAMS[key] = quick_jit(method.build(**changes).update)
    return _PROGRAMS[key]


def compiled_with_traced_arguments(method: Method) -> Any:
    """`update` as a function of the method's traced arguments too, compiled."""
    key = (str(method), "traced")
    if key not in _PROGRAMS:
        _PROGRAMS[key] = quick_jit(
            lambda arguments, updates, state, params: method.build(**arguments).update(
                updates, state, params
            )
        )
    return _PROGRAMS[key]


class Start(NamedTuple):
    """Where a test begins.

    Attributes:
        params: Ordinary parameters.
        state: The method's state: a fresh one, or after `WARM_UP` ordinary steps.
        oracle: The oracle in the same place.
    """

    params: Any
    state: Any
    oracle: clips.Clip


def start(method: Method, tree: str, **changes: Any) -> Start:
    """A beginning for one of `strategies.TREES`.

    Entries are about 0.1 while a method warms up, so that those about 1 come as a spike.
    """
    found = _started(str(method), tree, tuple(sorted(changes.items())))
    return found._replace(oracle=copy.deepcopy(found.oracle))


@functools.cache
def _started(name: str, tree: str, changes: tuple[tuple[str, Any], ...]) -> Start:
    method = next(method for method in METHODS if str(method) == name)
    specs = strategies.TREES[tree]
    params = strategies.parameters(specs)
    update = compiled(method, **dict(changes))
    state, oracle = method.build(**dict(changes)).init(params), methods.oracle_of(method)
    for seed in range(WARM_UP if method.has_memory else 0):
        gradient = strategies.values(specs, seed=seed, scale=0.1)
        _, state = update(gradient, state, params)
        oracle.step(gradient, params)
    return Start(params, state, oracle)


def clip_state(state: Any) -> optclip.ClipState:
    """The one `ClipState` in a method's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optclip.ClipState))
    (found,) = [node for node in nodes if isinstance(node, optclip.ClipState)]
    return found


def readings(state: Any) -> dict[str, float]:
    """What `metrics` says about a method, without its prefix."""
    found = optclip.metrics(state).items()
    return {
        name.removeprefix("clip/"): float(value) for name, value in found if name[:5] == "clip/"
    }


def held(norms: Any) -> np.ndarray:
    """Norms as a float32 holds them: at most the largest."""
    return np.minimum(np.asarray(norms, np.float64), LARGEST)


def assert_right(actual: Any, expected: Any, rtol: float = 1e-5, where: str = "") -> None:
    """Numbers within `rtol`; what is below the normal float32 numbers may be flushed to zero."""
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected), rtol=rtol, atol=TINY, err_msg=where
    )


def assert_entries_right(
    actual: Any, expected: Any, rtol: float = 1e-5, rounding: Mapping[int, float] | None = None
) -> None:
    """Every entry within `rtol` and its type's roundoff; subnormal ones within a half step.

    `rounding` is what else is allowed in the leaves at some places.
    """
    pairs = zip(clips.leaves_with_paths(actual), jax.tree.leaves(expected), strict=True)
    for place, ((path, leaf), right) in enumerate(pairs):
        if clips.takes_part(leaf):
            off = np.abs(clips.wide(leaf) - right)
            allowed = (rtol + ROUNDOFF[leaf.dtype.name]) * np.abs(right) + slack(leaf.dtype)
            allowed += (rounding or {}).get(place, 0)
            worst = np.argmax(off - allowed)
            assert np.all(off <= allowed), (
                f"{path}: {clips.wide(leaf).flat[worst]} where {np.ravel(right)[worst]} is right"
            )


def assert_as_the_oracle(
    method: Method, before: Any, updates: Any, state: Any, outcome: clips.Outcome
) -> None:
    """The updates and readings of a step, `before` being the state that it started from."""
    rtol = 1e-4 if method.has_memory else 1e-5
    assert_entries_right(updates, outcome.updates, rtol, outcome.rounding)
    read = readings(state)
    for name, right in (
        ("norm", held(outcome.norm)),
        ("clipped_norm", held(outcome.clipped_norm)),
        ("threshold", min(outcome.thresholds)),
        ("factor", min(outcome.factors)),
    ):
        if not math.isnan(right):
            assert_right(read[name], right, rtol, name)
    rate, steps = readings(before)["clip_rate"], int(clip_state(before).steps)
    rate += (outcome.share - rate) / (steps + 1)
    assert_right(read["clip_rate"], rate, rtol, "clip_rate")


def passes_over_leaves(function: Any, *args: Any) -> int:
    """How many reductions of the program read a whole leaf, and no mere vector of norms."""
    text = quick_jit(function).lower(*args).compile().as_text()
    shapes = dict(re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", text))
    read = re.findall(r" reduce(?:-window)?\((%[\w.\-]+)", text)
    return sum(math.prod(map(int, filter(None, shapes[x].split(",")))) >= 300 for x in read)


def in_one(norms: Any) -> np.ndarray:
    """Norms in a state's detail as one vector; those of labels in the labels' order."""
    return np.concatenate([np.atleast_1d(x) for x in jax.tree.leaves(norms)] or [np.zeros(0)])


def bound_of(begin: Start, tree: Any, group: clips.Group, threshold: float) -> float:
    """How large the norm of a clipped group may be once its entries are rounded to their types.

    The threshold, its entries' roundoff, and half a step for each of those too small for that.
    """
    leaves, structure = jax.tree.flatten(tree)
    steps = [np.full(np.shape(x), 0.0 if is_flushed(x.dtype) else slack(x.dtype)) for x in leaves]
    small = begin.oracle.measure(jax.tree.unflatten(structure, steps), begin.params, group)
    roundoff = max(ROUNDOFF[leaves[place].dtype.name] for place, _ in group)
    return threshold * (1 + roundoff) + (small if math.isfinite(threshold) else 0)
