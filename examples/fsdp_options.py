"""The command line of fsdp_transformer.py."""

import argparse
import math
import re
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
from text_model import BYTES

AXES = ("data", "fsdp", "tensor")
LEARNING_RATES = {"adamw": 0.006, "momentum": 0.1}

EXAMPLES = """\
examples:
  python examples/fsdp_transformer.py                       AdamW, one device, 200 steps
  python examples/fsdp_transformer.py --mesh fsdp=4,tensor=2            on 8 devices
  python examples/fsdp_transformer.py --mesh data=2,fsdp=2,tensor=2 --optimizer momentum
  python examples/fsdp_transformer.py --clip none --spike-every 25      what a spike does
  python examples/fsdp_transformer.py --clip safeguard --spike-every 25
  python examples/fsdp_transformer.py --clip safeguard --spike-every 25 --spike-kind labels
  python examples/fsdp_transformer.py --dtype bfloat16 --clip robust_clip
  python examples/fsdp_transformer.py --steps 400 --resume              go on with an earlier run

two processes, in two terminals (or on two machines, with the first one's address):
  python examples/fsdp_transformer.py --mesh data=2 --coordinator 127.0.0.1:9911 \\
      --processes 2 --process-id 0
  python examples/fsdp_transformer.py --mesh data=2 --coordinator 127.0.0.1:9911 \\
      --processes 2 --process-id 1
"""


@dataclass(frozen=True)
class Options:
    """What to run. `describe` names what a checkpoint must agree with."""

    layers: int
    width: int
    heads: int
    context: int
    dtype: str
    clip: str
    clip_args: dict[str, Any]
    optimizer: str
    lr: float
    steps: int
    batch_size: int
    spike_every: int | None
    spike_kind: str
    seed: int
    mesh: dict[str, int]
    devices: int
    coordinator: str | None
    processes: int
    process_id: int
    out: str
    resume: bool
    overwrite: bool
    json: bool
    checkpoint_every: int

    def describe(self) -> dict[str, Any]:
        """The options that make one run differ from another in its numbers, JSON-ready.

        Not the mesh: a run may go on on another one.
        """
        names = ("layers", "width", "heads", "context", "dtype", "clip", "optimizer", "lr")
        names += ("batch_size", "spike_every", "spike_kind", "seed")
        return {name: getattr(self, name) for name in names} | {
            "clip_args": shown_args(self.clip_args)
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
    if options["spike_kind"] is not None and options["spike_every"] is None:
        raise UsageError("--spike-kind says what, not when; add --spike-every 25")
    options["spike_kind"] = options["spike_kind"] or "gradient"
    _fill_in_processes(options)
    _fill_in_mesh(options)
    options = Options(**options)
    _check_splits(options)
    return options


def make_mesh(options: Options) -> Mesh:
    """The devices as data x fsdp x tensor.

    Raises:
        UsageError: If there are fewer.
    """
    devices = first_devices(options.devices, options.processes)
    sizes = tuple(options.mesh.values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _fill_in_processes(options: dict[str, Any]) -> None:
    names = ("coordinator", "processes", "process_id")
    if len({options[name] is None for name in names}) > 1:
        raise UsageError(
            "--coordinator, --processes and --process-id belong together; for example "
            "--coordinator 127.0.0.1:9911 --processes 2 --process-id 0"
        )
    if options["coordinator"] is None:
        options |= {"processes": 1, "process_id": 0}
    count, last = options["processes"], options["processes"] - 1
    if options["process_id"] > last:
        raise UsageError(
            f"--process-id {options['process_id']}: the {count} processes have the ids 0 to "
            f"{last}; give each its own"
        )


def _fill_in_mesh(options: dict[str, Any]) -> None:
    """Makes --mesh and --devices of one another where only one is given."""
    count, processes = options["devices"], options["processes"]
    if options["mesh"] is None:
        options["mesh"] = {"fsdp": count or processes}
    options["mesh"] = {axis: options["mesh"].get(axis, 1) for axis in AXES}
    product = math.prod(options["mesh"].values())
    options["devices"] = count or product
    if options["devices"] != product:
        raise UsageError(
            f"--mesh {_shown(options['mesh'])} takes {product} devices, not --devices {count}; "
            f"give --devices {product}, or leave it out"
        )
    if product % processes:
        raise UsageError(
            f"{product} devices cannot be shared out evenly over --processes {processes}; "
            f"give a --mesh whose sizes multiply to {processes} or a multiple of it"
        )


def _check_splits(options: Options) -> None:
    """Refuses what cannot be split evenly."""
    data, fsdp, tensor = options.mesh.values()
    if options.width % options.heads:
        raise UsageError(
            f"--width {options.width} cannot be shared out evenly over --heads {options.heads}; "
            f"try --width {_multiple(options.width, options.heads)}"
        )
    if options.batch_size % (data * fsdp):
        raise UsageError(
            f"--batch-size {options.batch_size} cannot be shared out evenly over the "
            f"{data * fsdp} of data x fsdp; try --batch-size "
            f"{_multiple(options.batch_size, data * fsdp)}"
        )
    if options.width % fsdp:
        raise UsageError(
            f"--width {options.width} cannot be split over fsdp={fsdp}; "
            f"try --width {_multiple(options.width, math.lcm(fsdp, options.heads))}"
        )
    if options.heads % tensor:
        raise UsageError(
            f"--heads {options.heads} cannot be split over tensor={tensor}; "
            f"try --heads {_multiple(options.heads, tensor)}"
        )
    if BYTES % tensor:
        raise UsageError(
            f"--mesh tensor={tensor} cannot split the embeddings of {BYTES} bytes; give a power "
            "of two"
        )


def _multiple(number: int, of: int) -> int:
    """The multiple of `of` at or below a number, or the first one."""
    return number // of * of or of


def _shown(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "fsdp=1"


def _parser() -> Parser:
    parser = Parser(
        "fsdp_transformer.py",
        "A small transformer, split over a mesh of devices, learns Python's own help texts.",
        EXAMPLES,
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("--layers", type=at_least_one, default=2, help=default)
    add("--width", type=at_least_one, default=64, help=default)
    add("--heads", type=at_least_one, default=4, help=default)
    add("--context", type=at_least_one, default=64, help="bytes in a window (default: 64)")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of parameters and gradients (default: %(default)s)",
    )
    add_clip_options(parser)
    add(
        "--optimizer",
        choices=list(LEARNING_RATES),
        default="adamw",
        help="momentum is SGD with momentum 0.9 (default: %(default)s)",
    )
    add_learning_rate(parser, LEARNING_RATES)
    add("--steps", type=at_least_one, default=200, help=default)
    add("--batch-size", type=at_least_one, default=16, help="windows in a step (default: 16)")
    add("--spike-every", type=at_least_one, metavar="N", help="put a spike into every Nth step")
    add(
        "--spike-kind",
        choices=["gradient", "labels"],
        help="its gradient times 1000, or its labels shuffled (default: gradient)",
    )
    add("--seed", type=seed, default=0, help=default)
    add(
        "--mesh",
        type=_mesh,
        metavar="AXIS=SIZE,...",
        help="of data, fsdp and tensor, for example fsdp=4,tensor=2 (default: all devices on fsdp)",
    )
    add(
        "--devices",
        type=at_least_one,
        help="devices of all processes together; made up of CPU threads where there is no "
        "accelerator (default: as many as --mesh takes)",
    )
    add("--coordinator", type=_address, metavar="HOST:PORT", help="where process 0 is to be found")
    add("--processes", type=at_least_one, metavar="N", help="how many processes share the devices")
    add("--process-id", type=_index, metavar="I", help="which one this is, from 0 on")
    add(
        "--out",
        metavar="DIR",
        default="runs/transformer",
        help="log, checkpoints, picture (default: %(default)s)",
    )
    add_folder_options(parser)
    add("--checkpoint-every", type=at_least_one, default=100, metavar="N", help="steps; " + default)
    return parser


def _mesh(text: str) -> dict[str, int]:
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or axis in mesh or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not sizes of {', '.join(AXES)}, each at most once; "
                "for example data=2,fsdp=2,tensor=2"
            )
        mesh[axis] = int(size)
    return mesh


def _address(text: str) -> str:
    if not re.fullmatch(r"\S+:\d{1,5}", text):
        raise argparse.ArgumentTypeError(f"give HOST:PORT, as 127.0.0.1:9911, not {text!r}")
    return text


def _index(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"give a whole number from 0 on, not {text!r}")
    return int(text)
