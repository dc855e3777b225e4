"""What the commands of the command line do; what they need is imported when they are run."""

import argparse
import ast
import difflib
import os
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NamedTuple

import optclip
from optclip._tuning.records import Record, read
from optclip._tuning.wording import LogError

PICTURES = (".png", ".svg", ".pdf")
WITHOUT_TERMINAL = 120  # letters in a line, where nothing says how many there are room for


class UsageError(Exception):
    """Something a person can fix; its one line says how."""


class Answer(NamedTuple):
    """What a command has to say.

    Attributes:
        shown: For people.
        data: For machines.
    """

    shown: tuple[str, ...]
    data: Any


def suggest(options: argparse.Namespace) -> Answer:
    """`optclip suggest`."""
    from optclip._tuning.suggesting import suggest_threshold

    suggestion = suggest_threshold(_record(options))
    return Answer((_filled(str(suggestion)),), suggestion.to_dict())


def replay(options: argparse.Namespace) -> Answer:
    """`optclip replay`."""
    from optclip._tuning import replaying

    if not options.json:
        _need_rich()
        if options.thresholds:
            raise UsageError("--thresholds goes with --json; to see them, draw them: -o replay.png")
    methods, out = _methods_asked(options.method), _writable(options.out)
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
    shown = () if options.json else (_drawn(result.table(_width())), *record.notes, *said)
    return Answer(shown, data)


def plot(options: argparse.Namespace) -> Answer:
    """`optclip plot`."""
    from optclip._tuning.findings import finding
    from optclip._tuning.plotting import plot_run

    out = _writable(options.out)
    record = _record(options, loss_will_do=True)
    out = _beside(options.run) if out is None else out
    plot_run(record, out)
    sentence = finding(record)
    data = {"finding": sentence, "path": str(out), "notes": record.notes}
    return Answer((_filled(f"{sentence}."), *record.notes, f"picture: {out}"), data)


def methods(options: argparse.Namespace) -> Answer:
    """`optclip methods`."""
    from optclip import catalogue

    if options.name is not None:
        method = _named(options.name)
        manual = catalogue.plain(method.document)
        return Answer((f"{_filled(method.call)}\n\n{manual}",), method.to_dict())
    known = catalogue.methods()
    data = [method.to_dict() for method in known]
    return Answer(() if options.json else (_drawn(_table(known)),), data)


# What is typed -----------------------------------------------------------------------------------


def _record(options: argparse.Namespace, loss_will_do: bool = False) -> Record:
    """The log of the run that was asked for."""
    source: Any = options.run
    if source == "-":
        source = getattr(sys.stdin, "buffer", sys.stdin)
    elif os.path.isdir(source):
        source = Path(source) / "steps.jsonl"
        if not source.exists():
            raise UsageError(f"{options.run} is a folder without steps.jsonl; give the log itself")
    elif not os.path.exists(source):
        raise UsageError(f"there is no file {source}; give the log of a run, one JSON a line")
    try:
        return read(source, options.norm_key, loss_will_do=loss_will_do)
    except LogError as error:
        raise UsageError(str(error).replace("(norm_key=)", "(--norm-key)")) from None


def _writable(out: str | None) -> Path | None:
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


def _beside(run: str) -> Path:
    """Where the picture of a run goes that nothing is said of: next to its log."""
    if run == "-":
        return Path("run.png")
    return Path(run, "steps.png") if os.path.isdir(run) else Path(run).with_suffix(".png")


def _methods_asked(texts: list[str] | None) -> Any:
    """What `replay` takes, of what was typed: "zclip" or "zclip(z_threshold=3)"."""
    if not texts:
        return None
    for text in texts:
        method = _named(text.partition("(")[0], only_methods=True)
        needs = [x.name for x in method.arguments if x.default is None and x.name != "inner"]
        if needs and "(" not in text:
            raise UsageError(
                f"--method {text} needs {' and '.join(needs)}; type it as in Python: "
                f"--method '{text}({', '.join(f'{name}=...' for name in needs)})'"
            )
    if not any("(" in text for text in texts):
        return [_named(text).name for text in texts]
    return {text: _built(text) for text in texts}


def _named(name: str, only_methods: bool = False) -> Any:
    """The method of that name in the catalogue."""
    from optclip import catalogue

    try:
        return catalogue.named(name, only_methods=only_methods)
    except ValueError as error:  # nothing else is wrong there but the name
        raise UsageError(str(error)) from None


def _built(text: str) -> Any:
    """The transformation that a call with plain numbers, words and the like makes."""
    import optax

    name, open_bracket, rest = text.strip().partition("(")
    method = _named(name)
    try:
        call = ast.parse(f"f({rest if open_bracket else ')'}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SyntaxError
        positional = [ast.literal_eval(x) for x in call.args]
        by_name = {x.arg or "": ast.literal_eval(x.value) for x in call.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(
            f"--method {text!r} is no call with plain values; type it as in Python: "
            '--method "zclip(z_threshold=3)"'
        ) from None
    known = [x.name for x in method.arguments if x.name != "inner"]
    for wrong in (name for name in by_name if name not in known):
        close = difflib.get_close_matches(wrong, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
        raise UsageError(f"--method {text!r}: {method.name} has no argument {wrong!r}; {hint}")
    try:
        inner = [optax.identity()] if method.wraps else []
        return getattr(optclip, method.name)(*inner, *positional, **by_name)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {text!r}: {error}") from None


# What is said ------------------------------------------------------------------------------------


def _table(known: Any) -> Any:
    """The methods as a table of rich."""
    _need_rich()
    from rich.table import Table
    from rich.text import Text

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

    console = Console(width=_width())
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


def _width() -> int:
    """How many letters a line has room for."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return get_terminal_size().columns if known else WITHOUT_TERMINAL


def _filled(text: str) -> str:
    width = min(100, get_terminal_size((100, 24)).columns)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _need_rich() -> None:
    if find_spec("rich") is None:
        raise UsageError('tables need rich: pip install "optclip[tuning]", or ask for --json')
