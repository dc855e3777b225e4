"""`clip_by`: measure, threshold, limit, observe, as one Optax transformation."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _numerics, limiters, norms, scopes, thresholds
from optclip._checks import check_choice
from optclip._tree import limit, measure, pieces
from optclip._tree.layout import Layout, layout_of, shape_of_norms
from optclip._tree.measure import Norms
from optclip.limiters import Factor, Limiter
from optclip.norms import Magnitude, Norm
from optclip.scopes import Scope
from optclip.state import (
    ClipState,
    Detail,
    GroupDetail,
    LeafDetail,
    Outcome,
    init_state,
    step_of,
    update_state,
    where_learned,
)
from optclip.thresholds import ParameterNorms, Rule
from optclip.thresholds.rules import first_memory

Nonfinite = Literal["propagate", "zero"]


def clip_by(
    rule: Any,
    *,
    scope: Scope = scopes.tree,
    norm: Norm = norms.l2,
    limiter: Limiter = limiters.rescale,
    axis_name: Any = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates by a norm, a threshold rule, a scope and a limiter.

    Every named method of this library is one call of this function:

    .. math:: u_S \leftarrow f(\|u_S\|, \tau_S) \, u_S \quad \text{for each group } S

    where the scope gives the groups, the norm measures them, the rule gives the thresholds, and
    the limiter is f.

    Args:
        rule: How large a norm may be: a number, a traced scalar, an Optax schedule (a function of
            the number of earlier updates), or a `Rule` from `optclip.thresholds`.
        scope: Which entries share a norm; from `optclip.scopes`. Default: all of them.
        norm: How a group is measured; from `optclip.norms`. Default: the 2-norm.
        limiter: How a norm above its threshold is brought down; from `optclip.limiters`. Default:
            multiplication by threshold / norm.
        axis_name: Inside `shard_map` and `pmap`: the mesh axes over which leaves may be split, a
            name or a tuple of names. `()` has every device clip its own part by itself.
        sharded: Where JAX does not track which leaves are split over `axis_name` (`pmap`, or
            `shard_map` with `check_vma=False`): a tree of `PartitionSpec`, or a function from
            path to the axes a leaf is split over. None as an answer: the leaf is not split.
        nonfinite: What a gradient with a non-finite entry becomes: "propagate" hands the whole
            tree on untouched, "zero" makes every update of the step zero. Neither is learned from.
        detail: Whether the state also keeps the norm of every group (of every leaf where the scope
            is the whole tree): two float32 vectors.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. Updates keep their dtype;
        norms are float32 or better. One pass over the updates to measure them and one to multiply
        them; the second is fused into what follows.

    Raises:
        ValueError: If an argument is concrete and makes no sense.

    Example:
        A norm per layer, the largest entry as norm, a threshold that falls:

        >>> import jax.numpy as jnp, optax, optclip
        >>> from optclip import norms, scopes
        >>> clip = optclip.clip_by(
        ...     optax.linear_schedule(1.0, 0.1, transition_steps=1000),
        ...     scope=scopes.group(lambda path: path.split("/")[0]),
        ...     norm=norms.linf,
        ... )
        >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> grads = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.full(2, 4.0)}}
        >>> updates, state = clip.update(grads, clip.init(params), params)
        >>> updates["dense"]["bias"].tolist(), updates["dense"]["kernel"][0].tolist()
        ([1.0, 1.0], [0.25, 0.25])
    """
    rule = thresholds.as_rule(rule)
    _check(rule, scope, norm, limiter, nonfinite)
    if scope.per_entry:
        norm = norms.linf  # Every norm of one entry is its modulus; the tree's is the largest.

    by_leaf = scope.one_group or (scope.whole_leaves and scope.labels is None)
    kind_of_detail = LeafDetail if by_leaf else GroupDetail

    def look(updates: Any, scope: Scope = scope) -> Layout:
        return layout_of(scope, updates, axis_name, sharded)

    def shape_of(params: Any, scope: Scope) -> tuple[int, ...]:
        return shape_of_norms(scope, params, axis_name, sharded)

    def measured(layout: Layout, *trees: Any) -> list[tuple[Norms, jax.Array | None]]:
        """The norms of the groups; those of the leaves too where detail of one group is wanted."""
        if not (detail and scope.one_group):
            return [(found, None) for found in measure.measure_together(layout, norm, *trees)]
        leaves = look(trees[0], scopes.leaf)
        found = []
        for of_leaves, _ in measure.measure_together(leaves, norm, *trees):
            pooled = norms.pool(norm, of_leaves, leaves.sizes)
            found.append((Norms(pooled, {0: pooled}), of_leaves.clamped()))
        return found

    def threshold_for(
        state: ClipState, found: Magnitude, of_params: Magnitude | None, sizes: Any
    ) -> jax.Array:
        reference = None
        if of_params is not None:
            reference = ParameterNorms(_as_kept(of_params.clamped(), state), sizes)
        shown = _as_kept(found.clamped(), state)
        threshold = rule.threshold(state.memory, step_of(state), shown, reference)
        return threshold.astype(found.value.dtype)

    def init(params: Any) -> ClipState:
        dtype = _numerics.tree_dtype(params)
        shape = shape_of(params, scope) if rule.has_memory else ()
        memory = first_memory(rule, jnp.zeros(shape, dtype))
        groups: Detail | tuple[()] = ()
        if detail:
            shape = shape_of(params, scopes.leaf if scope.one_group else scope)
            groups = kind_of_detail(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        return init_state(params, memory, groups)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipState]:
        del extra_args
        if rule.needs_params and params is None:
            raise ValueError(NO_PARAMS_MSG)
        if state is None:
            if rule.has_memory:
                raise ValueError(NEEDS_STATE_MSG)
            state = init(updates)
        layout = look(updates)
        with jax.named_scope("optclip/measure"):
            trees = (updates, params) if rule.needs_params else (updates,)
            (found, leaf_norms), *others = measured(layout, *trees)
            of_params = others[0][0] if others else None
            magnitude, group_norms = found.together, found.together.clamped()
            finite = jnp.all(jnp.isfinite(magnitude.value))
        with jax.named_scope("optclip/threshold"):
            reference = None if of_params is None else of_params.together
            asked = threshold_for(state, magnitude, reference, layout.sizes)
            threshold = jnp.broadcast_to(asked, layout.shape)
        with jax.named_scope("optclip/limit"):
            # A step with a non-finite entry is handed on as it is, in every group.
            bound = jnp.where(finite, threshold, jnp.inf)
            factor = limiters.factor_of(limiter, magnitude, bound)

            def factors_by_piece() -> dict[int, Factor]:
                """From the pieces themselves, where their thresholds depend on nothing else."""
                factors: dict[int, Factor] = {}
                for start, piece in found.pieces.items():
                    own = asked
                    if asked.ndim:
                        of_piece = None if of_params is None else of_params.pieces[start]
                        own = threshold_for(state, piece, of_piece, layout.size_at(start))
                    if own.shape not in ((), piece.value.shape):
                        return {}
                    own = jnp.where(finite, own, jnp.inf)
                    root = limiters.root_of_factor(limiter, piece, own)
                    factors[start] = Factor(root, root)
                return factors

            if scope.per_entry:
                share = _share_of_entries(layout, updates, group_norms, bound)
                updates = limit.clamp(layout, updates, limiter, bound)
            else:
                share = _share_of_groups(layout, group_norms, bound)
                separate = rule.separable and layout.shape and not layout.axis_names
                factors = factors_by_piece() if separate else {}
                if not factors:
                    coarse, fine = (pieces.split(layout, part) for part in factor)
                    factors = {start: Factor(coarse[start], fine[start]) for start in coarse}
                updates = limit.rescale(layout, updates, factors)
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
                factor = Factor(factor.coarse, jnp.where(finite, factor.fine, 0))
        clipped_norms = limiters.clipped_norm(magnitude, factor)
        if nonfinite == "zero":
            clipped_norms = jnp.where(finite, clipped_norms, 0)
        with jax.named_scope("optclip/observe"):
            seen, left = _as_kept(group_norms, state), _as_kept(clipped_norms, state)
            memory = rule.observe(state.memory, step_of(state), seen, left)
            # Neither a non-finite step nor, in its group, a norm of 0 is learned from.
            memory = where_learned(finite & (group_norms > 0), memory, state.memory)
        outcome = Outcome(
            finite=finite,
            norm=_together(norm, layout, magnitude),
            clipped_norm=_together(norm, layout, norms.plain(clipped_norms)),
            threshold=jnp.min(threshold, initial=jnp.inf, where=layout.sizes > 0),
            factor=jnp.min(factor.product(), initial=1),
            share=share,
        )
        groups: Detail | tuple[()] = ()
        if detail:
            groups = kind_of_detail(*_details(group_norms, clipped_norms, leaf_norms))
        return updates, update_state(state, outcome, memory, groups)

    return optax.GradientTransformationExtraArgs(init, update)


NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
)
"""What Optax's transformations say there."""

NEEDS_STATE_MSG = (
    "this clip learns from earlier steps and needs its state: pass what init(params) or the last "
    "update(...) returned, not None"
)


def _check(rule: Rule, scope: Any, norm: Any, limiter: Any, nonfinite: Any) -> None:
    for value, kind, name in (
        (scope, Scope, "scope"),
        (norm, Norm, "norm"),
        (limiter, Limiter, "limiter"),
    ):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name}= must be one of optclip.{name}s (called, where it takes arguments), "
                f"got {value!r}"
            )
    check_nonfinite(nonfinite)
    if norm.combine is None and scope.name != "leaf":
        raise ValueError(
            f"the norm {norm.name!r} exists only for one whole leaf, not for scope {scope.name!r}; "
            "pass scope=scopes.leaf"
        )
    if scope.per_entry and rule.needs_params:
        raise ValueError(
            "a threshold relative to the parameters needs a scope with norms, not scopes.element; "
            "pass scopes.unit() or scopes.leaf"
        )


def check_nonfinite(nonfinite: Any) -> None:
    """Refuses anything but the two policies."""
    check_choice(nonfinite, ("propagate", "zero"), "nonfinite=")


def _as_kept(x: jax.Array, state: ClipState) -> jax.Array:
    """Norms in the dtype of the state: gradients may be wider than its parameters were."""
    return _numerics.narrowed(x, state.norm.dtype)


def _share_of_groups(layout: Layout, group_norms: jax.Array, threshold: jax.Array) -> jax.Array:
    present = max(int(np.sum(layout.sizes > 0)), 1)  # A label may have no leaf.
    return jnp.sum((group_norms > threshold).astype(group_norms.dtype)) / present


def _share_of_entries(layout: Layout, updates: Any, peak: jax.Array, bound: jax.Array) -> jax.Array:
    # Counting reads the gradient once more, so it is left out where nothing is clipped.
    above = peak > bound
    return _numerics.where_needed(
        above,
        lambda updates: measure.share_above(layout, updates, bound),
        lambda updates: 0 * above.astype(layout.dtype),
        updates,
    )


def _together(norm: Norm, layout: Layout, groups: Magnitude) -> jax.Array:
    together = groups if layout.shape == () else norms.pool(norm, groups, layout.sizes)
    return together.clamped()


def _details(
    group_norms: jax.Array, clipped_norms: jax.Array, leaf_norms: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if leaf_norms is None:
        return group_norms, clipped_norms
    # One group: every leaf shrinks as the whole does.
    shrink = jnp.where(
        group_norms > 0, clipped_norms / jnp.where(group_norms > 0, group_norms, 1), 1
    )
    return leaf_norms, leaf_norms * shrink
