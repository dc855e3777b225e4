"""The picture of a `Replay`: a small panel for each method, all over the same norms."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optclip._tuning import style
from optclip._tuning.findings import SPIKE_TIMES, places
from optclip._tuning.replay_rows import OPEN_LOOP, Replayed, Row
from optclip._tuning.replay_table import without_norms
from optclip._tuning.wording import LogError, number, percent, steps_taken, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEST = 0.2
"""A rule that clips no more than this share of the steps may be called the one that does best: of
those that hold every spike the one that clips least."""


def draw(replay: Replayed, path: Path) -> Path:
    """Draws the picture to a path, and answers with it."""
    count = len(replay.rows)
    if not count:
        raise LogError("there is no method to draw; replay one that is in optclip.tuning's list")
    columns, lines = min(2, count), (count + 1) // 2
    figure = style.new_figure(1.85 * lines + 0.35)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    rising = bool((np.diff(replay.record.steps) > 0).all())
    for axes, row in zip(grid.flat, replay.rows, strict=False):
        _panel(axes, replay, row)
    for axes in grid.flat[count - columns : count]:  # the lowest of its column
        axes.tick_params(labelbottom=True)
        style.step_axis(axes, rising, most=4)
        axes.xaxis.label.set_size(9)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("gradient norm\n(log axis)", size=9)
    norms = replay.record.norms
    note = f"{len(norms):,} steps of {replay.record.source}{without_norms(norms)}. {OPEN_LOOP}"
    style.head(figure, finding(replay), note, grid[0, 0].lines[:2])
    figure.savefig(path)
    return path


def finding(replay: Replayed) -> str:
    """What there is to see, in one sentence."""
    rows, count = replay.rows, len(replay.rows)
    shares = [row.clipped for row in rows]
    what = f"{rows[0].method} would have clipped {percent(shares[0])} of the steps"
    if count > 1:
        low, high = percent(min(shares)), percent(max(shares))
        what = f"{count} rules would have clipped from {low} to {high} of the steps"
    if not replay.spikes:
        return f"No spikes; {what}"
    holding = [row for row in rows if not row.spikes_through]
    modest = [row for row in holding if row.clipped <= MODEST]
    if not modest:
        return what
    best = min(modest, key=lambda row: (row.clipped, row.worst_spike))
    spikes = "the spike" if replay.spikes == 1 else f"all {replay.spikes} spikes"
    if count == 1:
        worst, share = times(best.worst_spike), percent(best.clipped)
        what = f"to {worst} the usual norm or less and {_verb(best)} {share} of the steps"
        return f"{best.method} holds {spikes} {what}"
    return (
        f"{len(holding)} of {count} rules hold {spikes} below {SPIKE_TIMES:g} times the usual "
        f"norm; of these {best.method} {_verb(best)} the fewest steps, {percent(best.clipped)}"
    )


def _verb(row: Row) -> str:
    return "skips" if row.method.startswith("skip") else "clips"


def _panel(axes: "Axes", replay: Replayed, row: Row) -> None:
    norms = np.where(replay.record.norms > 0, replay.record.norms, np.nan)
    steps = places(replay.record.steps)
    style.line(axes, steps, norms, color=style.GRAY, lw=0.7, label="recorded norm")
    line = row.outputs if row.by_leaf else row.thresholds
    shown = np.where(np.isfinite(line) & (line > 0), line, np.nan)
    style.line(axes, steps, shown, color=style.BLUE, lw=1.6, label="threshold")
    known = norms[np.isfinite(norms)]
    low = float(np.quantile(known, 0.01))
    bottom, top = low / 2.5, 2 * float(known.max())
    style.on_log_axis(axes, most=5)
    axes.set_ylim(bottom, top)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    what = "norm let through" if row.by_leaf else "threshold"
    said = _out_of_sight(what, shown, bottom, top)
    box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
    place = {"transform": axes.transAxes, "ha": "center", "zorder": 4}
    axes.text(0.5, 0.85, said, size=8.5, color=style.BLUE, bbox=box, **place)
    axes.set_title(row.method, loc="left", size=9.5, weight="bold", pad=17, parse_math=False)
    above: Any = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(_figures(replay, row), (0, 1), (0, 5), size=8.5, **above)


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


def _figures(replay: Replayed, row: Row) -> str:
    """The line below the name of a method."""
    said = [f"{_verb(row)} {percent(row.clipped)}"]
    if replay.spikes:
        said.append(f"worst spike {times(row.worst_spike)}")
    if row.steps_after_rise is not None:
        wait = steps_taken(row.steps_after_rise)
        said.append("no rise followed" if wait == "never" else f"follows the rise in {wait} steps")
    if row.by_leaf:
        said.append("line: norm let through")
    return ", ".join(said)
