"""A byte transformer on Python's documentation: spikes, bursts, wrong labels, a late start.

One decoder-only network of two layers with norms before each part, with momentum and with AdamW.
The text is that of `examples/text_model.py`. Re-runs the claims of ZClip (arXiv:2504.02507), AdaGC
(arXiv:2502.11034) and SPAM (arXiv:2501.06842) that an adaptive threshold survives spikes better
than a fixed one, with both kinds of spike: of the gradient, and of a batch that is wrong.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.proving_ground import conditions
from benchmarks.proving_ground.task import Feed, Setting, Task
from benchmarks.suggested_tasks import EXAMPLES

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, BYTES = 2, 32, 2, 32, 8, 256
STEPS, HELD_OUT = 300, 64


@functools.cache
def text() -> Any:
    """The text; read when the first run needs it."""
    if EXAMPLES not in sys.path:
        sys.path.insert(0, EXAMPLES)
    return importlib.import_module("text_model").load_text()


# The data ----------------------------------------------------------------------------------------


def feed(steps: int, seeds: tuple[int, ...]) -> Feed:
    """Windows from anywhere in the text: where they start, and where their labels do."""
    end = len(text().train) - CONTEXT - 1
    starts = [np.random.default_rng(seed).integers(end, size=(steps, BATCH)) for seed in seeds]
    inputs = np.stack(starts, axis=1).astype(np.int32)
    return conditions.plain({"inputs": inputs, "labels": inputs}, steps)


def with_wrong_labels(steps: int, seeds: tuple[int, ...]) -> Feed:
    """Ten batches whose labels are those of other windows."""
    clean = feed(steps, seeds)
    labels = clean.batches["labels"].copy()
    for step in conditions.corrupted_at(steps):
        labels[step] = np.roll(labels[step], 1, axis=-1)
    return clean._replace(batches=clean.batches | {"labels": labels})


# The network -------------------------------------------------------------------------------------


def init(seed: int) -> dict[str, Any]:
    """Dense kernels with variance 1 / inputs, as LeCun has them; embeddings as small."""
    keys = iter(jax.random.split(jax.random.key(seed), 3 + 6 * LAYERS))

    def dense(inputs: int, outputs: int) -> jax.Array:
        return jax.random.normal(next(keys), (inputs, outputs)) / jnp.sqrt(inputs)

    def block() -> dict[str, jax.Array]:
        return {
            "norm1": jnp.ones(WIDTH),
            "query": dense(WIDTH, WIDTH),
            "key": dense(WIDTH, WIDTH),
            "value": dense(WIDTH, WIDTH),
            "out": dense(WIDTH, WIDTH),
            "norm2": jnp.ones(WIDTH),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH),
        }

    return {
        "bytes": dense(WIDTH, BYTES).T,
        "positions": dense(WIDTH, CONTEXT).T,
        "blocks": [block() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
        "head": dense(WIDTH, BYTES),
    }


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _attention(block: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def by_head(kernel: jax.Array) -> jax.Array:
        return (x @ kernel).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)

    query, key, value = (by_head(block[name]) for name in ("query", "key", "value"))
    scores = query @ key.swapaxes(2, 3) / np.sqrt(WIDTH // HEADS).astype(x.dtype)
    seen = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(x.dtype).min))
    return (weights @ value).swapaxes(1, 2).reshape(x.shape) @ block["out"]


def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy in nats per byte."""
    # A product with the one-hot bytes: its gradient is a matrix product, and no scatter.
    x = params["bytes"][inputs]
    x = x + params["positions"]
    for block in params["blocks"]:
        x = x + _attention(block, _normed(x, block["norm1"]))
        x = x + jax.nn.gelu(_normed(x, block["norm2"]) @ block["up"]) @ block["down"]
    logits = (_normed(x, params["norm"]) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _windows(of: np.ndarray, starts: jax.Array, offset: int) -> jax.Array:
    return jnp.asarray(of)[starts[:, None] + jnp.arange(CONTEXT) + offset].astype(jnp.int32)


def objective(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch, to learn from and to record."""
    train = text().train
    value = loss(params, _windows(train, batch["inputs"], 0), _windows(train, batch["labels"], 1))
    return value, value


def held_out(params: Any) -> jax.Array:
    """The loss on windows of the held-out text, evenly spaced."""
    other = text().held_out
    starts = jnp.linspace(0, len(other) - CONTEXT - 1, HELD_OUT).astype(jnp.int32)
    return loss(params, _windows(other, starts, 0), _windows(other, starts, 1))


# The tasks ---------------------------------------------------------------------------------------


def _under(change: Any) -> Any:
    return lambda steps, seeds: change(feed(steps, seeds))


SETTINGS = (
    Setting("clean", feed),
    Setting("spikes", _under(conditions.with_spikes), "clean", conditions.spikes_at),
    Setting("bursts", _under(conditions.with_bursts), "clean", conditions.bursts_at),
    Setting("wrong labels", with_wrong_labels, "clean", conditions.corrupted_at),
    Setting("late start", _under(conditions.with_late_start)),
    Setting("bfloat16", feed, "clean", dtype=jnp.bfloat16, best_rate_only=True),
)

MOMENTUM = Task(
    name="transformer, momentum",
    steps=STEPS,
    rate=0.1,
    threshold=1.0,
    init=init,
    objective=objective,
    optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
    settings=SETTINGS,
    family="momentum",
    held_out=held_out,
    seconds=13.0,
    frozen=lambda path: path.startswith(("blocks/0", "bytes", "positions")),
)

ADAMW = MOMENTUM._replace(
    name="transformer, AdamW",
    rate=0.01,
    optimizer=lambda rate: optax.adamw(rate),
    family="AdamW",
)


def _warmed_up(rate: Any) -> Callable[[Any], Any]:
    """A tenth of the run up to the rate, then a cosine down to a tenth of it."""

    def schedule(count: Any) -> jax.Array:
        share = jnp.asarray(count, jnp.float32) / STEPS
        down = 0.55 + 0.45 * jnp.cos(jnp.pi * jnp.clip((share - 0.1) / 0.9, 0, 1))
        return rate * jnp.where(share < 0.1, share / 0.1, down)

    return schedule


SCHEDULED = ADAMW._replace(
    name="transformer, AdamW, scheduled",
    optimizer=lambda rate: optax.adamw(_warmed_up(rate), weight_decay=0.1),
    family="",
)

LION = ADAMW._replace(
    name="transformer, Lion",
    rate=0.003,
    optimizer=lambda rate: optax.lion(rate),
    settings=SETTINGS[:2],
    family="",
)

MUON = ADAMW._replace(
    name="transformer, Muon",
    rate=0.01,
    optimizer=lambda rate: optax.contrib.muon(rate, adam_learning_rate=0.3 * rate),
    settings=SETTINGS[:2],
    family="",
    seconds=20.0,
)

ACCUMULATED = ADAMW._replace(
    name="transformer, AdamW, accumulated",
    optimizer=lambda rate: optax.MultiSteps(optax.adamw(rate), 4).gradient_transformation(),
    settings=SETTINGS[:2],
    family="",
)

# Fine-tuning --------------------------------------------------------------------------------------

ROTATED = np.arange(BYTES, dtype=np.int32)
for first in (ord("a"), ord("A")):
    ROTATED[first : first + 26] = first + (np.arange(26) + 13) % 26
"""Every letter as the thirteenth after it: text that a network has to learn to read anew."""


@functools.cache
def _trained() -> Callable[[Any, Any], Any]:
    def train(params: Any, starts: Any) -> Any:
        optimizer = optax.adamw(0.01)

        def step(carry: tuple[Any, Any], batch: Any) -> tuple[Any, None]:
            params, state = carry
            slope = jax.grad(lambda params: objective(params, batch)[0])(params)
            updates, state = optimizer.update(slope, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), starts)[0][0]

    return jax.jit(train)


def trained(seed: int) -> Any:
    """The network of a seed after a run on text as it is."""
    batches = feed(STEPS, (seed + 1000,)).batches
    return _trained()(init(seed), jax.tree.map(lambda x: x[:, 0], batches))


def rotated_objective(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch of rotated text, to learn from and to record."""
    train, rotated = text().train, jnp.asarray(ROTATED)
    inputs, labels = (
        rotated[_windows(train, batch[name], offset)]
        for offset, name in enumerate(("inputs", "labels"))
    )
    value = loss(params, inputs, labels)
    return value, value


def _fine_tuned(rate: Any) -> optax.GradientTransformation:
    """AdamW on the head, the last norm and the second block; the rest stays as it was."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if MOMENTUM.frozen(_spelled(path)) else "trained", params
        )

    return optax.partition({"trained": optax.adamw(rate), "frozen": optax.set_to_zero()}, labels)


def _spelled(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


FINE_TUNED = ADAMW._replace(
    name="transformer, fine-tuned, AdamW",
    init=trained,
    objective=rotated_objective,
    optimizer=_fine_tuned,
    settings=SETTINGS[:2],
    family="",
    held_out=None,
)

TASKS = (MOMENTUM, ADAMW, SCHEDULED, LION, MUON, ACCUMULATED, FINE_TUNED)
