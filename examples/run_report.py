"""What a person sees of a run: a line per epoch, a table, a picture, and what the clip did."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from run_folder import Row, RunFolder, json_ready

from optclip import catalogue, tuning
from optclip._tuning.findings import finding
from optclip._tuning.plotting import plot_run
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


def report(folder: RunFolder, epochs: list[Row], settings: Row) -> Row:
    """Draws the picture, and prints the table and, as the last line, what the clip did.

    Args:
        folder: The run, when it is done.
        epochs: A `summary` of each epoch.
        settings: What was run.

    Returns:
        The result, JSON-ready.
    """
    rows, last = folder.rows(), epochs[-1]
    setup = f"{settings['dataset']}, {settings['api']}; {optimizer_shown(settings)}"
    print(setup)
    print_table(epochs)
    draw(folder.picture, rows, f"test accuracy {last['test_accuracy']:.2f}", setup)
    print(f"log, checkpoints, picture and result: {folder.path}")
    print(what_the_clip_did(rows, settings["clip"], settings["optimizer"]))
    return {
        **settings,
        "epochs": len(epochs),
        "steps": len(rows),
        "train_loss": last["loss"],
        "test_loss": last["test_loss"],
        "test_accuracy": last["test_accuracy"],
        "clip_rate": rows[-1].get("clip/clip_rate"),
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 3),
    }


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
    record = tuning.read_log(rows, loss_will_do=True)
    plot_run(record, path, title=f"{finding(record)}; {result}", subtitle=setup)


# What the clip did -------------------------------------------------------------------------------

FEW, MOST = 0.1, 0.5  # of the steps
NO_SPIKES = ": as it should be in a run without spikes"
ASK = "record the norms with --clip measure_norms and ask `optclip suggest` for a threshold"


def what_the_clip_did(rows: list[Row], clip: str, optimizer: str) -> str:
    """What the clip did in a run and whether that is good, in one sentence.

    Args:
        rows: The log of every step.
        clip: The name of the clip, or "none".
        optimizer: The name of the optimizer. Adam divides by the size of the gradient: before it, a
            clip at every step is no smaller learning rate.
    """
    loss, last, rate = column(rows, "loss"), rows[-1], 0.0
    if clip == "none":
        said, good = "No clip was asked for", f"; to see whether one is needed, {ASK}"
    elif clip == "measure_norms":
        said = "measure_norms clipped nothing, as it should"
        good = "; `optclip suggest` reads a threshold from the log"
    elif "bound/clip_rate" in last:
        said, good = _bounded(last["clip/clip_rate"], last["bound/clip_rate"])
    elif "clip/clip_rate" in last:
        rate = last["clip/clip_rate"]
        after = catalogue.named(clip).follows
        advice = "raise the bound" if after else f"raise the threshold, or {ASK}"
        said, good = _clipped(rows, after or not optimizer.startswith("adam"), advice)
    else:
        said, good = _skipped(int(last["skip/skipped_steps"]), len(rows))

    lower = "a lower learning rate" + ", or --clip safeguard" * (clip != "safeguard")
    if not np.isfinite(loss[-1]):
        step = rows[np.flatnonzero(np.isfinite(loss)).max(initial=-1) + 1]["step"]
        good = f", but the loss is not finite from step {step:,} on: try {lower}"
    elif _learned_nothing(loss):
        good = f", but the loss did not fall: try {lower}"
        if rate > MOST:  # the length of a step is the learning rate times the threshold
            good = ", but the loss did not fall: the steps are too short, or too long"
    name = "" if clip in ("none", "measure_norms") else f"{clip} "
    return f"{name}{said}{good}."


def _clipped(rows: list[Row], smaller_rate: bool, advice: str) -> tuple[str, str]:
    """What a clip before or after the optimizer did, and what to think of it."""
    norms, thresholds = column(rows, "clip/norm"), column(rows, "clip/threshold")
    rate = rows[-1]["clip/clip_rate"]
    above, steps = int((norms > thresholds).sum()), int(np.isfinite(norms).sum())
    if not steps:
        return "did nothing: no norm is finite", ""
    # Of several groups it is the mean share of them, and no number of steps.
    counted = f"{above:,} of {steps:,} steps ({percent(rate)})"
    shown = counted if abs(above - rate * steps) < 1 else f"{percent(rate)} of its groups and steps"
    if not rate:
        bound = np.unique(thresholds[np.isfinite(thresholds)])
        where = f"the threshold {bound[0]:.3g}" if bound.size == 1 else "its threshold"
        return f"did nothing: the largest norm, {np.nanmax(norms):.3g}, is below {where}", NO_SPIKES
    if rate <= FEW:
        return f"held {shown} and left the others alone", ": what a clip is for"
    if rate <= MOST:
        return f"held {shown}, more than spikes", (
            ": good where the run fails with --clip none, otherwise a higher threshold leaves "
            "ordinary steps alone"
        )
    if not smaller_rate:
        return f"shortened {shown}", (
            ": before Adam that slows no run, but long and short gradients weigh the same; for a "
            f"clip against spikes, {advice}"
        )
    said = f"shortened {shown}: it works as a smaller learning rate, not against spikes"
    if _still_falls(column(rows, "loss")):
        return f"{said}, and slows the run, whose loss was still falling", f"; {advice}"
    return said, f"; {advice}"


def _bounded(clipped: float, bounded: float) -> tuple[str, str]:
    """What safeguard did, and what to think of it."""
    if not clipped and not bounded:
        return "did nothing", NO_SPIKES
    said = f"held {percent(clipped)} of the steps as spikes and bounded {percent(bounded)} of the "
    said += "updates of single leaves"
    if bounded <= FEW:
        return said, ": what it is for"
    if bounded <= MOST:
        return said, ": good where the run fails without it"
    return said, (
        ", so that the bound and not the learning rate sets the step: good where the run fails "
        "without it, otherwise lower the learning rate"
    )


def _skipped(skipped: int, steps: int) -> tuple[str, str]:
    """What skip_spikes did, and what to think of it."""
    if not skipped:
        return f"skipped none of {steps:,} steps", NO_SPIKES
    said = f"skipped {skipped:,} of {steps:,} steps ({percent(skipped / steps)})"
    if skipped <= FEW * steps:
        return f"{said} and left the others alone", ": what it is for"
    return f"{said}, more than spikes", ": lower the learning rate, or raise its deviations"


def _fall(loss: np.ndarray, before: int, after: int) -> tuple[float, float]:
    """From one tenth of the steps to another: by how much the mean loss falls, and the noise."""
    parts = [part[np.isfinite(part)] for part in np.array_split(loss, 10)]
    one, other = parts[before], parts[after]
    if min(one.size, other.size) < 2:
        return np.nan, np.nan
    noise = 2 * np.sqrt(one.var(ddof=1) / one.size + other.var(ddof=1) / other.size)
    return one.mean() - other.mean(), noise


def _learned_nothing(loss: np.ndarray) -> bool:
    """Whether the loss of the last tenth is not clearly below that of the first."""
    fall, noise = _fall(loss, 0, -1)
    return bool(fall <= noise)


def _still_falls(loss: np.ndarray) -> bool:
    """Whether it clearly falls in the last fifth, by a hundredth of its whole fall or more."""
    fall, noise = _fall(loss, -2, -1)
    return bool(fall > max(noise, 0.01 * _fall(loss, 0, -1)[0]))
