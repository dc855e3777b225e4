"""Who wins where: methods by settings, the color says how far from the best fixed threshold."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.proving_ground.reporting import Row, by_setting, reference
from benchmarks.proving_ground.running import contenders
from optclip._tuning.style import BLUE, INK, ORANGE

MOST = 1.5
"""The ratio from which on the color does not change any more; its inverse on the other side."""

SIDE_BY_SIDE = 8
"""Settings up to which the two matrices stand beside each other; more, and one is below."""


def draw(path: Path, found: list[Row]) -> None:
    """Draws two matrices: the loss over the best fixed threshold's, and the range of good rates.

    Args:
        path: Where the PNG goes.
        found: The scores.
    """
    groups = by_setting(found)
    known = list(contenders())
    methods = sorted({row.method for row in found}, key=lambda name: _place(known, name))
    cells = {(row.method, (row.task, row.setting)): row for row in found}
    ratios = np.full((len(methods), len(groups)), np.nan)
    ranges = ratios.copy()
    for column, (name, group) in enumerate(groups.items()):
        best = reference(group)
        for place, method in enumerate(methods):
            row = cells.get((method, name))
            if row is not None:
                ratios[place, column] = row.score.loss / best if math.isfinite(best) else np.nan
                good = row.score.rates_range
                ranges[place, column] = np.nan if good is None else good
    columns = [f"{task}: {setting}" for task, setting in groups]
    beside = len(columns) <= SIDE_BY_SIDE
    width, height = 0.46 * len(columns) + 0.4, 0.22 * len(methods) + 2.2
    size = (max(3.2 + 2 * width, 8.0), height + 1) if beside else (2.8 + width, 2 * height + 0.6)
    with mpl.rc_context({"font.size": 8, "text.color": INK}):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        left, right = figure.subplots(*((1, 2) if beside else (2, 1)), sharey=True)
        figure.suptitle("Which clip should one use?", size=13, weight="bold", x=0.01, ha="left")
        _ratios(left, ratios)
        _ranges(right, ranges)
        for axes in (left, right):
            axes.set_xticks(range(len(columns)), columns, rotation=60, ha="left", size=7)
            axes.xaxis.tick_top()
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_yticks(range(len(methods)), methods)
        figure.savefig(path)


def _place(known: list[str], method: str) -> tuple[int, str]:
    """A method with a threshold of its own comes after the one with the best."""
    name = method if method in known else method.partition("(")[0]
    return known.index(name), method


def _ratios(axes: Axes, ratios: np.ndarray) -> None:
    colors = LinearSegmentedColormap.from_list("ratio", [BLUE, "#f4f4f4", ORANGE])
    logs = np.log(np.where(np.isinf(ratios), MOST, ratios))
    shown = np.clip(logs, -math.log(MOST), math.log(MOST))
    axes.imshow(shown, colors, TwoSlopeNorm(0, -math.log(MOST), math.log(MOST)), aspect="auto")
    axes.set_xlabel(
        "loss over that of the best fixed threshold, both at\ntheir best learning rate "
        "(blue: better, orange: worse)"
    )
    for (row, column), ratio in np.ndenumerate(ratios):
        if not math.isnan(ratio):
            strong = bool(abs(shown[row, column]) > 0.7 * math.log(MOST))
            _text(axes, row, column, _short(ratio), strong)


def _ranges(axes: Axes, ranges: np.ndarray) -> None:
    colors = LinearSegmentedColormap.from_list("range", ["#f4f4f4", "#009E73"])
    decades = np.log10(np.where(ranges > 0, ranges, 1))
    axes.imshow(np.where(np.isnan(ranges), np.nan, decades), colors, vmin=0, vmax=3, aspect="auto")
    axes.set_xlabel(
        "learning rates within 5% of the method's best:\nlargest over smallest (green: wide)"
    )
    for (row, column), value in np.ndenumerate(ranges):
        if not math.isnan(value):
            text = f"{value:.2g}" if 0 < value < 99.5 else f"{value:.0f}" if value else "-"
            _text(axes, row, column, text, bool(decades[row, column] > 2))


def _short(ratio: float) -> str:
    if math.isinf(ratio):
        return "div."
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}" if ratio < 999.5 else ">999"


def _text(axes: Axes, row: int, column: int, text: str, strong: bool) -> None:
    color = "white" if strong else INK
    axes.text(column, row, text, ha="center", va="center", size=6.5, color=color)
