"""Contract 2: norms are right for every type, magnitude, number of entries, scope and norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.running import (
    assert_entries_right,
    assert_right,
    clip_state,
    compiled,
    each_method_with_detail,
    held,
    in_one,
    start,
)
from helpers.samples import ALL_METHODS, quick_jit
from helpers.strategies import KINDS, TREES, few, fillings, values
from hypothesis import given
from oracles import clips
from oracles.methods import oracle_of

import optclip
from optclip import norms, scopes

pytestmark = pytest.mark.usefixtures("strict")

NORMS = {
    "l1": norms.l1,
    "l2": norms.l2,
    "l3": norms.lp(3),
    "linf": norms.linf,
    "rms": norms.rms,
}
SCOPES = {
    "tree": scopes.tree,
    "leaf": scopes.leaf,
    "unit": scopes.unit(),
    "group": scopes.group(lambda path: path[:1]),
}

MANY = np.random.default_rng(0).uniform(0.1, 0.2, 4_000_037).astype(np.float32)

each_of_all = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
each_norm = pytest.mark.parametrize("norm", NORMS)


@each_method_with_detail
@few(25)
@given(filling=fillings())
def test_2_norms_are_right_in_every_group(method, filling):
    begin = start(method, "types", detail=True)
    gradient = values(TREES["types"], *filling)
    outcome = begin.oracle.peek(gradient, begin.params)
    _, state = compiled(method, detail=True)(gradient, begin.state, begin.params)
    state = clip_state(state)
    assert int(state.nonfinite_steps) == 0
    assert_right(state.norm, held(outcome.norm), where="norm")
    right = held(norms_in_detail(begin.oracle, gradient, begin.params))
    assert_right(in_one(state.detail.norms), right)


def norms_in_detail(oracle, gradient, params):
    """The norms of all groups, or of all leaves where there is one group."""
    groups = oracle.peek(gradient, params).groups
    if oracle.scope == "tree":
        groups = clips.groups_of(gradient, "leaf")
    return [oracle.measure(gradient, params, group) for group in groups]


@each_norm
@pytest.mark.parametrize("scope", SCOPES)
def test_2_norms_are_right_in_every_scope(scope, norm):
    clip = optclip.clip_by(1.0, scope=SCOPES[scope], norm=NORMS[norm], detail=scope != "tree")
    oracle = clips.Clip(1.0, scope, norm, label=lambda path: path[:1])
    # As XLA optimizes it for a run, but for some, which say no more and compile for long.
    update = (jax.jit if norm in ("l2", "linf") else quick_jit)(clip.update)
    for seed, kind in enumerate(KINDS):
        gradient = values(TREES["types"], (kind, "ordinary") if seed % 2 else (kind,), seed)
        outcome = oracle.step(gradient)
        updates, state = update(gradient, clip.init(gradient))
        assert_right(state.norm, held(outcome.norm), where=kind)
        if scope != "tree":
            assert_right(in_one(state.detail.norms), held(outcome.norms), where=kind)
        assert_entries_right(updates, outcome.updates)


@pytest.mark.parametrize("detail", [False, True], ids=["", "detail"])
@each_norm
@pytest.mark.parametrize("entry", ["float32", "bfloat16", "complex64"])
def test_2_a_norm_beyond_float32_is_that_of_a_finite_gradient(entry, norm, detail):
    largest = jnp.asarray(3e38 + 3e38j if entry == "complex64" else 3e38, entry)
    gradient = {"a": jnp.full(3, largest), "b": largest}
    clip = optclip.clip_by(1.0, norm=NORMS[norm], detail=detail)
    updates, state = clip.update(gradient, clip.init(gradient))
    outcome = clips.Clip(1.0, kind=norm).step(gradient)
    assert int(state.nonfinite_steps) == 0
    assert_entries_right(updates, outcome.updates)
    assert_right(state.norm, held(outcome.norms[0]))
    assert_right(state.clipped_norm, 1.0)


@each_norm
def test_2_norms_of_many_entries_and_of_many_leaves(norm):
    clip = optclip.clip_by(1.0, norm=NORMS[norm])
    for name, gradient in {
        "4M positive entries": {"a": MANY},
        "the largest of float16": {"a": jnp.full((30, 20), 65504, jnp.float16)},
        "300 leaves": [jnp.full(7, 1 + place, jnp.bfloat16) for place in range(300)],
    }.items():
        _, state = clip.update(gradient, clip.init(gradient))
        (group,) = clips.groups_of(gradient, "tree")
        assert_right(state.norm, clips.norm_of(gradient, group, norm), where=name)


@each_norm
@pytest.mark.parametrize("scope", ["tree", "unit"])
def test_2_norms_of_64_bit_leaves(x64, scope, norm):
    random = np.random.default_rng(0)
    clip = optclip.clip_by(1.0, scope=SCOPES[scope], norm=NORMS[norm], detail=scope != "tree")
    oracle, update = clips.Clip(1.0, scope, norm), quick_jit(clip.update)
    for size in (1.0, 0.0, 1e200, 1e-200, 1e30, 1e-30):
        gradient = {
            "a": jnp.asarray(size * random.normal(size=(3, 4)), jnp.float64),
            "b": jnp.asarray(size * (random.normal(size=5) + 1j), jnp.complex128),
        }
        outcome, where = oracle.step(gradient), f"entries about {size}"
        updates, state = update(gradient, clip.init(gradient))
        exactly = {"rtol": 1e-12, "err_msg": where}
        np.testing.assert_allclose(np.asarray(state.norm), outcome.norm, **exactly)
        if scope != "tree":
            np.testing.assert_allclose(in_one(state.detail.norms), outcome.norms, **exactly)
        for place in ("a", "b"):
            assert updates[place].dtype == gradient[place].dtype
            right = outcome.updates[place]
            np.testing.assert_allclose(np.asarray(updates[place]), right, **exactly)


@each_norm
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_2_norms_of_32_bit_leaves_beside_64_bit_ones(x64, scope, norm):
    clip = optclip.clip_by(1.0, scope=SCOPES[scope], norm=NORMS[norm])
    oracle, update = clips.Clip(1.0, scope, norm), quick_jit(clip.update)
    for narrow in (0.0, 1.0, 1e30, 1e-30):
        for broad in (0.0, 1.0, 1e200, 1e-200):
            gradient = {
                "a": jnp.full((2, 3), narrow, jnp.float32),
                "b": jnp.full(4, narrow, jnp.bfloat16),
                "c": jnp.full(5, broad, jnp.float64),
            }
            outcome, where = oracle.step(gradient), f"{narrow} beside {broad}"
            updates, state = update(gradient, clip.init(gradient))
            assert int(state.nonfinite_steps) == 0, where
            np.testing.assert_allclose(float(state.norm), outcome.norm, rtol=1e-5, err_msg=where)
            right = outcome.updates["c"]
            np.testing.assert_allclose(np.asarray(updates["c"]), right, rtol=1e-5, err_msg=where)
            for place in ("a", "b"):
                assert_entries_right(updates[place], outcome.updates[place])


@each_of_all
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_2_a_gradient_wider_than_the_parameters_is_read_as_wide_as_the_state(x64, method, size):
    """The state is as wide as its parameters; a norm that it cannot hold is its largest number."""
    params = {"a": jnp.asarray([[3.0, 4.0], [0.0, 0.0]], jnp.float32), "b": jnp.ones(2)}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    gradient = jax.tree.map(lambda x: x.astype(jnp.float64) * size, params)
    transform = method.build()
    updates, state = quick_jit(transform.update)(gradient, transform.init(params), params)
    for read, x in optclip.metrics(state).items():
        assert not jnp.isnan(x), read
        if read.endswith("norm"):
            assert x.dtype == jnp.float32
            assert jnp.isfinite(x), read
        if read.endswith("nonfinite_steps"):
            assert x == 0
    for before, after in zip(jax.tree.leaves(gradient), jax.tree.leaves(updates), strict=True):
        assert after.dtype == before.dtype
        assert jnp.all(jnp.isfinite(after))
        assert method.scales_up or jnp.all(jnp.abs(after) <= jnp.abs(before))


@each_method_with_detail
def test_2_leaves_whose_paths_read_alike_are_measured_each(method):
    gradient = {"a": {"b/c": jnp.full(2, 3.0)}, "a/b": {"c": jnp.full(2, 4.0)}}
    params = {"a": {"b/c": jnp.full(2, 1.0)}, "a/b": {"c": jnp.full(2, 2.0)}}
    transform = method.build(detail=True)
    _, state = transform.update(gradient, transform.init(params), params)
    expected = norms_in_detail(oracle_of(method), gradient, params)
    assert_right(in_one(clip_state(state).detail.norms), expected)
