"""Rules that remember a number or two per group: averages and an online quantile."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _numerics
from optclip import norms as norm_kinds
from optclip._checks import at, check_choice, check_decay, check_number, number_at
from optclip.thresholds.rules import Memory, Rule, Step

LearnFrom = Literal["raw", "clipped", "winsorised"]
"""What a rule learns from: the norm as it came, as it left, or held to the rule's own level."""


def feed(
    learn_from: LearnFrom, norms: jax.Array, clipped_norms: jax.Array, level: jax.Array
) -> jax.Array:
    """The norms that a rule learns from."""
    if learn_from == "raw":
        return norms
    return clipped_norms if learn_from == "clipped" else jnp.minimum(norms, level)


class Patience(NamedTuple):
    """Memory of a rule with patience.

    Attributes:
        memory: The rule's own.
        streak: How many steps in a row, up to now, were clipped; int32, per group.
    """

    memory: Memory
    streak: jax.Array


def learning(
    make: Callable[[LearnFrom], Rule], learn_from: LearnFrom, patience: Any, name: str
) -> Rule:
    """The rule that `make` builds, which learns from raw norms after `patience` clips in a row.

    Args:
        make: From what to learn from to the rule; the memory must have the same form for all.
        learn_from: What the rule learns from.
        patience: Clips in a row after which the norms are accepted as they come, until one is not
            clipped; number or traced scalar. None: never.
        name: What error messages call the method.

    Returns:
        A `Rule`.
    """
    check_choice(learn_from, ("raw", "clipped", "winsorised"), f"{name}(learn_from=...)")
    rule = make(learn_from)
    if patience is None:
        return rule
    check_number(patience, f"{name}(patience=...)", low=1, mend="pass None for no patience")
    raw = make("raw")

    def init(norms):
        return Patience(rule.init(norms), jnp.zeros(norms.shape, jnp.int32))

    def threshold(memory, step, norms, params):
        return rule.threshold(memory.memory, step, norms, params)

    def observe(memory, step, norms, clipped_norms):
        streak = jnp.where(clipped_norms < norms, memory.streak + 1, 0)
        accepting = streak.astype(norms.dtype) >= number_at(patience, step.count, norms)
        learned = rule.observe(memory.memory, step, norms, clipped_norms)
        accepted = raw.observe(memory.memory, step, norms, clipped_norms)
        choose = lambda a, b: jnp.where(jnp.broadcast_to(accepting, a.shape), a, b)  # noqa: E731
        return Patience(jax.tree.map(choose, accepted, learned), streak)

    return Rule(init, threshold, observe, rule.needs_params, has_memory=True)


class Average(NamedTuple):
    """Memory of `moving_average`.

    Attributes:
        total: Decayed sum of the norms.
        weight: Decayed sum of ones; total / weight is the average without bias.
    """

    total: jax.Array
    weight: jax.Array


def moving_average(
    multiplier: Any,
    decay: Any,
    learn_from: LearnFrom = "clipped",
    patience: Any = None,
    name: str = "moving_average",
) -> Rule:
    """`multiplier` times the exponential moving average of earlier norms, corrected for its start.

    Args:
        multiplier: How many times the average a norm may be; number, traced scalar or schedule.
        decay: Share of the average that a step keeps, in [0, 1).
        learn_from: See `LearnFrom`.
        patience: After so many clips in a row learn from raw norms; None: never.
        name: What error messages call the method.

    Returns:
        A `Rule` that remembers two numbers per group. The first norm is never clipped.
    """
    check_number(multiplier, f"{name}(multiplier=...)", mend="pass jnp.inf to switch clipping off")
    check_decay(decay, name)

    def make(learn_from: LearnFrom) -> Rule:
        def init(norms):
            return Average(jnp.zeros_like(norms), jnp.zeros_like(norms))

        def threshold(memory, step, norms, params):
            begun = memory.weight > 0
            average = memory.total / jnp.where(begun, memory.weight, 1)
            return jnp.where(begun, at(multiplier, step.count, norms) * average, jnp.inf)

        def observe(memory, step, norms, clipped_norms):
            learned = feed(learn_from, norms, clipped_norms, threshold(memory, step, norms, None))
            keep = number_at(decay, step.count, norms)
            return Average(
                keep * memory.total + (1 - keep) * learned, keep * memory.weight + (1 - keep)
            )

        return Rule(init, threshold, observe, has_memory=True)

    return learning(make, learn_from, patience, name)


def online_quantile(
    quantile: Any, step_size: Any, init: Any = None, name: str = "online_quantile"
) -> Rule:
    """A threshold that rises by a factor at a norm above it and falls at one below.

    Args:
        quantile: The share of norms that should lie below the threshold, in [0, 1].
        step_size: How far the logarithm of the threshold moves at a step, at the most.
        init: The first threshold; None for the first norm.
        name: What error messages call the method.

    Returns:
        A `Rule` that remembers one number per group.
    """
    check_number(quantile, f"{name}(quantile=...)", high=1, mend="0.9 clips one step in ten")
    check_number(step_size, f"{name}(step_size=...)", mend="the default is 0.2")
    if init is not None:
        hint = "pass None to start at the first norm"
        check_number(init, f"{name}(init=...)", mend=hint, schedule=False)

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
    relative: Any,
    decay: Any,
    warmup_steps: Any,
    max_norm: Any,
    learn_from: LearnFrom = "clipped",
    patience: Any = None,
    name: str = "leaf_average",
) -> Rule:
    """`relative` times each group's own average, after a clip of all together; `optclip.adagc`.

    Args:
        relative: How many times its average a norm may be.
        decay: Share of the average that a step keeps, in [0, 1).
        warmup_steps: The first step, counted from 1, of this rule; before it the groups are
            clipped together, by `max_norm`.
        max_norm: Largest norm of all groups together while warming up.
        learn_from: See `LearnFrom`.
        patience: After so many clips in a row learn from raw norms; None: never.
        name: What error messages call the method.

    Returns:
        A `Rule` that remembers one number per group: while warming up the smallest norm, then an
        average that starts there.
    """
    check_number(relative, f"{name}(relative=...)", mend="pass jnp.inf to switch clipping off")
    check_number(max_norm, f"{name}(max_norm=...)", mend="pass jnp.inf for no warm-up clip")
    check_number(warmup_steps, f"{name}(warmup_steps=...)", mend="pass 0 for none")
    check_decay(decay, name)

    def warm(step: Step, norms: jax.Array) -> jax.Array:
        # The paper counts steps from 1, and the adaptive phase begins at step `warmup_steps`.
        return step.finite.astype(norms.dtype) + 1 < number_at(warmup_steps, step.count, norms)

    def make(learn_from: LearnFrom) -> Rule:
        def threshold(memory, step, norms, params):
            together = norm_kinds.pool(norm_kinds.l2, norm_kinds.plain(norms), 1).clamped()
            most = at(max_norm, step.count, norms)
            # Each keeps its share. Scaled, so that no reciprocal is flushed to zero.
            unit = jnp.where(together > 1, jnp.asarray(2.0**-60, norms.dtype), 1)
            share = norms * unit / jnp.where(together > 0, together * unit, 1)
            at_first = jnp.where(together > most, most * share, jnp.inf)
            own = jnp.where(memory > 0, at(relative, step.count, norms) * memory, jnp.inf)
            return jnp.where(warm(step, norms), at_first, own)

        def observe(memory, step, norms, clipped_norms):
            learned = feed(learn_from, norms, clipped_norms, threshold(memory, step, norms, None))
            keep = number_at(decay, step.count, norms)
            smallest = jnp.minimum(memory, learned)
            average = keep * memory + (1 - keep) * learned
            updated = jnp.where(warm(step, norms), smallest, average)
            return jnp.where(memory > 0, updated, learned)

        return Rule(jnp.zeros_like, threshold, observe, has_memory=True)

    return learning(make, learn_from, patience, name)
