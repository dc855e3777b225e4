"""The picture of a `Replay`: a small panel for each method, all over the same norms."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optclip.tuning.findings import SPIKE_TIMES
from optclip.tuning.wording import percent, steps_taken, times

if TYPE_CHECKING:
    from optclip.tuning.replaying import Replay, Row

# From Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#999999", "#222222"
WIDTH, PANEL, HEAD, FOOT = 8.0, 1.75, 1.45, 0.5
"""Inches: of the picture, of the height of a row of panels, above and below them."""
DOTS = 120
MODEST = 0.2
"""A rule that clips no more than this share of the steps may be called the one that does best."""


def draw(replay: "Replay", path: Path) -> Path:
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
        raise ImportError('pictures need matplotlib: pip install "optclip[tuning]"') from None
    if not replay.rows:
        raise ValueError("there is no method to draw; replay one that is in optclip.tuning's list")
    columns = min(2, len(replay.rows))
    lines = math.ceil(len(replay.rows) / columns)
    height = lines * PANEL + HEAD + FOOT
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(0.085, FOOT / height, 0.985, 1 - HEAD / height, 0.06, 0.5)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(replay.rows))
        if place < len(replay.rows):
            _panel(axes, replay, replay.rows[place])
        if len(replay.rows) - columns <= place < len(replay.rows):  # the lowest of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step", size=9, labelpad=2)
    for axes in grid[:, 0]:
        axes.set_ylabel("gradient norm", size=9)
    _head(figure, replay, height)
    figure.savefig(path)
    return path


def finding(replay: "Replay") -> str:
    """What there is to see, in one sentence."""
    modest = [row for row in replay.rows if row.clipped <= MODEST]
    low, high = (f([row.clipped for row in replay.rows]) for f in (min, max))
    among = f"of {len(replay.rows)} rules"
    if not replay.spikes or not modest:
        return f"The rules would have clipped from {percent(low)} to {percent(high)} of the steps"
    holding = sum(row.spikes_through == 0 for row in replay.rows)
    best = min(modest, key=lambda row: row.worst_spike)
    spikes = "the spike" if replay.spikes == 1 else f"all {replay.spikes} spikes"
    return (
        f"{holding} {among} hold {spikes} below {SPIKE_TIMES:g} times the usual norm; "
        f"{best.method} to {times(best.worst_spike)}, with {percent(best.clipped)} of the steps "
        "clipped"
    )


def _panel(axes: Any, replay: "Replay", row: "Row") -> None:
    record = replay.record
    norms = np.where(record.norms > 0, record.norms, np.nan)
    axes.plot(record.steps, norms, color=GREY, lw=0.7, label="recorded norm")
    line = row.outputs if row.by_leaf else row.thresholds
    shown = np.where(np.isfinite(line) & (line > 0), line, np.nan)
    axes.plot(record.steps, shown, color=BLUE, lw=1.6, label="threshold")
    bottom, top = _limits(norms)
    if not (np.isfinite(shown) & (shown < top) & (shown > bottom)).any():
        where = "above" if not (shown < bottom).any() else "below"
        axes.text(0.5, 0.85, f"threshold {where} the picture", **_note(axes))
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.minorticks_off()
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


def _note(axes: Any) -> dict[str, Any]:
    return {"transform": axes.transAxes, "ha": "center", "size": 8.5, "color": BLUE}


def _figures(replay: "Replay", row: "Row") -> str:
    said = [f"clips {percent(row.clipped)}"]
    if replay.spikes:
        said.append(f"worst spike {times(row.worst_spike)}")
    if row.steps_after_rise is not None:
        wait = steps_taken(row.steps_after_rise)
        said.append("no rise followed" if wait == "never" else f"follows the rise in {wait} steps")
    return ", ".join(said)


def _limits(norms: np.ndarray) -> tuple[float, float]:
    known = norms[np.isfinite(norms)]
    if not known.size:
        return 0.1, 10.0
    low = float(np.quantile(known, 0.01))
    return low / 2.5, max(float(known.max()), low) * 2


def _head(figure: Any, replay: "Replay", height: float) -> None:
    title = textwrap.fill(finding(replay), 78)
    figure.text(0.012, 1 - 0.08 / height, title, size=12, weight="bold", va="top", color=INK)
    below = 0.13 + 0.2 * len(title.splitlines())
    note = (
        f"{len(replay.record.norms):,} steps of {replay.record.source}. Open loop: the norms are "
        "the recorded ones; had a rule clipped, later ones would differ."
    )
    shown = textwrap.fill(textwrap.shorten(note, 220, placeholder=" ..."), 118)
    figure.text(0.012, 1 - below / height, shown, size=8.5, color="0.3", va="top", parse_math=False)
    below += 0.08 + 0.15 * len(shown.splitlines())
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
