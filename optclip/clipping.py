"""`clip_by`: measure, threshold, limit, observe, as one Optax transformation."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _numerics, limiters, norms, scopes, thresholds
from optclip._checks import check_choice, check_norm, check_sharded, number_at
from optclip._tree import limit, measure, pieces
from optclip._tree.layout import Layout, layout_at_init, layout_of, leaves_of, shape_of_norms
from optclip._tree.pieces import PerGroup
from optclip.limiters import Limiter
from optclip.norms import Magnitude, Norm
from optclip.scopes import Scope
from optclip.state import (
    ClipState,
    GroupDetail,
    LeafDetail,
    Norms,
    Outcome,
    check_state,
    init_detail,
    init_state,
    step_of,
    update_state,
    where_learned,
)
from optclip.thresholds import ParameterNorms, Rule, Step
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
        nonfinite: What a gradient with a non-finite entry becomes: "propagate" passes the whole
            tree on unchanged, "zero" makes every update of the step zero. No rule learns from such
            a step.
        detail: Whether the state also keeps the norm of every group (of every leaf where the scope
            is the whole tree): two float32 vectors.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. Updates keep their dtype;
        norms are float32 or better. Cost: one pass over the updates to measure them and one to
        multiply them, which is fused into what follows. A clip with one norm also takes it as
        `update(..., grad_norm=n)` and then measures nothing, as for the stages of a pipeline. The
        number must be the norm of what this clip receives. It is not validated, and a NaN in the
        gradient shows only if the number is NaN.

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
    check_sharded(axis_name, sharded)
    by_leaf = scope.one_group or (scope.whole_leaves and scope.labels is None)
    kind_of_detail = LeafDetail if by_leaf else GroupDetail
    detail_scope = scopes.leaf if scope.one_group else scope
    within_leaves = scope._replace(labels=None, order=None, one_group=False)

    def init(params: optax.Params) -> ClipState:
        dtype = _numerics.tree_dtype(params)

        remembered = scope if rule.has_memory else scopes.tree
        like = jnp.zeros(shape_of_norms(remembered, params, axis_name, sharded), dtype)
        groups = ()
        if detail:
            layout = layout_at_init(detail_scope, params, axis_name, sharded)
            zeros = _by_name(layout, jnp.zeros(layout.shape, dtype))
            groups = init_detail(kind_of_detail, zeros)
        return init_state(params, first_memory(rule, like), groups)

    def measured(
        layout: Layout, params: Any, *trees: Any
    ) -> tuple[list[PerGroup[Magnitude]], jax.Array | None, jax.Array | None]:
        """The norms of each tree; of leaves, for details of one group; entries that move."""
        details = detail and scope.one_group
        # Groups of several leaves: what does not move must not count among the parameters.
        weighing = rule.needs_params and scope.labels is not None and bool(layout.members)
        found: list[PerGroup[Magnitude]] = []
        pooling = details or (weighing and bool(layout.axis_names))  # Devices talk once.
        if not pooling:
            gathered = detail or weighing or not _works_in_parts(rule, norm, layout)
            found = measure.measure_together(layout, norm, *trees, gathered=gathered)
        if not details and not weighing:
            return found, None, None
        leaves = leaves_of(layout, within_leaves, trees[0], axis_name, sharded, params)
        by_leaf = [x.blocks[0] for x in measure.measure_together(leaves, norm, *trees)]
        if pooling:
            found = [measure.pooled(layout, norm, leaves, x, leaves.sizes) for x in by_leaf]
        leaf_norms, moving = by_leaf[0].clamped() if details else None, None
        if weighing:
            found[1], moving = measure.of_what_moves(layout, norm, leaves, by_leaf, found[1])
        return found, leaf_norms, moving

    def known(
        layout: Layout, grad_norm: jax.typing.ArrayLike | None, updates: Any, params: Any
    ) -> tuple[list[PerGroup[Magnitude]], jax.Array | None, None]:
        """The same of a norm that was measured elsewhere; details are measured all the same."""
        norm_of_all = norms.plain(norm_given(grad_norm, layout.dtype))
        leaf_norms = None
        if detail:
            leaves = leaves_of(layout, within_leaves, updates, axis_name, sharded, params)
            leaf_norms = measure.measure(leaves, norm, updates).clamped()
        return [PerGroup([norm_of_all], {0: norm_of_all})], leaf_norms, None

    def thresholds_now(
        state: ClipState,
        layout: Layout,
        found: list[PerGroup[Magnitude]],
        moving: jax.Array | None,
    ) -> PerGroup[jax.Array]:
        """What the rule allows; by pieces too, where it can be asked for each by itself."""

        def ask(norms: Sequence[Magnitude], sizes: jax.typing.ArrayLike) -> jax.Array:
            seen = (_numerics.narrowed(x.clamped(), state.norm.dtype) for x in norms)
            now, *references = seen
            reference = ParameterNorms(references[0], sizes) if references else None
            asked = rule.threshold(state.memory, step_of(state), now, reference)
            return asked.astype(norms[0].value.dtype)

        own = found[0]
        sizes: Sequence[Any] = [moving]
        if moving is None:
            sizes = pieces.sizes_in_blocks(layout, own.blocks[0].value.shape == layout.shape)
        blocks = [
            jnp.broadcast_to(ask(norms, size), norms[0].value.shape)
            for *norms, size in zip(*(x.blocks for x in found), sizes, strict=True)
        ]
        by_piece: dict[int, jax.Array] = {}
        if rule.separable and layout.shape and not layout.axis_names and moving is None:
            for start in own.pieces:
                by_piece[start] = ask([x.pieces[start] for x in found], layout.size_at(start))
                if by_piece[start].shape not in ((), own.pieces[start].value.shape):
                    by_piece = {}  # A vector for all groups says nothing of one.
                    break
        return PerGroup(blocks, by_piece)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad_norm: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        if grad_norm is not None and not scope.one_group:
            raise ValueError(one_norm_msg(scope.name))
        # What is relative to the parameters bounds updates, whose norm that is not.
        given = grad_norm is not None and not rule.needs_params
        if rule.needs_params and params is None:
            raise ValueError(NO_PARAMS_MSG)
        if state is None and rule.has_memory:
            raise ValueError(NEEDS_STATE_MSG)
        state = init(updates) if state is None else state
        layout = layout_of(scope, updates, axis_name, sharded, params)
        check_state(state, ClipState)
        if rule.has_memory:
            size = jax.ShapeDtypeStruct(layout.shape, state.norm.dtype)
            check_state(state, ClipState, ("memory", state.memory, jax.eval_shape(rule.init, size)))
        if bool(state.detail) != detail:
            raise ValueError(
                f"this state was made {'with' if state.detail else 'without'} detail=True, and the "
                f"clip is {'with' if detail else 'without'} it: start with init(params)"
            )
        with jax.named_scope("optclip/measure"):
            trees = (updates, params) if rule.needs_params else (updates,)
            if given:
                found, leaf_norms, moving = known(layout, grad_norm, updates, params)
            else:
                found, leaf_norms, moving = measured(layout, params, *trees)
            magnitudes, group_norms = found[0].blocks, [x.clamped() for x in found[0].blocks]
            finite = pieces.total(jnp.all, [jnp.isfinite(x.value) for x in magnitudes])
        with jax.named_scope("optclip/threshold"):
            threshold = thresholds_now(state, layout, found, moving)
        with jax.named_scope("optclip/limit"):
            # A step with a non-finite entry is handed on as it is, in every group.
            bound = jax.tree.map(lambda x: jnp.where(finite, x, jnp.inf), threshold)
            factors = limit.factors_for(limiter, layout, found[0], bound)
            updates = limit.rescale(layout, updates, factors.pieces)
            clipped_norms = [
                limiters.clipped_norm(limiter, *each)
                for each in zip(magnitudes, factors.blocks, bound.blocks, strict=True)
            ]
            products = [factor.product() for factor in factors.blocks]
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
                zeroed = functools.partial(jax.tree.map, lambda x: jnp.where(finite, x, 0))
                clipped_norms, products = zeroed(clipped_norms), zeroed(products)
        with jax.named_scope("optclip/observe"):
            memory, dtype = state.memory, state.norm.dtype
            if rule.has_memory:
                shown = [_numerics.narrowed(x, dtype) for (x,) in (group_norms, clipped_norms)]
                memory = rule.observe(state.memory, step_of(state), *shown)
                # Neither a non-finite step nor, in its group, a norm of 0 is learned from.
                memory = where_learned(finite & (group_norms[0] > 0), memory, state.memory)
        outcome = Outcome(
            finite=finite,
            norm=_pooled(norm, layout, group_norms, magnitudes),
            clipped_norm=_pooled(norm, layout, clipped_norms),
            threshold=_lowest(_of_present_groups(layout, threshold.blocks), jnp.inf),
            factor=_lowest(products if layout.members else [jnp.ones_like(products[0])], 1),
            share=_share_above(layout, group_norms, bound.blocks),
        )
        groups = None
        if detail:
            before, after = _details(group_norms[0], clipped_norms[0], leaf_norms)
            groups = _by_name(layout, before), _by_name(layout, after)
        return updates, update_state(state, outcome, memory, groups, given=given)

    return optax.GradientTransformationExtraArgs(init, update)


NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
)
"""What Optax's transformations say there."""


def norm_given(grad_norm: Any, dtype: np.dtype) -> jax.Array:
    """What was passed as `grad_norm=`; NaN, as of a broken step, where it is traced and below 0."""
    check_norm(grad_norm)
    if isinstance(grad_norm, jax.Array):
        wide = grad_norm.astype(_numerics.accumulator(grad_norm.dtype))
        norm = _numerics.narrowed(wide, dtype)
    else:
        norm = number_at(grad_norm, jnp.zeros([], jnp.int32), jnp.zeros([], dtype))
    return jnp.where(norm >= 0, norm, jnp.nan)


def one_norm_msg(scope: str) -> str:
    """What a clip says that cannot take `grad_norm=`."""
    return (
        f"grad_norm= is one number, and this clip has a norm for each {scope}: only a clip of the "
        "whole gradient can take it. Leave grad_norm= out"
    )


def bound_on_updates(
    bound: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The same for after the optimizer, where the norm of the gradient is another one."""

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad_norm: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del grad_norm
        return bound.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(bound.init, update)


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
    if norm.combine is None and scope.labels is not None:
        raise ValueError(
            f"the norm {norm.name!r} exists only for single matrices, not for scope "
            f"{scope.name!r}; pass scope=scopes.leaf, or scopes.unit with the axes of a matrix"
        )


def check_nonfinite(nonfinite: str) -> None:
    """Refuses anything but the two policies."""
    check_choice(nonfinite, ("propagate", "zero"), "nonfinite=")


def _works_in_parts(rule: Rule, norm: Norm, layout: Layout) -> bool:
    """Whether all can be known without one array of all groups, where there are units."""
    if (
        not layout.has_units
        or layout.axis_names
        or not rule.separable
        or not pieces.can_total(norm.combine)
    ):
        return False
    # With another number of groups, so that nothing fits by chance.
    more = jax.ShapeDtypeStruct((layout.sizes.size + 1,), layout.dtype)
    now = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        asked = jax.eval_shape(
            lambda norms, count: rule.threshold(
                (), Step(count, count), norms, ParameterNorms(norms, np.ones(more.shape))
            ),
            more,
            now,
        )
    except (TypeError, ValueError):  # A threshold for each group does not fit.
        return False
    return asked.shape in ((), more.shape)


def _of_present_groups(layout: Layout, thresholds: list[jax.Array]) -> list[jax.Array]:
    """The thresholds; infinity for labels that no leaf has."""
    if thresholds[0].shape != layout.shape:
        return thresholds
    return [jnp.where(layout.sizes > 0, thresholds[0], jnp.inf)]


def _lowest(blocks: list[jax.Array], of_none: float) -> jax.Array:
    if not blocks[0].size:
        return jnp.full([], of_none, blocks[0].dtype)
    return pieces.total(jnp.min, blocks)


def _share_above(
    layout: Layout, group_norms: list[jax.Array], thresholds: list[jax.Array]
) -> jax.Array:
    present = max(int(np.sum(layout.sizes > 0)), 1)  # A label may have no leaf.
    above = [(x > bound).astype(x.dtype) for x, bound in zip(group_norms, thresholds, strict=True)]
    return pieces.total(jnp.sum, above) / present


def _pooled(
    norm: Norm,
    layout: Layout,
    lengths: list[jax.Array],
    magnitudes: list[Magnitude] | None = None,
) -> jax.Array:
    """The norm of all groups together."""
    if layout.shape == ():
        return lengths[0]
    groups = [norms.plain(x) for x in lengths]
    # Of a sum what is too large in a group is so of all together; of a mean it is not.
    if norm.averages and magnitudes is not None:
        groups = magnitudes
    sizes = pieces.sizes_in_blocks(layout, lengths[0].shape == layout.shape)
    return norms.pool(norm, groups, sizes, pieces.total).clamped()


def _by_name(layout: Layout, vector: jax.Array) -> Norms:
    """As the state keeps it: under the labels of the groups, where they have any."""
    return pieces.by_label(layout, vector) if layout.labels else vector


def _details(
    group_norms: jax.Array, clipped_norms: jax.Array, leaf_norms: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if leaf_norms is None:
        return group_norms, clipped_norms
    # One group: every leaf shrinks as the whole does.
    shrink = jnp.where(
        group_norms > 0, clipped_norms / jnp.where(group_norms > 0, group_norms, 1), 1
    )
    # A step that was made 0 has norms that are not finite.
    return leaf_norms, jnp.where(clipped_norms == 0, 0, leaf_norms * shrink)
