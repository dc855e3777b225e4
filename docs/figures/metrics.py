"""Draws three runs as their metrics show them, for docs/metrics.md.

    python docs/figures/metrics.py

A small network learns a smooth function from noisy samples. In every hundredth batch the targets
are multiplied by 100. The same run is clipped well, at every step, and never.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes

import optclip

PICTURE = Path(__file__).parents[1] / "images/metrics_three_runs.png"
STEPS, WIDTH, BATCH = 400, 32, 64
SPIKE_EVERY = 100
GRAY, BLUE, RED = "#9aa5b1", "#0072B2", "#D55E00"

RUNS = {
    "Healthy: robust_clip()": optclip.robust_clip(),
    "Clipped at every step: threshold 0.01": optclip.clip_by_global_norm(0.01),
    "Never clipped: threshold 1000": optclip.clip_by_global_norm(1000.0),
}


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error of a network with one hidden layer."""
    return jnp.mean((jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y) ** 2)


def train(clip: optax.GradientTransformation) -> dict[str, np.ndarray]:
    """The loss and the metrics of every step.

    Args:
        clip: What stands before SGD with momentum.
    """
    optimizer = optax.chain(clip, optax.sgd(0.02, momentum=0.9))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (4, WIDTH)) / 2,
        "b1": jnp.zeros(WIDTH),
        "w2": jax.random.normal(keys[1], (WIDTH, 1)) / 6,
    }

    def step(carry: Any, index: jax.Array) -> Any:
        params, opt_state = carry
        x_key, noise_key = jax.random.split(jax.random.fold_in(keys[2], index))
        x = jax.random.normal(x_key, (BATCH, 4))
        y = jnp.sin(x.sum(1, keepdims=True)) + 0.1 * jax.random.normal(noise_key, (BATCH, 1))
        y = jnp.where((index + 1) % SPIKE_EVERY == 0, 100 * y, y)
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), {"loss": loss, **optclip.metrics(opt_state)}

    run = functools.partial(jax.lax.scan, step)
    _, readings = jax.jit(run)((params, optimizer.init(params)), jnp.arange(STEPS))
    return {name: np.asarray(values) for name, values in readings.items()}


def panel(axes: Axes, title: str, readings: dict[str, np.ndarray]) -> None:
    """Norm before and after the clip, and the threshold."""
    share = readings["clip/clip_rate"][-1]
    axes.plot(readings["clip/norm"], color=GRAY, lw=1.2, label="norm")
    axes.plot(readings["clip/clipped_norm"], color=BLUE, lw=1.2, label="clipped_norm")
    axes.plot(readings["clip/threshold"], color=RED, lw=2, label="threshold")
    axes.set(
        yscale="log",
        ylim=(3e-3, 5e3),
        yticks=(0.01, 1, 100),
        xlim=(0, STEPS),
        xticks=range(0, 401, 100),
    )
    axes.tick_params(labelsize=12)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\nclip_rate {100 * share:.3g}%", loc="left", size=13)


def main() -> None:
    """Trains, draws, and prints what the page says of the runs."""
    figure, panels = plt.subplots(
        len(RUNS),
        1,
        figsize=(6, 7.5),
        dpi=150,
        sharex=True,
        layout="constrained",
        facecolor="white",
    )
    for axes, (title, clip) in zip(panels, RUNS.items(), strict=True):
        readings = train(clip)
        panel(axes, title, readings)
        loss = np.median(readings["loss"][-40:-1])
        after = readings["loss"][300:320].max()
        print(f"{title}: median loss {loss:.3g}, largest after a spike {after:.3g}")
    panels[-1].set_xlabel("step", size=13)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=13)
    figure.savefig(PICTURE)
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
