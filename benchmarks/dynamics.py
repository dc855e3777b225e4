"""How every adaptive rule behaves on streams of norms whose truth is known.

Each rule runs through its method's real `update`, on a gradient of one entry (three equal leaves
for `adagc`) whose norm is the stream's. The typical norm is 1; the noise is log-normal with a
deviation of 0.2 of the log norm where nothing else is said; steps count from 0. Every figure is
taken per seed; the table holds the medians.

clip, out/in: share of the steps that are clipped, and the sum of the norms that come out over
    the sum of those that go in; from step 1,000 on, when every warm-up is over.
1st, 2nd, burst, step 10: what comes out of a spike of 100 at step 700, of one of 20 at step 720,
    on the average of 20 steps of 20 from step 700 on, and of a spike of 100 at the tenth step.
    worst: the most that comes out of any of them.
x3 ... x0.01: steps to recover after the level changes for good at step 1,000. Recovered is a
    threshold within a factor of 2 of its stationary median for the new level, for good: the first
    step k after the change from which on, to the end of the run, every threshold lies between 1/2
    and 2 times (the change) times (the median threshold, from step 1,000 on, of the same rule and
    seed in the stream without a change). "never" is: not in the 5,000 steps that were run.
    This one is printed. The JSON also has "let through", for rises: the first step k for which
    less than 10% is taken off in most of the steps k to k + 19.
|t|, Pareto: heavy tails, a Student's t with 1.2 degrees of freedom and a Pareto distribution with
    exponent 1.5, both scaled to a median of 1; the share clipped, and the largest norm that comes
    out.
drift: the level rises by three decades in 5,000 steps; over the last 200 steps.
constant: every norm is 1; from step 1,000 on.
zeros, NaN, Inf: whether after 100 zeros, one NaN (at step 50) and one Inf (at step 700) every
    threshold is what it would have been without them.

AutoClip sorts 1,024 norms at every step and is run with 3 seeds and for 2,200 steps: it remembers
no more than 1,024. AdaGC clips to `max_norm`, 1.0, while it warms up, which here happens to be the
typical norm: it holds the spike at step 10 for that reason alone.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optclip
from benchmarks import dynamics_rules, dynamics_streams
from benchmarks.dynamics_figures import Figures, measure
from benchmarks.dynamics_picture import draw
from benchmarks.dynamics_rules import Family, Traces
from benchmarks.parsing import Parser

STEPS, SEEDS = dynamics_streams.SHIFT + 5000, 20
QUICK_STEPS, QUICK_SEEDS = dynamics_streams.SHIFT + 500, 3
QUICK_RULES = [
    "fixed 1.5",
    "autoclip",
    "clip_by_quantile",
    "zclip reciprocal clipped",
    "zclip reciprocal winsorized",
    "adagc",
    "clip_by_window raw",
    "clip_by_moving_average",
    "robust_clip",
]
WORKERS = 2
"""Most of the time goes into compiling, and that of one rule leaves the other cores idle."""

EXAMPLES = """examples:
  python -m benchmarks.dynamics                                  the whole table and the picture
  python -m benchmarks.dynamics --quick                          a first look
  python -m benchmarks.dynamics --method robust_clip --method "zclip max"
  python -m benchmarks.dynamics --json runs/dynamics.json --out runs/dynamics
"""


def run(
    families: list[Family], seeds: int, steps: int, progress: Progress | None = None
) -> tuple[dict[str, Traces], dict[str, Figures]]:
    """Drives rules through all streams and measures what they did.

    Args:
        families: The rules.
        seeds: Independent draws of the noise.
        steps: Length of every stream.
        progress: Where to show how far it is; None for nowhere.

    Returns:
        Two mappings from rule, in the order of the families: the traces of the picture, and the
        figures.
    """
    streams = dynamics_streams.make(seeds, steps)

    def work(family: Family) -> list[tuple[str, Traces, Figures]]:
        driven = dynamics_rules.drive(family, streams)
        return [(name, _pictured(traces), measure(traces)) for name, traces in driven.items()]

    task = progress.add_task("rules", total=len(families)) if progress else None
    # The slow ones first, so that the last to start is a short one.
    slow_first = sorted(families, key=lambda family: family.most_seeds is None)
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = {pool.submit(work, family): family.names for family in slow_first}
        for job in as_completed(jobs):
            if progress and task is not None:
                done = f"rules, last {jobs[job][-1]}"
                progress.update(task, advance=1, description=done)
    results = {name: (traces, of) for job in jobs for name, traces, of in job.result()}
    names = [name for family in families for name in family.names]
    return {name: results[name][0] for name in names}, {name: results[name][1] for name in names}


def _pictured(traces: Traces) -> Traces:
    """What the picture needs; all traces of all rules would take half a gigabyte."""
    return Traces(*({"picture": of["picture"][:1]} for of in traces))


def tables(figures: dict[str, Figures]) -> list[Table]:
    """The figures as tables to print."""
    noise = _table("Noise: share clipped and out/in, by sigma")
    spikes = _table("Spikes: what comes out. Shifts of the level: steps to recover")
    rest = _table("Heavy tails, drift, and what should change nothing")
    stationary = [dynamics_streams.sigma(value) for value in dynamics_streams.SIGMAS]
    sigmas = [f"{value:g}" for value in dynamics_streams.SIGMAS]
    _add(noise, *(f"clip\n{value}" for value in sigmas), *(f"out/in\n{value}" for value in sigmas))
    _add(spikes, "1st\n→", "2nd\n→", "burst\n→", "step\n10 →", "worst\n→")
    _add(spikes, *(f"after\n{name}" for name in dynamics_streams.SHIFTS))
    _add(
        rest, "|t|\nclip", "|t|\nmax", "Pareto\nclip", "Pareto\nmax", "drift\nclip", "drift\nout/in"
    )
    _add(rest, "const.\nclip", "after\nzeros", "after\nNaN", "after\nInf")
    for name, of in figures.items():
        noise.add_row(
            name,
            *(_percent(of["clipped"][stream]) for stream in stationary),
            *(f"{of['kept'][stream]:.2f}" for stream in stationary),
        )
        spikes.add_row(
            name,
            *(_norm(x) for x in of["spikes"].values()),
            *(_steps(x) for x in of["recovery"].values()),
        )
        tails = [of[stream] for stream in ("student t", "pareto")]
        rest.add_row(
            name,
            *(text for x in tails for text in (_percent(x["clipped"]), _norm(x["largest"]))),
            _percent(of["drift"]["clipped"]),
            f"{of['drift']['kept']:.2f}",
            _percent(of["constant"]["clipped"]),
            *("same" if x else "differs" for x in of["unmoved by"].values()),
        )
    return [noise, spikes, rest]


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("rule", no_wrap=True)
    return table


def _add(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def _norm(norm: float) -> str:
    return f"{norm:.2f}" if norm < 9.995 else f"{norm:.1f}" if norm < 99.95 else f"{norm:.0f}"


def _steps(steps: float) -> str:
    return f"{steps:,.0f}" if math.isfinite(steps) else "never"


def report(figures: dict[str, Figures], seeds: int, steps: int) -> dict[str, Any]:
    """The figures as JSON has them: null for never."""
    return {
        "benchmark": "dynamics",
        "optclip": optclip.__version__,
        "jax": jax.__version__,
        "seeds": seeds,
        "steps": steps,
        "never": "null: not within the steps that were run",
        "rules": {
            name: {
                group: {key: _json(value) for key, value in values.items()}
                for group, values in of.items()
            }
            for name, of in figures.items()
        },
    }


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.dynamics",
        description="Drives every adaptive rule through streams of norms: noise, spikes, shifts.",
        epilog=f"{EXAMPLES}\nwhat the figures mean:\n\n{(__doc__ or '').partition(chr(10))[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE too")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/dynamics"),
        help="folder for the picture, made if need be (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="only the rules whose name begins with these words; may be given several times",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help=f"draws of the noise, 1 to 200 (default: {SEEDS})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seeds, 500 steps after a shift, one or two rules of each method",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    steps = QUICK_STEPS if options.quick else STEPS
    if options.seeds is not None and not 1 <= options.seeds <= 200:
        parser.error(f"--seeds must be in 1 to 200, got {options.seeds}")
    try:
        families = dynamics_rules.chosen(options.method or (QUICK_RULES if options.quick else None))
        if options.json and options.json.is_dir():
            raise ValueError(f"--json must name a file, {options.json} is a folder")
        if options.json and not os.access(options.json.absolute().parent, os.W_OK):
            raise ValueError(f"--json: cannot write to the folder {options.json.absolute().parent}")
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise ValueError(f"--out: cannot write to the folder {options.out}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.quick:
        families = [
            family if family.most_seeds is None else family._replace(most_seeds=1)
            for family in families
        ]
    jax.config.update("jax_platforms", "cpu")  # Single numbers: an accelerator would only wait.
    began = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        traces, figures = run(families, seeds, steps, progress)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(figures):
        console.print(table)
    console.print(
        f"Medians over {seeds} seeds of {steps:,} steps. Recovered: the threshold is within a "
        "factor of 2 of its stationary median for the new level, for good. Never: not within "
        f"{steps - dynamics_streams.SHIFT:,} steps. All definitions: --help."
    )
    if any(family.most_seeds for family in families):
        console.print("AutoClip: fewer seeds and at most 2,200 steps: its memory ends at 1,024.")
    picture = draw(traces, figures, options.out)
    if options.json:
        options.json.write_text(
            json.dumps(report(figures, seeds, steps), ensure_ascii=False, indent=1) + "\n",
            encoding="utf-8",
        )
    written = " and ".join(str(path) for path in (picture, options.json) if path)
    console.print(f"{written} written; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
