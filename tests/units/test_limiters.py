"""Limiters by themselves: their values, their edges, and factors too small for a float32."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.running import assert_right
from oracles import clips

import optclip
from optclip import limiters
from optclip.norms import Magnitude

pytestmark = pytest.mark.usefixtures("strict")

PAIRS = {
    "rescale": (limiters.rescale, clips.rescale),
    "smooth": (limiters.smooth, clips.smooth),
    "normalize": (limiters.normalize(), clips.normalize),
}
SIZES = (0.0, 1e-30, 0.5, 1.0, 4.0, 1e30, math.inf)

each_limiter = pytest.mark.parametrize("name", PAIRS)


@each_limiter
def test_values(name):
    limiter, right = PAIRS[name]
    pairs = list(itertools.product(SIZES[:-1], SIZES))
    sizes, thresholds = (jnp.asarray(column, jnp.float32) for column in zip(*pairs, strict=True))
    assert_right(limiter.factor(sizes, thresholds), [right(*pair) for pair in pairs])


def test_what_the_smooth_one_does_at_and_below_the_threshold():
    factors = limiters.smooth.factor(jnp.array([0.0, 0.01, 1.0, 99.0]), jnp.ones(4))
    assert_right(factors, [1.0, 1 / 1.01, 0.5, 0.01])


@each_limiter
def test_they_are_homogeneous(name):
    factor = PAIRS[name][0].factor
    sizes, thresholds = jnp.array([0.3, 2.0, 5.0]), jnp.array([1.0, 1.0, 0.5])
    for scale in (1e-20, 8.0, 1e20):
        scale = jnp.float32(scale)
        assert_right(factor(scale * sizes, scale * thresholds), factor(sizes, thresholds))


@each_limiter
@pytest.mark.parametrize("scale", [1.0, 2.0**-80, 2.0**90])
def test_factors_of_any_size(name, scale):
    limiter, right = PAIRS[name]
    for size, threshold in itertools.product((1e-30, 1.0, 1e30, 1e38), (1e-30, 1e-10, 1.0, 1e30)):
        if 1e-12 < size * scale < 1e16:  # As far from 1 as a measurement leaves a value.
            magnitude = Magnitude(jnp.float32(size * scale), jnp.float32(scale))
            factor = limiters.factor_of(limiter, magnitude, jnp.float32(threshold))
            product = float(factor.coarse) * float(factor.fine)
            np.testing.assert_allclose(product, right(size, threshold), rtol=1e-5)
            assert_right(factor.product(), right(size, threshold))
            left = limiters.clipped_norm(limiter, magnitude, factor, jnp.float32(threshold))
            assert_right(left, size * right(size, threshold))


def test_a_limiter_of_ones_own():
    def half_way(norm, threshold):
        over = norm > threshold
        return jnp.where(over, (norm + threshold) / 2, 1) / jnp.where(over, norm, 1)

    limiter = limiters.Limiter("half way", half_way)
    gradient = jnp.array([3.0, -0.5, 0.0])
    expected = np.array([3.0, -0.5, 0.0]) * (1 + 1 / math.hypot(3, 0.5)) / 2
    clip = optclip.clip_by(1.0, limiter=limiter)
    updates, state = clip.update(gradient, clip.init(gradient))
    assert_right(updates, expected)
    assert_right(state.clipped_norm, math.hypot(*expected))
