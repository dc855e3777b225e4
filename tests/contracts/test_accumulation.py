"""Clips and the accumulation of gradients over micro-batches.

Inside `optax.MultiSteps`, or after a scan that takes the mean, the clip sees the mean; in front of
`MultiSteps` it sees every micro-batch. `test_compose.py` has the first for every method.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import ONE_OF_EACH_KIND
from helpers.samples import (
    assert_close,
    canceled,
    detailed,
    gradient,
    once_a_method,
    quick_jit,
    sample_parameters,
)
from jax import lax

import optclip

MICRO = 4
PARAMS = sample_parameters()
EVERY = [gradient(seed=seed, scale=seed + 1) for seed in range(2 * MICRO)]
"""Two steps of four micro-batches."""

each_kind = pytest.mark.parametrize("method", ONE_OF_EACH_KIND, ids=str)


LATER = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=MICRO).gradient_transformation()
LATER_UPDATE = quick_jit(LATER.update)


@once_a_method
def alone(method):
    """The transformation, and its update compiled."""
    transform = detailed(method)
    return transform, quick_jit(transform.update)


def mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *trees)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@each_kind
def test_after_a_scan_over_micro_batches_the_clip_sees_the_mean(method):
    transform, update = alone(method)

    @quick_jit
    def accumulated(state, micro_batches):
        def add(total, micro_batch):
            return jax.tree.map(jnp.add, total, micro_batch), None

        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, PARAMS), micro_batches)
        return transform.update(jax.tree.map(lambda x: x / MICRO, total), state, PARAMS)

    state = expected_state = transform.init(PARAMS)
    for first in (0, MICRO):
        some = EVERY[first : first + MICRO]
        updates, state = accumulated(state, stacked(some))
        expected, expected_state = update(mean(some), expected_state, PARAMS)
        assert_close((updates, state), (expected, expected_state), atol=canceled(method))


@each_kind
def test_in_a_scan_every_micro_batch_is_clipped(method):
    """A scan whose carry is the state of the clip, as the loop it is."""
    transform, update = alone(method)

    @quick_jit
    def accumulated(state, micro_batches):
        def step(carry, micro_batch):
            total, state = carry
            updates, state = transform.update(micro_batch, state, PARAMS)
            # Each update too: in their total entries cancel, and roundings stand out.
            return (jax.tree.map(jnp.add, total, updates), state), updates

        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        return lax.scan(step, (zeros, state), micro_batches)

    state = transform.init(PARAMS)
    (total, found_state), found = accumulated(state, stacked(EVERY))
    every = []
    for micro_batch in EVERY:
        updates, state = update(micro_batch, state, PARAMS)
        every.append(updates)
    assert_close((found, found_state), (stacked(every), state), atol=canceled(method))
    assert_close(total, jax.tree.map(lambda x: functools.reduce(jnp.add, x), found))


@each_kind
def test_before_multi_steps_every_micro_batch_is_clipped(method):
    transform, clip_update = alone(method)
    optimizer = optax.chain(transform, LATER)
    update = quick_jit(optimizer.update)
    state, clip_state, rest_state = (x.init(PARAMS) for x in (optimizer, transform, LATER))
    for place, micro_batch in enumerate(EVERY, 1):
        updates, state = update(micro_batch, state, PARAMS)
        clipped, clip_state = clip_update(micro_batch, clip_state, PARAMS)
        expected, rest_state = LATER_UPDATE(clipped, rest_state, PARAMS)
        largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(clipped))
        assert_close(updates, expected, atol=2.0**-23 * largest)  # A mean, in which terms cancel.
        assert_close(state[0], clip_state)
        assert any(map(np.any, jax.tree.leaves(updates))) == (place % MICRO == 0)


def test_of_a_nan_before_multi_steps_only_its_micro_batch_is_lost():
    clip = optclip.clip_by_global_norm(1.0, nonfinite="zero")
    later = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2).gradient_transformation()
    optimizer = optax.chain(clip, later)
    update, state = quick_jit(optimizer.update), optimizer.init(jnp.zeros(2))
    for micro_batch in ([0.6, 0.8], [jnp.nan, 1.0]):
        updates, state = update(jnp.asarray(micro_batch), state, jnp.zeros(2))
    np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-6)
    assert int(optclip.metrics(state)["clip/nonfinite_steps"]) == 1
    # Inside it, the mean is NaN and the whole step is lost.
    inside = optax.MultiSteps(optax.chain(clip, optax.sgd(1.0)), every_k_schedule=2)
    update, state = quick_jit(inside.update), inside.init(jnp.zeros(2))
    for micro_batch in ([0.6, 0.8], [jnp.nan, 1.0]):
        updates, state = update(jnp.asarray(micro_batch), state, jnp.zeros(2))
    assert not np.any(updates)


def test_a_spike_skipped_before_multi_steps_does_not_count_as_a_micro_batch():
    """The held `MultiSteps` waits for one more: its mean is of ordinary micro-batches."""
    inner = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2).gradient_transformation()
    optimizer = optclip.skip_spikes(inner, patience=3, window=8)
    update, state = quick_jit(optimizer.update), optimizer.init(jnp.zeros(1))
    sizes = [1.0, 1.2, 0.9, 1.1, 1.0, 1000.0, 1.0]
    steps = []
    for size in sizes:
        updates, state = update(jnp.full(1, size), state, jnp.zeros(1))
        steps.append(float(updates[0]))
    np.testing.assert_allclose(steps, [0, -1.1, 0, -1.0, 0, 0, -1.0], rtol=1e-6)
    assert int(optclip.metrics(state)["skip/skipped_steps"]) == 1
