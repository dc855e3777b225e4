"""One pass over the leaves of a tree: the statistic of every group.

Inside `shard_map` each device puts the statistics of its parts in their places, and one sum over
the mesh both adds up what is split and gathers what is not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip import _numerics, norms
from optclip._tree import devices, pieces
from optclip._tree.layout import GroupedLeaf, Layout
from optclip._tree.pieces import PerGroup, Pieces
from optclip.norms import Magnitude, Norm

Forest = list[list[jax.Array]]
"""Of several trees the leaves that take part."""


def statistics_of(
    layout: Layout,
    norm: Norm,
    forest: Forest,
    scales: Sequence[Pieces | None],
    *,
    compact: bool = False,
) -> list[Pieces]:
    """One pass over the leaves of each tree: the statistic of every group, over all devices."""
    own = [
        _statistics_here(layout, norm, leaves, scale, compact)
        for leaves, scale in zip(forest, scales, strict=True)
    ]
    return over_devices(layout, norm, own)


def windows_of(
    layout: Layout, norm: Norm, forest: Forest, scales: tuple[float, ...]
) -> list[list[Pieces]]:
    """The same at several scales in one pass: for each tree, and each scale."""
    own = [_windows_here(layout, norm, leaves, scales) for leaves in forest]
    found = over_devices(layout, norm, [pieces for of_tree in own for pieces in of_tree])
    return [found[at : at + len(scales)] for at in range(0, len(found), len(scales))]


def over_devices(layout: Layout, norm: Norm, own: list[Pieces]) -> list[Pieces]:
    """Statistics of this device's parts, over all devices: with one sum for all of them."""
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
    statistics = [norm.statistic(x, member.axes, own_scale) for member, x, own_scale in members]
    return by_group(layout, norm, statistics)


def _windows_here(
    layout: Layout, norm: Norm, leaves: list[jax.Array], scales: tuple[float, ...]
) -> list[Pieces]:
    """The statistic of every group on this device, at each of the scales."""
    if norm.entries is None:
        found = [
            [
                norm.statistic(x, member.axes, jnp.full([], scale, _numerics.accumulator(x.dtype)))
                for scale in scales
            ]
            for member, x in zip(layout.members, leaves, strict=True)
        ]
    else:
        sums_at = _sums_at_once if is_ours(norm) else _numerics.sums_at
        found = [
            sums_at(norm.entries, scales, member.axes, x)
            for member, x in zip(layout.members, leaves, strict=True)
        ]
    return [by_group(layout, norm, [x[at] for x in found]) for at in range(len(scales))]


_sums_at_once = jax.jit(_numerics.sums_at, static_argnums=(0, 1, 2), inline=True)
"""The same, traced and lowered once for all leaves that are alike."""


def is_ours(norm: Norm) -> bool:
    """Whether it may be traced once: norms of others may read what changes, or not be hashable."""
    return any(norm is own for own in (norms.l1, norms.l2, norms.rms))


def by_group(
    layout: Layout, norm: Norm, statistics: list[jax.Array], dtype: np.dtype | None = None
) -> Pieces:
    """From the statistics of the leaves those of the groups, each in its place."""
    dtype = layout.dtype if dtype is None else dtype
    found: dict[int, list[jax.Array]] = {}
    for member, statistic in zip(layout.members, statistics, strict=True):
        if statistic.dtype != dtype:
            statistic = statistic.astype(dtype)
        if norm.adds and member.sharding.copies > 1:
            statistic = statistic / member.sharding.copies
        found.setdefault(member.start, []).append(pieces.scatter(member, statistic))
    return {start: _combined(norm, some) for start, some in found.items()}


def _scales(layout: Layout, scale: Pieces | None) -> Sequence[jax.Array | None]:
    return [None] * len(layout.members) if scale is None else pieces.for_each_leaf(layout, scale)


def _combined(norm: Norm, statistics: list[jax.Array]) -> jax.Array:
    if len(statistics) == 1 or norm.combine is None:
        return statistics[0]
    in_two = pieces.IN_TWO.get(norm.combine)
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
        key = (member.role, jax.typeof(x), member.sharding.copies)
        alike.setdefault(key, []).append((x, scale))
    totals = []
    for (*_, copies), some in alike.items():
        for first in range(0, len(some), TOGETHER):
            chosen = some[first : first + TOGETHER]
            scale = chosen[0][1]  # The tree's one scale, for this kernel.
            terms = _numerics.in_pairs(lax.add, [entries(x, scale) for x, _ in chosen])
            totals.append(jnp.sum(terms).astype(layout.dtype) / copies)
    return _numerics.in_pairs(lax.add, totals)


def finished(
    layout: Layout, norm: Norm, statistics: Pieces, scales: Pieces | float, gathered: bool
) -> PerGroup[Magnitude]:
    """Norms from statistics.

    Args:
        layout: The layout.
        norm: The norm.
        statistics: In pieces.
        scales: What the entries were multiplied by: in pieces, or one number for all.
        gathered: Whether the vector of all groups is wanted.
    """
    if not isinstance(scales, dict):
        number = jnp.full([], scales, layout.dtype)
        scales = dict.fromkeys(statistics, number)
        scale_blocks = [number] * (1 if gathered else len(layout.kinds))
    else:
        scale_blocks = pieces.in_blocks(layout, scales, gathered, missing=1)
    by_piece = {
        start: Magnitude(_finish(norm, x, layout.size_at(start)), scales[start])
        for start, x in statistics.items()
    }
    blocks = [
        Magnitude(norm.finish(x, size), scale)
        for x, size, scale in zip(
            pieces.in_blocks(layout, statistics, gathered),
            pieces.sizes_in_blocks(layout, gathered),
            scale_blocks,
            strict=True,
        )
    ]
    return PerGroup(blocks, by_piece)


def assembled(layout: Layout, norms: dict[int, Magnitude], gathered: bool) -> PerGroup[Magnitude]:
    """Norms in blocks too."""
    values = {at: x.value for at, x in norms.items()}
    scales = {at: jnp.broadcast_to(x.scale, x.value.shape) for at, x in norms.items()}
    both = zip(
        pieces.in_blocks(layout, values, gathered),
        pieces.in_blocks(layout, scales, gathered, missing=1),
        strict=True,
    )
    blocks = [Magnitude(*x) for x in both]
    if gathered and layout.shape:
        # As one array by itself: a GPU has then one kernel for it, and one for all readings of it.
        (together,) = _numerics.computed_anew(jnp.concatenate(blocks[0]))
        blocks = [Magnitude(*jnp.split(together, 2))]
    return PerGroup(blocks, norms)


def of_piece(function: Callable[..., Any]) -> Callable[..., Any]:
    """(norm, statistics, size) -> arrays, traced once for all pieces that are alike."""
    traced_once = jax.jit(function, static_argnums=(0, 2))

    def of_piece(norm: Norm, statistics: Any, size: np.float64) -> Any:
        return (traced_once if is_ours(norm) else function)(norm, statistics, size)

    return of_piece


_finish = of_piece(lambda norm, statistic, size: norm.finish(statistic, size))
