"""`plot_run`: the picture of a recorded run, made to be read."""

import os
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from optclip._tuning import style
from optclip._tuning.findings import Findings, look_at
from optclip._tuning.log import Record, read_log
from optclip._tuning.style import BLUE, DARK, GRAY, GREEN, ORANGE, PURPLE
from optclip._tuning.wording import LogError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DOTS = 1500
"""Clipped steps that are marked; of more, every second, third, ..."""
MOST_LEAVES, MOST_COLUMNS = 40, 400
"""Of the heat map."""


def plot_run(
    source: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    norm_key: str | None = None,
) -> "Figure":
    """Draws a recorded run: loss, norm against threshold, clip rate, and the norms of the leaves.

    Every panel that the log has something for, over the steps: the loss, on a log axis where it
    diverged; the norm before clipping with clipped steps and the threshold; the share of steps
    clipped; and, where leaf norms were logged (`detail=True`, and `optclip.metrics` with
    `params`), a heat map of the 40 largest. Spikes (steps whose column "spike" is true, where there
    is one; else steps whose norm is 5 times and 4 deviations above what is usual around them),
    skipped steps and those that were not finite are marked. The title says what there is to see.

    Args:
        source: The path of a file with one JSON object in each line, rows, columns or just the
            norms, with the names of `optclip.metrics`; and "step", "loss", "spike" if there are.
        path: Where to save it: a PNG of about 960 points' width, or a PDF or SVG by its ending.
        title: Instead of the finding.
        subtitle: What was run. Default: where the log comes from, and what to know of it.
        norm_key: The name of the norm, where it is none of the usual ones.

    Returns:
        The `matplotlib.figure.Figure`; no pyplot, so nothing needs to be closed.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If matplotlib is missing.
        ValueError: If the source has neither norms nor a loss, with one line that says what to do.

    Example:
        >>> from optclip._tuning.plotting import plot_run
        >>> log = {"clip/norm": [0.5, 2.0], "clip/threshold": [1.0, 1.0], "loss": [0.8, 0.25]}
        >>> plot_run(log).get_suptitle()
        '50% of 2 steps clipped; loss 0.25 at the end'
    """
    record = read_log(source, norm_key=norm_key, loss_will_do=True)
    findings = look_at(record)
    title = findings.sentence if title is None else title
    figure = _draw(record, findings, title, _caption(record) if subtitle is None else subtitle)
    if path is not None:
        figure.savefig(path)
    return figure


def _caption(record: Record) -> str:
    norm = "" if record.prefix in ("", "clip/") else f"; norm: {record.prefix}norm"
    notes = (note.replace(f" of {record.source}", "") for note in record.notes)
    return "; ".join((record.source + norm, *notes))


def _draw(record: Record, findings: Findings, title: str, subtitle: str) -> "Figure":
    """Every panel that the log has something for, one above the other."""
    panels: list[tuple[float, Callable[[Axes, Record, Findings], None]]] = []  # height in inches
    if findings.loss is not None and np.isfinite(findings.loss).any():
        panels.append((1.7, _draw_loss))
    if _any(record.norms):
        panels.append((2.9, _draw_norms))
        panels += [(1.5, _draw_rates)] if _rates(record, findings) else []
    if any(map(_any, record.leaf_norms.values())):
        rows = min(len(record.leaf_norms), MOST_LEAVES)
        panels.append((max(1.4, 0.7 + 0.16 * rows), _draw_leaves))  # room for its color bar
    if not panels:
        raise LogError(
            f"there is nothing to draw of {record.source}: no norm is finite and above 0, and no "
            "loss is finite"
        )
    heights = [height for height, _ in panels]
    figure = style.new_figure(sum(heights) + 0.2)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for (_, panel), axis in zip(panels, axes, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        panel(axis, record, findings)
    first, last = findings.steps[[0, -1]]
    margin = max(0.5, 0.01 * (last - first))
    axes[-1].set_xlim(first - margin, last + margin)
    style.step_axis(axes[-1], np.array_equal(findings.steps, record.steps))
    # Next to the names of the leaves the labels of the others would stand far from their panels.
    figure.align_ylabels(axes[: len(axes) - (panels[-1][1] is _draw_leaves)])
    style.head(figure, title, subtitle)
    return figure


def _any(column: np.ndarray | None) -> bool:
    """Whether anything is above 0 and finite."""
    return column is not None and bool((np.isfinite(column) & (column > 0)).any())


def _draw_loss(axis: "Axes", record: Record, findings: Findings) -> None:
    assert findings.loss is not None
    loss = findings.loss
    finite = loss[np.isfinite(loss)]
    diverged = finite.max() > 20 * np.median(finite[:10]) > 0
    shown = np.where(loss > 0, loss, np.nan) if diverged else loss
    style.line(axis, findings.steps, shown, color=BLUE, lw=0.9)
    axis.set_ylabel("loss\n(log axis)" if diverged else "loss")
    if diverged:  # on a linear axis all the rest would be a flat line
        style.on_log_axis(axis, most=5)
    elif finite.min() >= 0:
        axis.set_ylim(bottom=0)
    label = "_spike" if _any(record.norms) else "spike"  # one legend says it, that of the norms
    _mark(axis, findings.steps, findings.spikes, 0.95, marker="v", color=PURPLE, label=label)
    style.legend_above(axis)


def _draw_norms(axis: "Axes", record: Record, findings: Findings) -> None:
    steps = findings.steps
    norms = np.where(record.norms > 0, record.norms, np.nan)  # a log axis has no zero
    style.line(axis, steps, norms, color=GRAY, lw=0.8, label="norm before clipping")
    clipped = np.flatnonzero(findings.clipped)
    if clipped.size:
        every = -(-len(clipped) // MOST_DOTS)
        label = "clipped step" + (f" (one in {every} marked)" if every > 1 else "")
        size = min(4.0, max(1.2, 90 / len(steps) ** 0.5))
        clipped = clipped[::every]  # drawn above the threshold
        axis.plot(steps[clipped], norms[clipped], ".", color=ORANGE, ms=size, label=label, zorder=3)
    threshold, passed = record.reading("threshold"), record.reading("clipped_norm")
    if threshold is not None and _any(threshold):
        label = "threshold"
        if passed is not None and _any(passed[passed > 1.01 * threshold]):  # a clip by groups
            label += " (the smallest of several)"
        shown = np.where(threshold > 0, threshold, np.nan)
        style.line(axis, steps, shown, color="black", lw=1.5, label=label)
    style.on_log_axis(axis)
    axis.set_ylabel("gradient norm\n(log axis)")
    if (findings.spikes | findings.nonfinite | findings.skipped).any():
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** (0.25 if findings.skipped.any() else 0.15))
    _mark(axis, steps, findings.spikes, 0.95, marker="v", color=PURPLE, label="spike")
    _mark(axis, steps, findings.nonfinite, 0.89, marker="x", color="black", label="not finite")
    _mark(axis, steps, findings.skipped, 0.83, marker="s", color=GREEN, label="skipped")
    style.legend_above(axis)


def _mark(axis: "Axes", steps: np.ndarray, which: np.ndarray, height: float, **look: Any) -> None:
    """Marks some steps in a row near the top of a panel."""
    if which.any():
        heights, top = np.full(which.sum(), height), axis.get_xaxis_transform()
        axis.plot(steps[which], heights, ls="none", ms=5, transform=top, **look)


def _rates(record: Record, findings: Findings) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Every share of steps that the log knows of, and how it is drawn."""
    since, recent = record.reading("clip_rate"), record.reading("recent_clip_rate")
    if since is None and findings.clipped.any():
        since = np.cumsum(findings.clipped) / np.fmax(1, np.cumsum(np.isfinite(record.norms)))
    threshold = record.reading("threshold")
    if not _any(since) and (threshold is None or not np.isfinite(threshold).any()):
        since = recent = None
    bound = record.columns.get("bound/recent_clip_rate")
    bound = bound if _any(bound) else None
    skipped = np.cumsum(findings.skipped) / np.arange(1, len(findings.skipped) + 1)
    skipped = skipped if skipped.any() else None
    shown = [
        (since, {"label": "clipped since the start", "color": ORANGE, "lw": 2.0}),
        # Dashed and on top: at first the two are the same.
        (recent, {"label": "clipped recently", "color": DARK, "lw": 1.0, "ls": (0, (3, 2))}),
        (bound, {"label": "update bounded recently", "color": BLUE, "lw": 1.0, "ls": "--"}),
        (skipped, {"label": "skipped since the start", "color": GREEN, "lw": 1.4, "ls": ":"}),
    ]
    return [(rate, look) for rate, look in shown if rate is not None]


def _draw_rates(axis: "Axes", record: Record, findings: Findings) -> None:
    rates = _rates(record, findings)
    for rate, look in rates:
        style.line(axis, findings.steps, rate, **look)
    axis.set_ylabel("share of steps\n(%)")
    largest = max(np.nanmax(rate, initial=0.0) for rate, _ in rates)
    top = 1.0 if largest > 0.25 else max(0.05, 1.3 * largest)
    axis.set_ylim(-0.03 * top, 1.03 * top)
    axis.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    style.legend_above(axis)


def _draw_leaves(axis: "Axes", record: Record, findings: Findings) -> None:
    """A heat map: a row a leaf, a column a step, or the median of a stretch of them."""
    from matplotlib import colormaps

    paths, steps = list(record.leaf_norms), findings.steps
    norms = np.array(list(record.leaf_norms.values()))
    norms = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)
    largest = np.argsort(-np.fmax.reduce(norms, axis=1), kind="stable")[:MOST_LEAVES]
    largest.sort()  # in the order of the log; NaN, of leaves without a norm, came last
    stretch = -(-len(steps) // MOST_COLUMNS)
    table = np.pad(norms[largest], ((0, 0), (0, -len(steps) % stretch)), constant_values=np.nan)
    table = np.ma.masked_invalid(table.reshape(len(largest), -1, stretch))
    medians = np.ma.masked_invalid(np.ma.median(table, axis=2))
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    edges = np.append(steps[::stretch], steps[-1] + gap) - gap / 2
    rows = np.arange(len(largest) + 1) - 0.5
    colors = colormaps["cividis"].with_extremes(bad="0.85")
    mesh = axis.pcolormesh(edges, rows, medians, cmap=colors, norm="log", rasterized=True)
    mesh.set_clim(*np.percentile(medians.compressed(), [1, 99]))
    axis.set_yticks(rows[1:] - 0.5, _short([paths[at] for at in largest]), size=8, parse_math=False)
    axis.set_ylim(rows[-1], rows[0])  # the first layer on top
    count = f"\n({MOST_LEAVES} largest of {len(paths):,})" if len(paths) > MOST_LEAVES else ""
    axis.set_ylabel("leaf" + count)
    axis.tick_params(axis="y", length=0)
    bar = axis.figure.colorbar(mesh, ax=axis, extend="both", aspect=30, pad=0.01)
    style.on_log_axis(bar.ax, most=6)
    bar.set_label("norm of the leaf\n(log colors)")


def _short(paths: list[str]) -> list[str]:
    """Names that leave room for the picture: without what all begin with, and cut in the middle."""
    folders = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
    names = ["/".join(path.split("/")[shared:]) for path in paths]
    return [name if len(name) <= 28 else f"{name[:12]}...{name[-13:]}" for name in names]
