"""What the norms of a run are like: their level, their noise and tail, and how the level drifts.

All of it is made of medians and quartiles of logarithms: spikes hardly move it, and norms a million
times as large give the same answer a million times as large.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

START_UP = 0.1  # Share of a run that is left out: the first steps are like no others.
PARTS = 8  # Of how many parts of the run the levels are compared,
FEWEST = 16  # each of so many norms at least.

# Floor under a deviation of the log norm, as in `robust_clip`: the norms may be all the same.
LEAST_SPREAD = 0.02

# What a deviation is taken for before there are norms, and as of how many norms it counts.
FIRST_GUESS, GUESS_COUNTS = 0.25, 4

UPPER_QUARTILE = 0.6745  # Of a normal distribution, in deviations above its median.

_AT_ONCE = 50_000  # windows; keeps the memory that long runs take within bounds
_RESAMPLES, _MOST = 400, 4000


class Sample(NamedTuple):
    """Positive finite norms in ascending order, and how often each was met."""

    norms: np.ndarray
    counts: np.ndarray

    @property
    def size(self) -> int:
        """How many norms there are."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """The smallest norm with a share of at least q at or below it."""
        below = np.cumsum(self.counts)
        # Rounding must not push a whole number of norms up to the next.
        rank = max(math.ceil(q * below[-1] * (1 - 1e-12)), 1)
        return float(self.norms[np.searchsorted(below, rank)])

    def share_above(self, threshold: float) -> float:
        """The share of norms that exceed a threshold."""
        return float(self.counts[self.norms > threshold].sum() / self.size)


class NormStatistics(NamedTuple):
    """How the settled norms go over a run.

    Attributes:
        sample: The norms.
        levels: The median of each part of the run, in order; one part where the norms are few or
            in no order.
        spread: Deviation of the log norm above the level of its part.
        interval: Between which factors of itself the level plus so many deviations lies, as far as
            the run can tell (95%); None where the order is not known.
    """

    sample: Sample
    levels: np.ndarray
    spread: float
    interval: tuple[float, float] | None

    @property
    def level(self) -> float:
        """The typical norm: three quarters of the parts keep below it."""
        return math.exp(_upper(np.log(self.levels)))

    @property
    def drift(self) -> float | None:
        """The largest level over the smallest; None where the parts are too few to tell."""
        return float(self.levels.max() / self.levels.min()) if len(self.levels) > 1 else None


def statistics_of_norms(norms: np.ndarray, deviations: float) -> NormStatistics:
    """Of positive norms in the order of the run; the interval is that of so many deviations."""
    parts = np.array_split(norms, max(1, min(PARTS, len(norms) // FEWEST)))
    levels = np.array([np.median(part) for part in parts])
    above = np.concatenate([np.log(part / m) for part, m in zip(parts, levels, strict=True)])
    spread = _guarded(_upper(above), len(norms))
    sample = Sample(*np.unique(norms, return_counts=True))
    return NormStatistics(sample, levels, spread, _interval(parts, deviations))


def statistics_of_counts(sample: Sample) -> NormStatistics:
    """The same of norms whose order is not known."""
    level = sample.quantile(0.5)
    spread = _guarded(math.log(sample.quantile(0.75) / level), sample.size)
    return NormStatistics(sample, np.array([level]), spread, None)


def _upper(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.75))


def _guarded(quartile: float, count: int) -> float:
    """A deviation, from the upper quartile of so many log norms about their level.

    Only the upper side of the norms matters to a clip, and up to a quarter of them may be spikes.
    """
    total = count * (quartile / UPPER_QUARTILE) ** 2 + GUESS_COUNTS * FIRST_GUESS**2
    return max(math.sqrt(total / (count + GUESS_COUNTS)), LEAST_SPREAD)


def finite_positive(norms: np.ndarray) -> np.ndarray:
    """Which norms a threshold can be read from: the finite ones above 0."""
    return np.isfinite(norms) & (norms > 0)


def after_warmup(norms: np.ndarray) -> np.ndarray:
    """The ordinary norms after the start-up, in order; of a short run all of them."""
    known = norms[finite_positive(norms)]
    after = known[int(START_UP * len(known)) :]
    return after if len(after) >= 2 * FEWEST else known


def relative_norms(norms: np.ndarray, relative_norm: np.ndarray) -> np.ndarray:
    """Norms in multiples of the usual ones; of all where the run is too short to tell."""
    if np.isfinite(relative_norm[np.isfinite(norms)]).any():
        return relative_norm
    return norms / np.median(norms[finite_positive(norms)])


def moving(reduce: Callable[..., np.ndarray], values: np.ndarray, width: int) -> np.ndarray:
    """The median, mean, ... of each row of so many neighbors: `width - 1` fewer than values."""
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    parts = range(0, len(windows), _AT_ONCE)
    return np.concatenate([reduce(windows[at : at + _AT_ONCE], axis=1) for at in parts])


def _interval(parts: list[np.ndarray], deviations: float) -> tuple[float, float]:
    """By a bootstrap of blocks within each part: norms of neighboring steps are alike."""
    random = np.random.default_rng(0)
    logs = [np.log(part[:: max(1, len(part) * len(parts) // _MOST)]) for part in parts]
    drawn = [_resampled(part, random) for part in logs]
    levels = [np.median(part, axis=1, keepdims=True) for part in drawn]
    above = [part - level for part, level in zip(drawn, levels, strict=True)]
    spread = np.quantile(np.concatenate(above, axis=1), 0.75, axis=1) / UPPER_QUARTILE
    level = np.quantile(np.concatenate(levels, axis=1), 0.75, axis=1)
    reached = level + deviations * spread
    low, high = np.quantile(reached, [0.025, 0.975]) - np.median(reached)
    return math.exp(low), math.exp(high)


def _resampled(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Many rows as long as the values, made of blocks of them."""
    count, block = len(values), math.isqrt(len(values))
    starts = random.integers(count, size=(_RESAMPLES, math.ceil(count / block), 1))
    places = (starts + np.arange(block)).reshape(_RESAMPLES, -1)[:, :count]
    return values[places % count]
