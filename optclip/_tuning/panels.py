"""The panels of a run's picture. The one module that needs matplotlib; imported when one is drawn.

Figures are made without pyplot, so nothing global is touched.
"""

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from optclip._tuning import leaves, ticks
from optclip._tuning.findings import Findings
from optclip._tuning.records import Record
from optclip._tuning.style import BLUE, DARK, FEW_POINTS, GRAY, GREEN, ORANGE, PURPLE
from optclip._tuning.wording import LogError

MOST_POINTS = 6000
"""Of a line; of longer ones the smallest and the largest value of every stretch are drawn."""

MOST_DOTS = 1500
"""Clipped steps that are marked; of more, every second, third, ..."""

Panel = tuple[float, Callable[[Axes, Record, Findings], None]]
"""Height in inches, and what draws it."""


def draw(record: Record, findings: Findings, title: str, subtitle: str) -> Figure:
    """The picture of a run: every panel that its log has something for, one above the other."""
    panels = _panels(record, findings)
    title = textwrap.fill(title, 74)
    heights = [height for height, _ in panels]
    size = (8, sum(heights) + 0.75 + 0.22 * title.count("\n"))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for (_, panel), axis in zip(panels, axes, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        panel(axis, record, findings)
    _label_steps(axes[-1], record, findings)
    figure.align_ylabels(axes[: len(axes) - bool(record.leaf_norms)])
    _head(figure, axes[0], title, subtitle)
    return figure


def _panels(record: Record, findings: Findings) -> list[Panel]:
    panels: list[Panel] = []
    if findings.loss is not None and np.isfinite(findings.loss).any():
        panels.append((1.7, _draw_loss))
    if _has_norms(record):
        panels.append((2.9, _draw_norms))
    if _has_norms(record) and _rates(record, findings):
        panels.append((1.5, _draw_rates))
    if record.leaf_norms:
        rows = min(len(record.leaf_norms), leaves.MOST_ROWS)
        panels.append((max(1.4, 0.7 + 0.16 * rows), _draw_leaves))  # room for its color bar
    if not panels:
        raise LogError(
            f"there is nothing to draw of {record.source}: no norm is finite and above 0, and no "
            "loss is finite"
        )
    return panels


def _has_norms(record: Record) -> bool:
    return bool((np.isfinite(record.norms) & (record.norms > 0)).any())


def _head(figure: Figure, axis: Axes, title: str, subtitle: str) -> None:
    """Both begin at the left edge of the figure: next to leaf names the panels are narrow."""
    left = 0.012
    figure.suptitle(title, x=left, ha="left", size=13, weight="bold", parse_math=False)
    _, labels = axis.get_legend_handles_labels()
    above = 7 + 15 * -(-len(labels) // _columns(labels))  # points; a legend comes between
    axis.set_title(" ", size=9, pad=above - 2)  # the room that the subtitle takes
    note = axis.annotate(
        textwrap.shorten(subtitle, 118, placeholder=" ..."),
        (left, 1),
        (0, above),
        xycoords=("figure fraction", "axes fraction"),
        textcoords="offset points",
        color="0.3",
        size=9,
        parse_math=False,
        annotation_clip=False,
    )
    note.set_in_layout(False)  # it may be longer than the panels are wide


def _label_steps(axis: Axes, record: Record, findings: Findings) -> None:
    steps = findings.steps
    margin = max(0.5, 0.01 * (steps[-1] - steps[0]))
    axis.set_xlim(steps[0] - margin, steps[-1] + margin)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    rise = np.array_equal(steps, record.steps)
    axis.set_xlabel(
        "step" if rise else "logged step, in order (the numbers in the log do not rise)"
    )


# Panels ------------------------------------------------------------------------------------------


def _draw_loss(axis: Axes, record: Record, findings: Findings) -> None:
    assert findings.loss is not None
    loss = findings.loss
    finite = loss[np.isfinite(loss)]
    start = np.median(finite[:10])
    if finite.max() > 20 * start > 0:  # on a linear axis all the rest would be a flat line
        ticks.on_log_axis(axis, most=5)
        axis.set_ylabel("loss\n(log axis)")
        loss = np.where(loss > 0, loss, np.nan)
    else:
        axis.set_ylabel("loss")
    _line(axis, findings.steps, loss, color=BLUE, lw=0.9)
    if axis.get_yscale() == "linear" and finite.min() >= 0:
        axis.set_ylim(bottom=0)
    alone = not _has_norms(record)  # else the panel below says what a mark is
    label = {"label": "spike"} if alone else {}
    _mark(axis, findings.steps, findings.spikes, 0.95, marker="v", color=PURPLE, **label)
    if alone and findings.spikes.any():
        _legend_above(axis)


def _draw_norms(axis: Axes, record: Record, findings: Findings) -> None:
    steps = findings.steps
    norms = np.where(record.norms > 0, record.norms, np.nan)  # a log axis has no zero
    _line(axis, steps, norms, color=GRAY, lw=0.8, label="norm before clipping")
    _dots(axis, steps, norms, findings.clipped)
    threshold = record.reading("threshold")
    if threshold is not None and (np.isfinite(threshold) & (threshold > 0)).any():
        shown = np.where(threshold > 0, threshold, np.nan)
        _line(axis, steps, shown, color="black", lw=1.5, label=_threshold_label(record))
    ticks.on_log_axis(axis)
    if (findings.spikes | findings.nonfinite | findings.skipped).any():
        low, high = axis.get_ylim()
        room = 0.25 if findings.skipped.any() else 0.15
        axis.set_ylim(low, high * (high / low) ** room)
    axis.set_ylabel("gradient norm\n(log axis)")
    _mark(axis, steps, findings.spikes, 0.95, marker="v", color=PURPLE, label="spike")
    _mark(axis, steps, findings.nonfinite, 0.89, marker="x", color="black", label="not finite")
    _mark(axis, steps, findings.skipped, 0.83, marker="s", color=GREEN, label="skipped")
    _legend_above(axis)


def _threshold_label(record: Record) -> str:
    """Says where a clip by groups shows but one threshold of several."""
    threshold, clipped_norm = record.reading("threshold"), record.reading("clipped_norm")
    if threshold is None or clipped_norm is None:
        return "threshold"
    several = (clipped_norm > 1.01 * threshold) & np.isfinite(clipped_norm)
    return "threshold (the smallest of several)" if several.any() else "threshold"


def _rates(record: Record, findings: Findings) -> list[tuple[str, np.ndarray, dict]]:
    """Label, share and style of every rate that the log knows of."""
    steps = np.arange(1.0, len(record.norms) + 1)
    since, recent = record.reading("clip_rate"), record.reading("recent_clip_rate")
    if since is None and findings.clipped.any():
        since = np.cumsum(findings.clipped) / np.fmax(1, np.cumsum(np.isfinite(record.norms)))
    bound, skipped = record.columns.get("bound/recent_clip_rate"), findings.skipped
    threshold = record.reading("threshold")
    shown = []
    if (threshold is not None and np.isfinite(threshold).any()) or _any(since):
        shown.append(("clipped since the start", since, {"color": ORANGE, "lw": 2.0}))
        # Dashed and on top: at first the two are the same.
        shown.append(("clipped recently", recent, {"color": DARK, "lw": 1.0, "ls": (0, (3, 2))}))
    style = {"color": BLUE, "lw": 1.0, "ls": "--"}
    shown.append(("update bounded recently", bound if _any(bound) else None, style))
    share = np.cumsum(skipped) / steps if skipped.any() else None
    shown.append(("skipped since the start", share, {"color": GREEN, "lw": 1.4, "ls": ":"}))
    return [(label, rate, style) for label, rate, style in shown if rate is not None]


def _any(column: np.ndarray | None) -> bool:
    return column is not None and bool((column > 0).any())


def _draw_rates(axis: Axes, record: Record, findings: Findings) -> None:
    rates = _rates(record, findings)
    for label, rate, style in rates:
        _line(axis, findings.steps, rate, label=label, **style)
    axis.set_ylabel("share of steps\n(%)")
    largest = max(np.nanmax(rate, initial=0.0) for _, rate, _ in rates)
    top = 1.0 if largest > 0.25 else max(0.05, 1.3 * largest)
    axis.set_ylim(-0.03 * top, 1.03 * top)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend_above(axis)


def _draw_leaves(axis: Axes, record: Record, findings: Findings) -> None:
    table = leaves.tabulate(record.leaf_norms)
    edges, values = leaves.binned(findings.steps, table.norms)
    positive = values[np.isfinite(values)]
    limits = np.percentile(positive, [1, 99]) if positive.size else np.array([0.1, 1.0])
    if limits[0] == limits[1]:
        limits = limits * [0.5, 2.0]
    rows = np.arange(len(table.names) + 1) - 0.5
    colors = colormaps["cividis"].with_extremes(bad="0.85")
    shown = np.ma.masked_invalid(values)
    mesh = axis.pcolormesh(edges, rows, shown, cmap=colors, norm="log", rasterized=True)
    mesh.set_clim(*limits)
    axis.set_yticks(range(len(table.names)), table.names, size=8, parse_math=False)
    axis.set_ylim(len(table.names) - 0.5, -0.5)  # the first layer on top
    axis.set_ylabel(table.label)
    axis.tick_params(axis="y", length=0)
    bar = axis.figure.colorbar(mesh, ax=axis, extend="both", aspect=30, pad=0.01)
    bar.ax.yaxis.set_major_locator(ticks.LogTicks(6))
    bar.ax.yaxis.set_major_formatter(ticks.OneStyle())
    bar.ax.minorticks_off()
    bar.set_label("norm of the leaf\n(log colors)")


# Parts of panels ---------------------------------------------------------------------------------


def _line(axis: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan)
    if finite.sum() < 0.5 * len(values):  # logged now and then; gaps would hide all of it
        steps, values = steps[finite], values[finite]
    steps, values = thinned(steps, values)
    marker = "." if finite.sum() <= FEW_POINTS else None
    axis.plot(steps, values, marker=marker, ms=5, **style)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line of `MOST_POINTS` at the most: the smallest and the largest value of every stretch."""
    stretch = -(-2 * len(values) // MOST_POINTS)
    if stretch <= 2:
        return steps, values
    starts = range(0, len(values), stretch)
    kept = set()
    for start in starts:
        part = values[start : start + stretch]
        finite = np.isfinite(part)
        kept.add(start + int(np.argmin(np.where(finite, part, np.inf))))
        kept.add(start + int(np.argmax(np.where(finite, part, -np.inf))))
    at = np.array(sorted(kept))
    return steps[at], values[at]


def _dots(axis: Axes, steps: np.ndarray, norms: np.ndarray, clipped: np.ndarray) -> None:
    at = np.flatnonzero(clipped)
    if not at.size:
        return
    every = -(-len(at) // MOST_DOTS)
    size = min(4.0, max(1.2, 90 / len(steps) ** 0.5))
    label = "clipped step" + (f" (one in {every} marked)" if every > 1 else "")
    places = steps[at[::every]], norms[at[::every]]
    axis.plot(*places, ".", color=ORANGE, ms=size, label=label, zorder=3)  # above the threshold


def _mark(axis: Axes, steps: np.ndarray, which: np.ndarray, height: float, **style: Any) -> None:
    """Marks some steps in a row near the top of a panel."""
    at = np.flatnonzero(which)
    if at.size:
        at = at[:: -(-len(at) // MOST_DOTS)]
        axis.plot(
            steps[at],
            np.full(len(at), height),
            ls="none",
            ms=5,
            transform=axis.get_xaxis_transform(),
            **style,
        )


def _legend_above(axis: Axes) -> None:
    """A legend above the panel, where it hides nothing; as many in a row as there is room for."""
    _, labels = axis.get_legend_handles_labels()
    if labels:
        legend = axis.legend(
            frameon=False,
            ncols=_columns(labels),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0,
            fontsize=9,
            columnspacing=1.5,
        )
        for handle in legend.legend_handles:
            if isinstance(handle, Line2D):
                handle.set_markersize(6)


def _columns(labels: list[str]) -> int:
    return 4 if len(labels) == 4 and sum(map(len, labels)) < 62 else 3
