"""What several figures train: a network with one hidden layer, on data that is made up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip

INPUTS, WIDTH, CLASSES, BATCH = 4, 32, 10, 32

Batch = tuple[jax.Array, jax.Array]


def regression(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean squared error."""
    return jnp.mean((outputs[:, 0] - targets) ** 2)


def noisy_sine(key: jax.Array) -> Batch:
    """Inputs and targets of a regression."""
    of_x, of_noise = jax.random.split(key)
    x = jax.random.normal(of_x, (BATCH, INPUTS))
    return x, jnp.sin(x.sum(1)) + 0.1 * jax.random.normal(of_noise, (BATCH,))


def classification(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def noisy_classes(key: jax.Array) -> Batch:
    """Inputs and labels, a tenth of them random."""
    of_x, of_place, of_label = jax.random.split(key, 3)
    x = jax.random.normal(of_x, (BATCH, INPUTS))
    labels = jnp.argmax(x @ jax.random.normal(jax.random.key(1), (INPUTS, CLASSES)), -1)
    random = jax.random.randint(of_label, (BATCH,), 0, CLASSES)
    return x, jnp.where(jax.random.uniform(of_place, (BATCH,)) < 0.1, random, labels)


def train(
    loss_of: Callable[[jax.Array, jax.Array], jax.Array],
    batch_of: Callable[[jax.Array], Batch],
    clip: optax.GradientTransformation,
    rate: optax.ScalarOrSchedule = 0.02,
    change: Callable[[jax.Array, jax.Array], jax.Array] = lambda step, targets: targets,
    steps: int = 500,
) -> dict[str, np.ndarray]:
    """The loss and the metrics of every step.

    Args:
        loss_of: From outputs and targets.
        batch_of: From a key.
        clip: Before the optimizer.
        rate: The learning rate of SGD with momentum.
        change: From the step and the targets to the targets that the step is given.
        steps: How many.
    """
    optimizer = optax.chain(clip, optax.sgd(rate, momentum=0.9))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (INPUTS, WIDTH)) / 2,
        "b1": jnp.zeros(WIDTH),
        "w2": jax.random.normal(keys[1], (WIDTH, CLASSES)) / 6,
    }

    def step(carry, index):
        params, opt_state = carry
        x, targets = batch_of(jax.random.fold_in(keys[2], index))

        def loss_fn(params):
            outputs = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]
            return loss_of(outputs, change(index, targets))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), {"loss": loss, **optclip.metrics(opt_state)}

    start = params, optimizer.init(params)
    _, found = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps)))()
    return jax.tree.map(np.asarray, found)
