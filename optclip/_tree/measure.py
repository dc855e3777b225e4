"""The norms of a tree, right at every magnitude."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optclip import _numerics, norms
from optclip._tree import devices, pieces, ranges
from optclip._tree.layout import Layout, select_leaves
from optclip._tree.pieces import PerGroup
from optclip._tree.statistics import finished, statistics_of
from optclip.norms import Magnitude, Norm


def measure(layout: Layout, norm: Norm, tree: Any) -> Magnitude:
    """The norms of all groups, right whatever their size; see `measure_together`."""
    (found,) = measure_together(layout, norm, tree)
    return found.blocks[0]


def measure_together(
    layout: Layout, norm: Norm, *trees: Any, gathered: bool = True
) -> list[PerGroup[Magnitude]]:
    """The norms of all groups of several trees, with one sum over the devices for all of them.

    Args:
        layout: From `layout` for the first tree or one of its structure.
        norm: The norm.
        *trees: Updates, or updates and parameters.
        gathered: Whether the vector of all groups is wanted, or only the pieces.

    Returns:
        For each tree its norms.
    """
    forest = [select_leaves(layout, tree) for tree in trees]
    if layout.dtype == jnp.float64:  # Beside 64-bit leaves the others are measured in 64 bits too.
        forest = [[_numerics.widened(x, layout.dtype) for x in leaves] for leaves in forest]
    if norm.safety == "range":
        if any(norms.can_leave_range(x.dtype) for leaves in forest for x in leaves):
            return ranges.measured(layout, norm, forest, gathered)
        plain = statistics_of(layout, norm, forest, [None] * len(forest))
        return [finished(layout, norm, x, 1, gathered) for x in plain]
    # The modulus of a complex number may overflow where its parts do not: by a factor below 2.
    halves = [0.5 if any(jnp.iscomplexobj(x) for x in leaves) else 1 for leaves in forest]
    halved = [None if half == 1 else _everywhere(layout, half) for half in halves]
    if norm.safety == "exact":
        statistics = statistics_of(layout, norm, forest, halved)
        pairs = zip(statistics, halves, strict=True)
        return [finished(layout, norm, x, half, gathered) for x, half in pairs]
    peaks = statistics_of(layout, norms.linf, forest, halved)
    # A constant to derivatives: any other scale would give the same norm.
    scales = [
        {
            at: lax.stop_gradient(norms.peak_scale(x, jnp.full([], half, layout.dtype)))
            for at, x in peak.items()
        }
        for peak, half in zip(peaks, halves, strict=True)
    ]
    statistics = statistics_of(layout, norm, forest, scales)
    pairs = zip(statistics, scales, strict=True)
    return [finished(layout, norm, x, scale, gathered) for x, scale in pairs]


def _everywhere(layout: Layout, value: float) -> pieces.Pieces:
    """The same number for every group."""
    number = jnp.full([], value, layout.dtype)
    return {member.start: number for member in layout.members}


def share_above(layout: Layout, updates: optax.Updates, threshold: jax.Array) -> jax.Array:
    """The share of entries whose modulus is above the threshold."""

    def count(x: jax.Array) -> jax.Array:
        dtype = _numerics.accumulator(x.dtype)
        bound, one = threshold.astype(dtype), jnp.ones([], dtype)
        steep = jnp.full([], _numerics.largest(dtype), dtype)
        x, bound, steep, one = _numerics.computed_anew(x, bound, steep, one)
        # As arithmetic, which XLA fuses into the sum on every backend, and not as a comparison.
        excess = jnp.maximum(_numerics.modulus(_numerics.widened(x)), bound) - bound
        return jnp.sum(jnp.minimum(excess * steep, one)).astype(layout.dtype)

    counts = [jnp.zeros([], layout.dtype)]
    for member, x in zip(layout.members, select_leaves(layout, updates), strict=True):
        counts.append(count(x) / member.sharding.copies)
    total = _numerics.in_pairs(lax.add, counts)
    if layout.axis_names:
        total = lax.psum(devices.as_varying(total, layout.axis_names), layout.axis_names)
    return total / np.maximum(layout.sizes, 1).astype(layout.dtype)
