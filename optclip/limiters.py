"""Limiters: from a norm and its threshold to the factor that multiplies the gradient.

Every limiter is homogeneous, factor(k norm, k threshold) = factor(norm, threshold), and has a
meaning at every pair of non-negative numbers, infinity included: threshold 0 gives 0, threshold
infinity gives 1, and a gradient of norm 0 stays 0. `rescale` and `smooth` never scale up;
`normalize` does.

Factors end in a division on purpose: XLA does not repeat a division for every entry that a factor
multiplies, as it would repeat a comparison and a choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _numerics
from optclip._checks import check_number
from optclip.norms import Magnitude


class Limiter(NamedTuple):
    """How a norm above (or near) its threshold is reduced.

    Attributes:
        name: What messages call it.
        factor: (norm, threshold) -> factor, elementwise: in [0, 1], or for one that scales up
            below its own largest number. Far above the threshold it must fall like
            threshold / norm.
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


LARGEST_FACTOR = 1e30
"""The highest `max_factor` of `normalize`: zeros stay zeros under it."""


def normalize(max_factor: jax.typing.ArrayLike = 1e6) -> Limiter:
    r"""Threshold / norm, also above 1: every gradient gets the threshold's norm, small ones too.

    .. math:: f(n, \tau) = \min(\tau / n, m)

    Args:
        max_factor: m, the largest factor, without a unit; a number or a traced scalar. It is a
            floor of threshold / m under the norm, without which what rounding leaves of a gradient
            of 0 would count as much as a gradient. 1e6 stands where
            `optax.normalize_by_update_norm` has eps=1e-6, for a threshold of 1.

    Returns:
        A `Limiter`. Its threshold is a target. One of infinity leaves the gradient as it is.

    Raises:
        ValueError: If `max_factor` is concrete and not in [1, 1e30].

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> from optclip import limiters, scopes
        >>> by_leaf = optclip.clip_by(1.0, scope=scopes.leaf, limiter=limiters.normalize())
        >>> grads = {"near_loss": jnp.array([30.0, 40.0]), "far_from_it": jnp.array([3e-4, 4e-4])}
        >>> updates, _ = by_leaf.update(grads, None)
        >>> [round(float(x), 4) for x in updates["far_from_it"]]
        [0.6, 0.8]
    """
    check_number(
        max_factor,
        "max_factor=",
        low=1,
        high=LARGEST_FACTOR,
        hint="1 scales nothing up, as limiters.rescale",
        schedule=False,
    )

    def factor(norm: jax.Array, threshold: jax.Array) -> jax.Array:
        asked = jnp.asarray(max_factor).astype(norm.dtype)
        most = jnp.where(asked >= 1, jnp.minimum(asked, LARGEST_FACTOR), 1)  # Of NaN 1.
        opened = jnp.isinf(threshold)
        far = norm * most <= threshold  # Also where the norm is 0.
        above = jnp.where(opened, 1, jnp.where(far, most, threshold))
        return above / jnp.where(opened | far, 1, norm)

    return Limiter("normalize", factor)


class Factor(NamedTuple):
    """A factor as a product, since the product itself may be too small for a float32.

    Attributes:
        coarse: The factor, rounded, or a part of it where that is very small.
        fine: The rest, which also corrects the rounding.
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
    return jnp.where(jnp.isfinite(magnitude.value), _held(left), left)


def _held(x: jax.Array) -> jax.Array:
    """At most the largest number."""
    return jnp.minimum(x, _numerics.largest(x.dtype))


def factor_of(limiter: Limiter, magnitude: Magnitude, threshold: jax.Array) -> Factor:
    """The factor for a norm of any magnitude, right where norm or factor leave float32's range."""
    if limiter is rescale:
        return _rescale_in_two(magnitude, threshold)
    norm, scale = magnitude.clamped(), magnitude.scale
    deep = threshold < norm * 2.0**-60
    root = jnp.sqrt(jnp.where(deep, threshold, 1)) / jnp.sqrt(jnp.where(deep, norm, 1))
    # A constant to derivatives: the fine factor is taken at the norm that the coarse one leaves.
    coarse = lax.stop_gradient(root)
    # A threshold that is too large for a float32 at that scale is no infinite one.
    scaled = jnp.where(jnp.isinf(threshold), threshold, _held(threshold * scale))
    fine = limiter.factor(
        jnp.where(deep, _left(magnitude, coarse), magnitude.value),
        jnp.where(deep, threshold, scaled),
    )
    return Factor(coarse, fine)


def _rescale_in_two(magnitude: Magnitude, threshold: jax.Array) -> Factor:
    """The quotient, or a small one instead; and the threshold over what that leaves.

    The second corrects the rounding of the first: a gradient of one entry is cut to the threshold
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
