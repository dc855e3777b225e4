"""What a person sees of a run: a line per epoch, a table, and a picture made to be read."""

import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table
from run_folder import Row, RunFolder, json_ready

# From Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
NOT_FINITE = "not finite"


def column(rows: list[Row], name: str) -> np.ndarray:
    """One reading of every step; NaN where it is missing or was not finite."""
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else value for value in values], float)


def mean_of_finite(values: np.ndarray) -> float | None:
    """The mean of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def summary(rows: list[Row]) -> Row:
    """What to say of some steps; JSON-ready."""
    return {
        "epoch": rows[-1]["epoch"],
        "steps": rows[-1]["step"],
        "loss": json_ready(column(rows, "loss").mean()),
        "accuracy": json_ready(column(rows, "accuracy").mean()),
        "norm": mean_of_finite(column(rows, "clip/norm")),
        "clip_rate": rows[-1].get("clip/clip_rate"),
    }


def progress(summary: Row) -> str:
    """How training goes, in few words: it shares a line with a progress bar."""
    parts = [f"loss {show(summary['loss'], '.3f', NOT_FINITE)}"]
    if "test_accuracy" in summary:
        parts.append(f"test acc {summary['test_accuracy']:.3f}")
    else:
        parts.append(f"acc {summary['accuracy']:.3f}")
    if summary["norm"] is not None:
        parts.append(f"norm {summary['norm']:.3g}")
    if summary["clip_rate"] is not None:
        parts.append(f"clipped {summary['clip_rate']:.0%}")
    return ", ".join(parts)


def show(value: float | None, format_: str, missing: str = "-") -> str:
    """A number for people."""
    return missing if value is None else format(value, format_)


def report(folder: RunFolder, epochs: list[Row], settings: Row) -> None:
    """Draws the picture, and prints the table and, as the last line, the result as JSON.

    Args:
        folder: The run, when it is done.
        epochs: A `summary` of each epoch.
        settings: What was run.
    """
    rows, last = folder.rows(), epochs[-1]
    clip = f"{settings['clip']}({settings['clip_args']})" if settings["clip"] != "none" else "none"
    setup = (
        f"{settings['dataset']}, {settings['api']}; clip: {clip}; "
        f"{settings['optimizer']}, learning rate {settings['lr']:g}"
    )
    print(setup)
    print_table(epochs)
    draw(folder.picture, rows, last["test_accuracy"], setup)
    print(f"log, checkpoints and picture: {folder.path}")
    result = {
        **settings,
        "epochs": len(epochs),
        "steps": len(rows),
        "train_loss": last["loss"],
        "test_loss": last["test_loss"],
        "test_accuracy": last["test_accuracy"],
        "clip_rate": rows[-1].get("clip/clip_rate"),
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 3),
    }
    print(json.dumps(result))


def print_table(epochs: list[Row]) -> None:
    """One row per epoch."""
    table = Table(caption="clip rate: share of all steps so far", caption_justify="left")
    for heading in ("epoch", "loss", "test loss", "test accuracy", "mean norm", "clip rate", "s"):
        table.add_column(heading, justify="right")
    for epoch in epochs:
        table.add_row(
            str(epoch["epoch"]),
            show(epoch["loss"], ".3f", NOT_FINITE),
            show(epoch["test_loss"], ".3f", NOT_FINITE),
            show(epoch["test_accuracy"], ".3f"),
            show(epoch["norm"], ".3g"),
            show(epoch["clip_rate"], ".0%"),
            show(epoch["seconds"], ".1f"),
        )
    Console().print(table)


def finding(rows: list[Row], test_accuracy: float) -> str:
    """What there is to see in the picture, in one sentence."""
    loss, rate = column(rows, "loss"), rows[-1].get("clip/clip_rate")
    steps = f"{len(rows):,} steps"
    if not np.isfinite(loss).all():
        first = rows[int(np.argmin(np.isfinite(loss)))]["step"]
        what = f"Loss not finite from step {first:,} of {steps}"
    elif rate is None:
        what = f"No clip in {steps}"
    elif abs((column(rows, "clip/factor") < 1).mean() - rate) < 0.005:
        what = f"{rate:.0%} of {steps} clipped"
    else:  # groups that are clipped one by one, or a clip that is felt below its threshold
        what = f"Clip rate {rate:.0%} over {steps}"
    return f"{what}; test accuracy {test_accuracy:.2f}"


def draw(path: Path, rows: list[Row], test_accuracy: float, setup: str) -> None:
    """Draws loss, norm against threshold, and clip rate over the steps.

    Args:
        path: Where the PNG goes.
        rows: The log of every step.
        test_accuracy: At the end.
        setup: What was run; the second line of the title.
    """
    has_norms = mean_of_finite(column(rows, "clip/norm")) is not None
    panels = [_draw_loss] + ([_draw_norms, _draw_rate] if has_norms else [])
    heights = [1.0, 1.5, 0.8][: len(panels)]
    figure = Figure(figsize=(8, 1.2 + 1.9 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
        panel(axis, rows)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("step (one batch each)")
    axes[0].set_title(finding(rows, test_accuracy), loc="left", size=14, weight="bold", pad=24)
    subtitle = axes[0].annotate(
        textwrap.shorten(setup, 105, placeholder=" ..."),
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        color="0.3",
        size=9,
        parse_math=False,
    )
    subtitle.set_in_layout(False)  # it may be longer than the axes are wide
    figure.savefig(path, dpi=120)


def _draw_loss(axis: Axes, rows: list[Row]) -> None:
    loss = column(rows, "loss")
    axis.plot(column(rows, "step"), loss, color=BLUE, lw=0.9)
    if (
        np.nanmax(loss, initial=0.0) > 100
    ):  # it went astray; on a linear axis the rest would be a flat line
        axis.set_yscale("log")
        axis.set_ylabel("training loss\n(nats, log axis)")
    else:
        axis.set_ylim(bottom=0)
        axis.set_ylabel("training loss\n(nats)")


def _draw_norms(axis: Axes, rows: list[Row]) -> None:
    steps, norm = column(rows, "step"), column(rows, "clip/norm")
    clipped = column(rows, "clip/factor") < 1
    dot = min(3.0, max(0.8, 90 / len(rows) ** 0.5))
    axis.plot(steps, norm, color=GREY, lw=0.8, label="norm before clipping")
    axis.plot(steps[clipped], norm[clipped], ".", color=ORANGE, ms=dot, label="clipped step")
    threshold = column(rows, "clip/threshold")
    axis.plot(steps, threshold, color="black", lw=1.5, label="threshold (of several, the smallest)")
    axis.set_yscale("log")
    axis.set_ylabel("gradient norm\n(log axis)")
    _legend_above(axis)


def _draw_rate(axis: Axes, rows: list[Row]) -> None:
    steps = column(rows, "step")
    axis.plot(steps, column(rows, "clip/recent_clip_rate"), color=GREY, lw=1.0, label="recently")
    axis.plot(steps, column(rows, "clip/clip_rate"), color=ORANGE, lw=1.8, label="since the start")
    axis.set_ylabel("clip rate\n(%)")
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend_above(axis)


def _legend_above(axis: Axes) -> None:
    axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
