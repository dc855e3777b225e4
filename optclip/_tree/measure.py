"""The norms of a tree: one pass over its leaves, one sum over the devices.

Inside `shard_map` each device puts the statistics of its parts in their places, and one sum over
the mesh both adds up what is split and gathers what is not.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optclip import _numerics, norms
from optclip._tree import devices, pieces
from optclip._tree.layout import GroupedLeaf, Layout, select_leaves
from optclip._tree.pieces import PerGroup, Pieces
from optclip.norms import Magnitude, Norm


def measure(layout: Layout, norm: Norm, tree: Any) -> Magnitude:
    """The norms of all groups, right whatever their size; see `measure_together`."""
    return measure_together(layout, norm, tree)[0].vector


def measure_together(layout: Layout, norm: Norm, *trees: Any) -> list[PerGroup[Magnitude]]:
    """The norms of all groups of several trees, with one sum over the devices for all of them.

    Args:
        layout: From `layout` for the first tree or one of its structure.
        norm: The norm.
        *trees: Updates, or updates and parameters.

    Returns:
        For each tree its norms, with the pieces.
    """
    forest = [select_leaves(layout, tree) for tree in trees]
    if layout.dtype == jnp.float64:  # Beside 64-bit leaves the others are measured in 64 bits too.
        forest = [[_numerics.widened(x, layout.dtype) for x in leaves] for leaves in forest]
    # The modulus of a complex number may overflow where its parts do not: by a factor below 2.
    halving = [any(jnp.iscomplexobj(x) for x in leaves) for leaves in forest]
    halves = [_everywhere(layout, 0.5 if halve else 1) for halve in halving]
    halved = [half.pieces if halve else None for half, halve in zip(halves, halving, strict=True)]
    if norm.safety == "exact":
        statistics = _joined(layout, _statistics(layout, norm, forest, halved))
        return _finished(layout, norm, statistics, halves)
    if norm.safety == "peak":
        peaks = _statistics(layout, norms.linf, forest, halved)
        # A constant to derivatives: any other scale would give the same norm.
        scales = [
            {at: lax.stop_gradient(norms.peak_scale(x, half.pieces[at])) for at, x in peak.items()}
            for peak, half in zip(peaks, halves, strict=True)
        ]
        statistics = _joined(layout, _statistics(layout, norm, forest, scales))
        together = [pieces.concatenate(layout, scale, missing=1) for scale in scales]
        scales = [PerGroup(*both) for both in zip(together, scales, strict=True)]
        return _finished(layout, norm, statistics, scales)
    plain = _joined(layout, _statistics(layout, norm, forest, [None] * len(forest)))
    if not any(norms.can_leave_range(x.dtype) for leaves in forest for x in leaves):
        return _finished(layout, norm, plain, [_everywhere(layout, 1) for _ in forest])
    scales = [
        PerGroup(
            norms.range_scale(norm, of.vector, layout.sizes),
            {at: _range_scale(norm, x, layout.size_at(at)) for at, x in of.pieces.items()},
        )
        for of in plain
    ]

    def again(forest: list[list[jax.Array]], scales: list[Pieces]) -> list[PerGroup[jax.Array]]:
        return _joined(layout, _statistics(layout, norm, forest, scales, compact=True))

    needed = functools.reduce(
        jnp.logical_or, [jnp.any(scale.vector != 1) for scale in scales], jnp.zeros([], bool)
    )
    corrected = _numerics.where_needed(
        needed,
        again,
        lambda forest, scales: jax.tree.map(jnp.zeros_like, plain),
        forest,
        [scale.pieces for scale in scales],
    )
    statistics = jax.tree.map(functools.partial(jnp.where, needed), corrected, plain)
    return _finished(layout, norm, statistics, scales)


def _joined(layout: Layout, forest: list[Pieces]) -> list[PerGroup[jax.Array]]:
    return [PerGroup(pieces.concatenate(layout, some), some) for some in forest]


def _everywhere(layout: Layout, value: float) -> PerGroup[jax.Array]:
    """The same number for every group."""
    number = jnp.full([], value, layout.dtype)
    return PerGroup(number, {member.start: number for member in layout.members})


def _finished(
    layout: Layout,
    norm: Norm,
    statistics: list[PerGroup[jax.Array]],
    scales: list[PerGroup[jax.Array]],
) -> list[PerGroup[Magnitude]]:
    found = []
    for statistic, scale in zip(statistics, scales, strict=True):
        together = Magnitude(norm.finish(statistic.vector, layout.sizes), scale.vector)
        by_piece = {
            at: Magnitude(_finish(norm, x, layout.size_at(at)), scale.pieces[at])
            for at, x in statistic.pieces.items()
        }
        found.append(PerGroup(together, by_piece))
    return found


def _of_piece(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """(norm, statistic, size) -> array, traced once for all pieces that are alike.

    With norms of others as it is: they may read what changes, and need not be hashable.
    """
    traced_once = jax.jit(function, static_argnums=(0, 2))

    def of_piece(norm: Norm, statistic: jax.Array, size: np.float64) -> jax.Array:
        ours = any(norm is own for own in (norms.l1, norms.l2, norms.rms))
        return (traced_once if ours else function)(norm, statistic, size)

    return of_piece


_range_scale = _of_piece(norms.range_scale)
_finish = _of_piece(lambda norm, statistic, size: norm.finish(statistic, size))


def _statistics(
    layout: Layout,
    norm: Norm,
    forest: list[list[jax.Array]],
    scales: Sequence[Pieces | None],
    *,
    compact: bool = False,
) -> list[Pieces]:
    """One pass over the leaves of each tree: the statistic of every group, over all devices."""
    own = [
        _statistics_here(layout, norm, leaves, scale, compact)
        for leaves, scale in zip(forest, scales, strict=True)
    ]
    if not layout.axis_names:
        return own
    vectors = [devices.as_varying(pieces.concatenate(layout, x), layout.axis_names) for x in own]
    if len(vectors) == 1:
        return [pieces.split(layout, norm.across(vectors[0], layout.axis_names))]
    return [pieces.split(layout, x) for x in norm.across(jnp.stack(vectors), layout.axis_names)]


def _statistics_here(
    layout: Layout, norm: Norm, leaves: list[jax.Array], scale: Pieces | None, compact: bool
) -> Pieces:
    """One pass over the leaves of a tree: the statistic of every group, on this device.

    Args:
        layout: The layout.
        norm: The norm.
        leaves: Those that take part.
        scale: What each group is multiplied by first; None for 1.
        compact: Whether to compile fast rather than to run fast.
    """
    members = list(zip(layout.members, leaves, _scales(layout, scale), strict=True))
    if compact and norm.entries is not None and norm.combine is jnp.sum and layout.shape == ():
        return {0: _total_of_alike(layout, norm.entries, members)} if members else {}
    found: dict[int, list[jax.Array]] = {}
    for member, x, own_scale in members:
        statistic = norm.statistic(x, member.axes, own_scale)
        if statistic.dtype != layout.dtype:
            statistic = statistic.astype(layout.dtype)
        if norm.adds and member.sharding.copies > 1:
            statistic = statistic / member.sharding.copies
        found.setdefault(member.start, []).append(pieces.scatter(member, statistic))
    return {start: _combined(norm, some) for start, some in found.items()}


def _scales(layout: Layout, scale: Pieces | None) -> Sequence[jax.Array | None]:
    return [None] * len(layout.members) if scale is None else pieces.for_each_leaf(layout, scale)


def _combined(norm: Norm, statistics: list[jax.Array]) -> jax.Array:
    if len(statistics) == 1 or norm.combine is None:
        return statistics[0]
    in_two = {jnp.sum: lax.add, jnp.max: lax.max}.get(norm.combine)
    if in_two is None:
        return norm.combine(jnp.stack(statistics), axis=0)
    return _numerics.in_pairs(in_two, statistics)


TOGETHER = 8
"""How many leaves `_total_of_alike` adds up entry by entry."""


def _total_of_alike(
    layout: Layout,
    entries: Callable[..., jax.Array],
    members: list[tuple[GroupedLeaf, jax.Array, jax.Array | None]],
) -> jax.Array:
    """The statistic of the whole tree, in few kernels: one for several leaves that are alike.

    For a rarely needed second look at a tree of a thousand leaves, which would otherwise cost as
    long to compile as the first. Leaves are alike where their paths differ in numbers only, as
    those of repeated layers do: those lie alike on a mesh too, and can be added without traffic.
    What JAX knows to lie differently (on explicit axes, in `shard_map`) is not alike.
    """
    alike: dict[Any, list[tuple[jax.Array, jax.Array | None]]] = {}
    for member, x, scale in members:
        role = re.sub(r"\d+", "#", member.path)
        key = (role, jax.typeof(x), member.sharding.copies)
        alike.setdefault(key, []).append((x, scale))
    totals = []
    for (*_, copies), some in alike.items():
        for first in range(0, len(some), TOGETHER):
            chosen = some[first : first + TOGETHER]
            scale = chosen[0][1]  # The tree's one scale, for this kernel.
            terms = _numerics.in_pairs(lax.add, [entries(x, scale) for x, _ in chosen])
            totals.append(jnp.sum(terms).astype(layout.dtype) / copies)
    return _numerics.in_pairs(lax.add, totals)


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
