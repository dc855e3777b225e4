"""A recurrent network whose gradient explodes: the adding problem.

A vanilla tanh network with 32 units reads 16 pairs of a number in [0, 1] and a mark; two of the
numbers are marked, and their sum is asked for at the end. The recurrent matrix starts with a
spectral radius of 1.4. Plain SGD; the loss is the squared error, of which 1/6 is left to one who
always answers 1. The claim that a clip of the norm is what makes such a network trainable: Pascanu,
Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
arXiv:1211.5063. The problem: Hochreiter and Schmidhuber, "Long short-term memory", 1997.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.proving_ground import conditions
from benchmarks.proving_ground.task import Feed, Setting, Task

LENGTH, UNITS, BATCH, RADIUS = 16, 32, 16, 1.4
STEPS, HELD_OUT = 1500, 256


def _sequences(random: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Numbers, which two are marked (one in each half), and their sum less its mean."""
    numbers = random.random((*shape, LENGTH))
    places = np.stack(
        [
            random.integers(LENGTH // 2, size=shape),
            LENGTH // 2 + random.integers(LENGTH - LENGTH // 2, size=shape),
        ],
        axis=-1,
    )
    marks = np.zeros(numbers.shape)
    np.put_along_axis(marks, places, 1.0, axis=-1)
    total = np.take_along_axis(numbers, places, axis=-1).sum(-1) - 1.0
    return {
        "inputs": np.stack([numbers - 0.5, marks], axis=-1).astype(np.float32),
        "answers": total.astype(np.float32),
    }


def feed(steps: int, seeds: tuple[int, ...]) -> Feed:
    """Fresh sequences at every step."""
    drawn = [_sequences(np.random.default_rng(seed), (steps, BATCH)) for seed in seeds]
    batches = {name: np.stack([x[name] for x in drawn], axis=1) for name in drawn[0]}
    return conditions.plain(batches, steps)


def init(seed: int) -> dict[str, jax.Array]:
    """A recurrent matrix whose largest eigenvalue has the modulus RADIUS."""
    random = np.random.default_rng(seed)
    recurrent = random.standard_normal((UNITS, UNITS))
    recurrent *= RADIUS / np.abs(np.linalg.eigvals(recurrent)).max()
    return {
        "input": jnp.asarray(random.standard_normal((2, UNITS)) / np.sqrt(2), jnp.float32),
        "recurrent": jnp.asarray(recurrent, jnp.float32),
        "bias": jnp.zeros(UNITS),
        "output": jnp.asarray(random.standard_normal(UNITS) / np.sqrt(UNITS), jnp.float32),
        "level": jnp.zeros(()),
    }


def loss(params: Any, batch: Any) -> jax.Array:
    """The mean squared error."""
    given = batch["inputs"] @ params["input"] + params["bias"]

    def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x + state @ params["recurrent"]), None

    state, _ = jax.lax.scan(step, jnp.zeros_like(given[:, 0]), given.swapaxes(0, 1))
    answers = state @ params["output"] + params["level"]
    return jnp.mean((answers - batch["answers"]) ** 2)


def objective(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch, to learn from and to record."""
    value = loss(params, batch)
    return value, value


def held_out(params: Any) -> jax.Array:
    """The loss on sequences of no seed."""
    return loss(params, _sequences(np.random.default_rng(12345), (HELD_OUT,)))


TASK = Task(
    name="recurrent",
    steps=STEPS,
    rate=0.03,
    threshold=1.0,
    init=init,
    objective=objective,
    optimizer=lambda rate: optax.sgd(rate),
    settings=(Setting("adding", feed),),
    held_out=held_out,
    seconds=3.0,
)
