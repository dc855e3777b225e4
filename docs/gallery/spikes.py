"""A small transformer whose gradient is a thousand times too long now and then.

python docs/gallery/spikes.py
"""

from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, legend, stacked, write
from matplotlib.figure import Figure

import optclip

WIDTH, HEADS, CONTEXT, BATCH, RATE = 32, 2, 32, 8, 0.1
EVERY, EARLY, FACTOR = 60, 10, 1000.0
"""The step between spikes, that of the early spike, and by how much a gradient is too long."""
# begin optimizers
sgd = optax.sgd(RATE, momentum=0.9)
OPTIMIZERS = {
    "no clip": optax.chain(optclip.measure_norms(), sgd),
    "clip_by_global_norm(1.0)": optax.chain(optclip.clip_by_global_norm(1.0), sgd),
    "zclip()": optax.chain(optclip.zclip(), sgd),
    "robust_clip()": optax.chain(optclip.robust_clip(), sgd),
    "safeguard(sgd)": optclip.safeguard(sgd),
}
# end optimizers


class Run(NamedTuple):
    """Of one optimizer: by series (clean, spikes, an early spike as well) and step."""

    losses: np.ndarray
    norms: np.ndarray
    thresholds: np.ndarray


Results = dict[str, Run]


def init(key: jax.Array) -> dict[str, jax.Array]:
    """A decoder-only transformer with one block."""
    shapes = {
        "bytes": (256, WIDTH),
        "places": (CONTEXT, WIDTH),
        "attention": (WIDTH, 3 * WIDTH),
        "merge": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "head": (WIDTH, 256),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / np.sqrt(WIDTH if name[-1] == "s" else shape[0])
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def normed(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 along the last axis."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def loss(params: dict[str, jax.Array], text: jax.Array, key: jax.Array) -> jax.Array:
    """The cross entropy of the next byte."""
    starts = jax.random.randint(key, (BATCH,), 0, len(text) - CONTEXT - 1)
    window = text[starts[:, None] + jnp.arange(CONTEXT + 1)]
    x = params["bytes"][window[:, :-1]] + params["places"]
    heads = (normed(x) @ params["attention"]).reshape(BATCH, CONTEXT, 3, HEADS, -1)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(heads, 2, 0), is_causal=True)
    x = x + attended.reshape(x.shape) @ params["merge"]
    x = x + jax.nn.gelu(normed(x) @ params["up"]) @ params["down"]
    scores = normed(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, window[:, 1:]).mean()


def compute(steps: int = 400, names: Iterable[str] = tuple(OPTIMIZERS)) -> Results:
    """Trains with the named optimizers, side by side so that the network is compiled once."""
    source = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    text = jnp.array(np.frombuffer(source, np.uint8).astype(np.int32))
    optimizers = {name: OPTIMIZERS[name] for name in names}

    def train(factors):
        params = init(jax.random.key(0))
        begin = {name: (params, of.init(params)) for name, of in optimizers.items()}

        def step(runs, at):
            key, factor = at
            stacked_ = jax.tree.map(lambda *p: jnp.stack(p), *(p for p, _ in runs.values()))
            losses, grads = jax.vmap(jax.value_and_grad(loss), (0, None, None))(stacked_, text, key)
            moved, seen = {}, {}
            for n, (name, (params, state)) in enumerate(runs.items()):
                grad = jax.tree.map(lambda g, n=n: factor * g[n], grads)
                updates, state = optimizers[name].update(grad, state, params)
                moved[name] = optax.apply_updates(params, updates), state
                readings = optclip.metrics(state)
                seen[name] = Run(losses[n], readings["clip/norm"], readings["clip/threshold"])
            return moved, seen

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, begin, (keys, factors))[1]

    factors = np.ones((3, steps), np.float32)  # clean, spikes, an early spike as well
    factors[1:, np.arange(EVERY, steps, EVERY)] = FACTOR
    factors[2, min(EARLY, steps - 1)] = FACTOR
    found = jax.tree.map(np.array, jax.jit(jax.vmap(train))(factors))
    return {name: found[name] for name in optimizers}  # in their order, which jit does not keep


def table(results: Results) -> str:
    """The loss at the end of the three series, and what the clips did."""
    lines = [f"{'loss, last 40 steps':26}{'clean':>8}{'spikes':>8}{'and at step 10':>16}"]
    for name, run in results.items():
        ends = run.losses[:, -40:].mean(1)
        lines.append(f"{name:26}{ends[0]:8.3f}{ends[1]:8.4g}{ends[2]:16.4g}")
    lines += ["", f"{'':38}threshold"]
    lines += [f"{'with spikes':26}{'clipped':>8}{'at step 60':>14}{'at the end':>12}"]
    for name, run in results.items():
        if name == "no clip":
            continue
        rate = np.mean(run.norms[1] > run.thresholds[1])
        early = run.thresholds[1, :EVERY][-1]
        lines.append(f"{name:26}{rate:8.1%}{early:14.2f}{run.thresholds[1, -1]:12.2f}")
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """The loss with spikes, and the gradient norm against the thresholds."""
    figure, (top, bottom) = stacked(2, height=3.3)
    palette = dict(zip(OPTIMIZERS, (RED, BLUE, ORANGE, GREEN, PURPLE), strict=True))
    for name, run in results.items():
        losses = np.convolve(run.losses[1], np.ones(5) / 5, "valid")
        top.semilogy(losses, color=palette[name], lw=1.5, label=name)
    top.set(title="Training loss with spikes")
    bottom.semilogy(results["robust_clip()"].norms[1], color=GRAY, lw=1)
    for name, run in results.items():
        if name == "no clip":
            continue
        bottom.semilogy(run.thresholds[1], color=palette[name])
    bottom.set(title="Gradient norm (gray) and thresholds", xlabel="step")
    handles, labels = top.get_legend_handles_labels()
    legend(bottom, handles=handles, labels=labels)
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
