"""Runs the proving ground from the command line."""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.parsing import Parser
from benchmarks.proving_ground import __doc__ as about
from benchmarks.proving_ground import choosing, jobs, pictures, reporting, running
from benchmarks.proving_ground.jobs import FULL, QUICK

PROGRAM = "python -m benchmarks.proving_ground"
EXAMPLES = f"""examples:
  {PROGRAM} --quick                            a first look
  {PROGRAM} --full                             everything; go on later with the same
  {PROGRAM} --task transformer --method robust_clip --method "no clip"
  {PROGRAM} --candidates --task quadratic      variants from candidates.py
  {PROGRAM} --full --export results.json       what is done so far; runs nothing
"""


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Trains the same small tasks with every clip, to see which one to use.",
        epilog=f"{EXAMPLES}\nwhat is run and what the scores mean:\n\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--full", action="store_true", help="everything at full size (hours)")
    much.add_argument(
        "--quick", action="store_true", help="short runs, three tasks, some of the methods (90 s)"
    )
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="only the tasks whose name begins so; may be given several times",
    )
    parser.add_argument("--method", action="append", metavar="NAME", help="the same of methods")
    parser.add_argument("--candidates", action="store_true", help="the variants of candidates.py")
    parser.add_argument("--list", action="store_true", help="list tasks and methods, run nothing")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=max(len(os.sched_getaffinity(0)), 1) if hasattr(os, "sched_getaffinity") else 1,
        help="processes, each of one thread (default: one for each core)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="results and pictures go here (default: runs/proving_ground, or its folder quick)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to FILE too")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="run nothing; write the scores of what is done so far to FILE, beside those that are "
        "in it already",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the proving ground.

    Args:
        arguments: The command line; None for that of this process.

    Returns:
        The exit code: 0, 1 if a job failed, or 130 after Ctrl-C. An error in the command line ends
        with 2.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    typed = shlex.join(["python", "-m", "benchmarks.proving_ground", *(arguments or sys.argv[1:])])
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.list:
        console.print(choosing.listed(options.candidates))
        return 0
    chooses = options.task or options.method or options.candidates or options.export
    if not (options.full or options.quick or chooses):
        parser.error("say what to run: --quick, --full, --task NAME or --method NAME (see --list)")
    if not 1 <= options.workers <= 256:
        parser.error(f"--workers must be in 1 to 256, got {options.workers}")
    default = Path("runs/proving_ground/quick" if options.quick else "runs/proving_ground")
    folder = options.out or default
    try:
        orders = choosing.orders(
            options.task,
            options.method,
            candidates=options.candidates,
            quick=options.quick,
            size=QUICK if options.quick else FULL,
            folder=folder,
        )
        for option, file in (("--json", options.json), ("--export", options.export)):
            if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
                raise ValueError(f"{option}: cannot write to {file}; name a file that can be made")
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if options.export:
        return _export(parser, orders, options.export, typed)
    began = time.perf_counter()
    try:
        failed = running.run_all(orders, options.workers)
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept. To go on: {typed}", file=sys.stderr)
        return 130
    for done in failed:
        print(f"{done.order.task}, {done.order.method} failed: see {done.error}", file=sys.stderr)
    found = reporting.rows(orders)
    if not found:
        return 1
    for table in reporting.tables(found):
        console.print(table)
    console.print(reporting.LEGEND)
    written = pictures.draw(orders, found, folder)
    if options.json:
        _write(options.json, reporting.report(found, typed))
        written.append(options.json)
    names = " and ".join(str(path) for path in written)
    console.print(f"{names} written; {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


def _export(parser: Parser, orders: list[running.Order], file: Path, typed: str) -> int:
    found = reporting.rows(orders)
    missing = sum(jobs.read(running.job(order)) is None for order in orders)
    if not found:
        parser.error(f"--export: nothing is done in {orders[0].folder} yet; run it first")
    try:
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        content = reporting.report(found, typed, earlier)
    except (ValueError, KeyError):
        parser.error(f"--export: {file} holds something else; name another file, or delete it")
    _write(file, content)
    note = f"; {missing} of {len(orders)} jobs are not done yet" if missing else ""
    print(f"{file} written{note}")
    return 0


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
