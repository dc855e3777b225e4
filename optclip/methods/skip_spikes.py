"""`skip_spikes`: a wrapper that leaves spikes out.

A factor of 0 is no skip: zeros still decay momentum, weight decay still acts, and schedules still
advance. A wrapper can leave the optimizer it holds exactly as it was.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _jax, _numerics, norms, scopes
from optclip._checks import check_choice, check_count, check_number, check_optimizer, check_sharded
from optclip._tree import measure
from optclip._tree.layout import layout_of, whole_on_devices_of
from optclip.clipping import NEEDS_STATE_MSG, norm_given
from optclip.state import check_state

SkipNonfinite = Literal["skip", "propagate"]


@_jax.exportable
class Accepted(NamedTuple):
    """The last ordinary values of one quantity, and the spikes since.

    Attributes:
        values: The ordinary ones, shape (window,); the oldest is overwritten.
        seen: Ordinary values written so far; int32.
        spikes: The last values of a row of spikes, shape (window,).
    """

    values: jax.Array
    seen: jax.Array
    spikes: jax.Array


@_jax.exportable
class SkipState(NamedTuple):
    """What `skip_spikes` remembers.

    Attributes:
        inner_state: State of the optimizer it holds.
        norm: Norm of the gradient at the last step; float32 (float64 where a parameter is 64-bit).
        threshold: What it was allowed to be.
        skipping: Whether the last step was skipped; bool.
        skipped_steps: Steps skipped so far, the non-finite ones included; int32.
        nonfinite_steps: Steps with a non-finite gradient or loss so far; int32.
        streak: Spikes skipped in a row, up to now; int32. Non-finite steps do not count.
        norms: The last finite norms.
        losses: The last finite losses, where `loss=` is passed.
    """

    inner_state: Any
    norm: jax.Array
    threshold: jax.Array
    skipping: jax.Array
    skipped_steps: jax.Array
    nonfinite_steps: jax.Array
    streak: jax.Array
    norms: Accepted
    losses: Accepted


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    deviations: float | jax.Array = 6.0,
    window: int = 128,
    nonfinite: SkipNonfinite = "skip",
    patience: float | jax.Array = 20,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves out the steps whose gradient is a spike or is not finite.

    .. math:: \text{skip if } \|u\| > \mathrm{mean} + k \, \mathrm{std} \text{ of the last
        ordinary norms}

    On a skipped step the update is zero and `inner` keeps its state: no moment decays, and no
    schedule advances. Skipped norms do not enter the mean and the deviation. A run cannot stall:
    after `patience` skips in a row the new level is accepted. Non-finite gradients are skipped for
    as long as they last. All leaves count, frozen ones too.

    Args:
        inner: The optimizer, clips included.
        deviations: k, standard deviations above the mean; 6.0 is what OLMo-core and Levanter take.
        window: How many norms to remember; a plain number. 128 is what they take.
        nonfinite: "skip" leaves non-finite steps out too, "propagate" hands them to `inner`.
        patience: Spikes in a row after which the new level is accepted; also how many norms are
            needed before the first skip (half a window, where that is fewer).
        axis_name: See `clip_by`.
        sharded: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `SkipState`. `update` takes `loss=` too,
        and then also skips where the loss is a spike by the same rule, or not finite; and
        `grad_norm=` in place of measuring, which goes to `inner` too, as do other extra
        arguments. State: two windows of floats beside that of `inner`. Cost: one
        pass over the gradient; on a step that is not skipped `inner`'s own.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optclip.skip_spikes(optax.adam(1e-3))
        >>> params = jnp.zeros(2)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([1.0, jnp.nan]), state, params, loss=0.3)
        >>> updates.tolist(), int(optclip.metrics(state)["skip/skipped_steps"])
        ([0.0, 0.0], 1)

    References:
        The rule is that of the trainers OLMo-core and Levanter, which let spikes into the window.
    """
    check_optimizer(inner, "skip_spikes")
    held = optax.with_extra_args_support(inner)
    window = check_count(window, "window=")
    # No schedules: on which step of a run it skips, the state does not count.
    numbers = functools.partial(check_number, schedule=False)
    numbers(deviations, "deviations=", hint="pass jnp.inf to skip no spikes")
    numbers(patience, "patience=", low=1, hint="pass jnp.inf to wait for ever")
    check_choice(nonfinite, ("skip", "propagate"), "nonfinite=")
    check_sharded(axis_name, sharded)

    def init(params: optax.Params) -> SkipState:
        dtype = _numerics.tree_dtype(params)

        def empty() -> Accepted:
            return Accepted(
                jnp.zeros([window], dtype), jnp.zeros([], jnp.int32), jnp.zeros([window], dtype)
            )

        state = SkipState(
            inner_state=(),
            norm=jnp.zeros([], dtype),
            threshold=jnp.full([], jnp.inf, dtype),
            skipping=jnp.zeros([], bool),
            skipped_steps=jnp.zeros([], jnp.int32),
            nonfinite_steps=jnp.zeros([], jnp.int32),
            streak=jnp.zeros([], jnp.int32),
            norms=empty(),
            losses=empty(),
        )
        return whole_on_devices_of(params, state)._replace(inner_state=held.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        loss: jax.typing.ArrayLike | None = None,
        grad_norm: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipState]:
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        check_state(state, SkipState)
        ring = jax.ShapeDtypeStruct((window,), state.norm.dtype)
        check_state(state, SkipState, ("window", state.norms.values, ring))
        layout = layout_of(scopes.tree, updates, axis_name, sharded, params)
        with jax.named_scope("optclip/measure"):
            if grad_norm is None:
                magnitude = measure.measure(layout, norms.l2, updates)
            else:
                magnitude = norms.plain(norm_given(grad_norm, layout.dtype))
                # The gradient goes on unchanged, so that the clip in front may use it as well.
                extra_args["grad_norm"] = grad_norm
        dtype = state.norm.dtype
        norm = _numerics.narrowed(magnitude.clamped(), dtype)
        finite = jnp.isfinite(magnitude.value)
        limit = _limit(state.norms, deviations, patience)
        spike = norm > limit
        if loss is not None:
            loss = jnp.asarray(loss).astype(dtype)
            finite &= jnp.isfinite(loss)
            spike |= loss > _limit(state.losses, deviations, patience)
        spike &= finite
        # A gradient of zeros says nothing about norms.
        teaches = finite & (norm > 0)
        streak = jnp.where(teaches, jnp.where(spike, state.streak + 1, 0), state.streak)
        new_level = spike & teaches & (streak.astype(dtype) >= jnp.asarray(patience).astype(dtype))
        skipping = (spike & ~new_level) | (~finite if nonfinite == "skip" else False)

        def written(ring: Accepted, value: jax.Array) -> Accepted:
            new = _written(ring, value, spike, new_level, streak)
            return jax.tree.map(lambda a, b: jnp.where(teaches, a, b), new, ring)

        updates, inner_state = unless(
            skipping, held.update, updates, state.inner_state, params, extra_args
        )
        return updates, SkipState(
            inner_state=inner_state,
            norm=norm,
            threshold=limit,
            skipping=skipping,
            skipped_steps=state.skipped_steps + skipping.astype(jnp.int32),
            nonfinite_steps=state.nonfinite_steps + (~finite).astype(jnp.int32),
            streak=jnp.where(new_level, 0, streak),
            norms=written(state.norms, norm),
            losses=state.losses if loss is None else written(state.losses, loss),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def unless(
    skipping: jax.Array,
    update: Callable[..., Any],
    updates: optax.Updates,
    inner_state: Any,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """The optimizer's step, or zeros and its state as it was."""

    def choose(old: Any, new: Any) -> jax.Array:
        new = jnp.asarray(new)
        return jax.lax.select(skipping, jnp.asarray(old).astype(new.dtype), new)

    # A choice, not a branch: XLA fuses it into the step, where a branch would copy the state and
    # write the update out. And never a product: 0 * NaN is NaN.
    stepped, stepped_state = update(updates, inner_state, params, **extra_args)
    zeros = jax.tree.map(jnp.zeros_like, stepped)
    return jax.tree.map(choose, zeros, stepped), jax.tree.map(choose, inner_state, stepped_state)


def _limit(ring: Accepted, deviations: float | jax.Array, patience: float | jax.Array) -> jax.Array:
    """Mean plus deviations of the ordinary values; infinity while there are few."""
    dtype, window = ring.values.dtype, ring.values.size
    filled = jnp.arange(window, dtype=jnp.int32) < ring.seen
    among = jnp.sum(filled.astype(dtype))
    peak = jnp.max(jnp.where(filled, jnp.abs(ring.values), 0))
    unit = jnp.where(peak > 0, peak, 1)
    shares = ring.values / unit
    divisor = jnp.maximum(among, 1)
    mean = jnp.sum(jnp.where(filled, shares, 0)) / divisor
    away = jnp.where(filled, shares - mean, 0)
    # Of equal values rounding makes a deviation of about 1e-6 of the largest.
    deviation = jnp.maximum(_numerics.square_root(jnp.sum(away * away) / divisor), 1e-6)
    limit = (mean + jnp.asarray(deviations).astype(dtype) * deviation) * unit
    needed = jnp.minimum(jnp.asarray(patience).astype(dtype), max(window // 2, 1))
    return jnp.where(among >= needed, limit, jnp.inf).astype(dtype)


def _written(
    ring: Accepted, value: jax.Array, spike: jax.Array, new_level: jax.Array, streak: jax.Array
) -> Accepted:
    """The ring with one value more; at a new level the spikes of the row are the ordinary ones."""
    window = ring.values.size
    slots = jnp.arange(window, dtype=jnp.int32)

    def held(count: jax.Array) -> jax.Array:
        """A count of two windows tells as much as one of two million, and does not overflow."""
        return jnp.where(count < 2 * window, count, window + count % window)

    spikes = jnp.where(spike & (slots == (streak - 1) % window), value, ring.spikes)
    values = jnp.where(~spike & (slots == ring.seen % window), value, ring.values)
    count = jnp.where(spike, ring.seen, held(ring.seen + 1))
    return Accepted(
        jnp.where(new_level, spikes, values), jnp.where(new_level, held(streak), count), spikes
    )
