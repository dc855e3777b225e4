"""A small transformer learns a text with Muon, and a clip that acts on AdamW's leaves alone.

::

    pip install -e ".[examples]"
    python examples/muon.py

Read `trained_by` and `make_clip` first: which leaves are Muon's, and what the clip is given. Norms
are measured before the clip, after it and after the optimizer, so that the table at the end shows
where a clip brings a gradient near the eps of Muon or AdamW.
"""

import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_report
from clip_options import Parser, UsageError, at_least_one, exit_code, positive_number, seed
from flax import nnx
from jax.sharding import AxisType
from rich.console import Console
from rich.table import Table
from run_folder import (
    Interruption,
    Row,
    RunFolder,
    add_folder_options,
    json_ready,
    keep_result,
    words_aside,
)
from text_model import Text, Transformer, held_out_batches, load_text, training_batch
from tqdm import tqdm

import optclip
from optclip import scopes

EXAMPLES = """\
examples:
  python examples/muon.py                                   AdamW's leaves clipped to 1
  python examples/muon.py --clip all                        all leaves, by their common norm
  python examples/muon.py --clip all --max-norm 1e-9        the trap: a threshold far too low
  python examples/muon.py --loud 1e11 --clip all            the trap: one matrix, far too loud
  python examples/muon.py --loud 1e11                       ... of which AdamW's leaves know nothing
  python examples/muon.py --spike-every 25                  spikes stay in Muon's momentum
  python examples/muon.py --spike-every 25 --clip apart     ... unless its leaves are clipped too
  python examples/muon.py --clip safeguard                  no threshold to choose
"""
CLIPS = {
    "adamw": "AdamW's leaves, by their common norm",
    "all": "all leaves, by their common norm",
    "apart": "AdamW's leaves by their common norm, each of Muon's by its own",
    "safeguard": "safeguard around Muon and AdamW",
    "none": "nothing",
}
WITHOUT_THRESHOLD = ("safeguard", "none")
PARTS = {"muon": "Muon", "adamw": "AdamW"}
EPS = 1e-8  # of both; the default of Optax
LOUD = "blocks/0/up/kernel"
SPIKE = 1000.0  # times the gradient
HEADS, CONTEXT, BATCH_SIZE = 4, 64, 16
LOG_EVERY, CHECKPOINT_EVERY, LAST = 20, 100, 40  # steps
BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}"


@dataclass(frozen=True)
class Options:
    """What to run. `describe` names what a checkpoint must agree with."""

    clip: str
    max_norm: float
    lr: float
    loud: float
    spike_every: int | None
    layers: int
    width: int
    steps: int
    seed: int
    out: str
    resume: bool
    overwrite: bool
    json: bool

    def describe(self) -> Row:
        """The options that make one run differ from another in its numbers, JSON-ready."""
        names = ("clip", "max_norm", "lr", "loud", "spike_every", "layers", "width", "seed")
        return {name: getattr(self, name) for name in names}


# The optimizer -----------------------------------------------------------------------------------


def trained_by(path: str) -> str:
    """Muon has the matrices inside the blocks; AdamW the embeddings, the head and all vectors."""
    return "muon" if path.startswith("blocks/") and path.endswith("/kernel") else "adamw"


def make_clip(clip: str, max_norm: float) -> optax.GradientTransformation:
    """The clip before the optimizer, by the name of its option."""

    def labels(path: str) -> str | None:
        of_muon = None if clip == "adamw" else path  # None: neither measured nor clipped
        return of_muon if trained_by(path) == "muon" else "adamw"

    if clip in ("adamw", "apart"):
        return optclip.clip_by_group_norm(max_norm, labels)
    if clip == "all":
        return optclip.clip_by_global_norm(max_norm)
    return optax.identity()


def make_muon(rate: float) -> optax.GradientTransformation:
    """Muon for the leaves that `trained_by` gives it, AdamW at 0.3 of its rate for the others."""

    def dimensions(params: optax.Params) -> Any:
        def of(path: Any, _: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            matrix = optax.contrib.MuonDimensionNumbers()
            return matrix if trained_by(name) == "muon" else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        rate, eps=EPS, adam_learning_rate=0.3 * rate, muon_weight_dimension_numbers=dimensions
    )


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """The clip and Muon, with norms of both parts before and after, and of leaves in between."""
    parts = optclip.measure_norms(scope=scopes.group(trained_by, list(PARTS)), detail=True)
    leaves = optclip.measure_norms(scope=scopes.leaf, detail=True)
    held = optax.chain(leaves, make_muon(options.lr))
    if options.clip == "safeguard":
        return optax.chain(parts, optclip.safeguard(held), parts)
    return optax.chain(parts, make_clip(options.clip, options.max_norm), held, parts)


# Training ----------------------------------------------------------------------------------------


def start(options: Options) -> tuple[Any, Callable, Callable]:
    """A fresh state, a training step and a test step; the parameters are a plain dict."""
    optimizer = make_optimizer(options)

    def create() -> tuple[Any, Any]:
        sizes = (options.layers, options.width, HEADS, CONTEXT)
        graph, params = nnx.split(Transformer(*sizes, jnp.float32, nnx.Rngs(options.seed)))
        params = nnx.to_pure_dict(params)
        return graph, (params, optimizer.init(params))

    # The network's parameters name the axes of a mesh: here it has one device.
    device = jax.devices()[0]
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=[device])
    with jax.set_mesh(mesh):
        graph, _ = jax.eval_shape(create)
        state = jax.jit(lambda: create()[1])()
    state = jax.device_put(state, device)

    def loss_of(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def disturbed(grads: Any, number: jax.Array) -> Any:
        factor = jnp.float32(1)
        if options.spike_every is not None:
            factor = jnp.where(number % options.spike_every == 0, SPIKE, factor)

        def of(path: Any, grad: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return grad * factor * (options.loud if name == LOUD else 1.0)

        return jax.tree_util.tree_map_with_path(of, grads)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: Any, number: jax.Array, inputs: jax.Array, labels: jax.Array) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_of)(params, inputs, labels)
        updates, opt_state = optimizer.update(disturbed(grads, number), opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), readings(loss, opt_state, params)

    return state, train_step, jax.jit(loss_of)


def readings(loss: jax.Array, opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """What is logged of a step: loss, norm of all leaves, the clip's readings, and the norms.

    "before/muon" and "before/adamw", "step/muon" and "step/adamw", and "after/..." of every leaf.
    """
    read = optclip.metrics(opt_state, params)
    count = len([name for name in read if name.startswith("clip/") and name.endswith("/factor")])
    clip = 1 if count == 4 else 0  # without a clip: of what is measured before
    names = ("norm", "clipped_norm", "threshold", "factor", "clip_rate")
    logged = {"loss": loss, "norm": read["clip/0/norm"]}
    logged |= {f"clip/{name}": read[f"clip/{clip}/{name}"] for name in names}
    for moment, place in (("before", 0), ("after", count - 2), ("step", count - 1)):
        of_leaf = f"clip/{place}/norms/"
        logged |= {
            f"{moment}/{name.removeprefix(of_leaf)}": value
            for name, value in read.items()
            if name.startswith(of_leaf)
        }
    return logged


def train(options: Options, text: Text, folder: RunFolder) -> Row:
    """Trains to the end, with a log of every step and now and then a checkpoint.

    Returns:
        The held-out loss, and by path how many entries each leaf has.

    Raises:
        KeyboardInterrupt: Between two steps, if somebody asked to stop.
    """
    state, train_step, test_step = start(options)
    state, history = folder.begin(state)
    if folder.note:
        print(folder.note)
    done = history[-1]["step"] if history else 0
    bar = tqdm(total=options.steps, initial=done, desc="step", bar_format=BAR, disable=None)
    with Interruption() as interruption, bar:
        while done < options.steps:
            # The next step after which to write the log.
            stop, waiting = min(options.steps, done // LOG_EVERY * LOG_EVERY + LOG_EVERY), []
            while done < stop and not interruption.requested:
                done += 1
                batch = training_batch(text, BATCH_SIZE, CONTEXT, options.seed, done)
                state, reading = train_step(state, done, *batch)
                waiting.append(reading)
            rows = folder.append(jax.device_get(waiting))
            if rows:
                bar.update(len(rows))
                bar.set_postfix_str(run_report.progress(run_report.summary(rows)))
            if interruption.requested:
                raise KeyboardInterrupt
            if done % CHECKPOINT_EVERY == 0 or done == options.steps:
                history.append({"step": done, **run_report.summary(rows)})
                folder.save(state, history)
                if bar.disable:  # because this is no terminal
                    print(f"step {done}: {run_report.progress(history[-1])}", flush=True)
    losses = [test_step(state[0], *batch) for batch in held_out_batches(text, 64, CONTEXT)[:5]]
    leaves = jax.tree_util.tree_leaves_with_path(state[0])
    sizes = {jax.tree_util.keystr(p, simple=True, separator="/"): x.size for p, x in leaves}
    return {"held_out_loss": json_ready(float(np.mean(losses))), "sizes": sizes}


# What came of it ---------------------------------------------------------------------------------


def usual(rows: list[Row], name: str) -> float:
    """The median of a norm; infinite where it never was finite."""
    value = run_report.median_of_finite(run_report.column(rows, name))
    return math.inf if value is None else value


def part_of(rows: list[Row], sizes: dict[str, int], part: str) -> Row:
    """What the clip and the optimizer made of the leaves of one optimizer.

    Its "least" is what an eps is to be compared with: for Muon the norm of the smallest matrix, for
    AdamW the root mean square of the leaf whose entries are smallest.
    """
    after = {path: usual(rows, f"after/{path}") for path in sizes if trained_by(path) == part}
    size = {path: 1 if part == "muon" else sizes[path] for path in after}
    return {
        "leaves": len(after),
        "parameters": sum(sizes[path] for path in after),
        "before": usual(rows, f"before/{part}"),
        "after": math.hypot(*after.values()),
        "step": usual(rows, f"step/{part}"),
        "least": min(norm / math.sqrt(size[path]) for path, norm in after.items()),
    }


def print_table(parts: dict[str, Row]) -> None:
    """One row for Muon's leaves and one for AdamW's."""
    table = Table(
        caption=f"medians of the last {LAST} steps; in eps: of the smallest leaf after the clip, "
        f"Muon's by its norm, AdamW's by the root mean square of its entries, over {EPS:g}",
        caption_justify="left",
    )
    for heading in ("", "leaves", "parameters", "norm", "clipped norm", "in eps", "step"):
        table.add_column(heading, justify="right" if heading else "left")
    for part, row in parts.items():
        norms = (f"{row[name]:.3g}" for name in ("before", "after"))
        in_eps = f"{row['least'] / EPS:.2g}"
        counts = (str(row["leaves"]), f"{row['parameters']:,}")
        table.add_row(PARTS[part], *counts, *norms, in_eps, f"{row['step']:.3g}")
    Console().print(table)


def verdict(parts: dict[str, Row], clip: str) -> str:
    """Whether a clip brought a gradient near an eps, in one sentence.

    docs/optimizers.md has the measurement: AdamW's step is 13% too short where the root mean square
    of a leaf is 16 times its eps, Muon's 2% where the norm of a matrix is a tenth of it.
    """
    near = {"muon": 0.1, "adamw": 16.0}
    short = [part for part, row in parts.items() if row["least"] < near[part] * EPS]
    if not short:
        return "No leaf is near the eps of its optimizer, which would shorten its steps."
    said = " and ".join(f"{PARTS[x]}'s ({parts[x]['least'] / EPS:.1g} eps)" for x in short)
    way = "raise --max-norm, or clip fewer leaves" if clip != "none" else "multiply the loss"
    return f"Near an eps, so that steps are too short: the smallest leaf of {said}; {way}."


def report(folder: RunFolder, settings: Row, outcome: Row) -> Row:
    """Draws the picture, prints the table and, last, the verdict; the result, JSON-ready."""
    rows, sizes = folder.rows(), outcome.pop("sizes")
    parts = {part: part_of(rows[-LAST:], sizes, part) for part in PARTS}
    loss = run_report.show(outcome["held_out_loss"], ".2f", run_report.NOT_FINITE)
    setup = f"clipped: {CLIPS[settings['clip']]}; Muon at {settings['lr']:g}"
    if settings["clip"] not in WITHOUT_THRESHOLD:
        setup = f"clipped to {settings['max_norm']:g}{setup.removeprefix('clipped')}"
    run_report.draw(folder.picture, rows, f"held-out loss {loss}", setup)
    print(setup)
    print_table(parts)
    last = json_ready(run_report.column(rows[-LAST:], "loss").mean())
    shown = run_report.show(last, ".3f", run_report.NOT_FINITE)
    print(f"loss {shown}, held-out {loss}; log, checkpoints, picture, result: {folder.path}")
    print(verdict(parts, settings["clip"]))
    ready = {part: {name: json_ready(x) for name, x in row.items()} for part, row in parts.items()}
    return {
        **settings,
        "steps": len(rows),
        "loss": last,
        "held_out_loss": outcome["held_out_loss"],
        "factor": run_report.median_of_finite(run_report.column(rows[-LAST:], "clip/factor")),
        "clip_rate": rows[-1]["clip/clip_rate"],
        "parts": ready,
    }


# The command line --------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> Options:
    """Reads the command line.

    Raises:
        UsageError: With one line that says what to type instead.
    """
    parser = Parser("muon.py", "Muon and AdamW learn a text, with clipped gradients.", "")
    parser.epilog = f"{EXAMPLES}\nwhat --clip clips:\n" + "".join(
        f"  {name:11}{what}\n" for name, what in CLIPS.items()
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("--clip", choices=list(CLIPS), default="adamw", help="what is clipped, below; " + default)
    add("--max-norm", type=positive_number, metavar="C", help="the threshold (default: 1.0)")
    add("--lr", type=positive_number, default=0.02, help="Muon's; AdamW's is 0.3 of it; " + default)
    add(
        "--loud",
        type=positive_number,
        default=1.0,
        metavar="X",
        help=f"multiply the gradient of one of Muon's matrices ({LOUD}) by X; " + default,
    )
    help_ = "multiply the gradient of every Nth step by 1000"
    add("--spike-every", type=at_least_one, metavar="N", help=help_)
    add("--layers", type=at_least_one, default=2, help=default)
    add("--width", type=at_least_one, default=64, help=default)
    add("--steps", type=at_least_one, default=200, help=default)
    add("--seed", type=seed, default=0, help=default)
    help_ = "log, checkpoints, picture (default: %(default)s)"
    add("--out", metavar="DIR", default="runs/muon", help=help_)
    add_folder_options(parser)
    options = vars(parser.parse_args(arguments))
    if options["max_norm"] is not None and options["clip"] in WITHOUT_THRESHOLD:
        raise UsageError(f"--clip {options['clip']} has no threshold: leave --max-norm out")
    options["max_norm"] = options["max_norm"] or 1.0
    if options["width"] % HEADS:
        near = options["width"] // HEADS * HEADS or HEADS
        raise UsageError(f"--width {options['width']}: give a multiple of {HEADS}, as {near}")
    return Options(**options)


def run(options: Options) -> int:
    """Trains and reports; the answer is the exit code."""
    with words_aside(options.json) as stdout:
        text, settings = load_text(), options.describe()
        out = Path(options.out).expanduser()
        folder = RunFolder(
            out, settings, options.steps, options.resume, options.overwrite, unit="step"
        )
        print(f"Learning Python's help texts: {len(text.train):,} bytes.", flush=True)
        try:
            outcome = train(options, text, folder)
        except KeyboardInterrupt:
            hint = folder.way_on("there is no checkpoint", sys.argv)
            print(f"Interrupted: {hint}", file=sys.stderr)
            return 130
        result = report(folder, settings, outcome)
        keep_result(out, result, stdout if options.json else None)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the answer is the exit code."""
    return exit_code("muon.py", lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the run in order
    sys.exit(main())
