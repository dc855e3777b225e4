"""How good is the threshold that `optclip.tuning.suggest_threshold` reads from one run?

At each of five learning rates, a factor of about 3 apart around the good one: a run without a clip,
the threshold that is suggested from its norms, and a run with that. Against them stands the whole
grid: sixteen thresholds over four decades, and none, at each learning rate. Momentum 0.9; two
seeds, whose losses are averaged; a suggestion is made from the run of the same seed.

digits: the convolutional network of `examples/mnist.py` on the digits in scikit-learn, 184 batches
    of 32 images (four epochs). Held out: 297 images by other writers.
text: a byte transformer of `examples/text_model.py`, 2 layers of width 64, 200 batches of 16
    windows of 64 bytes. Held out: 320 windows.

The best of 85 is a lucky one too. So the best learning rate with its suggestion and the best of the
grid are run again with eight fresh seeds; the difference is given with its standard error.

The training loss is the mean of the last 40 steps. A run is done once: what is in the JSON file
already is not run again, so that an interrupted benchmark goes on where it was.
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
from benchmarks.suggested_tasks import TASKS
from optclip._tuning.plain import plain

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
THRESHOLDS = tuple(float(f"{x:.4g}") for x in np.geomspace(0.003, 30, 16))
SEEDS = (0, 1)
FRESH = tuple(range(2, 10))
"""Seeds on which the best of both are run again."""
KINDS = {"held_out": "held-out loss", "train": "training loss"}

EXAMPLES = """examples:
  python -m benchmarks.suggested_thresholds                       both tasks, about half an hour
  python -m benchmarks.suggested_thresholds --task digits
  python -m benchmarks.suggested_thresholds --out runs/again      from the beginning, elsewhere
"""


def grid() -> Iterator[tuple[int, float, str]]:
    """(seed, learning rate, clip) of every run of the grid; those without a clip first."""
    for code in (NO_CLIP, *map(fixed, THRESHOLDS)):
        for seed in SEEDS:
            for learning_rate in LEARNING_RATES:
                yield seed, learning_rate, code


# What a person sees ------------------------------------------------------------------------------


def compare(runner: Runner, kind: str) -> dict[str, Any]:
    """The suggestions against the grid; losses are means over the seeds.

    Args:
        runner: With all runs done.
        kind: Which loss: "held_out" or "train".
    """

    def loss(learning_rate: float, codes: list[str]) -> float:
        """The mean over the seeds, of which each has its clip."""
        pairs = zip(SEEDS, codes, strict=True)
        return float(np.mean([_loss(runner, kind, seed, learning_rate, x) for seed, x in pairs]))

    rows = []
    for learning_rate in LEARNING_RATES:
        suggested = [runner.suggestion(seed, learning_rate).method for seed in SEEDS]
        losses = {code: loss(learning_rate, [code] * len(SEEDS)) for _, _, code in grid()}
        best = min(losses, key=lambda code: losses[code])
        rows.append(
            {
                "learning_rate": learning_rate,
                "suggested": suggested,
                "no_clip": losses[NO_CLIP],
                "with_suggested": loss(learning_rate, suggested),
                "best_of_grid": losses[best],
                "best_clip": best,
            }
        )
    ours = min(rows, key=lambda row: row["with_suggested"])
    best = min(rows, key=lambda row: row["best_of_grid"])
    return {
        "rows": rows,
        "suggested": ours["with_suggested"],
        "grid": best["best_of_grid"],
        "no_clip": min(row["no_clip"] for row in rows),
        "fresh": _with_fresh_seeds(runner, kind, ours["learning_rate"], best),
    }


def _with_fresh_seeds(
    runner: Runner, kind: str, learning_rate: float, best: dict[str, Any]
) -> dict[str, float]:
    """What is suggested at a learning rate against one run of the grid."""
    ours, theirs = [], []
    for seed in tqdm(FRESH, desc=f"{runner.name}, fresh seeds", unit="seed", disable=None):
        suggested = runner.suggestion(seed, learning_rate).method
        ours.append(_loss(runner, kind, seed, learning_rate, suggested))
        theirs.append(_loss(runner, kind, seed, best["learning_rate"], best["best_clip"]))
    differences = np.subtract(ours, theirs)
    error = differences.std(ddof=1) / math.sqrt(len(FRESH))
    return {
        "suggested": float(np.mean(ours)),
        "grid": float(np.mean(theirs)),
        "difference": float(differences.mean()),
        "standard_error": float(error),
    }


def _loss(runner: Runner, kind: str, seed: int, learning_rate: float, code: str) -> float:
    """The loss of a run; infinite where it diverged."""
    loss = runner.run(seed, learning_rate, code)[kind]
    return math.inf if loss is None else loss


def curves(runner: Runner) -> dict[float, dict[float, float]]:
    """For each learning rate the held-out loss by threshold; infinity is no clip."""
    sizes = {fixed(size): size for size in THRESHOLDS} | {NO_CLIP: math.inf}
    return {
        rate: {
            size: float(np.mean([_loss(runner, "held_out", seed, rate, code) for seed in SEEDS]))
            for code, size in sizes.items()
        }
        for rate in LEARNING_RATES
    }


def table(name: str, kind: str, compared: dict[str, Any]) -> Table:
    """One row for each learning rate."""
    fresh = compared["fresh"]
    gap = compared["suggested"] / compared["grid"] - 1
    result = Table(
        title=f"{name}, {KINDS[kind]}",
        caption=f"best learning rate: suggested {compared['suggested']:.3f}, best of the grid of "
        f"{len(LEARNING_RATES) * (len(THRESHOLDS) + 1)} {compared['grid']:.3f} (suggested is "
        f"{gap:+.1%}), without a clip {compared['no_clip']:.3f}. With {len(FRESH)} fresh seeds: "
        f"suggested {fresh['suggested']:.3f}, grid {fresh['grid']:.3f}, difference "
        f"{fresh['difference']:+.3f} +- {fresh['standard_error']:.3f}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("learning\nrate", "no clip", "with\nsuggested", "best of\n16 and none"):
        result.add_column(heading, justify="right")
    result.add_column("suggested, by seed")
    result.add_column("best clip")
    short = lambda code: code.removeprefix("optclip.").replace("clip_by_global_norm", "")  # noqa: E731
    for row in compared["rows"]:
        losses = (row["no_clip"], row["with_suggested"], row["best_of_grid"])
        result.add_row(
            f"{row['learning_rate']:g}",
            *(f"{x:.3f}" if math.isfinite(x) else "diverged" for x in losses),
            ", ".join(map(short, row["suggested"])),
            short(row["best_clip"]),
        )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = Parser(
        prog="python -m benchmarks.suggested_thresholds",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, help="only this one (default: both)")
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
    console = Console(width=None if sys.stdout.isatty() else 130)
    drawn = {}
    for name in [options.task] if options.task else TASKS:
        runner = Runner(name, options.out / f"{name}.json")
        for run in tqdm(list(grid()), desc=name, unit="run", disable=None):
            runner.run(*run)
        compared = {kind: compare(runner, kind) for kind in KINDS}
        for kind in KINDS:
            console.print(table(name, kind, compared[kind]))
        written = options.out / f"{name}_compared.json"
        written.write_text(json.dumps(plain(compared), indent=1) + "\n", encoding="utf-8")
        console.print(f"{runner.file} and {written} written")
        drawn[name] = compared["held_out"] | {"curves": curves(runner)}
    suggested_picture.draw(options.out / "suggested.png", drawn)
    console.print(f"{options.out / 'suggested.png'} written")


if __name__ == "__main__":
    main()
