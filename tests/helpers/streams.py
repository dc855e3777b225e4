"""Long runs of gradients for clips that learn, and the clips at work on them.

A stream is a row of norms: noise about a level that shifts, with spikes, a burst, and a few steps
that teach nothing. A gradient of norm n is n times a fixed direction in a tree of three leaves.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optclip
from helpers.samples import quick_jit

STEPS = 2400
SHAPES = {"a": (3, 2), "b": {"c": (4,), "d": ()}}
SIZE = 11
CLOSE = 1e-5
"""By how much thresholds, norms and entries may deviate, relatively, at any step."""


EARLY = ((0, "nan"), (1, "zero"), (3, "inf"), (4, "zero"), (17, "nan"), (18, "zero"), (60, "inf"))
LATER = ((300, "zero"), (500, "nan"), (501, "zero"), (800, "inf"))


class Stream(NamedTuple):
    """A run of norms.

    Attributes:
        noise: Standard deviation of the logarithm of the norms.
        scale: The usual norm.
        holes: From step to "zero", "nan" or "inf": gradients that teach nothing.
        steady: Whether there are neither shifts of the level nor spikes.
        seed: Of everything random.
    """

    noise: float
    scale: float = 1.0
    holes: tuple[tuple[int, str], ...] = LATER
    steady: bool = False
    seed: int = 0


STREAMS = {
    "quiet": Stream(0.02),
    "usual": Stream(0.2, scale=1e-4, holes=EARLY + LATER, seed=1),
    "loud, huge": Stream(1.0, scale=1e28, seed=2),
    "tiny": Stream(0.3, scale=1e-28, seed=3),
    "constant": Stream(0.0, steady=True),
}
"""Noise of several sizes, from one end of float32 to the other; one stream begins with holes."""


def norms_of(stream: Stream) -> np.ndarray:
    """The norms, without the holes: shifts of 8 up and 4 down, spikes of 3 to 1000, two bursts."""
    random = np.random.default_rng(stream.seed)
    level = np.full(STEPS, stream.scale)
    if not stream.steady:
        level[700:1300] *= 8
        level[1300:1900] *= 0.25
        level[1100:1125] *= 20
        level[1600:1625] *= 50
        spikes = random.random(STEPS) < 0.02
        level[spikes] *= 10 ** random.uniform(0.5, 3, spikes.sum())
    return level * np.exp(stream.noise * random.normal(size=STEPS))


def gradients_of(stream: Stream) -> np.ndarray:
    """The gradients as rows of `SIZE` float32 entries, with the holes."""
    direction = np.random.default_rng(99).normal(size=SIZE)
    rows = np.outer(norms_of(stream), direction / np.linalg.norm(direction))
    return with_holes(rows, stream.holes)


def with_holes(rows: np.ndarray, holes: Any) -> np.ndarray:
    """Rows in float32, some of them replaced by such as teach nothing."""
    rows = rows.astype(np.float32)
    for step, kind in holes:
        if kind == "zero":
            rows[step] = 0
        else:
            rows[step, 1] = float(kind)
    return rows


def teaches(rows: np.ndarray) -> np.ndarray:
    """Which rows are finite and not zero."""
    return np.all(np.isfinite(rows), axis=1) & np.any(rows != 0, axis=1)


def leaves_of(rows: np.ndarray) -> list[np.ndarray]:
    """The entries of each of the three leaves, in flat rows."""
    shapes = jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return np.split(rows, np.cumsum([math.prod(shape) for shape in shapes])[:-1], axis=-1)


def tree_of(rows: np.ndarray) -> Any:
    """The rows as one tree of three leaves."""
    shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    pairs = zip(leaves_of(rows), shapes, strict=True)
    leaves = [jnp.asarray(part.reshape(len(rows), *shape)) for part, shape in pairs]
    return jax.tree.unflatten(structure, leaves)


def rows_of(tree: Any) -> np.ndarray:
    """The inverse of `tree_of`, in float64."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], axis=1)


class Run(NamedTuple):
    """What a clip made of a stream.

    Attributes:
        updates: Rows of clipped entries, in float64.
        readings: What `metrics` said at every step.
    """

    updates: np.ndarray
    readings: dict[str, np.ndarray]


@functools.cache
def _program(build: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Any:
    def run(arguments, gradients, params, extra):
        transform = build(**dict(static), **arguments)

        def body(state, given):
            updates, params, extra = given
            updates, state = transform.update(updates, state, params, **extra)
            return state, (updates, optclip.metrics(state))

        state = transform.init(jax.tree.map(lambda x: x[0], params))
        return jax.lax.scan(body, state, (gradients, params, extra))[1]

    return quick_jit(run)


def run_stream(
    build: Callable[..., Any],
    rows: np.ndarray,
    arguments: dict[str, float],
    static: dict[str, Any] | None = None,
    params: np.ndarray | None = None,
    **extra: np.ndarray,
) -> Run:
    """A clip over all steps of a stream, in one program; its numbers are traced values.

    Args:
        build: From arguments to the transformation.
        rows: The gradients.
        arguments: Its numeric arguments, which are given as traced values.
        static: The others.
        params: The parameters at every step; zeros if None.
        **extra: What else `update` takes, at every step.
    """
    params = np.zeros_like(rows) if params is None else params
    traced = {name: np.float32(value) for name, value in arguments.items()}
    program = _program(build, tuple(sorted((static or {}).items())))
    updates, readings = program(traced, tree_of(rows), tree_of(params), extra)
    return Run(rows_of(updates), {name: np.asarray(x) for name, x in readings.items()})


def float32_oracle(oracle: Callable[..., Any], *inner: Any, **arguments: Any) -> Any:
    """An oracle with the numbers that its clip works with, which are float32.

    0.9 is 2e-8 less there, and the logarithm of a quantile's threshold adds that up.
    """
    parameters = inspect.signature(oracle).parameters.values()
    defaults = {x.name: x.default for x in parameters if x.default is not x.empty}
    numbers = {name: float(np.float32(x)) for name, x in defaults.items() if isinstance(x, float)}
    given = {
        name: x if isinstance(x, str | int) else float(np.float32(x))
        for name, x in arguments.items()
    }
    return oracle(*inner, **{**numbers, **given})


def norms_of_rows(rows: np.ndarray) -> np.ndarray:
    """Their norms in float64, where no square of a float32 overflows."""
    return np.sqrt(np.sum(np.square(rows, dtype=np.float64), axis=-1))


def deviation(actual: Any, expected: Any) -> float:
    """The largest relative deviation; equal infinities do not differ, and NaN is infinitely far."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.abs(actual - expected) / np.abs(expected)
    apart = np.where(actual == expected, 0.0, apart)
    return float(np.max(np.where(np.isnan(apart), np.inf, apart), initial=0.0))


def assert_run_close(actual: Any, expected: Any, what: str) -> None:
    """No relative deviation is above 1e-5."""
    apart = deviation(actual, expected)
    assert apart <= CLOSE, f"{what} off by {apart:.1e}"


def moving_parameters() -> np.ndarray:
    """Parameters at every step: near zero at first, then about 1; one entry is zero for ever."""
    random = np.random.default_rng(8)
    size = np.clip(np.linspace(-0.05, 2, STEPS), 1e-7, None)[:, None]
    rows = size * random.normal(size=(STEPS, SIZE))
    rows[:, 3] = 0
    return rows.astype(np.float32)
