"""What a person sees of a run: a line per epoch, a table, and a picture made to be read."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from run_folder import Row, RunFolder, json_ready

from optclip._tuning.findings import finding
from optclip._tuning.plotting import plot_run
from optclip._tuning.records import read
from optclip._tuning.wording import percent

NOT_FINITE = "not finite"


def column(rows: list[Row], name: str) -> np.ndarray:
    """One reading of every step; NaN where it is missing or was not finite."""
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else value for value in values], float)


def median_of_finite(values: np.ndarray) -> float | None:
    """The median of the finite values, which spikes do not move; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def summary(rows: list[Row]) -> Row:
    """What to say of some steps; JSON-ready."""
    return {
        "epoch": rows[-1].get("epoch"),
        "steps": rows[-1]["step"],
        "loss": json_ready(column(rows, "loss").mean()),
        "accuracy": json_ready(column(rows, "accuracy").mean()),
        "norm": median_of_finite(column(rows, "clip/norm")),
        "clip_rate": rows[-1].get("clip/clip_rate"),
    }


def progress(summary: Row) -> str:
    """How training goes, in few words: it shares a line with a progress bar."""
    parts = [f"loss {show(summary['loss'], '.3f', NOT_FINITE)}"]
    if "test_accuracy" in summary:
        parts.append(f"test acc {summary['test_accuracy']:.3f}")
    elif summary["accuracy"] is not None:
        parts.append(f"acc {summary['accuracy']:.3f}")
    if summary["norm"] is not None:
        parts.append(f"norm {summary['norm']:.3g}")
    if summary["clip_rate"] is not None:
        parts.append(f"clipped {percent(summary['clip_rate'])}")
    return ", ".join(parts)


def show(value: float | None, format_: str, missing: str = "-") -> str:
    """A number for people."""
    if value is None:
        return missing
    return format(value, ".3g" if abs(value) >= 1e5 else format_)


def report(folder: RunFolder, epochs: list[Row], settings: Row) -> None:
    """Draws the picture, and prints the table and, as the last line, the result as JSON.

    Args:
        folder: The run, when it is done.
        epochs: A `summary` of each epoch.
        settings: What was run.
    """
    rows, last = folder.rows(), epochs[-1]
    setup = f"{settings['dataset']}, {settings['api']}; {optimizer_shown(settings)}"
    print(setup)
    print_table(epochs)
    draw(folder.picture, rows, f"test accuracy {last['test_accuracy']:.2f}", setup)
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


def optimizer_shown(settings: Row) -> str:
    """The clip and the optimizer of a run, for the title of its picture."""
    clip = f"{settings['clip']}({settings['clip_args']})" if settings["clip"] != "none" else "none"
    return f"clip: {clip}; {settings['optimizer']}, learning rate {settings['lr']:g}"


def print_table(epochs: list[Row]) -> None:
    """One row per epoch."""
    table = Table(
        caption="usual norm: the median; clip rate: share of all steps so far",
        caption_justify="left",
    )
    for heading in ("epoch", "loss", "test loss", "test accuracy", "usual norm", "clip rate", "s"):
        table.add_column(heading, justify="right")
    for epoch in epochs:
        table.add_row(
            str(epoch["epoch"]),
            show(epoch["loss"], ".3f", NOT_FINITE),
            show(epoch["test_loss"], ".3f", NOT_FINITE),
            show(epoch["test_accuracy"], ".3f"),
            show(epoch["norm"], ".3g"),
            "-" if epoch["clip_rate"] is None else percent(epoch["clip_rate"]),
            show(epoch["seconds"], ".1f"),
        )
    Console().print(table)


def draw(path: Path, rows: list[Row], result: str, setup: str) -> None:
    """Draws the run, with what there is to see as the title.

    Args:
        path: Where the PNG goes.
        rows: The log of every step.
        result: What the run reached, in a few words; the end of the title.
        setup: What was run; the second line of the title.
    """
    if not any(name.endswith("norm") for name in rows[0]):  # no clip measured: the loss is left
        rows = [{"norm": None} | row for row in rows]
    record = read(rows)
    plot_run(record, path, title=f"{finding(record)}; {result}", subtitle=setup)
