"""The command line of mnist.py."""

from dataclasses import dataclass
from typing import Any

import jax
from clip_options import (
    Parser,
    UsageError,
    add_clip_options,
    add_learning_rate,
    at_least_one,
    clip_args,
    first_devices,
    seed,
    shown_args,
)
from jax.sharding import AxisType, Mesh
from run_folder import add_folder_options

LEARNING_RATES = {"sgd": 0.01, "momentum": 0.05, "adam": 0.001}

EXAMPLES = """\
examples:
  python examples/mnist.py                                  clipped SGD, 10 epochs
  python examples/mnist.py --dataset digits --lr 1          a rate that needs the clip
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
    overwrite: bool
    json: bool
    tensorboard: bool

    def describe(self) -> dict[str, Any]:
        """The options that make one run differ from another in its numbers, JSON-ready."""
        return {
            "api": self.api,
            "clip": self.clip,
            "clip_args": shown_args(self.clip_args),
            "optimizer": self.optimizer,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


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
    options["clip_args"] = clip_args(options["clip"], options.pop("clip_arg"))
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
    devices = first_devices(count)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def _parser() -> Parser:
    parser = Parser(
        "mnist.py",
        "A small Flax network learns handwritten digits with clipped gradients.",
        EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--dataset",
        choices=["mnist", "digits"],
        default="mnist",
        help="mnist falls back to the 1,797 digits of scikit-learn where it is out of reach",
    )
    add("--data-dir", help="where prepared data sets are (default: ~/tensorflow_datasets)")
    add_clip_options(parser)
    add(
        "--optimizer",
        choices=list(LEARNING_RATES),
        default="sgd",
        help="momentum is SGD with momentum 0.9 (default: %(default)s)",
    )
    add_learning_rate(parser, LEARNING_RATES)
    add("--epochs", type=at_least_one, default=10, help="default: %(default)s")
    add("--batch-size", type=at_least_one, default=16, help="default: %(default)s")
    add("--seed", type=seed, default=0, help="default: %(default)s")
    add("--api", choices=["linen", "nnx"], default="linen", help="which Flax (default: linen)")
    add(
        "--devices",
        type=at_least_one,
        default=1,
        help="devices to share each batch out to; made up of CPU threads where there is no "
        "accelerator (default: %(default)s)",
    )
    add("--out", metavar="DIR", help="log, checkpoints, picture (default: runs/<dataset>)")
    add_folder_options(parser)
    add("--tensorboard", action="store_true", help="also write event files for TensorBoard")
    return parser
