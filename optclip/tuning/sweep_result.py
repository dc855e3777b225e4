"""What a sweep found, and how it is told."""

import os
from typing import Any, NamedTuple

import numpy as np

from optclip.tuning.plain import plain

FLAT = 0.02
"""Median losses within this share of the best are called as good."""


class Sweep(NamedTuple):
    """What a sweep found; arrays with a row for each threshold and a column for each seed.

    Attributes:
        thresholds: In rising order; infinity is no clipping. Shape (thresholds,).
        seeds: Of the runs.
        losses: Final loss of each run; infinite where it was not finite.
        clip_rates: Share of the steps that were clipped; NaN where the steps do not report it.
        vectorized: Whether all runs were one `vmap`, or were made one after the other.
    """

    thresholds: np.ndarray
    seeds: tuple[int, ...]
    losses: np.ndarray
    clip_rates: np.ndarray
    vectorized: bool

    @property
    def medians(self) -> np.ndarray:
        """The median loss of the seeds, for each threshold."""
        return np.median(self.losses, axis=1)

    @property
    def best(self) -> float:
        """The threshold with the smallest median loss; NaN where all diverged."""
        return float(self.thresholds[self._place]) if np.isfinite(self.medians.min()) else np.nan

    @property
    def _place(self) -> int:
        """Of the best; among equals the largest threshold, which changes least."""
        return int(np.flatnonzero(self.medians == self.medians.min())[-1])

    @property
    def flat(self) -> tuple[float, float]:
        """From where to where around the best the median losses are within 2% of its own."""
        if np.isnan(self.best):
            return np.nan, np.nan
        place = low = high = self._place
        good = self.medians <= self.medians[place] + FLAT * abs(self.medians[place])
        while low > 0 and good[low - 1]:
            low -= 1
        while high < len(good) - 1 and good[high + 1]:
            high += 1
        return float(self.thresholds[low]), float(self.thresholds[high])

    def finding(self) -> str:
        """What the sweep says, in a sentence."""
        if np.isnan(self.best):
            return "Every threshold diverged: lower the learning rate"
        if len(self.thresholds) > 1 and (self.losses == self.losses[0]).all():
            return (
                "All thresholds gave the same losses: none of them clips, or train_step does not "
                "pass the threshold to its clip"
            )
        found = f"Lowest loss, {self.medians.min():.3g}, {_at(self.best)}"
        low, high = self.flat
        if low < high:
            end = "no clipping" if np.isinf(high) else f"{high:.3g}"
            found += f"; within {FLAT:.0%} of it from {low:.3g} to {end}"
        free, best = np.isinf(self.thresholds), self.losses[self._place]
        if np.isfinite(high) and (self.losses[free].min(initial=np.inf) <= best.max()):
            found += "; seeds overlap with those without clipping"
        lost = int(np.sum(~np.isfinite(self.medians)))
        return found + (f"; {lost} of {len(self.medians)} thresholds diverged" if lost else "")

    def table(self) -> Any:
        """The losses as a `rich.table.Table`.

        Raises:
            ImportError: If rich is not installed.
        """
        from optclip.tuning import sweep_picture

        return sweep_picture.table(self)

    def draw(self, path: str | os.PathLike[str] | None = None, *, subtitle: str = "") -> Any:
        """Draws loss against threshold: the median in a band from the lowest seed to the highest.

        Args:
            path: Where to save it; its ending gives the format. None: nowhere.
            subtitle: What was trained.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from optclip.tuning import sweep_picture

        return sweep_picture.draw(self, path, subtitle)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON; null for what is not finite: a threshold of infinity too."""
        more = {"best": self.best, "flat": self.flat, "finding": self.finding()}
        return plain(self._asdict() | more)

    def __str__(self) -> str:
        return self.finding()


def _at(threshold: float) -> str:
    return "without clipping" if np.isinf(threshold) else f"at threshold {threshold:.3g}"
