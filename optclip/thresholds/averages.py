"""Rules that remember a number or two per group: averages and an online quantile."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _jax, _numerics
from optclip import norms as norm_kinds
from optclip._checks import at, check_choice, check_decay, check_number, number_at
from optclip.thresholds.rules import Rule, Step

LearnFrom = Literal["raw", "clipped"]
"""What a rule learns from: the norm before clipping, or after it."""


def feed(learn_from: LearnFrom, norms: jax.Array, clipped_norms: jax.Array) -> jax.Array:
    """The norms that a rule learns from."""
    return norms if learn_from == "raw" else clipped_norms


def check_learn_from(learn_from: LearnFrom) -> None:
    """Refuses anything but the two."""
    check_choice(learn_from, ("raw", "clipped"), "learn_from=")


@_jax.exportable
class Average(NamedTuple):
    """Memory of `moving_average`.

    Attributes:
        total: Decayed sum of the norms.
        weight: Decayed sum of ones; total / weight is the average without bias.
    """

    total: jax.Array
    weight: jax.Array


def moving_average(
    multiplier: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    learn_from: LearnFrom = "clipped",
) -> Rule:
    """`multiplier` times the exponential moving average of earlier norms, corrected for its start.

    Args:
        multiplier: How many times the average a norm may be; number, traced scalar or schedule.
        decay: Share of the average that a step keeps, in [0, 1).
        learn_from: See `LearnFrom`.

    Returns:
        A `Rule` that remembers two numbers per group. The first norm is never clipped.
    """
    check_number(multiplier, "multiplier=", hint="pass jnp.inf to switch clipping off")
    check_decay(decay)
    check_learn_from(learn_from)

    def init(norms):
        return Average(jnp.zeros_like(norms), jnp.zeros_like(norms))

    def threshold(memory, step, norms, params):
        begun = memory.weight > 0
        average = memory.total / jnp.where(begun, memory.weight, 1)
        return jnp.where(begun, at(multiplier, step.count, norms) * average, jnp.inf)

    def observe(memory, step, norms, clipped_norms):
        learned = feed(learn_from, norms, clipped_norms)
        keep = number_at(decay, step.count, norms)
        return Average(
            keep * memory.total + (1 - keep) * learned, keep * memory.weight + (1 - keep)
        )

    return Rule(init, threshold, observe, has_memory=True)


def online_quantile(
    quantile: optax.ScalarOrSchedule,
    step_size: optax.ScalarOrSchedule,
    init: float | jax.Array | None = None,
) -> Rule:
    """A threshold that rises by a factor at a norm above it and falls at one below.

    Args:
        quantile: The share of norms that should lie below the threshold, in [0, 1].
        step_size: How far the logarithm of the threshold moves at a step, at the most.
        init: The first threshold; None for the first norm.

    Returns:
        A `Rule` that remembers one number per group.
    """
    check_number(quantile, "quantile=", high=1, hint="0.9 clips one step in ten")
    check_number(step_size, "step_size=", hint="the default is 0.2")
    if init is not None:
        hint = "pass None to start at the first norm"
        check_number(init, "init=", hint=hint, schedule=False)

    def begin(norms):
        return jnp.full(norms.shape, 0 if init is None else init, norms.dtype)

    def threshold(memory, step, norms, params):
        return jnp.where(memory > 0, memory, norms)

    def observe(memory, step, norms, clipped_norms):
        now = threshold(memory, step, norms, None)
        below = (norms <= now).astype(norms.dtype)
        eta = number_at(step_size, step.count, norms)
        moved = _numerics.scaled_by_exp(
            now, -eta * (below - number_at(quantile, step.count, norms))
        )
        info = jnp.finfo(norms.dtype)
        return jnp.clip(moved, float(info.tiny), float(info.max))  # 0 means: not begun.

    return Rule(begin, threshold, observe, has_memory=True)


def leaf_average(
    relative: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    warmup_steps: optax.ScalarOrSchedule,
    max_norm: optax.ScalarOrSchedule,
    learn_from: LearnFrom = "clipped",
) -> Rule:
    """`relative` times each group's own average, after a clip of all together; `optclip.adagc`.

    Args:
        relative: How many times its average a norm may be.
        decay: Share of the average that a step keeps, in [0, 1).
        warmup_steps: The first step, counted from 1, of this rule; before it the groups are
            clipped together, by `max_norm`.
        max_norm: Largest norm of all groups together while warming up.
        learn_from: See `LearnFrom`.

    Returns:
        A `Rule` that remembers one number per group: while warming up the smallest norm, then an
        average that starts there.
    """
    check_number(relative, "relative=", hint="pass jnp.inf to switch clipping off")
    check_number(max_norm, "max_norm=", hint="pass jnp.inf for no warm-up clip")
    check_number(warmup_steps, "warmup_steps=", hint="pass 0 for none")
    check_decay(decay)
    check_learn_from(learn_from)

    def warm(step: Step, norms: jax.Array) -> jax.Array:
        # The paper counts steps from 1, and the adaptive phase begins at step `warmup_steps`.
        return step.finite.astype(norms.dtype) + 1 < number_at(warmup_steps, step.count, norms)

    def threshold(memory, step, norms, params):
        together = norm_kinds.pool(norm_kinds.l2, [norm_kinds.plain(norms)], [1]).clamped()
        most = at(max_norm, step.count, norms)
        # Each keeps its share. Scaled, so that no reciprocal is flushed to zero.
        unit = jnp.where(together > 1, jnp.asarray(2.0**-60, norms.dtype), 1)
        share = norms * unit / jnp.where(together > 0, together * unit, 1)
        at_first = jnp.where(together > most, most * share, jnp.inf)
        own = jnp.where(memory > 0, at(relative, step.count, norms) * memory, jnp.inf)
        return jnp.where(warm(step, norms), at_first, own)

    def observe(memory, step, norms, clipped_norms):
        learned = feed(learn_from, norms, clipped_norms)
        keep = number_at(decay, step.count, norms)
        smallest = jnp.minimum(memory, learned)
        average = keep * memory + (1 - keep) * learned
        updated = jnp.where(warm(step, norms), smallest, average)
        return jnp.where(memory > 0, updated, learned)

    return Rule(jnp.zeros_like, threshold, observe, has_memory=True)
