"""What it costs to clip the gradient of every example, against one clip of the mean.

`python -m benchmarks.per_example`. A network of three dense layers, SGD, a batch of 64. The forms
take turns; a time is the median ratio within a round, memory what XLA says of the compiled step.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import optclip

CLIP = optclip.clip_by_global_norm(1.0)
MICRO = 8  # examples
SIZES = (784, 256, 256, 10)

Params = dict[str, jax.Array]
Gradient = Callable[[Params, jax.Array, jax.Array], Params]


def loss_of(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss of one example."""
    for name in ("w0", "w1"):
        x = jax.nn.relu(x @ params[name])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w2"], y)


def clipped(grads: Params) -> Params:
    """A gradient after the clip."""
    updates: Any = CLIP.update(grads, CLIP.init(grads))[0]
    return updates


def mean_gradient(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """The gradient of the mean loss."""
    losses = jax.vmap(loss_of, in_axes=(None, 0, 0))
    return jax.grad(lambda params: losses(params, x, y).mean())(params)


def of_the_mean(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """One clip of the mean gradient."""
    return clipped(mean_gradient(params, x, y))


def by_vmap(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """The mean of the clipped gradients."""
    each = jax.vmap(jax.grad(loss_of), in_axes=(None, 0, 0))(params, x, y)
    return jax.tree.map(lambda g: g.mean(0), jax.vmap(clipped)(each))


def by_factors(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """The same from the factors alone, without the clipped gradients."""
    each = jax.vmap(jax.grad(loss_of), in_axes=(None, 0, 0))(params, x, y)
    state: Any = jax.vmap(lambda grads: CLIP.update(grads, CLIP.init(grads))[1])(each)
    return jax.tree.map(lambda g: jnp.tensordot(state.factor, g, 1) / len(x), each)


def by_optax(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """The same by `optax.per_example_global_norm_clip`."""
    each = jax.vmap(jax.grad(loss_of), in_axes=(None, 0, 0))(params, x, y)
    total, _ = optax.per_example_global_norm_clip(each, 1.0)
    return jax.tree.map(lambda g: g / len(x), total)


def by_map(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """The same, `MICRO` examples at a time by `lax.map`, which keeps all that it clipped."""
    one = lambda xy: clipped(jax.grad(loss_of)(params, *xy))  # noqa: E731
    return jax.tree.map(lambda g: g.mean(0), jax.lax.map(one, (x, y), batch_size=MICRO))


def by_scan(params: Params, x: jax.Array, y: jax.Array) -> Params:
    """The same, `MICRO` examples at a time by `lax.scan`, which keeps their sum."""

    def add(total: Params, xy: Any) -> tuple[Params, None]:
        part = by_vmap(params, *xy)
        return jax.tree.map(lambda t, g: t + g * (MICRO / len(x)), total, part), None

    micro = jax.tree.map(lambda v: v.reshape(-1, MICRO, *v.shape[1:]), (x, y))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro)[0]


FORMS: dict[str, Gradient] = {
    "no clip": mean_gradient,
    "one clip of the mean": of_the_mean,
    "vmap": by_vmap,
    "vmap, factors alone": by_factors,
    "Optax's": by_optax,
    f"lax.map, {MICRO} at a time": by_map,
    f"lax.scan, {MICRO} at a time": by_scan,
}


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; the answer is the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.per_example", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="default: 31")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args(arguments)
    keys = jax.random.split(jax.random.key(0), len(SIZES) + 1)
    shapes = list(itertools.pairwise(SIZES))
    params = {
        f"w{i}": jax.random.normal(keys[i], shape) * shape[0] ** -0.5
        for i, shape in enumerate(shapes)
    }
    x, y = jax.random.normal(keys[-2], (64, SIZES[0])), jnp.arange(64) % SIZES[-1]

    def step(gradient: Gradient) -> Any:
        def sgd(params: Params, x: jax.Array, y: jax.Array) -> Params:
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient(params, x, y))

        return jax.jit(sgd).lower(params, x, y).compile()

    steps = {name: step(gradient) for name, gradient in FORMS.items()}
    right = steps["vmap"](params, x, y)
    for name in list(FORMS)[3:]:
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(same, steps[name](params, x, y), right)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for counts in tqdm([False] * 2 + [True] * options.rounds, disable=None):
        for name, compiled in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, x, y))
            if counts:
                seconds[name].append(time.perf_counter() - began)
    size = sum(leaf.nbytes for leaf in params.values())
    figures = {}
    for name, compiled in steps.items():
        ratio = np.divide(seconds[name], seconds["one clip of the mean"])
        figures[name] = {
            "ms": 1e3 * float(np.median(seconds[name])),
            "ratio": float(np.median(ratio)),
            "temporary": compiled.memory_analysis().temp_size_in_bytes / size,
        }
    table = Table(title=f"{size // 4:,} parameters, batch 64, {jax.devices()[0].platform}")
    for heading in ("gradient", "ms", "of one clip", "temporary memory, in parameters"):
        table.add_column(heading, justify="left" if heading == "gradient" else "right")
    for name, row in figures.items():
        table.add_row(name, f"{row['ms']:.2f}", f"{row['ratio']:.1f}", f"{row['temporary']:.1f}")
    Console().print(table)
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
