"""How the runs of a sweep are trained: all in one `vmap`, or one after the other."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

State = Any
Batch = Any

TRIAL_STEPS = 3
"""By so many steps it is told which way of training them all is the faster."""

MOST_AT_ONCE = 2**30
"""Bytes that the states of all runs together may take for that to be tried."""

FETCH_EVERY = 20
"""Steps between two waits for the device."""


class SweepSpec(NamedTuple):
    """What was passed to `sweep`."""

    train_step: Callable[..., Any]
    init: Callable[..., Any]
    batches: Callable[[int, int], Batch]
    evaluate: Callable[[State], jax.Array] | None
    sizes: jax.Array
    seeds: tuple[int, ...]

    def step(self, state: State, threshold: jax.Array, batch: Batch) -> tuple[State, jax.Array]:
        """A step of one run; the state, and loss and clip rate.

        Raises:
            ValueError: If `train_step` gives something else.
        """
        taken = self.train_step(state, threshold, batch)
        if not isinstance(taken, tuple) or len(taken) != 2:
            raise ValueError(
                "sweep(train_step=...) must give (state, loss), or (state, dict with a loss), got "
                f"{kind(taken)}"
            )
        state, read = taken
        read = read if isinstance(read, dict) else {"loss": read}
        if "loss" not in read:
            raise ValueError(
                f"sweep(train_step=...) gives a dict without 'loss' in it; it has {list(read)}"
            )
        found = read["loss"], read.get("clip/clip_rate", jnp.nan)
        return state, jnp.stack([_number(x, "train_step") for x in found])

    def final(self, state: State) -> jax.Array:
        """The final loss of one run, if `evaluate` is to tell it."""
        return _number(jnp.nan if self.evaluate is None else self.evaluate(state), "evaluate")

    @property
    def bytes(self) -> int:
        """What the states of all runs take."""
        states = jax.eval_shape(self.init, self.seeds[0], self.sizes[0])
        one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))
        return one * len(self.sizes) * len(self.seeds)


def kind(x: Any) -> str:
    """What something is, for messages."""
    return f"{len(x)} things" if isinstance(x, tuple | list) else f"a {type(x).__name__}"


def _number(x: Any, name: str) -> jax.Array:
    if jnp.shape(x):
        raise ValueError(
            f"sweep({name}=...) must give one number as the loss, got an array of shape "
            f"{jnp.shape(x)}; take its mean"
        )
    return jnp.asarray(x).astype(jnp.float32)


class Runner(NamedTuple):
    """A way to train some of the runs.

    Attributes:
        start: () -> state.
        step: (state, number of the step) -> (state, loss and clip rate of each of its runs).
        final: state -> final loss of each of its runs.
    """

    start: Callable[[], State]
    step: Callable[[State, int], tuple[State, jax.Array]]
    final: Callable[[State], jax.Array]


def one_by_one(spec: SweepSpec) -> list[Runner]:
    """A way for each run, thresholds first; all with one compiled step."""
    started, compiled, final = jax.jit(spec.init), jax.jit(spec.step), jax.jit(spec.final)

    def runner(size: jax.Array, seed: int) -> Runner:
        return Runner(
            lambda: started(seed, size),
            lambda state, number: compiled(state, size, spec.batches(seed, number)),
            final,
        )

    return [runner(size, seed) for size in spec.sizes for seed in spec.seeds]


def all_together(spec: SweepSpec) -> Runner:
    """States with two more dimensions in front: thresholds, seeds."""

    def over_both(function: Callable[..., Any], *axes: Any) -> Callable[..., Any]:
        """Vectorized by seed, and that by threshold; each of `axes` is a pair, seed first."""
        by_seed = jax.vmap(function, in_axes=tuple(seed for seed, _ in axes))
        return jax.jit(jax.vmap(by_seed, in_axes=tuple(size for _, size in axes)))

    started = over_both(spec.init, (0, None), (None, 0))
    compiled = over_both(spec.step, (0, 0), (None, 0), (0, None))

    def step(state: State, number: int) -> tuple[State, jax.Array]:
        batches = [spec.batches(seed, number) for seed in spec.seeds]
        return compiled(state, spec.sizes, jax.tree.map(lambda *x: jnp.stack(x), *batches))

    return Runner(
        lambda: started(jnp.asarray(spec.seeds), spec.sizes),
        step,
        over_both(spec.final, (0, 0)),
    )


def faster(spec: SweepSpec) -> list[Runner]:
    """The way that takes less time, measured; one by one where all together would not fit."""
    single = one_by_one(spec)
    if len(single) == 1 or spec.bytes > MOST_AT_ONCE:
        return single
    together = all_together(spec)
    return [together] if _seconds(together) < len(single) * _seconds(single[0]) else single


def _seconds(runner: Runner) -> float:
    """What a step takes, once it is compiled."""
    state, _ = jax.block_until_ready(runner.step(runner.start(), 0))
    began = time.perf_counter()
    for number in range(TRIAL_STEPS):
        state, _ = runner.step(state, number)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / TRIAL_STEPS


def train(runner: Runner, steps: int, bar: Any) -> tuple[np.ndarray, np.ndarray]:
    """What was read of each step, and the final losses; the state is let go of."""
    state, read = runner.start(), []
    for number in range(steps):
        state, reading = runner.step(state, number)
        read.append(reading)
        if len(read) % FETCH_EVERY == 0:
            jax.block_until_ready(reading)  # The bar tells what is done, not what is queued.
            bar.update(FETCH_EVERY)
    bar.update(steps % FETCH_EVERY)
    return np.stack(jax.device_get(read)), np.asarray(runner.final(state))
