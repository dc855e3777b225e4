"""Draws the three ways in which a loss spikes, for docs/loss_spiked.md.

    python docs/figures/loss_spiked.py

Small networks are trained without a clip. The loss and the norm of the gradient are drawn, each
divided by its usual value.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import NullLocator
from small_network import classification, noisy_classes, noisy_sine, regression, train

import optclip

PICTURE = Path(__file__).parents[1] / "images/loss_spiked.png"
STEPS, AT, WRONG = 420, 300, 30
"""How many steps; when something happens; for how many steps labels are wrong."""
BLUE, GRAY = "#0072B2", "#777777"


def runs() -> dict[str, dict[str, np.ndarray]]:
    """A run for each kind of spike."""
    measure = optclip.measure_norms()
    sine = functools.partial(train, regression, noisy_sine, measure, steps=STEPS)
    rising = optax.linear_schedule(0.02, 1.0, 150, transition_begin=AT - 60)

    def broken(n: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(n == AT, 100 * y, y)

    def wrong(n: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where((n >= AT) & (n < AT + WRONG), y[::-1], y)

    return {
        "1. One broken batch": sine(change=broken),
        "2. The learning rate has become too high": sine(rate=rising),
        "3. Wrong labels for 30 steps": train(
            classification, noisy_classes, measure, change=wrong, steps=STEPS
        ),
    }


def main() -> None:
    """Writes the picture."""
    with plt.rc_context({"font.size": 12, "savefig.facecolor": "white"}):
        figure, panels = plt.subplots(3, 1, figsize=(6, 8), layout="constrained")
        ticks = ([1, 100, 10_000], [1, 100, 10_000], [0.5, 1, 2, 4])
        for axes, at, (title, run) in zip(panels, ticks, runs().items(), strict=True):
            for key, color, width in (("clip/norm", GRAY, 1.0), ("loss", BLUE, 1.8)):
                name, values = key.removeprefix("clip/"), run[key]
                usual = np.median(values[AT - 160 : AT - 60])
                shown = np.arange(AT - 60, STEPS)
                axes.plot(shown, values[shown] / usual, color=color, lw=width, label=name)
            axes.set(yscale="log", title=title, ylabel="times usual", ylim=(0.2, None))
            if axes.get_ylim()[1] > 1e6:
                axes.set_ylim(top=1e6)
            axes.set_yticks(at, [f"{x:,g}" for x in at])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, loc="upper right")
        panels[-1].set_xlabel("step")
        figure.savefig(PICTURE, dpi=150)
        plt.close(figure)
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
