"""The figures of a `Replay` as a table to print."""

import math
from typing import Any

from optclip.tuning.replay_rows import OPEN_LOOP, Replayed
from optclip.tuning.wording import number, percent, steps_taken, times


def table(replay: Replayed) -> Any:
    """The figures as a `rich.table.Table`.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
    except ImportError:
        raise ImportError('tables need rich: pip install "optclip[tuning]"') from None
    result = Table(
        title=_title(replay),
        caption=_caption(replay),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    result.add_column("method", overflow="fold")
    # Together no wider than a terminal of 80 letters.
    headings = ("clipped", "last\nquarter", "worst\nspike", "spikes\nthrough")
    for heading in (*headings, "after\nrise", "after\nspike", "final\nthreshold"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in replay.rows:
        result.add_row(
            row.method,
            percent(row.clipped),
            percent(row.clipped_last_quarter),
            times(row.worst_spike),
            f"{row.spikes_through} of {replay.spikes}" if replay.spikes else "-",
            steps_taken(row.steps_after_rise),
            steps_taken(row.steps_after_spike),
            number(row.final_threshold) if math.isfinite(row.final_threshold) else "none",
        )
    return result


def _title(replay: Replayed) -> str:
    norms = len(replay.record.norms)
    said = f"{norms:,} steps of {replay.record.source}: {replay.spikes} spikes"
    if replay.spikes:
        said += f", the worst {times(replay.worst_spike)} the usual norm"
    if replay.rise is not None:
        said += f"; the level rises at step {replay.rise:,.0f}"
    return said


def _caption(replay: Replayed) -> str:
    said = (
        f"{OPEN_LOOP} worst spike, spikes through: after the clip, in multiples of the usual norm, "
        "and at 5 times or more. after: for how many steps more than 10% is taken off most."
    )
    if replay.not_replayed:
        said += f" Not replayed: {', '.join(replay.not_replayed)}; `not_replayed` (--json) says why."
    return said
