"""How good is the answer that `optclip.tuning.suggest_threshold` reads from one run?

Two networks, each clean and with spikes of the gradient (every twentieth step 50 times as large,
from step 40 on), at four learning rates a factor of about 3 apart. From a run without a clip comes
an answer; a run with it is compared, at the same learning rate, with the best of a sweep: nine
thresholds over four decades, no clip, `robust_clip` and `safeguard`. Momentum 0.9; two seeds, each
with an answer of its own.

digits: the convolutional network of `examples/mnist.py` on the digits in scikit-learn, 184 batches
    of 32 images (four epochs). Held out: 297 images by other writers.
text: a byte transformer of `examples/text_model.py`, 2 layers of width 64, 200 batches of 16
    windows of 64 bytes. Held out: 320 windows.

An answer holds if its held-out loss is within 5% or 0.05 nats of the best. A run is done once: what
is in the JSON file already is not run again, so that an interrupted benchmark goes on where it was.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import suggested_picture
from benchmarks.parsing import Parser
from benchmarks.suggested_runs import NO_CLIP, Runner, fixed
from optclip._tuning.plain import plain

TASKS = ("digits", "text", "digits, spikes", "text, spikes")
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
THRESHOLDS = tuple(float(f"{x:.4g}") for x in np.geomspace(0.003, 30, 9))
LEARNED = ("optclip.safeguard(optimizer)", "optclip.robust_clip()")
SEEDS = (0, 1)
WITHIN, NATS = 1.05, 0.05
"""An answer whose loss is within such a factor, or so many nats, of the best holds."""

EXAMPLES = """examples:
  python -m benchmarks.suggested_thresholds                       all tasks, about an hour
  python -m benchmarks.suggested_thresholds --task digits
  python -m benchmarks.suggested_thresholds --out runs/again      from the beginning, elsewhere
"""


def sweep() -> list[str]:
    """The clips that an answer is compared with."""
    return [NO_CLIP, *LEARNED, *map(fixed, THRESHOLDS)]


def grid() -> Iterator[tuple[int, float, str]]:
    """(seed, learning rate, clip) of every run of the sweeps; those without a clip first."""
    for code in sweep():
        for seed in SEEDS:
            for learning_rate in LEARNING_RATES:
                yield seed, learning_rate, code


def answers(runner: Runner) -> list[dict[str, Any]]:
    """For each learning rate and seed the answer, and its held-out loss beside the others'."""
    rows = []
    for learning_rate in LEARNING_RATES:
        for seed in SEEDS:
            suggestion = runner.suggestion(seed, learning_rate)
            codes = dict.fromkeys([*sweep(), suggestion.method])
            if suggestion.alternative:
                codes[suggestion.alternative] = None
            losses = {code: _loss(runner, seed, learning_rate, code) for code in codes}
            best = min(sweep(), key=lambda code: losses[code])
            rows.append(
                {
                    "task": runner.name,
                    "learning_rate": learning_rate,
                    "seed": seed,
                    "verdict": suggestion.verdict,
                    "answer": suggestion.method,
                    "alternative": suggestion.alternative,
                    "loss": losses[suggestion.method],
                    "loss_of_alternative": losses.get(suggestion.alternative or ""),
                    "loss_without_clip": losses[NO_CLIP],
                    "loss_of_safeguard": losses[LEARNED[0]],
                    "loss_of_best": losses[best],
                    "best": best,
                }
            )
    return rows


def _loss(runner: Runner, seed: int, learning_rate: float, code: str) -> float:
    """The held-out loss of a run; infinite where it diverged."""
    loss = runner.run(seed, learning_rate, code)["held_out"]
    return math.inf if loss is None else loss


def holds(loss: float | None, best: float) -> bool:
    """Whether a loss is as good as the best, for what it is worth."""
    return loss is not None and loss <= max(WITHIN * best, best + NATS)


def held(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For each verdict how many runs had it, and in how many each answer to it holds."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = found.setdefault(row["verdict"], {})
        for name, key in (
            ("answer", "loss"),
            ("alternative", "loss_of_alternative"),
            ("no clip", "loss_without_clip"),
            ("safeguard", "loss_of_safeguard"),
        ):
            counts[name] = counts.get(name, 0) + holds(row[key], row["loss_of_best"])
        counts["runs"] = counts.get("runs", 0) + 1
    return found


# What a person sees ------------------------------------------------------------------------------


def finding(counts: dict[str, dict[str, int]]) -> str:
    """In how many runs the answer holds, in a sentence."""
    runs, good, none = (
        sum(of[name] for of in counts.values()) for name in ("runs", "answer", "no clip")
    )
    return f"The suggestion is near the best in {good} of {runs} runs,\nno clip in {none}"


def table_of_runs(rows: list[dict[str, Any]]) -> Table:
    """One row for each run without a clip."""
    result = Table(title="held-out loss", title_justify="left", box=SIMPLE_HEAD)
    result.add_column("task, learning rate, seed")
    result.add_column("verdict")
    for heading in ("no clip", "answer", "alternative", "safeguard", "best"):
        result.add_column(heading, justify="right")
    result.add_column("best clip")
    for row in rows:
        names = ("loss_without_clip", "loss", "loss_of_alternative", "loss_of_safeguard")
        losses = [row[name] for name in (*names, "loss_of_best")]
        result.add_row(
            f"{row['task']}, {row['learning_rate']:g}, {row['seed']}",
            row["verdict"],
            *("-" if x is None else f"{x:.3f}" if math.isfinite(x) else "diverged" for x in losses),
            row["best"].removeprefix("optclip."),
        )
    return result


def table_of_verdicts(counts: dict[str, dict[str, int]]) -> Table:
    """In how many runs of a verdict each answer holds."""
    result = Table(
        caption=f"runs whose held-out loss is within {WITHIN - 1:.0%} or {NATS:g} nats of the best",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    names = ("runs", "answer", "alternative", "no clip", "safeguard")
    result.add_column("verdict")
    for name in names:
        result.add_column(name, justify="right")
    for verdict, of in counts.items():
        result.add_row(verdict, *(str(of[name]) for name in names))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = Parser(
        prog="python -m benchmarks.suggested_thresholds",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, help="only this one (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/suggested_thresholds"),
        metavar="FOLDER",
        help="JSON files and the picture go here (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[dict[str, Any]] = []
    for name in [options.task] if options.task else TASKS:
        runner = Runner(name, options.out / f"{name.replace(', ', '_')}.json")
        for run in tqdm(list(grid()), desc=name, unit="run", disable=None):
            runner.run(*run)
        rows += answers(runner)
    console.print(table_of_runs(rows))
    console.print(table_of_verdicts(held(rows)))
    written = options.out / "suggested.json"
    content = plain({"held": held(rows), "rows": rows})
    written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    suggested_picture.draw(options.out / "suggested.png", finding(held(rows)), rows)
    console.print(f"{written} and {options.out / 'suggested.png'} written")


if __name__ == "__main__":
    main()
