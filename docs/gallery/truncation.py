"""By how many degrees three clips change the direction of a gradient.

python docs/gallery/truncation.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, GRAY, GREEN, ORANGE, legend, stacked, write
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optclip

CLIPS: dict[str, Callable[[Any], optax.GradientTransformationExtraArgs]] = {
    "clip_by_global_norm": optclip.clip_by_global_norm,
    "clip_by_leaf_norm": optclip.clip_by_leaf_norm,
    "clip_by_value": optclip.clip_by_value,
}
SIZES = (64, 128, 64, 32, 10)
SHARES = (0.5, 0.1, 1e-3)
"""Of the norm that is left, in the table."""


class Results(NamedTuple):
    """What is drawn and what is printed."""

    plane: dict[str, np.ndarray]
    """Of a gradient with two tensors of one entry: the entries, by clip."""
    in_plane: dict[str, float]
    """The angles to it."""
    curves: dict[tuple[str, str], np.ndarray]
    """By time and clip: the share of the norm that is left, and the angle."""
    signs: float
    """The angle between normally distributed entries and their signs."""


# begin angle
def angle(before: Any, after: Any) -> jax.Array:
    """The angle between two trees, in degrees."""
    dot = optax.tree.vdot(before, after)
    cosine = dot / (optax.tree.norm(before) * optax.tree.norm(after))
    return jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1)))


# end angle


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """A network with three hidden layers."""
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"kernel": jax.random.normal(k, (i, o)) * jnp.sqrt(2 / i), "bias": jnp.zeros(o)}
        for k, i, o in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def loss(params: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    """The cross entropy."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    scores = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def compute(steps: int = 300, thresholds: int = 200) -> Results:
    """Clips a gradient in the plane, and one of a network before and after `steps` of Adam."""
    pair = {"x": jnp.array([3.0]), "y": jnp.array([0.8])}

    @jax.jit
    def clipped_pair(pair):
        clipped = {name: clip(1.0).update(pair, None)[0] for name, clip in CLIPS.items()}
        return clipped, {name: angle(pair, of) for name, of in clipped.items()}

    @jax.jit
    def from_signs(key):
        normal = jax.random.normal(key, (100_000,))
        return angle(normal, jnp.sign(normal))

    clipped, angles = clipped_pair(pair)

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.array(images / 16, jnp.float32), jnp.array(labels)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            at = jax.random.randint(key, (64,), 0, len(images))
            grads = jax.grad(loss)(params, images[at], labels[at])
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    def sweep(clip):
        def at(threshold, gradient):
            updates, _ = clip(threshold).update(gradient, None)
            kept = optax.tree.norm(updates) / optax.tree.norm(gradient)
            return kept, angle(gradient, updates)

        @jax.jit
        def over(gradient):
            norm = optax.tree.norm(gradient)
            return jax.vmap(at, (0, None))(norm * jnp.logspace(0.5, -6, thresholds), gradient)

        return over

    fresh = jax.jit(init)(jax.random.key(0))
    gradient_at = jax.jit(jax.grad(loss))
    curves, sweeps = {}, {name: sweep(clip) for name, clip in CLIPS.items()}
    for when, params in (("before training", fresh), ("after training", train(fresh))):
        gradient = gradient_at(params, images[:64], labels[:64])
        for name, swept in sweeps.items():
            curves[when, name] = np.array(swept(gradient))
    plane = {
        name: np.array([of["x"][0], of["y"][0]])
        for name, of in {"gradient": pair, **clipped}.items()
    }
    in_plane = {name: float(angles[name]) for name in CLIPS}
    return Results(plane, in_plane, curves, float(from_signs(jax.random.key(2))))


def table(results: Results) -> str:
    """The angles in the plane, and in the network where so much of the norm is left."""
    lines = [f"{'in the plane':24}{'clipped to':>14}{'degrees':>10}"]
    for name, degrees in results.in_plane.items():
        x, y = results.plane[name]
        lines.append(f"{name:24}{f'({x:.2f}, {y:.2f})':>14}{degrees:10.1f}")
    head = "".join(f"{share:8g}" for share in SHARES)
    for time in ("before training", "after training"):
        lines += ["", f"{time:24}  degrees, with this share of", f"{'':24}{head}  of the norm left"]
        for (when, name), (kept, degrees) in results.curves.items():
            if when == time:
                found = np.interp(-np.log(SHARES), -np.log(kept), degrees)
                lines.append(f"{name:24}" + "".join(f"{x:8.1f}" for x in found))
    lines += ["", f"{'normal entries to signs':24}{results.signs:8.1f}"]
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """The arrows in the plane, and the angle over the share of the norm that is left."""
    figure, (top, bottom) = stacked(2, height=3.4)
    colors = dict(zip(results.plane, (GRAY, BLUE, GREEN, ORANGE), strict=True))
    for name, (x, y) in results.plane.items():
        style = "--" if name == "clip_by_value" else "-"
        top.plot([0, x], [0, y], style, color=colors[name], lw=2.4, label=name)
        top.plot(x, y, "o", ms=8, color=colors[name])
    arc = np.linspace(-0.1, np.pi / 2 + 0.1, 50)
    top.plot(np.cos(arc), np.sin(arc), ":", color=GRAY, lw=1)
    top.plot([1, 1, 0], [0, 1, 1], ":", color=GRAY, lw=1)
    top.set(title="In the plane, threshold 1", aspect="equal", xlim=(0, 3.2), ylim=(0, 1.15))
    top.set_yticks([0, 1])
    legend(top)
    for (when, name), (kept, degrees) in results.curves.items():
        style = "-" if when == "before training" else "--"
        bottom.semilogx(kept, degrees, style, color=colors[name])
    bottom.plot([], [], "-", color=GRAY, label="before training")
    bottom.plot([], [], "--", color=GRAY, label="after training")
    bottom.set(title="In a network: angle in degrees", xlabel="share of the norm left")
    bottom.set(xlim=(1.2, 1e-3))
    bottom.set_xticks([1, 0.1, 0.01, 0.001], ["1", "0.1", "0.01", "0.001"])
    bottom.legend(loc="lower right", bbox_to_anchor=(1, 0.05))
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
