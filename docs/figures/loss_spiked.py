"""Draws the three ways in which a loss spikes, for docs/loss_spiked.md.

    python docs/figures/loss_spiked.py

A small network learns a smooth function; the loss and the norm of the gradient are drawn over their
usual values.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import NullLocator

import optclip

PICTURE = Path(__file__).parents[1] / "images/loss_spiked.png"
STEPS, WIDTH, BATCH = 500, 32, 64
AT = 300
"""The step at which something happens."""
BLUE, GRAY = "#0072B2", "#777777"


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error of a network with one hidden layer."""
    return jnp.mean((jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y) ** 2)


def train(
    rate: optax.ScalarOrSchedule,
    change: Callable[[jax.Array, jax.Array], jax.Array],
    noise: float = 0.1,
) -> dict[str, np.ndarray]:
    """The loss and the norm of every step.

    Args:
        rate: The learning rate of SGD with momentum.
        change: From the step and the targets to the targets that the step is given.
        noise: The standard deviation of the noise in the targets.
    """
    optimizer = optax.chain(optclip.measure_norms(), optax.sgd(rate, momentum=0.9))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (4, WIDTH)) / 2,
        "b1": jnp.zeros(WIDTH),
        "w2": jax.random.normal(keys[1], (WIDTH, 1)) / 6,
    }

    def step(carry, index):
        params, opt_state = carry
        x_key, noise_key = jax.random.split(jax.random.fold_in(keys[2], index))
        x = jax.random.normal(x_key, (BATCH, 4))
        y = jnp.sin(x.sum(1, keepdims=True)) + noise * jax.random.normal(noise_key, (BATCH, 1))
        loss, grads = jax.value_and_grad(loss_fn)(params, x, change(index, y))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        read = {"loss": loss, "norm": optclip.metrics(opt_state)["clip/norm"]}
        return (optax.apply_updates(params, updates), opt_state), read

    start = params, optimizer.init(params)
    _, found = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(STEPS)))()
    return jax.tree.map(np.asarray, found)


def runs() -> dict[str, dict[str, np.ndarray]]:
    """A run for each kind of spike."""
    rising = optax.linear_schedule(0.02, 1.0, 150, transition_begin=AT - 60)

    def wrong(n: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where((n >= AT) & (n < AT + 30), y[::-1], y)

    return {
        "1. One broken batch": train(0.02, lambda n, y: jnp.where(n == AT, 100 * y, y)),
        "2. The learning rate has become too high": train(rising, lambda n, y: y),
        "3. Wrong labels for 30 steps": train(0.02, wrong, noise=0.5),
    }


def draw(path: Path) -> None:
    """Writes the picture."""
    with plt.rc_context({"font.size": 12, "savefig.facecolor": "white"}):
        figure, panels = plt.subplots(3, 1, figsize=(6, 8), layout="constrained")
        ticks = ([1, 100, 10_000], [1, 100, 10_000], [0.5, 1, 2, 5])
        for axes, at, (title, run) in zip(panels, ticks, runs().items(), strict=True):
            for name, color, width in (("norm", GRAY, 1.0), ("loss", BLUE, 1.8)):
                usual = np.median(run[name][AT - 160 : AT - 60])
                shown = np.arange(AT - 60, STEPS - 80)
                axes.plot(shown, run[name][shown] / usual, color=color, lw=width, label=name)
            axes.set(yscale="log", title=title, ylabel="times usual", ylim=(0.2, None))
            if axes.get_ylim()[1] > 1e6:
                axes.set_ylim(top=1e6)
            axes.set_yticks(at, [f"{x:,g}" for x in at])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, loc="upper right")
        panels[-1].set_xlabel("step")
        figure.savefig(path, dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
    print(f"{PICTURE} written")
