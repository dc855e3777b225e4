"""What the examples' command lines share: the clip that is asked for by name, devices, numbers."""

import argparse
import ast
import contextlib
import difflib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import absl.logging
import jax
import optax

import optclip
from optclip import catalogue

DEFAULT_CLIP_ARGS = {"clip_by_global_norm": {"max_norm": 1.0}}


class UsageError(Exception):
    """Something a person can fix; its one line says how."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help keeps its examples as they are typed."""

    def __init__(self, prog: str, description: str, examples: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{examples}\nclips: {', '.join(clip_methods())}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        """Raises a `UsageError`."""
        if message.startswith("unrecognized"):
            message += "; --help lists what there is"
        raise UsageError(message)  # one line instead of argparse's usage text


# The clip ----------------------------------------------------------------------------------------


def add_clip_options(parser: Parser) -> None:
    """Adds --clip and --clip-arg; `clip_args` makes arguments of the latter."""
    parser.add_argument(
        "--clip",
        default="clip_by_global_norm",
        metavar="NAME",
        help="a method of optclip, or none (default: %(default)s, with max_norm=1.0)",
    )
    parser.add_argument(
        "--clip-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the clip; repeat it for more",
    )


def clip_methods() -> dict[str, Callable[..., Any]]:
    """Every public clip of optclip by name: the transformations and the wrappers."""
    return {method.name: getattr(optclip, method.name) for method in catalogue.methods()}


def with_clip(
    optimizer: optax.GradientTransformation, clip: str, clip_args: dict[str, Any]
) -> optax.GradientTransformation:
    """The clip before the optimizer, after it or around it, wherever it belongs.

    Args:
        optimizer: What the clip is put to.
        clip: One of `clip_methods`, or "none".
        clip_args: Its arguments; `labels` may be a dict from layer to label.
    """
    if clip == "none":
        return optimizer
    method, args = clip_methods()[clip], dict(clip_args)
    if isinstance(args.get("labels"), dict):  # layers that it does not name are left alone
        layers = args["labels"]
        args["labels"] = lambda path: layers.get(path.split("/")[0])
    known = catalogue.named(clip)
    if known.wraps:
        return method(optimizer, **args)
    if known.follows:
        return optax.chain(optimizer, method(**args))
    return optax.chain(method(**args), optimizer)


@contextlib.contextmanager
def explained(clip: str) -> Any:
    """Makes what the library says is wrong with a clip's arguments a `UsageError`."""
    try:
        yield
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"--clip {clip}: {' '.join(str(error).split())}") from None


def clip_args(clip: str, texts: list[str]) -> dict[str, Any]:
    """The arguments of a clip from "name=value" texts, checked against its signature.

    Raises:
        UsageError: With one line that says what to type instead.
    """
    given = dict(_name_and_value(text) for text in texts)
    if clip == "none":
        if given:
            raise UsageError(f"--clip none takes no --clip-arg, got {', '.join(given)}; drop it")
        return {}
    methods = clip_methods()
    if clip not in methods:
        close = difflib.get_close_matches(clip, methods, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown --clip {clip!r}{hint}; choose from none, {', '.join(methods)}")
    parameters = dict(inspect.signature(methods[clip]).parameters)
    if catalogue.named(clip).wraps:
        parameters.pop("inner")  # the optimizer, which --optimizer names
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise UsageError(
            f"--clip-arg {unknown[0]}: {clip} has no such argument; "
            f"it has {', '.join(parameters) or 'none'}"
        )
    args = DEFAULT_CLIP_ARGS.get(clip, {}) | given
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in args:
            raise UsageError(f"--clip {clip} needs {name}: add --clip-arg {name}=...")
    return args


def shown_args(args: dict[str, Any]) -> str:
    """The arguments of a clip as they are typed in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(args.items()))


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise UsageError(f"--clip-arg {text!r} is not NAME=VALUE; for example max_norm=1.0")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        pass
    try:
        return name.strip(), float(value)  # inf and nan are no Python literals
    except ValueError:
        return name.strip(), value


# Devices -----------------------------------------------------------------------------------------


def first_devices(count: int, processes: int = 1) -> list[Any]:
    """The first devices, made up of CPU threads where there is no accelerator.

    Args:
        count: How many, in all processes together.
        processes: How many processes there are; each makes its share.

    Raises:
        UsageError: If there are fewer.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX is in use already: what is there, is there
            # Of no effect on accelerators.
            jax.config.update("jax_num_cpu_devices", count // processes)
    devices = jax.devices()
    if len(devices) < count:
        raise UsageError(
            f"--devices {count}: there are only {len(devices)} here ({devices[0].platform}); "
            f"give --devices {len(devices)} or fewer"
        )
    return devices[:count]


# Numbers, as argparse types ----------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number of at least 1, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number that random generators take."""
    if not text.strip().isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"give a whole number from 0 to 2**32 - 1, not {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"give a number above 0, not {text!r}")
    return value


# The learning rate --------------------------------------------------------------------------------


def add_learning_rate(parser: Parser, rates: Mapping[str, float]) -> None:
    """Adds --lr, whose default depends on the optimizer."""
    shown = ", ".join(f"{rate:g} for {name}" for name, rate in rates.items())
    parser.add_argument("--lr", type=positive_number, help=f"learning rate (default: {shown})")


# The end -----------------------------------------------------------------------------------------


def exit_code(script: str, run: Callable[[], int]) -> int:
    """Runs a script; bad input is one line on stderr and exit code 2."""
    absl.logging.set_verbosity(absl.logging.ERROR)  # what tfds and orbax have to say of themselves
    try:
        return run()
    except UsageError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted before training began.", file=sys.stderr)
        return 130
