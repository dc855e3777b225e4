"""The norms of a tree, right at every magnitude."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optclip import _numerics, norms
from optclip._numerics import Axes
from optclip._tree import devices, pieces, ranges
from optclip._tree.layout import Layout, select_leaves
from optclip._tree.pieces import PerGroup
from optclip._tree.statistics import by_group, finished, over_devices, statistics_of
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
    if norm.combine is None:
        forest = [
            [pieces.whole(*each, each[0].axes) for each in zip(layout.members, leaves, strict=True)]
            for leaves in forest
        ]
    if layout.dtype == jnp.float64:  # Beside 64-bit leaves the others are measured in 64 bits too.
        forest = [[_numerics.widened(x, layout.dtype) for x in leaves] for leaves in forest]
    if norm.safety == "range":
        if any(norms.can_leave_range(x.dtype) for leaves in forest for x in leaves):
            return ranges.measured(layout, norm, forest, gathered)
        plain = statistics_of(layout, norm, forest, [None] * len(forest))
        return [finished(layout, norm, x, 1, gathered) for x in plain]
    halves = [room_for_moduli(leaves) for leaves in forest]
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


def of_what_moves(
    layout: Layout,
    norm: Norm,
    leaves: Layout,
    both: list[Magnitude],
    whole: PerGroup[Magnitude],
) -> tuple[PerGroup[Magnitude], jax.Array]:
    """The norms of parameters whose updates are not zero, and how many entries those have.

    Args:
        layout: Of the groups.
        norm: The norm.
        leaves: Of the same leaves, with groups that stay within a leaf.
        both: The norms of their updates and of their parameters.
        whole: The norms of the groups of parameters; those they are where all move, or nothing.
    """
    updates, params = both
    moving = updates.value != 0  # Also what is not finite.
    moving |= ~jnp.any(moving)
    entries = jnp.where(moving, leaves.sizes.astype(leaves.dtype), 0)
    own = params._replace(value=jnp.where(moving, params.value, 0))
    parts = pooled(layout, norm, leaves, own, entries)
    chosen = [
        jax.tree.map(functools.partial(jnp.where, jnp.all(moving)), *each)
        for each in zip(whole.blocks, parts.blocks, strict=True)
    ]
    by_piece = {0: chosen[0]} if layout.shape == () else {}
    sums = [jnp.sum(entries[at], axis=-1) for at in _parts_of_groups(layout, leaves)]
    return PerGroup(chosen, by_piece), _in_one(layout, sums)


def pooled(
    layout: Layout,
    norm: Norm,
    leaves: Layout,
    of_leaves: Magnitude,
    sizes: np.ndarray | jax.Array,
) -> PerGroup[Magnitude]:
    """The norms of groups from those of their leaves.

    Args:
        layout: Of the groups.
        norm: The norm.
        leaves: Of the same leaves, with groups that stay within a leaf.
        of_leaves: The norms of those.
        sizes: Entries of each.
    """
    of_leaves = Magnitude(*jnp.broadcast_arrays(*of_leaves))

    def of_group(parts: Magnitude, sizes: np.ndarray | jax.Array) -> Magnitude:
        return norms.pool(norm, [parts], [sizes])

    found = [
        (jax.vmap(of_group) if at.ndim == 2 else of_group)(
            Magnitude(*(x[at] for x in of_leaves)),
            jnp.asarray(sizes[at], layout.dtype) if at.ndim == 2 else sizes[at],
        )
        for at in _parts_of_groups(layout, leaves)
    ]
    if layout.shape == ():
        return PerGroup(found, {0: found[0]})
    return PerGroup([jax.tree.map(lambda *x: _in_one(layout, list(x)), *found)], {})


def _parts_of_groups(layout: Layout, leaves: Layout) -> list[np.ndarray]:
    """Which parts belong to a group: for each group a vector, for all layers of a stack a matrix.

    In the order of the groups.
    """
    if layout.shape == ():
        return [np.arange(leaves.sizes.size)]
    found: dict[int, list[np.ndarray]] = {}
    for member, part in zip(layout.members, leaves.members, strict=True):
        own = part.start + np.arange(part.groups)
        found.setdefault(member.start, []).append(own)
    shared = {member.start for member in layout.members if member.shared}
    absent = set(range(layout.shape[0])) - {
        start + place for start, (own, *_) in found.items() for place in range(len(own))
    }
    empty = {start: [np.zeros(0, int)] for start in absent}  # A label that no leaf has.
    return [
        np.stack(own, axis=1) if start in shared else np.concatenate(own)
        for start, own in sorted((found | empty).items())
    ]


def _in_one(layout: Layout, found: list[jax.Array]) -> jax.Array:
    """The vector of all groups, from numbers and vectors in their order."""
    if layout.shape == ():
        return found[0]
    if any(x.ndim for x in found):
        return jnp.concatenate([jnp.atleast_1d(x) for x in found])
    return jnp.stack(found)


def room_for_moduli(leaves: list[jax.Array]) -> float:
    """What to multiply entries by first: the modulus of a complex number may overflow."""
    return 0.5 if any(map(jnp.iscomplexobj, leaves)) else 1


def _everywhere(layout: Layout, value: float) -> pieces.Pieces:
    """The same number for every group."""
    number = jnp.full([], value, layout.dtype)
    return {member.start: number for member in layout.members}


def largest_and_share(
    layout: Layout, updates: optax.Updates, bound: jax.Array
) -> tuple[PerGroup[Magnitude], jax.Array]:
    """The largest entry of every group, and the share of all entries above a bound.

    The share means nothing where an entry is not finite.
    """
    ways = {"cpu": _in_two_looks, "default": _in_one_look}
    own = {platform: functools.partial(way, layout) for platform, way in ways.items()}
    return _numerics.by_platform(own, updates, bound)


def _in_two_looks(
    layout: Layout, updates: optax.Updates, bound: jax.Array
) -> tuple[PerGroup[Magnitude], jax.Array]:
    """Counting reads the gradient once more, so it is left out where nothing is above."""
    (found,) = measure_together(layout, norms.linf, updates)
    above = jnp.any(found.blocks[0].clamped() > bound)
    share = _numerics.where_needed(
        above,
        lambda updates: share_above(layout, updates, bound),
        lambda updates: 0 * above.astype(layout.dtype),
        updates,
    )
    return found, share


def _in_one_look(
    layout: Layout, updates: optax.Updates, bound: jax.Array
) -> tuple[PerGroup[Magnitude], jax.Array]:
    leaves = select_leaves(layout, updates)
    if layout.dtype == jnp.float64:
        leaves = [_numerics.widened(x, layout.dtype) for x in leaves]
    half = room_for_moduli(leaves)

    def look(axes: Axes, x: jax.Array) -> tuple[jax.Array, ...]:
        dtype = _numerics.accumulator(x.dtype)
        size = _numerics.modulus(_numerics.scaled(_numerics.widened(x), jnp.full([], half, dtype)))
        above = (size > (half * bound).astype(dtype)).astype(dtype)
        size = _numerics.infinite_unless_finite(size)
        return _numerics.reduced_together((lax.max, lax.add), axes, size, above)

    found = [look(member.axes, x) for member, x in zip(layout.members, leaves, strict=True)]
    peaks, counts = [peak for peak, _ in found], [jnp.sum(above) for _, above in found]
    of_groups = over_devices(layout, norms.linf, [by_group(layout, norms.linf, peaks)])[0]
    share = _share(layout, [x.astype(layout.dtype) for x in counts])
    return finished(layout, norms.linf, of_groups, half, gathered=True), share


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

    return _share(layout, [count(x) for x in select_leaves(layout, updates)])


def _share(layout: Layout, counts: list[jax.Array]) -> jax.Array:
    """Of counts in the leaves the share of all entries."""
    own = [jnp.zeros([], layout.dtype)]
    for member, count in zip(layout.members, counts, strict=True):
        own.append(count / member.sharding.copies)
    total = _numerics.in_pairs(lax.add, own)
    if layout.axis_names:
        total = lax.psum(devices.as_varying(total, layout.axis_names), layout.axis_names)
    return total / np.maximum(np.sum(layout.sizes), 1).astype(layout.dtype)
