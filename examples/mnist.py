"""A small Flax network learns handwritten digits with clipped gradients.

::

    pip install -e ".[examples]"
    python examples/mnist.py

Read `build_optimizer` first: that is where the clip goes. Then either `start_linen` or `start_nnx`,
the same training in the two APIs of Flax; all the rest is shared.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow, where it is installed

import digits_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_report
from clip_options import UsageError, exit_code, explained, with_clip
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mnist_options import Options, data_mesh, parse_options
from run_folder import (
    Interruption,
    Row,
    RunFolder,
    json_ready,
    keep_result,
    words_aside,
)
from tqdm import tqdm

import optclip

FETCH_EVERY = 20  # steps
TEST_BATCH = 1000
BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}"


# The optimizer -----------------------------------------------------------------------------------


def build_optimizer(options: Options) -> optax.GradientTransformation:
    """The clip and the optimizer, as the options name them.

    By default `optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.01))`.
    """
    optimizer = {
        "sgd": optax.sgd,
        "momentum": functools.partial(optax.sgd, momentum=0.9),
        "adam": optax.adam,
    }[options.optimizer](options.lr)
    return with_clip(optimizer, options.clip, options.clip_args)


# What both APIs share: the loss and the readings -------------------------------------------------


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 patch; on a CPU its gradient is far faster than Flax's own."""
    count, height, width, channels = x.shape
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max((2, 4))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss of a batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def readings(
    loss: jax.Array, logits: jax.Array, labels: jax.Array, opt_state: Any
) -> dict[str, jax.Array]:
    """What is logged of a step: loss, accuracy, and what the clip did."""
    accuracy = (logits.argmax(-1) == labels).mean()
    return {"loss": loss, "accuracy": accuracy, **optclip.metrics(opt_state)}


# Flax linen --------------------------------------------------------------------------------------


class LinenNetwork(linen.Module):
    """The classic small convolutional network, in linen."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits of each image's ten classes."""
        x = max_pool(linen.relu(linen.Conv(32, (3, 3), name="conv1")(images)))
        x = max_pool(linen.relu(linen.Conv(64, (3, 3), name="conv2")(x)))
        x = x.reshape(len(x), -1)
        x = linen.relu(linen.Dense(128, name="dense1")(x))
        return linen.Dense(10, name="dense2")(x)


def start_linen(
    tx: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int
) -> tuple[Any, Callable, Callable]:
    """A fresh state, a training step and a test step, with linen's `TrainState`."""
    model = LinenNetwork()
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state, images, labels):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, images)
            return cross_entropy(logits, labels), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads)
        return state, readings(loss, logits, labels, state.opt_state)

    @jax.jit
    def test_step(state, images, labels):
        logits = state.apply_fn({"params": state.params}, images)
        return cross_entropy(logits, labels), (logits.argmax(-1) == labels).mean()

    return state, train_step, test_step


# Flax nnx ----------------------------------------------------------------------------------------


class NnxNetwork(nnx.Module):
    """The classic small convolutional network, in nnx."""

    def __init__(self, image_shape: tuple[int, ...], rngs: nnx.Rngs):
        height, width, channels = image_shape
        self.conv1 = nnx.Conv(channels, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(height // 4 * (width // 4) * 64, 128, rngs=rngs)
        self.dense2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits of each image's ten classes."""
        x = max_pool(nnx.relu(self.conv1(images)))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = x.reshape(len(x), -1)
        x = nnx.relu(self.dense1(x))
        return self.dense2(x)


def start_nnx(
    tx: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int
) -> tuple[Any, Callable, Callable]:
    """A fresh state, a training step and a test step, with nnx's `Optimizer`."""
    model = NnxNetwork(image_shape, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))  # so that the state is a plain tree, as in linen

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state, images, labels):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            logits = model(images)
            return cross_entropy(logits, labels), logits

        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        state = nnx.state((model, optimizer))
        return state, readings(loss, logits, labels, optimizer.opt_state)

    @jax.jit
    def test_step(state, images, labels):
        model, _ = nnx.merge(graph, state)
        logits = model(images)
        return cross_entropy(logits, labels), (logits.argmax(-1) == labels).mean()

    return state, train_step, test_step


# Training, whichever API -------------------------------------------------------------------------


def train(options: Options, data: digits_data.Dataset, mesh: Mesh, folder: RunFolder) -> list[Row]:
    """Trains to the end, with a log of every step and a checkpoint per epoch.

    Args:
        options: What to run.
        data: What to learn from.
        mesh: The devices, along one axis called "data".
        folder: Where to keep the run, and where to resume it from.

    Returns:
        A row per epoch, those before a resume included.

    Raises:
        KeyboardInterrupt: Between two steps, if somebody asked to stop.
    """
    start = {"linen": start_linen, "nnx": start_nnx}[options.api]
    image_shape = data.train.images.shape[1:]
    tx = checked_optimizer(options, image_shape)
    state, train_step, test_step = start(tx, image_shape, options.seed)

    # Every device holds the whole state and takes its share of each batch; jit does the rest.
    whole = NamedSharding(mesh, PartitionSpec())
    share = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(state, whole)
    test_set = jax.device_put(digits_data.slices(data.test, TEST_BATCH), whole)

    state, epochs = folder.begin(state)
    if folder.note:
        print(folder.note)
    with Interruption() as interruption:
        for epoch in range(len(epochs) + 1, options.epochs + 1):
            started = time.perf_counter()
            rows: list[Row] = []
            count, batch_size = len(data.train.labels), options.batch_size
            batches = digits_data.shuffled_batches(count, batch_size, options.seed, epoch)
            title = f"epoch {epoch}/{options.epochs}"
            with tqdm(total=len(batches), desc=title, bar_format=BAR, disable=None) as bar:
                for first in range(0, len(batches), FETCH_EVERY):
                    some = batches[first : first + FETCH_EVERY]
                    state, readings = take_steps(
                        train_step, state, data.train, some, share, interruption
                    )
                    new = folder.append(readings, epoch=epoch)
                    rows += new
                    bar.update(len(new))
                    bar.set_postfix_str(run_report.progress(run_report.summary(new)))
                    if interruption.requested:
                        raise KeyboardInterrupt
                test_loss, test_accuracy = evaluate(test_step, state, test_set)
                epochs.append(
                    {
                        **run_report.summary(rows),
                        "test_loss": json_ready(test_loss),
                        "test_accuracy": test_accuracy,
                        "seconds": time.perf_counter() - started,
                    }
                )
                bar.set_postfix_str(run_report.progress(epochs[-1]))
                if bar.disable:  # because this is no terminal
                    print(f"{title}: {run_report.progress(epochs[-1])}", flush=True)
            folder.save(state, epochs)
    return epochs


def take_steps(
    train_step: Callable,
    state: Any,
    split: digits_data.Split,
    batches: np.ndarray,
    sharding: NamedSharding,
    interruption: Interruption,
) -> tuple[Any, list[Row]]:
    """One step per batch, fewer if somebody asks to stop; the state and what was read of each."""
    waiting = []
    for batch in batches:
        images, labels = jax.device_put((split.images[batch], split.labels[batch]), sharding)
        state, reading = train_step(state, images, labels)
        waiting.append(reading)
        if interruption.requested:
            break
    return state, jax.device_get(waiting)  # only here is the device waited for


def evaluate(
    test_step: Callable, state: Any, test_set: list[digits_data.Split]
) -> tuple[float, float]:
    """The mean loss and accuracy over all batches."""
    sizes = [len(batch.labels) for batch in test_set]
    results = jax.device_get([test_step(state, *batch) for batch in test_set])
    loss, accuracy = np.average(np.array(results, np.float64), axis=0, weights=sizes)
    return float(loss), float(accuracy)


def checked_optimizer(
    options: Options, image_shape: tuple[int, ...]
) -> optax.GradientTransformation:
    """The optimizer, tried out on the shapes of the network's parameters.

    Raises:
        UsageError: With what the library says is wrong with the clip's arguments.
    """
    with explained(options.clip):
        tx = build_optimizer(options)
        image = jnp.zeros((1, *image_shape))
        params = jax.eval_shape(LinenNetwork().init, jax.random.key(0), image)["params"]
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)
    return tx


# The command line --------------------------------------------------------------------------------


def load_data(options: Options) -> digits_data.Dataset:
    """The data set asked for, or what stands in for it; says so in one line.

    Raises:
        UsageError: If it can be neither read nor prepared, or has no full batch.
    """
    try:
        data = digits_data.load(options.dataset, options.data_dir)
    except OSError as error:
        raise UsageError(
            f"the data cannot be prepared ({error}); choose another --data-dir"
        ) from None
    count, (height, width, _) = len(data.train.labels), data.train.images.shape[1:]
    what = "MNIST" if data.name == "mnist" else "the real digits of scikit-learn"
    print(
        f"{data.note}Learning {what}: {count:,} training and {len(data.test.labels):,} test "
        f"images of {height}x{width}."
    )
    if options.batch_size > count:
        raise UsageError(
            f"--batch-size {options.batch_size} is more than the {count} training images of "
            f"{data.name}; give --batch-size {count} or less"
        )
    return data


def run(options: Options) -> int:
    """Loads, trains and reports; the answer is the exit code."""
    with words_aside(options.json) as stdout:
        mesh = data_mesh(options.devices)
        data = load_data(options)
        settings = {"dataset": data.name, **options.describe()}
        out = Path(options.out or f"runs/{data.name}").expanduser()
        folder = RunFolder(
            out, settings, options.epochs, options.resume, options.overwrite, options.tensorboard
        )
        try:
            epochs = train(options, data, mesh, folder)
        except KeyboardInterrupt:
            hint = folder.way_on("no epoch was finished", sys.argv)
            print(f"Interrupted: {hint}", file=sys.stderr)
            return 130
        finally:
            folder.close()

        result = run_report.report(folder, epochs, settings | {"devices": options.devices})
        keep_result(out, result, stdout if options.json else None)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the answer is the exit code."""
    return exit_code("mnist.py", lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the run in order
    sys.exit(main())
