"""One number for each group of a layout, in two forms: a vector of all groups, and pieces.

The vector is what rules remember and what readings are made of. A piece is one leaf's own groups
(or the one group that several leaves share), in a shape that broadcasts against the leaf. What is
done to a leaf is computed from its piece, not cut out of the vector: a cut has a place of its own
for every leaf, so that XLA would compile a kernel for every leaf, where leaves of one shape can
share one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optclip import _numerics
from optclip._tree import devices
from optclip._tree.layout import GroupedLeaf, Layout

Pieces = dict[int, jax.Array]
"""From `GroupedLeaf.start` to an array of shape () or `GroupedLeaf.kept`; without the axes that a
group spans where leaves of other ranks may share it."""

T = TypeVar("T")


class PerGroup(NamedTuple, Generic[T]):
    """One number for each group: a norm, a threshold, a factor.

    Attributes:
        blocks: All of them, in few arrays: one of `layout.shape`, or where that is not wanted (on a
            mesh it would have to be gathered from all devices) one for each of `layout.kinds`.
        pieces: The same for each leaf, or for the group that several share, by
            `GroupedLeaf.start`. Empty where nobody needs them.
    """

    blocks: list[T]
    pieces: dict[int, T]


def in_blocks(
    layout: Layout, pieces: Pieces, gathered: bool, missing: float = 0
) -> list[jax.Array]:
    """The blocks of `PerGroup`.

    Args:
        layout: The layout.
        pieces: The pieces.
        gathered: Whether all groups are wanted in one array.
        missing: What stands there for groups that no leaf takes part in.
    """
    if gathered:
        return [concatenate(layout, pieces, missing)]
    return [jnp.stack([pieces[start] for start in kind]) for kind in layout.kinds]


def sizes_in_blocks(layout: Layout, gathered: bool) -> list[np.float64 | np.ndarray]:
    """Entries per group, for each block."""
    return [layout.sizes] if gathered else [layout.size_at(kind[0]) for kind in layout.kinds]


def total(reduce: Callable[..., jax.Array], blocks: list[jax.Array]) -> jax.Array:
    """One number of all groups: their sum, minimum, maximum, or whether all are true."""
    plain = reduce.func if isinstance(reduce, functools.partial) else reduce
    numbers = [reduce(block) for block in blocks]
    return numbers[0] if len(numbers) == 1 else _numerics.in_pairs(IN_TWO[plain], numbers)


IN_TWO: dict[Callable[..., jax.Array], Callable[..., jax.Array]] = {
    jnp.sum: lax.add,
    jnp.min: lax.min,
    jnp.max: lax.max,
    jnp.all: lax.bitwise_and,
    jnp.any: lax.bitwise_or,
}
"""What a reduction does to two numbers."""


def can_total(reduce: Any) -> bool:
    """Whether `total` knows how it works in parts."""
    return reduce in IN_TWO


def concatenate(layout: Layout, pieces: Pieces, missing: float = 0) -> jax.Array:
    """The vector, of `layout.shape`; `missing` for groups that no leaf takes part in."""
    if layout.shape == ():
        return pieces.get(0, jnp.full([], missing, layout.dtype))
    ordered, end = [], 0
    # A label that this tree lacks has a place too.
    for start in [*sorted(pieces), layout.shape[0]]:
        ordered += [jnp.full(start - end, missing, layout.dtype)] if start > end else []
        if start in pieces:
            ordered.append(jnp.reshape(replicated(pieces[start]), (-1,)))
            end = start + pieces[start].size
    return (
        replicated(jnp.concatenate(ordered)) if ordered else jnp.zeros(layout.shape, layout.dtype)
    )


def split(layout: Layout, vector: jax.Array) -> Pieces:
    """The pieces of a vector."""
    if layout.shape == ():
        return {0: vector}
    vector = replicated(vector)
    if layout.has_units:
        return _cut(layout, vector)
    ways = {"cpu": _cut, "default": lambda layout, vector: taken_apart(layout, [vector])}
    own = {platform: functools.partial(way, layout) for platform, way in ways.items()}
    return _numerics.by_platform(own, vector)


def _cut(layout: Layout, vector: jax.Array) -> Pieces:
    return {
        member.start: jnp.reshape(
            replicated(vector[member.start : member.start + member.groups]),
            member.of_piece,
        )
        for member in layout.members
    }


def by_label(layout: Layout, vector: jax.Array) -> dict[str, jax.Array]:
    """The numbers of a vector under the labels of their groups."""
    return {label: vector[place] for label, place in layout.labels.items()}


def are_stacked(layout: Layout, gathered: bool) -> bool:
    """Whether every piece is one entry along the first axis of a block."""
    return layout.shape != () and not (gathered and layout.has_units)


def taken_apart(layout: Layout, blocks: list[jax.Array]) -> Pieces:
    """The pieces of blocks that are stacked.

    From places that XLA does not know: with a place of its own every leaf would have a kernel of
    its own. For accelerators; XLA for a CPU knows them all the same.
    """
    starts = layout.kinds
    if blocks[0].shape == layout.shape:
        starts = (tuple(dict.fromkeys(member.start for member in layout.members)),)
    found: Pieces = {}
    for block, own in zip(blocks, starts, strict=True):
        at = own if block.shape == layout.shape else range(len(own))
        for start, place in zip(own, _numerics.computed_anew(*map(jnp.uint32, at)), strict=True):
            zeros = [jnp.zeros_like(place)] * (block.ndim - 1)
            piece = lax.dynamic_slice(block, [place, *zeros], (1, *block.shape[1:]))
            found[start] = jnp.reshape(piece, block.shape[1:])
    return found


def for_each_leaf(layout: Layout, pieces: Pieces) -> list[jax.Array]:
    """For each leaf that takes part its piece, or the part of it that this device's part needs."""
    return _numerics.unshared([_own(member, pieces[member.start]) for member in layout.members])


def _own(member: GroupedLeaf, piece: jax.Array) -> jax.Array:
    if piece.ndim == 0:
        return piece
    if member.shared:
        piece = lax.expand_dims(piece, member.axes)
    part = tuple(
        length // devices.axis_size((member.sharding.dims or {}).get(axis, ()))
        if axis not in member.axes
        else length
        for axis, length in enumerate(member.kept)
    )
    return piece if part == member.kept else lax.dynamic_slice(piece, offset(member, part), part)


def scatter(member: GroupedLeaf, part: jax.Array) -> jax.Array:
    """The groups of one device's part in their places among those of the whole leaf: a piece."""
    if part.ndim != 0 and part.shape != member.kept:
        whole = jnp.zeros(member.kept, part.dtype)
        part = lax.dynamic_update_slice(whole, part, offset(member, part.shape))
    return lax.squeeze(part, member.axes) if member.shared else part


def offset(member: GroupedLeaf, part: tuple[int, ...]) -> list[jax.Array | int]:
    """Where this device's part of the groups begins."""
    kept = [axis for axis in range(len(part)) if axis not in member.axes]
    return devices.offset(member.sharding, part, kept)


def whole(member: GroupedLeaf, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """A leaf, whole on every device along some axes."""
    return devices.whole(member.path, replicated(x), member.sharding, axes)


def own_part(
    member: GroupedLeaf, whole: jax.Array, axes: Sequence[int], like: jax.Array
) -> jax.Array:
    """The inverse of `whole`; it lies as `like`, the leaf, does."""
    if any(axis in axes for axis in member.sharding.dims or {}):
        start = devices.offset(member.sharding, like.shape, axes)
        whole = lax.dynamic_slice(whole, start, like.shape)
    sharding = getattr(jax.typeof(like), "sharding", None)
    if sharding is None or sharding.mesh.empty or AxisType.Explicit not in sharding.mesh.axis_types:
        return whole
    return jax.sharding.reshard(whole, sharding)


def replicated(x: jax.Array) -> jax.Array:
    """Under jit on a mesh: the same array on every device, so that it can be joined with others."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or x.size == 1 or sharding.mesh.empty:
        return x
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    if any(entry is not None for entry in sharding.spec):
        return jax.sharding.reshard(x, whole)
    if AxisType.Auto in sharding.mesh.axis_types:
        # Left to itself the partitioner joins parts by exchanges between neighbors, a dozen each.
        return lax.with_sharding_constraint(x, whole)
    return x
