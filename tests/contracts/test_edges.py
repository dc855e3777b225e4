"""Contracts 4 and 7: zero, infinity, derivatives there, and what is not floating point."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.running import (
    assert_entries_right,
    clip_state,
    compiled,
    compiled_with_traced_arguments,
    each_method,
    each_method_with_a_threshold,
    each_method_with_detail,
    in_one,
    readings,
    start,
)
from helpers.samples import assert_same, quick_jit
from helpers.strategies import TREES, parameters, values
from oracles import clips
from oracles.methods import oracle_of

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
                expected = oracle.step(gradient, params)
                assert_entries_right(updates, expected.updates, rounding=expected.rounding)
                assert not any(map(math.isnan, read.values())), where
                assert read["nonfinite_steps"] == 0, where


@each_method_with_detail
def test_4_of_a_zero_gradient_every_norm_is_0(method):
    begin = start(method, "types", detail=True)
    zero = jax.tree.map(jnp.zeros_like, begin.params)
    updates, state = compiled(method, detail=True)(zero, begin.state, begin.params)
    assert_same(updates, zero)
    before, after = clip_state(begin.state), clip_state(state)
    for norms in (after.detail.norms, after.detail.clipped_norms):
        assert in_one(norms).shape == in_one(before.detail.norms).shape
        assert not np.any(in_one(norms)), "0 before clipping and after"
    assert_same(after.detail.growth, before.detail.growth)
    assert_same(after.memory, before.memory)
    assert readings(state)["clip_rate"] <= readings(begin.state)["clip_rate"]


WEIGHTS = jax.tree.map(np.asarray, values(TREES["small"], seed=1))
TANGENT = jax.tree.map(np.asarray, values(TREES["small"], seed=2))


def weighted(tree, weights=WEIGHTS):
    """A number that depends on every entry."""
    pairs = zip(jax.tree.leaves(weights), jax.tree.leaves(tree), strict=True)
    return sum((w * x).real.sum() for w, x in pairs)


def slope(outcome_at, step=1e-6):
    """The derivative of an oracle's weighted outcome, by central differences in float64."""
    ahead, behind = (weighted(outcome_at(h).updates) for h in (step, -step))
    return (ahead - behind) / (2 * step)


def slope_along(tangent, gradient, begin, step=1e-6):
    """By the gradient, in the direction of the tangent."""
    wide = jax.tree.map(clips.wide, gradient)

    def outcome_at(h):
        return begin.oracle.peek(jax.tree.map(lambda x, v: x + h * v, wide, tangent), begin.params)

    return slope(outcome_at, step)


@each_method
def test_4_derivatives_are_right_and_finite_at_zero(method):
    begin = start(method, "small")
    numbers = {name: jnp.float32(method.arguments[name]) for name in method.traced}

    def loss(gradient, numbers, state, params):
        return weighted(method.build(**numbers).update(gradient, state, params)[0])

    @quick_jit
    def derivatives(gradient, *others):
        _, forward = jax.jvp(lambda x: loss(x, *others), (gradient,), (TANGENT,))
        return forward, *jax.grad(loss, (0, 1))(gradient, *others)

    zero = jax.tree.map(jnp.zeros_like, begin.params)
    below, ordinary = (values(TREES["small"], scale=scale) for scale in (1e-3, 1.0))
    for gradient, step in ((zero, 1e-9), (below, 1e-6), (ordinary, 1e-6)):
        expected = slope_along(TANGENT, gradient, begin, step)
        forward, backward, of_numbers = derivatives(gradient, numbers, begin.state, begin.params)
        for derivative in (forward, weighted(backward, TANGENT)):
            np.testing.assert_allclose(float(derivative), expected, rtol=1e-4, atol=1e-4)
        for name, derivative in of_numbers.items():
            assert math.isfinite(derivative), name


@each_method_with_a_threshold
def test_4_derivatives_by_the_threshold_are_right(method):
    gradient, params = values(TREES["small"]), parameters(TREES["small"])
    state = method.build().init(params)
    numbers = {name: float(method.arguments[name]) for name in method.traced}

    @quick_jit
    def derivatives(numbers, *others):
        return jax.grad(lambda numbers: weighted(method.build(**numbers).update(*others)[0]))(
            numbers
        )

    found = derivatives(numbers, gradient, state, params)
    for name, number in numbers.items():

        def outcome_at(h, name=name, number=number):
            return oracle_of(method, **{name: number + h}).step(gradient, params)

        expected = slope(outcome_at)
        np.testing.assert_allclose(float(found[name]), expected, rtol=1e-4, atol=1e-4)


@each_method_with_a_threshold
def test_4_derivatives_by_a_threshold_of_0_are_finite(method):
    """On one side a threshold of 0 does nothing; on the other it lets through what it allows."""
    gradient, params = values(TREES["small"]), parameters(TREES["small"])
    state = method.build().init(params)

    def outcome_at(number):
        numbers = dict.fromkeys(method.traced, number)
        return weighted(method.build(**numbers).update(gradient, state, params)[0])

    zero, little = jnp.float32(0), jnp.float32(1e-3)
    found = quick_jit(jax.grad(outcome_at))(zero)
    ahead = float(quick_jit(outcome_at)(little)) / float(little)
    least, most = sorted((0.0, ahead))
    assert least - 1e-2 * abs(ahead) <= found <= most + 1e-2 * abs(ahead)


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
def test_7_functions_and_strings_beside_arrays_are_not_touched(method):
    """As in a model that is handed over whole."""
    transform = method.build()
    tree = {"activation": jax.nn.relu, "name": "dense", "w": jnp.ones((3, 2))}
    params = {"w": tree["w"]}
    updates, _ = transform.update(tree, transform.init(tree), tree)
    assert updates["activation"] is jax.nn.relu
    assert updates["name"] == "dense"
    expected, _ = transform.update(params, transform.init(params), params)
    assert_same(updates["w"], expected["w"])


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
        detail = clip_state(state).detail
        assert not in_one((detail.norms, detail.clipped_norms, detail.growth.at_spike)).size
