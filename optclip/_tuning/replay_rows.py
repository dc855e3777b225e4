"""The figures of a replay: how much a rule clips, what it lets through, how soon it recovers."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from optclip._tuning import statistics
from optclip._tuning.findings import SPIKE_TIMES
from optclip._tuning.log import Record
from optclip._tuning.replay_methods import Trace
from optclip._tuning.suggesting import Suggestion

RISE = 2.5
"""A lasting rise is one by this factor at least,"""

WINDOW = 64
"""from the median of so many norms before it to that of as many after it."""

SOON, CUT = 20, 0.9
"""Recovered: of so many steps from then on, most keep this share of their norm or more."""

OPEN_LOOP = (
    "Open loop: the rules see the norms as they were recorded; had a rule clipped, later norms "
    "would have been others."
)


class Row(NamedTuple):
    """What one method would have done.

    Attributes:
        method: Its name.
        clipped: Share of the finite steps that it clips (or skips).
        clipped_last_quarter: The same in the last quarter of the run.
        worst_spike: The largest norm that comes out of one of the record's spikes, in multiples of
            the usual norm around it; NaN where there is none.
        spikes_through: How many of the record's spikes come out at 5 times the usual norm or more.
        steps_after_rise: How many steps after the level rose for good it goes on taking more than
            10% off most steps; infinite where that never ends, None where the level does not rise.
        steps_after_spike: The same after the spike that it takes longest to get over; None where
            there is no spike, or it takes 10% off most steps before it too.
        final_threshold: The threshold at the last step.
        by_leaf: Whether it clips leaf by leaf; its thresholds then are the smallest of any leaf.
        thresholds: The threshold of every step; infinite where the method does not clip.
        outputs: The norm that comes out of every step; 0 where it is skipped.

    All waits are in steps of the run, also where only some of its steps were logged.
    """

    method: str
    clipped: float
    clipped_last_quarter: float
    worst_spike: float
    spikes_through: int
    steps_after_rise: float | None
    steps_after_spike: float | None
    final_threshold: float
    by_leaf: bool
    thresholds: np.ndarray
    outputs: np.ndarray


class Replayed(NamedTuple):
    """What every method would have done on a recorded run.

    Attributes:
        rows: One for each method.
        not_replayed: Why the others were not, by name.
        record: The run.
        spikes: How many spikes it has: steps at 5 times the usual norm or more, and 4 deviations
            above it.
        worst_spike: The norm of the highest of them, in multiples of the usual norm around it; NaN
            where there is none.
        rise: The step at which the level rises for good; None where it does not.
        suggestion: What `suggest_threshold` says of the run.
    """

    rows: tuple[Row, ...]
    not_replayed: Mapping[str, str]
    record: Record
    spikes: int
    worst_spike: float
    rise: float | None
    suggestion: Suggestion


def row_of(
    name: str,
    trace: Trace,
    norms: np.ndarray,
    relative_norm: np.ndarray,
    spikes: np.ndarray,
    rise: int | None,
    by_leaf: bool,
) -> Row:
    """The figures of one method.

    Args:
        name: Of the method.
        trace: What it did.
        norms: The recorded norms.
        relative_norm: The same in multiples of the usual ones.
        spikes: Which steps are spikes.
        rise: The place of the step at which the level rises for good; None for none.
        by_leaf: Whether it clips leaf by leaf.
    """
    finite = np.isfinite(norms)
    with np.errstate(all="ignore"):
        kept = np.where(norms > 0, trace.outputs / norms, 1.0)
        out = relative_norm * kept  # NaN for an infinity that was skipped
    last = slice(len(norms) - max(1, len(norms) // 4), None)
    known = finite & (norms > 0)
    cut = kept[known] < CUT
    place = np.cumsum(known) - 1  # of a step among those that say something
    after_rise = None if rise is None else _until_let_through(cut[place[rise] :])
    there = spikes[known]
    begins = np.flatnonzero(there & ~np.insert(there[:-1], 0, False))
    ends = np.flatnonzero(there & ~np.append(there[1:], False))
    waits = [
        _until_let_through(cut[end + 1 :])
        for begin, end in zip(begins, ends, strict=True)
        if not begin or cut[max(0, begin - SOON) : begin].mean() <= 0.5  # else it always clips
    ]
    return Row(
        method=name,
        clipped=_share(trace.clipped, finite),
        clipped_last_quarter=_share(trace.clipped[last], finite[last]),
        worst_spike=_largest(out[spikes & finite]),
        spikes_through=int((spikes & finite & (out >= SPIKE_TIMES)).sum()),
        steps_after_rise=after_rise,
        steps_after_spike=max(waits, default=None),
        final_threshold=float(trace.thresholds[-1]),
        by_leaf=by_leaf,
        thresholds=trace.thresholds,
        outputs=trace.outputs,
    )


def in_steps(row: Row, every: float) -> Row:
    """The row with its waits in steps of the run, of which every so many were logged."""
    rise, spike = row.steps_after_rise, row.steps_after_spike
    return row._replace(
        steps_after_rise=None if rise is None else rise * every,
        steps_after_spike=None if spike is None else spike * every,
    )


def _share(clipped: np.ndarray, finite: np.ndarray) -> float:
    return float(clipped[finite].mean()) if finite.any() else 0.0


def _largest(relative_norm: np.ndarray) -> float:
    """The largest that is known; NaN where none is."""
    known = relative_norm[np.isfinite(relative_norm)]
    return float(known.max()) if known.size else math.nan


def _until_let_through(cut: np.ndarray) -> float:
    """Steps until most of the next ones are let through nearly whole."""
    if not len(cut):
        return 0.0
    total = np.cumsum(np.concatenate([[0], cut]))
    ends = np.minimum(np.arange(len(cut)) + SOON, len(cut))
    share = (total[ends] - total[:-1]) / (ends - np.arange(len(cut)))
    let_through = np.flatnonzero(share <= 0.5)
    return float(let_through[0]) if let_through.size else math.inf


def rise_of(norms: np.ndarray) -> int | None:
    """The step at which the level rises for good, by the most; None where it does not."""
    places = np.flatnonzero(statistics.finite_positive(norms))
    values = norms[places]
    width = min(WINDOW, len(values) // 4)
    if width < 8:
        return None
    medians = statistics.moving(np.median, values, width)
    before, after = medians[: len(values) - 2 * width + 1], medians[width:]
    ratio = after / before
    best = int(np.argmax(ratio))
    if ratio[best] < RISE:
        return None
    # The medians do not tell where between them it was: there is the most below one side and
    # above on the other.
    middle = math.sqrt(before[best] * after[best])
    above = values > middle
    nearby = range(max(width, best), min(best + 2 * width, len(values) - width) + 1)
    sides = [above[at : at + width].sum() - above[at - width : at].sum() for at in nearby]
    at = nearby[int(np.argmax(sides))]
    lasting = statistics.moving(np.median, values[at:], width).min() > middle
    return int(places[at]) if lasting else None
