"""`ClipState`: what a clip remembers and what it read, and how a step moves it on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _numerics, scopes
from optclip._tree.layout import shape_of_norms, whole_on_devices_of
from optclip.thresholds.rules import Memory, Step

RECENT_STEPS = 128
"""Over how many steps `ClipState.recent_clip_rate` looks back."""


class LeafDetail(NamedTuple):
    """Readings of single leaves, where `detail=True` asked for them.

    Attributes:
        norms: Norm of each leaf before clipping, in the order of the tree; shape (leaves,).
        clipped_norms: The same after clipping.
    """

    norms: jax.Array
    clipped_norms: jax.Array


class GroupDetail(NamedTuple):
    """The same of groups that are not the leaves: labels, units.

    Attributes:
        norms: Norm of each group before clipping; shape (groups,).
        clipped_norms: The same after clipping.
    """

    norms: jax.Array
    clipped_norms: jax.Array


Detail = LeafDetail | GroupDetail


class ClipState(NamedTuple):
    """What a clip remembers, and what it read at the last step. All but two are scalars.

    The floats are float32, or float64 where a parameter is 64-bit.

    Attributes:
        steps: Updates so far; int32. Schedules are called with it.
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
    dtype = _numerics.tree_dtype(params)
    return init_state(params, (), LeafDetail(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))


def update_state(
    state: ClipState, outcome: Outcome, memory: Memory = (), detail: Detail | tuple[()] = ()
) -> ClipState:
    """The state after a step."""
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
        memory=memory,
        detail=detail,
    )

    def kept(old: jax.Array, x: jax.Array) -> jax.Array:
        """As the state keeps it: a gradient may be wider than the parameters it was made for."""
        floating = jnp.issubdtype(old.dtype, jnp.floating)
        return _numerics.narrowed(x, old.dtype) if floating else x.astype(old.dtype)

    return jax.tree.map(kept, state, new)


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
        "types, does not fit: start with init(params), or restore into what that returns"
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
