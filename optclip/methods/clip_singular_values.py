"""A soft limit on every singular value of a matrix."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _matrices, _numerics, norms, scopes
from optclip._checks import at, check_number, check_sharded
from optclip._tree import devices, limit, pieces
from optclip._tree.layout import GroupedLeaf, Layout, checked_axes, layout_of, select_leaves
from optclip._tree.measure import measure_together, room_for_moduli
from optclip.clipping import Nonfinite, check_nonfinite
from optclip.norms import Magnitude
from optclip.scopes import AxesOf, UnitAxes
from optclip.state import ClipState, Outcome, check_state, init_state_by_leaf, update_state


class _Limited(NamedTuple):
    """What became of the matrices of one leaf.

    Attributes:
        updates: The leaf, in its wide type.
        before: The largest singular value of each.
        after: What became of that.
        factors: What that was multiplied by.
    """

    updates: jax.Array
    before: jax.Array
    after: jax.Array
    factors: jax.Array


def clip_singular_values(
    max_value: optax.ScalarOrSchedule,
    *,
    axis: UnitAxes = None,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits every singular value of a matrix smoothly, so that it stays below `max_value`.

    .. math:: X \leftarrow (I + X X^\top / c^2)^{-1/2} X, \quad
        \sigma \leftarrow \sigma / \sqrt{1 + \sigma^2 / c^2}

    A spike is often of low rank: one direction is a thousand times as large, and a clip of the norm
    would shrink all others with it. This shrinks that direction alone. A singular value far below
    the threshold passes nearly unchanged, one at the threshold becomes 0.71 of it, and none exceeds
    it but by rounding. It may stand before the optimizer or after it; the paper does both.

    As Newton and Schulz's iteration of the square root, as the paper has it, a spike of a hundred
    times the threshold takes all else down to a half, one of a thousand to a sixteenth. This form
    keeps it: of a float32 matrix of 256 rows and columns the error is 6e-4 of the threshold (as
    the largest singular value of the difference) at a spike of 1,000 times, 0.4% at 10,000, 3% at
    100,000, and the threshold is exceeded by 1% at the most. Beyond, with h the 100,000th of the
    largest in place of c, a singular value becomes (c / h) s / sqrt(1 + s^2 / h^2): what is beside
    such a spike is mostly rounding.

    Args:
        max_value: c, the singular value that is never exceeded, in units of the gradient (or of the
            update); a number, traced scalar or Optax schedule. The paper's runs take 0.1 for
            gradients and 5 to 10 for updates that are not yet multiplied by the learning rate.
        axis: The axes that one matrix spans: an int, a tuple, or a function (path, shape) -> axes,
            which may answer None to leave a leaf alone. The last of them counts the columns, the
            others together the rows; the axes left over count matrices. None takes all axes: a
            matrix, a convolution's kernel as one matrix, a vector as one column, whose singular
            value is its norm. `lambda path, shape: (1, 2) if "layers" in path else None` limits
            each layer of a stack, and leaves the other leaves alone; (1, 2, 0) is right for an
            attention's kernel of shape (model, heads, head).
        axis_name: See `clip_by`. Every device gathers the whole matrix, and limits it.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`; of a leaf that is left alone it reads 0.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `norm` reads the largest
        singular value of all matrices, `clip_rate` the share of matrices with one above c. No
        memory. Cost, of a matrix of m rows and n <= m columns: 22 multiplications of m n^2 and 49
        of n^3 in float32 (but for 17 in bfloat16, where the leaf is); Muon has 10 and 5. One pass
        over all leaves, and a few matrices in float32 of temporary memory.

    Raises:
        ValueError: If `max_value` is concrete and negative or NaN; when it meets a tree, if an axis
            does not exist.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.clip_singular_values(1.0)
        >>> spiky = jnp.diag(jnp.array([1000.0, 0.1]))
        >>> updates, state = clip.update(spiky, None)
        >>> [round(float(x), 3) for x in jnp.diag(updates)], round(float(state.norm))
        ([1.0, 0.1], 1000)

    References:
        Jiang, Semenov and Stich, "Spectral clipping", 2026, arXiv:2603.14315.
    """
    check_number(max_value, "max_value=", hint="pass jnp.inf to switch clipping off")
    check_nonfinite(nonfinite)
    check_sharded(axis_name, sharded)
    axes_of = scopes.leaf.axes if axis is None else scopes.unit(axis).axes

    def init(params: optax.Params) -> ClipState:
        return init_state_by_leaf(params, axis_name, sharded, detail=detail)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        state = init(updates) if state is None else state
        check_state(state, ClipState)
        layout = layout_of(scopes.leaf, updates, axis_name, sharded, params)
        one = jnp.ones([], layout.dtype)
        threshold = at(max_value, state.steps, one)
        with jax.named_scope("optclip/measure"):
            (peaks,) = measure_together(layout, norms.linf, updates)
            finite = jnp.all(jnp.isfinite(peaks.blocks[0].value))
        with jax.named_scope("optclip/limit"):
            leaves, structure = jax.tree.flatten(updates)
            found: list[_Limited | None] = []
            for member, x in zip(layout.members, select_leaves(layout, updates), strict=True):
                axes = _axes(axes_of, member, jnp.shape(x))
                if axes is None:
                    found.append(None)
                    continue
                limited = _limited(member, axes, x, threshold)
                # In the wide type: a choice among float8 may change the bits of a NaN.
                chosen = jnp.where(finite, limited.updates, _numerics.widened(x))
                leaves[member.index] = chosen.astype(x.dtype)
                found.append(limited)
            updates = jax.tree.unflatten(structure, leaves)
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
        before, after, factor, share = _readings(layout, found, threshold)
        # Of a leaf that is not finite its largest entry tells that.
        largest = peaks.blocks[0].clamped()
        before = jnp.where(jnp.isfinite(largest), before, largest)
        zeroed = nonfinite == "zero"
        after = jnp.where(finite, after, 0 if zeroed else before)
        factor = jnp.where(finite, factor, 0 if zeroed else 1)
        outcome = Outcome(
            finite=finite,
            norm=jnp.max(before, initial=0),
            clipped_norm=jnp.max(after, initial=0),
            threshold=threshold,
            factor=factor,
            share=share,
        )
        groups = (before, after) if detail else None
        return updates, update_state(state, outcome, (), groups)

    return optax.GradientTransformationExtraArgs(init, update)


def _axes(of: AxesOf, member: GroupedLeaf, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a leaf that a matrix spans; their order says which are columns."""
    axes = of(member.path, shape)
    if axes is None:
        return None
    found = checked_axes(axes, member.path, shape)
    if len(set(found)) < len(found):
        raise ValueError(
            f"axis {axes!r} of {member.path!r}, which has {len(shape)} axes: name each once, or "
            "none; a function from path and shape may answer None to leave a leaf alone"
        )
    return found


def _limited(
    member: GroupedLeaf, axes: tuple[int, ...], x: jax.Array, threshold: jax.Array
) -> _Limited:
    whole = pieces.whole(member, x, axes)
    dtype = _numerics.accumulator(x.dtype)
    # A scale for each matrix of a stack.
    half = jnp.full([], room_for_moduli([x]), dtype)
    sizes = _numerics.modulus(norms.read(whole, half))
    peaks = norms.peak_scale(jnp.max(sizes, axis=axes, keepdims=True, initial=0), half)
    scales = _numerics.power_of_two(peaks)
    matrices = _matrices.as_matrices(_numerics.scaled(_numerics.widened(whole), scales), axes)
    upright = _matrices.upright(matrices)
    own = _matrices.multiplied_in(x.dtype)
    square = _matrices.gram(upright, own)
    singular_value = _numerics.square_root(_matrices.largest(square, own))
    scale = jnp.reshape(scales, singular_value.shape)
    bound = threshold.astype(dtype)
    scaled = bound * scale
    unit = _matrices.limited(upright, square, singular_value, scaled)
    unit = unit if upright is matrices else unit.mT
    unit = _matrices.from_matrices(unit, axes, jnp.shape(whole))
    before = Magnitude(singular_value, scale).clamped()
    # What would change by less than the type holds stays as it is.
    idle = singular_value <= math.sqrt(jnp.finfo(dtype).eps) / 4 * scaled
    length = jnp.hypot(singular_value, jnp.where(idle, 1, scaled))
    length = jnp.where(idle | (length == 0), 1, length)
    after = jnp.where(idle, before, bound * (singular_value / length))
    factors = jnp.where(idle, 1, scaled) / length
    kept = jnp.reshape(idle, scales.shape)
    limited = jnp.where(kept, _numerics.widened(whole), _numerics.scaled(unit, bound))
    return _Limited(pieces.own_part(member, limited, axes, x), before, after, factors)


def _readings(
    layout: Layout, found: list[_Limited | None], threshold: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """By leaf the largest singular value before and after; the smallest factor; the share clipped.

    The share is that of matrices whose largest singular value was above the threshold.
    """
    limited = [x for x in found if x is not None]
    zero = jnp.zeros([], layout.dtype)

    def largest(of: Callable[[_Limited], jax.Array]) -> jax.Array:
        own = (zero if x is None else jnp.max(of(x)).astype(layout.dtype) for x in found)
        return jnp.stack(list(own))

    if not limited:
        none = jnp.zeros(layout.shape, layout.dtype)
        return none, none, jnp.ones_like(zero), zero
    before, after = largest(lambda x: x.before), largest(lambda x: x.after)
    factors = jnp.stack([jnp.min(x.factors).astype(layout.dtype) for x in limited])
    above = [
        jnp.sum((x.before > threshold.astype(x.before.dtype)).astype(layout.dtype)) for x in limited
    ]
    share = jnp.sum(jnp.stack(above)) / sum(x.factors.size for x in limited)
    if layout.axis_names:
        # The same on every device, which JAX does not know of what was gathered.
        numbers = jnp.concatenate([before, after, jnp.stack([-jnp.min(factors), share])])
        numbers = lax.pmax(devices.as_varying(numbers, layout.axis_names), layout.axis_names)
        before, after, (least, share) = jnp.split(numbers, [len(found), 2 * len(found)])
        return before, after, -least, share
    return before, after, jnp.min(factors), share
