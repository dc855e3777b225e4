"""What a sweep found: in a sentence, as a table, as a picture."""

import os
import textwrap
from typing import Any, NamedTuple

import numpy as np

from optclip._tuning.plain import plain
from optclip._tuning.style import BLUE, GREEN, NEED_MATPLOTLIB, ORANGE
from optclip._tuning.wording import percent

GRAY = "#666666"  # darker than that of the other pictures: here it is the ink of words

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
        return _table(self)

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
        return _draw(self, path, subtitle)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON; null for what is not finite: a threshold of infinity too."""
        more = {"best": self.best, "flat": self.flat, "finding": self.finding()}
        return plain(self._asdict() | more)

    def __str__(self) -> str:
        return self.finding()


def _at(threshold: float) -> str:
    return "without clipping" if np.isinf(threshold) else f"at threshold {threshold:.3g}"


# Table and picture -------------------------------------------------------------------------------


def _table(sweep: Sweep) -> Any:
    """The losses as a `rich.table.Table`; the best threshold is marked."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
    except ImportError:
        raise ImportError('tables need rich: pip install "optclip[tuning]"') from None
    result = Table(caption=sweep.finding(), caption_justify="left", box=SIMPLE_HEAD)
    for heading in ("threshold", "median loss", "lowest", "highest", "clipped"):
        result.add_column(heading, justify="right")
    for threshold, losses, rates in zip(
        sweep.thresholds, sweep.losses, sweep.clip_rates, strict=True
    ):
        known = rates[~np.isnan(rates)]
        result.add_row(
            ("* " if threshold == sweep.best else "") + _number(threshold),
            *map(_loss, (np.median(losses), losses.min(), losses.max())),
            percent(float(known.mean())) if known.size else "-",
        )
    return result


def _draw(sweep: Sweep, path: str | os.PathLike[str] | None, subtitle: str) -> Any:
    """Loss against threshold; no clipping stands at the right, beyond a gap."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(NEED_MATPLOTLIB) from None
    figure = Figure(figsize=(8, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = _places(sweep.thresholds)
    medians, lows, highs = sweep.medians, sweep.losses.min(axis=1), sweep.losses.max(axis=1)
    top = _top(medians)
    held = np.minimum(medians, top)

    limits = sweep.thresholds <= sweep.thresholds[np.isfinite(sweep.thresholds)].max(initial=0)
    low, high = sweep.flat
    if low < high:
        low, high = (places[sweep.thresholds == x][0] for x in (low, high))
        axes.axvspan(low, high, color=GREEN, alpha=0.13, lw=0, label="within 2% of the lowest")
    band = f"lowest to highest of {len(sweep.seeds)} seeds"
    for part in (limits, ~limits):
        axes.fill_between(
            places[part],
            np.minimum(lows, top)[part],
            np.minimum(highs, top)[part],
            color=BLUE,
            alpha=0.2,
            lw=6 if part.sum() == 1 else 0,
            label=band if part is limits else None,
        )
        axes.plot(places[part], held[part], "-", color=BLUE, lw=1.8)
    inside = medians <= top
    axes.plot(places[inside], held[inside], "o", color=BLUE, ms=5, label="median")
    beyond = ~inside
    if beyond.any():
        axes.plot(places[beyond], held[beyond], "^", color=ORANGE, ms=8, label="above, or diverged")
    if not np.isnan(sweep.best):
        best = sweep.thresholds == sweep.best
        axes.plot(places[best], held[best], "o", color="black", ms=9, mfc="none", label="best")
    _label(axes, sweep, places)
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom, top + 0.06 * (top - bottom))
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=3 if len(axes.get_legend_handles_labels()[1]) > 4 else 4,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
    )
    title = textwrap.fill(sweep.finding(), 74)
    figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold")
    shown = textwrap.shorten(subtitle, 118, placeholder=" ...")
    axes.set_title(shown or " ", loc="left", size=9, color="0.3", pad=38 if shown else 26)
    if path is not None:
        figure.savefig(path)
    return figure


def _top(medians: np.ndarray) -> float:
    """Where the picture ends: of a loss far above the best it says only that it is."""
    known = medians[np.isfinite(medians)]
    if not known.size:
        return 1.0
    best = float(known.min())
    most = best + 4 * max(float(np.median(known)) - best, 0.05 * abs(best), 1e-9)
    return min(most, float(known.max())) + 0.15 * (min(most, float(known.max())) - best)


def _places(thresholds: np.ndarray) -> np.ndarray:
    """Where each stands on the logarithmic axis; 0 and infinity have no place of their own."""
    finite = thresholds[np.isfinite(thresholds) & (thresholds > 0)]
    least, most = (finite.min(), finite.max()) if finite.size else (1.0, 1.0)
    gap = max((most / least) ** 0.13, 1.5)
    return np.where(
        thresholds == 0, least / gap, np.where(np.isinf(thresholds), most * gap, thresholds)
    )


def _label(axes: Any, sweep: Sweep, places: np.ndarray) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_xlabel("threshold (gradient norm, log axis)")
    axes.set_ylabel("final loss")
    odd = {
        places[i]: "no clip" if np.isinf(x) else "0"
        for i, x in enumerate(sweep.thresholds)
        if not 0 < x < np.inf
    }
    finite = places[[place not in odd for place in places]]
    decades = [
        tick
        for tick in LogLocator(numticks=12).tick_values(places.min(), places.max())
        if finite.size and finite.min() / 1.01 <= tick <= finite.max() * 1.01
    ]
    if len(decades) < 2:
        decades = sorted({*finite[[0, -1]]}) if finite.size else []
    axes.xaxis.set_major_locator(FixedLocator([*decades, *odd]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: odd.get(x) or f"{x:g}"))


def _number(threshold: float) -> str:
    return "none" if np.isinf(threshold) else f"{threshold:.3g}"


def _loss(loss: float) -> str:
    return f"{loss:.4g}" if np.isfinite(loss) else "diverged"
