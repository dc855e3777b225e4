"""Twelve dense layers without normalization, over learning rates, with and without AGC.

python docs/gallery/agc.py
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import BLUE, GREEN, ORANGE, PURPLE, RED, stacked, write
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optclip

DEPTH, WIDTH, BATCH, HELD_OUT = 12, 32, 64, 400
RATES = np.logspace(-3, 1, 9)
GOOD = 0.6
"""The accuracy that counts as good in the table."""


# begin axis
def axis(path: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which axes a unit spans; the layers of `deep` are stacked in one array."""
    if path.startswith("head"):
        return None  # the paper leaves the last layer unclipped
    if path == "deep/kernel":  # layers, inputs, outputs: a unit spans the inputs
        return (1,)
    return optclip.scopes.fan_in_axes(path, shape) if path == "stem/kernel" else (-1,)


CLIPS = {
    "no clip": optax.identity(),
    "clip_by_global_norm(1.0)": optclip.clip_by_global_norm(1.0),
    "clip_by_global_norm(0.1)": optclip.clip_by_global_norm(0.1),
    "adaptive_grad_clip(0.1)": optclip.adaptive_grad_clip(0.1, axis=axis),
    "adaptive_grad_clip(0.01)": optclip.adaptive_grad_clip(0.01, axis=axis),
}
# end axis

Results = dict[str, np.ndarray]
"""By clip: held-out accuracy by learning rate and seed, NaN where the run diverged."""


def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """A first layer, eleven in one array, and a last layer that starts at zero."""
    first, rest = jax.random.split(key)
    deep = jax.random.normal(rest, (DEPTH - 1, WIDTH, WIDTH)) * np.sqrt(2 / WIDTH)
    return {
        "stem": {
            "kernel": jax.random.normal(first, (64, WIDTH)) * np.sqrt(2 / 64),
            "bias": jnp.zeros(WIDTH),
        },
        "deep": {"kernel": deep, "bias": jnp.zeros((DEPTH - 1, WIDTH))},
        "head": {"kernel": jnp.zeros((WIDTH, 10)), "bias": jnp.zeros(10)},
    }


def scores(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The network."""

    def layer(x, of):
        return jax.nn.relu(x @ of["kernel"] + of["bias"]), None

    x, _ = jax.lax.scan(layer, layer(x, params["stem"])[0], params["deep"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def compute(steps: int = 200, seeds: int = 2, names: Iterable[str] = tuple(CLIPS)) -> Results:
    """Trains on the digits at every learning rate, with the named clips."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.array(images[order] / 16, jnp.float32), jnp.array(labels[order])

    def loss(params, at):
        out = scores(params, images[at])
        return optax.softmax_cross_entropy_with_integer_labels(out, labels[at]).mean()

    def accuracies(rate, seed):
        optimizers = {
            name: optax.chain(CLIPS[name], optax.sgd(rate, momentum=0.9)) for name in names
        }
        params = init(jax.random.key(seed))
        begin = {name: (params, of.init(params)) for name, of in optimizers.items()}

        def step(runs, key):
            at = jax.random.randint(key, (BATCH,), HELD_OUT, len(images))
            together = jax.tree.map(lambda *p: jnp.stack(p), *(p for p, _ in runs.values()))
            grads = jax.vmap(jax.grad(loss), (0, None))(together, at)
            moved = {}
            for n, (name, (params, state)) in enumerate(runs.items()):
                grad = jax.tree.map(lambda g, n=n: g[n], grads)
                updates, state = optimizers[name].update(grad, state, params)
                moved[name] = optax.apply_updates(params, updates), state
            return moved, None

        def accuracy(params):
            out = scores(params, images[:HELD_OUT])
            right = (out.argmax(-1) == labels[:HELD_OUT]).mean()
            return jnp.where(jnp.isfinite(out).all(), right, jnp.nan)

        keys = jax.random.split(jax.random.key(seed + 100), steps)
        runs, _ = jax.lax.scan(step, begin, keys)
        return {name: accuracy(params) for name, (params, _) in runs.items()}

    over_both = jax.vmap(jax.vmap(accuracies, (None, 0)), (0, None))
    found = jax.tree.map(np.array, jax.jit(over_both)(RATES, jnp.arange(seeds)))
    return {name: found[name] for name in names}  # in their order, which jit does not keep


def table(results: Results) -> str:
    """The best learning rate by the lower seed, and where that is good."""
    lines = [f"{'lower of the seeds':26}{'best':>5}{'at rate':>9}{f'rates >= {GOOD}':>16}"]
    for name, found in results.items():
        lower = np.nan_to_num(found.min(1))
        good = RATES[lower >= GOOD]
        span = f"{good[0]:.2g} to {good[-1]:.2g}" if good.size else "none"
        lines.append(f"{name:26}{lower.max():5.2f}{RATES[lower.argmax()]:9.2g}{span:>16}")
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """Accuracy over the learning rate."""
    figure, (axes,) = stacked(1, height=5)
    colors = dict(zip(CLIPS, (RED, BLUE, PURPLE, ORANGE, GREEN), strict=True))
    for name, found in results.items():
        found, color = np.nan_to_num(found), colors[name]
        axes.semilogx(RATES, found.mean(1), "o-", ms=5, color=color, label=name)
        axes.fill_between(RATES, found.min(1), found.max(1), color=color, alpha=0.15, lw=0)
    axes.set(title="Held-out accuracy (diverged: 0)", xlabel="learning rate", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=1)
    return figure


if __name__ == "__main__":
    write(__file__, compute(), table, draw)
