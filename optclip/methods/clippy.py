"""Clippy: a bound on every entry of the update, relative to its parameter, that keeps direction."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _numerics, norms, scopes
from optclip._checks import at, check_number, check_sharded
from optclip._tree import devices, limit, pieces
from optclip._tree.layout import Layout, layout_of, select_leaves
from optclip.clipping import NO_PARAMS_MSG, Nonfinite, check_nonfinite
from optclip.limiters import Factor
from optclip.state import (
    ClipState,
    Outcome,
    check_state,
    init_state_by_leaf,
    update_state,
)


def clippy(
    relative: optax.ScalarOrSchedule = 0.1,
    absolute: optax.ScalarOrSchedule = 1e-7,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks every tensor's update until no entry exceeds a share of its parameter (Clippy).

    .. math:: u_l \leftarrow u_l \, \min\left(1, \min_i
        \frac{\rho |w_i| + \alpha}{|u_i|}\right) \quad \text{for each leaf } l

    For after the optimizer: the paper puts it on Adagrad's update.

    One parameter that is nearly zero and has a gradient throttles its whole tensor: the update of
    that entry may be no larger than `absolute`. Tensors that start at zero need a larger one.

    Args:
        relative: rho, the largest update of an entry as a share of the parameter; a number, traced
            scalar or Optax schedule. 0.1 is the released code's default.
        absolute: alpha, what is added to that, in units of the parameter; the released code's 1e-7.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. `norm` reads the largest
        ratio of an entry to its bound, so `threshold` is 1; `clip_rate` the share of leaves
        clipped. No memory. Cost: a pass over updates and parameters; on a CPU one more over the
        updates, for NaN.

    Raises:
        ValueError: If an argument is concrete and negative or NaN, or `update` gets no `params`.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> bound = optclip.clippy()
        >>> params = jnp.array([1.0, 10.0])
        >>> updates, _ = bound.update(jnp.array([0.2, 0.2]), bound.init(params), params)
        >>> [round(float(u), 4) for u in updates]
        [0.1, 0.1]

    References:
        Tang et al., "Improving training stability for multitask ranking models in recommender
        systems", 2023, arXiv:2302.09178. The released optimizer also adds a term relative to
        Adagrad's accumulator, zero by default, which a transformation of the update cannot see.
    """
    check_number(relative, "relative=", hint="the default is 0.1")
    check_number(absolute, "absolute=", hint="the default is 1e-7")
    check_nonfinite(nonfinite)
    check_sharded(axis_name, sharded)

    def init(params: optax.Params) -> ClipState:
        return init_state_by_leaf(params, axis_name, sharded, detail=detail)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        state = init(updates) if state is None else state
        check_state(state, ClipState)
        layout = layout_of(scopes.leaf, updates, axis_name, sharded, params)
        rho, alpha = (at(x, state.steps, jnp.zeros([], layout.dtype)) for x in (relative, absolute))
        with jax.named_scope("optclip/measure"):
            by_leaf = _roots_of_ratios(layout, updates, params, rho, alpha)
            roots = pieces.concatenate(layout, by_leaf)
            finite = jnp.all(jnp.isfinite(roots))
        with jax.named_scope("optclip/limit"):
            # Where the bound is 0 nothing may move.
            shut = finite & (rho == 0) & (alpha == 0)

            def factor_of(roots: jax.Array) -> Factor:
                root = 1 / jnp.where(finite & (roots > 1), roots, 1)
                return Factor(root, jnp.where(shut & (roots > 0), 0, root))

            factor = factor_of(roots)
            factors = {start: factor_of(root) for start, root in by_leaf.items()}
            updates = limit.rescale(layout, updates, factors)
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
        ratios = jnp.where(
            finite, jnp.minimum(roots * roots, _numerics.largest(layout.dtype)), roots
        )
        product = jnp.where(finite, factor.product(), 0 if nonfinite == "zero" else 1)
        left = (roots * factor.coarse) * (roots * factor.fine)
        clipped = jnp.where(finite, left, 0 if nonfinite == "zero" else ratios)
        outcome = Outcome(
            finite=finite,
            norm=_largest(ratios, finite),
            clipped_norm=_largest(clipped, finite | (nonfinite == "zero")),
            threshold=jnp.ones([], layout.dtype),
            factor=jnp.min(product, initial=1),
            share=jnp.mean((finite & (roots > 1)).astype(layout.dtype)) if roots.size else rho * 0,
        )
        groups = (ratios, clipped) if detail else None
        return updates, update_state(state, outcome, (), groups)

    return optax.GradientTransformationExtraArgs(init, update)


def _roots_of_ratios(
    layout: Layout,
    updates: optax.Updates,
    params: optax.Params,
    relative: jax.Array,
    absolute: jax.Array,
) -> pieces.Pieces:
    """Of each leaf the largest ratio of an entry to its bound, as its square root.

    The root stays in range where the ratio does not. Infinity where an entry is not finite.
    """
    # No bound at all is none for parameters of 0 either.
    alpha = jnp.where(jnp.isinf(relative), jnp.inf, absolute)
    rho = jnp.minimum(relative, _numerics.largest(relative.dtype))
    pairs = list(zip(select_leaves(layout, updates), select_leaves(layout, params), strict=True))
    # XLA for a CPU would broadcast the numbers once for all leaves, and write that to memory.
    ways = {"cpu": _numerics.computed_anew, "default": lambda *leaves: leaves}
    found = _numerics.by_platform(
        {k: functools.partial(_roots_of_leaves, way) for k, way in ways.items()}, pairs, rho, alpha
    )
    roots = {
        member.start: root.astype(layout.dtype)
        for member, root in zip(layout.members, found, strict=True)
    }
    if not layout.axis_names:
        return roots
    own = devices.as_varying(pieces.concatenate(layout, roots), layout.axis_names)
    return pieces.split(layout, lax.pmax(own, layout.axis_names))


def _roots_of_leaves(
    read: Callable[..., tuple[jax.Array, ...]],
    pairs: list[tuple[jax.Array, jax.Array]],
    relative: jax.Array,
    absolute: jax.Array,
) -> list[jax.Array]:
    def of_leaf(x: jax.Array, w: jax.Array) -> jax.Array:
        # Halves, since the modulus of a complex number may overflow where its parts do not.
        half = jnp.full([], 0.5, relative.dtype)
        least = jnp.full([], jnp.finfo(_numerics.accumulator(w.dtype)).tiny, relative.dtype)
        own, w, rho, alpha, least, half = read(x, w, relative, half * absolute, least, half)
        size = _numerics.modulus(norms.read(own, half))
        weight = _numerics.modulus(norms.read(w, half))
        rho, alpha, least = (x.astype(weight.dtype) for x in (rho, alpha, least))
        bound = jnp.maximum(rho * weight + alpha, least)
        root = _numerics.square_root(size) / _numerics.square_root(bound).astype(size.dtype)
        return _numerics.peak(root, x, tuple(range(x.ndim)))

    return [of_leaf(x, w) for x, w in pairs]


def _largest(ratios: jax.Array, finite: jax.Array) -> jax.Array:
    return jnp.where(finite, jnp.max(ratios, initial=0), jnp.inf)
