"""Draws three runs as their metrics show them, for docs/metrics.md.

    python docs/figures/metrics.py

A small network learns a smooth function from noisy samples. In every hundredth batch the targets
are multiplied by 100. The same run is clipped well, at every step, and never.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from small_network import noisy_sine, regression, train

import optclip

PICTURE = Path(__file__).parents[1] / "images/metrics_three_runs.png"
STEPS, SPIKE_EVERY = 400, 100
GRAY, BLUE, RED = "#9aa5b1", "#0072B2", "#D55E00"

RUNS = {
    "Healthy: robust_clip()": optclip.robust_clip(),
    "Clipped at every step: threshold 0.01": optclip.clip_by_global_norm(0.01),
    "Never clipped: threshold 1000": optclip.clip_by_global_norm(1000.0),
}


def broken(step: jax.Array, targets: jax.Array) -> jax.Array:
    """Every hundredth batch has targets that are 100 times too large."""
    return jnp.where((step + 1) % SPIKE_EVERY == 0, 100 * targets, targets)


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
        readings = train(regression, noisy_sine, clip, change=broken, steps=STEPS)
        panel(axes, title, readings)
        loss = np.median(readings["loss"][-40:-1])
        after = readings["loss"][SPIKE_EVERY : SPIKE_EVERY + 20].max()
        print(f"{title}: median loss {loss:.3g}, largest after a spike {after:.3g}")
    panels[-1].set_xlabel("step", size=13)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=13)
    figure.savefig(PICTURE)
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
