"""The command line: `optclip suggest`, `replay`, `plot` and `methods`.

What a command needs is imported when it is run, so that `--help` is there at once.
"""

import argparse
import ast
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NamedTuple, NoReturn

import optclip
from optclip._tuning.wording import LogError

EXAMPLES = """\
examples:
  optclip suggest runs/digits/steps.jsonl          whether to clip, how, and why
  optclip replay runs/digits/steps.jsonl           what every method would have done
  optclip plot runs/digits/steps.jsonl -o run.png  loss, norm, threshold, clip rate
  optclip methods                                  what there is to choose from

A run is whatever a trainer logged with the norm of the gradient in it: JSON lines, CSV or TSV (an
export of Weights & Biases), trainer_state.json, a folder or event file of TensorBoard, one norm a
line, or text with "grad_norm=1.2" in it. The best log is of optclip.metrics, as this writes it:
  row = {"step": step, "loss": float(loss)} | jax.tree.map(float, optclip.metrics(opt_state))
  log.write(json.dumps(row) + "\\n")
"""

RUN = "the log of a run: a file, a folder, or - for what comes in by a pipe"
PICTURES = (".png", ".svg", ".pdf")
WITHOUT_TERMINAL = 120  # letters in a line, where nothing says how many there are room for


class UsageError(Exception):
    """Something a person can fix; its one line says how."""


class Answer(NamedTuple):
    """What a command has to say: lines for people, data for machines."""

    shown: tuple[str, ...]
    data: Any


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help keeps its examples as they are typed."""

    def __init__(self, **settings: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        """Says it in one line, without the usage."""
        if message.endswith("required: RUN"):
            message += f"; give {RUN}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: What was typed after `optclip`; None reads `sys.argv`.

    Returns:
        The exit code: 2 where something has to be fixed, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = "optclip"
    try:
        options = _parsed(arguments)
        name = f"optclip {options.command}"
        answer: Answer = options.answer(options)
        if options.json:
            from optclip._tuning.plain import plain

            print(json.dumps(plain(answer.data), allow_nan=False))
        else:
            print("\n".join(answer.shown))
        sys.stdout.flush()
    except SystemExit as asked:  # by argparse: --help, --version, or an error that it has said
        return int(asked.code or 0)
    except KeyboardInterrupt:
        return _failed(name, "interrupted", 130)
    except BrokenPipeError:  # as of `optclip methods | head`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell gives a command that a closed pipe ended
    except OSError as error:
        reason = error.strerror or str(error)
        return _failed(name, f"{error.filename}: {reason}" if error.filename else reason)
    except (UsageError, LogError) as error:
        said = str(error)
        for argument in ("format", "norm_key", "step_key"):
            said = said.replace(f"({argument}=)", f"(--{argument.replace('_', '-')})")
        return _failed(name, said)
    except ImportError as error:
        if 'pip install "optclip[' not in str(error):
            raise
        return _failed(name, str(error))
    return 0


def _failed(name: str, message: str, code: int = 2) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code


# What is typed -----------------------------------------------------------------------------------


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="optclip",
        description="Choose, compare and look at gradient clipping from the log of a run.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"optclip {optclip.__version__}")
    known = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, answer: Callable[..., Answer], what: str, *examples: str, run: bool = True
    ) -> Parser:
        shown = "".join(f"  {example}\n" for example in examples)
        about = f"{what[0].upper()}{what[1:]}."
        command = known.add_parser(name, help=what, description=about, epilog=f"examples:\n{shown}")
        command.set_defaults(answer=answer)
        command.add_argument("--json", action="store_true", help="print JSON, for machines")
        if run:
            command.add_argument("run", metavar="RUN", help=RUN)
            command.add_argument(
                "--format", metavar="NAME", help="json, jsonl, numbers, csv (or TSV), text"
            )
            command.add_argument("--norm-key", metavar="KEY", help="how the log names the norm")
            command.add_argument("--step-key", metavar="KEY", help="how it names the step")
        return command

    add(
        "suggest",
        _suggest,
        "whether to clip, how, and with what threshold, from the norms of a run",
        "optclip suggest runs/digits/steps.jsonl",
        "optclip suggest trainer_state.json",
        "optclip suggest wandb_export.csv --norm-key 'run-7 - grad_norm' --json",
    )
    command = add(
        "replay",
        _replay,
        "what the methods would have done with the norms of a run",
        "optclip replay runs/digits/steps.jsonl",
        "optclip replay log.csv --method robust_clip --method 'zclip(z_threshold=3)'",
        "optclip replay log.jsonl -o replay.png",
    )
    command.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="a method, with arguments as in Python or without; repeat it for more (default: all "
        "that norms alone can replay)",
    )
    command.add_argument(
        "--thresholds",
        action="store_true",
        help="with --json: also the threshold of every step, and the norm that comes out of it",
    )
    command.add_argument("-o", "--out", metavar="FILE", help="also draw it: .png, .svg or .pdf")
    command = add(
        "plot",
        _plot,
        "a picture of a run: loss, norm against threshold, clip rate, norms of the leaves",
        "optclip plot runs/digits/steps.jsonl -o run.png",
        "optclip plot runs/tensorboard -o run.png",
        "tail -n 1000 log.jsonl | optclip plot - -o last.svg",
    )
    command.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="the picture: .png, .svg or .pdf (default: next to the log, run.jsonl gives run.png)",
    )
    command = add(
        "methods",
        _methods,
        "all methods with their arguments, defaults and papers, or the manual of one",
        "optclip methods",
        "optclip methods zclip",
        run=False,
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="show the manual of this one")
    first = next((word for word in arguments if not word.startswith("-")), None)
    if not arguments:
        parser.error(f"say what to do: {', '.join(known.choices)}")
    if first is not None and first not in known.choices:
        parser.error(f"there is no command {first!r}; {_hint(first, list(known.choices))}")
    options, others = parser.parse_known_args(arguments)
    if others:
        known.choices[options.command].error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _hint(typed: str, known: list[str]) -> str:
    close = difflib.get_close_matches(typed, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _record(options: argparse.Namespace, loss_will_do: bool = False) -> Any:
    """The log of the run that was asked for."""
    from optclip._tuning.log import read_log

    if options.run != "-" and not os.path.exists(options.run):
        raise UsageError(f"there is no file {options.run}; give the log of a run")
    return read_log(
        options.run,
        format=options.format,
        norm_key=options.norm_key,
        step_key=options.step_key,
        loss_will_do=loss_will_do,
    )


def _picture(out: str | None) -> Path | None:
    """Where a picture goes; found out before the work is done."""
    if out is None:
        return None
    path = Path(out) if Path(out).suffix else Path(f"{out}.png")
    if Path(out).is_dir():
        raise UsageError(f"-o {out} is a folder; name the picture too: -o {Path(out) / 'run.png'}")
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"-o {out}: {path.suffix} is no picture; end it in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UsageError(f"-o {out}: there is no folder {path.parent}; make it first")
    return path


def _method(name: str, only_methods: bool = False) -> Any:
    """The method of that name in the catalogue."""
    from optclip import catalogue

    try:
        return catalogue.named(name, only_methods=only_methods)
    except ValueError as error:  # nothing else is wrong there but the name
        raise UsageError(str(error)) from None


def _methods_asked(texts: list[str] | None) -> Any:
    """What `replay` takes, of what was typed: "zclip" or "zclip(z_threshold=3)"."""
    for text in texts or ():
        method = _method(text.partition("(")[0], only_methods=True)
        if method.needs and "(" not in text:
            raise UsageError(
                f"--method {text} needs {' and '.join(method.needs)}; type it as in Python: "
                f"--method '{text}({', '.join(f'{name}=...' for name in method.needs)})'"
            )
    if texts and any("(" in text for text in texts):
        return {text: _built(text) for text in texts}
    return [_method(text).name for text in texts] if texts else None


def _built(text: str) -> Any:
    """The transformation that a call with plain numbers, words and the like makes."""
    import optax

    name, open_bracket, rest = text.strip().partition("(")
    method = _method(name)
    try:
        call: Any = ast.parse(f"f({rest if open_bracket else ')'}", mode="eval").body
        positional = [ast.literal_eval(x) for x in call.args]
        by_name = {x.arg or "": ast.literal_eval(x.value) for x in call.keywords}
    except (AttributeError, SyntaxError, ValueError):
        raise UsageError(
            f"--method {text!r} is no call with plain values; type it as in Python: "
            '--method "zclip(z_threshold=3)"'
        ) from None
    known = [x.name for x in method.arguments if x.name != "inner"]
    for wrong in (name for name in by_name if name not in known):
        hint = _hint(wrong, known).replace("there are", "it takes")
        raise UsageError(f"--method {text!r}: {method.name} has no argument {wrong!r}; {hint}")
    try:
        inner = [optax.identity()] if method.wraps else []
        return getattr(optclip, method.name)(*inner, *positional, **by_name)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {text!r}: {error}") from None


# What the commands do ----------------------------------------------------------------------------


def _suggest(options: argparse.Namespace) -> Answer:
    from optclip._tuning.suggesting import suggest_threshold

    record = _record(options)
    suggestion = suggest_threshold(record)
    read = f"Read: {record.norm_key} of {len(record.norms):,} steps in {record.source}."
    lines = [*str(suggestion).splitlines(), read]
    data = suggestion.to_dict() | {"norm_key": record.norm_key}
    return Answer(tuple(map(_filled, lines)), data)


def _replay(options: argparse.Namespace) -> Answer:
    from optclip._tuning import replaying

    if options.thresholds and not options.json:
        raise UsageError("--thresholds goes with --json; to see them, draw them: -o replay.png")
    methods, out = _methods_asked(options.method), _picture(options.out)
    record = _record(options)
    result = replaying.replay(record, methods)
    left_out = {name: why for name, why in result.not_replayed.items() if name in (methods or ())}
    if not result.rows:
        name, why = next(iter(left_out.items()))
        raise UsageError(f"{name} cannot be replayed: it {why}")
    said = [f"{name} was not replayed: it {why}" for name, why in left_out.items()]
    data = result.to_dict(every_step=options.thresholds)
    if out is not None:
        result.draw(out)
        said.append(f"picture: {out}")
        data["path"] = str(out)
    shown = () if options.json else (_drawn(result.table()), *record.notes, *said)
    return Answer(shown, data)


def _plot(options: argparse.Namespace) -> Answer:
    from optclip._tuning.findings import look_at
    from optclip._tuning.plotting import plot_run

    out = _picture(options.out)
    record = _record(options, loss_will_do=True)
    if out is None:
        beside = "run" if options.run == "-" else record.source
        out = Path(beside, "run.png") if Path(beside).is_dir() else Path(beside).with_suffix(".png")
    plot_run(record, out)
    sentence = look_at(record).sentence
    data = {"finding": sentence, "path": str(out), "notes": record.notes}
    return Answer((_filled(f"{sentence}."), *record.notes, f"picture: {out}"), data)


def _methods(options: argparse.Namespace) -> Answer:
    from optclip import catalogue

    if options.name is not None:
        method = _method(options.name)
        return Answer((f"{_filled(method.call)}\n\n{method.document}",), method.to_dict())
    known = catalogue.methods()
    data = [method.to_dict() for method in known]
    return Answer(() if options.json else (_drawn(_table(known)),), data)


def _table(known: Any) -> Any:
    """The methods as a table of rich."""
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise ImportError('tables need rich: pip install "optclip[tuning]", or --json') from None
    from optclip import catalogue

    shared = catalogue.plumbing(known)
    table = Table(
        caption=f"Nearly all also take {', '.join(map(str, shared))}. "
        "`optclip methods NAME` shows the manual of one.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("arguments", overflow="fold", ratio=2)
    table.add_column("what it does, and where it is from", overflow="fold", ratio=3)
    for method in known:
        own = ", ".join(str(x) for x in method.arguments if x not in shared)
        about = "\n".join((method.summary, *map(str, method.papers)))
        table.add_row(*map(Text, (method.name, own, about)))  # [brackets] are no markup there
    return table


def _drawn(table: Any) -> str:
    """A table of rich as text, so that one `print` fails or not when a pipe is closed."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=get_terminal_size().columns if known else WITHOUT_TERMINAL)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


def _filled(text: str) -> str:
    width = min(100, get_terminal_size((100, 24)).columns)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
