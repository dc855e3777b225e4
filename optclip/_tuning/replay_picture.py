"""The picture of a `Replay`: a small panel for each method, all over the same norms."""

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from optclip._tuning.findings import SPIKE_TIMES, places
from optclip._tuning.replay_rows import Replayed, Row
from optclip._tuning.replay_table import without_norms
from optclip._tuning.style import BLUE, FEW_POINTS, GRAY, INK, NEED_MATPLOTLIB
from optclip._tuning.wording import LogError, number, percent, steps_taken, times

WIDTH, PANEL, FOOT = 8.0, 1.75, 0.5
"""Inches: of the picture, of the height of a row of panels, and below them."""
DOTS = 120
MODEST = 0.2
"""A rule that clips no more than this share of the steps may be called the one that does best: of
those that hold every spike the one that clips least."""


def draw(replay: Replayed, path: Path) -> Path:
    """Draws the picture.

    Args:
        replay: What to draw; needs a row at least.
        path: Where the PNG goes; its folder has to exist.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no row.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(NEED_MATPLOTLIB) from None
    if not replay.rows:
        raise LogError("there is no method to draw; replay one that is in optclip.tuning's list")
    columns = min(2, len(replay.rows))
    lines = math.ceil(len(replay.rows) / columns)
    title, note = textwrap.fill(finding(replay), 78), textwrap.fill(_note(replay), 118)
    head = 0.9 + 0.2 * len(title.splitlines()) + 0.15 * len(note.splitlines())
    height = lines * PANEL + head + FOOT
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(0.105, FOOT / height, 0.97, 1 - head / height, 0.07, 0.5)
    rise = bool((np.diff(replay.record.steps) > 0).all())
    label = "step" if rise else "logged step, in order"
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(replay.rows))
        if place < len(replay.rows):
            _panel(axes, replay, replay.rows[place])
        if len(replay.rows) - columns <= place < len(replay.rows):  # the lowest of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(label, size=9, labelpad=2)
    for axes in grid[:, 0]:
        axes.set_ylabel("gradient norm\n(log axis)", size=9)
    _head(figure, title, note, height)
    figure.savefig(path)
    return path


def finding(replay: Replayed) -> str:
    """What there is to see, in one sentence."""
    rows, count = replay.rows, len(replay.rows)
    shares = [row.clipped for row in rows]
    what = f"The {count} rules would have clipped from {percent(min(shares))} to "
    if count == 1:
        what = f"{rows[0].method} would have clipped "
    if not replay.spikes:
        return f"No spikes; {what[:1].lower()}{what[1:]}{percent(max(shares))} of the steps"
    spikes = "the spike" if replay.spikes == 1 else f"all {replay.spikes} spikes"
    modest = [row for row in rows if row.clipped <= MODEST and not row.spikes_through]
    if not modest:
        return f"{what}{percent(max(shares))} of the steps"
    best = min(modest, key=lambda row: (row.clipped, row.worst_spike))
    holds = f"{best.method} holds {spikes} to {times(best.worst_spike)} the usual norm or less and"
    verb = _verb(best)
    if count == 1:
        return f"{holds} {verb} {percent(best.clipped)} of the steps"
    holding = sum(not row.spikes_through for row in rows)
    return (
        f"{holding} of {count} rules hold {spikes} below {SPIKE_TIMES:g} times the usual norm; "
        f"of these {best.method} {verb} the fewest steps, {percent(best.clipped)}"
    )


def _note(replay: Replayed) -> str:
    note = (
        f"{len(replay.record.norms):,} steps of {replay.record.source}"
        f"{without_norms(replay.record.norms)}. Open loop: the norms are "
        "the recorded ones; had a rule clipped, later ones would differ."
    )
    return textwrap.shorten(note, 220, placeholder=" ...")


def _panel(axes: Any, replay: Replayed, row: Row) -> None:
    from matplotlib import ticker

    from optclip._tuning import ticks

    record = replay.record
    norms = np.where(record.norms > 0, record.norms, np.nan)
    steps = places(record.steps)
    marks = {"marker": "." if len(steps) <= FEW_POINTS else None, "ms": 5}
    axes.plot(steps, norms, color=GRAY, lw=0.7, label="recorded norm", **marks)
    line = row.outputs if row.by_leaf else row.thresholds
    shown = np.where(np.isfinite(line) & (line > 0), line, np.nan)
    axes.plot(steps, shown, color=BLUE, lw=1.6, label="threshold", **marks)
    bottom, top = _limits(norms)
    what = "norm let through" if row.by_leaf else "threshold"
    axes.text(
        *(0.5, 0.85, _out_of_sight(what, shown, bottom, top)),
        transform=axes.transAxes,
        ha="center",
        size=8.5,
        color=BLUE,
        bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
        zorder=4,
    )
    ticks.on_log_axis(axes, most=5)
    axes.set_ylim(bottom, top)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.set_title(row.method, loc="left", size=9.5, weight="bold", pad=17, color=INK)
    axes.annotate(
        _figures(replay, row),
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        size=8.5,
        color=INK,
    )


def _out_of_sight(what: str, line: np.ndarray, bottom: float, top: float) -> str:
    """What to say of a line that leaves its panel; nothing where it does not."""
    above, below = (line > top).sum(), (line < bottom).sum()
    if not np.isfinite(line).any():
        return f"no {what}"
    if above + below == np.isfinite(line).sum():
        return f"{what} {'above' if above else 'below'} the picture"
    if above:
        return f"{what} up to {number(float(np.nanmax(line)))}, above the picture"
    return f"{what} down to {number(float(np.nanmin(line)))}, below the picture" if below else ""


def _verb(row: Row) -> str:
    return "skips" if row.method.startswith("skip") else "clips"


def _figures(replay: Replayed, row: Row) -> str:
    said = [f"{_verb(row)} {percent(row.clipped)}"]
    if replay.spikes:
        said.append(f"worst spike {times(row.worst_spike)}")
    if row.steps_after_rise is not None:
        wait = steps_taken(row.steps_after_rise)
        said.append("no rise followed" if wait == "never" else f"follows the rise in {wait} steps")
    if row.by_leaf:
        said.append("line: norm let through")
    return ", ".join(said)


def _limits(norms: np.ndarray) -> tuple[float, float]:
    known = norms[np.isfinite(norms)]
    if not known.size:
        return 0.1, 10.0
    low = float(np.quantile(known, 0.01))
    return low / 2.5, max(float(known.max()), low) * 2


def _head(figure: Any, title: str, note: str, height: float) -> None:
    figure.text(0.012, 1 - 0.08 / height, title, size=12, weight="bold", va="top", color=INK)
    below = 0.13 + 0.2 * len(title.splitlines())
    plain = {"color": "0.3", "va": "top", "parse_math": False}
    figure.text(0.012, 1 - below / height, note, size=8.5, **plain)
    below += 0.08 + 0.15 * len(note.splitlines())
    figure.legend(
        handles=figure.axes[0].lines[:2],
        loc="upper left",
        bbox_to_anchor=(0.012, 1 - below / height),
        borderpad=0,
        borderaxespad=0,
        ncols=2,
        frameon=False,
        fontsize=9,
    )
