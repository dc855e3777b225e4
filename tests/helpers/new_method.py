"""A method that is not in the library: its rule, its function, its entry and its oracle.

`pytest -p helpers.new_method` enters it into the registry before any test is imported, as if it
were public. CONTRIBUTING.md says where each part goes when a method is to stay.
"""

from collections import deque
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from oracles import learned

import optclip
from helpers import registry
from optclip._checks import at, check_count, check_number
from optclip.thresholds import Rule


def median_over_window(multiplier: Any, window: int) -> Rule:
    """A multiple of the median of the last norms before this one."""
    window = check_count(window, "window=")
    check_number(multiplier, "multiplier=", hint="pass 2.0")

    def init(norms):  # a norm that is yet to come is -1
        return jnp.full((window, *norms.shape), -1, norms.dtype)

    def threshold(memory, step, norms, params):
        filled = memory >= 0
        count = jnp.sum(filled.astype(jnp.int32), axis=0, keepdims=True)
        ordered = jnp.sort(jnp.where(filled, memory, jnp.finfo(memory.dtype).max), axis=0)
        middle = [jnp.maximum(count - 1, 0) // 2, count // 2 % window]
        median = sum(jnp.take_along_axis(ordered, place, axis=0)[0] / 2 for place in middle)
        return jnp.where(count[0] > 0, at(multiplier, step.count, norms) * median, jnp.inf)

    def observe(memory, step, norms, clipped_norms):
        return jnp.concatenate([memory[1:], jnp.expand_dims(norms, 0)])

    return Rule(init, threshold, observe, has_memory=True)


def clip_by_pattern_median(
    multiplier: Any = 2.0,
    window: int = 32,
    *,
    axis_name: Any = None,
    sharded: Any = None,
    nonfinite: Any = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Clips the whole gradient to a multiple of the median of its last norms."""
    return optclip.clip_by(
        median_over_window(multiplier, window),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


class Median(learned.Learner):
    """k times the median of the last norms before this one."""

    def __init__(self, multiplier=2.0, window=32):
        super().__init__("raw")
        self.multiplier, self.norms = multiplier, deque(maxlen=window)

    def threshold(self, norm):
        return self.multiplier * float(np.median(self.norms)) if self.norms else np.inf

    def learn(self, norm):
        self.norms.append(norm)


def pytest_configure() -> None:
    entry = registry.Method(
        clip_by_pattern_median,
        {"multiplier": 2.0, "window": 32},
        traced=("multiplier",),
        has_memory=True,
    )
    registry.METHODS = (*registry.METHODS, entry)
    learned.OF_THE_NORM[entry.name] = Median
    optclip.clip_by_pattern_median = clip_by_pattern_median  # pyright: ignore
    optclip.__all__ = sorted({*optclip.__all__, entry.name})  # pyright: ignore
