"""What `suggest_threshold` says of a run, in sentences."""

from typing import NamedTuple

import numpy as np

from optclip._tuning.records import LOSS_KEYS, Record
from optclip._tuning.statistics import FEWEST, NormStatistics
from optclip._tuning.wording import number, percent

MANY_CLIPPED = 0.1
"""Share of clipped steps from which on the notes say that the run was clipped."""


FEW_CLIPPED = 0.05
"""Share of clipped steps, but for spikes, up to which they are called few."""

_QUARTERS = ("first", "second", "third", "last")


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


def fitting(
    course: NormStatistics,
    threshold: float,
    deviations: float,
    most_drift: float,
    late: bool,
    few: bool,
) -> str:
    """Why this threshold.

    Args:
        course: Of the norms.
        threshold: The threshold.
        deviations: How many of the noise it lies above the typical norm.
        most_drift: Up to which one threshold fits.
        late: Whether the first tenth of the run was left out.
        few: Whether it clips few steps but spikes.
    """
    typical = number(course.level) + (" after the first tenth of the run" if late else "")
    said = (
        f"That is {threshold / course.level:.2f} times the typical norm of {typical}, "
        f"{deviations:g} deviations above it"
    )
    if few:
        said += ", so it clips spikes and few other steps"
    if course.drift is None:
        return f"{said}."
    then = "it" if late else "the typical norm"
    return (
        f"{said}; over the run {then} moves by a factor of {course.drift:.1f}, and one "
        f"threshold fits up to {most_drift:g}."
    )


def moving(course: NormStatistics, backtest: Backtest, most_drift: float) -> str:
    """Why no fixed one."""
    change = course.levels[-1] / course.levels[0]
    how = "rises" if change > 2 else "falls" if change < 0.5 else "moves"
    quarters = ", ".join("-" if x is None else percent(x) for x in backtest.quarters)
    lowest = backtest.threshold / course.levels.min()
    return (
        f"A fixed threshold does not fit: the typical norm {how} by a factor of "
        f"{number(course.drift or 1.0)} over the run (more than {most_drift:g}), so that "
        f"{number(backtest.threshold)} would have clipped {quarters} of its quarters, and let "
        f"{number(lowest)} times the typical norm through where that is smallest; robust_clip "
        "follows it."
    )


def diverged(step: int, last: int) -> str:
    """Why no threshold can be told from a run that diverged."""
    return (
        f"The run diverged (no finite norm from step {step:,} of {last:,} on) before a typical "
        "norm could be told; safeguard holds spikes and bounds each update relative to the "
        "parameters, or record a run with a smaller learning rate."
    )


def too_few(count: int) -> str:
    """What an answer from so few steps begins with."""
    return f"{_steps(count)} {'is' if count == 1 else 'are'} too few to tell"


def last_finite(step: int, last: int) -> str:
    """A note on a run that diverged after its typical norm was known."""
    return (
        f"the run diverged: no finite norm from step {step:,} of {last:,} on; the threshold is "
        "that of the steps before"
    )


def describe(backtest: Backtest) -> str:
    """How a fixed threshold would have done."""
    said = f"On this run it would have clipped {percent(backtest.clip_rate)} of the steps"
    shares = [share for share in backtest.quarters if share is not None]
    if len(shares) == len(_QUARTERS) and any(shares):
        most = max(range(len(shares)), key=shares.__getitem__)
        if backtest.clip_rate > FEW_CLIPPED and shares[most] > 0.5 * sum(shares):
            said += f", most of them in the {_QUARTERS[most]} quarter"
        said += f" ({', '.join(map(percent, shares))} by quarter)"
    if backtest.worst_after < backtest.worst_before:
        said += (
            f" and brought the worst from {number(backtest.worst_before)} to "
            f"{number(backtest.worst_after)} times the norms around it"
        )
    return f"{said}."


def uncertainty(course: NormStatistics, threshold: float, ordered: bool = True) -> str | None:
    """How unsure the threshold is; None where that is not worth a word."""
    low, high = (threshold * factor for factor in course.interval)
    count = course.sample.size
    known = f"the threshold is known to lie between {number(low)} and {number(high)}"
    if count < FEWEST:
        return f"{too_few(count)}: from them {known}; record a hundred or more."
    said = f"From {_steps(count)} {known}"
    if not ordered:
        return f"{said}; whether the typical norm drifts a histogram cannot tell."
    if course.drift is None:
        return f"{said}; to tell whether the typical norm drifts, record a hundred steps or more."
    return f"{said}." if high > 1.1 * low else None


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def sentence(note: str) -> str:
    """A note as a sentence of its own."""
    return f"{note[:1].upper()}{note[1:]}{'' if note.endswith('?') else '.'}"


def notes(record: Record) -> list[str]:
    """What else a reader should know of a record."""
    norms, count = record.norms, len(record.norms)
    infinite, zero = int((~np.isfinite(norms)).sum()), int((norms == 0).sum())
    said = []
    if infinite:
        said.append(f"{infinite:,} of {count:,} norms not finite, and left out")
    if zero:
        said.append(f"{zero:,} of {count:,} norms 0, and left out")
    factor = record.reading("factor")
    known = np.zeros(0) if factor is None else factor[np.isfinite(factor)]
    clipped = float((known < 1).mean()) if known.size else 0.0
    if clipped > MANY_CLIPPED:
        hint = "; record one with measure_norms() in place of the clip" if clipped > 0.5 else ""
        said.append(
            f"{percent(clipped)} of the steps were clipped; without that the norms would have been "
            f"others{hint}"
        )
    if _learned_nothing(record):
        said.append(
            "the loss did not fall over the run, and with it the norms would have been others; "
            "record one with a smaller learning rate"
        )
    return said


def _learned_nothing(record: Record) -> bool:
    """Whether the loss of the last tenth is above that of the first, by two standard errors."""
    loss = next((record.columns[key] for key in LOSS_KEYS if key in record.columns), np.zeros(0))
    known = loss[np.isfinite(loss)]
    tenth = len(known) // 10
    if tenth < 3:
        return False
    first, last = known[:tenth], known[-tenth:]
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / tenth)
    return bool(last.mean() - first.mean() > 2 * error)


def nothing(norms: np.ndarray, source: str, what_for: str = "choose a threshold from") -> str:
    """Why there is no answer."""
    what = "above 0" if np.isfinite(norms).any() else "finite"
    return (
        f"{source}: none of {len(norms):,} norms is {what}, so there is nothing to {what_for}; "
        "record a run with gradients that are finite and not 0"
    )
