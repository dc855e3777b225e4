"""Limiters: from a norm and its threshold to the factor that multiplies the gradient.

Every limiter is homogeneous, factor(k norm, k threshold) = factor(norm, threshold), and has a
meaning at every pair of non-negative numbers, infinity included: threshold 0 gives 0, threshold
infinity gives 1, and a gradient of norm 0 is left as it is.

Factors end in a division on purpose: XLA does not repeat a division for every entry that a factor
multiplies, as it would repeat a comparison and a choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _numerics
from optclip.norms import Magnitude


class Limiter(NamedTuple):
    """How a norm above (or near) its threshold is reduced.

    Attributes:
        name: What messages call it.
        factor: (norm, threshold) -> factor in [0, 1], elementwise. Far above the threshold it
            must fall like threshold / norm.
    """

    name: str
    factor: Callable[[jax.Array, jax.Array], jax.Array]


def _rescale(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    over = norm > threshold
    # Where nothing is clipped, 1/1 keeps 0/0 out of values and slopes.
    return jnp.where(over, threshold, 1) / jnp.where(over, norm, 1)


def _smooth(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    # As 1 / (1 + norm / threshold), whose sum cannot overflow where the quotient does not matter.
    opened, closed = jnp.isinf(threshold), threshold == 0
    ratio = norm / jnp.where(opened | closed, 1, threshold)
    return jnp.where(closed & (norm > 0), 0, 1) / (1 + jnp.where(opened | closed, 0, ratio))


rescale = Limiter("rescale", _rescale)
"""The classic clip, min(1, threshold / norm): below the threshold nothing changes."""

smooth = Limiter("smooth", _smooth)
"""threshold / (norm + threshold): every gradient shrinks, none reaches the threshold."""


class Factor(NamedTuple):
    """A factor as a product, since the product itself may be too small for a float32.

    Attributes:
        coarse: The factor, rounded, or a part of it where that is very small.
        fine: The rest, which mends the rounding too.
    """

    coarse: jax.Array
    fine: jax.Array

    def product(self) -> jax.Array:
        """The factor as one number; 0 where it is too small."""
        return self.coarse * self.fine


def clipped_norm(
    limiter: Limiter, magnitude: Magnitude, factor: Factor, threshold: jax.Array
) -> jax.Array:
    """What is left of a norm, which may itself be too large for a float32."""
    if limiter is rescale:  # Without the roundings of a product, which rules would learn from.
        return jnp.minimum(magnitude.clamped(), threshold)
    left = _left(magnitude, factor.coarse) * factor.fine
    most = _numerics.largest(left.dtype)
    return jnp.where(jnp.isfinite(magnitude.value), jnp.minimum(left, most), left)


def factor_of(limiter: Limiter, magnitude: Magnitude, threshold: jax.Array) -> Factor:
    """The factor for a norm of any magnitude, right where norm or factor leave float32's range."""
    if limiter is rescale:
        return _rescale_in_two(magnitude, threshold)
    norm, scale = magnitude.clamped(), magnitude.scale
    deep = threshold < norm * 2.0**-60
    root = jnp.sqrt(jnp.where(deep, threshold, 1)) / jnp.sqrt(jnp.where(deep, norm, 1))
    # A constant to derivatives: the fine factor is taken at the norm that the coarse one leaves.
    coarse = lax.stop_gradient(root)
    fine = limiter.factor(
        jnp.where(deep, _left(magnitude, coarse), magnitude.value),
        jnp.where(deep, threshold, threshold * scale),
    )
    return Factor(coarse, fine)


def _rescale_in_two(magnitude: Magnitude, threshold: jax.Array) -> Factor:
    """The quotient, or a small one instead; and the threshold over what that leaves.

    The second mends the rounding of the first: a gradient of one entry is cut to the threshold
    itself.
    """
    norm = magnitude.clamped()
    over = norm > threshold
    least = norm * jnp.finfo(norm.dtype).tiny
    coarse = jnp.where(over, jnp.maximum(threshold, least), 1) / jnp.where(over, norm, 1)
    coarse = lax.stop_gradient(coarse)
    left = _left(magnitude, coarse)
    return Factor(coarse, jnp.where(over, threshold, 1) / jnp.where(over & (left > 0), left, 1))


def _left(magnitude: Magnitude, coarse: jax.Array) -> jax.Array:
    """What a factor leaves of a norm, which may itself be too large for a float32."""
    # Left to right, so that no product leaves the range: a scale below 1 belongs to a huge value.
    return (
        magnitude.value
        * (coarse / jnp.minimum(magnitude.scale, 1))
        / jnp.maximum(magnitude.scale, 1)
    )


def root_of_factor(limiter: Limiter, magnitude: Magnitude, threshold: jax.Array) -> jax.Array:
    """The square root of the factor: one array in few operations, where there are many groups.

    A leaf is multiplied by it twice. Its slope is 0 where the threshold is 0.
    """
    if limiter is rescale:  # Others may read what changes, and must be called anew each time.
        return _root_of_rescale(magnitude, threshold)
    factor = factor_of(limiter, magnitude, threshold)
    return _numerics.square_root(factor.coarse) * _numerics.square_root(factor.fine)


@jax.jit
def _root_of_rescale(magnitude: Magnitude, threshold: jax.Array) -> jax.Array:
    """For pieces: traced once for all that are alike. Roots are in range where factors are not."""
    norm = _numerics.square_root(magnitude.value) / jnp.sqrt(magnitude.scale)
    return _rescale(norm, _numerics.square_root(threshold))
