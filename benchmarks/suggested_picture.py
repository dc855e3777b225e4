"""The picture of `benchmarks.suggested_thresholds`: a panel for each task."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MARKS = (
    ("loss_without_clip", "no clip", "o", "#D55E00", 9, -0.22),
    ("loss", "the suggestion", "*", "#0072B2", 15, 0.0),
    ("loss_of_best", "best of the sweep", "D", "#7f7f7f", 7, 0.22),
)
"""Key of a row, what the legend calls it, marker, color (Okabe and Ito's), size, and place beside
the learning rate."""


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Draws the held-out loss of no clip, of the suggestion and of the best of the sweep.

    Args:
        path: Where the PNG goes.
        title: What there is to see.
        rows: The answers, as `benchmarks.suggested_thresholds.answers` gives them.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    size = (6, 2.2 * len(tasks) + 1.5)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(len(tasks), 1, squeeze=False).ravel()
    for axes, name in zip(panels, tasks, strict=True):
        _panel(axes, name, [row for row in rows if row["task"] == name])
    panels[-1].set_xlabel("learning rate", size=13)
    handles, names = panels[0].get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(handles, names, fontsize=13, columnspacing=1, handletextpad=0.2, **place)
    figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold")
    figure.savefig(path)


def _panel(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    """One task; losses far above the others, and runs that diverged, are at the top."""
    rates = sorted({row["learning_rate"] for row in rows})
    # Of a JSON file infinity is None.
    losses = {key: [np.inf if x[key] is None else x[key] for x in rows] for key, *_ in MARKS}
    good = max(x for key in ("loss", "loss_of_best") for x in losses[key] if np.isfinite(x))
    low = min(losses["loss_of_best"])
    top = good + 0.6 * (good - low) + 0.05
    for key, label, marker, color, size, aside in MARKS:
        places = [rates.index(row["learning_rate"]) + aside for row in rows]
        held = np.minimum(losses[key], top)
        style: dict[str, Any] = {"color": color, "mec": "white", "mew": 0.8, "ms": size}
        axes.plot(places, held, marker, ls="none", label=label, clip_on=False, **style)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_ylim(low - 0.08 * (top - low), top)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=12)
    axes.set_ylabel("held-out loss", size=12)
    axes.set_title(f"{name} (top: {top:.2f} or more)", loc="left", size=13, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
