"""The norms of a tree: one pass over its leaves, one sum over the devices.

Inside `shard_map` each device puts the statistics of its parts in their places, and one sum over
the mesh both adds up what is split and gathers what is not.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optclip import devices, norms, planning
from optclip.norms import Magnitude, Norm
from optclip.planning import Member, Plan


def measure(plan: Plan, norm: Norm, tree: Any) -> Magnitude:
    """The norms of all groups, right whatever their size; see `measure_together`."""
    return measure_together(plan, norm, tree)[0]


def measure_together(plan: Plan, norm: Norm, *trees: Any) -> list[Magnitude]:
    """The norms of all groups of several trees, with one sum over the devices for all of them.

    Args:
        plan: From `plan` for the first tree or one of its structure.
        norm: The norm.
        *trees: Updates, or updates and parameters.

    Returns:
        For each tree a `Magnitude` of arrays of shape `plan.shape`.
    """
    forest = [planning.picked(plan, tree) for tree in trees]
    if plan.dtype == jnp.float64:  # Beside 64-bit leaves the others are measured in 64 bits too.
        forest = [[norms.widened(x, plan.dtype) for x in leaves] for leaves in forest]

    def statistics(norm: Norm, scales: list[Any]) -> list[jax.Array]:
        return _statistics(plan, norm, forest, scales)

    def finished(statistics: list[jax.Array], scales: list[jax.Array]) -> list[Magnitude]:
        return [
            Magnitude(norm.finish(statistic, plan.sizes), scale)
            for statistic, scale in zip(statistics, scales, strict=True)
        ]

    # The modulus of a complex number may overflow where its parts do not: by a factor below 2.
    halving = [any(jnp.iscomplexobj(x) for x in leaves) for leaves in forest]
    halves = [jnp.full(plan.shape, 0.5 if half else 1, plan.dtype) for half in halving]
    halved = [half if halve else None for half, halve in zip(halves, halving, strict=True)]
    if norm.safety == "exact":
        return finished(statistics(norm, halved), halves)
    if norm.safety == "peak":
        peaks = statistics(norms.linf, halved)
        # A constant to derivatives: any other scale would give the same norm.
        scales = [
            lax.stop_gradient(norms.peak_scale(peak, half))
            for peak, half in zip(peaks, halves, strict=True)
        ]
        return finished(statistics(norm, scales), scales)
    plain = statistics(norm, [None] * len(forest))
    if not any(norms.can_leave_range(x.dtype) for leaves in forest for x in leaves):
        return finished(plain, [jnp.ones(plan.shape, plan.dtype)] * len(forest))
    scales = [norms.range_scale(norm, statistic, plan.sizes) for statistic in plain]
    rescaled = where_needed(
        functools.reduce(jnp.logical_or, [jnp.any(scale != 1) for scale in scales]),
        lambda forest, scales: _statistics(plan, norm, forest, scales),
        lambda forest, scales: plain,
        forest,
        scales,
    )
    return finished(rescaled, scales)


def where_needed(
    needed: jax.Array, compute: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any
) -> Any:
    """One of two functions; the branch is Python's outside jit, where XLA's would compile anew."""
    if isinstance(needed, Tracer):
        return lax.cond(needed, compute, otherwise, *operands)
    return compute(*operands) if needed else otherwise(*operands)


def _statistics(
    plan: Plan, norm: Norm, forest: list[list[jax.Array]], scales: list[jax.Array | None]
) -> list[jax.Array]:
    """One pass over the leaves of each tree: the statistic of every group, over all devices."""
    own = [
        _statistics_here(plan, norm, leaves, scale)
        for leaves, scale in zip(forest, scales, strict=True)
    ]
    if not plan.axis_names:
        return own
    own = [devices.as_varying(statistic, plan.axis_names) for statistic in own]
    if len(own) == 1:
        return [norm.across(own[0], plan.axis_names)]
    return list(norm.across(jnp.stack(own), plan.axis_names))


def _statistics_here(
    plan: Plan, norm: Norm, leaves: list[jax.Array], scale: jax.Array | None
) -> jax.Array:
    """One pass over the leaves of a tree: the statistic of every group, on this device."""
    scale = None if scale is None else planning.gathered(scale)
    pieces: dict[int, list[jax.Array]] = {}
    for member, x in zip(plan.members, leaves, strict=True):
        local_scale = None if scale is None else planning.own(plan, member, scale)
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
        return jnp.reshape(combined.get(0, jnp.zeros(1, plan.dtype)), ())
    # Groups that no leaf takes part in have a place too: a label that this tree lacks.
    return planning.gathered(_concatenated(combined, plan))


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
        statistic = lax.dynamic_update_slice(
            whole, statistic, planning.corner(member, statistic.shape)
        )
    return jnp.reshape(planning.gathered(statistic), (-1,))


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
        for member, x in zip(plan.members, planning.picked(plan, updates), strict=True)
    ]
    total = jnp.sum(jnp.stack(counts)) if counts else jnp.zeros([], plan.dtype)
    if plan.axis_names:
        total = lax.psum(devices.as_varying(total, plan.axis_names), plan.axis_names)
    return total / np.maximum(plan.sizes, 1).astype(plan.dtype)
