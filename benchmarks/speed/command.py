"""The command line of the speed benchmark."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from benchmarks.speed import contenders, gates, judging, machine, measuring, tables, trees
from benchmarks.speed.contenders import Contender
from benchmarks.speed.trees import Tree
from optclip._tuning.plain import plain
from optclip.cli import Parser

PROGRAM = "python -m benchmarks"
ROUNDS, QUICK_ROUNDS = 30, 10
WIDTH = 150  # letters in a line, where nothing says how many there are room for

EXAMPLES = f"""examples:
  {PROGRAM} --quick                             a first look, in less than a minute
  {PROGRAM} --json speed.json                   all trees, dtypes and methods; about half an hour
  {PROGRAM} --compare speed.json                the same, and what changed since
  {PROGRAM} --tree 16-leaves --dtype bfloat16 --method robust_clip --method safeguard
  {PROGRAM} --gates                             do the limits of benchmarks/gates.toml hold?
  {PROGRAM} --device gpu --profile trace        a billion parameters on a GPU
  {PROGRAM} --parameters 4M --method zclip      a transformer-shaped tree of that size

trees: {", ".join(tree.name for tree in trees.TREES + trees.QUICK_TREES)}

exit codes: 0, 1 where a gate does not hold, 2 where something typed has to be fixed, 130 after
Ctrl-C.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark from the command line.

    Args:
        arguments: What was typed after `python -m benchmarks`; None reads `sys.argv`.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        return _run(options, arguments, parser)
    except SystemExit as asked:  # by argparse: --help, or an error that it has said
        return int(asked.code or 0)
    except KeyboardInterrupt:
        return _interrupted("nothing was finished; run it again, or less with --quick or --tree")
    except BrokenPipeError:  # as of `... | head`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(options: argparse.Namespace, arguments: list[str], parser: Parser) -> int:
    try:
        _check(options)
        device = _device(options.device)
        earlier = _earlier(options.compare) if options.compare else None
        limits = gates.load(options.gates) if options.gates else []
        places = [] if limits else _places(options)
        names: list[str] | None = options.method
        if options.quick and not names:
            names = [*contenders.QUICK]
        steps = contenders.chosen(names)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    with jax.default_device(device), _without_cache(), _progress() as tick:
        tick("the machine's memory", 1)
        entries = machine.ENTRIES // (4 if options.quick else 1)
        header = measuring.header(device, [*shlex.split(PROGRAM), *arguments], entries)
        console.print(tables.top(header), highlight=False)
        if limits:
            return _judge(limits, rounds, header, options.json, console, tick)
        return _measure(places, steps, rounds, header, earlier, options, console, tick)


def _judge(
    limits: list[gates.Gate],
    rounds: int,
    header: dict[str, Any],
    file: Path | None,
    console: Console,
    tick: Callable[..., None],
) -> int:
    verdicts = judging.judge(limits, rounds, tick)
    console.print(tables.gates(verdicts))
    for line in tables.missed(verdicts):
        console.print(f"known: {line}", highlight=False)
    _write(file, header | {"gates": verdicts})
    return 0 if all(verdict["holds"] for verdict in verdicts) else 1


def _measure(
    places: list[tuple[Tree, str]],
    steps: list[Contender],
    rounds: int,
    header: dict[str, Any],
    earlier: dict[tuple[str, str], Any] | None,
    options: argparse.Namespace,
    console: Console,
    tick: Callable[..., None],
) -> int:
    began, measured = time.perf_counter(), []
    for number, (tree, dtype) in enumerate(places):
        total = (len(steps) + rounds) * (len(places) - number)
        title = f"{tree.title}, {dtype}"
        tick(f"{title}: gradient", total)
        # A trace for each table: one folder would mix them up.
        profile = options.profile and options.profile / f"{tree.name}-{dtype}"
        try:
            result = measuring.measure(
                tree,
                dtype,
                steps,
                rounds,
                lambda what, title=title: tick(f"{title}: {what}"),
                profile,
                with_torch=options.device == "cpu" and not options.quick,
            )
        except KeyboardInterrupt:
            left = [f"--tree {x.name} --dtype {kind}" for x, kind in places[number:]]
            return _interrupted(f"tables above are complete; missing: {', '.join(left)}")
        measured.append(result)
        console.print(tables.table(result, header))
        before = (earlier or {}).get((tree.name, dtype))
        if before:
            console.print(tables.comparison(result, before))
        elif earlier is not None:
            console.print(f"{options.compare} has no table of {title}", highlight=False)
        _write(options.json, header | {"tables": measured})  # What is done stays after Ctrl-C.
    written = [str(path) for path in (options.json, options.profile) if path]
    done = f"{' and '.join(written)} written; " if written else ""
    console.print(f"{tables.LEGEND}\n{done}{time.perf_counter() - began:.0f} s", highlight=False)
    return 0


def _interrupted(how: str) -> int:
    print(f"{PROGRAM}: interrupted; {how}", file=sys.stderr)
    return 130


# What is typed -----------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="What every clip costs: time, memory, passes over the tree, compilation.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small trees, the main methods, few rounds")
    add("--tree", action="append", metavar="NAME", help="only this one; repeat it for more")
    add("--dtype", choices=gates.DTYPES, help="only this one (default: both)")
    add(
        "--method",
        action="append",
        metavar="NAME",
        help="only this method, and what it is measured against; repeat it for more",
    )
    add("--rounds", type=int, metavar="N", help=f"steps of each contender (default: {ROUNDS})")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    add("--parameters", metavar="N", help="one transformer-shaped tree of N, such as 4M")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE too")
    add("--compare", type=Path, metavar="FILE", help="show what changed since this --json")
    add("--profile", type=Path, metavar="DIR", help="write traces of some rounds to DIR")
    add(
        "--gates",
        nargs="?",
        type=Path,
        const=gates.FILE,
        metavar="FILE",
        help="measure just what the limits in FILE need (default: benchmarks/gates.toml)",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Before any work is done."""
    if options.rounds is not None and options.rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {options.rounds}")
    alone = ("quick", "tree", "dtype", "method", "parameters", "compare", "profile")
    other = next((name for name in alone if getattr(options, name)), None)
    if options.gates and (other or options.device == "gpu"):
        raise ValueError(f"--gates says itself what is measured: leave --{other or 'device'} out")
    if options.tree and options.parameters:
        raise ValueError("--parameters makes a tree of its own: leave --tree out")
    if options.json and options.json.is_dir():
        raise ValueError(f"--json {options.json} is a folder; name a file in it")
    if options.json and not os.access(options.json.absolute().parent, os.W_OK):
        raise ValueError(f"--json: cannot write to the folder {options.json.absolute().parent}")


def _device(kind: str) -> Any:
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # A GPU would be taken hold of, and not used.
    try:
        return jax.local_devices(backend=kind)[0]
    except RuntimeError:
        raise ValueError(
            "--device gpu: JAX finds no GPU here; install its GPU build, or leave --device out"
        ) from None


def _places(options: argparse.Namespace) -> list[tuple[Tree, str]]:
    if options.tree:
        wanted = [trees.named(name) for name in options.tree]
    elif options.parameters:
        wanted = [trees.transformer(trees.parameters(options.parameters))]
    elif options.device == "gpu":
        wanted = [trees.transformer(trees.GPU_PARAMETERS)]
    else:
        wanted = trees.QUICK_TREES if options.quick else trees.TREES
    dtypes = [options.dtype] if options.dtype else gates.DTYPES
    return [(tree, dtype) for tree in wanted for dtype in dtypes]


def _earlier(file: Path) -> dict[tuple[str, str], Any]:
    """The tables of an earlier run, by tree and dtype."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["tables"]
        return {(x["tree"], x["dtype"]): x for x in listed}
    except OSError as error:
        raise ValueError(f"--compare {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--compare {file}: no tables in it; make one with {PROGRAM} --json {file}"
        ) from None


# Around the work ---------------------------------------------------------------------------------


@contextmanager
def _without_cache() -> Iterator[None]:
    """Compile times are those of compiling, not of reading from a folder."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A line on stderr; what it gives is called with what was done, or with what is left."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def tick(what: str, left: int | None = None) -> None:
            if left is not None:
                progress.update(task, total=progress.tasks[0].completed + left)
            progress.update(task, description=what, advance=left is None)

        yield tick


def _write(file: Path | None, result: dict[str, Any]) -> None:
    """Whole or not at all: the benchmark may be interrupted here."""
    if file is None:
        return
    part = file.with_name(f"{file.name}.part")
    text = json.dumps(plain(result), ensure_ascii=False, indent=1, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)
