"""How many steps a threshold that is too low costs, with SGD and with Adam.

python docs/gallery/too_low.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, ORANGE, legend, stacked, write
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optclip

BATCH, GOAL = 64, 0.2
THRESHOLDS = np.append(np.logspace(-2.5, 1.5, 17), np.inf)  # the last one: no clip
OPTIMIZERS = {"SGD, 0.1": optax.sgd(0.1), "Adam, 0.001": optax.adam(1e-3)}


class Results(NamedTuple):
    """By optimizer, threshold and step."""

    losses: np.ndarray
    norms: np.ndarray
    clip_rates: np.ndarray


def init(key: jax.Array) -> dict[str, jax.Array]:
    """A network with one hidden layer."""
    keys = jax.random.split(key)
    return {
        "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
        "bias": jnp.zeros(32),
        "out": jax.random.normal(keys[1], (32, 10)) / jnp.sqrt(32),
    }


def compute(steps: int = 4000) -> Results:
    """Trains on the digits with every threshold."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.array(images / 16, jnp.float32), jnp.array(labels)

    def loss(params, key):
        chosen = jax.random.randint(key, (BATCH,), 0, len(images))
        hidden = jax.nn.relu(images[chosen] @ params["hidden"] + params["bias"])
        scores = hidden @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels[chosen]).mean()

    def run(optimizer, threshold):
        optimizer = optax.chain(optclip.clip_by_global_norm(threshold), optimizer)
        params = init(jax.random.key(0))

        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state, params)
            readings = optclip.metrics(state)
            seen = value, readings["clip/norm"], readings["clip/clip_rate"]
            return (optax.apply_updates(params, updates), state), seen

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    found: list[Any] = []
    for optimizer in OPTIMIZERS.values():
        sweep = jax.jit(jax.vmap(lambda threshold, of=optimizer: run(of, threshold)))
        found.append(sweep(THRESHOLDS))
    return Results(*(np.array(column) for column in zip(*found, strict=True)))


def arrivals(losses: np.ndarray) -> np.ndarray:
    """The step at which the mean loss of 25 steps falls below the goal; NaN: it does not."""
    smooth = np.apply_along_axis(np.convolve, -1, losses, np.ones(25) / 25, "valid")
    arrived = smooth < GOAL
    return np.where(arrived.any(-1), arrived.argmax(-1) + 25.0, np.nan)


def table(results: Results) -> str:
    """Steps to the goal and share of steps clipped, for every second threshold."""
    most = results.losses.shape[-1]
    steps, rates = arrivals(results.losses), results.clip_rates[..., -1]
    lines = [f"{'':10}{'SGD, 0.1':>16}{'Adam, 0.001':>18}"]
    lines += [f"{'max_norm':10}{'steps  clipped':>16}{'steps  clipped':>18}"]
    for at in [*range(0, 17, 2), 17]:
        row = f"{THRESHOLDS[at]:<10.3g}"
        for taken, rate in zip(steps[:, at], rates[:, at], strict=True):
            row += f"{f'> {most}' if np.isnan(taken) else int(taken):>8}{rate:>8.0%}  "
        lines.append(row.rstrip())
    lines += ["", f"{'norm without a clip':24}{'median':>8}{'first 100 steps':>18}"]
    for name, norms in zip(OPTIMIZERS, results.norms[:, -1], strict=True):
        lines.append(f"{name:24}{np.median(norms):8.2f}{np.median(norms[:100]):18.2f}")
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """Steps to the goal and share of steps clipped, over the threshold."""
    steps, rates = arrivals(results.losses), results.clip_rates[..., -1]
    figure, (top, bottom) = stacked(2)
    finite = THRESHOLDS[:-1]
    for name, color, taken, rate in zip(OPTIMIZERS, (BLUE, ORANGE), steps, rates, strict=True):
        top.loglog(finite, taken[:-1], "o-", ms=5, color=color, label=name)
        top.axhline(taken[-1], color=color, lw=1.2, ls="--")
        bottom.semilogx(finite, rate[:-1], "o-", ms=5, color=color, label=name)
    top.set(title=f"Steps to a loss of {GOAL} (dashed: no clip)")
    top.set_yticks([500, 1000, 2000, 4000], ["500", "1000", "2000", "4000"])
    top.minorticks_off()
    bottom.set(title="Share of the steps that are clipped", xlabel="max_norm", ylim=(-0.05, 1.05))
    bottom.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    legend(bottom)
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
