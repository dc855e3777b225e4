"""What `suggest_threshold` says of a run, in sentences."""

from typing import NamedTuple

import numpy as np

from optclip._tuning.log import Record
from optclip._tuning.statistics import NormStatistics
from optclip._tuning.wording import counted, number, percent

HELD: dict[str, tuple[int, int, int]] = {
    "diverged": (7, 0, 7),
    "spikes": (11, 2, 14),
    "level moves": (3, 2, 4),
    "quiet": (7, 6, 7),
}
"""Of how many runs of `benchmarks.suggested_thresholds` with a verdict (last number) the answer,
and what else is named, ended within 5% of the best of the sweep in so many."""

CLIPPED, MOST_CLIPPED = 0.1, 0.5
"""A run of which a larger share of the steps was clipped is noted as clipped; from the second on it
shows the clip, and not its norms."""


SAME, AT_THE_TOP = 1e-4, 0.2
"""Norms that are equal to so much of them are one number; where a larger share of them is the
largest, they were logged after a clip."""


class Backtest(NamedTuple):
    """How a fixed threshold would have done on the recorded norms, had they stayed the same.

    Attributes:
        threshold: The threshold: the one suggested, or what it would be where none fits.
        clip_rate: Share of the finite steps that it would have clipped, over the whole run.
        quarters: The same for each quarter of the run, None where it has no finite step; () where
            the order of the norms is not known.
        worst_before: The norm of the worst spike (of no spike: the largest norm), in multiples of
            the usual norm around it.
        worst_after: The same after the clip.
    """

    threshold: float
    clip_rate: float
    quarters: tuple[float | None, ...]
    worst_before: float
    worst_after: float


def reason(
    verdict: str,
    course: NormStatistics,
    backtest: Backtest,
    count: int,
    spikes: int,
    diverged: str | None,
) -> str:
    """Why this is the answer; the arguments are what it was decided from."""
    if diverged is not None:
        return (
            f"The run diverged ({diverged}) before a typical norm could be told; safeguard holds "
            "spikes and bounds each update relative to the parameters. A smaller learning rate may "
            "be all that is missing."
        )
    if verdict == "too short":
        return f"It has {counted(count, 'norm')} to go by; a hundred or more are enough."
    if verdict == "spikes":
        worst = f"{number(backtest.worst_before)} times the usual"
        wild = f"No step stands out as a spike, but the norms vary up to {worst} ones around them"
        what = f"{counted(spikes, 'spike')}, the worst {worst} norm" if spikes else wild
        return (
            f"{what}: safeguard cuts them to about the usual norm by a threshold that it learns, "
            "and limits each step relative to the parameters."
        )
    if verdict == "level moves":
        return _moving(course, backtest)
    return (
        f"No norm stands out (the largest is {number(backtest.worst_before)} times the usual one) "
        + (
            f"and the typical norm of {number(course.level)} moves by no more than a factor of "
            f"{number(course.drift)}."
            if course.drift
            else f"from the typical norm of {number(course.level)}."
        )
    )


def _moving(course: NormStatistics, backtest: Backtest) -> str:
    if course.drift is None:
        low, high = course.sample.quantile(0.1), course.sample.quantile(0.9)
        return (
            f"A tenth of the norms are below {number(low)} and a tenth above {number(high)}, so "
            "that a fixed threshold cannot fit all; safeguard learns one. Whether that is "
            "noise or a level that moves a histogram cannot tell."
        )
    change = course.levels[-1] / course.levels[0]
    how = "rises" if change > 2 else "falls" if change < 0.5 else "moves"
    at_most, at_least = course.levels.max(), course.levels.min()
    low, high = (number(backtest.threshold / level) for level in (at_most, at_least))
    return (
        f"No step is a spike, so that a clip is only a guard. But the typical norm {how} by a "
        f"factor of {number(course.drift)} over the run: a threshold of "
        f"{number(backtest.threshold)} would be {low} times the usual norm at one time and {high} "
        "times at another. safeguard learns one that follows it."
    )


def clipped_share(record: Record) -> float | None:
    """The share of steps that were clipped; None where the log does not tell."""
    factor = record.reading("factor")
    known = np.zeros(0) if factor is None else factor[np.isfinite(factor)]
    return float((known < 1).mean()) if known.size else None


def clipped(share: float) -> str | None:
    """Why a run of which such a share was clipped cannot tell; None for one that can."""
    if share <= MOST_CLIPPED:
        return None
    return (
        f"{percent(share)} of its steps were clipped, so its norms are those of a run whose step "
        "is as long as the clip lets it be: a smaller learning rate in disguise. If it trains "
        "well, nothing is wrong; if it is slow, raise the threshold."
    )


def capped(norms: np.ndarray) -> str | None:
    """The same of norms that are mostly one number, the largest."""
    share = float((norms >= (1 - SAME) * norms.max()).mean())
    if share <= AT_THE_TOP:
        return None
    return (
        f"{percent(share)} of its norms are one number, the largest, {number(norms.max())}: they "
        "were logged after a clip. Log those before it."
    )


def would(backtest: Backtest) -> str:
    """What a fixed threshold would have done."""
    said = f"would have clipped {percent(backtest.clip_rate)} of the steps"
    shares = [share for share in backtest.quarters if share is not None]
    if shares and max(shares) > 0.05 and max(shares) > 0.5 * sum(shares):
        place = ("first", "second", "third", "last")[backtest.quarters.index(max(shares))]
        said += f", most of them in the {place} quarter of the run,"
    before, after = number(backtest.worst_before), number(backtest.worst_after)
    return f"{said} and left the worst at {after} times the usual norm instead of {before}."


def uncertainty(course: NormStatistics, threshold: float) -> str | None:
    """How unsure the threshold is; None where that is not worth a word."""
    if course.interval is None:
        return None
    low, high = (threshold * factor for factor in course.interval)
    if high <= 1.1 * low:
        return None
    steps = counted(course.sample.size, "step")
    return f"From {steps} it is known to lie between {number(low)} and {number(high)}."


def notes(record: Record) -> list[str]:
    """What else a reader should know of a record."""
    norms, count = record.norms, len(record.norms)
    infinite, zero = int((~np.isfinite(norms)).sum()), int((norms == 0).sum())
    said = []
    if infinite:
        said.append(f"{infinite:,} of {count:,} norms not finite, and left out")
    if zero:
        said.append(f"{zero:,} of {count:,} norms 0, and left out")
    share = clipped_share(record)
    if share is not None and CLIPPED < share <= MOST_CLIPPED:
        said.append(f"{percent(share)} of the steps were clipped; without that norms would differ")
    if _learned_nothing(record):
        said.append(
            "the loss did not fall over the run; if it should have, the run is going wrong: take a "
            "smaller learning rate, or safeguard"
        )
    return said


def _learned_nothing(record: Record) -> bool:
    """Whether the loss of the last tenth is not below that of the first by two standard errors."""
    known = np.zeros(0) if record.loss is None else record.loss[np.isfinite(record.loss)]
    tenth = len(known) // 10
    if tenth < 3:
        return False
    first, last = known[:tenth], known[-tenth:]
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / tenth)
    return bool(first.mean() - last.mean() <= 2 * error)


def nothing(norms: np.ndarray, source: str, what_for: str = "choose a threshold from") -> str:
    """Why there is no answer."""
    what = "above 0" if np.isfinite(norms).any() else "finite"
    return (
        f"{source}: none of {len(norms):,} norms is {what}, so there is nothing to {what_for}; "
        "record a run with gradients that are finite and not 0"
    )
