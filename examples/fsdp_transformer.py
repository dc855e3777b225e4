"""A small transformer, split over a mesh of devices, learns a text with clipped gradients.

::

    pip install -e ".[examples]"
    python examples/fsdp_transformer.py --mesh fsdp=4,tensor=2

Read `start` first: that is where the clip goes, and all that is said of sharding. A clip needs
nothing of its own there: under `jit` it gives on any mesh what it gives on one device.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what JAX's processes say to one another

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_report
from clip_options import UsageError, exit_code, explained, with_clip
from flax import nnx
from fsdp_options import Options, make_mesh, parse_options
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from run_folder import (
    Interruption,
    Row,
    RunFolder,
    json_ready,
    keep_result,
    words_aside,
)
from text_model import Batch, Text, Transformer, held_out_batches, load_text, training_batch
from tqdm import tqdm

import optclip

SPIKE = 1000.0  # times the gradient
LOG_EVERY = 20  # steps
LAST = 40  # steps, of which the mean loss is reported
BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}"


class Training(NamedTuple):
    """A fresh state and the two jitted steps.

    Attributes:
        state: Parameters and optimizer state, each leaf split over the mesh.
        train_step: (state, inputs, labels) to (state, readings).
        test_step: (state, inputs, labels) to the mean loss.
        batch_sharding: How inputs and labels are split.
    """

    state: Any
    train_step: Callable
    test_step: Callable
    batch_sharding: NamedSharding


def build_optimizer(options: Options) -> optax.GradientTransformation:
    """The clip and the optimizer, as the options name them."""
    optimizer = {
        "adamw": optax.adamw,
        "momentum": functools.partial(optax.sgd, momentum=0.9),
    }[options.optimizer](options.lr)
    # skip_spikes looks at the loss too; with this, those that do not may be handed it all the same.
    return optax.with_extra_args_support(with_clip(optimizer, options.clip, options.clip_args))


def create(options: Options) -> tuple[Any, Any]:
    """Network and optimizer: what they are, and their state, as a plain tree."""
    sizes = (options.layers, options.width, options.heads, options.context)
    model = Transformer(*sizes, options.dtype, nnx.Rngs(options.seed))
    return nnx.split((model, nnx.Optimizer(model, build_optimizer(options), wrt=nnx.Param)))


def loss_of(model: Transformer, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss of a batch, in nats."""
    logits = model(inputs).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def start(options: Options, mesh: Mesh) -> Training:
    """A fresh state on the mesh, and the jitted steps.

    Raises:
        UsageError: With what the library says is wrong with the clip's arguments.
    """
    with jax.set_mesh(mesh), explained(options.clip):
        graph, shapes = jax.eval_shape(lambda: create(options))

    def train_step(state, inputs, labels):
        model, optimizer = nnx.merge(graph, state)
        number = optimizer.step.get_value() + 1
        spike = is_spike(options, number)
        labels = shuffled_at(spike, options, number, labels)
        loss, grads = nnx.value_and_grad(loss_of)(model, inputs, labels)
        grads = enlarged_at(spike, options, grads)
        optimizer.update(model, grads, loss=loss)
        readings = {"loss": loss, "spike": spike, **optclip.metrics(optimizer.opt_state)}
        return nnx.state((model, optimizer)), readings

    def test_step(state, inputs, labels):
        model, _ = nnx.merge(graph, state)
        return loss_of(model, inputs, labels)

    # The optimizer's state is split as the parameters are, and stays so from step to step.
    of_state = nnx.get_named_sharding(shapes, mesh)
    of_batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: create(options)[1], out_shardings=of_state)()
    return Training(
        state,
        jax.jit(train_step, out_shardings=(of_state, whole), donate_argnums=0),
        jax.jit(test_step, out_shardings=whole),
        of_batch,
    )


# Spikes ------------------------------------------------------------------------------------------


def is_spike(options: Options, number: jax.Array) -> jax.Array:
    """Whether the step of this number, counted from 1, gets a spike."""
    if options.spike_every is None:
        return jnp.zeros([], bool)
    return number % options.spike_every == 0


def shuffled_at(
    spike: jax.Array, options: Options, number: jax.Array, labels: jax.Array
) -> jax.Array:
    """The labels; at a spike of that kind, all of the batch in random order."""
    if options.spike_every is None or options.spike_kind != "labels":
        return labels
    key = jax.random.fold_in(jax.random.key(options.seed), number)
    shuffled = jax.random.permutation(key, labels.reshape(-1)).reshape(labels.shape)
    return jnp.where(spike, shuffled, labels)


def enlarged_at(spike: jax.Array, options: Options, grads: Any) -> Any:
    """The gradient; at a spike of that kind, a thousand times as large."""
    if options.spike_every is None or options.spike_kind != "gradient":
        return grads
    factor = jnp.where(spike, SPIKE, 1.0)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


# Training ----------------------------------------------------------------------------------------


def train(options: Options, text: Text, mesh: Mesh, folder: RunFolder) -> Row:
    """Trains to the end, with a log of every step and now and then a checkpoint.

    Args:
        options: What to run.
        text: What to learn from.
        mesh: The devices.
        folder: Where to keep the run, and where to resume it from.

    Returns:
        The held-out loss, and how fast training was.

    Raises:
        KeyboardInterrupt: Between two steps, if somebody asked to stop.
        UsageError: If an option does not fit.
    """
    training = start(options, mesh)
    state, history = folder.begin(training.state)
    if folder.note:
        say(folder.note)
    done = history[-1]["step"] if history else 0
    seconds: list[float] = []
    # Processes that stop after different steps would wait for one another: there, stop at once.
    signals = () if options.processes > 1 else (signal.SIGINT, signal.SIGTERM)
    silent = None if jax.process_index() == 0 else True  # None: where this is a terminal
    bar = tqdm(total=options.steps, initial=done, desc="step", bar_format=BAR, disable=silent)
    with Interruption(signals) as interruption, bar:
        while done < options.steps:
            stop = next_stop(done, options)
            readings = []
            while done < stop and not interruption.requested:
                done += 1
                began = time.perf_counter()
                batch = training_batch(
                    text, options.batch_size, options.context, options.seed, done
                )
                batch = on_devices(batch, training.batch_sharding)
                state, reading = training.train_step(state, *batch)
                # One step at a time: processes that run ahead of one another may hang.
                readings.append(jax.device_get(reading))
                seconds.append(time.perf_counter() - began)
            rows = folder.append(readings)
            if rows:
                bar.update(len(rows))
                bar.set_postfix_str(run_report.progress(run_report.summary(rows)))
            if interruption.requested:
                raise KeyboardInterrupt
            if done % options.checkpoint_every == 0 or done == options.steps:
                history.append({"step": done, **run_report.summary(rows)})
                folder.save(state, history)
                if bar.disable:  # because this is no terminal
                    say(f"step {done}: {run_report.progress(history[-1])}")
    tokens = options.batch_size * options.context * len(seconds[1:])  # the first one compiles
    return {
        "held_out_loss": json_ready(held_out_loss(training, state, text, options)),
        "tokens_per_second": round(tokens / sum(seconds[1:])) if tokens else None,
    }


def next_stop(done: int, options: Options) -> int:
    """The next step after which to write the log, or a checkpoint."""
    return min(options.steps, *(done // n * n + n for n in (LOG_EVERY, options.checkpoint_every)))


def on_devices(batch: Batch, sharding: NamedSharding) -> Batch:
    """Each device's share of a batch; each process hands over the shares of its own devices."""
    return Batch(*(jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in batch))


def held_out_loss(training: Training, state: Any, text: Text, options: Options) -> float:
    """The mean loss over the held-out text."""
    losses = []
    for batch in held_out_batches(text, options.batch_size, options.context):
        batch = on_devices(batch, training.batch_sharding)
        losses.append(jax.device_get(training.test_step(state, *batch)))
    return float(np.mean(losses))


# What a person sees ------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints, if this is the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def report(folder: RunFolder, settings: Row, outcome: Row) -> Row:
    """Draws the picture and says, in the last line, what the clip did; the result, JSON-ready."""
    rows = folder.rows()
    sizes = f"{settings['layers']} layers of width {settings['width']}, {settings['dtype']}"
    setup = f"{sizes}; {run_report.optimizer_shown(settings)}"
    loss = run_report.show(outcome["held_out_loss"], ".2f", run_report.NOT_FINITE)
    run_report.draw(folder.picture, rows, f"held-out loss {loss}", setup)
    print(f"{setup}\nlog, checkpoints, picture and result: {folder.path}")
    print(run_report.what_the_clip_did(rows, settings["clip"], settings["optimizer"]))
    return {
        **settings,
        "steps": len(rows),
        "loss": json_ready(run_report.column(rows[-LAST:], "loss").mean()),
        **outcome,
        "clip_rate": rows[-1].get("clip/clip_rate"),
        "skipped_steps": rows[-1].get("skip/skipped_steps", 0),
    }


# The command line --------------------------------------------------------------------------------


def connect(options: Options) -> None:
    """Waits for the other processes, if there are to be some."""
    if options.coordinator is None:
        return
    if options.process_id == 0:
        print(f"Waiting for {options.processes} processes at {options.coordinator}.", flush=True)
    jax.distributed.initialize(options.coordinator, options.processes, options.process_id)


def checked_text(options: Options) -> Text:
    """The text.

    Raises:
        UsageError: If it does not have one batch of windows to hold out.
    """
    text = load_text()
    size, context, last = options.batch_size, options.context, len(text.held_out) - 1
    if last // context < size:
        hint = f"--context {last // size}" if size <= last else f"--batch-size {last // context}"
        raise UsageError(
            f"--batch-size {size} windows of --context {context} are more than the held-out text "
            f"has; give {hint} or less"
        )
    return text


def run(options: Options) -> int:
    """Loads, trains and reports; the answer is the exit code."""
    with words_aside(options.json) as stdout:
        text = checked_text(options)
        connect(options)
        mesh = make_mesh(options)
        say(
            f"Learning Python's help texts: {len(text.train):,} bytes, and "
            f"{len(text.held_out):,} held out, on {mesh.size} device{'s' * (mesh.size > 1)} "
            f"({mesh.devices.flat[0].platform})."
        )
        settings = options.describe()
        out = Path(options.out).expanduser()
        folder = RunFolder(
            out, settings, options.steps, options.resume, options.overwrite, unit="step"
        )
        try:
            outcome = train(options, text, mesh, folder)
        except KeyboardInterrupt:
            hint = folder.way_on("there is no checkpoint", sys.argv)
            print(f"Interrupted: {hint}", file=sys.stderr)
            return 130
        if jax.process_index() == 0:
            places = {"mesh": options.mesh, "devices": mesh.size, "processes": options.processes}
            result = report(folder, settings | places, outcome)
            keep_result(out, result, stdout if options.json else None)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the answer is the exit code."""
    return exit_code("fsdp_transformer.py", lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the run in order
    sys.exit(main())
