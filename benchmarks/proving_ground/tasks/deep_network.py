"""A deep network without normalization on handwritten digits, at four sizes of the batch.

Ten dense layers of 32 units with ReLU and residual branches, no norm anywhere, on the 1,797 digits
in scikit-learn: the first 1,500 to learn from, the last 297, by other writers, held out. Images to
learn from come with fresh noise, so that none is learned by heart. Momentum; equally many epochs at
every size of the batch, so the largest makes the fewest steps. The claim that a bound relative to
the weights lets such networks train with large batches: Brock et al., "High-performance large-scale
image recognition without normalization", 2021, arXiv:2102.06171.

With a batch of 64 the loss also comes in other units, multiplied by 1e-5 and by 20. AutoClip
(arXiv:2007.14469) claims that one setting does for all. What is compared: "x20" divides the
learning rate by 20 as well, so that without a clip every run is the run in plain units again, and
what changes is what the clip added, a scale. "x20, same rate" leaves the rate: whoever changes the
units tells the optimizer nothing. Both are judged by what the rate and the threshold that were best
in plain units give there ("transferred").
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.proving_ground import conditions
from benchmarks.proving_ground.task import Feed, Setting, Task

LAYERS, WIDTH, PIXELS, CLASSES, TRAIN = 10, 32, 64, 10, 1500
EPOCHS, NOISE, NOISES = 40, 0.5, 4096
UNITS = {"1e-5": 1e-5, "20": 20.0}


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images as vectors with entries in [0, 1], and their labels."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


@functools.cache
def noises() -> np.ndarray:
    """Noise for images; which one an image gets is drawn anew at every step."""
    drawn = np.random.default_rng(0).standard_normal((NOISES, PIXELS))
    return (NOISE * drawn).astype(np.float32)


def _feed(steps: int, seeds: tuple[int, ...], size: int) -> Feed:
    """Which images are in each batch, every one once before any comes again, and their noise."""

    def images(random: np.random.Generator) -> np.ndarray:
        epochs = -(-steps * size // TRAIN)
        order = np.concatenate([random.permutation(TRAIN) for _ in range(epochs)])
        return order[: steps * size].reshape(steps, size)

    randoms = [np.random.default_rng(seed) for seed in seeds]
    chosen = np.stack([images(random) for random in randoms], axis=1)
    noise = np.stack([random.integers(NOISES, size=(steps, size)) for random in randoms], axis=1)
    batches = {"images": chosen.astype(np.int32), "noise": noise.astype(np.int32)}
    return conditions.plain(batches, steps)


def init(seed: int) -> dict[str, Any]:
    """Kernels with variance 2 / inputs, those of a branch less by the number of branches."""
    keys = iter(jax.random.split(jax.random.key(seed), LAYERS))

    def dense(inputs: int, outputs: int, gain: float) -> dict[str, jax.Array]:
        kernel = jax.random.normal(next(keys), (inputs, outputs)) * jnp.sqrt(2 / inputs)
        return {"kernel": gain * kernel, "bias": jnp.zeros(outputs)}

    return {
        "first": dense(PIXELS, WIDTH, 1.0),
        "branches": [dense(WIDTH, WIDTH, (LAYERS - 2) ** -0.5) for _ in range(LAYERS - 2)],
        "last": dense(WIDTH, CLASSES, 1.0),
    }


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def loss(params: Any, images: Any, labels: Any) -> jax.Array:
    """The mean cross-entropy in nats."""
    x = jax.nn.relu(_dense(params["first"], images))
    for branch in params["branches"]:
        x = x + jax.nn.relu(_dense(branch, x))
    logits = _dense(params["last"], x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def objective(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch, to learn from and to record."""
    images, labels = (jnp.asarray(x)[batch["images"]] for x in digits())
    value = loss(params, images + jnp.asarray(noises())[batch["noise"]], labels)
    return value, value


def held_out(params: Any) -> jax.Array:
    """The loss on the digits of other writers."""
    images, labels = digits()
    return loss(params, images[TRAIN:], labels[TRAIN:])


def _settings(size: int) -> tuple[Setting, ...]:
    def plain(steps: int, seeds: tuple[int, ...]) -> Feed:
        return _feed(steps, seeds, size)

    def in_units(factor: float) -> Any:
        return lambda steps, seeds: conditions.in_other_units(plain(steps, seeds), factor)

    clean = Setting("clean", plain)
    if size != 64:
        return (clean,)
    others = [
        Setting(f"x{name}{note}", in_units(factor), "clean", rate_factor=rate)
        for name, factor in UNITS.items()
        for note, rate in (("", 1 / factor), (", same rate", 1.0))
    ]
    return (clean, *others)


def _task(size: int, rate: float, threshold: float) -> Task:
    return Task(
        name=f"deep network, batch {size}",
        steps=EPOCHS * TRAIN // size,
        rate=rate,
        threshold=threshold,
        init=init,
        objective=objective,
        optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
        family="momentum",
        settings=_settings(size),
        held_out=held_out,
        seconds=2.5,
    )


TASKS = (
    _task(16, 0.01, 1.0),
    _task(64, 0.01, 1.0),
    _task(256, 0.03, 1.0),
    _task(1024, 0.03, 1.0),
)
