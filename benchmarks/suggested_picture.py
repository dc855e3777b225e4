"""The picture of `benchmarks.suggested_thresholds`: a panel for each task."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
"""From Okabe and Ito's palette; one for each learning rate, from the smallest on."""
APART = 3.0
"""Beyond the largest threshold, as a factor: no clip, and rules that learn their threshold."""


def draw(path: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """Draws the held-out loss over the threshold, and where the suggestions are.

    Args:
        path: Where the PNG goes.
        tasks: For each task its "rows", "suggested" and "grid" of `compare`, and "curves": from
            learning rate to a mapping from threshold (infinity: no clip) to loss.
    """
    figure = Figure(figsize=(8, 3.2 * len(tasks) + 0.9), dpi=120, layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axes, (name, compared) in zip(panels, tasks.items(), strict=True):
        _panel(axes, name, compared)
    panels[-1].set_xlabel("threshold of clip_by_global_norm (gradient norm, log axis)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(_finding(tasks), x=0.012, ha="left", size=13, weight="bold")
    figure.savefig(path)


def _finding(tasks: dict[str, dict[str, Any]]) -> str:
    gaps = [
        f"{compared['suggested'] / compared['grid'] - 1:+.1%} on {name}"
        for name, compared in tasks.items()
    ]
    return "At its best learning rate the suggested threshold is off the\nbest of a sweep by " + (
        " and ".join(gaps)
    )


def _panel(axes: Axes, name: str, compared: dict[str, Any]) -> None:
    curves = compared["curves"]
    finite = sorted(x for x in next(iter(curves.values())) if math.isfinite(x))
    known = [x for curve in curves.values() for x in curve.values() if math.isfinite(x)]
    top = min(max(known), min(known) + 1.2 * (float(np.median(known)) - min(known)) + 0.3)
    none, learned = finite[-1] * APART, finite[-1] * APART**2
    for color, (rate, curve) in zip(COLORS, sorted(curves.items()), strict=False):
        held = [min(curve[x], top) for x in finite]
        axes.plot(finite, held, color=color, lw=1.6, label=f"learning rate {rate:g}")
        axes.plot(none, min(curve[math.inf], top), "o", color=color, ms=5)
    for color, row in zip(COLORS, compared["rows"], strict=False):
        sizes = [_threshold(code) for code in row["suggested"]]
        place = learned if None in sizes else math.prod(filter(None, sizes)) ** (1 / len(sizes))
        axes.plot(
            place,
            min(row["with_suggested"], top),
            "*",
            color=color,
            mec="black",
            ms=13,
            label="suggested" if row is compared["rows"][0] else None,
        )
    axes.set_xscale("log")
    axes.set_ylim(top=top + 0.04 * (top - min(known)))
    axes.set_ylabel("held-out loss (nats)")
    axes.set_title(f"{name}; losses above {top:.2f} are drawn at the top", loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    ticks = {0.01: "0.01", 0.1: "0.1", 1.0: "1", 10.0: "10", none: "no clip", learned: "a rule"}
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ticks[x]))
    axes.xaxis.set_minor_locator(FixedLocator([]))


def _threshold(code: str) -> float | None:
    """Of a fixed clip; None for a rule that learns it."""
    found = re.fullmatch(r"optclip\.clip_by_global_norm\((.+)\)", code)
    return float(found[1]) if found else None
