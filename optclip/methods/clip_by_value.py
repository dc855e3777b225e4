"""`clip_by_value`: every entry by itself, which is no norm clip."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import limiters, norms, scopes
from optclip._checks import at, check_number, check_sharded
from optclip._tree import limit, measure
from optclip._tree.layout import layout_of
from optclip.clipping import Nonfinite, check_nonfinite, one_norm_msg
from optclip.state import (
    ClipState,
    Outcome,
    check_state,
    init_state_by_leaf,
    update_state,
)


def clip_by_value(
    max_delta: optax.ScalarOrSchedule,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clamps every entry to [-max_delta, max_delta]: truncation, which changes the direction.

    .. math:: u_i \leftarrow \max(-\delta, \min(u_i, \delta))

    Like `optax.clip`, Keras' `clipvalue`.

    A norm clip keeps the direction of the gradient and shortens it; this one cuts the large
    entries and keeps the small ones. Complex entries are limited in modulus and keep their phase
    (`optax.clip` refuses them).

    Args:
        max_delta: Largest modulus of an entry, in units of the gradient; a number, traced scalar
            or Optax schedule. There is no customary value.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`. "propagate" keeps the whole gradient as it is, infinities too.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. `norm` reads the largest
        entry, `clip_rate` the share of entries clipped. The readings take two passes over the
        gradient (one for the largest entry, one for NaN), and a third to count where entries are
        clipped.

    Raises:
        ValueError: If `max_delta` is concrete and negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.clip_by_value(1.0)
        >>> updates, _ = clip.update(jnp.array([3.0, -0.5]), None)
        >>> updates.tolist()
        [1.0, -0.5]
    """
    check_number(max_delta, "max_delta=", hint="pass jnp.inf to switch clipping off")
    check_nonfinite(nonfinite)
    check_sharded(axis_name, sharded)

    def init(params: optax.Params) -> ClipState:
        return init_state_by_leaf(params, axis_name, sharded, detail=detail)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad_norm: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        if grad_norm is not None:
            raise ValueError(one_norm_msg("entry"))
        state = init(updates) if state is None else state
        check_state(state, ClipState)
        layout = layout_of(scopes.tree, updates, axis_name, sharded, params)
        measured = layout_of(scopes.leaf, updates, axis_name, sharded, params) if detail else layout
        threshold = at(max_delta, state.steps, jnp.zeros([], layout.dtype))
        with jax.named_scope("optclip/measure"):
            found, share = measure.largest_and_share(measured, updates, threshold)
            (peak,) = found.blocks
            leaf_norms = peak.clamped() if detail else None
            if detail:
                peak = norms.pool(norms.linf, [peak], [measured.sizes])
            finite = jnp.all(jnp.isfinite(peak.value))
        with jax.named_scope("optclip/limit"):
            bound = jnp.where(finite, threshold, jnp.inf)
            factor = limiters.factor_of(limiters.rescale, peak, bound)
            updates = limit.clamp(layout, updates, bound)
            zeroed = nonfinite == "zero"
            if zeroed:
                updates = limit.zeroed_unless(finite, updates)
        left = limiters.clipped_norm(limiters.rescale, peak, factor, bound)
        outcome = Outcome(
            finite=finite,
            norm=peak.clamped(),
            clipped_norm=jnp.where(finite, left, 0) if zeroed else left,
            threshold=threshold,
            factor=jnp.where(finite, factor.product(), 0) if zeroed else factor.product(),
            share=jnp.where(finite, share, 0),
        )
        groups = None
        if leaf_norms is not None:
            clipped_norms = jnp.minimum(leaf_norms, bound)
            if zeroed:
                clipped_norms = jnp.where(finite, clipped_norms, 0)
            groups = leaf_norms, clipped_norms
        return updates, update_state(state, outcome, (), groups)

    return optax.GradientTransformationExtraArgs(init, update)
