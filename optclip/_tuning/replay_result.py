"""What a replay found: its figures, as a table and as a picture."""

import io
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from optclip._tuning import style
from optclip._tuning.findings import SPIKE_TIMES, places
from optclip._tuning.log import Record
from optclip._tuning.plain import plain
from optclip._tuning.suggesting import Suggestion
from optclip._tuning.wording import LogError, counted, number, percent, steps_taken, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN_WIDTH = 100  # Letters in a line of a replay that is printed.
NOTHING = "-"  # What stands where there is nothing to say; a column of it alone is left out.

# A rule that clips no more than this share of the steps may be called the one that does best: of
# those that hold every spike the one that clips least.
MODEST = 0.2

OPEN_LOOP = (
    "Open loop: the rules see the norms as they were recorded; had a rule clipped, later norms "
    "would have been others."
)


class Row(NamedTuple):
    """What one method would have done.

    Attributes:
        method: Its name.
        clipped: Share of the finite steps that it clips (or skips).
        clipped_last_quarter: The same in the last quarter of the run.
        worst_spike: The largest norm that comes out of one of the record's spikes, in multiples of
            the usual norm around it; NaN where there is none.
        spikes_through: How many of the record's spikes come out at 5 times the usual norm or more.
        steps_after_rise: How many steps after the level rose for good it goes on taking more than
            10% off most steps; infinite where that never ends, None where the level does not rise.
        steps_after_spike: The same after the spike that it takes longest to get over; None where
            there is no spike, or it takes 10% off most steps before it too.
        final_threshold: The threshold at the last step.
        by_leaf: Whether it clips leaf by leaf; its thresholds then are the smallest of any leaf.
        thresholds: The threshold of every step; infinite where the method does not clip.
        outputs: The norm that comes out of every step; 0 where it is skipped.

    All waits are in steps of the run, also where only some of its steps were logged.
    """

    method: str
    clipped: float
    clipped_last_quarter: float
    worst_spike: float
    spikes_through: int
    steps_after_rise: float | None
    steps_after_spike: float | None
    final_threshold: float
    by_leaf: bool
    thresholds: np.ndarray
    outputs: np.ndarray


class Replay(NamedTuple):
    """What every method would have done on a recorded run.

    Attributes:
        rows: One for each method.
        not_replayed: Why the others were not, by name.
        record: The run.
        spikes: How many spikes it has: steps at 5 times the usual norm or more, and 4 deviations
            above it.
        worst_spike: The norm of the highest of them, in multiples of the usual norm around it; NaN
            where there is none.
        rise: The step at which the level rises for good; None where it does not.
        suggestion: What `suggest_threshold` says of the run.
    """

    rows: tuple[Row, ...]
    not_replayed: Mapping[str, str]
    record: Record
    spikes: int
    worst_spike: float
    rise: float | None
    suggestion: Suggestion

    def __str__(self) -> str:
        """The table as plain text, for `print`; in short where rich is not installed."""
        try:
            shown = self.table()
        except ImportError:
            return repr(self)
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=PLAIN_WIDTH, color_system=None).print(shown)
        return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").split("\n"))

    def __repr__(self) -> str:
        methods = ", ".join(row.method for row in self.rows)
        return f"<Replay of {len(self.record.norms):,} steps of {self.record.source}: {methods}>"

    def table(self) -> Any:
        """The figures for `rich.print`: a title, a table, and what its columns mean.

        Raises:
            ImportError: If rich is not installed.
        """
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Group
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            raise ImportError('tables need rich: pip install "optclip[tuning]"') from None
        # [brackets] are no markup in a Text.
        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
        table.add_column("method", overflow="fold")
        columns = {name: cells for name, cells in _columns(self).items() if {*cells} != {NOTHING}}
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for row, *cells in zip(self.rows, *columns.values(), strict=True):
            table.add_row(Text(row.method), *cells)
        return Group(Text(_title(self)), table, *map(Text, _caption(self)))

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draws the norms and the threshold of each method; answers with the path of the PNG.

        Args:
            path: Where the picture goes; its folder has to exist.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        count = len(self.rows)
        if not count:
            raise LogError(
                "there is no method to draw; replay one that is in optclip.tuning's list"
            )
        columns, lines = min(2, count), (count + 1) // 2
        figure = style.new_figure(1.85 * lines + 0.35)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        rising = bool((np.diff(self.record.steps) > 0).all())
        for axes, row in zip(grid.flat, self.rows, strict=False):
            _panel(axes, self, row)
        for axes in grid.flat[count - columns : count]:  # the lowest of its column
            axes.tick_params(labelbottom=True)
            style.step_axis(axes, rising, most=4)
            axes.xaxis.label.set_size(9)
        for axes in grid.flat[count:]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("gradient norm\n(log axis)", size=9)
        note = f"{_of_what(self)}{_not_finite(self)}. {OPEN_LOOP}"
        style.head(figure, finding(self), note, grid[0, 0].lines[:2])
        figure.savefig(path)
        return Path(path)

    def to_dict(self, *, every_step: bool = False) -> dict[str, Any]:
        """Plain numbers, strings, lists and None (for infinite or unknown), for `json.dumps`.

        Args:
            every_step: Also the threshold of every step, and the norm that comes out of it.
        """
        left_out = () if every_step else ("thresholds", "outputs")
        rows = [
            {name: plain(x) for name, x in row._asdict().items() if name not in left_out}
            for row in self.rows
        ]
        return {
            "steps": len(self.record.norms),
            "source": self.record.source,
            "spikes": self.spikes,
            "worst_spike": plain(self.worst_spike),
            "rise": self.rise,
            "nonfinite_norms": int((~np.isfinite(self.record.norms)).sum()),
            "rows": rows,
            "not_replayed": dict(self.not_replayed),
            "suggestion": self.suggestion.to_dict(),
        }


# The table ---------------------------------------------------------------------------------------


def _columns(replay: Replay) -> dict[str, list[str]]:
    """The cells of every column but the names, by heading."""
    rows, of = replay.rows, replay.spikes
    last = [row.final_threshold for row in rows]
    return {
        "clipped": [percent(row.clipped) for row in rows],
        "worst\nspike": [times(row.worst_spike) for row in rows],
        "spikes\nthrough": [f"{x.spikes_through} of {of}" if of else NOTHING for x in rows],
        "after\nrise": [steps_taken(row.steps_after_rise) for row in rows],
        "after\nspike": [steps_taken(row.steps_after_spike) for row in rows],
        "final\nthreshold": [number(x) if math.isfinite(x) else "none" for x in last],
    }


def _title(replay: Replay) -> str:
    said = f"{_of_what(replay)}: {counted(replay.spikes, 'spike')}"
    if math.isfinite(replay.worst_spike):
        said += f", the worst {times(replay.worst_spike)} the usual norm"
    if replay.rise is not None:
        said += f"; the level rises at step {replay.rise:,.0f}"
    return said + _not_finite(replay)


def _of_what(replay: Replay) -> str:
    return f"{len(replay.record.norms):,} steps of {replay.record.source}"


def _not_finite(replay: Replay) -> str:
    count = int((~np.isfinite(replay.record.norms)).sum())
    return f"; {count:,} of the norms not finite" if count else ""


def _caption(replay: Replay) -> list[str]:
    said = [OPEN_LOOP]
    if any(row.method.startswith("safeguard") for row in replay.rows):
        said.append("safeguard: its clip; when its bound acts only the parameters tell.")
    if replay.spikes:
        said.append(
            "worst spike: how many times the usual norm it still is after the clip; through: so "
            f"many still are {SPIKE_TIMES:g} times the usual norm or more."
        )
    if replay.spikes or replay.rise is not None:
        said.append("after: steps until the rule lets most steps keep 90% of their norm again.")
    reasons: dict[str, list[str]] = {}
    for name, why in replay.not_replayed.items():
        reasons.setdefault(re.split("[,;] ", why)[0], []).append(name)
    if reasons:
        why = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        said.append(f"Not replayed: {why}.")
    return said


# The picture: a small panel for each method, all over the same norms -----------------------------


def finding(replay: Replay) -> str:
    """What there is to see, in one sentence."""
    rows, count = replay.rows, len(replay.rows)
    low, high = (percent(end(row.clipped for row in rows)) for end in (min, max))
    what = f"{count} rules would have clipped from {low} to {high} of the steps"
    if count == 1:
        what = f"{rows[0].method} would have clipped {low} of the steps"
    if not replay.spikes:
        return f"No spikes; {what}"
    holding = [row for row in rows if not row.spikes_through]
    modest = [row for row in holding if row.clipped <= MODEST]
    if not modest:
        return what
    best = min(modest, key=lambda row: (row.clipped, row.worst_spike))
    share = percent(best.clipped)
    spikes = "the spike" if replay.spikes == 1 else f"all {replay.spikes} spikes"
    if count == 1:
        return (
            f"{best.method} holds {spikes} to {times(best.worst_spike)} the usual norm or less and "
            f"{_verb(best)} {share} of the steps"
        )
    return (
        f"{len(holding)} of {count} rules hold {spikes} below {SPIKE_TIMES:g} times the usual "
        f"norm; of these {best.method} {_verb(best)} the fewest steps, {share}"
    )


def _verb(row: Row) -> str:
    return "skips" if row.method.startswith("skip") else "clips"


def _panel(axes: "Axes", replay: Replay, row: Row) -> None:
    norms = np.where(replay.record.norms > 0, replay.record.norms, np.nan)
    steps = places(replay.record.steps)
    style.line(axes, steps, norms, color=style.GRAY, lw=0.7, label="recorded norm")
    line, what = row.thresholds, "threshold"
    if row.by_leaf:
        line, what = row.outputs, "norm let through"
    shown = np.where(np.isfinite(line) & (line > 0), line, np.nan)
    style.line(axes, steps, shown, color=style.BLUE, lw=1.6, label="threshold")
    known = norms[np.isfinite(norms)]
    bottom, top = float(np.quantile(known, 0.01)) / 2.5, 2 * float(known.max())
    style.on_log_axis(axes, most=5)
    axes.set_ylim(bottom, top)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
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


def _figures(replay: Replay, row: Row) -> str:
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
