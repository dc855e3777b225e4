"""The command line of mnist.py: its options, and the clip that a person asked for by name."""

import argparse
import ast
import contextlib
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

import optclip

LEARNING_RATES = {"sgd": 0.01, "momentum": 0.05, "adam": 0.001}
DEFAULT_CLIP_ARGS = {"clip_by_global_norm": {"max_norm": 1.0}}

EXAMPLES = """\
examples:
  python examples/mnist.py                                  clipped SGD, 10 epochs
  python examples/mnist.py --optimizer momentum             learns faster
  python examples/mnist.py --clip-arg max_norm=0.1          another threshold
  python examples/mnist.py --clip adaptive_grad_clip --clip-arg clipping=0.01
  python examples/mnist.py --clip clip_by_group_norm --clip-arg max_norm=1.0 \\
      --clip-arg "labels={'conv1': 'conv', 'conv2': 'conv', 'dense1': 'dense', 'dense2': 'dense'}"
  python examples/mnist.py --clip none                      no clip, to compare with
  python examples/mnist.py --clip measure_norms             no clip, but its norms
  python examples/mnist.py --epochs 20 --resume             go on with an earlier run
  python examples/mnist.py --api nnx --devices 2            the other Flax, on two devices
"""


class UsageError(Exception):
    """Something a person can mend; its one line says how."""


@dataclass(frozen=True)
class Options:
    """What to run. `describe` names what a checkpoint must agree with."""

    dataset: str
    data_dir: str | None
    clip: str
    clip_args: dict[str, Any]
    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    seed: int
    api: str
    devices: int
    out: str | None
    resume: bool
    tensorboard: bool

    def describe(self) -> dict[str, Any]:
        """The options that make one run differ from another in its numbers, JSON-ready."""
        return {
            "api": self.api,
            "clip": self.clip,
            "clip_args": ", ".join(f"{k}={v!r}" for k, v in sorted(self.clip_args.items())),
            "optimizer": self.optimizer,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def clip_methods() -> dict[str, Callable[..., Any]]:
    """Every public clip of optclip by name: the transformations and the wrappers."""
    names = [n for n in optclip.__all__ if n.islower() and n not in ("clip_by", "metrics")]
    public = {name: getattr(optclip, name) for name in names}
    return {name: value for name, value in public.items() if callable(value)}


def wraps_optimizer(method: Callable[..., Any]) -> bool:
    """Whether a method holds the optimizer, as `safeguard(inner)`, and is not chained with it."""
    return next(iter(inspect.signature(method).parameters), "") == "inner"


def parse_options(arguments: list[str] | None = None) -> Options:
    """Reads the command line.

    Args:
        arguments: What was typed after the name of the script; None reads `sys.argv`.

    Returns:
        The `Options`, with every default filled in.

    Raises:
        UsageError: With one line that says what to type instead.
    """
    options = vars(_parser().parse_args(arguments))
    if options["lr"] is None:
        options["lr"] = LEARNING_RATES[options["optimizer"]]
    options["clip_args"] = _clip_args(options["clip"], options.pop("clip_arg"))
    options = Options(**options)
    if options.batch_size % options.devices:
        near = options.batch_size // options.devices * options.devices or options.devices
        raise UsageError(
            f"--batch-size {options.batch_size} cannot be shared out evenly over "
            f"--devices {options.devices}; try --batch-size {near}"
        )
    return options


def data_mesh(count: int) -> Mesh:
    """The first `count` devices in a row, along an axis called "data".

    Raises:
        UsageError: If there are fewer.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX is in use already: what is there, is there
            jax.config.update("jax_num_cpu_devices", count)  # of no effect on accelerators
    devices = jax.devices()
    if len(devices) < count:
        raise UsageError(
            f"--devices {count}: there are only {len(devices)} here ({devices[0].platform}); "
            f"give --devices {len(devices)} or fewer"
        )
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)  # one line instead of argparse's usage text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mnist.py",
        description="A small Flax network learns handwritten digits with clipped gradients.",
        epilog=f"{EXAMPLES}\nclips: {', '.join(clip_methods())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--dataset",
        choices=["mnist", "digits"],
        default="mnist",
        help="mnist falls back to the 1,797 digits of scikit-learn where it is out of reach",
    )
    add("--data-dir", help="where prepared data sets are (default: ~/tensorflow_datasets)")
    add(
        "--clip",
        default="clip_by_global_norm",
        metavar="NAME",
        help="a method of optclip, or none (default: %(default)s, with max_norm=1.0)",
    )
    add(
        "--clip-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the clip; repeat it for more",
    )
    add(
        "--optimizer",
        choices=list(LEARNING_RATES),
        default="sgd",
        help="momentum is SGD with momentum 0.9 (default: %(default)s)",
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    add("--lr", type=_positive_number, help=f"learning rate (default: {rates})")
    add("--epochs", type=_at_least_one, default=10, help="default: %(default)s")
    add("--batch-size", type=_at_least_one, default=16, help="default: %(default)s")
    add("--seed", type=_seed, default=0, help="default: %(default)s")
    add("--api", choices=["linen", "nnx"], default="linen", help="which Flax (default: linen)")
    add(
        "--devices",
        type=_at_least_one,
        default=1,
        help="devices to share each batch out to; made up of CPU threads where there is no "
        "accelerator (default: %(default)s)",
    )
    add("--out", metavar="DIR", help="log, checkpoints, picture (default: runs/<dataset>)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--tensorboard", action="store_true", help="also write event files for TensorBoard")
    return parser


def _at_least_one(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number of at least 1, not {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"give a whole number from 0 to 2**32 - 1, not {text!r}")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"give a number above 0, not {text!r}")
    return value


def _clip_args(clip: str, texts: list[str]) -> dict[str, Any]:
    """The arguments of a clip from "name=value" texts, checked against its signature."""
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
    if wraps_optimizer(methods[clip]):
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
