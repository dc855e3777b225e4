"""The picture of all methods: how far each is from the best fixed threshold, setting by setting."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.proving_ground.claims import Found
from benchmarks.proving_ground.contenders import CONTENDERS
from benchmarks.proving_ground.page.cells import settings_of
from benchmarks.proving_ground.reporting import FIXED
from optclip._tuning.style import BLUE, INK, ORANGE

LEAST, MOST = 0.5, 4.0
"""The ratios beyond which all are drawn alike; `MOST` is also where runs that diverged stand."""

ENOUGH = 20
"""In how many settings a method was run, to be drawn."""


def draw(path: Path, found: Found) -> None:
    """Draws a row for each method: a dot for each setting, a bar for the geometric mean.

    Args:
        path: Where the PNG goes.
        found: The scores.
    """
    ratios = {x.name: _ratios(found, x.name) for x in CONTENDERS if x.name != FIXED}
    logs = {
        name: np.log(np.clip(values, LEAST, MOST))
        for name, values in ratios.items()
        if values.size >= ENOUGH
    }
    order = sorted(logs, key=lambda name: float(np.mean(logs[name])), reverse=True)
    with mpl.rc_context({"font.size": 12, "text.color": INK, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(6, 0.27 * len(order) + 1.5), layout="constrained")
        axes = figure.subplots()
        for row, name in enumerate(order):
            shown = np.exp(logs[name])
            axes.plot(shown, np.full(shown.size, row), "o", color=BLUE, ms=4, alpha=0.4, mew=0)
            axes.plot(np.exp(np.mean(logs[name])), row, "|", color=ORANGE, ms=13, mew=3)
        axes.axvline(1, color=INK, lw=0.8, zorder=0)
        axes.set_xscale("log")
        ticks = (0.5, 0.7, 1, 1.5, 2, 3, 4)
        axes.set_xticks(ticks, ["≤0.5", *(f"{x:g}" for x in ticks[1:-1]), "≥4"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(order)), [f"{x} ({logs[x].size})" for x in order], size=11)
        axes.tick_params(length=0)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("final loss over the best fixed threshold's")
        figure.savefig(path, dpi=150)


def _ratios(found: Found, name: str) -> np.ndarray:
    pairs = [x for x in settings_of(found) if name in found.scores[x[0]][x[1]]]
    values = np.array([found.over(*x, name, FIXED) for x in pairs])
    return np.where(np.isnan(values), math.inf, values)
