"""Scores of all that was run, as tables to print and as a file."""

import datetime
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.box import SIMPLE_HEAD
from rich.table import Table

import optclip
from benchmarks.proving_ground import jobs, scores
from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.running import Order, contenders, job
from benchmarks.proving_ground.scores import Score
from benchmarks.proving_ground.tasks import TASKS
from optclip._tuning.plain import plain

FIXED, CUSTOMARY = "clip_by_global_norm", 1.0
"""The method that all others are compared with, and the threshold that most people take."""
DIGITS = 4


class Row(NamedTuple):
    """A method under a setting.

    Attributes:
        task: Name of the task.
        setting: Name of the setting.
        method: Name of the method; with its threshold, where that is not the best one.
        score: Its score.
        chosen_from: How many thresholds were tried for it.
        slower: Its processor time over that without a clip; None where that was not run.
    """

    task: str
    setting: str
    method: str
    score: Score
    chosen_from: int
    slower: float | None


def rows(orders: list[Order]) -> list[Row]:
    """The scores of what is there."""
    found = {(x.task, x.method): jobs.read(job(x)) for x in orders}
    result = []
    for order in orders:
        outcome = found[order.task, order.method]
        if outcome is None:
            continue
        slower = _slower(outcome, found.get((order.task, NO_CLIP)))
        tried = outcome["run"]["thresholds"]
        for setting in job(order).settings:
            runs = outcome["settings"][setting.name]
            base = outcome["settings"].get(setting.base)
            named = (order.task, setting.name, order.method)
            result.append(Row(*named, scores.score(runs, base), len(tried), slower))
            # Where only the best threshold was run, the customary one was not.
            if order.method == FIXED and CUSTOMARY in tried and runs["thresholds"] == tried:
                score = scores.score(runs, base, tried.index(CUSTOMARY))
                named = (order.task, setting.name, f"{FIXED}({CUSTOMARY})")
                result.append(Row(*named, score, 1, slower))
    return result


def _slower(outcome: dict[str, Any], without: dict[str, Any] | None) -> float | None:
    if without is None:
        return None
    ours, theirs = (x["processor_seconds"]["run"] for x in (outcome, without))
    return ours / theirs


def by_setting(found: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each task and setting."""
    result: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        result.setdefault((row.task, row.setting), []).append(row)
    return result


def reference(group: list[Row]) -> float:
    """What losses are compared with: the best fixed threshold, or the best of all without it."""
    fixed = [row.score.loss for row in group if row.method == FIXED]
    return fixed[0] if fixed else min(row.score.loss for row in group)


# Tables ------------------------------------------------------------------------------------------

LEGEND = (
    "loss: at the best learning rate (and threshold, where there are several), the mean over the "
    "seeds; over fixed: over that of the best fixed threshold. transferred: with what was best "
    "under the plain setting. rates: the largest over the smallest of the learning rates in a row "
    "within 5% of the best. sensitivity: the mean over the rates of what is left above the best "
    "loss. lost: steps until the loss is back after a spike. cost: the loss over "
    "that of the plain setting. time: of the processor, over that without a clip. *: the best is "
    "the smallest or the largest that was tried. All definitions: --help."
)


def tables(found: list[Row]) -> list[Table]:
    """A table for each task and setting, the best loss first."""
    result = []
    for (task, setting), group in by_setting(found).items():
        table = Table(
            title=f"{task}: {setting}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
        )
        table.add_column("method", no_wrap=True)
        headings = (
            "loss",
            "+-",
            "over\nfixed",
            "held\nout",
            "thres-\nhold",
            "rate",
            "rates",
            "sensi-\ntivity",
        )
        more = ("di-\nverged", "clip\nrate", "trans-\nferred", "lost", "cost", "time")
        for heading in (*headings, *more):
            table.add_column(heading, justify="right", no_wrap=True)
        best = reference(group)
        for row in sorted(group, key=lambda row: row.score.loss):
            table.add_row(*_cells(row, best))
        result.append(table)
    return result


def _cells(row: Row, best: float) -> list[str]:
    of = row.score
    return [
        row.method,
        number(of.loss),
        number(of.spread, 2),
        number(of.loss / best, 3) if math.isfinite(best) else "",
        "" if of.held_out is None else number(of.held_out),
        _tried(of, of.threshold, 3, of.threshold_at_edge) if row.chosen_from > 1 else "",
        _tried(of, of.rate, 2, of.rate_at_edge),
        number(of.rates_range, 2) if of.rates_range else "",
        "" if of.sensitivity is None else number(of.sensitivity, 3),
        f"{of.diverged:.0%}",
        f"{of.clip_rate:.0%}" if math.isfinite(of.clip_rate) else "",
        "" if of.transferred is None else number(of.transferred),
        "" if of.steps_lost is None else f"{of.steps_lost:.1f}",
        "" if of.cost is None else number(of.cost, 3),
        "" if row.slower is None else f"{row.slower:.2f}",
    ]


def _tried(score: Score, x: float, digits: int, at_edge: bool) -> str:
    """A rate or threshold that was best; nothing where all runs diverged."""
    if not math.isfinite(score.loss):
        return ""
    return number(x, digits) + ("*" if at_edge else "")


def number(x: float, digits: int = DIGITS) -> str:
    """A number with so many digits; "-" for infinity."""
    if not math.isfinite(x):
        return "-"
    text = f"{x:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and x < 1e6 else text


# Files -------------------------------------------------------------------------------------------


def report(found: list[Row], command: str, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """The scores as JSON has them: null for a loss that diverged, and for what does not apply.

    Args:
        found: The scores.
        command: What was typed.
        earlier: A report whose scores stay where there is no new one, as long as their task and
            method still exist.

    Returns:
        The report. "parts" says when and with what the scores were found; each has the place of its
        own there.
    """
    parts = [] if earlier is None else list(earlier["parts"])
    parts.append(
        {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "versions": {
                "optclip": optclip.__version__,
                "jax": jax.__version__,
                "optax": optax.__version__,
                "numpy": np.__version__,
            },
        }
    )
    scores: dict[str, Any] = {
        task: {
            setting: {row.method: _rounded(row) | {"part": len(parts) - 1} for row in group}
            for (of, setting), group in by_setting(found).items()
            if of == task
        }
        for task in dict.fromkeys(row.task for row in found)
    }
    for task, setting, method, score in _each({} if earlier is None else earlier["scores"]):
        if task in TASKS and method.partition("(1.0)")[0] in contenders():
            scores.setdefault(task, {}).setdefault(setting, {}).setdefault(method, score)
    ordered = {task: scores[task] for task in TASKS if task in scores}
    used = sorted({score["part"] for *_, score in _each(ordered)})
    for *_, score in _each(ordered):
        score["part"] = used.index(score["part"])
    return {
        "benchmark": "proving_ground",
        "parts": [parts[place] for place in used],
        "scores": ordered,
    }


def _each(scores: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Task, setting, method and score, one after the other."""
    for task, settings in scores.items():
        for setting, methods in settings.items():
            for method, score in methods.items():
                yield task, setting, method, score


def _rounded(row: Row) -> dict[str, Any]:
    values = row.score._asdict() | {"slower": row.slower}
    if row.chosen_from == 1:
        del values["threshold"], values["threshold_at_edge"]
    return plain(
        {
            name: float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x
            for name, x in values.items()
            if x is not None
        }
    )
