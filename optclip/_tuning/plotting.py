"""`plot_run`: the picture of a recorded run, made to be read."""

import os
from typing import TYPE_CHECKING, Any

from optclip._tuning.findings import look_at
from optclip._tuning.records import Record, read
from optclip._tuning.style import NEED_MATPLOTLIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    `params`), a heat map of them. Spikes (steps whose column "spike" is true, where there is one;
    else steps whose norm is 5 times and 4 deviations above what is usual around them), skipped
    steps and those that were not finite are marked. The title says what there is to see.

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
    record = read(source, norm_key, loss_will_do=True)
    findings = look_at(record)
    try:
        from optclip._tuning import panels
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(NEED_MATPLOTLIB, name="matplotlib") from None
    if title is None:
        title = findings.sentence
    if subtitle is None:
        subtitle = _caption(record)
    figure = panels.draw(record, findings, title, subtitle)
    if path is not None:
        figure.savefig(path)
    return figure


def _caption(record: Record) -> str:
    norm = "" if record.prefix in ("", "clip/") else f"; norm: {record.prefix}norm"
    notes = (note.replace(f" of {record.source}", "") for note in record.notes)
    return "; ".join((record.source + norm, *notes))
