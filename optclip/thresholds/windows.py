"""Rules that remember the last norms themselves, in a ring of fixed length per group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _jax
from optclip._checks import check_count, check_number, number_at
from optclip._numerics import square_root
from optclip.thresholds.averages import LearnFrom, check_learn_from, feed
from optclip.thresholds.rules import Rule


@_jax.exportable
class Ring(NamedTuple):
    """The last norms of every group.

    Attributes:
        norms: Shape (window, groups), or (window,) for one group; the oldest is overwritten.
        seen: Norms written so far; int32.
    """

    norms: jax.Array
    seen: jax.Array


def _empty(window: int, norms: jax.Array) -> Ring:
    return Ring(jnp.zeros((window, *norms.shape), norms.dtype), jnp.zeros(norms.shape, jnp.int32))


def _slots(ring: Ring) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, ring.norms.shape, 0)


def _written(ring: Ring, norms: jax.Array) -> Ring:
    window = ring.norms.shape[0]
    here = _slots(ring) == jnp.broadcast_to(ring.seen % window, ring.norms.shape)
    norms = jnp.where(here, jnp.broadcast_to(norms, ring.norms.shape), ring.norms)
    # A count of two windows tells as much as one of two million, and does not overflow.
    return Ring(norms, jnp.where(ring.seen + 1 < 2 * window, ring.seen + 1, window))


def _filled(ring: Ring) -> jax.Array:
    return _slots(ring) < jnp.broadcast_to(ring.seen, ring.norms.shape)


def mean_over_window(
    deviations: optax.ScalarOrSchedule,
    window: int,
    learn_from: LearnFrom = "raw",
) -> Rule:
    """The mean of the last norms plus some of their standard deviations; `optclip.clip_by_window`.

    Args:
        deviations: How many deviations above the mean a norm may be.
        window: How many norms to remember; a plain number. Nothing is clipped before half of them.
        learn_from: See `LearnFrom`.

    Returns:
        A `Rule` that remembers `window` numbers per group.
    """
    window = check_count(window, "window=")
    check_number(deviations, "deviations=", hint="pass jnp.inf to switch it off")
    check_learn_from(learn_from)
    least = 1e-6  # Of the mean: rounding makes a deviation of about that of equal norms.

    def threshold(memory, step, norms, params):
        filled = _filled(memory)
        among = jnp.maximum(jnp.sum(filled.astype(norms.dtype), axis=0), 1)
        peak = jnp.max(jnp.where(filled, memory.norms, 0), axis=0)
        unit = jnp.where(peak > 0, peak, 1)
        # Relative to the largest, so that no square leaves the range.
        shares = memory.norms / jnp.broadcast_to(unit, memory.norms.shape)
        mean = jnp.sum(jnp.where(filled, shares, 0), axis=0) / among
        away = jnp.where(filled, shares - jnp.broadcast_to(mean, shares.shape), 0)
        deviation = square_root(jnp.sum(away * away, axis=0) / among)
        deviation = jnp.maximum(deviation, least * mean)
        limit = (mean + number_at(deviations, step.count, norms) * deviation) * unit
        return jnp.where(memory.seen >= max(window // 2, 1), limit, jnp.inf)

    def observe(memory, step, norms, clipped_norms):
        return _written(memory, feed(learn_from, norms, clipped_norms))

    return Rule(lambda norms: _empty(window, norms), threshold, observe, has_memory=True)


def quantile_over_window(
    percentile: optax.ScalarOrSchedule,
    window: int,
    learn_from: LearnFrom = "raw",
) -> Rule:
    """A percentile of the last norms, this step's included; `optclip.autoclip`.

    Args:
        percentile: Which percentile, in [0, 100], interpolated linearly.
        window: How many norms to look at; a plain number.
        learn_from: See `LearnFrom`. This step's norm is counted before clipping.

    Returns:
        A `Rule` that remembers `window` numbers per group.
    """
    window = check_count(window, "window=")
    check_number(percentile, "percentile=", high=100, hint="AutoClip takes 10")
    check_learn_from(learn_from)

    def threshold(memory, step, norms, params):
        ring = _written(memory, norms)
        ordered = jnp.sort(jnp.where(_filled(ring), ring.norms, jnp.inf), axis=0)
        last = jnp.minimum(ring.seen, window) - 1
        percent = jnp.clip(number_at(percentile, step.count, norms), 0, 100)
        place = percent * last.astype(norms.dtype)  # In hundredths: exact for whole percents.
        below = jnp.floor(place / 100).astype(jnp.int32)
        low, high = (
            jnp.take_along_axis(ordered, jnp.expand_dims(index, 0), axis=0)[0]
            for index in (below, jnp.minimum(below + 1, last))
        )
        return low + (high - low) * ((place - 100 * below.astype(norms.dtype)) / 100)

    def observe(memory, step, norms, clipped_norms):
        return _written(memory, feed(learn_from, norms, clipped_norms))

    return Rule(lambda norms: _empty(window, norms), threshold, observe, has_memory=True)
