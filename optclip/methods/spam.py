"""SPAM's spike-aware clip: every entry against its own second moment."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import changing, devices, limiters, measuring, norms, planning, scopes
from optclip.clipping import NEEDS_STATE_MSG, Nonfinite, check_nonfinite
from optclip.state import ClipState, Outcome, advanced, fresh, step_of
from optclip.thresholds.checking import check_choice, check_decay, check_number, number_at
from optclip.thresholds.history import LearnFrom, mixed


def spam_clip(
    threshold: Any = 5000.0,
    decay: Any = 0.999,
    warmup_steps: Any = 20,
    *,
    learn_from: LearnFrom = "clipped",
    axis_name: Any = None,
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
        that state, and takes several passes over the gradient for the readings.

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
    name = "spam_clip"
    check_number(threshold, f"{name}(threshold=...)", mend="pass jnp.inf to switch clipping off")
    check_number(warmup_steps, f"{name}(warmup_steps=...)", mend="pass 0 for none")
    check_choice(learn_from, ("raw", "clipped", "winsorised"), f"{name}(learn_from=...)")
    check_decay(decay, name)
    check_nonfinite(nonfinite)

    def init(params: Any) -> ClipState:
        # Made of the parameters, not of their shapes, so that it lies on the devices as they do.
        return fresh(params)._replace(memory=jax.tree.map(_second_moment, params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipState]:
        del params, extra_args
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        plan = planning.plan(scopes.element, updates, axis_name, sharded)
        like = jnp.zeros([], plan.dtype)
        theta, keep, warmup = (
            number_at(x, state.count, like) for x in (threshold, decay, warmup_steps)
        )
        with jax.named_scope("optclip/measure"):
            magnitude = measuring.measure(plan, norms.linf, updates)
            finite = jnp.isfinite(magnitude.value)
        acting = finite & (step_of(state).finite.astype(plan.dtype) >= warmup)
        moments, treedef = jax.tree.flatten(state.memory)
        leaves, learned, least, above = {}, [], [], []
        with jax.named_scope("optclip/limit"):
            for member, x, moment in zip(
                plan.members, planning.picked(plan, updates), moments, strict=True
            ):
                bound = jnp.sqrt(theta.astype(moment.dtype)) * moment
                bound = jnp.where(acting & (moment > 0), bound, jnp.inf)
                wide = norms.widened(x)
                size = norms.modulus(wide)
                factor = changing.entry_factor(limiters.rescale, wide, bound)
                limited = (
                    norms.scaled(norms.scaled(wide, factor.coarse), factor.fine)
                    if jnp.iscomplexobj(x)
                    else lax.clamp(-bound, wide, bound)
                )
                leaves[member.index] = limited.astype(x.dtype)
                limited_size = jnp.minimum(size, bound)
                seen = size if learn_from == "raw" else limited_size
                # The root of v, as squares would leave the range; mixed as v is.
                new = mixed(moment, seen, keep.astype(moment.dtype))
                learned.append(jnp.where(finite, new, moment))
                extremes = (jnp.min(bound), jnp.min(factor.product()), -jnp.max(limited_size))
                least.append(jnp.stack([x.astype(plan.dtype) for x in extremes]))
                count = jnp.sum((size > bound).astype(plan.dtype))
                above.append(count / member.split.copies)
            flat, structure = jax.tree.flatten(updates)
            flat = [leaves.get(index, x) for index, x in enumerate(flat)]
            updates = jax.tree.unflatten(structure, flat)
            if nonfinite == "zero":
                updates = changing.zeroed_unless(finite, updates)
        # The smallest bound, the smallest factor, and the largest entry left, negative.
        least.append(jnp.array([jnp.inf, 1, 0], plan.dtype))
        smallest = jnp.min(jnp.stack(least), axis=0)
        share = sum(above, like)
        if plan.axis_names:
            smallest = lax.pmin(smallest, plan.axis_names)
            share = lax.psum(devices.as_varying(share, plan.axis_names), plan.axis_names)
        handed_on = 0 if nonfinite == "zero" else 1
        outcome = Outcome(
            finite=finite,
            norm=magnitude.saturated(),
            clipped_norm=jnp.where(
                finite, -smallest[2], 0 if nonfinite == "zero" else magnitude.value
            ),
            threshold=smallest[0],
            factor=jnp.where(finite, smallest[1], handed_on),
            share=share / max(float(plan.sizes), 1),
        )
        return updates, advanced(state, outcome, jax.tree.unflatten(treedef, learned))

    return optax.GradientTransformationExtraArgs(init, update)


def _second_moment(x: Any) -> jax.Array | None:
    if not planning.is_floating(x) or not math.prod(getattr(x, "shape", ())):
        return None
    return jnp.zeros_like(x, dtype=norms.accumulator(jnp.result_type(x)))
