"""Rules made of rules."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip._checks import check_number, number_at
from optclip.thresholds.rules import Rule, Step, as_rule


def minimum(*rules: Any) -> Rule:
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


def maximum(*rules: Any) -> Rule:
    """The largest of several thresholds, group by group.

    Args:
        rules: Rules, numbers, traced scalars or schedules.

    Returns:
        A `Rule` that remembers what they remember; each observes the norms as they were clipped.
    """
    return _combined(rules, lambda step, limits: functools.reduce(jnp.maximum, limits))


def floor(rule: Any, least: Any) -> Rule:
    """The rule's threshold, but at least `least`.

    Args:
        rule: A rule, number, traced scalar or schedule.
        least: Smallest threshold; number, traced scalar, schedule or rule.

    Returns:
        A `Rule`.
    """
    return maximum(rule, least)


def ceiling(rule: Any, most: Any) -> Rule:
    """The rule's threshold, but at most `most`.

    Args:
        rule: A rule, number, traced scalar or schedule.
        most: Largest threshold; number, traced scalar, schedule or rule.

    Returns:
        A `Rule`.
    """
    return minimum(rule, most)


def switch(step: Any, before: Any, after: Any) -> Rule:
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
    check_number(step, "switch(step)", mend="pass 0 to switch at once")

    def pick(now: Step, limits: list[jax.Array]) -> jax.Array:
        done = now.finite.astype(limits[0].dtype)
        return jnp.where(done < number_at(step, now.count, limits[0]), *limits)

    return _combined((before, after), pick)


def _combined(parts: tuple[Any, ...], pick: Callable[[Step, list[jax.Array]], jax.Array]) -> Rule:
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
