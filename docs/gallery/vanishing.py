"""SGD and normalized gradients on a plateau and at the minimum.

python docs/gallery/vanishing.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, GREEN, ORANGE, PURPLE, RED, stacked, write
from matplotlib.figure import Figure

import optclip

BATCH = 8
STARTS = {"plateau": 12.0, "usual": 0.0}
"""The bias of the last layer."""
VARIANTS = {  # clip, momentum, target, learning rate, whether it falls to 0
    "SGD": (np.inf, 0.0, np.inf, 3.0, 0),
    "SGD, clip at 1": (1.0, 0.0, np.inf, 3.0, 0),
    "SGD, rate 10": (np.inf, 0.0, np.inf, 10.0, 0),
    "SGD, rate 30": (np.inf, 0.0, np.inf, 30.0, 0),
    "normalized": (np.inf, 0.0, 1.0, 0.05, 0),
    "normalized, falling": (np.inf, 0.0, 1.0, 0.05, 1),
    "momentum, normalized": (np.inf, 0.9, 1.0, 0.05, 0),
    "momentum, normalized, falling": (np.inf, 0.9, 1.0, 0.05, 1),
}


class Results(NamedTuple):
    """By variant, start, seed and step."""

    losses: np.ndarray
    norms: np.ndarray


def init(key: jax.Array, bias: Any) -> dict[str, Any]:
    """A network with 8 tanh units."""
    keys = jax.random.split(key)
    return {
        "hidden": jax.random.normal(keys[0], (2, 8)),
        "out": jax.random.normal(keys[1], (8,)) / 2,
        "bias": bias,
    }


def loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The squared error behind a sigmoid."""
    scores = jnp.tanh(x @ params["hidden"]) @ params["out"] + params["bias"]
    targets = jax.nn.sigmoid(3 * jnp.tanh(x[:, 0] - x[:, 1]))
    return jnp.mean((jax.nn.sigmoid(scores) - targets) ** 2)


# begin optimizer
def optimizer_of(
    max_norm: Any, momentum: Any, target: Any, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """A threshold or a target of infinity changes nothing, and so does a momentum of 0."""
    return optax.chain(
        optclip.clip_by_global_norm(max_norm),
        optax.ema(momentum),
        optclip.normalize_by_norm(target),
        optax.sgd(rate),
    )


# end optimizer


def compute(steps: int = 3000, seeds: int = 8) -> Results:
    """Trains every variant from both starts."""

    def run(max_norm, momentum, target, rate, fall, bias, seed):
        optimizer = optimizer_of(
            max_norm, momentum, target, lambda step: rate * (1 - fall * step / steps)
        )
        keys = jax.random.split(jax.random.key(seed))
        params = init(keys[0], bias)

        def step(carry, x):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, x)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (value, state[0].norm)

        batches = jax.random.normal(keys[1], (steps, BATCH, 2))
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    rows = [(*v, b, s) for v in VARIANTS.values() for b in STARTS.values() for s in range(seeds)]
    arguments = [jnp.array(column) for column in zip(*rows, strict=True)]
    found = jax.jit(jax.vmap(run))(*arguments)
    return Results(*(np.array(x).reshape(len(VARIANTS), len(STARTS), seeds, steps) for x in found))


def table(results: Results) -> str:
    """The loss of the last 100 steps, over the seeds; the first norms."""
    late = results.losses[..., -100:].mean(-1)
    first = results.norms[0, :, :, 0]
    lines = []
    for s, start in enumerate(STARTS):
        lines += [f"{start + ' start':30}{'best':>8}{'median':>8}{'worst':>8}"]
        for name, ends in zip(VARIANTS, late[:, s], strict=True):
            shown = (ends.min(), np.median(ends), ends.max())
            lines.append(f"{name:30}" + "".join(f"{x:8.0e}" for x in shown))
        lines.append("")
    lines += [f"{'norm at the first step':30}{'lowest':>8}{'':8}{'highest':>8}"]
    lines += [
        f"{start:30}{of.min():8.0e}{'':8}{of.max():8.0e}"
        for start, of in zip(STARTS, first, strict=True)
    ]
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """The loss from both starts, median over the seeds."""
    figure, panels = stacked(2, height=3.6)
    shown = [name for name in VARIANTS if not name.startswith("SGD,")]
    colors = dict(zip(shown, (RED, ORANGE, BLUE, PURPLE, GREEN), strict=True))
    for s, (axes, start) in enumerate(zip(panels, STARTS, strict=True)):
        for name, losses in zip(VARIANTS, results.losses[:, s], strict=True):
            if name in colors:
                window = np.ones(min(50, losses.shape[-1]))
                smooth = [np.convolve(x, window / window.size, "valid") for x in losses]
                label = name.replace("SGD", "SGD, clipped or not")
                axes.semilogy(np.median(smooth, axis=0), color=colors[name], label=label)
        axes.set(title=f"Loss from the {start} start (median)", ylim=(5e-8, 2))
    panels[1].set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
