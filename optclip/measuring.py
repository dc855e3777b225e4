"""The norms of a tree: one pass over its leaves, one sum over the devices.

Inside `shard_map` each device puts the statistics of its parts in their places, and one sum over
the mesh both adds up what is split and gathers what is not.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip import _jax, devices, norms, pieces, planning
from optclip.norms import Magnitude, Norm
from optclip.pieces import Pieces
from optclip.planning import Member, Plan


class Norms(NamedTuple):
    """The norms of the groups of a tree.

    Attributes:
        together: All of them: a `Magnitude` of arrays of `plan.shape`.
        pieces: The same for each leaf or label; see `optclip.pieces`.
    """

    together: Magnitude
    pieces: dict[int, Magnitude]


def measure(plan: Plan, norm: Norm, tree: Any) -> Magnitude:
    """The norms of all groups, right whatever their size; see `measure_together`."""
    return measure_together(plan, norm, tree)[0].together


def measure_together(plan: Plan, norm: Norm, *trees: Any) -> list[Norms]:
    """The norms of all groups of several trees, with one sum over the devices for all of them.

    Args:
        plan: From `plan` for the first tree or one of its structure.
        norm: The norm.
        *trees: Updates, or updates and parameters.

    Returns:
        For each tree its `Norms`.
    """
    forest = [planning.picked(plan, tree) for tree in trees]
    if plan.dtype == jnp.float64:  # Beside 64-bit leaves the others are measured in 64 bits too.
        forest = [[norms.widened(x, plan.dtype) for x in leaves] for leaves in forest]
    # The modulus of a complex number may overflow where its parts do not: by a factor below 2.
    halving = [any(jnp.iscomplexobj(x) for x in leaves) for leaves in forest]
    halves = [_everywhere(plan, 0.5 if halve else 1) for halve in halving]
    halved = [half.pieces if halve else None for half, halve in zip(halves, halving, strict=True)]
    if norm.safety == "exact":
        statistics = _joined(plan, _statistics(plan, norm, forest, halved))
        return _finished(plan, norm, statistics, halves)
    if norm.safety == "peak":
        peaks = _statistics(plan, norms.linf, forest, halved)
        # A constant to derivatives: any other scale would give the same norm.
        scales = [
            {at: lax.stop_gradient(norms.peak_scale(x, half.pieces[at])) for at, x in peak.items()}
            for peak, half in zip(peaks, halves, strict=True)
        ]
        statistics = _joined(plan, _statistics(plan, norm, forest, scales))
        together = [pieces.joined(plan, scale, missing=1) for scale in scales]
        scales = [_Statistic(*both) for both in zip(together, scales, strict=True)]
        return _finished(plan, norm, statistics, scales)
    plain = _joined(plan, _statistics(plan, norm, forest, [None] * len(forest)))
    if not any(norms.can_leave_range(x.dtype) for leaves in forest for x in leaves):
        return _finished(plan, norm, plain, [_everywhere(plan, 1) for _ in forest])
    scales = [
        _Statistic(
            norms.range_scale(norm, of.together, plan.sizes),
            {at: _range_scale(norm, x, plan.size_at(at)) for at, x in of.pieces.items()},
        )
        for of in plain
    ]

    def again(forest: list[list[jax.Array]], scales: list[Pieces]) -> list[_Statistic]:
        return _joined(plan, _statistics(plan, norm, forest, scales, compact=True))

    needed = functools.reduce(
        jnp.logical_or, [jnp.any(scale.together != 1) for scale in scales], jnp.zeros([], bool)
    )
    corrected = where_needed(
        needed,
        again,
        lambda forest, scales: jax.tree.map(jnp.zeros_like, plain),
        forest,
        [scale.pieces for scale in scales],
    )
    statistics = jax.tree.map(functools.partial(jnp.where, needed), corrected, plain)
    return _finished(plan, norm, statistics, scales)


class _Statistic(NamedTuple):
    """One number a group: as a vector, and in pieces."""

    together: jax.Array
    pieces: Pieces


def _joined(plan: Plan, forest: list[Pieces]) -> list[_Statistic]:
    return [_Statistic(pieces.joined(plan, some), some) for some in forest]


def _everywhere(plan: Plan, value: float) -> _Statistic:
    """The same number for every group."""
    number = jnp.full([], value, plan.dtype)
    return _Statistic(number, {member.start: number for member in plan.members})


def _finished(
    plan: Plan, norm: Norm, statistics: list[_Statistic], scales: list[_Statistic]
) -> list[Norms]:
    found = []
    for statistic, scale in zip(statistics, scales, strict=True):
        together = Magnitude(norm.finish(statistic.together, plan.sizes), scale.together)
        by_piece = {
            at: Magnitude(_finish(norm, x, plan.size_at(at)), scale.pieces[at])
            for at, x in statistic.pieces.items()
        }
        found.append(Norms(together, by_piece))
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


def where_needed(
    needed: jax.Array, compute: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any
) -> Any:
    """One of two functions; the branch is Python's outside jit, where XLA's would compile anew."""
    if _jax.is_traced(needed):
        return lax.cond(needed, compute, otherwise, *operands)
    return compute(*operands) if needed else otherwise(*operands)


def _statistics(
    plan: Plan,
    norm: Norm,
    forest: list[list[jax.Array]],
    scales: Sequence[Pieces | None],
    *,
    compact: bool = False,
) -> list[Pieces]:
    """One pass over the leaves of each tree: the statistic of every group, over all devices."""
    own = [
        _statistics_here(plan, norm, leaves, scale, compact)
        for leaves, scale in zip(forest, scales, strict=True)
    ]
    if not plan.axis_names:
        return own
    vectors = [devices.as_varying(pieces.joined(plan, x), plan.axis_names) for x in own]
    if len(vectors) == 1:
        return [pieces.cut(plan, norm.across(vectors[0], plan.axis_names))]
    return [pieces.cut(plan, x) for x in norm.across(jnp.stack(vectors), plan.axis_names)]


def _statistics_here(
    plan: Plan, norm: Norm, leaves: list[jax.Array], scale: Pieces | None, compact: bool
) -> Pieces:
    """One pass over the leaves of a tree: the statistic of every group, on this device.

    Args:
        plan: The plan.
        norm: The norm.
        leaves: Those that take part.
        scale: What each group is multiplied by first; None for 1.
        compact: Whether to compile fast rather than to run fast.
    """
    members = list(zip(plan.members, leaves, _scales(plan, scale), strict=True))
    if compact and norm.entries is not None and norm.combine is jnp.sum and plan.shape == ():
        return {0: _total_of_alike(plan, norm.entries, members)} if members else {}
    found: dict[int, list[jax.Array]] = {}
    for member, x, own_scale in members:
        statistic = norm.statistic(x, member.axes, own_scale)
        if statistic.dtype != plan.dtype:
            statistic = statistic.astype(plan.dtype)
        if norm.adds and member.split.copies > 1:
            statistic = statistic / member.split.copies
        found.setdefault(member.start, []).append(pieces.placed(member, statistic))
    return {start: _combined(norm, some) for start, some in found.items()}


def _scales(plan: Plan, scale: Pieces | None) -> Sequence[jax.Array | None]:
    return [None] * len(plan.members) if scale is None else pieces.per_member(plan, scale)


def _combined(norm: Norm, statistics: list[jax.Array]) -> jax.Array:
    if len(statistics) == 1 or norm.combine is None:
        return statistics[0]
    in_two = {jnp.sum: lax.add, jnp.max: lax.max}.get(norm.combine)
    if in_two is None:
        return norm.combine(jnp.stack(statistics), axis=0)
    return in_pairs(in_two, statistics)


def in_pairs(combine: Callable[..., jax.Array], terms: list[jax.Array]) -> jax.Array:
    """All terms combined, two at a time: roundings grow with the logarithm of their number.

    As a reduction of their stack, a thousand would take XLA much longer to compile.
    """
    while len(terms) > 1:
        pairs = [combine(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


TOGETHER = 8
"""How many leaves `_total_of_alike` adds up entry by entry."""


def _total_of_alike(
    plan: Plan,
    entries: Callable[..., jax.Array],
    members: list[tuple[Member, jax.Array, jax.Array | None]],
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
        key = (role, jax.typeof(x), member.split.copies)
        alike.setdefault(key, []).append((x, scale))
    totals = []
    for (*_, copies), some in alike.items():
        for first in range(0, len(some), TOGETHER):
            chosen = some[first : first + TOGETHER]
            scale = chosen[0][1]  # The tree's one scale, for this kernel.
            terms = in_pairs(lax.add, [entries(x, scale) for x, _ in chosen])
            totals.append(jnp.sum(terms).astype(plan.dtype) / copies)
    return in_pairs(lax.add, totals)


def share_above(plan: Plan, updates: Any, threshold: jax.Array) -> jax.Array:
    """The share of entries whose modulus is above the threshold."""

    def count(x: jax.Array) -> jax.Array:
        dtype = norms.accumulator(x.dtype)
        bound, one = threshold.astype(dtype), jnp.ones([], dtype)
        steep = jnp.full([], norms.largest(dtype), dtype)
        x, bound, steep, one = lax.optimization_barrier((x, bound, steep, one))
        # As arithmetic, which XLA fuses into the sum on every backend, and not as a comparison.
        excess = jnp.maximum(norms.modulus(norms.widened(x)), bound) - bound
        return jnp.sum(jnp.minimum(excess * steep, one)).astype(plan.dtype)

    counts = [jnp.zeros([], plan.dtype)]
    for member, x in zip(plan.members, planning.picked(plan, updates), strict=True):
        counts.append(count(x) / member.split.copies)
    total = in_pairs(lax.add, counts)
    if plan.axis_names:
        total = lax.psum(devices.as_varying(total, plan.axis_names), plan.axis_names)
    return total / np.maximum(plan.sizes, 1).astype(plan.dtype)
