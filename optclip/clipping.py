"""`clip_by`: measure, threshold, limit, observe, as one Optax transformation."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _numerics, limiters, norms, scopes, thresholds
from optclip._checks import check_choice
from optclip._tree import limit, measure
from optclip._tree.layout import Layout, layout_of, shape_of_norms
from optclip._tree.pieces import PerGroup
from optclip.limiters import Factor, Limiter
from optclip.norms import Magnitude, Norm
from optclip.scopes import Scope
from optclip.state import (
    ClipState,
    GroupDetail,
    LeafDetail,
    Outcome,
    init_state,
    step_of,
    update_state,
    where_learned,
)
from optclip.thresholds import ParameterNorms, Rule
from optclip.thresholds.rules import RuleLike, first_memory

Nonfinite = Literal["propagate", "zero"]


def clip_by(
    rule: RuleLike,
    *,
    scope: Scope = scopes.tree,
    norm: Norm = norms.l2,
    limiter: Limiter = limiters.rescale,
    axis_name: str | Sequence[str] | None = None,
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
        limiter: How a norm above its threshold is reduced; from `optclip.limiters`. Default:
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
    by_leaf = scope.one_group or (scope.whole_leaves and scope.labels is None)
    kind_of_detail = LeafDetail if by_leaf else GroupDetail
    detail_scope = scopes.leaf if scope.one_group else scope

    def init(params: optax.Params) -> ClipState:
        dtype = _numerics.tree_dtype(params)

        def zeros(scope: Scope) -> jax.Array:
            return jnp.zeros(shape_of_norms(scope, params, axis_name, sharded), dtype)

        memory = first_memory(rule, zeros(scope if rule.has_memory else scopes.tree))
        groups = kind_of_detail(zeros(detail_scope), zeros(detail_scope)) if detail else ()
        return init_state(params, memory, groups)

    def measured(layout: Layout, *trees: Any) -> tuple[list[PerGroup[Magnitude]], jax.Array | None]:
        """The norms of each tree; those of the leaves too where detail of one group is wanted."""
        if not (detail and scope.one_group):
            return measure.measure_together(layout, norm, *trees), None
        leaves = layout_of(scopes.leaf, trees[0], axis_name, sharded)
        by_leaf = [x.vector for x in measure.measure_together(leaves, norm, *trees)]
        pooled = [norms.pool(norm, of_leaves, leaves.sizes) for of_leaves in by_leaf]
        return [PerGroup(all_, {0: all_}) for all_ in pooled], by_leaf[0].clamped()

    def thresholds_now(
        state: ClipState, layout: Layout, found: list[PerGroup[Magnitude]]
    ) -> PerGroup[jax.Array]:
        """What the rule allows; by pieces too, where it can be asked for each by itself."""

        def ask(
            norms: Magnitude, of_params: list[Magnitude], sizes: jax.typing.ArrayLike
        ) -> jax.Array:
            seen = (_numerics.narrowed(x.clamped(), state.norm.dtype) for x in (norms, *of_params))
            now, *references = seen
            reference = ParameterNorms(references[0], sizes) if references else None
            asked = rule.threshold(state.memory, step_of(state), now, reference)
            return asked.astype(norms.value.dtype)

        own, *others = found
        asked = ask(own.vector, [x.vector for x in others], layout.sizes)
        pieces: dict[int, jax.Array] = {}
        if rule.separable and layout.shape and not layout.axis_names:
            for start, piece in own.pieces.items():
                size = layout.size_at(start)
                of_piece = [x.pieces[start] for x in others]
                pieces[start] = ask(piece, of_piece, size) if asked.ndim else asked
            if any(x.shape not in ((), own.pieces[at].value.shape) for at, x in pieces.items()):
                pieces = {}  # A vector for all groups says nothing of one.
        return PerGroup(jnp.broadcast_to(asked, layout.shape), pieces)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        if rule.needs_params and params is None:
            raise ValueError(NO_PARAMS_MSG)
        if state is None and rule.has_memory:
            raise ValueError(NEEDS_STATE_MSG)
        state = init(updates) if state is None else state
        layout = layout_of(scope, updates, axis_name, sharded)
        with jax.named_scope("optclip/measure"):
            trees = (updates, params) if rule.needs_params else (updates,)
            found, leaf_norms = measured(layout, *trees)
            magnitude, group_norms = found[0].vector, found[0].vector.clamped()
            finite = jnp.all(jnp.isfinite(magnitude.value))
        with jax.named_scope("optclip/threshold"):
            threshold = thresholds_now(state, layout, found)
        with jax.named_scope("optclip/limit"):
            # A step with a non-finite entry is handed on as it is, in every group.
            bound = jax.tree.map(lambda x: jnp.where(finite, x, jnp.inf), threshold)
            factors = limit.factors_for(limiter, layout, found[0], bound)
            updates = limit.rescale(layout, updates, factors.pieces)
            factor, clipped_norms = factors.vector, limiters.clipped_norm(magnitude, factors.vector)
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
                factor = Factor(factor.coarse, jnp.where(finite, factor.fine, 0))
                clipped_norms = jnp.where(finite, clipped_norms, 0)
        with jax.named_scope("optclip/observe"):
            dtype = state.norm.dtype
            shown = (_numerics.narrowed(x, dtype) for x in (group_norms, clipped_norms))
            memory = rule.observe(state.memory, step_of(state), *shown)
            # Neither a non-finite step nor, in its group, a norm of 0 is learned from.
            memory = where_learned(finite & (group_norms > 0), memory, state.memory)
        outcome = Outcome(
            finite=finite,
            norm=_pooled(norm, layout, magnitude),
            clipped_norm=_pooled(norm, layout, norms.plain(clipped_norms)),
            threshold=jnp.min(threshold.vector, initial=jnp.inf, where=layout.sizes > 0),
            factor=jnp.min(factor.product(), initial=1),
            share=_share_above(layout, group_norms, bound.vector),
        )
        groups = _details(group_norms, clipped_norms, leaf_norms) if detail else None
        kept = kind_of_detail(*groups) if groups else ()
        return updates, update_state(state, outcome, memory, kept)

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


def check_nonfinite(nonfinite: str) -> None:
    """Refuses anything but the two policies."""
    check_choice(nonfinite, ("propagate", "zero"), "nonfinite=")


def _share_above(layout: Layout, group_norms: jax.Array, threshold: jax.Array) -> jax.Array:
    present = max(int(np.sum(layout.sizes > 0)), 1)  # A label may have no leaf.
    return jnp.sum((group_norms > threshold).astype(group_norms.dtype)) / present


def _pooled(norm: Norm, layout: Layout, groups: Magnitude) -> jax.Array:
    """The norm of all groups together."""
    pooled = groups if layout.shape == () else norms.pool(norm, groups, layout.sizes)
    return pooled.clamped()


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
