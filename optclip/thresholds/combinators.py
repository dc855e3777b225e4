"""Rules made of rules."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optclip import _jax
from optclip._checks import check_number, number_at
from optclip.thresholds.rules import Memory, Rule, RuleLike, Step, as_rule


def minimum(*rules: RuleLike) -> Rule:
    """The smallest of several thresholds, group by group.

    Args:
        rules: Rules, numbers, traced scalars or schedules.

    Returns:
        A `Rule` that remembers what they remember; each observes the norms as they were clipped.

    Example:
        >>> from optclip import clip_by, thresholds
        >>> clip = clip_by(thresholds.minimum(thresholds.moving_average(2.0, 0.99), 1.0))
    """
    return _combined(rules, lambda step, limits: functools.reduce(jnp.minimum, limits))


def maximum(*rules: RuleLike) -> Rule:
    """The largest of several thresholds, group by group.

    Args:
        rules: Rules, numbers, traced scalars or schedules.

    Returns:
        A `Rule` that remembers what they remember; each observes the norms as they were clipped.
    """
    return _combined(rules, lambda step, limits: functools.reduce(jnp.maximum, limits))


def switch(
    step: float | jax.Array,
    before: RuleLike,
    after: RuleLike,
) -> Rule:
    """One rule for the first steps, another from then on; both observe all the while.

    Args:
        step: Number of finite steps for which `before` is asked; number or traced scalar.
        before: A rule, number, traced scalar or schedule.
        after: Likewise.

    Returns:
        A `Rule` that remembers what both remember.

    Example:
        >>> from optclip import clip_by, thresholds
        >>> clip = clip_by(thresholds.switch(100, 1.0, thresholds.moving_average(2.0, 0.99)))
    """
    check_number(step, "step=", hint="pass 0 to switch at once")

    def pick(now: Step, limits: list[jax.Array]) -> jax.Array:
        done = now.finite.astype(limits[0].dtype)
        return jnp.where(done < number_at(step, now.count, limits[0]), *limits)

    return _combined((before, after), pick)


@_jax.exportable
class Patience(NamedTuple):
    """Memory of `patient`.

    Attributes:
        memory: The rule's own.
        streak: How many steps in a row, up to now, were clipped; int32, per group.
    """

    memory: Memory
    streak: jax.Array


def patient(rule: RuleLike, patience: float | jax.Array) -> Rule:
    """The rule, which learns from norms as they come after so many clips in a row.

    A rule that learns from what it let through may never follow a lasting rise of the level. This
    one accepts the new level, until a norm is not clipped.

    Args:
        rule: A rule that learns from clipped norms; others learn from what comes anyhow.
        patience: How many clips in a row; number or traced scalar.

    Returns:
        A `Rule` that remembers what the rule does, and one int32 per group.

    Example:
        >>> from optclip import clip_by, thresholds
        >>> clip = clip_by(thresholds.patient(thresholds.moving_average(2.0, 0.99), 20))
    """
    rule = as_rule(rule)
    check_number(patience, "patience=", low=1, hint="pass None for no patience")

    def init(norms):
        return Patience(rule.init(norms), jnp.zeros(norms.shape, jnp.int32))

    def threshold(memory, step, norms, params):
        return rule.threshold(memory.memory, step, norms, params)

    def observe(memory, step, norms, clipped_norms):
        streak = jnp.where(clipped_norms < norms, memory.streak + 1, 0)
        accepting = streak.astype(norms.dtype) >= number_at(patience, step.count, norms)
        learned = jnp.where(accepting, norms, clipped_norms)
        return Patience(rule.observe(memory.memory, step, norms, learned), streak)

    return Rule(init, threshold, observe, rule.needs_params, has_memory=True)


def _combined(
    parts: tuple[RuleLike, ...],
    pick: Callable[[Step, list[jax.Array]], jax.Array],
) -> Rule:
    rules = [as_rule(part) for part in parts]
    if not rules:
        raise ValueError("pass at least one rule")

    remember = any(rule.has_memory for rule in rules)

    def threshold(memory, step, norms, params):
        limits = [
            rule.threshold(own, step, norms, params)
            for rule, own in zip(rules, memory or ((),) * len(rules), strict=True)
        ]
        return pick(step, limits)

    def observe(memory, step, norms, clipped_norms):
        if not memory:
            return ()
        return tuple(
            rule.observe(own, step, norms, clipped_norms)
            for rule, own in zip(rules, memory, strict=True)
        )

    return Rule(
        init=lambda norms: tuple(rule.init(norms) for rule in rules) if remember else (),
        threshold=threshold,
        observe=observe,
        needs_params=any(rule.needs_params for rule in rules),
        has_memory=remember,
        separable=all(rule.separable for rule in rules),
    )
