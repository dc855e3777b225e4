"""Which entries of a tree share a norm, and where each norm has its place.

`layout` looks at a tree once, while it is traced, and lays the groups of a scope out in one vector
(one number for the whole tree). On every device layout that vector is whole and the same on all
devices.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optclip import _jax, _numerics
from optclip._paths import answer_per_leaf, leaves_with_paths
from optclip._tree import devices
from optclip.norms import Axes
from optclip.scopes import Scope

_Tree = TypeVar("_Tree")


class GroupedLeaf(NamedTuple):
    """A leaf that takes part.

    Attributes:
        index: Which of the tree's leaves it is.
        path: Where it is, as `jax.tree_util.keystr(path, simple=True, separator="/")`.
        axes: The axes that one group spans.
        start: Where in the vector of groups its own begin.
        kept: Shape of its groups in the whole leaf: its shape with `axes` of length 1.
        sharding: How it lies on the devices.
        shared: Whether its several groups may be shared with other leaves, as layers are.
    """

    index: int
    path: str
    axes: Axes
    start: int
    kept: tuple[int, ...]
    sharding: devices.LeafSharding
    shared: bool

    @property
    def groups(self) -> int:
        """How many groups the leaf has, or takes part in."""
        return math.prod(self.kept)

    @property
    def of_piece(self) -> tuple[int, ...]:
        """Shape of its piece; see `pieces.Pieces`."""
        if self.shared:
            return (self.groups,)
        return self.kept if self.groups > 1 else ()

    @property
    def role(self) -> str:
        """The path without its numbers: the same for the leaves of repeated layers."""
        return re.sub(r"\d+", "#", self.path)


class Layout(NamedTuple):
    """What a scope makes of one tree; all of it static.

    Attributes:
        members: The leaves that take part.
        shape: Shape of the array of norms: () for one group, (number of groups,) otherwise.
        sizes: Entries per group over all devices, of that shape.
        dtype: What the norms are measured in: float32, or float64 where a leaf is 64-bit.
        axis_names: Mesh axes over which leaves may be split.
        kinds: For each kind of leaf the starts of those that are alike, whose groups can be stacked
            without traffic on a mesh: their paths differ in numbers only, as of repeated layers.
        labels: Where groups have labels, from label to the place of its one group, or to the slice
            of its several.
    """

    members: tuple[GroupedLeaf, ...]
    shape: tuple[int, ...]
    sizes: np.ndarray
    dtype: np.dtype
    axis_names: tuple[str, ...]
    kinds: tuple[tuple[int, ...], ...]
    labels: dict[str, int | slice]

    @property
    def has_units(self) -> bool:
        """Whether a leaf may have several groups."""
        return any(member.groups > 1 or member.shared for member in self.members)

    @property
    def in_one_vector(self) -> bool:
        """Whether there is one number for each leaf, or for several."""
        return self.shape != () and not self.has_units

    def size_at(self, start: int) -> np.float64:
        """Entries of each of the groups of the piece that begins there."""
        return np.float64(self.sizes.reshape(-1)[start])


def whole_on_devices_of(tree: Any, state: _Tree) -> _Tree:
    """Small arrays, put whole on every device of the mesh that the tree lies on.

    As they are where the tree is traced, or lies on no mesh.
    """
    for x in jax.tree.leaves(tree):
        sharding = None if _jax.is_traced(x) else getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            continue
        mesh = sharding.mesh
        explicit = AxisType.Explicit in mesh.axis_types

        def placed(x: jax.Array, mesh: Any = mesh, explicit: bool = explicit) -> jax.Array:
            # Written as jit writes it on such a mesh, or the second step would compile again.
            spec = PartitionSpec(*[None] * x.ndim) if explicit else PartitionSpec()
            return jax.device_put(x, NamedSharding(mesh, spec))

        return jax.tree.map(placed, state)
    return state


def layout_of(
    scope: Scope,
    updates: optax.Updates,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    params: optax.Params | None = None,
) -> Layout:
    """Looks at a tree: which leaves take part, in which groups, split over which devices.

    Leaves that are not floating point (integers, booleans, float0) take no part, nor those without
    entries, nor those that the scope leaves alone.

    Args:
        scope: The scope.
        updates: The tree.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        params: The parameters, where known: an optimizer may hand on a float for an integer.
    """
    known = leaves_with_paths(params) if params is not None else []
    fixed = {path for path, x in known if not _numerics.is_floating(x)}
    leaves = leaves_with_paths(updates)
    labels = scope.labels(updates) if scope.labels else [path for path, _ in leaves]
    said = [...] * len(leaves) if sharded is None else answer_per_leaf(sharded, updates, "sharded")
    places = {label: place for place, label in enumerate(scope.order or ())}
    total = len(places)
    members: list[GroupedLeaf] = []
    firsts: dict[int, GroupedLeaf] = {}
    for index, ((path, x), label) in enumerate(zip(leaves, labels, strict=True)):
        if label is None or not _numerics.is_floating(x) or not math.prod(jnp.shape(x)):
            continue
        if path in fixed:
            continue
        sharding = devices.sharding_of(path, x, axis_name, said[index])
        shape = _whole_shape(jnp.shape(x), sharding, path, needed=not scope.whole_leaves)
        axes = scope.axes(path, shape)
        if axes is None:
            continue
        axes = tuple(sorted(set(checked_axes(axes, path, shape))))
        kept = tuple(1 if axis in axes else length for axis, length in enumerate(shape))
        if scope.order is not None and label not in places:
            raise ValueError(
                f"{path!r} has label {label!r}, which has no max_norm; those with one are "
                f"{list(scope.order)}; label it None to leave it alone"
            )
        start = places.setdefault(label, total) if scope.labels else total
        shared = scope.labels is not None and len(axes) < len(shape)
        member = GroupedLeaf(index, path, axes, start, kept, sharding, shared)
        first = firsts.setdefault(start, member)
        if (first.shared, first.groups) != (shared, member.groups):
            raise ValueError(
                f"the layers of {first.path!r} and {path!r} are stacked along axis 0, where they "
                f"have {first.groups} and {member.groups} entries: let scopes.layer(stacked) name "
                "the leaves of one stack only"
            )
        total = max(total, start + member.groups)
        members.append(member)
    vector = () if scope.one_group else (total,)
    sizes = np.zeros(1 if scope.one_group else total)
    for member in members:
        entries = math.prod(jnp.shape(leaves[member.index][1])) * member.sharding.parts
        sizes[member.start : member.start + member.groups] += entries / member.groups
    dtype = _numerics.tree_dtype([leaves[member.index][1] for member in members])
    names = devices.axis_names(axis_name) or ()
    kinds = _kinds([(member, leaves[member.index][1]) for member in members])
    named = {} if scope.one_group or not scope.labels else _by_label(places, members)
    return Layout(tuple(members), vector, sizes.reshape(vector), dtype, names, kinds, named)


def leaves_of(
    layout: Layout,
    leaf_scope: Scope,
    updates: optax.Updates,
    axis_name: str | Sequence[str] | None,
    sharded: Any,
    params: optax.Params | None,
) -> Layout:
    """The layout whose groups stay within leaves, of those that take part in another."""
    every = layout_of(leaf_scope, updates, axis_name, sharded, params)
    taking = {member.index for member in layout.members}
    members = [member for member in every.members if member.index in taking]
    groups = [member.groups for member in members]
    starts = np.cumsum([0, *groups])
    sizes = [every.size_at(x.start) for x in members]
    return every._replace(
        members=tuple(
            x._replace(start=int(start)) for x, start in zip(members, starts, strict=False)
        ),
        shape=(int(starts[-1]),),
        sizes=np.repeat(sizes, groups),
        dtype=layout.dtype,
        kinds=(),
    )


def _by_label(places: dict[Any, int], members: list[GroupedLeaf]) -> dict[str, int | slice]:
    shared = {member.start: member.groups for member in members if member.shared}
    found: dict[str, int | slice] = {}
    for label, start in places.items():
        if str(label) in found:
            raise ValueError(f"two labels read {str(label)!r}: let their text differ")
        found[str(label)] = slice(start, start + shared[start]) if start in shared else start
    return found


def _kinds(members: list[tuple[GroupedLeaf, Any]]) -> tuple[tuple[int, ...], ...]:
    alike: dict[Any, dict[int, None]] = {}
    # Groups that several leaves share have one place.
    firsts = {member.start: (member, x) for member, x in reversed(members)}
    for member, x in reversed(firsts.values()):
        key = (member.role, member.kept, jnp.shape(x), getattr(jax.typeof(x), "sharding", None))
        alike.setdefault(key, {})[member.start] = None
    return tuple(tuple(starts) for starts in alike.values())


def shape_of_norms(
    scope: Scope,
    params: optax.Params,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
) -> tuple[int, ...]:
    """Shape of the array of norms, for a state that is made before the first update."""
    if scope.one_group:
        return ()
    return layout_at_init(scope, params, axis_name, sharded).shape


def layout_at_init(
    scope: Scope,
    params: optax.Params,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
) -> Layout:
    """The layout before the first update.

    Mostly that is outside the `shard_map` or `pmap` that updates run in, of whole leaves.
    """
    if devices.are_bound(axis_name):
        return layout_of(scope, params, axis_name, sharded)
    return layout_of(scope, params)


def select_leaves(layout: Layout, tree: Any) -> list[jax.Array]:
    """The leaves that take part, also of parameters that hold leaves which the updates lack."""
    leaves = leaves_with_paths(tree)
    by_path = dict(leaves)
    found = []
    for member in layout.members:
        if member.index < len(leaves) and leaves[member.index][0] == member.path:
            found.append(jnp.asarray(leaves[member.index][1]))
        elif member.path in by_path:
            found.append(jnp.asarray(by_path[member.path]))
        else:
            raise ValueError(f"params has no leaf {member.path!r}, which the updates have")
    return found


def checked_axes(axes: Any, path: str, shape: tuple[int, ...]) -> Axes:
    """Some axes of a leaf, counted from 0, in the order in which they were named."""
    axes = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(
            f"axis {axes} of {path!r} does not exist: its shape is {shape}, {len(shape)} axes; a "
            "function from path and shape may answer None to leave a leaf alone"
        )
    return tuple(int(axis) % len(shape) for axis in axes)


def _whole_shape(
    part: tuple[int, ...], sharding: devices.LeafSharding, path: str, *, needed: bool
) -> tuple[int, ...]:
    """Shape of the whole leaf of which `part` may be one device's part."""
    if sharding.dims is None:
        if needed:
            raise ValueError(
                f"{path!r} is split over {list(sharding.names)}, but along which of its "
                "dimensions? Norms of units need to know: pass sharded= with a PartitionSpec for it"
            )
        return part
    return tuple(
        length * devices.axis_size(sharding.dims.get(axis, ())) for axis, length in enumerate(part)
    )
