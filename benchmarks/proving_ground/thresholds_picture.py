"""The loss by threshold and learning rate of the fixed clip, and rules without one beside it."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.proving_ground import scores
from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.reporting import FIXED, number
from optclip._tuning.style import INK

BESIDE = (NO_CLIP, "autoclip", "zclip", "adagc", "robust_clip", "safeguard")
"""What is drawn as a column of its own; those that were run."""
COLUMNS, MOST = 3, 2.0
"""Panels in a row; and the loss over the best of the panel from which on all is dark."""


def draw(path: Path, results: list[dict[str, Any]]) -> bool:
    """Draws the picture.

    Args:
        path: Where the PNG goes.
        results: Those of jobs.

    Returns:
        Whether there was anything to draw.
    """
    found = {(result["task"], result["method"]): result["settings"] for result in results}
    panels = [
        (task, setting)
        for (task, method), settings in found.items()
        if method == FIXED
        for setting, runs in settings.items()
        if len(runs["thresholds"]) > 1
    ]
    if not panels:
        return False
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context({"font.size": 8, "text.color": INK}):
        size = (max(3.6 * columns, 7.0), 2.6 * rows + 0.7)
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (task, setting) in zip(grid.flat, panels, strict=False):
            of_methods = {
                method: found[task, method][setting]
                for method in (FIXED, *BESIDE)
                if (task, method) in found
            }
            _panel(axes, f"{task}: {setting}", of_methods)
        title = (
            "The loss by threshold and learning rate, over the best of its panel (x: diverged);\n"
            "to the right of the line, methods without a threshold to choose"
        )
        figure.suptitle(title, size=12, weight="bold", x=0.01, ha="left")
        figure.savefig(path)
    return True


def _panel(axes: Axes, title: str, of_methods: dict[str, dict[str, Any]]) -> None:
    fixed = of_methods[FIXED]
    columns = [(number(x, 2), losses) for x, losses in _columns(fixed)]
    columns += [(name, _columns(runs)[0][1]) for name, runs in of_methods.items() if name != FIXED]
    losses = np.array([column for _, column in columns]).T
    best = np.min(losses)
    ratios = losses / best if math.isfinite(best) else np.full(losses.shape, np.inf)
    shown = np.log(np.clip(ratios, 1, MOST))
    axes.imshow(shown, "viridis_r", vmin=0, vmax=math.log(MOST), aspect="auto", origin="lower")
    for (row, column), ratio in np.ndenumerate(ratios):
        text = "x" if math.isinf(ratio) else f"{ratio:.2f}" if ratio < 9.995 else ">10"
        dark = shown[row, column] > 0.5 * math.log(MOST)
        color = "white" if dark else INK
        axes.text(column, row, text, ha="center", va="center", size=5, color=color)
    axes.axvline(len(fixed["thresholds"]) - 0.5, color="white", lw=3)
    axes.set_title(title, size=8, loc="left")
    axes.set_xticks(range(len(columns)), [name for name, _ in columns], rotation=60, ha="right")
    axes.set_yticks(range(len(fixed["rates"])), [number(x, 2) for x in fixed["rates"]])
    axes.tick_params(length=0, labelsize=6)
    axes.set_ylabel("learning rate", size=7)


def _columns(runs: dict[str, Any]) -> list[tuple[float, np.ndarray]]:
    """Each threshold with its losses by learning rate."""
    return list(zip(runs["thresholds"], scores.over_seeds(runs["loss"]), strict=True))
