"""SPAM's spike-aware clip: every entry against its own second moment."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _numerics, norms, scopes
from optclip._checks import check_decay, check_number, check_sharded, number_at
from optclip._tree import devices, limit, measure
from optclip._tree.layout import Layout, layout_of, select_leaves
from optclip.clipping import NEEDS_STATE_MSG, Nonfinite, check_nonfinite, one_norm_msg
from optclip.norms import Magnitude
from optclip.state import ClipState, Outcome, check_state, init_state, step_of, update_state
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
        that state, and takes one pass over both for the readings; on a CPU four over the gradient,
        and two more where an entry is clipped.

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
    check_sharded(axis_name, sharded)

    def init(params: optax.Params) -> ClipState:
        # Made of the parameters, not of their shapes, so that it lies on the devices as they do.
        return init_state(params)._replace(memory=jax.tree.map(_second_moment, params))

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
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        check_state(state, ClipState)
        layout = layout_of(scopes.tree, updates, axis_name, sharded, params)
        like = jnp.zeros([], layout.dtype)
        theta, keep, warmup = (
            number_at(x, state.steps, like) for x in (threshold, decay, warmup_steps)
        )
        warm = step_of(state).finite.astype(layout.dtype) >= warmup
        moments, treedef = jax.tree.flatten(state.memory)
        check_state(state, ClipState, ("memory", moments, select_leaves(layout, updates)))
        pairs = list(zip(select_leaves(layout, updates), moments, strict=True))
        rise = jnp.where(warm, jnp.sqrt(theta), jnp.inf)
        with jax.named_scope("optclip/measure"):
            ways = {"cpu": _in_several_looks, "default": _in_one_look}
            own = {platform: functools.partial(way, layout) for platform, way in ways.items()}
            seen = _numerics.by_platform(own, updates, moments, rise)
            finite = jnp.isfinite(seen.largest.value)
        # Nothing of a step that is not finite is clipped. A number of its own for the second pass:
        # bounds computed from the same are shared.
        (rise,) = _numerics.computed_anew(jnp.where(finite, rise, jnp.inf))
        with jax.named_scope("optclip/limit"):
            leaves, structure = jax.tree.flatten(updates)
            learned = []
            for member, (x, moment) in zip(layout.members, pairs, strict=True):
                entries = _bounded(x, moment, rise)
                leaves[member.index] = _limited(entries).astype(x.dtype)
                new = _learned(entries, keep, raw=learn_from == "raw")
                new = jnp.where(finite, new, entries.moment)
                learned.append(_numerics.narrowed(new, moment.dtype))
            updates = jax.tree.unflatten(structure, leaves)
            if nonfinite == "zero":
                updates = limit.zeroed_unless(finite, updates)
        zeroed = nonfinite == "zero"
        norm = seen.largest.clamped()
        clipped_norm = jnp.where(seen.worst > 1, jnp.minimum(seen.left, norm), norm)
        outcome = Outcome(
            finite=finite,
            norm=norm,
            clipped_norm=jnp.where(finite, clipped_norm, 0 if zeroed else norm),
            threshold=jnp.where(finite, seen.tightest, jnp.inf),
            factor=jnp.where(finite, 1 / jnp.maximum(seen.worst, 1), 0 if zeroed else 1),
            share=jnp.where(finite, seen.count, 0) / max(float(layout.sizes), 1),
        )
        return updates, update_state(state, outcome, jax.tree.unflatten(treedef, learned))

    return optax.GradientTransformationExtraArgs(init, update)


class _Seen(NamedTuple):
    """What the readings are made of.

    Attributes:
        largest: The largest entry; not finite where one is not.
        worst: The largest ratio of an entry to its bound.
        tightest: The smallest bound.
        left: The largest entry after clipping, where one is clipped.
        count: How many entries are clipped.
    """

    largest: Magnitude
    worst: jax.Array
    tightest: jax.Array
    left: jax.Array
    count: jax.Array


def _in_several_looks(
    layout: Layout, updates: optax.Updates, moments: list[jax.Array], rise: jax.Array
) -> _Seen:
    """The last one is left out where nothing is clipped."""
    magnitude = measure.measure(layout, norms.linf, updates)
    pairs = list(zip(select_leaves(layout, updates), moments, strict=True))
    zero = jnp.zeros([], layout.dtype)
    extremes = [(zero, zero - jnp.inf), *(_extremes(x, moment, rise) for x, moment in pairs)]
    both = [_largest(layout.dtype, some) for some in zip(*extremes, strict=True)]
    worst, tightest = _over_devices(lax.pmax, layout, jnp.stack(both))
    clipping = jnp.isfinite(magnitude.value) & (worst > 1)
    nothing = 0 * clipping.astype(layout.dtype)
    left, count = _numerics.where_needed(
        clipping,
        functools.partial(_look_closer, layout),
        lambda pairs, rise: (nothing, nothing),
        pairs,
        rise,
    )
    return _Seen(magnitude, worst, -tightest, left, count)


def _in_one_look(
    layout: Layout, updates: optax.Updates, moments: list[jax.Array], rise: jax.Array
) -> _Seen:
    """Without a condition, for accelerators."""
    leaves, dtype = select_leaves(layout, updates), layout.dtype
    half = jnp.full([], measure.room_for_moduli(leaves), dtype)
    zero = jnp.zeros([], dtype)
    found: list[tuple[jax.Array, ...]] = [(zero, zero, zero - jnp.inf, zero, zero)]
    for member, x, moment in zip(layout.members, leaves, moments, strict=True):
        wide, _, size, bound = _bounded(x, moment, rise)
        halved = _numerics.modulus(_numerics.scaled(wide, half))
        terms = (
            _numerics.infinite_unless_finite(halved),
            halved / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny),  # Not 0 / 0.
            -bound,
            jnp.minimum(size, bound),
            (size > bound).astype(size.dtype),
        )
        kinds = (lax.max,) * 4 + (lax.add,)
        *largest, count = _numerics.reduced_together(kinds, tuple(range(x.ndim)), *terms)
        found.append((*largest, count / member.sharding.copies))
    *extremes, counts = zip(*found, strict=True)
    both = jnp.stack([_largest(dtype, some) for some in extremes])
    peak, worst, tightest, left = _over_devices(lax.pmax, layout, both)
    count = _numerics.in_pairs(lax.add, [x.astype(dtype) for x in counts])
    count = _over_devices(lax.psum, layout, count)
    return _Seen(Magnitude(peak, half), worst / half, -tightest, left, count)


class _Entries(NamedTuple):
    """A leaf and its memory, in one dtype.

    Attributes:
        x: The leaf.
        moment: The root of its second moment.
        size: The moduli of the leaf.
        bound: What they may be: infinity where the moment is 0.
    """

    x: jax.Array
    moment: jax.Array
    size: jax.Array
    bound: jax.Array


def _bounded(x: jax.Array, moment: jax.Array, rise: jax.Array) -> _Entries:
    """Whoever asks computes them anew: shared, they would be written out."""
    x, moment, rise = _numerics.computed_anew(x, moment, rise)
    # Beside a 64-bit gradient or moment the other is 64-bit too.
    dtype = moment.dtype if moment.dtype == jnp.float64 else _numerics.accumulator(x.dtype)
    x, moment = _numerics.widened(x, dtype), moment.astype(dtype)
    rise = rise.astype(dtype)
    # A bound of infinity has no slope.
    bounded = (moment > 0) & jnp.isfinite(rise)
    bound = jnp.where(bounded, jnp.where(bounded, rise, 1) * moment, jnp.inf)
    return _Entries(x, moment, _numerics.modulus(x), bound)


def _extremes(x: jax.Array, moment: jax.Array, rise: jax.Array) -> tuple[jax.Array, jax.Array]:
    ratio = jnp.max(_ratio(_bounded(x, moment, rise)))
    return ratio, -jnp.min(_bounded(x, moment, rise).bound)


def _ratio(entries: _Entries) -> jax.Array:
    tiny = jnp.finfo(entries.bound.dtype).tiny
    return entries.size / jnp.maximum(entries.bound, tiny)  # Not 0 / 0.


def _limited(entries: _Entries) -> jax.Array:
    x, _, _, bound = entries
    if not jnp.iscomplexobj(x):
        return lax.clamp(-bound, x, bound)
    factor = limit.entry_factor(x, bound)
    return _numerics.scaled(_numerics.scaled(x, factor.coarse), factor.fine)


def _learned(entries: _Entries, keep: jax.Array, *, raw: bool) -> jax.Array:
    """The root of v, as squares would leave the range; mixed as v is."""
    _, moment, size, bound = entries
    seen = size if raw else jnp.minimum(size, bound)
    return _numerics.rms_ema(moment, seen, keep.astype(moment.dtype))


def _look_closer(
    layout: Layout, pairs: list[tuple[jax.Array, jax.Array]], rise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest entry that is left, and how many were clipped."""
    left, counts = [jnp.zeros([], layout.dtype)], [jnp.zeros([], layout.dtype)]
    for member, (x, moment) in zip(layout.members, pairs, strict=True):
        _, _, size, bound = _bounded(x, moment, rise)
        left.append(jnp.max(jnp.minimum(size, bound)))
        _, _, size, bound = _bounded(x, moment, rise)
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
