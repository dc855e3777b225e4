"""The command line of the contracts: a clip by its name, a table or JSON, an exit code."""

import importlib
import os
import sys
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from optclip.cli import Parser
from optclip.testing._report import CONTRACTS, Report, report
from optclip.testing._subject import raised

EXAMPLES = """\
examples:
  python -m optclip.testing optax:clip_by_global_norm       what does Optax's own clip keep to?
  python -m optclip.testing my_package.clips:my_clip --threshold max_norm
  python -m optclip.testing optclip:robust_clip --contract nonfinite --contract resume
  python -m optclip.testing my_module:clip --quick --json > clip.json
  pytest --pyargs optclip.testing --clip my_module:clip     the same, a test for each contract

A clip is an optax.GradientTransformation, or a function that makes one. The exit code is 0 where
nothing was found, 1 where something was, 2 where something typed is wrong.
"""


def devices() -> None:
    """Eight devices of the CPU, for meshes, unless JAX has counted them already."""
    try:
        jax.config.update("jax_num_cpu_devices", 8)
    except RuntimeError:
        return


def named(clip: str) -> Any:
    """The object of a name like `package.module:name`.

    Raises:
        ValueError: If there is none; its line says what is missing.
    """
    module, _, attribute = clip.partition(":")
    if not module or not attribute:
        raise ValueError(
            f"{clip!r} names no clip; give MODULE:NAME, as in optax:clip_by_global_norm"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{clip!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"{clip!r}: importing {module} raised {raised(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{clip!r}: {module} has no {part}")
        found = getattr(found, part)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Asks a clip for its contracts.

    Args:
        arguments: What was typed; None reads `sys.argv`.

    Returns:
        The exit code.
    """
    parser = Parser(
        prog="python -m optclip.testing",
        description="Ask a gradient clip what it keeps to: types, norms, bounds, NaN, state, "
        "meshes.",
        epilog=EXAMPLES + "\ncontracts: " + ", ".join(CONTRACTS),
    )
    add = parser.add_argument
    add("clip", metavar="MODULE:NAME", help="a clip, or a function that makes one")
    add(
        "--threshold",
        metavar="NAME",
        help="the function's argument that is the threshold (default: the first without default)",
    )
    add(
        "--contract",
        metavar="NAME",
        action="append",
        choices=tuple(CONTRACTS),
        help="only this contract; may be given again",
    )
    add("--quick", action="store_true", help="fewer inputs, of fewer types: 10 to 30 seconds")
    add("--json", action="store_true", help="JSON instead of a table")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as asked:
        return int(asked.code or 0)
    devices()
    try:
        found = _with_progress(options)
    except (TypeError, ValueError) as error:
        print(f"{parser.prog}: {error} (see --help)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(found.to_json())
    else:
        Console().print(as_table(found))
    return 0 if found.kept else 1


def _with_progress(options: Any) -> Report:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(options.clip, total=len(options.contract or CONTRACTS))
        return report(
            named(options.clip),
            threshold=options.threshold,
            contracts=options.contract,
            quick=options.quick,
            name=options.clip,
            progress=lambda contract: bar.update(task, advance=1, description=contract),
        )


def as_table(found: Report) -> Table:
    """A report for `rich.print`."""
    findings = len(found.findings)
    name = f"{found.clip} with {found.threshold}" if found.threshold else found.clip
    what = "nothing found" if found.kept else f"{findings} finding{'s' * (findings > 1)}"
    table = Table(
        title=Text(f"{name}: {what}"), box=SIMPLE_HEAD, title_justify="left", show_edge=False
    )
    table.add_column("contract", no_wrap=True)
    table.add_column("kept", no_wrap=True)
    table.add_column("what was found, or why it was not asked", overflow="fold")
    for x in found.results:
        kept = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("-", "dim")}
        table.add_row(
            x.contract,
            kept[x.kept],
            Text("\n".join((*x.findings, *(f"not asked: {why}" for why in x.not_asked)))),
        )
    return table
