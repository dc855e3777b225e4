"""The command line: `optclip suggest`, `replay`, `plot` and `methods`."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import optclip
from optclip import _commands as commands
from optclip._commands import Answer, UsageError
from optclip._tuning.plain import plain
from optclip._tuning.wording import LogError

EXAMPLES = """\
examples:
  optclip suggest runs/digits/steps.jsonl          a threshold, and why
  optclip replay runs/digits/steps.jsonl           what every method would have done
  optclip plot runs/digits/steps.jsonl -o run.png  loss, norm, threshold, clip rate
  optclip methods                                  what there is to choose from

A run is a file with one JSON object for each step, as this writes it:
  row = {"step": step, "loss": float(loss)} | jax.tree.map(float, optclip.metrics(opt_state))
  log.write(json.dumps(row) + "\\n")
"""

RUN = "a file of JSON lines, a folder with steps.jsonl in it, or - for what comes in by a pipe"


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
        _say(options.answer(options), as_json=options.json)
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
        return _failed(name, str(error))
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
    for add in (_add_suggest, _add_replay, _add_plot, _add_methods):
        add(known)
    first = next((word for word in arguments if not word.startswith("-")), None)
    if not arguments:
        parser.error(f"say what to do: {', '.join(known.choices)}")
    if first is not None and first not in known.choices:
        close = difflib.get_close_matches(first, known.choices, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known.choices)}"
        parser.error(f"there is no command {first!r}; {hint}")
    options, others = parser.parse_known_args(arguments)
    if others:
        known.choices[options.command].error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _add_suggest(known: Any) -> None:
    parser = _command(
        known,
        "suggest",
        commands.suggest,
        "a threshold from the norms of a run, with its reasons",
        "optclip suggest runs/digits/steps.jsonl",
        "optclip suggest log.jsonl --norm-key train/grad_norm --json",
    )
    _add_run(parser)


def _add_replay(known: Any) -> None:
    parser = _command(
        known,
        "replay",
        commands.replay,
        "what the methods would have done with the norms of a run",
        "optclip replay runs/digits/steps.jsonl",
        "optclip replay log.jsonl --method robust_clip --method 'zclip(z_threshold=3)'",
        "optclip replay log.jsonl -o replay.png",
    )
    _add_run(parser)
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="a method, with arguments as in Python or without; repeat it for more (default: all "
        "that norms alone can replay)",
    )
    parser.add_argument(
        "--thresholds",
        action="store_true",
        help="with --json: also the threshold of every step, and the norm that comes out of it",
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="also draw it: .png, .svg or .pdf")


def _add_plot(known: Any) -> None:
    parser = _command(
        known,
        "plot",
        commands.plot,
        "a picture of a run: loss, norm against threshold, clip rate, norms of the leaves",
        "optclip plot runs/digits/steps.jsonl -o run.png",
        "tail -n 1000 log.jsonl | optclip plot - -o last.svg",
    )
    _add_run(parser)
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="the picture: .png, .svg or .pdf (default: next to the log, run.jsonl gives run.png)",
    )


def _add_methods(known: Any) -> None:
    parser = _command(
        known,
        "methods",
        commands.methods,
        "all methods with their arguments, defaults and papers, or the manual of one",
        "optclip methods",
        "optclip methods zclip",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show the manual of this one")


def _command(
    known: Any, name: str, answer: Callable[..., Answer], what: str, *examples: str
) -> Parser:
    shown = "".join(f"  {example}\n" for example in examples)
    parser = known.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"examples:\n{shown}"
    )
    parser.set_defaults(answer=answer)
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser


def _add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("--norm-key", metavar="KEY", help="how the log names the norm")


# What is said ------------------------------------------------------------------------------------


def _say(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(answer.data), allow_nan=False))
    else:
        print("\n".join(answer.shown))
