"""The figures of a `Replay` as a table to print."""

import io
import math
import re
from shutil import get_terminal_size
from typing import Any

import numpy as np

from optclip._tuning.replay_rows import OPEN_LOOP, Replayed
from optclip._tuning.wording import number, percent, steps_taken, times

NOTHING = "-"
"""What stands where there is nothing to say; a column of nothing else is left out."""

LAST_QUARTER = "last\nquarter"
"""The column that is left out first where there is little room."""

_LEAST, _ENOUGH = 8, 14  # letters for the names of methods


def table(replay: Replayed, width: int | None = None) -> Any:
    """The figures as a `rich.table.Table`.

    Args:
        replay: What to show.
        width: For how many letters in a line; None: for as many as the terminal has.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise ImportError('tables need rich: pip install "optclip[tuning]"') from None
    width = get_terminal_size((80, 24)).columns if width is None else width
    columns = {name: cells for name, cells in _columns(replay).items() if {*cells} != {NOTHING}}
    if _room(columns, width) < _ENOUGH:
        columns.pop(LAST_QUARTER)
    room = max(_LEAST, _room(columns, width))
    result = Table(
        title=Text(_title(replay)),
        caption=Text(_caption(replay)),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    result.add_column("method", overflow="fold")
    for heading in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    for at, row in enumerate(replay.rows):
        name = Text(_broken(row.method, room))  # [brackets] are no markup there
        result.add_row(name, *(cells[at] for cells in columns.values()))
    return result


def text(replay: Replayed, width: int) -> str:
    """The table as plain text.

    Raises:
        ImportError: If rich is not installed.
    """
    shown = table(replay, width)
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").split("\n"))


def _columns(replay: Replayed) -> dict[str, list[str]]:
    """The cells of every column but the names, by heading."""
    rows, of = replay.rows, replay.spikes
    through = [f"{row.spikes_through} of {of}" if of else NOTHING for row in rows]
    last = [row.final_threshold for row in rows]
    return {
        "clipped": [percent(row.clipped) for row in rows],
        LAST_QUARTER: [percent(row.clipped_last_quarter) for row in rows],
        "worst\nspike": [times(row.worst_spike) for row in rows],
        "spikes\nthrough": through,
        "after\nrise": [steps_taken(row.steps_after_rise) for row in rows],
        "after\nspike": [steps_taken(row.steps_after_spike) for row in rows],
        "final\nthreshold": [number(x) if math.isfinite(x) else "none" for x in last],
    }


def _room(columns: dict[str, list[str]], width: int) -> int:
    """How many letters are left for the names of the methods."""
    lines = ([*heading.split("\n"), *cells] for heading, cells in columns.items())
    return width - 2 - sum(1 + max(map(len, line)) for line in lines)


def _broken(name: str, room: int) -> str:
    """A name in lines that fit, broken where it can be read: behind _ and before a bracket."""
    lines = [""]
    for part in re.findall(r"\(?[^_(, ]+(?:_+|, ?)?|.", name):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _title(replay: Replayed) -> str:
    norms = replay.record.norms
    said = f"{len(norms):,} steps of {replay.record.source}: {replay.spikes} spikes"
    if replay.spikes == 1:
        said = said.removesuffix("s")
    if math.isfinite(replay.worst_spike):
        said += f", the worst {times(replay.worst_spike)} the usual norm"
    if replay.rise is not None:
        said += f"; the level rises at step {replay.rise:,.0f}"
    return said + without_norms(norms)


def without_norms(norms: np.ndarray) -> str:
    """How many norms are not finite, as the end of a sentence; nothing for none."""
    count = int((~np.isfinite(norms)).sum())
    return f"; {count:,} of the norms not finite" if count else ""


def _caption(replay: Replayed) -> str:
    said = OPEN_LOOP
    if replay.spikes:
        said += (
            " worst spike: how many times the usual norm the worst spike still is after the clip. "
            "spikes through: how many still are 5 times the usual norm or more."
        )
    if replay.spikes or replay.rise is not None:
        said += (
            " after rise, after spike: how many steps pass until the rule lets most steps through "
            "nearly whole again (at least 90% of the norm)."
        )
    if replay.not_replayed:
        said += (
            f" Not replayed: {', '.join(replay.not_replayed)}. For the reasons see "
            "replay(...).not_replayed in Python, or `optclip replay RUN --json`."
        )
    return said
