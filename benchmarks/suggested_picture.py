"""The picture of `benchmarks.suggested_thresholds`: a panel for each task."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

COLORS = ("#0072B2", "#009E73", "#E69F00", "#D55E00")
"""From Okabe and Ito's palette; one for each learning rate, from the smallest on."""
APART = 3.0
"""Beyond the largest threshold, as a factor: no clip, and rules that learn their threshold."""

Curves = dict[float, dict[float, float]]


def draw(path: Path, title: str, curves: dict[str, Curves], rows: list[dict[str, Any]]) -> None:
    """Draws the held-out loss over the threshold, and where the answers are.

    Args:
        path: Where the PNG goes.
        title: What there is to see.
        curves: For each task, from learning rate to a mapping from threshold (infinity: no clip) to
            loss.
        rows: The answers.
    """
    lines = math.ceil(len(curves) / 2)
    figure = Figure(figsize=(9, 3.0 * lines + 1.0), dpi=120, layout="constrained")
    panels = figure.subplots(lines, min(2, len(curves)), squeeze=False).ravel()
    for axes, (name, curve) in zip(panels, curves.items(), strict=False):
        _panel(axes, name, curve, [row for row in rows if row["task"] == name])
    for axes in panels[-2:]:
        axes.set_xlabel("threshold of clip_by_global_norm (log axis)")
    named = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    named["the answer"] = named.pop("the answer")  # last
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5, "frameon": False}
    figure.legend(list(named.values()), list(named), fontsize=9, **place)
    figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold")
    figure.savefig(path)


def _panel(axes: Axes, name: str, curves: Curves, rows: list[dict[str, Any]]) -> None:
    finite = sorted(x for x in next(iter(curves.values())) if math.isfinite(x))
    known = [x for curve in curves.values() for x in curve.values() if math.isfinite(x)]
    top = min(max(known), min(known) + 1.2 * (float(np.median(known)) - min(known)) + 0.3)
    none, learned = finite[-1] * APART, finite[-1] * APART**2
    for color, (rate, curve) in zip(COLORS, sorted(curves.items()), strict=False):
        held = [min(curve[x], top) for x in finite]
        axes.plot(finite, held, color=color, lw=1.6, label=f"learning rate {rate:g}")
        axes.plot(none, min(curve[math.inf], top), "o", color=color, ms=5)
        for row in (row for row in rows if row["learning_rate"] == rate):
            first = row is rows[0]
            size = _threshold(row["answer"], none, learned)
            style: dict[str, Any] = {"color": color, "mec": "black", "ms": 12}
            label = "the answer" if first else None
            axes.plot(size, min(row["loss"], top), "*", label=label, **style)
    axes.set_xscale("log")
    axes.set_ylim(top=top + 0.04 * (top - min(known)))
    axes.set_ylabel("held-out loss (nats)")
    axes.set_title(f"{name} (above {top:.2f}: at the top)", loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    ticks = {0.01: "0.01", 0.1: "0.1", 1.0: "1", 10.0: "10", none: "no\nclip", learned: "a\nrule"}
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ticks[x]))
    axes.xaxis.set_minor_locator(FixedLocator([]))


def _threshold(code: str, none: float, learned: float) -> float:
    """Where an answer stands."""
    found = re.fullmatch(r"optclip\.clip_by_global_norm\((.+)\)", code)
    if found:
        return float(found[1])
    return none if "measure_norms" in code else learned
