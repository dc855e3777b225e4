"""The picture of the rules at work: one small panel per rule, all on the same norms."""

import math
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import dynamics_streams as streams
from benchmarks.dynamics_figures import FOLLOWED, HELD, Figures, follows, holds
from benchmarks.dynamics_rules import Traces

FILE = "dynamics.png"
COLUMNS, WIDTH, PANEL_HEIGHT = 3, 9.0, 1.5
"""Panels in a row, and inches: at 100 dots an inch the picture is 900 pixels wide."""
HEAD, FOOT, LINE = 0.8, 0.6, 0.16
"""Inches above and below the panels, and of a line of the caption."""
GRAY, BLUE, INK = "#8c8c8c", "#0072b2", "#222222"
"""Blue and gray differ in lightness and width too: no color vision is needed."""
LOWEST, HIGHEST = 0.3, 200.0


def draw(traces: dict[str, Traces], figures: dict[str, Figures], folder: Path) -> Path:
    """Draws the picture.

    Args:
        traces: What every rule did; the first seed of the stream "picture" is drawn.
        figures: The figures of the same rules, for the panels and the caption.
        folder: Where to put it; has to exist.

    Returns:
        The path of the PNG file.
    """
    columns = min(COLUMNS, len(traces))
    rows = math.ceil(len(traces) / columns)
    lines = textwrap.wrap(caption(figures), 126)
    foot = FOOT + LINE * len(lines)
    height = PANEL_HEIGHT * rows + HEAD + foot
    with mpl.rc_context({"font.size": 8, "axes.linewidth": 0.6, "text.color": INK}):
        figure = Figure(figsize=(WIDTH, height), dpi=100)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(0.06, foot / height, 0.985, 1 - HEAD / height, 0.06, 0.36)
        for axes, name in zip(grid.flat, traces, strict=False):
            _panel(axes, name, traces[name], figures[name])
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(traces))
            if place + columns >= len(traces):  # The lowest of its column.
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("step", labelpad=1)
        for axes in grid[:, 0]:
            axes.set_ylabel("norm")
        title = "Does a clip hold spikes, and does its threshold follow the level?"
        figure.text(0.06, 1 - 0.12 / height, title, size=13, weight="bold", va="top")
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(0.06, 1 - 0.38 / height),
            borderpad=0,
            borderaxespad=0,
            ncols=2,
            frameon=False,
            fontsize=9.5,
        )
        figure.text(0.06, 0.1 / height, "\n".join(lines), size=8.5, linespacing=1.3, va="bottom")
        path = folder / FILE
        figure.savefig(path)
    return path


def caption(figures: dict[str, Figures]) -> str:
    """What the picture shows, from the figures of the rules that are in it."""
    good = [name for name in figures if holds(figures[name]) and follows(figures[name])]
    told = [
        f"{name} (up in {of['recovery']['x10']:.0f} steps, down in {of['recovery']['x0.1']:.0f}, "
        f"clips {100 * of['clipped'][streams.REFERENCE]:.2g}% of steady steps)"
        for name, of in figures.items()
        if name in good
    ]
    later = streams.SECOND - streams.SPIKE
    seen = min(FOLLOWED, *(of["run"]["steps"] - streams.SHIFT for of in figures.values()))
    return (
        f"Norms around 1, a spike of {streams.FIRST_SIZE:.0f} and, {later} steps later, one of "
        f"{streams.SECOND_SIZE:.0f}; then ten times the level for "
        f"{streams.PICTURE_FALL - streams.PICTURE_RISE} steps. Where there is no line, the rule "
        f"does not clip yet. Rules that hold the spikes of the benchmark (both of these, one at "
        f"the tenth step, and a burst of {streams.BURST} steps on the average) below {HELD:g} "
        f"times the usual norm and follow a lasting tenfold rise and fall in {seen:,.0f} steps: "
        f"{len(good)} of {len(figures)}" + (f", {'; '.join(told)}." if told else ".")
    )


def _panel(axes: Axes, name: str, traces: Traces, figures: Figures) -> None:
    norms = traces.norms["picture"][0, : streams.PICTURE_STEPS]
    thresholds = traces.thresholds["picture"][0, : streams.PICTURE_STEPS]
    axes.semilogy(norms, color=GRAY, linewidth=0.6, label="norm of the gradient")
    shown = np.where(np.isfinite(thresholds), thresholds, np.nan)
    axes.semilogy(shown, color=BLUE, linewidth=1.7, label="threshold")
    axes.set_ylim(LOWEST, HIGHEST)
    axes.set_xlim(0, streams.PICTURE_STEPS)
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2.5, pad=2)
    axes.set_title(name, loc="left", size=9, weight="bold", pad=3)
    up = figures["recovery"]["x10"]
    seen = figures["run"]["steps"] - streams.SHIFT
    followed = f"followed in {up:,.0f}" if math.isfinite(up) else f"not followed in {seen:,.0f}"
    said = f"2nd spike → {figures['spikes']['second']:.2f}\nrise {followed} steps"
    axes.text(0.995, 0.97, said, transform=axes.transAxes, ha="right", va="top", size=8)
