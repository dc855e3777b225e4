"""How far an optimizer could go, asked of the optimizer itself.

It runs on a tree of the same structure whose leaves have one entry each, the root mean square of
the real leaf's gradient: what it makes of that is the length that its update would have if all
gradients so far had pointed the same way. Paths, ranks, labels, schedules and counts are those of
the real tree, so that a schedule, a mask or a partition means the same there. It costs a few
numbers for each leaf, and no pass over the gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optclip import _numerics

STEPS, NOISES = 128, 64
"""How long the optimizer is watched when it is met, and on how many streams of random signs."""

SEEN_THROUGH = 1.5
"""From which ratio on noise is said to move the weights further than the update's size tells: a
measurement on 64 streams is not more exact."""

WIDEST, SLOWEST = 20.0, 0.95
"""The most that is believed of what `get_to_know` measures."""


class Nature(NamedTuple):
    """What an optimizer is like, leaf by leaf; arrays of shape (leaves,).

    Attributes:
        grows: Whether its update grows with the gradient, as of SGD and momentum; 0 or 1. That of
            Adam, Lion or Muon does not.
        gain: What one gradient adds to all updates in sum, over what it adds to the first: 10 for a
            momentum of 0.9.
        fading: The share of an update that is left when no gradient follows: 0.9 for a momentum of
            0.9 and for Adam. By it an optimizer's first updates are larger than its gradients'
            share, where a bias is corrected.
        reach: How far one gradient moves the weights among others of random direction, over the
            size of an update: 1 but where the update is normalized after it was averaged (Lion
            about 6).
    """

    grows: jax.Array
    gain: jax.Array
    fading: jax.Array
    reach: jax.Array


def small_like(x: Any) -> Any:
    """Ones, with as many axes as a leaf has and one entry; never as large as the leaf itself.

    By its size the state of the one is told from that of the other.
    """
    if not hasattr(x, "dtype"):
        return x
    shape = (1,) * max(np.ndim(x), 1)
    shape = (2,) * len(shape) if shape == np.shape(x) else shape
    if x.dtype == jax.dtypes.float0:
        return np.zeros(shape, jax.dtypes.float0)
    return jnp.ones(shape, x.dtype)


def small(tree: Any, places: Sequence[int], values: jax.Array) -> Any:
    """The tree with one entry for each leaf: the values at their places, zeros elsewhere."""
    leaves, structure = jax.tree.flatten(tree)
    place_of = {place: at for at, place in enumerate(places)}

    def entry(place: int, x: Any) -> Any:
        ones = small_like(x)
        if place in place_of:
            return ones * values[place_of[place]].astype(ones.dtype)
        return jnp.zeros_like(ones) if _numerics.is_floating(x) else ones

    return structure.unflatten([entry(place, x) for place, x in enumerate(leaves)])


def sizes(updates: Any, places: Sequence[int], dtype: Any) -> jax.Array:
    """Of a tree with one entry for each leaf the absolute values, in order."""
    leaves = jax.tree.leaves(updates)
    found = [jnp.abs(jnp.ravel(leaves[place])[0]).astype(dtype) for place in places]
    return jnp.stack(found) if found else jnp.zeros([0], dtype)


def packed(inner_state: Any, small_state: Any, dtype: Any) -> jax.Array | tuple[()]:
    """What a small optimizer's state has of its own, as one array.

    Counts, learning rates and whatever else is as large in the real optimizer's state are not its
    own.
    """
    own = [x for x, shared in _paired(inner_state, small_state) if shared is None]
    numbers = [jnp.ravel(jnp.asarray(x).astype(dtype)) for x in own]
    return jnp.concatenate(numbers) if numbers else ()


def unpacked(inner_state: Any, small_state: Any, numbers: jax.Array | tuple[()]) -> Any:
    """The small optimizer's state, with the real one's counts and learning rates.

    Args:
        inner_state: The real one's.
        small_state: Shapes of the small one's.
        numbers: From `packed`.
    """
    found, start = [], 0
    for x, shared in _paired(inner_state, small_state):
        if shared is None:
            end = start + x.size
            shared, start = (
                jnp.reshape(jnp.asarray(numbers[start:end]), x.shape).astype(x.dtype),
                end,
            )
        found.append(shared)
    return jax.tree.unflatten(jax.tree.structure(small_state), found)


def _paired(inner_state: Any, small_state: Any) -> list[tuple[Any, Any]]:
    """The leaves of the small state, each with that of the real one if it is as large, or None."""
    own, real = jax.tree.leaves(small_state), jax.tree.leaves(inner_state)
    if jax.tree.structure(inner_state) != jax.tree.structure(small_state):
        return [(x, None) for x in own]

    def as_large(x: Any, shared: Any) -> bool:
        return jnp.shape(x) == jnp.shape(shared) and jnp.result_type(x) == jnp.result_type(shared)

    return [(x, y if as_large(x, y) else None) for x, y in zip(own, real, strict=True)]


def get_to_know(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    places: Sequence[int],
    dtype: Any,
    extra_args: dict[str, Any],
) -> Nature:
    """Watches an optimizer on streams of gradients of size 1: equal, a single one, random signs.

    What it does with zeros, as by weight decay, is taken off everywhere.

    Args:
        inner: The optimizer.
        params: The parameters, for their structure.
        places: Which of their leaves are asked about.
        dtype: Of the answer.
        extra_args: What its `update` asks for beside them.
    """
    ones = np.ones(STEPS)
    pulse, stopped = np.zeros(STEPS), np.ones(STEPS)
    pulse[-1], stopped[-2:] = 1, 0
    signs = np.where(np.random.default_rng(0).random((NOISES, STEPS)) < 0.5, -1.0, 1.0)
    streams = np.stack([ones, 2 * ones, 0 * ones, pulse, stopped, *signs]).astype(np.float32)
    few = jax.tree.map(small_like, params)

    def step(carry: tuple[Any, jax.Array], values: jax.Array) -> tuple[Any, jax.Array]:
        states, total = carry
        updates, new = jax.vmap(one)(values, states)
        new = jax.tree.map(lambda old, x: jnp.asarray(x, jnp.result_type(old)), states, new)
        # Against the updates of the same step: a schedule, or steps that shrink, say nothing here.
        now = jnp.abs(updates[:1] - updates[2:3])
        relative = jnp.where(now > 0, (updates[5:] - updates[2:3]) / jnp.where(now > 0, now, 1), 0)
        return (new, total + relative), updates[:5]

    def one(value: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        gradient = small(params, places, jnp.full([len(places)], value, dtype))
        updates, state = inner.update(gradient, state, few, **extra_args)
        leaves = jax.tree.leaves(updates)
        entries = [jnp.real(jnp.ravel(leaves[place])[0]).astype(dtype) for place in places]
        return (jnp.stack(entries) if entries else jnp.zeros([0], dtype)), state

    states = jax.tree.map(lambda x: jnp.stack([x] * len(streams)), inner.init(few))
    start = states, jnp.zeros([NOISES, len(places)], dtype)
    (_, totals), updates = lax.scan(step, start, jnp.asarray(streams.T, dtype))
    one_before, last = updates[-2:]
    at_rest = last[2]
    steady, doubled, single, left = (jnp.abs(last[x] - at_rest) for x in (0, 1, 3, 4))
    left_before = jnp.abs(one_before[4] - one_before[2])
    moves = steady > 0

    def over(a: jax.Array, b: jax.Array, otherwise: float) -> jax.Array:
        return jnp.where(moves & (b > 0), a / jnp.where(b > 0, b, 1), otherwise)

    grows = (over(doubled, steady, 1) > 2**0.5).astype(dtype)
    fading = jnp.where(left_before > 1e-3 * steady, over(left, left_before, 0), 0)
    reach = jnp.clip(jnp.std(totals, axis=0) / math.sqrt(STEPS), 1, WIDEST)
    reach = jnp.where(reach < SEEN_THROUGH, 1, reach)
    fading = jnp.where(reach > 1, 0, jnp.clip(fading, 0, SLOWEST))
    gain = jnp.where(grows > 0, jnp.maximum(over(steady, single, 1), 1), 1)
    return Nature(grows, gain, fading, reach)
