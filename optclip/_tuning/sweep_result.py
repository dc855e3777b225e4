"""What a sweep found: in a sentence, as a table, as a picture."""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from optclip._tuning import style
from optclip._tuning.plain import plain
from optclip._tuning.style import BLUE, GREEN, ORANGE
from optclip._tuning.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        """The (largest) threshold with the smallest median loss; NaN where all diverged."""
        equals = self.thresholds[self.medians == self.medians.min()]
        return float(equals[-1]) if np.isfinite(self.medians.min()) else np.nan

    @property
    def flat(self) -> tuple[float, float]:
        """From where to where around the best the median losses are within 2% of its own."""
        best, medians = self.best, self.medians
        if np.isnan(best):
            return np.nan, np.nan
        place = np.searchsorted(self.thresholds, best)
        worse = np.flatnonzero(medians > medians.min() + FLAT * abs(medians.min()))
        low = worse[worse < place].max(initial=-1) + 1
        high = worse[worse > place].min(initial=len(medians)) - 1
        return float(self.thresholds[low]), float(self.thresholds[high])

    def finding(self) -> str:
        """What the sweep says, in a sentence."""
        best, (low, high), medians = self.best, self.flat, self.medians
        if np.isnan(best):
            return "Every threshold diverged: lower the learning rate"
        if len(medians) > 1 and (self.losses == self.losses[0]).all():
            return (
                "All thresholds gave the same losses: none of them clips, or train_step does not "
                "pass the threshold to its clip"
            )
        found = f"Lowest loss, {medians.min():.3g}, "
        found += "without clipping" if np.isinf(best) else f"at threshold {best:.3g}"
        if low < high:
            end = "no clipping" if np.isinf(high) else f"{high:.3g}"
            found += f"; within {FLAT:.0%} of it from {low:.3g} to {end}"
        unclipped = self.losses[np.isinf(self.thresholds)].min(initial=np.inf)
        if np.isfinite(high) and unclipped <= self.losses[self.thresholds == best].max():
            found += "; seeds overlap with those without clipping"
        lost = int(np.isinf(medians).sum())
        return found + (f"; {lost} of {len(medians)} thresholds diverged" if lost else "")

    def table(self) -> Any:
        """The losses as a `rich.table.Table`, which needs rich; the best threshold is marked."""
        try:
            from rich.box import SIMPLE_HEAD
            from rich.table import Table
        except ImportError:
            raise ImportError('tables need rich: pip install "optclip[tuning]"') from None
        result = Table(caption=self.finding(), caption_justify="left", box=SIMPLE_HEAD)
        for heading in ("threshold", "median loss", "lowest", "highest", "clipped"):
            result.add_column(heading, justify="right")
        rows = zip(self.thresholds, self.losses, self.clip_rates, strict=True)
        for threshold, losses, rates in rows:
            name = "none" if np.isinf(threshold) else f"{threshold:.3g}"
            name = f"* {name}" if threshold == self.best else name
            shown = (np.median(losses), losses.min(), losses.max())
            told = (f"{loss:.4g}" if np.isfinite(loss) else "diverged" for loss in shown)
            known = rates[~np.isnan(rates)]
            result.add_row(name, *told, percent(float(known.mean())) if known.size else "-")
        return result

    def draw(self, path: str | os.PathLike[str] | None = None, *, subtitle: str = "") -> Any:
        """Draws loss against threshold: the median, in a band from the lowest seed to the highest.

        Args:
            path: Where to save it; its ending gives the format. None: nowhere.
            subtitle: What was trained.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = style.new_figure(3.7)
        axes = figure.subplots()
        _draw(axes, self)
        style.head(figure, self.finding(), subtitle, axes.get_legend_handles_labels()[0])
        if path is not None:
            figure.savefig(path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON; null for what is not finite: a threshold of infinity too."""
        more = {"best": self.best, "flat": self.flat, "finding": self.finding()}
        return plain(self._asdict() | more)

    def __str__(self) -> str:
        return self.finding()


def _draw(axes: "Axes", sweep: Sweep) -> None:
    """Loss against threshold; 0 and no clipping stand beyond a gap of the logarithmic axis."""
    thresholds, medians = sweep.thresholds, sweep.medians
    finite = np.isfinite(thresholds)
    known = thresholds[finite & (thresholds > 0)]
    least, most = known[[0, -1]] if known.size else (1.0, 1.0)
    gap = max((most / least) ** 0.13, 1.5)
    places = np.clip(thresholds, least / gap, most * gap)
    # Of a loss far above the best the picture says only that it is.
    best, middle, worst = np.quantile([*medians[np.isfinite(medians)]] or [1.0], [0, 0.5, 1])
    top = min(worst, best + 4 * max(middle - best, 0.05 * abs(best), 1e-9))
    top += 0.15 * (top - best)
    held = np.minimum(medians, top)
    lows, highs = (np.minimum(x, top) for x in (sweep.losses.min(axis=1), sweep.losses.max(axis=1)))
    axes.set_xscale("log")
    if sweep.flat[0] < sweep.flat[1]:
        ends = places[np.isin(thresholds, sweep.flat)]
        axes.axvspan(*ends, color=GREEN, alpha=0.13, lw=0, label="within 2% of the lowest")
    if len(sweep.seeds) > 1:
        band: Any = {"color": BLUE, "alpha": 0.2}
        label = f"lowest to highest of {len(sweep.seeds)} seeds"
        axes.fill_between(places[finite], lows[finite], highs[finite], lw=0, label=label, **band)
        alone = ~finite | (finite.sum() == 1)  # a band is as wide as its points are apart
        axes.vlines(places[alone], lows[alone], highs[alone], lw=6, **band)
    axes.plot(places[finite], held[finite], color=BLUE, lw=1.8)
    for which, marker, label, look in (
        (medians <= top, "o", "median", {"color": BLUE, "ms": 5}),
        (medians > top, "^", "above, or diverged", {"color": ORANGE, "ms": 8}),
        (thresholds == sweep.best, "o", "best", {"color": "black", "mfc": "none", "ms": 9}),
    ):
        if which.any():
            axes.plot(places[which], held[which], marker, label=label, **look)
    axes.set_ylim(top=top + 0.06 * (top - axes.get_ylim()[0]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="threshold (gradient norm, log axis)", ylabel="final loss")
    exponents = np.arange(np.ceil(np.log10(least / 1.01)), np.floor(np.log10(most * 1.01)) + 1)
    ticks = 10.0 ** exponents[:: 1 + len(exponents) // 10]
    named = {x: f"{x:g}" for x in (ticks if len(ticks) > 1 else [*known[:1], *known[-1:]])}
    named |= {places[at]: "0" for at in np.flatnonzero(thresholds == 0)}
    named |= {places[at]: "no clip" for at in np.flatnonzero(~finite)}
    axes.set_xticks(list(named), list(named.values()))
    axes.minorticks_off()
