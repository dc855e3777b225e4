"""The loss by learning rate: a panel for each setting, a line for each method."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.proving_ground import scores
from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.reporting import FIXED
from optclip._tuning.style import BLUE, DARK, GRAY, GREEN, INK, ORANGE, PURPLE, on_log_axis

NAMED = {
    NO_CLIP: (DARK, 1.8, "--"),
    FIXED: (ORANGE, 1.8, "-"),
    "adaptive_grad_clip": (PURPLE, 1.4, "-"),
    "clip_by_param_norm": (GREEN, 1.4, "-"),
    "robust_clip": ("#56B4E9", 1.4, "-"),
    "safeguard": (BLUE, 2.2, "-"),
}
"""Methods with a color of their own, and the width and style of their line."""
COLUMNS, MOST = 4, 12.0
"""Panels in a row; and the loss over the smallest of the panel from which on it is not drawn."""


def draw(path: Path, results: list[dict[str, Any]]) -> bool:
    """Draws the picture.

    Args:
        path: Where the PNG goes.
        results: Those of jobs.

    Returns:
        Whether there was anything to draw.
    """
    panels: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        for setting, runs in result["settings"].items():
            if len(runs["rates"]) > 1:
                panels.setdefault((result["task"], setting), {})[result["method"]] = runs
    if not panels:
        return False
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context({"font.size": 8, "axes.linewidth": 0.6, "text.color": INK}):
        size = (max(2.9 * columns, 7.0), 2.2 * rows + 1.1)
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, ((task, setting), lines) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, f"{task}: {setting}", lines)
        for axes in grid[:, 0]:
            axes.set_ylabel("loss at the end")
        title = "The loss by learning rate; each method with its best threshold"
        figure.suptitle(title, size=13, weight="bold", x=0.01, ha="left")
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            handles |= {line.get_label(): line for line in axes.get_lines()}
        shown = [name for name in (*NAMED, "other methods") if name in handles]
        figure.legend(
            [handles[name] for name in shown],
            shown,
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        figure.savefig(path)
    return True


def _panel(axes: Axes, title: str, lines: dict[str, dict[str, Any]]) -> None:
    curves = {}
    for method, runs in lines.items():
        place = scores.best(runs).place[0]
        curves[method] = (np.array(runs["rates"]), scores.over_seeds(runs["loss"])[place])
    finite = [x for _, losses in curves.values() for x in losses if math.isfinite(x)]
    axes.set_title(title, size=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    if not finite:
        return
    low, top = min(finite), min(max(finite), MOST * min(finite))
    # The named ones are drawn last, over the gray of the others.
    for method in (*(name for name in curves if name not in NAMED), *NAMED):
        if method not in curves:
            continue
        rates, losses = curves[method]
        color, width, style = NAMED.get(method, (GRAY, 0.7, "-"))
        label = method if method in NAMED else "other methods"
        held = np.where(np.isfinite(losses), losses, np.nan)
        axes.plot(rates, held, style, color=color, lw=width, label=label, marker=".", ms=3)
    if top > 2 * low:
        on_log_axis(axes, 4)
    # Above the losses a row for each method, with a mark where it diverged.
    room = max((top / low) ** 0.06, 1.01)
    for row, method in enumerate(name for name in NAMED if name in curves):
        rates, losses = curves[method]
        gone = rates[~np.isfinite(losses)]
        place = np.full(gone.size, top * room ** (row + 1))
        axes.plot(gone, place, "x", color=NAMED[method][0], ms=3.5)
    axes.set_ylim(low / room, top * room ** (len(NAMED) + 1))
    axes.set_xlabel("learning rate (x: diverged)", size=7, labelpad=1)
