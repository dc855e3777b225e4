"""Norms by themselves: monoids with a right way back, and norms of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.running import assert_right
from helpers.strategies import KINDS, TREES, values
from oracles import clips

import optclip
from optclip import _numerics, norms, scopes

pytestmark = pytest.mark.usefixtures("strict")

NORMS = {
    "l1": norms.l1,
    "l2": norms.l2,
    "linf": norms.linf,
    "rms": norms.rms,
    "l0.5": norms.lp(0.5),
    "l1.5": norms.lp(1.5),
    "l7": norms.lp(7),
}

each_norm = pytest.mark.parametrize("name", NORMS)


@each_norm
def test_parts_combine_to_the_whole(name):
    norm, entries = NORMS[name], jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))
    parts = [norm.statistic(part, (0, 1), None) for part in (entries[:1], entries[1:])]
    total = norm.combine(jnp.stack(parts), axis=0)
    assert_right(norm.finish(total, 24).item(), clips.norm(clips.moduli(entries), name))


@each_norm
def test_statistics_keep_dimensions_and_grow_by_the_degree(name):
    norm, entries = NORMS[name], jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)))
    plain, scaled = (norm.statistic(entries, (0, 2), scale) for scale in (None, jnp.float32(8)))
    assert plain.shape == (1, 3, 1)
    assert_right(scaled, np.asarray(plain) * 8.0**norm.degree)


@each_norm
def test_lift_undoes_finish(name):
    norm, statistic = NORMS[name], jnp.array([0.0, 0.25, 3.0])
    sizes = np.array([1.0, 5.0, 7.0])
    assert_right(norm.lift(norm.finish(statistic, sizes), sizes), statistic)


@each_norm
def test_norms_of_groups_pool_to_the_norm_of_all(name):
    norm, parts = NORMS[name], [np.array([3.0, -4.0]), np.array([]), np.array([1e30, 2.0, 0.5])]
    for scale in (1.0, 1e-34, 3e8):
        groups = np.array([clips.norm(np.abs(scale * part), name) for part in parts])
        sizes = np.array([part.size for part in parts], float)
        pooled = norms.pool(norm, [norms.plain(jnp.asarray(groups, jnp.float32))], [sizes])
        right = clips.norm(np.abs(scale * np.concatenate(parts)), name)
        assert_right(np.float64(pooled.value) / np.float64(pooled.scale), right)


@each_norm
def test_every_order_clips(name):
    clip = optclip.clip_by(0.5, norm=NORMS[name])
    for seed, kind in enumerate(KINDS):
        gradient = values(TREES["small"], (kind, "ordinary"), seed)
        (group,) = clips.groups_of(gradient, "tree")
        updates, state = clip.update(gradient, clip.init(gradient))
        before, after = (clips.norm_of(tree, group, name) for tree in (gradient, updates))
        assert_right(state.norm, min(before, float(np.finfo(np.float32).max)), where=kind)
        assert_right(after, min(before, 0.5), where=kind)


def test_orders_with_a_name_are_the_named_norms():
    assert norms.lp(1) is norms.l1
    assert norms.lp(np.float32(2)) is norms.l2
    assert norms.lp(float("inf")) is norms.linf
    assert norms.lp(3).name == "l3"


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [
        ("float8_e5m2", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("complex64", "float32"),
        ("float64", "float64"),
        ("complex128", "float64"),
    ],
)
def test_what_a_leaf_is_measured_in(x64, dtype, accumulator):
    assert _numerics.accumulator(jnp.dtype(dtype)) == jnp.dtype(accumulator)
    statistic = norms.l2.statistic(jnp.ones(3, dtype), (0,), None)
    assert statistic.dtype == jnp.dtype(accumulator)


def test_a_norm_of_ones_own_for_whole_leaves():
    def largest_singular_value(x, axes, scale):
        matrix = norms.read(x, scale)
        return jnp.linalg.norm(matrix, ord=2, axis=(0, 1), keepdims=True)

    spectral = norms.linf._replace(
        name="spectral", statistic=largest_singular_value, combine=None, safety="exact"
    )
    clip = optclip.clip_by(1.0, scope=scopes.leaf, norm=spectral, detail=True)
    gradient = {"a": jnp.diag(jnp.array([3.0, 0.5])), "b": jnp.diag(jnp.array([0.5, 0.25]))}
    updates, state = clip.update(gradient, clip.init(gradient))
    assert_right(state.detail.norms, [3.0, 0.5])
    assert_right(updates["a"], np.diag([1.0, 0.5 / 3]))
    assert_right(updates["b"], gradient["b"])
    assert_right(state.norm, 3.0)


def test_the_modulus_of_a_complex_zero_has_slope_0():
    slope = jax.grad(lambda x: jnp.sum(_numerics.modulus(x)))(jnp.zeros(2, jnp.complex64))
    assert not np.any(np.asarray(slope))
