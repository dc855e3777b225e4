"""What is done to the leaves of a tree: multiplied by factors, clamped, zeroed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _numerics
from optclip._tree import pieces
from optclip._tree.layout import GroupedLeaf, Layout
from optclip._tree.pieces import PerGroup
from optclip.limiters import Factor, Limiter, factor_of, root_of_factor
from optclip.limiters import rescale as rescale_limiter
from optclip.norms import Magnitude


def factors_for(
    limiter: Limiter,
    layout: Layout,
    norms: PerGroup[Magnitude],
    thresholds: PerGroup[jax.Array],
) -> PerGroup[Factor]:
    """The factor of every group; from the pieces themselves where their thresholds are known."""
    factors = [
        factor_of(limiter, *both) for both in zip(norms.blocks, thresholds.blocks, strict=True)
    ]
    in_pieces = _from_pieces if thresholds.pieces else _cut_out
    own = functools.partial(in_pieces, limiter, layout)
    if pieces.are_stacked(layout, thresholds.blocks[0].shape == layout.shape):
        ways = {"cpu": own, "default": functools.partial(_from_blocks, limiter, layout)}
        return PerGroup(factors, _numerics.by_platform(ways, norms, thresholds, factors))
    return PerGroup(factors, own(norms, thresholds, factors))


_Norms = PerGroup[Magnitude]
_Thresholds = PerGroup[jax.Array]
_Pieces = dict[int, Factor]


def _from_pieces(
    limiter: Limiter, layout: Layout, norms: _Norms, thresholds: _Thresholds, factors: list[Factor]
) -> _Pieces:
    """Each leaf's by itself."""
    del layout, factors
    return {
        start: _twice(root_of_factor(limiter, norms.pieces[start], own))
        for start, own in thresholds.pieces.items()
    }


def _from_blocks(
    limiter: Limiter, layout: Layout, norms: _Norms, thresholds: _Thresholds, factors: list[Factor]
) -> _Pieces:
    """All at once: on an accelerator arithmetic on a scalar is an operation of its own."""
    del factors
    both = zip(norms.blocks, thresholds.blocks, strict=True)
    roots = pieces.taken_apart(layout, [root_of_factor(limiter, *each) for each in both])
    return {start: _twice(root) for start, root in roots.items()}


def _cut_out(
    limiter: Limiter, layout: Layout, norms: _Norms, thresholds: _Thresholds, factors: list[Factor]
) -> _Pieces:
    """Of one vector the parts."""
    del limiter, norms, thresholds
    (factor,) = factors
    coarse, fine = (pieces.split(layout, part) for part in factor)
    return {start: Factor(coarse[start], fine[start]) for start in coarse}


def _twice(root: jax.Array) -> Factor:
    return Factor(root, root)


def rescale(
    layout: Layout, updates: optax.Updates, factors: Mapping[int, Factor], *, measured: bool = True
) -> Any:
    """Every leaf times the factor of its groups, in its own dtype.

    Args:
        layout: The layout.
        updates: The tree.
        factors: In pieces; see `PerGroup`.
        measured: Whether the leaves lie in memory and were measured there. What is still to be
            made, as by an optimizer, would have to be written there first.
    """
    coarse = pieces.for_each_leaf(
        layout, {start: factor.coarse for start, factor in factors.items()}
    )
    fine = pieces.for_each_leaf(layout, {start: factor.fine for start, factor in factors.items()})
    own = {member.index: both for member, *both in zip(layout.members, coarse, fine, strict=True)}

    def scaled(member: GroupedLeaf, x: jax.Array) -> jax.Array:
        coarse, fine = own[member.index]
        if measured and x.dtype != _numerics.wide_dtype(x):
            # Twice, since once is what measuring does on a CPU, and XLA takes equals for one.
            (x,) = _numerics.computed_anew(*_numerics.computed_anew(x))
        return _numerics.scaled(_numerics.scaled(_numerics.widened(x), coarse), fine)

    return _mapped(layout, updates, scaled)


def clamp(layout: Layout, updates: optax.Updates, threshold: jax.Array) -> Any:
    """Every entry limited by itself; a complex one in modulus, keeping its phase."""

    def clamped(member: GroupedLeaf, x: jax.Array) -> jax.Array:
        x, bound = _numerics.computed_anew(x, threshold)
        wide, bound = _numerics.widened(x), bound.astype(_numerics.accumulator(x.dtype))
        if not jnp.iscomplexobj(x):
            return jnp.clip(wide, -bound, bound)
        factor = entry_factor(wide, bound)
        return _numerics.scaled(_numerics.scaled(wide, factor.coarse), factor.fine)

    return _mapped(layout, updates, clamped)


def entry_factor(wide: jax.Array, bound: jax.Array) -> Factor:
    """The factor of every entry, as a group of its own."""
    # At half the size: a modulus may overflow where the entry does not.
    half = jnp.full([], 0.5, bound.dtype)
    modulus = _numerics.modulus(_numerics.scaled(wide, half))
    return factor_of(rescale_limiter, Magnitude(modulus, half), bound)


def zeroed_unless(finite: jax.Array, updates: optax.Updates) -> Any:
    """Zeros in place of all updates, unless the step is finite."""

    def zeroed(x: Any) -> Any:
        return lax.select(finite, x, jnp.zeros_like(x)) if _numerics.is_floating(x) else x

    return jax.tree.map(zeroed, updates)


def _mapped(
    layout: Layout, updates: optax.Updates, change: Callable[[GroupedLeaf, jax.Array], jax.Array]
) -> Any:
    """The leaves that take part, changed and back in their dtype; the others as they were."""
    leaves, structure = jax.tree.flatten(updates)
    for member in layout.members:
        x = jnp.asarray(leaves[member.index])
        changed = change(member, x)
        leaves[member.index] = changed if changed.dtype == x.dtype else changed.astype(x.dtype)
    return jax.tree.unflatten(structure, leaves)
