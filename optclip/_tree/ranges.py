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
    along_axes = any(member.groups > 1 for member in layout.members)
    narrow = layout.dtype == jnp.float32 and not layout.axis_names
    if along_axes and narrow and norm.entries is not None:
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
    found = []
    for windows in windows_of(layout, norm, forest, norms.window_scales(norm, layout.dtype)):
        by_piece = {
            at: _in_range(norm, tuple(window[at] for window in windows), layout.size_at(at))
            for at in windows[0]
        }
        found.append(assembled(layout, by_piece, gathered))
    return found


def _in_64_bits(layout: Layout, norm: Norm, gathered: bool, forest: Forest) -> Found:
    of_leaf = _leaf_in_64_bits_once if is_ours(norm) else _leaf_in_64_bits
    found = []
    for leaves in forest:
        by_piece = {
            member.start: of_leaf(norm, x, member.axes, layout.size_at(member.start))
            for member, x in zip(layout.members, leaves, strict=True)
        }
        found.append(assembled(layout, by_piece, gathered))
    return found


def _leaf_in_64_bits(norm: Norm, x: jax.Array, axes: Axes, size: np.float64) -> Magnitude:
    assert norm.entries is not None
    if jnp.iscomplexobj(x):  # JAX loses its dtype in derivatives there.
        scales = norms.window_scales(norm, jnp.float32)
        return norms.window(norm, _numerics.sums_at(norm.entries, scales, axes, x), size)
    with jax.enable_x64(True):
        length = norm.finish(_numerics.sum_in_64_bits(norm.entries, x, axes), size)
        # The norm of float32 entries may itself be out of float32's range.
        scale = jnp.where(length > 2.0**60, 2.0**-60, 1.0)
        scale = jnp.where(length < 2.0**-60, 2.0**60, scale)
        both = Magnitude(length * scale, scale)
        return jax.tree.map(lambda x: x.astype(jnp.float32), both)


_leaf_in_64_bits_once = jax.jit(_leaf_in_64_bits, static_argnums=(0, 2, 3))
_range_scale = of_piece(norms.range_scale)
_in_range = of_piece(norms.window)
