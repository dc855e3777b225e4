"""`clip_by`: measure, threshold, limit, observe, as one Optax transformation."""

from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from optclip import limiters, measuring, norms, scopes, thresholds
from optclip.limiters import Factor, Limiter
from optclip.measuring import Plan
from optclip.norms import Magnitude, Norm
from optclip.scopes import Scope
from optclip.thresholds import Memory, ParameterNorms, Rule, Step

Nonfinite = Literal["propagate", "zero"]
RECENT_STEPS = 128
"""Over how many steps `ClipState.recent_clip_rate` looks back."""

_Tree = TypeVar("_Tree")


class Detail(NamedTuple):
    """Readings of single groups, where `detail=True` asked for them.

    Attributes:
        norms: Norm of each group before clipping, of each leaf where the scope is the whole tree;
            shape (groups,).
        clipped_norms: The same after clipping.
    """

    norms: jax.Array
    clipped_norms: jax.Array


class ClipState(NamedTuple):
    """What a clip remembers, and what it read at the last step. All but two are scalars.

    The floats are float32, or float64 where a parameter is 64-bit.

    Attributes:
        count: Updates so far; int32. Schedules are called with it.
        nonfinite_steps: Updates so far whose gradient had a non-finite entry; int32.
        norm: Norm before clipping. Of several groups: the norm of all together. Of single
            entries: the largest.
        clipped_norm: Norm after clipping.
        threshold: The threshold. Of several groups: the smallest.
        factor: What the gradient was multiplied by. Of several groups: the smallest factor.
        clip_rate: Share of the finite steps so far whose norm was above the threshold; of several
            groups, the mean share of them.
        recent_clip_rate: The same as an average that looks back over about 128 steps.
        memory: What the threshold rule remembers; () if nothing.
        detail: A `Detail`, or () where it was not asked for.
    """

    count: jax.Array
    nonfinite_steps: jax.Array
    norm: jax.Array
    clipped_norm: jax.Array
    threshold: jax.Array
    factor: jax.Array
    clip_rate: jax.Array
    recent_clip_rate: jax.Array
    memory: Memory = ()
    detail: Detail | tuple[()] = ()


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
            `shard_map` with `check_vma=False`): a tree of `PartitionSpec`s, or a function from
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
    if scope.per_entry:
        norm = norms.linf  # Every norm of one entry is its modulus; the tree's is the largest.
    _check(rule, scope, norm, limiter, nonfinite)

    def look(updates: Any, scope: Scope = scope) -> Plan:
        return measuring.plan(scope, updates, axis_name, sharded)

    def measure(plan: Plan, updates: Any) -> tuple[Magnitude, jax.Array | None]:
        """The norms of the groups; those of the leaves too where detail of one group is wanted."""
        if not (detail and scope.one_group):
            return measuring.measure(plan, norm, updates), None
        by_leaf = look(updates, scopes.leaf)
        leaf_norms = measuring.measure(by_leaf, norm, updates).saturated()
        return norms.pool(norm, leaf_norms, by_leaf.sizes), leaf_norms

    def init(params: Any) -> ClipState:
        dtype = measuring.tree_dtype(params)
        memory: Memory = ()
        if rule.has_memory:
            memory = rule.init(jnp.zeros(look(params).shape, dtype))
        groups: Detail | tuple[()] = ()
        if detail:
            shape = look(params, scopes.leaf if scope.one_group else scope).shape
            groups = Detail(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        state = ClipState(
            count=jnp.zeros([], jnp.int32),
            nonfinite_steps=jnp.zeros([], jnp.int32),
            norm=jnp.zeros([], dtype),
            clipped_norm=jnp.zeros([], dtype),
            threshold=jnp.full([], jnp.inf, dtype),
            factor=jnp.ones([], dtype),
            clip_rate=jnp.zeros([], dtype),
            recent_clip_rate=jnp.zeros([], dtype),
            memory=memory,
            detail=groups,
        )
        # Where the parameters lie on a mesh, so does the state: one compilation, not two.
        mesh_wide = measuring.whole_on_devices_of(params)
        return state if mesh_wide is None else jax.device_put(state, mesh_wide)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipState]:
        del extra_args
        if rule.needs_params and params is None:
            raise ValueError(NO_PARAMS_MSG)
        if state is None:
            if rule.has_memory:
                raise ValueError(
                    "this clip learns from earlier steps and needs its state: pass what "
                    "init(params) or the last update(...) returned, not None"
                )
            state = init(updates)
        plan = look(updates)
        step = Step(state.count, state.count - state.nonfinite_steps)
        with jax.named_scope("optclip/measure"):
            magnitude, leaf_norms = measure(plan, updates)
            group_norms = magnitude.saturated()
            finite = jnp.all(jnp.isfinite(magnitude.value))
            reference = None
            if rule.needs_params:
                measured = measuring.measure(plan, norm, params).saturated()
                reference = ParameterNorms(measured, plan.sizes)
        with jax.named_scope("optclip/threshold"):
            threshold = rule.threshold(state.memory, step, group_norms, reference)
            threshold = jnp.broadcast_to(threshold.astype(plan.dtype), plan.shape)
        with jax.named_scope("optclip/limit"):
            # A step with a non-finite entry is handed on as it is, in every group.
            bound = jnp.where(finite, threshold, jnp.inf)
            factor = limiters.factor_of(limiter, magnitude, bound)
            if scope.per_entry:
                share = _share_of_entries(plan, updates, group_norms, bound)
                updates = measuring.clamp(plan, updates, limiter, bound)
            else:
                share = _share_of_groups(group_norms, bound)
                updates = measuring.rescale(plan, updates, factor)
            if nonfinite == "zero":
                updates = measuring.zeroed_unless(plan, updates, finite)
                factor = Factor(factor.coarse, jnp.where(finite, factor.fine, 0))
        clipped_norms = group_norms * factor.coarse * factor.fine
        with jax.named_scope("optclip/observe"):
            memory = rule.observe(state.memory, step, group_norms, clipped_norms)
            memory = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), memory, state.memory
            )
        readings = ClipState(
            count=_next(state.count),
            nonfinite_steps=jnp.where(finite, state.nonfinite_steps, _next(state.nonfinite_steps)),
            norm=_together(norm, plan, group_norms),
            clipped_norm=_together(norm, plan, clipped_norms),
            threshold=jnp.min(threshold, initial=jnp.inf),
            factor=jnp.min(factor.product(), initial=1),
            clip_rate=_averaged(state.clip_rate, share, step, finite, 0.0),
            recent_clip_rate=_averaged(
                state.recent_clip_rate, share, step, finite, 1 / RECENT_STEPS
            ),
            memory=memory,
            detail=_detail(group_norms, clipped_norms, leaf_norms) if detail else (),
        )
        return updates, _typed_as(state, readings)

    return optax.GradientTransformationExtraArgs(init, update)


NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
)
"""What Optax's transformations say there."""


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
    if nonfinite not in ("propagate", "zero"):
        raise ValueError(f'nonfinite= must be "propagate" or "zero", got {nonfinite!r}')
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


def _share_of_groups(group_norms: jax.Array, threshold: jax.Array) -> jax.Array:
    if not group_norms.size:
        return jnp.zeros([], group_norms.dtype)
    return jnp.mean((group_norms > threshold).astype(group_norms.dtype))


def _share_of_entries(plan: Plan, updates: Any, peak: jax.Array, bound: jax.Array) -> jax.Array:
    # Counting reads the gradient once more, so it is left out where nothing is clipped.
    above = peak > bound
    return jax.lax.cond(
        above,
        lambda updates: measuring.share_above(plan, updates, bound),
        lambda updates: 0 * above.astype(plan.dtype),
        updates,
    )


def _together(norm: Norm, plan: Plan, group_norms: jax.Array) -> jax.Array:
    if plan.shape == ():
        return group_norms
    return norms.pool(norm, group_norms, plan.sizes).saturated()


def _averaged(
    rate: jax.Array, share: jax.Array, step: Step, finite: jax.Array, floor: float
) -> jax.Array:
    """A running mean over the finite steps; with a floor under its weight, of the recent ones."""
    weight = jnp.maximum(1 / (step.finite + 1).astype(rate.dtype), floor)
    return rate + jnp.where(finite, (share.astype(rate.dtype) - rate) * weight, 0)


def _detail(
    group_norms: jax.Array, clipped_norms: jax.Array, leaf_norms: jax.Array | None
) -> Detail:
    if leaf_norms is None:
        return Detail(group_norms, clipped_norms)
    # One group: every leaf shrinks as the whole does.
    shrink = jnp.where(
        group_norms > 0, clipped_norms / jnp.where(group_norms > 0, group_norms, 1), 1
    )
    return Detail(leaf_norms, leaf_norms * shrink)


def _next(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count))


def _typed_as(old: _Tree, new: _Tree) -> _Tree:
    return jax.tree.map(lambda to, x: x.astype(to.dtype), old, new)
