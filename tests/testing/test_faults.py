"""A fault for every contract, planted in `clip_by_global_norm`, is found under that contract."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optclip
from optclip.testing import CONTRACTS, check_clip, report
from optclip.testing._samples import is_floating


def changed(max_norm, after, *, init=None, **options):
    """Our clip, its updates handed to `after`."""
    clip = optclip.clip_by_global_norm(max_norm, **options)

    def update(updates, state, params=None):
        clipped, state = clip.update(updates, state, params)
        return after(updates, clipped), state

    return optax.GradientTransformation(init or clip.init, update)


def each_leaf(max_norm, change, **options):
    """Our clip, and then a change of each of its leaves."""
    return changed(max_norm, lambda given, clipped: jax.tree.map(change, clipped), **options)


def widens(max_norm):
    return each_leaf(max_norm, lambda x: x.astype(jnp.float32) if is_floating(x) else x)


def measures_in_the_leafs_type(max_norm):
    def after(given, clipped):
        del clipped
        leaves = [x for x in jax.tree.leaves(given) if is_floating(x)]
        squares = [jnp.sum(jnp.abs(x) ** 2).astype(jnp.float32) for x in leaves]
        norm = jnp.sqrt(sum(squares, jnp.zeros([])))
        factor = jnp.where(norm > max_norm, max_norm / norm, 1)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype) if is_floating(x) else x, given)

    return changed(max_norm, after)


def clips_to_a_little_more(max_norm):
    return changed(
        max_norm,
        lambda given, clipped: jax.tree.map(
            lambda g, x: (
                jnp.where(g == x, x, x * jnp.asarray(1.001, x.dtype)) if is_floating(x) else x
            ),
            given,
            clipped,
        ),
    )


def divides_by_a_norm_of_0(max_norm):
    def after(given, clipped):
        norm = optax.tree.norm([x for x in jax.tree.leaves(given) if is_floating(x)] or 0.0)
        return jax.tree.map(
            lambda x: x + 0 * (norm / norm).astype(x.dtype) if is_floating(x) else x, clipped
        )

    return changed(max_norm, after)


def takes_any_threshold(max_norm):
    return optclip.clip_by_global_norm(lambda count: jnp.abs(max_norm))


class Mean(NamedTuple):
    norms: jax.Array
    count: jax.Array


def learns_of_a_nan(multiplier=3.0):
    def init(params):
        del params
        return Mean(jnp.zeros([]), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        mean = jnp.where(state.count == 0, norm, 0.9 * state.norms + 0.1 * norm)
        limit = multiplier * state.norms
        over = (norm > limit) & (state.count > 0)
        clipped = jax.tree.map(lambda x: jnp.where(over, x * (limit / norm), x), updates)
        return clipped, Mean(mean, state.count + 1)

    return optax.GradientTransformation(init, update)


def rounds_integers(max_norm):
    return each_leaf(max_norm, lambda x: x if is_floating(x) else jnp.asarray(x) * 1.0)


class Counted(NamedTuple):
    clip: Any
    count: Any


def with_count(max_norm, first, following):
    """Our clip with a number beside its state."""
    clip = optclip.clip_by_global_norm(max_norm)

    def update(updates, state, params=None):
        updates, inner = clip.update(updates, state.clip, params)
        return updates, Counted(inner, following(state.count))

    return optax.GradientTransformation(lambda params: Counted(clip.init(params), first()), update)


def counts_in_another_type(max_norm):
    return with_count(max_norm, lambda: jnp.zeros([], jnp.int32), lambda count: count + 0.5)


def counts_in_what_grows(max_norm):
    return with_count(max_norm, tuple, lambda count: (*count, jnp.zeros([])))


def shares_a_buffer(max_norm):
    def first():
        zero = jnp.zeros([])
        return zero, zero

    return with_count(max_norm, first, lambda count: count)


def remembers_outside_of_its_state(max_norm):
    seen = []

    def after(given, clipped):
        seen.append(given)
        return jax.tree.map(lambda x: x / 2, clipped) if len(seen) > 3 else clipped

    return changed(max_norm, after)


MADE = itertools.count(1)


def is_another_when_made_anew(max_norm):
    number = next(MADE)
    return each_leaf(max_norm, lambda x: x * jnp.asarray(number, x.dtype))


def needs_a_tree_of_its_own(max_norm):
    def after(given, clipped):
        del given
        return {**clipped, "a": clipped["a"]}

    return changed(max_norm, after)


def selects_by_a_broadcast_mask(max_norm):
    def change(x):
        if not is_floating(x) or x.ndim < 2:
            return x
        rows = jnp.broadcast_to(jnp.max(jnp.abs(x), axis=0, keepdims=True) >= 0, x.shape)
        return jnp.where(rows, x, -x)

    return each_leaf(max_norm, change)


def ignores_axis_name(max_norm, *, axis_name=None, sharded=None):
    del axis_name, sharded
    return optclip.clip_by_global_norm(max_norm, axis_name=())


def has_a_scale_of_its_own(max_norm):
    def after(given, clipped):
        norm = optax.tree.norm([x for x in jax.tree.leaves(given) if is_floating(x)] or 0.0)
        return jax.tree.map(
            lambda x: x * (norm / (norm + 1e-3)).astype(x.dtype) if is_floating(x) else x,
            clipped,
        )

    return changed(max_norm, after)


@jax.custom_batching.custom_vmap
def largest(x):
    return jnp.max(jnp.abs(x))


@largest.def_vmap
def _largest_of_all(axis_size, in_batched, x):
    del in_batched
    return jnp.broadcast_to(jnp.max(jnp.abs(x)), (axis_size,)), True


def clips_a_batch_together(max_norm):
    def after(given, clipped):
        return jax.tree.map(
            lambda x: jnp.where(largest(x) > 0.05, x / 2, x) if is_floating(x) and x.size else x,
            clipped,
        )

    return changed(max_norm, after)


def prints(max_norm):
    def after(given, clipped):
        del given
        jax.debug.callback(lambda x: None, jax.tree.leaves(clipped)[0])
        return clipped

    return changed(max_norm, after)


FAULTS = {
    "dtypes": widens,
    "norms": measures_in_the_leafs_type,
    "bound": clips_to_a_little_more,
    "zero_and_infinity": divides_by_a_norm_of_0,
    "refusals": takes_any_threshold,
    "nonfinite": learns_of_a_nan,
    "not_floating": rounds_integers,
    "scan": counts_in_another_type,
    "donation": shares_a_buffer,
    "resume": is_another_when_made_anew,
    "composition": needs_a_tree_of_its_own,
    "meshes": selects_by_a_broadcast_mask,
    "shard_map": ignores_axis_name,
    "scale": has_a_scale_of_its_own,
    "vmap": clips_a_batch_together,
    "retrace": counts_in_what_grows,
    "host": prints,
}


def test_there_is_a_fault_for_every_contract():
    assert set(FAULTS) == set(CONTRACTS)


@pytest.mark.parametrize("contract", FAULTS)
def test_it_is_found_and_named(contract):
    with pytest.raises(AssertionError, match=f"{FAULTS[contract].__name__} .*\n  {contract}: "):
        check_clip(FAULTS[contract], contracts=[contract], quick=True)


def test_without_the_fault_nothing_is_found():
    found = report(optclip.clip_by_global_norm, quick=True)
    assert found.kept, found
    assert [x.contract for x in found.results if x.kept is None] == []


def test_what_is_kept_in_python_is_found():
    found = report(remembers_outside_of_its_state, contracts=["retrace"], quick=True)
    assert "another program" in str(found)
