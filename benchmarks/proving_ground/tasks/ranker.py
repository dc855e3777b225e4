"""A ranker with rare features, and Adagrad: what Clippy was made for.

A click is predicted from four features, each one of 500 values of which value k is about 1 / k as
frequent (Zipf), by embeddings of width 8 and two dense layers. The truth is a random table for each
feature and one for the pair of the first two. Adagrad's accumulator of a value that never came is
nearly zero, so its first update is large whatever its gradient. The claim that a bound on the
update relative to the parameters helps there, where a clip of the gradient does not: Tang et al.,
"Improving training stability for multitask ranking models in recommender systems", 2023,
arXiv:2302.09178.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.proving_ground import conditions
from benchmarks.proving_ground.task import Feed, Setting, Task

FEATURES, VALUES, EMBEDDING, HIDDEN, BATCH = 4, 500, 8, 32, 64
STEPS, HELD_OUT = 800, 1024
TRUTH_SEED, HELD_OUT_SEED = 7, 12345


def _clicks(random: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    truth = np.random.default_rng(TRUTH_SEED)
    tables = truth.standard_normal((FEATURES, VALUES))
    pairs = truth.standard_normal((20, 20))
    frequency = 1 / np.arange(1, VALUES + 1)
    frequency /= frequency.sum()
    values = random.choice(VALUES, size=(*shape, FEATURES), p=frequency)
    score = 2 * sum(tables[i][values[..., i]] for i in range(FEATURES))
    score = score + 4 * pairs[values[..., 0] % 20, values[..., 1] % 20]
    clicked = random.random(shape) < 1 / (1 + np.exp(-score))
    return {"values": values.astype(np.int32), "clicked": clicked.astype(np.float32)}


def feed(steps: int, seeds: tuple[int, ...]) -> Feed:
    """Fresh clicks at every step."""
    drawn = [_clicks(np.random.default_rng(seed), (steps, BATCH)) for seed in seeds]
    batches = {name: np.stack([x[name] for x in drawn], axis=1) for name in drawn[0]}
    return conditions.plain(batches, steps)


def init(seed: int) -> dict[str, Any]:
    """Embeddings of size 0.1, dense kernels with variance 2 / inputs."""
    embed, first, last = jax.random.split(jax.random.key(seed), 3)
    inputs = FEATURES * EMBEDDING
    return {
        "embeddings": 0.1 * jax.random.normal(embed, (FEATURES, VALUES, EMBEDDING)),
        "first": {
            "kernel": jax.random.normal(first, (inputs, HIDDEN)) * np.sqrt(2 / inputs),
            "bias": jnp.zeros(HIDDEN),
        },
        "last": {
            "kernel": jax.random.normal(last, (HIDDEN,)) * np.sqrt(2 / HIDDEN),
            "bias": jnp.zeros(()),
        },
    }


def loss(params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy in nats."""
    found = params["embeddings"][jnp.arange(FEATURES), batch["values"]]
    x = found.reshape(*found.shape[:-2], -1)
    x = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["last"]["kernel"] + params["last"]["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, batch["clicked"]).mean()


def objective(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch, to learn from and to record."""
    value = loss(params, batch)
    return value, value


def held_out(params: Any) -> jax.Array:
    """The loss on clicks of no seed."""
    return loss(params, _clicks(np.random.default_rng(HELD_OUT_SEED), (HELD_OUT,)))


TASK = Task(
    name="ranker",
    steps=STEPS,
    rate=1.0,
    threshold=0.1,
    init=init,
    objective=objective,
    optimizer=lambda rate: optax.adagrad(rate),
    settings=(Setting("rare features", feed),),
    held_out=held_out,
    seconds=1.2,
)
