"""Ticks of log axes in plain numbers, two at least. Imported when a picture is drawn."""

import math
from typing import Any

import numpy as np
from matplotlib.ticker import Formatter, Locator

PLAIN = (1e-4, 1e6)
"""Ticks within these are written out; where one is not, all are powers of ten."""

_FIRST_DIGITS = (((1,), 3), ((1, 3), 3), ((1, 2, 5), 2))
"""Which first digits the ticks have, from few to many, if there then are so many ticks."""


def on_log_axis(axis: Any, most: int = 7) -> None:
    """Gives a y axis a log scale with ticks that can be read.

    Args:
        axis: The axes.
        most: How many ticks at the most.
    """
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogTicks(most))
    axis.yaxis.set_major_formatter(OneStyle())
    axis.minorticks_off()


def between(low: float, high: float, most: int = 7) -> np.ndarray:
    """Ticks between two positive numbers: decades, parts of them, or equal steps."""
    if not 0 < low < high < math.inf:
        return np.array([low]) if 0 < low < math.inf else np.array([])
    decades = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, enough in _FIRST_DIGITS:
        ticks = np.sort(np.outer(10.0**decades, digits).ravel())
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) >= enough:
            return ticks[:: -(-len(ticks) // most)]
    ticks = _equal_steps(low, high)
    return ticks[:: -(-len(ticks) // most)]


def _equal_steps(low: float, high: float) -> np.ndarray:
    step = 10.0 ** math.floor(math.log10(high - low))
    for part in (1.0, 0.5, 0.2):
        first, last = math.ceil(low / (step * part)), math.floor(high / (step * part))
        if last - first >= 1:
            break
    return np.arange(first, last + 1) * step * part


class LogTicks(Locator):
    """Where the ticks are."""

    def __init__(self, most: int):
        self._most = most

    def __call__(self) -> Any:
        """The ticks of the axis that it belongs to."""
        assert self.axis is not None
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """The ticks between two numbers."""
        return between(vmin, vmax, self._most)


class OneStyle(Formatter):
    """How the ticks are written: all of an axis alike."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """A tick as text."""
        axis: Any = self.axis
        ticks = np.asarray(axis.get_majorticklocs())
        powers = ticks.size and (ticks.min() < 0.99 * PLAIN[0] or ticks.max() > 1.01 * PLAIN[1])
        return written(x, bool(powers))


def written(x: float, powers: bool) -> str:
    """A number, as digits or as a power of ten."""
    if not powers:
        return f"{x:,.10g}" if x < 1e6 else f"{x:,.0f}"
    exponent = math.floor(math.log10(x) + 1e-9)
    digits = f"{x / 10.0**exponent:.3g}"
    power = f"10^{{{exponent}}}"
    return f"${power}$" if digits == "1" else f"${digits} \\times {power}$"
