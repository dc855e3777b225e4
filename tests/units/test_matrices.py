"""Singular values against numpy's decomposition: spikes of any size, stacks, axes, narrow types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.samples import quick_jit

import optclip
from optclip import norms, scopes

pytestmark = pytest.mark.usefixtures("strict")


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def soft(matrix, threshold):
    """Its singular values s as s / sqrt(1 + s^2 / c^2), in float64."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left * (values / np.hypot(1, values / threshold))) @ right


def length(matrix):
    return np.linalg.norm(np.asarray(matrix, np.float64), 2)


def orthogonal(seed):
    return np.linalg.qr(normal((48, 48), seed))[0]


MATRICES = {
    "noise": normal((64, 40)),
    "lying": normal((24, 60)),
    "all alike": orthogonal(1),
    "of rank 1": np.outer(normal(40), normal(30, 1)),
    "falling to a millionth": orthogonal(2) * np.geomspace(1, 1e-6, 48) @ orthogonal(3),
    "two near each other": orthogonal(4) * np.r_[1, 1 - 1e-4, np.full(46, 0.5)] @ orthogonal(5),
}


@functools.cache
def measured():
    clip = optclip.clip_by(jnp.inf, scope=scopes.leaf, norm=norms.spectral, detail=True)
    return quick_jit(lambda x: clip.update(x, clip.init(x))[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MATRICES)
def test_the_largest_singular_value(name, dtype):
    rounded = jnp.asarray(MATRICES[name], dtype)
    expected = length(rounded)
    allowed = 1e-4 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(measured()(rounded).norm, expected, rtol=allowed)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_its_magnitude_does_not_matter(size):
    x = jnp.asarray(size * MATRICES["noise"], jnp.float32)
    np.testing.assert_allclose(measured()(x).norm, length(x), rtol=1e-5)


def test_layers_of_a_stack_and_kernels_of_convolutions():
    stack, kernel = normal((3, 8, 6)), normal((3, 3, 4, 5))
    axes = {"stack": (1, 2), "kernel": (0, 1, 2, 3)}
    scope = scopes.unit(lambda path, shape: axes[path])
    clip = optclip.clip_by(jnp.inf, scope=scope, norm=norms.spectral, detail=True)
    tree = {"kernel": jnp.asarray(kernel, jnp.float32), "stack": jnp.asarray(stack, jnp.float32)}
    found = clip.update(tree, clip.init(tree))[1].detail.norms
    right = [length(kernel.reshape(-1, 5)), *map(length, stack)]
    np.testing.assert_allclose(found, right, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [10.0, 1.0, 0.1, 1e-3])
@pytest.mark.parametrize("name", MATRICES)
def test_every_singular_value_is_limited(name, share, dtype):
    rounded = np.asarray(jnp.asarray(MATRICES[name], dtype), np.float64)
    threshold = float(np.float32(share * length(rounded)))
    clip = optclip.clip_singular_values(threshold)
    found = quick_jit(lambda x: clip.update(x, None)[0])(jnp.asarray(rounded, dtype))
    off = length(np.asarray(found, np.float64) - soft(rounded, threshold))
    allowed = 5e-7 / min(share, 1) + (2e-6 if dtype == "float32" else 2e-2)
    assert off <= allowed * min(threshold, length(rounded))


@pytest.mark.parametrize(("times", "allowed"), [(1e2, 1e-4), (1e3, 1e-3), (1e5, 4e-2)])
def test_beside_a_spike_of_any_size_the_rest_is_kept(times, allowed):
    left, right = normal(128, 1), normal(128, 2)
    spike = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    rest = normal((128, 128)) / 30
    x = np.asarray(rest + times * spike, np.float32).astype(np.float64)
    found = optclip.clip_singular_values(1.0).update(jnp.asarray(x, jnp.float32), None)[0]
    assert length(np.asarray(found) - soft(x, 1.0)) <= allowed
    assert length(found) <= 1 + allowed


def test_a_layer_is_limited_whatever_another_is_like():
    x = normal((2, 8, 6))
    x[0] *= 1e20
    clip = optclip.clip_singular_values(0.1, axis=(1, 2))
    found, _ = clip.update(jnp.asarray(x, jnp.float32), None)
    for own, matrix in zip(np.asarray(found), x, strict=True):
        np.testing.assert_allclose(length(own), length(soft(matrix, 0.1)), rtol=1e-4)


@pytest.mark.parametrize("axis", [(1, 2), (2, 1), (0, 2, 1), (2, 0, 1), (-2, -1), 0])
def test_the_axes_of_a_matrix(axis):
    x = normal((3, 6, 5))
    axes = [a % 3 for a in np.atleast_1d(axis)]
    order = [a for a in range(3) if a not in axes] + axes
    turned = np.transpose(x, order)
    columns = x.shape[axes[-1]]
    rows = int(np.prod([x.shape[a] for a in axes[:-1]]))
    limited = np.stack([soft(matrix, 1.0) for matrix in turned.reshape(-1, rows, columns)])
    right = np.transpose(limited.reshape(turned.shape), np.argsort(order))
    clip = optclip.clip_singular_values(1.0, axis=axis)
    np.testing.assert_allclose(clip.update(jnp.asarray(x, jnp.float32), None)[0], right, atol=2e-6)


def test_axes_that_are_none_are_refused():
    tree = {"bias": jnp.ones(3)}
    for axis in ((0, 1), lambda path, shape: (0, 0)):
        clip = optclip.clip_singular_values(1.0, axis=axis)
        with pytest.raises(ValueError, match=r"'bias'.*1 axes.*may answer None"):
            clip.update(tree, clip.init(tree))


def test_leaves_that_are_left_alone():
    tree = {"w": 9 * jnp.eye(3), "b": jnp.full(3, 9.0)}
    clip = optclip.clip_singular_values(
        1.0, axis=lambda path, shape: (0, 1) if len(shape) == 2 else None, detail=True
    )
    updates, state = clip.update(tree, clip.init(tree))
    np.testing.assert_array_equal(updates["b"], tree["b"])
    readings = optclip.metrics(state, tree)
    assert float(readings["clip/norms/b"]) == 0
    np.testing.assert_allclose(readings["clip/norms/w"], 9, rtol=1e-6)
    assert float(readings["clip/clip_rate"]) == 1


def test_which_leaf_is_broken_is_read():
    tree = {"a": jnp.full((2, 2), jnp.nan), "b": jnp.full((2, 2), 5.0)}
    clip = optclip.clip_singular_values(1.0, detail=True)
    detail = clip.update(tree, clip.init(tree))[1].detail
    assert not np.isfinite(detail.norms[0])
    np.testing.assert_allclose(detail.norms[1], 10, rtol=1e-6)


def test_derivatives_are_those_of_differences():
    x, w, v = (jnp.asarray(normal((5, 4), n), jnp.float32) for n in range(3))
    clip = optclip.clip_singular_values(1.0)
    slope = jax.jvp(lambda x: jnp.sum(clip.update(x, None)[0] * w), (x,), (v,))[1]
    wide = [np.asarray(a, np.float64) for a in (x, w, v)]
    ahead, behind = (np.sum(soft(wide[0] + h * wide[2], 1.0) * wide[1]) for h in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-4)
