"""From curves of losses to scores.

First what is kept of each run, then what is said of a method under a setting. A run has diverged
when a loss of its result is not finite or the result is above the loss of the initial network by
more than DIVERGED; its loss is infinity then.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from benchmarks.proving_ground.task import Setting, Task
from benchmarks.proving_ground.training import Curves

DIVERGED = 1.1
"""The result over the loss of the initial network, from which on a run has diverged."""
NEAR = 1.05
"""A learning rate is as good as the best where its loss is no more than this times as large."""
SMOOTHING, BACK = 10, 1.01
"""A run is back when its mean loss over so many steps is at most so many times the clean run's."""


# What is kept of a run ---------------------------------------------------------------------------


def of_runs(
    task: Task, setting: Setting, curves: Curves, base: Curves | None
) -> dict[str, np.ndarray | None]:
    """What is kept of runs.

    Args:
        task: The task.
        setting: What they were run under.
        curves: With the axes (threshold, learning rate, seed, ...).
        base: The curves of the setting it is compared with; None if none.

    Returns:
        "loss" (infinite where a run diverged), "first" (the loss of the initial network),
        "held_out" (None where the task has no other data) and "clip_rate", each with the axes
        (threshold, learning rate, seed), and "steps_lost" with an axis of events after them.
    """
    steps = curves.losses.shape[-1]
    loss = result(task, curves.losses)
    lost = np.zeros((*loss.shape, 0))
    events = setting.events(steps)
    if events and base is not None:
        lost = steps_lost(curves.losses, base.losses, events)
    held_out = np.where(np.isfinite(loss), curves.held_out, np.inf) if task.held_out else None
    return {
        "loss": loss,
        "first": curves.losses[..., 0],
        "held_out": held_out,
        "clip_rate": curves.clip_rate,
        "steps_lost": lost,
    }


def result(task: Task, losses: np.ndarray) -> np.ndarray:
    """The loss at the end of each run; infinity where it diverged."""
    last = max(round(losses.shape[-1] * task.last), 1)
    end = losses[..., -last:].astype(np.float64)
    with np.errstate(invalid="ignore"):
        settled = task.settle(end, axis=-1)
    first = losses[..., 0]
    good = np.isfinite(end).all(axis=-1) & (settled <= DIVERGED * first)
    return np.where(good, settled, np.inf)


def steps_lost(losses: np.ndarray, base: np.ndarray, events: tuple[int, ...]) -> np.ndarray:
    """Steps from each event until the loss is what it would have been without it.

    Args:
        losses: Of runs with events; the last axis is the step.
        base: Of the same runs without.
        events: At which steps.

    Returns:
        One more axis than the runs have. A run that is not back before the next event, or the end,
        has lost the steps until then.
    """
    ours, theirs = (_smoothed(x) for x in (losses, base))
    with np.errstate(invalid="ignore"):
        back = ours <= BACK * theirs  # never where one of them is not finite
    ends = (*events[1:], losses.shape[-1])
    lost = []
    for event, end in zip(events, ends, strict=True):
        # The loss of the event's own step was taken before anything happened.
        after = back[..., event + 1 : end]
        never = np.full((*after.shape[:-1], 1), True)
        lost.append(np.argmax(np.concatenate([after, never], axis=-1), axis=-1))
    return np.stack(lost, axis=-1)


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """The mean over this step and those after it; at the end, over those that are left."""
    steps = losses.shape[-1]
    width = min(SMOOTHING, steps)
    padded = np.concatenate([losses, np.repeat(losses[..., -1:], width - 1, axis=-1)], axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded.astype(np.float64), width, axis=-1)
    return windows.mean(axis=-1)


# What is said of a method ------------------------------------------------------------------------


class Best(NamedTuple):
    """The threshold and the learning rate with the lowest mean loss over the seeds.

    Attributes:
        loss: That loss.
        threshold: The threshold; what it is where there is nothing to choose.
        rate: The learning rate.
        place: Where they are in the arrays: (threshold, learning rate).
    """

    loss: float
    threshold: float
    rate: float
    place: tuple[int, int]


class Score(NamedTuple):
    """A method under a setting.

    Attributes:
        loss: At the best threshold and learning rate, over the seeds; infinite if all diverged.
        held_out: On other data, there; None where there are none.
        threshold: The best threshold.
        rate: The best learning rate.
        threshold_at_edge: Whether it is the smallest or the largest of several.
        rate_at_edge: Whether the rate is.
        spread: Of the loss over the seeds there: the standard error.
        transferred: The loss at the threshold and rate that are best under the base setting, times
            the setting's own factor on rates; None where it has no base.
        rates_range: The largest over the smallest of the learning rates next to each other, the
            best among them, whose loss is within 5% of the best, at the best threshold; None where
            only one rate was run.
        sensitivity: The mean over the learning rates of how much more than the best loss is left,
            at the best threshold; a run that ends above the loss it began with counts as that.
            Wortsman et al., "Small-scale proxies for large-scale transformer training
            instabilities", 2023, arXiv:2309.14322. None where only one rate was run.
        worst: The loss at the worst learning rate, at the best threshold, counted likewise.
        diverged: The share of the runs at the best threshold that diverged.
        clip_rate: There, at the best rate.
        steps_lost: To each event, there; None where there are none.
        cost: The loss over the best loss under the base setting; None where it has no base.
    """

    loss: float
    held_out: float | None
    threshold: float
    rate: float
    threshold_at_edge: bool
    rate_at_edge: bool
    spread: float
    transferred: float | None
    rates_range: float | None
    sensitivity: float | None
    worst: float | None
    diverged: float
    clip_rate: float
    steps_lost: float | None
    cost: float | None


def best(runs: dict[str, Any], only: int | None = None) -> Best:
    """The best threshold and learning rate.

    Args:
        runs: What was kept of the runs under a setting, with its "rates" and "thresholds".
        only: The place of the threshold to look at; None for all.
    """
    means = over_seeds(runs["loss"])
    if only is not None:
        means = np.where(np.arange(len(means))[:, None] == only, means, np.inf)
    threshold, rate = np.unravel_index(np.argmin(means), means.shape)
    if only is not None:
        threshold = only
    return Best(
        float(means[threshold, rate]),
        runs["thresholds"][threshold],
        runs["rates"][rate],
        (int(threshold), int(rate)),
    )


def score(
    runs: dict[str, Any], base: dict[str, Any] | None = None, only: int | None = None
) -> Score:
    """The score of a method under a setting.

    Args:
        runs: What was kept of the runs under it.
        base: The same under its base setting.
        only: The place of the one threshold to look at; None for the best.
    """
    found = best(runs, only)
    place = found.place
    losses = _infinite(runs["loss"])
    cost = transferred = None
    if base is not None:
        tuned = best(base, only)
        cost = _ratio(found.loss, tuned.loss)
        same = losses.shape[:2] == _infinite(base["loss"]).shape[:2]
        transferred = float(over_seeds(losses)[tuned.place]) if same else found.loss
    held_out = runs["held_out"]
    lost = np.asarray(runs["steps_lost"], float)[place]
    seeds = losses[place]
    good = sensitivity = worst = None
    if len(runs["rates"]) > 1:
        good = rates_range(runs["rates"], over_seeds(losses)[place[0]])
        of_rates = np.minimum(losses, _infinite(runs["first"]))[place[0]].mean(axis=-1)
        sensitivity, worst = float(np.mean(of_rates - of_rates.min())), float(of_rates.max())
    spread = 0.0 if math.isfinite(found.loss) else math.inf
    if math.isfinite(found.loss) and len(seeds) > 1:
        spread = float(np.std(seeds, ddof=1) / math.sqrt(len(seeds)))
    return Score(
        loss=found.loss,
        held_out=None if held_out is None else float(over_seeds(held_out)[place]),
        threshold=found.threshold,
        rate=found.rate,
        threshold_at_edge=only is None and _at_edge(place[0], runs["thresholds"]),
        rate_at_edge=_at_edge(place[1], runs["rates"]),
        spread=spread,
        transferred=transferred,
        rates_range=good,
        sensitivity=sensitivity,
        worst=worst,
        diverged=float(np.mean(~np.isfinite(losses[place[0]]))),
        clip_rate=float(np.mean(np.asarray(runs["clip_rate"], float)[place])),
        steps_lost=float(lost.mean()) if lost.size else None,
        cost=cost,
    )


def rates_range(rates: Any, losses: np.ndarray) -> float:
    """The largest over the smallest learning rate around the best that are as good as it.

    Args:
        rates: The learning rates, from the smallest on.
        losses: The loss of each.

    Returns:
        1 where only the best is; 0 where all diverged.
    """
    place = int(np.argmin(losses))
    if not math.isfinite(losses[place]):
        return 0.0
    good = losses <= NEAR * losses[place]
    low = high = place
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and good[high + 1]:
        high += 1
    return float(rates[high] / rates[low])


def _at_edge(place: int, values: Any) -> bool:
    return len(values) > 1 and place in (0, len(values) - 1)


def over_seeds(values: Any) -> np.ndarray:
    """The mean over the seeds; infinite where one diverged."""
    return _infinite(values).mean(axis=-1)


def _infinite(values: Any) -> np.ndarray:
    """As JSON has them, with infinity for None."""
    array = np.asarray(values, float)
    return np.where(np.isnan(array), np.inf, array)


def _ratio(a: float, b: float) -> float:
    return a / b if math.isfinite(a) and math.isfinite(b) else math.inf
