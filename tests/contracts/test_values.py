"""Contracts 1 and 3: types and shapes are kept, bounds hold, and updates are the oracles'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.registry import METHODS
from helpers.running import (
    ROUNDOFF,
    assert_as_the_oracle,
    assert_right,
    bound_of,
    compiled,
    each_method,
    readings,
    slack,
    start,
)
from helpers.samples import assert_same, quick_jit
from helpers.strategies import TREES, few, fillings, parameters, spec, values
from hypothesis import given
from hypothesis import strategies as st
from oracles import clips

import optclip

pytestmark = pytest.mark.usefixtures("strict")

THRESHOLDS = {
    "float": float,
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
    "schedule": lambda value: lambda count: value,
    "traced": lambda value: value,
}
"""What a number may be given as."""


def update_with(method, threshold, arguments, updates, params):
    """One update with the traced arguments as a type of threshold."""
    cast = THRESHOLDS[threshold]
    transform = method.build(**{name: cast(value) for name, value in arguments.items()})
    return transform.update(updates, transform.init(params), params)


def types_for(method):
    """Rules without memory take schedules."""
    return [kind for kind in THRESHOLDS if kind != "schedule" or not method.has_memory]


def numbers_of(method):
    """The method's traced arguments, rounded to what every type of threshold can hold."""
    return {name: float(jnp.bfloat16(method.arguments[name])) for name in method.traced}


# Contract 1


@each_method
def test_1_every_type_of_threshold_means_the_same(method):
    tree = {"a": spec((3, 4), "float16"), "b": [spec((5,), "float16"), spec((), "float16")]}
    kinds, numbers = types_for(method), numbers_of(method)

    @quick_jit
    def with_every_type(traced, updates, params):
        given = {**dict.fromkeys(kinds, numbers), "traced": traced}
        return [update_with(method, kind, given[kind], updates, params) for kind in kinds]

    outcomes = with_every_type(numbers, values(tree), parameters(tree))
    for updates, state in outcomes:
        assert_same(updates, outcomes[0][0])
        assert_same(state, outcomes[0][1])


# Contract 3


@each_method
@few(25)
@given(name=st.sampled_from(("nested", "types")), filling=fillings())
def test_3_updates_and_readings_are_the_oracles(method, name, filling):
    begin = start(method, name)
    gradient = values(TREES[name], *filling)
    outcome = begin.oracle.peek(gradient, begin.params)
    updates, state = compiled(method)(gradient, begin.state, begin.params)
    assert_as_the_oracle(method, begin.state, updates, state, outcome)


@each_method
@few(25)
@given(
    name=st.sampled_from(("nested", "types")),
    filling=fillings(),
    scale=st.sampled_from((1e-3, 0.03, 1.0, 30.0)),
)
def test_3_the_bound_holds_and_below_it_nothing_changes(method, name, filling, scale):
    begin = start(method, name)
    gradient = values(TREES[name], *filling, scale)
    outcome = begin.oracle.peek(gradient, begin.params)
    updates, state = compiled(method)(gradient, begin.state, begin.params)
    assert_bounded(method, begin, gradient, updates, outcome, readings(state)["threshold"])


@each_method
def test_3_at_ordinary_gradients_some_are_clipped_and_a_thousandth_is_not(method):
    begin = start(method, "nested")
    for scale in (1.0, 1e-3):
        gradient = values(TREES["nested"], scale=scale)
        outcome = begin.oracle.peek(gradient, begin.params)
        updates, state = compiled(method)(gradient, begin.state, begin.params)
        assert_bounded(method, begin, gradient, updates, outcome, readings(state)["threshold"])
        assert (outcome.share > 0) == (scale == 1 and method.name != "measure_norms")
        if method.hard and not outcome.share:
            assert_same(updates, gradient)


def assert_bounded(method, begin, gradient, updates, outcome, reported):
    """Checks every group's norm after clipping, and that what is below its threshold is the same.

    A threshold that was learned in float32 is taken from the readings where there is one.
    """
    before, after = jax.tree.leaves(gradient), jax.tree.leaves(updates)
    learned = 1 + 1e-4 if method.has_memory else 1
    for place, bounds in outcome.bounds.items():
        old, new = np.ravel(before[place]), np.ravel(after[place])
        roundoff, step = ROUNDOFF[old.dtype.name], slack(old.dtype)
        assert np.all(clips.moduli(new) <= bounds * learned * (1 + roundoff) + step)
        below = clips.moduli(old) < bounds * (1 - 1e-4)
        assert old[below].tobytes() == new[below].tobytes()
    if outcome.bounds:
        return
    for group, size, threshold in zip(
        outcome.groups, outcome.norms, outcome.thresholds, strict=True
    ):
        if method.has_memory:
            threshold = reported if len(outcome.groups) == 1 else threshold * learned
        clipped = begin.oracle.measure(updates, begin.params, group)
        canceled = max(outcome.rounding.get(place, 0) for place, _ in group)
        assert clipped <= bound_of(begin, gradient, group, threshold) + canceled
        if method.hard and size < threshold * (1 - 1e-5):
            for place, selector in group:
                assert before[place][selector].tobytes() == after[place][selector].tobytes()


@pytest.mark.parametrize("method", [m for m in METHODS if m.hard and not m.has_memory], ids=str)
def test_3_exactly_at_the_bound_nothing_is_clipped(method):
    """Two leaves whose every norm is 4 or less, under thresholds of 4 in every form."""
    gradient = {"u": jnp.zeros((4, 1)).at[0].set(4.0), "w": jnp.zeros(2, jnp.float32)}
    params = jax.tree.map(jnp.zeros_like, gradient)  # Of zero: `eps` and `absolute` count alone.
    numbers = dict.fromkeys(method.traced, 4.0)
    if "eps" in numbers:  # ratio * eps, or for all entries that move ratio * eps * sqrt(4)
        numbers["eps"] = 1.0 if method.scope == "unit" else 0.5
    if method.norm == "rms":
        numbers = {"threshold": 2.0}
    transform = method.build(**numbers)
    for scale, share in ((1.0, 0), (1 + 2e-6, 1)):
        given = jax.tree.map(lambda x, scale=scale: x * jnp.float32(scale), gradient)
        updates, state = quick_jit(transform.update)(given, transform.init(params), params)
        read = readings(state)
        if method.name == "measure_norms":
            share = 0
        if not share:
            assert read["clip_rate"] == 0
            assert read["factor"] == 1
            assert read["norm"] <= read["threshold"]
            assert_same(updates, given)
        else:
            assert read["clip_rate"] > 0
            assert updates["u"][0, 0] < given["u"][0, 0]


def test_3_the_largest_entry_of_each_leaf_is_read_before_and_after():
    gradient = {"a": jnp.array([0.05, -0.02]), "b": jnp.array([[1.0, -3.0]])}
    clip = optclip.clip_by_value(0.1, detail=True)
    _, state = clip.update(gradient, clip.init(gradient))
    assert_right(state.detail.norms, [0.05, 3.0])
    assert_right(state.detail.clipped_norms, [0.05, 0.1])  # What is below the bound is left alone.


@pytest.mark.parametrize("size", [1e-35, 1e-31, 1.0, 1e30])
def test_3_the_share_of_clipped_entries_is_read_at_every_magnitude(size):
    clip = optclip.clip_by_value(size)
    gradient = jnp.asarray(size * np.array([3.0, -2.0, 0.5, 0.0]), jnp.float32)
    _, state = clip.update(gradient, clip.init(gradient))
    assert_right(state.clip_rate, 0.5)


def test_3_a_single_entry_is_cut_to_the_threshold_itself():
    """Not a rounding away from it, as the product with one rounded quotient would be."""
    clip = optclip.clip_by_global_norm(1.0)
    entries = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 100
    entries = jnp.asarray(entries[np.abs(entries) > 1])
    clipped, _ = jax.jit(jax.vmap(lambda x: clip.update({"a": x, "b": jnp.zeros(3)}, None)))(
        entries
    )
    np.testing.assert_array_equal(clipped["a"], np.sign(entries))
