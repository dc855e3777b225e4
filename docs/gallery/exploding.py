"""A recurrent network whose gradient explodes or vanishes, with a clip, a floor and neither.

python docs/gallery/exploding.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, legend, stacked, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import optclip

WIDTH, LENGTH, BATCH, RATE = 32, 40, 16, 0.1
RADII = (0.7, 1.0, 1.2, 1.4)
VARIANTS = {  # radius, floor, threshold
    "1.2, no clip": (1.2, 0.0, np.inf),
    "1.2, clip at 1": (1.2, 0.0, 1.0),
    "1.2, clip and floor": (1.2, 0.5, 1.0),
    "0.7, no clip": (0.7, 0.0, np.inf),
    "0.7, clip at 1": (0.7, 0.0, 1.0),
    "0.7, floor": (0.7, 0.5, np.inf),
    "0.7, clip and floor": (0.7, 0.5, 1.0),
}


class Results(NamedTuple):
    """`decay`: by radius and step back; the others by variant, seed and step."""

    decay: np.ndarray
    losses: np.ndarray
    norms: np.ndarray


def init(radius: Any, key: jax.Array) -> dict[str, jax.Array]:
    """The recurrent matrix is orthogonal times the radius."""
    keys = jax.random.split(key, 3)
    return {
        "recurrent": radius * jax.random.orthogonal(keys[0], WIDTH),
        "inputs": 0.1 * jax.random.normal(keys[1], (WIDTH,)),
        "readout": jax.random.normal(keys[2], (WIDTH,)) / jnp.sqrt(WIDTH),
    }


def draw_batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs of noise after a first one whose sign is the target."""
    keys = jax.random.split(key)
    sign = jax.random.rademacher(keys[0], (BATCH,)).astype(float)
    inputs = 0.1 * jax.random.normal(keys[1], (BATCH, LENGTH))
    return inputs.at[:, 0].set(sign), sign


def loss(params: dict[str, jax.Array], key: jax.Array, nudges: Any = 0.0) -> jax.Array:
    """The squared error; `nudges` are added to the state, to differentiate by it."""
    inputs, sign = draw_batch(key)

    def step(state, at):
        entered, nudge = at
        drive = entered[:, None] * params["inputs"]
        return jnp.tanh(state @ params["recurrent"] + drive) + nudge, None

    nudges = jnp.broadcast_to(nudges, (LENGTH, BATCH, WIDTH))
    state, _ = jax.lax.scan(step, jnp.zeros((BATCH, WIDTH)), (inputs.T, nudges))
    return jnp.mean((state @ params["readout"] - sign) ** 2)


def through_time(radius: Any, key: jax.Array) -> jax.Array:
    """The norm of the gradient by the state, over steps back in time; that of the last is 1."""
    nudges = jnp.zeros((LENGTH, BATCH, WIDTH))
    slopes = jax.grad(loss, argnums=2)(init(radius, key), key, nudges)
    norms = jnp.linalg.norm(slopes, axis=(1, 2))
    return norms[::-1] / norms[-1]


# begin floor
def floor(smallest: Any) -> optax.GradientTransformation:
    """Scales a gradient shorter than `smallest` up to it."""

    def lift(updates, params):
        norm = jnp.maximum(optax.tree.norm(updates), 1e-12)
        return jax.tree.map(lambda u: jnp.maximum(1, smallest / norm) * u, updates)

    return optax.stateless(lift)


def optimizer_of(smallest: Any, largest: Any) -> optax.GradientTransformation:
    """A floor of 0 and a threshold of infinity change nothing."""
    clip = optclip.clip_by_global_norm(largest)
    return optax.chain(floor(smallest), clip, optax.sgd(RATE))


# end floor


def compute(steps: int = 600, seeds: int = 4) -> Results:
    """Trains every variant with every seed."""

    def run(radius, smallest, largest, seed):
        optimizer = optimizer_of(smallest, largest)
        params = init(radius, jax.random.key(seed))

        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state, params)
            norm = optclip.metrics(state)["clip/norm"]
            return (optax.apply_updates(params, updates), state), (value, norm)

        keys = jax.random.split(jax.random.key(100 + seed), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    keys = jax.random.split(jax.random.key(0), 16)
    over_both = jax.jit(jax.vmap(jax.vmap(through_time, (None, 0)), (0, None)))
    decay = over_both(np.array(RADII), keys)
    arguments = np.array([(*of, seed) for of in VARIANTS.values() for seed in range(seeds)])
    losses, norms = jax.jit(jax.vmap(run))(*arguments[:, :3].T, arguments[:, 3].astype(int))
    by_variant = (len(VARIANTS), seeds, steps)
    return Results(
        np.median(decay, axis=1),
        np.array(losses).reshape(by_variant),
        np.array(norms).reshape(by_variant),
    )


def table(results: Results) -> str:
    """The gradient through time, and how the variants end."""
    seeds = results.losses.shape[1]
    lines = [f"{'radius':21}gradient {LENGTH - 1} steps back / last"]
    lines += [f"{r:<21} {line[-1]:.1e}" for r, line in zip(RADII, results.decay, strict=True)]
    lines += ["", f"{'':37}loss of last 50 steps"]
    lines += [f"{'radius, variant':21}NaN  largest norm    best    worst"]
    for name, line, norm in zip(VARIANTS, results.losses, results.norms, strict=True):
        ends = line[:, -50:].mean(1)
        lost = f"{np.isnan(ends).sum()}/{seeds}"
        best = np.min(ends, initial=np.inf, where=np.isfinite(ends))
        span = f"{best:8.2g} {ends.max():8.2g}" if np.isfinite(best) else f"{'':8} {'nan':>8}"
        lines.append(f"{name:21}{lost} {np.nanmax(norm):13.2g}{span}")
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """The gradient through time, and the loss from both radii."""
    figure, (top, middle, bottom) = stacked(3, height=3.5)
    for radius, line, color in zip(RADII, results.decay, (PURPLE, GRAY, ORANGE, RED), strict=True):
        top.semilogy(line, color=color, label=f"radius {radius}")
    top.set(title="Gradient by the state / that of the last step", xlabel="steps back in time")
    legend(top)
    runs = dict(zip(VARIANTS, results.losses, strict=True))

    def show(axes: Axes, radius: float, styles: dict[str, str]) -> None:
        for name, color in styles.items():
            for seed, line in enumerate(runs[f"{radius}, {name}"]):
                smooth = np.convolve(np.minimum(line, 1e3), np.ones(10) / 10, "valid")
                label = None if seed else name
                axes.semilogy(smooth, color=color, lw=1.2, alpha=0.8, label=label)
        axes.set(xlabel="step", title=f"Loss from radius {radius}, each seed", ylim=(1e-5, 1e3))
        legend(axes)

    show(middle, 1.2, {"no clip": RED, "clip at 1": BLUE, "clip and floor": GREEN})
    styles = {"no clip": RED, "clip at 1": BLUE, "floor": ORANGE, "clip and floor": GREEN}
    show(bottom, 0.7, styles)
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
