"""`ClipState`: what a clip remembers and what it read, and how a step moves it on."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _jax, _numerics, scopes
from optclip._tree.layout import shape_of_norms, whole_on_devices_of
from optclip.thresholds.rules import Memory, Step

RECENT_STEPS = 128
"""Over how many steps `ClipState.recent_clip_rate` looks back."""

SPIKE = 3.0
"""A step is a spike to `Growth` whose norm is more than so many times the usual one."""

Norms = jax.Array | dict[str, jax.Array]
"""A vector with one norm for each leaf or group; or by label one norm, or one for each layer."""


@_jax.exportable
class Growth(NamedTuple):
    """What grew at the last spike; arrays shaped as the norms of which it is told.

    Attributes:
        seen: Steps that these averages are of; int32. Not those that are not finite or 0.
        usual_norm: Average of the whole norm over about 128 steps; a spike counts as `SPIKE` of it.
        usual_norms: The same of every leaf or group.
        at_spike: How many times its usual norm each was at the last spike; 0 before the first.
    """

    seen: jax.Array
    usual_norm: jax.Array
    usual_norms: Norms
    at_spike: Norms


@_jax.exportable
class LeafDetail(NamedTuple):
    """Readings of single leaves, where `detail=True` asked for them.

    Attributes:
        norms: Norm of each leaf before clipping, in the order of the tree; shape (leaves,).
        clipped_norms: The same after clipping.
        growth: Which of them grew at the last spike.
    """

    norms: Norms
    clipped_norms: Norms
    growth: Growth


@_jax.exportable
class GroupDetail(NamedTuple):
    """The same of groups that are not the leaves: by label, or of units in one vector.

    Attributes:
        norms: Norm of each group before clipping; shape (units,), or a dict.
        clipped_norms: The same after clipping.
        growth: Which of them grew at the last spike.
    """

    norms: Norms
    clipped_norms: Norms
    growth: Growth


Detail = LeafDetail | GroupDetail


def init_detail(kind: type[LeafDetail] | type[GroupDetail], zeros: Norms) -> Detail:
    """The readings before the first step."""
    norms, clipped_norms, usual, at_spike = (jax.tree.map(jnp.copy, zeros) for _ in range(4))
    usual_norm = jnp.zeros([], jnp.result_type(*jax.tree.leaves(zeros)))
    seen = jnp.zeros([], jnp.int32)
    return kind(norms, clipped_norms, Growth(seen, usual_norm, usual, at_spike))


@_jax.exportable
class ClipState(NamedTuple):
    """What a clip remembers, and what it read at the last step. All but two are scalars.

    The floats are float32, or float64 where a parameter is 64-bit.

    Attributes:
        steps: Updates so far; int32. Schedules are called with it. A wrapper that hands a step on
            only now and then, as `optax.MultiSteps` does, lets only those be counted.
        nonfinite_steps: Updates so far whose gradient had a non-finite entry; int32.
        norm: Norm before clipping. Of several groups: the norm of all together. Of single
            entries: the largest.
        clipped_norm: Norm after clipping.
        threshold: The threshold. Of several groups: the smallest.
        factor: What the gradient was multiplied by. Of several groups: the smallest factor.
        clip_rate: Share of the finite steps so far whose norm was above the threshold; of several
            groups, the mean share of them.
        recent_clip_rate: The same as an average that looks back over about 128 steps.
        given_steps: Updates so far whose norm was passed as `grad_norm=`, not measured; int32.
        memory: What the threshold rule remembers; () if nothing.
        detail: A `LeafDetail` or `GroupDetail`, or () where it was not asked for.
    """

    steps: jax.Array
    nonfinite_steps: jax.Array
    norm: jax.Array
    clipped_norm: jax.Array
    threshold: jax.Array
    factor: jax.Array
    clip_rate: jax.Array
    recent_clip_rate: jax.Array
    given_steps: jax.Array
    memory: Memory = ()
    detail: Detail | tuple[()] = ()


class Outcome(NamedTuple):
    """What one step measured and did; scalars, defined as in `ClipState`.

    Attributes:
        finite: Whether every entry of the gradient is.
        norm: Norm before clipping.
        clipped_norm: Norm after clipping.
        threshold: The threshold.
        factor: The factor.
        share: Share of the groups that were above their threshold.
    """

    finite: jax.Array
    norm: jax.Array
    clipped_norm: jax.Array
    threshold: jax.Array
    factor: jax.Array
    share: jax.Array


def init_state(
    params: optax.Params, memory: Memory = (), detail: Detail | tuple[()] = ()
) -> ClipState:
    """The state before the first step."""
    dtype = _numerics.tree_dtype(params)
    state = ClipState(
        steps=jnp.zeros([], jnp.int32),
        nonfinite_steps=jnp.zeros([], jnp.int32),
        norm=jnp.zeros([], dtype),
        clipped_norm=jnp.zeros([], dtype),
        threshold=jnp.full([], jnp.inf, dtype),
        factor=jnp.ones([], dtype),
        clip_rate=jnp.zeros([], dtype),
        recent_clip_rate=jnp.zeros([], dtype),
        given_steps=jnp.zeros([], jnp.int32),
        memory=memory,
        detail=detail,
    )
    # Where the parameters lie on a mesh, so does the state: one compilation, not two.
    return whole_on_devices_of(params, state)


def init_state_by_leaf(
    params: optax.Params, axis_name: str | Sequence[str] | None, sharded: Any, *, detail: bool
) -> ClipState:
    """The same for a clip without memory, with the norms of leaves where detail is asked for."""
    if not detail:
        return init_state(params)
    shape = shape_of_norms(scopes.leaf, params, axis_name, sharded)
    zeros = jnp.zeros(shape, _numerics.tree_dtype(params))
    return init_state(params, (), init_detail(LeafDetail, zeros))


def update_state(
    state: ClipState,
    outcome: Outcome,
    memory: Memory = (),
    detail: tuple[Norms, Norms] | None = None,
    *,
    given: bool = False,
) -> ClipState:
    """The state after a step.

    Args:
        state: The one before.
        outcome: What the step measured and did.
        memory: What the rule remembers now.
        detail: Where the state keeps them: the norms of leaves or groups before and after.
        given: Whether the norm was not measured, but passed.
    """
    # As numbers by themselves: a GPU has then one kernel for them, where each would redo the sums.
    outcome = Outcome(*_numerics.computed_anew(*outcome))
    finite, steps = outcome.finite, _next(state.steps)
    nonfinite_steps = jnp.where(finite, state.nonfinite_steps, _next(state.nonfinite_steps))
    # From the new counts, not the old: those could not be overwritten before they were read.
    finite_steps = jnp.maximum(steps - nonfinite_steps, 1)

    def averaged(rate: jax.Array, floor: float) -> jax.Array:
        """A running mean over the finite steps; with a floor under its weight, of recent ones."""
        weight = jnp.maximum(1 / finite_steps.astype(rate.dtype), floor)
        return rate + jnp.where(finite, (outcome.share.astype(rate.dtype) - rate) * weight, 0)

    new = ClipState(
        steps=steps,
        nonfinite_steps=nonfinite_steps,
        norm=outcome.norm,
        clipped_norm=outcome.clipped_norm,
        threshold=outcome.threshold,
        factor=outcome.factor,
        clip_rate=averaged(state.clip_rate, 0.0),
        recent_clip_rate=averaged(state.recent_clip_rate, 1 / RECENT_STEPS),
        given_steps=_next(state.given_steps) if given else state.given_steps,
        memory=memory,
        detail=_detail_after(state.detail, outcome, detail),
    )
    return jax.tree.map(_as_kept, state, new)


def _as_kept(old: jax.Array, x: jax.Array) -> jax.Array:
    """As the state keeps it: a gradient may be wider than the parameters it was made for."""
    floating = jnp.issubdtype(old.dtype, jnp.floating)
    return _numerics.narrowed(x, old.dtype) if floating else x.astype(old.dtype)


def _detail_after(
    detail: Detail | tuple[()], outcome: Outcome, norms: tuple[Norms, Norms] | None
) -> Detail | tuple[()]:
    if norms is None or not detail:
        return ()
    check_state(detail, type(detail), ("detail", detail.norms, norms[0]))
    before, after = (jax.tree.map(_as_kept, detail.norms, x) for x in norms)
    seen, usual_norm, usual_norms, at_spike = detail.growth
    norm = _as_kept(usual_norm, outcome.norm)
    spike = outcome.finite & (usual_norm > 0) & (norm / SPIKE > usual_norm)
    teaches = outcome.finite & (norm > 0)
    seen = jnp.where(teaches, _next(seen), seen)
    # A plain mean at first: a run's first norms are seldom usual.
    weight = jnp.maximum(1 / jnp.maximum(seen, 1).astype(norm.dtype), 1 / RECENT_STEPS)
    averaged = functools.partial(_averaged, weight=weight, teaches=teaches)
    growth = Growth(
        seen=seen,
        usual_norm=averaged(usual_norm, norm),
        usual_norms=jax.tree.map(averaged, usual_norms, before),
        at_spike=jax.tree.map(
            lambda old, x, usual: jnp.where(spike, _ratio(x, usual), old),
            at_spike,
            before,
            usual_norms,
        ),
    )
    return detail._replace(norms=before, clipped_norms=after, growth=growth)


def _averaged(old: jax.Array, norm: jax.Array, weight: jax.Array, teaches: jax.Array) -> jax.Array:
    """The usual norm after a step. The first one is taken as it is, and zeros say nothing."""
    held = jnp.where(norm / SPIKE > old, SPIKE * old, norm)
    new = jnp.where(old > 0, old + (held - old) * weight, norm)
    return jnp.where(teaches & (norm > 0), new, old)


def _ratio(norm: jax.Array, usual: jax.Array) -> jax.Array:
    """How many times the usual norm; the largest number where there was none so far."""
    most = _numerics.largest(norm.dtype)
    times = jnp.minimum(norm / jnp.where(usual > 0, usual, 1), most)
    return jnp.where(usual > 0, times, jnp.where(norm > 0, most, 0))


def check_state(state: Any, kind: type, *shapes: tuple[str, Any, Any]) -> None:
    """Refuses a state of another kind or size, which would be read wrongly or not at all.

    Args:
        state: What was passed.
        kind: The class it must have.
        *shapes: A name, what the state has there, and what is expected, as trees of arrays or
            shapes.
    """
    way = (
        "a state of another optimizer or clip, or one that came back from a checkpoint without its "
        "types, does not fit: start with init(params), or take over what does with "
        "optclip.restore_state(optimizer, params, state)"
    )
    if not isinstance(state, kind):
        raise ValueError(f"expected a {kind.__name__} as state, got {type(state).__name__}; {way}")
    for name, given, expected in shapes:
        own, wanted = ([jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (given, expected))
        kinds = [jax.tree.structure(tree) for tree in (given, expected)]
        if own != wanted or kinds[0] != kinds[1]:
            has, needs = (
                f"{type(tree).__name__} of {sizes}"
                for tree, sizes in ((given, own), (expected, wanted))
            )
            raise ValueError(f"{name} of this state is {has}, expected {needs}; {way}")


def step_of(state: ClipState) -> Step:
    """Where in the run the next update is."""
    return Step(state.steps, state.steps - state.nonfinite_steps)


def where_learned(learned: jax.Array, new: Memory, old: Memory) -> Memory:
    """The new memory where something was learned, group by group; the old one elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(learned, b.shape), a, b), new, old)


def _next(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count))
