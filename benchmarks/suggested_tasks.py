"""Two small tasks from `examples/`, on which suggested thresholds are tried out."""

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

EXAMPLES = str(Path(__file__).parent.parent / "examples")


class Task(NamedTuple):
    """A network and its data.

    Attributes:
        steps: How long a run is.
        init: From the seed to the parameters.
        loss: (parameters, inputs, labels) to the mean loss.
        batch: (seed, step) to (inputs, labels).
        held_out: Batches to be judged by.
    """

    steps: int
    init: Callable[[int], Any]
    loss: Callable[[Any, Any, Any], jax.Array]
    batch: Callable[[int, int], tuple[Any, Any]]
    held_out: list[tuple[Any, Any]]


def digits() -> Task:
    """The convolutional network of `examples/mnist.py`."""
    digits_data, mnist = (importlib.import_module(name) for name in ("digits_data", "mnist"))
    data, network, per_epoch = digits_data.load("digits"), mnist.LinenNetwork(), 46
    like = jnp.zeros((1, *data.train.images.shape[1:]))

    @functools.cache
    def epoch(seed: int, number: int) -> np.ndarray:
        return digits_data.shuffled_batches(len(data.train.labels), 32, seed, number)

    def batch(seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = epoch(seed, step // per_epoch)[step % per_epoch]
        return data.train.images[chosen], data.train.labels[chosen]

    return Task(
        steps=4 * per_epoch,
        init=lambda seed: jax.jit(network.init)(jax.random.key(seed), like)["params"],
        loss=lambda p, x, y: mnist.cross_entropy(network.apply({"params": p}, x), y),
        batch=batch,
        held_out=[(data.test.images, data.test.labels)],
    )


def text() -> Task:
    """The byte transformer of `examples/text_model.py`."""
    text_model, nnx = (importlib.import_module(name) for name in ("text_model", "flax.nnx"))
    words, context = text_model.load_text(), 64
    auto = (jax.sharding.AxisType.Auto,) * 2  # its parameters name the axes of a mesh
    one_device = jax.make_mesh((1, 1), ("fsdp", "tensor"), auto, devices=jax.devices()[:1])

    def model(seed: int) -> Any:
        with jax.set_mesh(one_device):
            return text_model.Transformer(2, 64, 4, context, jnp.float32, nnx.Rngs(seed))

    graph, _, rest = nnx.split(model(0), nnx.Param, ...)

    def loss(params: Any, inputs: Any, labels: Any) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Task(
        steps=200,
        init=lambda seed: nnx.state(model(seed), nnx.Param),
        loss=loss,
        batch=lambda seed, step: tuple(text_model.training_batch(words, 16, context, seed, step)),
        held_out=[tuple(batch) for batch in text_model.held_out_batches(words, 64, context)[:5]],
    )


TASKS = {"digits": digits, "text": text}


def start(name: str) -> Task:
    """A task by its name; its data are read now."""
    if EXAMPLES not in sys.path:
        sys.path.insert(0, EXAMPLES)
    return TASKS[name]()
