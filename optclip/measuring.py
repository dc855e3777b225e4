"""The walk over a gradient: its norms, and the multiplication by factors.

`plan` looks at a tree once, while it is traced, and lays the groups of a scope out in one vector
(one number for the whole tree). `measure` fills that vector with norms; `rescale` and `clamp`
change the leaves. On every device layout the vector is whole and the same on all devices: inside
`shard_map` each device puts the statistics of its parts in their places, and one sum over the
mesh both adds up what is split and gathers what is not.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optclip import devices, norms
from optclip.limiters import Factor, Limiter, factor_of
from optclip.norms import Axes, Magnitude, Norm
from optclip.scopes import Scope, answer_per_leaf, leaves_with_paths

_Tree = TypeVar("_Tree")


class Member(NamedTuple):
    """A leaf that takes part.

    Attributes:
        index: Which of the tree's leaves it is.
        path: Where it is, as `jax.tree_util.keystr(path, simple=True, separator="/")`.
        axes: The axes that one group spans.
        start: Where in the vector of groups its own begin.
        kept: Shape of its groups in the whole leaf: its shape with `axes` of length 1.
        split: How it lies on the devices.
    """

    index: int
    path: str
    axes: Axes
    start: int
    kept: tuple[int, ...]
    split: devices.Split

    @property
    def groups(self) -> int:
        """How many groups the leaf has, or takes part in."""
        return math.prod(self.kept)


class Plan(NamedTuple):
    """What a scope makes of one tree; all of it static.

    Attributes:
        members: The leaves that take part.
        shape: Shape of the array of norms: () for one group, (number of groups,) otherwise.
        sizes: Entries per group over all devices, of that shape.
        dtype: What the norms are measured in: float32, or float64 where a leaf is 64-bit.
        axis_names: Mesh axes over which leaves may be split.
    """

    members: tuple[Member, ...]
    shape: tuple[int, ...]
    sizes: np.ndarray
    dtype: np.dtype
    axis_names: tuple[str, ...]


def is_floating(x: Any) -> bool:
    """Whether a leaf is measured and clipped: floating point or complex, float0 not."""
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.inexact)


def tree_dtype(updates: Any) -> np.dtype:
    """The dtype norms of a tree are kept in: float64 where a leaf is 64-bit, else float32."""
    floating = [jnp.result_type(x) for x in jax.tree.leaves(updates) if is_floating(x)]
    wide = any(norms.accumulator(dtype) == jnp.float64 for dtype in floating)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def whole_on_devices_of(tree: Any, state: _Tree) -> _Tree:
    """Small arrays, put whole on every device of the mesh that the tree lies on.

    As they are where the tree is traced, or lies on no mesh.
    """
    for x in jax.tree.leaves(tree):
        sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
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


def plan(scope: Scope, updates: Any, axis_name: Any = None, sharded: Any = None) -> Plan:
    """Looks at a tree: which leaves take part, in which groups, split over which devices.

    Leaves that are not floating point (integers, booleans, float0) take no part, nor those without
    entries, nor those that the scope leaves alone.
    """
    leaves = leaves_with_paths(updates)
    labels = scope.labels(updates) if scope.labels else [path for path, _ in leaves]
    said = [...] * len(leaves) if sharded is None else answer_per_leaf(sharded, updates, "sharded")
    places = {label: place for place, label in enumerate(scope.order or ())}
    total = len(places)
    members: list[Member] = []
    for index, ((path, x), label) in enumerate(zip(leaves, labels, strict=True)):
        if label is None or not is_floating(x) or not math.prod(jnp.shape(x)):
            continue
        split = devices.split_of(path, x, axis_name, said[index])
        shape = _whole_shape(jnp.shape(x), split, path, needed=not scope.whole_leaves)
        axes = scope.axes(path, shape)
        if axes is None:
            continue
        axes = _checked_axes(axes, path, shape)
        kept = tuple(1 if axis in axes else length for axis, length in enumerate(shape))
        if scope.order is not None and label not in places:
            raise ValueError(
                f"{path!r} has label {label!r}, which has no max_norm; those with one are "
                f"{list(scope.order)}; label it None to leave it alone"
            )
        start = places.setdefault(label, total) if scope.labels else total
        total = max(total, start + math.prod(kept))
        members.append(Member(index, path, axes, start, kept, split))
    vector = () if scope.one_group else (total,)
    sizes = np.zeros(1 if scope.one_group else total)
    for member in members:
        entries = math.prod(jnp.shape(leaves[member.index][1])) * member.split.parts
        sizes[member.start : member.start + member.groups] += entries / member.groups
    dtype = tree_dtype([leaves[member.index][1] for member in members])
    names = devices.axis_names(axis_name) or ()
    return Plan(tuple(members), vector, sizes.reshape(vector), dtype, names)


def shape_of_norms(
    scope: Scope, params: Any, axis_name: Any = None, sharded: Any = None
) -> tuple[int, ...]:
    """Shape of the array of norms, for a state that is made before the first update.

    Mostly that is outside the `shard_map` or `pmap` that updates run in, of whole leaves.
    """
    if scope.one_group:
        return ()
    if devices.are_bound(axis_name):
        return plan(scope, params, axis_name, sharded).shape
    return plan(scope, params).shape


def _checked_axes(axes: Any, path: str, shape: tuple[int, ...]) -> Axes:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(f"axis {axes} of {path!r} does not exist: its shape is {shape}")
    return tuple(sorted({axis % len(shape) for axis in axes}))


def _whole_shape(
    part: tuple[int, ...], split: devices.Split, path: str, *, needed: bool
) -> tuple[int, ...]:
    """Shape of the whole leaf of which `part` may be one device's part."""
    if split.dims is None:
        if needed:
            raise ValueError(
                f"{path!r} is split over {list(split.names)}, but along which of its dimensions? "
                "Norms of units need to know: pass sharded= with a PartitionSpec for it"
            )
        return part
    return tuple(
        length * devices.axis_size(split.dims.get(axis, ())) for axis, length in enumerate(part)
    )


def measure(plan: Plan, norm: Norm, tree: Any) -> Magnitude:
    """The norms of all groups, right whatever their size.

    Args:
        plan: From `plan` for this tree or one of its structure.
        norm: The norm.
        tree: Updates or parameters.

    Returns:
        A `Magnitude` of arrays of shape `plan.shape`.
    """
    leaves = picked(plan, tree)
    if plan.dtype == jnp.float64:  # Beside 64-bit leaves the others are measured in 64 bits too.
        leaves = [norms.widened(x, plan.dtype) for x in leaves]

    def finished(statistic: jax.Array, scale: jax.Array) -> Magnitude:
        return Magnitude(norm.finish(statistic, plan.sizes), scale)

    # The modulus of a complex number may overflow where its parts do not: by a factor below 2.
    halving = any(jnp.iscomplexobj(x) for x in leaves)
    half = jnp.full(plan.shape, 0.5 if halving else 1, plan.dtype)
    if norm.safety == "exact":
        return finished(_statistics(plan, norm, leaves, half if halving else None), half)
    if norm.safety == "peak":
        peaks = _statistics(plan, norms.linf, leaves, half if halving else None)
        # A constant to derivatives: any other scale would give the same norm.
        scale = lax.stop_gradient(norms.peak_scale(peaks, half))
        return finished(_statistics(plan, norm, leaves, scale), scale)
    statistic = _statistics(plan, norm, leaves, None)
    if not any(norms.can_leave_range(x.dtype) for x in leaves):
        return finished(statistic, jnp.ones(plan.shape, plan.dtype))
    scale = norms.range_scale(norm, statistic, plan.sizes)
    statistic = where_needed(
        jnp.any(scale != 1),
        lambda leaves, scale: _statistics(plan, norm, leaves, scale),
        lambda leaves, scale: statistic,
        leaves,
        scale,
    )
    return finished(statistic, scale)


def where_needed(
    needed: jax.Array, compute: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any
) -> Any:
    """One of two functions; the branch is Python's outside jit, where XLA's would compile anew."""
    if isinstance(needed, Tracer):
        return lax.cond(needed, compute, otherwise, *operands)
    return compute(*operands) if needed else otherwise(*operands)


def picked(plan: Plan, tree: Any) -> list[jax.Array]:
    """The leaves that take part, also of parameters that hold leaves which the updates lack."""
    leaves = leaves_with_paths(tree)
    by_path = dict(leaves)
    found = []
    for member in plan.members:
        if member.index < len(leaves) and leaves[member.index][0] == member.path:
            found.append(jnp.asarray(leaves[member.index][1]))
        elif member.path in by_path:
            found.append(jnp.asarray(by_path[member.path]))
        else:
            raise ValueError(f"params has no leaf {member.path!r}, which the updates have")
    return found


def _statistics(
    plan: Plan, norm: Norm, leaves: list[jax.Array], scale: jax.Array | None
) -> jax.Array:
    """One pass over the leaves: the statistic of every group, over all devices."""
    pieces: dict[int, list[jax.Array]] = {}
    for member, x in zip(plan.members, leaves, strict=True):
        local_scale = None if scale is None else _own(plan, member, scale)
        statistic = norm.statistic(x, member.axes, local_scale).astype(plan.dtype)
        if norm.adds and member.split.copies > 1:
            statistic = statistic / member.split.copies
        pieces.setdefault(member.start, []).append(_placed(member, statistic))
    combine = norm.combine or jnp.squeeze
    combined = {
        start: piece[0] if len(piece) == 1 else combine(jnp.stack(piece), axis=0)
        for start, piece in pieces.items()
    }
    if plan.shape == ():
        vector = jnp.reshape(combined.get(0, jnp.zeros(1, plan.dtype)), ())
    else:
        # Groups that no leaf takes part in have a place too: a label that this tree lacks.
        vector = _concatenated(combined, plan)
    return norm.across(vector, plan.axis_names) if plan.axis_names else vector


def _concatenated(pieces: dict[int, jax.Array], plan: Plan) -> jax.Array:
    ordered, end = [], 0
    for start in sorted(pieces):
        ordered += [jnp.zeros(start - end, plan.dtype)] if start > end else []
        ordered.append(pieces[start])
        end = start + pieces[start].size
    ordered += [jnp.zeros(plan.shape[0] - end, plan.dtype)] if plan.shape[0] > end else []
    return jnp.concatenate(ordered) if ordered else jnp.zeros(plan.shape, plan.dtype)


def _placed(member: Member, statistic: jax.Array) -> jax.Array:
    """The statistics of one device's part, flat, in their places among those of the whole leaf."""
    if statistic.shape != member.kept:
        whole = jnp.zeros(member.kept, statistic.dtype)
        statistic = lax.dynamic_update_slice(whole, statistic, _corner(member, statistic.shape))
    return jnp.reshape(_gathered(statistic), (-1,))


def _own(plan: Plan, member: Member, vector: jax.Array) -> jax.Array:
    """A leaf's own entries of the vector, in a shape that broadcasts against the leaf's part."""
    if plan.shape == ():
        return vector
    own = vector[member.start : member.start + member.groups]
    if member.groups == 1:
        return jnp.reshape(own, ())
    own = jnp.reshape(own, member.kept)
    part = tuple(
        length // devices.axis_size((member.split.dims or {}).get(axis, ()))
        if axis not in member.axes
        else length
        for axis, length in enumerate(member.kept)
    )
    return own if part == member.kept else lax.dynamic_slice(own, _corner(member, part), part)


def _corner(member: Member, part: tuple[int, ...]) -> list[Any]:
    """Where this device's part of the groups begins."""
    dims = member.split.dims or {}
    return [
        lax.axis_index(tuple(dims[axis])) * length
        if dims.get(axis) and axis not in member.axes
        else 0
        for axis, length in enumerate(part)
    ]


def _gathered(x: jax.Array) -> jax.Array:
    """On a mesh with explicit axes: the same array on every device, so that it can be reshaped."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or all(entry is None for entry in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def rescale(plan: Plan, updates: Any, factor: Factor) -> Any:
    """Every leaf times the factor of its groups, in its own dtype."""

    def scaled(member: Member, x: jax.Array) -> jax.Array:
        coarse, fine = (_own(plan, member, part) for part in factor)
        # One barrier for leaf and factors: leaves of one shape do not share a broadcast factor.
        x, coarse, fine = lax.optimization_barrier((x, coarse, fine))
        return norms.scaled(norms.scaled(norms.widened(x), coarse), fine)

    return _mapped(plan, updates, scaled)


def clamp(plan: Plan, updates: Any, limiter: Limiter, threshold: jax.Array) -> Any:
    """Every entry limited by itself; a complex one in modulus, keeping its phase."""

    def clamped(member: Member, x: jax.Array) -> jax.Array:
        x, bound = lax.optimization_barrier((x, threshold))
        wide, bound = norms.widened(x), bound.astype(norms.accumulator(x.dtype))
        if limiter.entry is not None and not jnp.iscomplexobj(x):
            return limiter.entry(wide, bound)
        factor = entry_factor(limiter, wide, bound)
        return norms.scaled(norms.scaled(wide, factor.coarse), factor.fine)

    return _mapped(plan, updates, clamped)


def entry_factor(limiter: Limiter, wide: jax.Array, bound: jax.Array) -> Factor:
    """The factor of every entry, as a group of its own."""
    # At half the size: a modulus may overflow where the entry does not.
    half = jnp.full([], 0.5, bound.dtype)
    modulus = norms.modulus(norms.scaled(wide, half))
    return factor_of(limiter, Magnitude(modulus, half), bound)


def share_above(plan: Plan, updates: Any, threshold: jax.Array) -> jax.Array:
    """The share of entries whose modulus is above the threshold."""

    def count(x: jax.Array) -> jax.Array:
        dtype = norms.accumulator(x.dtype)
        bound, one = threshold.astype(dtype), jnp.ones([], dtype)
        steep = jnp.full([], norms.largest(dtype), dtype)
        x, bound, steep, one = lax.optimization_barrier((x, bound, steep, one))
        modulus = norms.modulus(norms.widened(x))
        # As arithmetic, which XLA fuses into the sum on every backend, and not as a comparison.
        above = jnp.minimum((jnp.maximum(modulus, bound) - bound) * steep, one)
        return jnp.sum(above).astype(plan.dtype)

    counts = [
        count(x) / member.split.copies
        for member, x in zip(plan.members, picked(plan, updates), strict=True)
    ]
    total = jnp.sum(jnp.stack(counts)) if counts else jnp.zeros([], plan.dtype)
    if plan.axis_names:
        total = lax.psum(total, plan.axis_names)
    return total / np.maximum(plan.sizes, 1).astype(plan.dtype)


def zeroed_unless(finite: jax.Array, updates: Any) -> Any:
    """Zeros in place of all updates, unless the step is finite."""

    def zeroed(x: Any) -> Any:
        return lax.select(finite, x, jnp.zeros_like(x)) if is_floating(x) else x

    return jax.tree.map(zeroed, updates)


def _mapped(plan: Plan, updates: Any, change: Callable[[Member, jax.Array], jax.Array]) -> Any:
    """The leaves that take part, changed and back in their dtype; the others as they were."""
    leaves, structure = jax.tree.flatten(updates)
    for member in plan.members:
        x = jnp.asarray(leaves[member.index])
        leaves[member.index] = change(member, x).astype(x.dtype)
    return jax.tree.unflatten(structure, leaves)
