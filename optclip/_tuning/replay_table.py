"""The figures of a `Replay` as a table to print."""

import io
import math
from typing import Any

import numpy as np

from optclip._tuning.findings import SPIKE_TIMES
from optclip._tuning.replay_rows import OPEN_LOOP, Replayed
from optclip._tuning.wording import counted, number, percent, steps_taken, times

NOTHING = "-"
"""What stands where there is nothing to say; a column of nothing else is left out."""


def table(replay: Replayed) -> Any:
    """The figures as a `rich.table.Table`.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise ImportError('tables need rich: pip install "optclip[tuning]"') from None
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
    columns = {name: cells for name, cells in _columns(replay).items() if {*cells} != {NOTHING}}
    for heading in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    for at, row in enumerate(replay.rows):
        # [brackets] are no markup in a Text.
        result.add_row(Text(row.method), *(cells[at] for cells in columns.values()))
    return result


def text(replay: Replayed, width: int) -> str:
    """The table as plain text.

    Raises:
        ImportError: If rich is not installed.
    """
    shown = table(replay)
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").split("\n"))


def _columns(replay: Replayed) -> dict[str, list[str]]:
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


def _title(replay: Replayed) -> str:
    norms = replay.record.norms
    said = f"{len(norms):,} steps of {replay.record.source}: {counted(replay.spikes, 'spike')}"
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
    if replay.not_replayed:
        said.append(f"Not replayed (--json says why): {', '.join(replay.not_replayed)}.")
    return " ".join(said)
