"""The program that trains: many runs at once, all their steps in one loop.

A run is one `lax.scan`; runs that differ in learning rate, threshold and seed are `vmap`ped. What
differs between the settings of a task is data, so a method is compiled once for each task.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks.proving_ground.contenders import Contender
from benchmarks.proving_ground.task import Feed, Task


class Curves(NamedTuple):
    """What the runs did; the first axis is the run.

    Attributes:
        losses: The recorded loss of every step, before the step is made.
        held_out: The loss on other data at the end; NaN where the task has none.
        clip_rate: The share of the steps (of the groups, where there are several) that were
            clipped, by the clip of the method that did most; the share skipped, where more were.
    """

    losses: Any
    held_out: Any
    clip_rate: Any


def program(task: Task, contender: Contender) -> Any:
    """The jitted training of a task with a method.

    Returns:
        A jitted function to `Curves`, of the learning rates, thresholds, parameters and seeds'
        places, each with an axis of runs, and of the feed that all runs share.
    """

    def run(rate: Any, threshold: Any, params: Any, place: Any, feed: Feed) -> Curves:
        own = contender.instead(rate / task.rate) if contender.instead else task.optimizer(rate)
        optimizer = optax.with_extra_args_support(contender.build(own, threshold))
        waits = _by_path(task, params)

        def step(carry: Any, given: Feed) -> tuple[Any, Any]:
            params, state = carry
            batch = jax.tree.map(lambda x: x[place], given.batches)

            def objective(params: Any) -> tuple[Any, Any]:
                value, recorded = task.objective(params, batch)
                return value * given.loss_factor, recorded

            grads, recorded = jax.grad(objective, has_aux=True)(params)
            grads = jax.tree.map(lambda g: g * given.gradient_factor.astype(g.dtype), grads)
            grads = _open(waits, given.thawed, grads)
            updates, new = optimizer.update(grads, state, params, value=recorded)
            updates = _open(waits, given.thawed, updates)
            # Some optimizers hand on other types than they were given, which a loop cannot.
            state = jax.tree.map(lambda old, x: jnp.asarray(x, old.dtype), state, new)
            return (optax.apply_updates(params, updates), state), recorded

        start = (params, optimizer.init(params))
        (params, state), losses = jax.lax.scan(step, start, feed)
        held_out = task.held_out(params) if task.held_out else jnp.nan
        return Curves(losses, held_out, _clip_rate(state, len(losses)))

    return jax.jit(jax.vmap(run, in_axes=(0, 0, 0, 0, None)))


def starts(task: Task, seeds: tuple[int, ...], dtype: Any) -> Any:
    """The parameters of every seed, stacked."""
    trees = [task.init(seed) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(dtype), *trees)


def arguments(params: Any, rates: Any, threshold: float, feed: Feed) -> tuple[Any, ...]:
    """What `program` takes, for a run with every learning rate and seed.

    Args:
        params: From `starts`.
        rates: The learning rates.
        threshold: The threshold of all these runs.
        feed: What the runs are given.
    """
    seeds = jax.tree.leaves(params)[0].shape[0]
    rate = np.repeat(np.asarray(rates, np.float32), seeds)
    place = np.tile(np.arange(seeds, dtype=np.int32), len(rates))
    of_runs = jax.tree.map(lambda x: x[place], params)
    return rate, np.full(len(rate), threshold, np.float32), of_runs, place, feed


def by_rate_and_seed(curves: Curves, rates: int) -> Curves:
    """The curves as numpy arrays, whose first axes are (learning rate, seed)."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(rates, -1, *x.shape[1:]), curves)


def _by_path(task: Task, params: Any) -> Any:
    """Which parameters wait until they are thawed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: task.frozen(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )


def _open(waits: Any, thawed: Any, tree: Any) -> Any:
    return jax.tree.map(lambda wait, x: jnp.where(thawed, x, 0) if wait else x, waits, tree)


def _clip_rate(state: Any, steps: int) -> jax.Array:
    readings = optclip.metrics(state)
    shares = [x for name, x in readings.items() if name.endswith("/clip_rate")]
    shares += [readings[name] / steps for name in readings if name == "skip/skipped_steps"]
    return jnp.max(jnp.stack(shares)) if shares else jnp.zeros([])
