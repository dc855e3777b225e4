"""Steps in turns, and ratios of their times.

All contenders run once in each round, in a new random order, so that whatever the machine does
meanwhile (another process, its clock, its temperature) meets all of them alike, and none always
runs after the same one.

A ratio is the median over the rounds of the ratio within a round, not the ratio of two medians. A
machine that others use is slow for seconds, which is longer than a round: both steps of a pair
are slowed, and their ratio is not. Two medians may come from different such phases where about
half of the rounds were slow. Where only one step of a pair is hit, the ratio of that round is an
outlier, upwards as often as downwards, and the median passes over it.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.speed.programs import Program
from benchmarks.speed.trees import Tree

WARM_UP = 2
"""Rounds that do not count."""

Seconds = dict[str, list[float]]


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float


class Arena:
    """The parameters and the gradient that all contenders of a tree share.

    A step is given the parameters, donated, and what it returns goes to the next contender: the
    memory is the same for all, and there is one set of it.
    """

    def __init__(self, tree: Tree, dtype: str):
        generator = np.random.default_rng(0)

        def normal(scale: float) -> dict[str, jax.Array]:
            return {
                name: jax.numpy.asarray(
                    scale * generator.standard_normal(shape, np.float32), jax.numpy.dtype(dtype)
                )
                for name, shape in tree.shapes.items()
            }

        self.params, self.gradient = normal(0.1), normal(0.01)

    def step_of(self, program: Program) -> Callable[[], None]:
        """One step of a program, finished when it returns."""
        state = program.optimizer.init(self.params)

        def step() -> None:
            nonlocal state
            self.params, state = program.compiled(self.params, state, self.gradient)
            jax.block_until_ready((self.params, state))

        return step


def take_turns(
    steps: Mapping[str, Callable[[], None]],
    rounds: int,
    seed: int = 0,
    tick: Callable[[], Any] = lambda: None,
) -> Seconds:
    """Runs every step once a round.

    Args:
        steps: By name.
        rounds: How many rounds count.
        seed: Of the order.
        tick: Called after every round that counts.

    Returns:
        The seconds of every round, by name.
    """
    shuffler = random.Random(seed)
    names = list(steps)
    seconds: Seconds = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        shuffler.shuffle(names)
        for name in names:
            start = time.perf_counter()
            steps[name]()
            took = time.perf_counter() - start
            if number >= WARM_UP:
                seconds[name].append(took)
        if number >= WARM_UP:
            tick()
    return seconds


def paired(seconds: Seconds, name: str, against: str) -> list[float]:
    """The ratio of two steps in each round."""
    return [one / other for one, other in zip(seconds[name], seconds[against], strict=True)]


def spread(values: list[float]) -> Spread:
    """Median and quartiles."""
    return Spread(*(float(x) for x in np.quantile(values, (0.25, 0.5, 0.75))))


def interval(values: list[float]) -> tuple[float, float]:
    """Where the true median lies with a probability of 95%, whatever the distribution.

    So many values are above the median as heads in as many throws of a coin.
    """
    ordered = sorted(values)
    half = 1.96 * math.sqrt(len(ordered)) / 2
    low = max(math.floor(len(ordered) / 2 - half), 0)
    high = min(math.ceil(len(ordered) / 2 + half), len(ordered) - 1)
    return ordered[low], ordered[high]


def median(values: list[float]) -> float:
    """The median."""
    return float(statistics.median(values))
