"""Contracts 4 and 7: zero, infinity, derivatives there, and what is not floating point."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from registry_oracles import oracle_of
from running import (
    assert_entries_right,
    clip_state,
    compiled_with_traced_arguments,
    each_method,
    each_method_with_detail,
    readings,
    start,
)
from samples import assert_same, quick_jit
from strategies import TREES, values

import optclip

pytestmark = pytest.mark.usefixtures("strict")

SIZES = (0.0, 1e-35, 1.0, 2e38, math.inf)
DIRECTION = np.array([[0.6, -0.8], [0.8, 0.6]])


# Contract 4


def numbers_for(method, threshold):
    """All traced arguments as one number, which makes the threshold 0 or infinite with it."""
    return dict.fromkeys(method.traced, threshold)


@each_method
def test_4_any_norm_under_any_threshold(method):
    update = compiled_with_traced_arguments(method)
    params = {"w": jnp.asarray(DIRECTION, jnp.float32)}
    own = {name: method.arguments[name] for name in method.traced}
    for size, threshold in itertools.product(SIZES, [None] if method.has_memory else SIZES):
        numbers = own if threshold is None else numbers_for(method, threshold)
        gradient = {"w": jnp.asarray(DIRECTION * size, jnp.float32)}
        state, oracle = method.build().init(params), oracle_of(method, **numbers)
        for step in range(2):
            updates, state = update(numbers, gradient, state, params)
            read, where = readings(state), f"norm {size}, threshold {threshold}"
            if math.isinf(size):
                assert_same(updates, gradient)
                assert read["nonfinite_steps"] == step + 1, where
                assert not math.isfinite(read["norm"]), where
            else:
                expected = oracle.step(gradient, params).updates
                assert_entries_right(updates, expected)
                assert not any(map(math.isnan, read.values())), where
                assert read["nonfinite_steps"] == 0, where


@each_method
def test_4_threshold_0_gives_zeros_and_infinity_the_input(method):
    if not method.traced or method.has_memory:
        thresholds = {math.inf: {}} if not method.has_memory else {}
    else:
        thresholds = {size: numbers_for(method, size) for size in (0.0, math.inf)}
    gradient = params = {"w": jnp.asarray(DIRECTION, jnp.float32), "b": jnp.ones(3, jnp.float16)}
    for threshold, numbers in thresholds.items():
        transform = method.build(**numbers)
        updates, _ = transform.update(gradient, transform.init(params), params)
        if threshold == 0:
            assert all(not np.any(oracles.wide(x)) for x in jax.tree.leaves(updates))
        else:
            assert_same(updates, gradient)


@each_method
def test_4_derivatives_are_right_and_finite_at_zero(method):
    begin = start(method, "small")
    weights = jax.tree.map(np.asarray, values(TREES["small"], seed=1))
    tangent = jax.tree.map(np.asarray, values(TREES["small"], seed=2))

    def weighted(tree):
        pairs = zip(jax.tree.leaves(weights), jax.tree.leaves(tree), strict=True)
        return sum((w * x).real.sum() for w, x in pairs)

    def loss(gradient, state, params):
        return weighted(method.build().update(gradient, state, params)[0])

    @quick_jit
    def derivatives(gradient, tangent, state, params):
        _, forward = jax.jvp(lambda x: loss(x, state, params), (gradient,), (tangent,))
        return forward, jax.grad(loss)(gradient, state, params)

    def slope(gradient):
        """By central differences of the oracle."""
        wide = jax.tree.map(oracles.wide, gradient)
        ahead, behind = (
            jax.tree.map(lambda x, v, step=step: x + step * v, wide, tangent)
            for step in (1e-6, -1e-6)
        )
        ahead, behind = (begin.oracle.peek(x, begin.params).updates for x in (ahead, behind))
        return (weighted(ahead) - weighted(behind)) / 2e-6

    zero = jax.tree.map(jnp.zeros_like, begin.params)
    ordinary = values(TREES["small"])
    below = values(TREES["small"], scale=1e-3)
    for gradient in (zero, below, ordinary):
        # Around a zero gradient nothing is clipped, and the clip is the identity.
        expected = weighted(tangent) if gradient is zero else slope(gradient)
        forward, backward = derivatives(gradient, tangent, begin.state, begin.params)
        pairs = zip(jax.tree.leaves(backward), jax.tree.leaves(tangent), strict=True)
        for derivative in (forward, sum((g * v).real.sum() for g, v in pairs)):
            np.testing.assert_allclose(float(derivative), expected, rtol=1e-4, atol=1e-4)


# Contract 7


UNTOUCHED = {
    "integers": jnp.arange(3),
    "bytes": jnp.full(2, 7, jnp.uint8),
    "booleans": jnp.array([True, False]),
    "float0": np.zeros(2, jax.dtypes.float0),
    "no entries": jnp.zeros((0, 3)),
    "no numpy entries": np.zeros((2, 0), np.float32),
    "numpy integers": np.arange(4),
    "int": 3,
    "bool": True,
    "none": None,
    "masked": optax.MaskedNode(),
    "empty": [{}, (), []],
}


def type_of(x):
    return np.shape(x), jnp.result_type(x)


@each_method
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_7_what_is_not_floating_point_is_not_touched(method, nonfinite):
    for worst in (1.0, math.nan):
        floating = {
            "a": jnp.asarray(DIRECTION, jnp.float32),
            "numpy": np.array([3.0, -worst], np.float32),
            "python": 2.0,
        }
        transform, params = method.build(nonfinite=nonfinite), {**floating, **UNTOUCHED}
        gradient = {**floating, **UNTOUCHED}
        updates, state = transform.update(gradient, transform.init(params), params)
        assert jax.tree.map(type_of, updates) == jax.tree.map(type_of, gradient)
        for name in UNTOUCHED:
            pairs = zip(
                jax.tree.leaves(updates[name]), jax.tree.leaves(UNTOUCHED[name]), strict=True
            )
            # A leaf without entries may be another one: there is nothing in it to touch.
            assert all(after is before or not np.size(before) for after, before in pairs), name
        alone, expected = transform.update(floating, transform.init(floating), floating)
        assert_same({name: updates[name] for name in floating}, alone)
        assert_same(optclip.metrics(state), optclip.metrics(expected))


@each_method
def test_7_numpy_and_python_floats_are_clipped_like_arrays(method):
    gradient = {"numpy": np.array([[3.0, -4.0], [0.5, 1.0]], np.float32), "python": 2.0}
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    transform = method.build()
    updates, _ = transform.update(gradient, transform.init(gradient), gradient)
    expected, _ = transform.update(arrays, transform.init(arrays), arrays)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [jnp.float32] * 2
    assert_same(updates, expected)


@each_method
@pytest.mark.parametrize(
    "tree",
    [{}, (), [], optax.MaskedNode(), {"a": None}, {"i": jnp.arange(2)}, {"z": jnp.zeros((0, 2))}],
    ids=repr,
)
def test_7_trees_without_entries(method, tree):
    transform = method.build()
    updates, state = transform.update(tree, transform.init(tree), tree)
    assert_same(updates, tree)
    read = readings(state)
    assert not any(map(math.isnan, read.values()))
    expected = {"norm": 0, "clipped_norm": 0, "factor": 1, "clip_rate": 0, "nonfinite_steps": 0}
    assert {name: read[name] for name in expected} == expected


@each_method_with_detail
def test_7_details_of_trees_without_entries(method):
    transform = method.build(detail=True)
    for tree in ({}, {"a": None, "i": jnp.arange(2), "z": jnp.zeros((0, 2))}):
        updates, state = transform.update(tree, transform.init(tree), tree)
        assert_same(updates, tree)
        assert [x.size for x in clip_state(state).detail] == [0, 0]
