"""Norms whose statistic may leave the range of its dtype where the norm does not.

The squares of float32 entries of 1e19 and of 1e-19 are out of float32's range. Three ways keep the
norm right, and each is the quickest somewhere:

- A second look. Everything is measured plainly, and again, at a scale for every group, where a
  statistic was out of range: one pass, and a branch that is rarely taken. For a CPU.
- Three windows. Each statistic at three scales in one reduction; one of them is in range. No
  branch: on a GPU the host would wait for it at every step. The arithmetic costs nothing there and
  on a TPU beside reading the leaf; on a CPU it does.
- 64 bits. Along an axis XLA fuses no reduction with several results for a GPU, but one in float64,
  which the squares of float32 cannot leave. On GPUs whose float64 is slow it is slower than memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip import _numerics, norms
from optclip._numerics import Axes
from optclip._tree import pieces
from optclip._tree.layout import Layout
from optclip._tree.pieces import PerGroup
from optclip._tree.statistics import (
    Forest,
    assembled,
    by_group,
    finished,
    is_ours,
    of_piece,
    statistics_of,
    windows_of,
)
from optclip.norms import Magnitude, Norm

Found = list[PerGroup[Magnitude]]


def measured(layout: Layout, norm: Norm, forest: Forest, gathered: bool) -> Found:
    """The norms of all groups of each tree; see `measure.measure_together`."""
    ways = {"cpu": _with_a_second_look, "default": _in_three_windows}
    narrow = layout.dtype == jnp.float32 and not layout.axis_names
    if layout.has_units and narrow and norm.entries is not None:
        ways["cuda"] = _in_64_bits
    own = {
        platform: functools.partial(way, layout, norm, gathered) for platform, way in ways.items()
    }
    return _numerics.by_platform(own, forest)


def _with_a_second_look(layout: Layout, norm: Norm, gathered: bool, forest: Forest) -> Found:
    forest = [_numerics.cast_anew(leaves) for leaves in forest]
    plain = statistics_of(layout, norm, forest, [None] * len(forest))
    scales = [
        {at: _range_scale(norm, x, layout.size_at(at)) for at, x in of_tree.items()}
        for of_tree in plain
    ]
    wanted = [
        norms.range_scale(norm, block, size) != 1
        for of_tree in plain
        for block, size in zip(
            pieces.in_blocks(layout, of_tree, gathered),
            pieces.sizes_in_blocks(layout, gathered),
            strict=True,
        )
    ]
    needed = pieces.total(jnp.any, wanted)
    corrected = _numerics.where_needed(
        needed,
        lambda forest, scales: statistics_of(layout, norm, forest, scales, compact=True),
        lambda forest, scales: jax.tree.map(jnp.zeros_like, plain),
        forest,
        scales,
    )
    statistics = jax.tree.map(functools.partial(jnp.where, needed), corrected, plain)
    pairs = zip(statistics, scales, strict=True)
    return [finished(layout, norm, x, scale, gathered) for x, scale in pairs]


def _in_three_windows(layout: Layout, norm: Norm, gathered: bool, forest: Forest) -> Found:
    scales = norms.window_scales(norm, layout.dtype)
    return [
        _assembled(layout, gathered, norm, norms.window, windows)
        for windows in windows_of(layout, norm, forest, scales)
    ]


def _in_64_bits(layout: Layout, norm: Norm, gathered: bool, forest: Forest) -> Found:
    sum_of_leaf = _sum_in_64_bits_once if is_ours(norm) else _sum_in_64_bits
    with jax.enable_x64(True):
        sums: list[pieces.Pieces] = []
        for leaves in forest:
            of_leaves = [
                sum_of_leaf(norm, x, member.axes, layout.size_at(member.start))
                for member, x in zip(layout.members, leaves, strict=True)
            ]
            sums.append(by_group(layout, norm, of_leaves, jnp.dtype(jnp.float64)))
        return [_assembled(layout, gathered, norm, _from_64_bits, [x]) for x in sums]


def _sum_in_64_bits(norm: Norm, x: jax.Array, axes: Axes, size: np.float64) -> jax.Array:
    assert norm.entries is not None
    if not jnp.iscomplexobj(x):
        return _numerics.sum_in_64_bits(norm.entries, x, axes)
    own = _numerics.accumulator(x.dtype)
    with jax.enable_x64(own == jnp.float64):  # Else JAX loses the leaf's dtype in derivatives.
        scales = norms.window_scales(norm, own)
        found = norms.window(norm, _numerics.sums_at(norm.entries, scales, axes, x), size)
    value, scale = (part.astype(jnp.float64) for part in found)
    return norm.lift(value / scale, size)


_sum_in_64_bits_once = jax.jit(_sum_in_64_bits, static_argnums=(0, 2, 3))


def _assembled(
    layout: Layout,
    gathered: bool,
    norm: Norm,
    finish: Callable[[Norm, tuple[jax.Array, ...], Any], Magnitude],
    statistics: Sequence[pieces.Pieces],
) -> PerGroup[Magnitude]:
    """Norms from statistics: of whole blocks where they can be taken apart again.

    On an accelerator arithmetic on a scalar is an operation of its own, and takes as long as on a
    thousand of them.
    """
    if not pieces.are_stacked(layout, gathered):
        by_piece = {
            at: finish(norm, tuple(x[at] for x in statistics), layout.size_at(at))
            for at in statistics[0]
        }
        return assembled(layout, by_piece, gathered)
    stacks = zip(*(pieces.in_blocks(layout, x, gathered) for x in statistics), strict=True)
    sizes = pieces.sizes_in_blocks(layout, gathered)
    blocks = [finish(norm, stack, size) for stack, size in zip(stacks, sizes, strict=True)]
    values, scales = (pieces.taken_apart(layout, list(x)) for x in zip(*blocks, strict=True))
    return PerGroup(blocks, {at: Magnitude(values[at], scales[at]) for at in values})


def _from_64_bits(norm: Norm, sums: tuple[jax.Array, ...], size: norms.Size) -> Magnitude:
    length = norm.finish(sums[0], size)
    # The norm of float32 entries may itself be out of float32's range.
    scale = jnp.where(length > 2.0**60, 2.0**-60, 1.0)
    scale = jnp.where(length < 2.0**-60, 2.0**60, scale)
    both = Magnitude(length * scale, scale)
    return jax.tree.map(lambda x: x.astype(jnp.float32), both)


_range_scale = of_piece(norms.range_scale)
