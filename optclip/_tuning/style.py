"""What all pictures of this folder share. It can be imported without matplotlib."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette, which the color-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GRAY, DARK, INK = "#999999", "#444444", "#222222"

FEW_POINTS = 30
"""Lines of so many points at the most have a mark at each."""
MOST_POINTS = 6000
"""Of a line; of longer ones the smallest and the largest value of every stretch are drawn."""

LEGEND_COLUMNS = 3
WIDTH = 6
"""Of a picture, in inches: narrow, so that its text can be read where it is shown small."""

LEGEND: Any = {"frameon": False, "fontsize": 9, "borderaxespad": 0, "columnspacing": 1.5}


def new_figure(height: float) -> "Figure":
    """An empty figure without pyplot; its height is that of the panels, `head` adds its own."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('pictures need matplotlib: pip install "optclip[tuning]"') from None
    return Figure(figsize=(WIDTH, height), dpi=160, layout="constrained")


def head(figure: "Figure", title: str, note: str, handles: Sequence[Any] = ()) -> None:
    """Adds title, note and what a legend is to name above the panels, at the figure's left edge."""
    title = textwrap.fill(title, 54)
    note = textwrap.fill(textwrap.shorten(note, 220, placeholder=" ..."), 86)
    note_at = 0.12 + 0.22 * len(title.splitlines())  # inches from the top
    legend_at = note_at + (0.06 + 0.16 * len(note.splitlines()) if note else 0)
    rows = -(-len(handles) // LEGEND_COLUMNS)
    room = legend_at + (0.07 + 0.18 * rows if handles else 0)
    height = figure.get_figheight() + room
    figure.set_figheight(height)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - room / height))
    text: Any = {"x": 0.012, "ha": "left", "va": "top", "parse_math": False}
    top = figure.suptitle(title, y=1 - 0.08 / height, size=13, weight="bold", **text)
    top.set_in_layout(False)  # it has its room
    figure.text(y=1 - note_at / height, s=note, size=8.5, color="0.3", **text)
    if handles:
        place: Any = {"loc": "upper left", "bbox_to_anchor": (0.012, 1 - legend_at / height)}
        figure.legend(handles=handles, ncols=LEGEND_COLUMNS, borderpad=0, **place, **LEGEND)


def line(axes: "Axes", steps: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """Draws a line with gaps where a value is not finite; few points are marked, many thinned."""
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan)
    if finite.sum() < 0.5 * len(values):  # logged now and then; gaps would hide all of it
        steps, values = steps[finite], values[finite]
    stretch = -(-2 * len(values) // MOST_POINTS)
    if stretch > 2:
        table = np.pad(values, (0, -len(values) % stretch), constant_values=np.nan)
        table = table.reshape(-1, stretch)
        lows = np.argmin(np.where(np.isnan(table), np.inf, table), axis=1)
        highs = np.argmax(np.where(np.isnan(table), -np.inf, table), axis=1)
        kept = np.unique(stretch * np.arange(len(table)) + [lows, highs])
        steps, values = steps[kept], values[kept]
    axes.plot(steps, values, marker="." if finite.sum() <= FEW_POINTS else None, ms=5, **look)


def legend_above(axes: "Axes") -> None:
    """A legend above the panel, where it hides nothing; as many in a row as there is room for."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = 4 if len(labels) <= 4 and sum(map(len, labels)) < 62 else 3
        legend = axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), **LEGEND)
        for handle in legend.get_lines():
            handle.set_markersize(6)


def step_axis(axes: "Axes", rising: bool, most: int = 8) -> None:
    """Whole numbers below a panel: of steps, or their places where the numbers do not rise."""
    from matplotlib.ticker import MaxNLocator

    steps = MaxNLocator(most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(steps)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step" if rising else "logged step, in order (the numbers do not rise)")


def on_log_axis(axes: "Axes", most: int = 7) -> None:
    """Gives a y axis a log scale with ticks that can be read: two at least, written alike."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    class Ticks(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            low, high = sorted((vmin, vmax))
            decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
            for digits in (1,), (1, 3), (1, 2, 5):
                ticks = np.outer(decades, digits).ravel()
                ticks = ticks[(low <= ticks) & (ticks <= high)]
                if len(ticks) > 2:
                    return ticks[:: -(-len(ticks) // most)]
            return MaxNLocator(most - 1, steps=[1, 2, 5, 10]).tick_values(low, high)

    def text(x: float, _: Any) -> str:
        low, high = sorted(axes.get_ylim())
        if low > 0.9e-4 and high < 2e6:
            return f"{x:,.10g}"
        digits, exponent = f"{x:.2e}".split("e")
        power = f"10^{{{int(exponent)}}}"
        return f"${power}$" if digits == "1.00" else f"${float(digits):g} \\times {power}$"

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(Ticks())
    axes.yaxis.set_major_formatter(text)
    axes.minorticks_off()
