"""The command line of `benchmarks.accelerators`."""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optclip
from benchmarks.accelerators import __doc__ as about
from benchmarks.accelerators import gates, programs, targets
from benchmarks.accelerators.programs import Case
from benchmarks.parsing import Parser
from benchmarks.speed import trees
from benchmarks.speed.trees import hint

PROGRAM = "python -m benchmarks.accelerators"
WIDTH = 150
DTYPES = ("float32", "bfloat16")
EXAMPLES = f"""examples:
  {PROGRAM}                                     16 leaves, for an H100 and a TPU v5e (4 minutes)
  {PROGRAM} --method robust_clip --device h100
  {PROGRAM} --tree 1000-leaves --dtype bfloat16
  {PROGRAM} --device 8xh100 --device v5e-4x4    a transformer over (fsdp, tensor)
  {PROGRAM} --json accelerators.json            go on later with the same
  {PROGRAM} --compare accelerators.json         and what changed since

exit codes: 0, 1 where a gate of benchmarks/gates.toml does not hold, 2 where something typed has to
be fixed or a compiler is missing, 130 after Ctrl-C.
"""


def main(arguments: list[str] | None = None) -> int:
    """Compiles, and prints the tables."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        cases, earlier, done = _asked(options)
    except SystemExit as asked:
        return int(asked.code or 0)
    except ValueError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        _compile(cases, done, options.json)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    held = True
    limits = gates.load()
    for place in dict.fromkeys(case.place for case in cases):
        rows = [case for case in cases if case.place == place]
        table, lines, all_held = _table(rows, done, earlier, limits)
        held &= all_held
        console.print(table)
        for line in lines:
            console.print(line, highlight=False)
    if options.json:
        console.print(f"{options.json} written", highlight=False)
    return 0 if held else 1


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=about,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(target.name for target in targets.TARGETS)
    add = parser.add_argument
    add("--device", action="append", metavar="NAME", help=f"{names} (default: h100 and v5e)")
    add("--dtype", choices=DTYPES, help="only this one (default: both)")
    add("--tree", metavar="NAME", help=f"{', '.join(programs.TREES)} (default: 16-leaves)")
    add("--method", action="append", metavar="NAME", help="only this one; repeat it for more")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep results in FILE; what is in it is not redone",
    )
    add("--compare", type=Path, metavar="FILE", help="show what changed since this --json")
    return parser


def _asked(options: argparse.Namespace) -> tuple[list[Case], dict[str, Any], dict[str, Any]]:
    """The cases, the results to compare with, and those that are there already."""
    by_name = {target.name: target for target in targets.TARGETS}
    cases = []
    contenders = programs.chosen(options.method)
    for name in options.device or ["h100", "v5e"]:
        if name not in by_name:
            raise ValueError(f"there is no device {name!r}; {hint(name, by_name)}")
        target = by_name[name]
        if why := targets.missing(target):
            raise ValueError(why)
        tree = programs.SLICED if target.mesh else trees.named(options.tree or programs.TREES[0])
        for dtype in [options.dtype] if options.dtype else DTYPES:
            cases += [Case(target, tree, dtype, contender) for contender in contenders]
    earlier = _results(options.compare) if options.compare else {}
    file: Path | None = options.json
    return cases, earlier, _results(file) if file is not None and file.exists() else {}


def _results(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["results"]
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: no results in it; make one with {PROGRAM} --json") from None


def _compile(cases: list[Case], done: dict[str, Any], file: Path | None) -> None:
    left = [case for case in cases if case.key not in done]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(left))
        for case in left:
            progress.update(task, description=case.key.replace("|", ", "))
            done[case.key] = programs.measure(case)
            progress.advance(task)
            if file is not None:
                _write(file, done)


def _write(file: Path, done: dict[str, Any]) -> None:
    """Whole or not at all."""
    machine = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "optax": optax.__version__,
        "optclip": optclip.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps({"versions": machine, "results": done}, indent=1) + "\n", "utf-8")
    part.replace(file)


def _table(
    cases: list[Case], done: dict[str, Any], earlier: dict[str, Any], limits: list[gates.Gate]
) -> tuple[Table, list[str], bool]:
    """A table, the lines below it, and whether all its gates hold."""
    target, tree, dtype = cases[0].target, cases[0].tree, cases[0].dtype
    table = Table(title=f"{target.title}: {tree.title}, {dtype}", title_justify="left")
    columns = ["passes", "kernels", "conditional", "temporary", "compile s"]
    columns += ["cycles / Optax's"] if target.platform == "tpu" else []
    columns += ["collectives"] if target.mesh else []
    table.add_column("step")
    for column in [*columns, "Optax: passes", "kernels"]:
        table.add_column(column, justify="right")
    table.add_column("")
    held, lines = True, []
    by_name = {case.contender.name: case for case in cases}
    for name, case in by_name.items():
        ours = done[case.key]
        other = by_name.get(programs.counterpart(case.contender))
        is_ours = not name.startswith("optax.") and name != "sgd"
        optax_s = done[other.key] if other is not None and is_ours else None
        cells = [
            f"{ours['passes']:.2f}",
            str(ours["kernels"]),
            str(ours["conditionals"]),
            f"{ours['temporary_share']:.1%}",
            f"{ours['compile_seconds']:.1f}",
        ]
        if target.platform == "tpu":
            ratio = ours["cycles"] / optax_s["cycles"] if optax_s else None
            cells.append("" if ratio is None else f"{ratio:.2f}")
        if target.mesh:
            cells.append(", ".join(f"{n} {kind}" for kind, n in ours["collectives"].items()))
        cells += [f"{optax_s['passes']:.2f}", str(optax_s["kernels"])] if optax_s else ["", ""]
        mark = ""
        if optax_s and tree.name in (programs.TREES[0], programs.SLICED.name):
            said = gates.broken(target.name, name, ours, optax_s, limits)
            if said:
                why = gates.known(target.name, name, limits)
                held &= bool(why)
                mark = "known" if why else "does not hold"
                lines.append(f"{name}: {'; '.join(said)}" + (f" ({why})" if why else ""))
        before = earlier.get(case.key)
        if before:
            mark += "".join(
                f" {what} {before[what]:.4g} before"
                for what in ("passes", "kernels", "conditionals")
                if abs(before[what] - ours[what]) > 0.005 * max(before[what], 1)
            )
        table.add_row(name, *cells, mark.strip())
    return table, lines, held


def run() -> int:
    """`main`, with a way out for a closed pipe."""
    try:
        return main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
