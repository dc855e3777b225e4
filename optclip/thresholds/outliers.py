"""Rules that remember a mean and a spread per group, and find outliers: z-score and robust."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _jax, _numerics
from optclip._checks import at, check_choice, check_decay, check_number, number_at
from optclip.thresholds.rules import Rule


@_jax.exportable
class Spread(NamedTuple):
    """Memory of `zscore`.

    Attributes:
        seen: Norms learned from so far; int32.
        mean: Their mean; after the warm-up an exponential moving average.
        deviation: Their standard deviation, likewise. The variance itself would overflow.
    """

    seen: jax.Array
    mean: jax.Array
    deviation: jax.Array


LearnFromOutliers = Literal["raw", "clipped", "winsorized"]
"""The norm before clipping, after it, or limited to the range of ordinary ones."""


def _check_learn_from(learn_from: LearnFromOutliers) -> None:
    check_choice(learn_from, ("raw", "clipped", "winsorized"), "learn_from=")


ZVariant = Literal["reciprocal", "mean", "max"]


def zscore(
    z_threshold: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    warmup_steps: optax.ScalarOrSchedule,
    variant: ZVariant = "reciprocal",
    learn_from: LearnFromOutliers = "clipped",
) -> Rule:
    """Acts on norms more than `z_threshold` deviations above the mean; `optclip.zclip`.

    Args:
        z_threshold: How many deviations above the mean a norm may be.
        decay: Share of mean and variance that a step keeps, in [0, 1).
        warmup_steps: For how many steps to learn without acting.
        variant: What an outlier is brought to: the mean, mean + z_threshold deviations ("max"), or
            in between, the closer to the mean the larger it was ("reciprocal").
        learn_from: See `LearnFromOutliers`.

    Returns:
        A `Rule` that remembers three numbers per group.
    """
    check_number(z_threshold, "z_threshold=", hint="pass jnp.inf to switch it off")
    check_number(warmup_steps, "warmup_steps=", hint="pass 0 for none")
    check_choice(variant, ("reciprocal", "mean", "max"), "variant=")
    check_decay(decay)
    _check_learn_from(learn_from)
    eps = 1e-6  # The paper's, in the denominator of z.

    def init(norms):
        return Spread(
            jnp.zeros(norms.shape, jnp.int32), jnp.zeros_like(norms), jnp.zeros_like(norms)
        )

    def warm(memory, step, norms):
        # Two norms at least: there is no deviation of one.
        enough = jnp.maximum(number_at(warmup_steps, step.count, norms), 1)
        return memory.seen.astype(norms.dtype) < enough

    def padded_deviation(memory):
        return memory.deviation + (0 if variant == "max" else eps)

    def level_of(memory, step, norms):
        return memory.mean + at(z_threshold, step.count, norms) * padded_deviation(memory)

    def threshold(memory, step, norms, params):
        allowed, padded = at(z_threshold, step.count, norms), padded_deviation(memory)
        level = level_of(memory, step, norms)
        if variant == "mean":
            target = memory.mean
        elif variant == "max":
            target = level
        else:
            z = jnp.where(norms > level, norms - memory.mean, padded) / padded
            target = memory.mean + allowed * (allowed / z) * memory.deviation
        limit = jnp.where(norms > level, target, level)
        return jnp.where(warm(memory, step, norms), jnp.inf, limit)

    def observe(memory, step, norms, clipped_norms):
        warming = warm(memory, step, norms)
        reach = at(z_threshold, step.count, norms) * memory.deviation
        away = (clipped_norms if learn_from == "clipped" else norms) - memory.mean
        if learn_from == "winsorized":
            # Not as a norm, which would round it. A norm above the level that was not clipped is
            # one that `patient` accepts.
            accepted = (norms > level_of(memory, step, norms)) & (clipped_norms >= norms)
            away = jnp.where(accepted, away, jnp.minimum(away, reach))
        away = jnp.where(warming, norms - memory.mean, away)
        # While it warms up a plain mean and variance, as of a buffer, step by step.
        before = memory.seen.astype(norms.dtype)
        keep = jnp.where(warming, before / (before + 1), number_at(decay, step.count, norms))
        mean = memory.mean + (1 - keep) * away
        # From the new mean a norm is keep * away. The paper takes the variance about the new
        # mean; a plain one is about both.
        spread = jnp.abs(away) * jnp.where(warming, jnp.sqrt(keep), keep)
        deviation = _numerics.rms_ema(memory.deviation, spread, keep)
        return Spread(memory.seen + 1, mean, deviation)

    return Rule(init, threshold, observe, has_memory=True)


@_jax.exportable
class Level(NamedTuple):
    """Memory of `robust`.

    Attributes:
        seen: Norms learned from so far; int32.
        level: exp(mean of log norm), the typical norm; 1 before the first.
        variance: Variance of the log norm.
    """

    seen: jax.Array
    level: jax.Array
    variance: jax.Array


HELD = 2.0
"""To how many deviations of the log norm about its mean a norm is held before it is learned."""

DEEPEST = math.log(10)
"""How far down the level believes a norm, in the logarithm: a small norm is no danger, and so the
level follows a fall before the spread has grown."""

FIRST_SPREAD = 0.25
"""The deviation of the log norm before any is known."""

LEAST_SPREAD = 0.02
"""The smallest deviation reckoned with, so that equal norms do not shut the clip."""

FIRST_NORMS = 4
"""The decay is at most 1 - 1 / this at the first norm and rises with their number, as of a plain
mean: the first few norms settle the level, and no warm-up is needed."""


def robust(
    deviations: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    max_rise: optax.ScalarOrSchedule = float("inf"),
    learn_from: LearnFromOutliers = "winsorized",
) -> Rule:
    """A level and a spread of the log norm that outliers hardly move; `optclip.robust_clip`.

    Args:
        deviations: How many deviations of the log norm above its mean a norm may be; may be
            negative.
        decay: Share of mean and variance that a step keeps, in [0, 1), after the first steps.
        max_rise: The most that the level may rise in one step, as a share of it.
        learn_from: "winsorized": log norms held to two deviations about the mean (the level
            believes a smaller one down to a tenth).

    Returns:
        A `Rule` that remembers three numbers per group. The first norm is never clipped.
    """
    check_number(deviations, "deviations=", low=-float("inf"), hint="the default is 2.0")
    check_number(max_rise, "max_rise=", hint="pass jnp.inf for no bound")
    check_decay(decay)
    _check_learn_from(learn_from)

    def init(norms):
        return Level(
            jnp.zeros(norms.shape, jnp.int32),
            jnp.ones_like(norms),
            jnp.full(norms.shape, FIRST_SPREAD**2, norms.dtype),
        )

    def threshold(memory, step, norms, params):
        spread = jnp.maximum(jnp.sqrt(memory.variance), LEAST_SPREAD)
        limit = memory.level * jnp.exp(number_at(deviations, step.count, norms) * spread)
        return jnp.where(memory.seen > 0, limit, jnp.inf)

    def observe(memory, step, norms, clipped_norms):
        begun = memory.seen > 0
        learned = clipped_norms if learn_from == "clipped" else norms
        # Logarithms of ratios to the level: exact whatever the scale of the norms.
        ratio = learned / memory.level
        away = jnp.log(jnp.clip(ratio, 1e-30, 1e30))
        if learn_from == "winsorized":
            reach = HELD * jnp.maximum(jnp.sqrt(memory.variance), LEAST_SPREAD)
            spread_from = jnp.clip(away, -reach, reach)
            away = jnp.clip(away, -jnp.maximum(reach, DEEPEST), reach)
        else:
            spread_from = away
        start = 1 - 1 / (memory.seen.astype(norms.dtype) + FIRST_NORMS)
        keep = jnp.minimum(number_at(decay, step.count, norms), start)
        rise = jnp.minimum((1 - keep) * away, jnp.log1p(number_at(max_rise, step.count, norms)))
        level = jnp.where(begun, _numerics.scaled_by_exp(memory.level, rise), learned)
        variance = jnp.where(
            begun, keep * (memory.variance + (1 - keep) * spread_from**2), memory.variance
        )
        return Level(memory.seen + 1, level, variance)

    return Rule(init, threshold, observe, has_memory=True)
