"""SPAM's spike-aware clip: every entry against its own second moment."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _numerics, norms, scopes
from optclip._checks import check_decay, check_number, number_at
from optclip._tree import devices, limit, measure
from optclip._tree.layout import Layout, layout_of, select_leaves
from optclip.clipping import NEEDS_STATE_MSG, Nonfinite, check_nonfinite
from optclip.state import ClipState, Outcome, init_state, step_of, update_state
from optclip.thresholds.averages import LearnFrom, check_learn_from


def spam_clip(
    threshold: optax.ScalarOrSchedule = 5000.0,
    decay: optax.ScalarOrSchedule = 0.999,
    warmup_steps: optax.ScalarOrSchedule = 20,
    *,
    learn_from: LearnFrom = "clipped",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Limits every entry to a multiple of its own root mean square so far (SPAM's clip).

    .. math:: u_i \leftarrow \mathrm{sign}(u_i) \min(|u_i|, \sqrt{\theta v_i}), \quad
        v_i \leftarrow \beta v_i + (1 - \beta) u_i^2 \text{ of the clipped } u_i

    v starts at zero without correction, as Adam's second moment does; an entry whose v is zero is
    not clipped. SPAM also resets Adam's moments every 500 steps: that is the optimizer's part.

    Args:
        threshold: theta, the largest square of an entry over its second moment; the paper's 5000.
            A number, traced scalar or Optax schedule.
        decay: beta, the share of v that a step keeps, in [0, 1); Adam's 0.999, as in the paper.
        warmup_steps: Steps at the start that are not clipped; the released code's 20.
        learn_from: "clipped", the paper's, or "raw".
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. `norm` and `clipped_norm`
        read the largest entry, `threshold` the smallest bound, `clip_rate` the share of entries
        clipped. State: one float32 for every entry of the parameters. Cost: it reads and writes
        that state, and takes four passes over the gradient for the readings, and two more where an
        entry is clipped.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.spam_clip(warmup_steps=1), optax.adam(1e-3))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> for spike in (1.0, 1.0, 1000.0):
        ...     _, state = optimizer.update(jnp.array([1.0, spike]), state)
        >>> float(optclip.metrics(state)["clip/norm"])
        1000.0
        >>> round(float(optclip.metrics(state)["clip/clipped_norm"]), 3)  # sqrt(5000 * 0.001999)
        3.161

    References:
        Huang et al., "SPAM: spike-aware Adam with momentum reset for stable LLM training", 2025,
        arXiv:2501.06842. The released code's default theta is 2000.
    """
    check_number(threshold, "threshold=", hint="pass jnp.inf to switch clipping off")
    check_number(warmup_steps, "warmup_steps=", hint="pass 0 for none")
    check_learn_from(learn_from)
    check_decay(decay)
    check_nonfinite(nonfinite)

    def init(params: optax.Params) -> ClipState:
        # Made of the parameters, not of their shapes, so that it lies on the devices as they do.
        return init_state(params)._replace(memory=jax.tree.map(_second_moment, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClipState]:
        del params, extra_args
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        layout = layout_of(scopes.tree, updates, axis_name, sharded)
        like = jnp.zeros([], layout.dtype)
        theta, keep, warmup = (
            number_at(x, state.count, like) for x in (threshold, decay, warmup_steps)
        )
        with jax.named_scope("optclip/measure"):
            magnitude = measure.measure(layout, norms.linf, updates)
            finite = jnp.isfinite(magnitude.value)
        acting = finite & (step_of(state).finite.astype(layout.dtype) >= warmup)
        moments, treedef = jax.tree.flatten(state.memory)
        pairs = list(zip(select_leaves(layout, updates), moments, strict=True))
        rise = jnp.where(acting, jnp.sqrt(theta), jnp.inf)
        # The largest ratio of an entry to its bound, and the smallest bound, negative.
        extremes = [(like, like - jnp.inf)]
        extremes += [_extremes(x, moment, rise) for x, moment in pairs]
        both = [_largest(layout.dtype, some) for some in zip(*extremes, strict=True)]
        worst, tightest = _over_devices(lax.pmax, layout, jnp.stack(both))
        # It reads everything once more, so it is left out where nothing is clipped.
        clipping = acting & (worst > 1)
        nothing = 0 * clipping.astype(layout.dtype)
        left, count = _numerics.where_needed(
            clipping,
            lambda pairs, rise: _look_closer(layout, pairs, rise),
            lambda pairs, rise: (nothing, nothing),
            pairs,
            rise,
        )
        # A number of its own for the second pass: bounds computed from the same are shared.
        rise, left, count = _numerics.computed_anew(rise, left, count)
        with jax.named_scope("optclip/limit"):
            leaves, structure = jax.tree.flatten(updates)
            learned = []
            for member, (x, moment) in zip(layout.members, pairs, strict=True):
                leaves[member.index] = _limited(x, moment, rise)
                new = _learned(x, moment, None if learn_from == "raw" else rise, keep)
                learned.append(jnp.where(finite, new, moment))
            updates = jax.tree.unflatten(structure, leaves)
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
        zeroed = nonfinite == "zero"
        clipped_norm = jnp.where(worst > 1, left, magnitude.clamped())
        outcome = Outcome(
            finite=finite,
            norm=magnitude.clamped(),
            clipped_norm=jnp.where(finite, clipped_norm, 0 if zeroed else magnitude.value),
            threshold=-tightest,
            factor=jnp.where(finite, 1 / jnp.maximum(worst, 1), 0 if zeroed else 1),
            share=count / max(float(layout.sizes), 1),
        )
        return updates, update_state(state, outcome, jax.tree.unflatten(treedef, learned))

    return optax.GradientTransformationExtraArgs(init, update)


def _bounded(
    x: jax.Array, moment: jax.Array, rise: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A leaf widened, its moduli, and the bounds on them: infinity where the moment is 0.

    Whoever asks computes them anew: shared, they would be written out.
    """
    x, moment, rise = _numerics.computed_anew(x, moment, rise)
    # Beside a 64-bit gradient or moment the other is 64-bit too.
    dtype = moment.dtype if moment.dtype == jnp.float64 else _numerics.accumulator(x.dtype)
    wide, moment = _numerics.widened(x, dtype), moment.astype(dtype)
    return (
        wide,
        _numerics.modulus(wide),
        jnp.where(moment > 0, rise.astype(dtype) * moment, jnp.inf),
    )


def _extremes(x: jax.Array, moment: jax.Array, rise: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, size, bound = _bounded(x, moment, rise)
    ratio = jnp.max(size / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny))  # Not 0 / 0.
    _, _, bound = _bounded(x, moment, rise)
    return ratio, -jnp.min(bound)


def _limited(x: jax.Array, moment: jax.Array, rise: jax.Array) -> jax.Array:
    wide, _, bound = _bounded(x, moment, rise)
    if not jnp.iscomplexobj(x):
        return lax.clamp(-bound, wide, bound).astype(x.dtype)
    factor = limit.entry_factor(wide, bound)
    return _numerics.scaled(_numerics.scaled(wide, factor.coarse), factor.fine).astype(x.dtype)


def _learned(x: jax.Array, moment: jax.Array, rise: jax.Array | None, keep: jax.Array) -> jax.Array:
    """The root of v, as squares would leave the range; mixed as v is. Raw where `rise` is None."""
    _, size, bound = _bounded(x, moment, jnp.ones_like(keep) if rise is None else rise)
    seen = size if rise is None else jnp.minimum(size, bound)
    learned = _numerics.rms_ema(moment.astype(seen.dtype), seen, keep.astype(seen.dtype))
    return _numerics.narrowed(learned, moment.dtype)


def _look_closer(
    layout: Layout, pairs: list[tuple[jax.Array, jax.Array]], rise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest entry that is left, and how many were clipped."""
    left, counts = [jnp.zeros([], layout.dtype)], [jnp.zeros([], layout.dtype)]
    for member, (x, moment) in zip(layout.members, pairs, strict=True):
        _, size, bound = _bounded(x, moment, rise)
        left.append(jnp.max(jnp.minimum(size, bound)))
        _, size, bound = _bounded(x, moment, rise)
        counts.append(jnp.sum((size > bound).astype(layout.dtype)) / member.sharding.copies)
    largest = _over_devices(lax.pmax, layout, _largest(layout.dtype, left))
    return largest, _over_devices(lax.psum, layout, _numerics.in_pairs(lax.add, counts))


def _largest(dtype: jax.typing.DTypeLike, numbers: Sequence[jax.Array]) -> jax.Array:
    return _numerics.in_pairs(lax.max, [x.astype(dtype) for x in numbers])


def _over_devices(reduce: Any, layout: Layout, x: jax.Array) -> jax.Array:
    if not layout.axis_names:
        return x
    return reduce(devices.as_varying(x, layout.axis_names), layout.axis_names)


def _second_moment(x: Any) -> jax.Array | None:
    if not _numerics.is_floating(x) or not math.prod(getattr(x, "shape", ())):
        return None
    return jnp.zeros_like(x, dtype=_numerics.accumulator(jnp.result_type(x)))
