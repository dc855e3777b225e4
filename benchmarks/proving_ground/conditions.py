"""What can befall a run: spikes, bursts, parts that wake up late, a loss in other units.

Each makes a plain `Feed` into another one. Where in the run it happens is a share of its steps, so
that short runs see the same.
"""

from typing import Any

import numpy as np

from benchmarks.proving_ground.task import Feed

SPIKE, SPIKES_AT = 1000.0, (0.2, 0.32, 0.44, 0.56, 0.68, 0.8)
BURST, BURST_STEPS, BURSTS_AT = 30.0, 5, (0.35, 0.65)
THAW_AT = 0.5
CORRUPTED_AT = tuple(np.linspace(0.15, 0.8, 10).tolist())


def plain(batches: Any, steps: int) -> Feed:
    """A feed in which nothing happens."""
    ones = np.ones(steps, np.float32)
    return Feed(batches, ones, ones, np.ones(steps, bool))


def at(shares: tuple[float, ...], steps: int) -> tuple[int, ...]:
    """Shares of a run as steps."""
    return tuple(int(share * steps) for share in shares)


def spikes_at(steps: int) -> tuple[int, ...]:
    """The steps whose gradient is a thousand times too large."""
    return at(SPIKES_AT, steps)


def bursts_at(steps: int) -> tuple[int, ...]:
    """The first step of each burst."""
    return at(BURSTS_AT, steps)


def corrupted_at(steps: int) -> tuple[int, ...]:
    """The steps whose labels are wrong."""
    return at(CORRUPTED_AT, steps)


def with_spikes(feed: Feed) -> Feed:
    """Single gradients are multiplied by a thousand."""
    factor = feed.gradient_factor.copy()
    factor[list(spikes_at(len(factor)))] *= SPIKE
    return feed._replace(gradient_factor=factor)


def with_bursts(feed: Feed) -> Feed:
    """Five gradients in a row are multiplied by 30, twice."""
    factor = feed.gradient_factor.copy()
    for first in bursts_at(len(factor)):
        factor[first : first + BURST_STEPS] *= BURST
    return feed._replace(gradient_factor=factor)


def with_late_start(feed: Feed) -> Feed:
    """Half of the layers start to learn in the middle: a rise of the norm that is no spike."""
    steps = len(feed.thawed)
    return feed._replace(thawed=np.arange(steps) >= int(THAW_AT * steps))


def in_other_units(feed: Feed, factor: float) -> Feed:
    """The loss multiplied by a number all along."""
    return feed._replace(loss_factor=feed.loss_factor * np.float32(factor))
