"""Contract 6: a step with a non-finite gradient is handed on or zeroed whole, and forgotten."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.running import (
    clip_state,
    compiled,
    compiled_with_traced_arguments,
    each_method,
    each_method_with_numbers,
    readings,
    start,
)
from helpers.samples import assert_close, assert_same, quick_jit
from helpers.strategies import TREES, values
from oracles import clips

import optclip
from optclip import norms, scopes

pytestmark = pytest.mark.usefixtures("strict")

BAD = (math.nan, math.inf, -math.inf)


def with_entry(tree, leaf, entry, place=0):
    """The tree with one entry of one leaf replaced."""
    leaves, structure = jax.tree.flatten(tree)
    changed = np.array(leaves[leaf])
    changed.flat[place] = entry
    leaves[leaf] = jnp.asarray(changed)
    return jax.tree.unflatten(structure, leaves)


@each_method
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_6_a_nonfinite_step_is_handed_on_or_zeroed_whole(method, nonfinite):
    arguments = {"nonfinite": nonfinite} | ({"detail": True} if method.takes("detail") else {})
    begin = start(method, "types", **arguments)
    ordinary = values(TREES["types"])
    before = clip_state(begin.state)
    for leaf in range(len(jax.tree.leaves(ordinary))):
        for bad in BAD:
            gradient = with_entry(ordinary, leaf, bad)
            updates, state = compiled(method, **arguments)(gradient, begin.state, begin.params)
            after, read = clip_state(state), readings(state)
            assert after.steps == before.steps + 1
            assert after.nonfinite_steps == before.nonfinite_steps + 1
            assert_same(after.memory, before.memory)
            assert after.clip_rate == before.clip_rate
            assert after.recent_clip_rate == before.recent_clip_rate
            assert not math.isfinite(read["norm"])
            assert not math.isnan(read["threshold"])
            if nonfinite == "propagate":
                assert_same(updates, gradient)
                assert read["factor"] == 1
                assert not math.isfinite(read["clipped_norm"])
            else:
                assert_same(updates, jax.tree.map(jnp.zeros_like, gradient))
                assert read["factor"] == 0
                assert read["clipped_norm"] == 0
                if after.detail:
                    zeros = jax.tree.map(jnp.zeros_like, after.detail.clipped_norms)
                    assert_same(after.detail.clipped_norms, zeros)


@each_method
def test_6_what_follows_is_as_without_the_nonfinite_steps(method):
    specs, update = TREES["types"], compiled(method)
    params = start(method, "types").params
    clean = disturbed = method.build().init(params)
    for step in range(40):
        gradient = values(specs, seed=step, scale=0.1 if step % 7 else 1.0)
        if step in (0, 3, 30):
            bad = with_entry(gradient, step % 3, BAD[step % 3])
            _, disturbed = update(bad, disturbed, params)
        expected, clean = update(gradient, clean, params)
        updates, disturbed = update(gradient, disturbed, params)
        assert_same(updates, expected)
        assert_same(without_counts(disturbed), without_counts(clean))
    assert readings(disturbed)["nonfinite_steps"] == 3
    assert clip_state(disturbed).steps == 43


def without_counts(state):
    """The state's leaves by name, but those that count all steps, or the non-finite ones."""
    named = dict(clips.leaves_with_paths(state))
    counts = ("steps", "nonfinite_steps")
    return {path: x for path, x in named.items() if path.split("/")[-1] not in counts}


@each_method
def test_6_one_nan_anywhere_in_a_large_leaf_is_seen(method):
    random = np.random.default_rng(0)
    ordinary = {
        "a": jnp.asarray(random.normal(size=5_000), jnp.float32),
        "b": jnp.asarray(random.normal(size=(1_000, 100)), jnp.bfloat16),
    }
    transform, update = method.build(), compiled(method)
    for leaf, size in enumerate((5_000, 100_000)):
        for place in (0, 1, 4_095, 4_096, size // 2 + 3, size - 1):
            gradient = with_entry(ordinary, leaf, math.nan, place)
            updates, state = update(gradient, transform.init(ordinary), ordinary)
            assert readings(state)["nonfinite_steps"] == 1, (leaf, place)
            assert not math.isfinite(readings(state)["norm"]), (leaf, place)
            assert_same(updates, gradient)


@pytest.mark.parametrize("scope", [scopes.leaf, scopes.unit(), scopes.unit(1)], ids=["leaf", 0, 1])
@pytest.mark.parametrize("norm", [norms.l2, norms.linf, norms.rms], ids=lambda norm: norm.name)
def test_6_one_nan_among_thousands_of_groups_is_read(scope, norm):
    clip = optclip.clip_by(1.0, scope=scope, norm=norm)
    for place in (0, 4_999, 5_000, 9_999):
        gradient = with_entry([jnp.ones((2, 5_000))], 0, math.nan, place)
        updates, state = clip.update(gradient, clip.init(gradient))
        assert int(state.nonfinite_steps) == 1
        assert not math.isfinite(float(state.norm)), place
        assert_same(updates, gradient)


def test_6_zero_does_not_spare_a_leaf_that_is_left_alone():
    clip = optclip.clip_by_group_norm(1.0, {"a": "x", "b": None}, nonfinite="zero")
    gradient = {"a": jnp.array([math.nan, 1.0]), "b": jnp.ones(2)}
    updates, _ = clip.update(gradient, clip.init(gradient))
    assert_same(updates, jax.tree.map(jnp.zeros_like, gradient))


@each_method_with_numbers
def test_6_every_schedule_goes_on_with_the_nonfinite_steps(method):
    """As if its numbers were set by hand at every step, the non-finite ones counted in."""
    names = [name for name in method.traced if name != "init"]  # That is read before any step.

    def numbers_at(count):
        share = jnp.asarray(1 - 0.1 * (count % 4), jnp.float32)
        return {name: jnp.float32(method.arguments[name]) * share for name in names}

    def schedule(name):
        return lambda count: numbers_at(count.astype(jnp.float32))[name]

    scheduled = method.build(**{name: schedule(name) for name in names})
    by_schedule, by_hand = quick_jit(scheduled.update), compiled_with_traced_arguments(method)
    own = {name: jnp.float32(method.arguments[name]) for name in method.traced}
    params = {"w": jnp.asarray([[0.6, -0.8], [0.8, 0.6]], jnp.float32)}
    state = expected_state = scheduled.init(params)
    # Past every warm-up, then non-finite steps between steps that are clipped.
    for count in range(60):
        size = (1 + 0.1 * (count % 3)) * (100.0 if count > 40 and count % 5 == 0 else 0.1)
        gradient = {"w": params["w"] * (math.nan if count % 7 == 1 else size)}
        updates, state = by_schedule(gradient, state, params)
        numbers = {**own, **numbers_at(count)}
        expected, expected_state = by_hand(numbers, gradient, expected_state, params)
        assert_close(updates, expected)
        assert_close(state, expected_state, rtol=1e-5)


def test_6_a_schedule_goes_on_with_the_nonfinite_steps():
    clip = optclip.clip_by_global_norm(lambda count: count.astype(jnp.float32) + 1)
    state = clip.init(jnp.ones(2))
    for step, entry in enumerate((1.0, math.nan, 1.0, math.inf, 1.0)):
        _, state = clip.update(jnp.full(2, entry), state)
        assert float(state.threshold) == 1.0 + step
