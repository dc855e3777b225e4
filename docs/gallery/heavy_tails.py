"""SGD on a quadratic under normal and under heavy-tailed noise, with and without a clip.

python docs/gallery/heavy_tails.py
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, GREEN, ORANGE, RED, legend, stacked, write
from matplotlib.figure import Figure

import optclip

SIZE = 50
RATES = np.array([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
NOISES = ("normal", "Student's t")
# begin clips
CLIPS = {
    "no clip": optax.identity(),
    "clip_by_global_norm(5.0)": optclip.clip_by_global_norm(5.0),
    "clip_by_value(0.5)": optclip.clip_by_value(0.5),
    "robust_clip()": optclip.robust_clip(),
}
# end clips


class Run(NamedTuple):
    """Of one noise and clip, at the learning rate with the lowest loss."""

    rate: float
    losses: np.ndarray
    """By seed and step."""
    norms: np.ndarray
    """Before the clip, in the last 500 steps."""


Results = dict[tuple[str, str], Run]


def compute(steps: int = 2000, seeds: int = 5, names: Iterable[str] = tuple(CLIPS)) -> Results:
    """By noise and named clip: the best of all learning rates."""
    curvatures = jnp.logspace(-1, 1, SIZE)
    keys = jax.random.split(jax.random.key(0), 2)
    normal = jax.random.normal(keys[0], (seeds, steps, SIZE))
    chi_squared = 2 * jax.random.gamma(keys[1], 1.2 / 2, (seeds, steps, SIZE))
    noises = {"normal": normal, "Student's t": normal / jnp.sqrt(chi_squared / 1.2)}

    def run(clip, rate, noise):
        optimizer = optax.chain(optclip.measure_norms(), clip, optax.sgd(rate))

        def step(carry, drawn):
            x, state = carry
            updates, state = optimizer.update(curvatures * x + 0.3 * drawn, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), (0.5 * jnp.sum(curvatures * x**2), state[0].norm)

        x = jnp.ones(SIZE)
        return jax.lax.scan(step, (x, optimizer.init(x)), noise)[1]

    best: Results = {}
    for name in names:
        clip = CLIPS[name]
        by_seed = jax.vmap(lambda rate, noise, of=clip: run(of, rate, noise), (None, 0))
        over_all = jax.jit(jax.vmap(by_seed, (0, None)))
        for noise, drawn in noises.items():
            losses, norms = map(np.array, over_all(RATES, drawn))
            at = np.argmin(np.median(np.median(losses[..., -500:], 2), 1))
            late = norms[at, :, -500:].ravel()
            best[noise, name] = Run(float(RATES[at]), losses[at], late)
    return best


def table(results: Results) -> str:
    """The best learning rate and the loss of the last 500 steps; the norms without a clip."""
    lines = []
    for noise in NOISES:
        lines += [f"{noise + ' noise':26}{'rate':>6}{'loss':>8}{'largest loss':>14}"]
        for (of, name), (rate, losses, _) in results.items():
            if of != noise:
                continue
            late = losses[:, -500:]
            typical = np.median(np.median(late, 1))
            lines.append(f"{name:26}{rate:>6g}{typical:8.3f}{late.max():14.3g}")
        lines.append("")
    lines += [f"{'norms without a clip':26}{'median':>14}{'largest':>14}"]
    for noise in NOISES:
        norms = results[noise, "no clip"].norms
        lines.append(f"{noise + ' noise':26}{np.median(norms):14.2f}{norms.max():14.4g}")
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """The loss under both kinds of noise, median over the seeds."""
    figure, panels = stacked(2)
    colors = dict(zip(CLIPS, (RED, BLUE, GREEN, ORANGE), strict=True))
    for axes, noise in zip(panels, NOISES, strict=True):
        for (of, name), run in results.items():
            if of == noise:
                middle = np.median(run.losses, axis=0)
                steps = np.arange(1, middle.size + 1)
                axes.loglog(steps, middle, color=colors[name], lw=1.4, label=name)
        axes.set(title=f"Loss, {noise} noise", ylim=(5e-3, 300))
    panels[1].set_xlabel("step")
    legend(panels[1])
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
