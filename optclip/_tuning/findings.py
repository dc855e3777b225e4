"""What there is to see in a recorded run: spikes, clipped and skipped steps, and a sentence."""

from typing import Any, NamedTuple

import numpy as np

from optclip._tuning import statistics
from optclip._tuning.log import Record, read_log
from optclip._tuning.wording import counted, number, percent

# A spike's norm is at least so many times the usual one, and so many of the usual deviations above
# it, on a log scale. What is usual is said by so many steps before, and as many after.
SPIKE_TIMES, SPIKE_DEVIATIONS, NEIGHBORS = 5.0, 4.0, 50

# A leaf rises with a spike where it is more than so many times its usual norm, at the spike or up
# to so many steps before it.
ROSE, BEFORE = 3.0, 3

# The spike score counts norms so many deviations above the mean of so many before them: the steps
# that OLMo's trainer skips (`SkipStepOptimizer` of OLMo-core).
SCORE_DEVIATIONS, SCORE_WINDOW = 6.0, 128

_FEWEST = 5  # of them that say anything


class Findings(NamedTuple):
    """What was made out of a `Record`; arrays with one value for each logged step."""

    steps: np.ndarray  # where each is drawn: its number, or its place where the numbers do not rise
    loss: np.ndarray | None
    relative_norm: np.ndarray  # the norm over what is usual around it; NaN where that is not known
    clipped: np.ndarray  # whether it was clipped,
    skipped: np.ndarray  # skipped,
    nonfinite: np.ndarray  # had a gradient that was not finite,
    spikes: np.ndarray  # or is a spike
    worst: int | None  # place of the highest spike; None where the height of none is known
    rose_first: dict[str, float]  # by leaf, how many times its usual norm; at the worst spike
    spike_score: float | None  # a share of the steps; None of a run too short to tell
    sentence: str  # the finding, without a full stop


def finding(source: Any, *, norm_key: str | None = None) -> str:
    """What there is to see in a run, in one sentence; the title of its picture."""
    return look_at(read_log(source, norm_key=norm_key, loss_will_do=True)).sentence


def look_at(record: Record, *, marked: bool = True) -> Findings:
    """What there is to see in a run; a spike is what a column says, if marked, or by height."""
    norms, nowhere = record.norms, np.zeros(len(record.norms))
    usual = usual_norm(norms)
    with np.errstate(all="ignore"):
        relative_norm = norms / usual
    spikes = _spikes(relative_norm)
    if marked and "spike" in record.columns:
        spikes = np.nan_to_num(record.columns["spike"]) != 0
    heights = np.where(spikes & np.isfinite(relative_norm), relative_norm, 0.0)
    worst = int(np.argmax(heights)) if heights.max(initial=0.0) > 0 else None
    found = Findings(
        steps=places(record.steps),
        loss=record.loss,
        relative_norm=relative_norm,
        clipped=_clipped(record),
        skipped=np.nan_to_num(record.columns.get("skip/skipping", nowhere)) != 0,
        nonfinite=_nonfinite(record),
        spikes=spikes,
        worst=worst,
        rose_first={} if worst is None else _rose_first(record, worst),
        spike_score=_spike_score(norms),
        sentence="",
    )
    clauses = (
        _about_broken_loss(found),
        _about_spikes(record, found, usual),
        about_leaves(found.rose_first),
        _about_nonfinite(record, found),
        _about_clips(record, found),
        _about_skips(record, found),
        _about_last_loss(found),
    )
    text = "; ".join(filter(None, clauses))
    return found._replace(sentence=text[:1].upper() + text[1:])


# Looking -----------------------------------------------------------------------------------------


def usual_norm(norms: np.ndarray) -> np.ndarray:
    """What the norm usually is around each step: the median before it or after it.

    The larger of the two: so neither the steep start of a run nor a lasting rise is out of the
    ordinary. NaN where too few finite norms are near.
    """
    usual = np.full(len(norms), np.nan)
    known = np.isfinite(norms)
    usual[known] = _level(norms[known])
    return usual


def _level(values: np.ndarray) -> np.ndarray:
    """The larger of the medians of the neighbors before and after each value."""
    count = len(values)
    padded = np.pad(values, NEIGHBORS, constant_values=np.nan)
    medians = statistics.moving(np.median, padded, NEIGHBORS)  # NaN at both ends
    before, after = medians[:count], medians[NEIGHBORS + 1 :]
    for near in range(_FEWEST, min(NEIGHBORS, count)):
        before[near] = np.median(values[:near])
        after[-1 - near] = np.median(values[-near:])
    # A run's first steps have nothing before them that could say what is usual.
    return np.where(np.isnan(before), np.nan, np.fmax(before, after))


def _spikes(relative_norm: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        excess = np.log(relative_norm)
    known = np.isfinite(excess)
    deviations = np.abs(excess[known])
    deviation = 1.4826 * _level(deviations)
    if known.any():  # the first few cannot tell by themselves
        of_all = 1.4826 * np.median(deviations)
        deviation[:NEIGHBORS] = np.fmax(deviation[:NEIGHBORS], of_all)
    spikes = np.zeros(len(relative_norm), bool)
    spikes[known] = excess[known] > np.fmax(np.log(SPIKE_TIMES), SPIKE_DEVIATIONS * deviation)
    return spikes


def _rose_first(record: Record, spike: int) -> dict[str, float]:
    """The leaves that rose at a spike: by when they did, then by how far."""
    begin, rose = max(0, spike - BEFORE), []
    for path, norms in record.leaf_norms.items():
        before = norms[max(0, begin - NEIGHBORS) : begin]
        before = before[statistics.finite_positive(before)]
        if len(before) >= _FEWEST:
            near = norms[begin : spike + 1] / np.median(before)
            if (near > ROSE).any():
                rose.append((int(np.argmax(near > ROSE)), -float(np.nanmax(near)), path))
    return {path: -height for _, height, path in sorted(rose)}


def _spike_score(norms: np.ndarray) -> float | None:
    known = norms[np.isfinite(norms)]
    if len(known) <= SCORE_WINDOW:
        return None
    mean, deviation = (statistics.moving(f, known[:-1], SCORE_WINDOW) for f in (np.mean, np.std))
    return float((known[SCORE_WINDOW:] > mean + SCORE_DEVIATIONS * deviation).mean())


def _clipped(record: Record) -> np.ndarray:
    finite = np.isfinite(record.norms)
    factor, threshold = record.reading("factor"), record.reading("threshold")
    if record.prefix.startswith("skip") or (factor is None and threshold is None):
        return np.zeros_like(finite)  # the threshold of a skip is for leaving out
    return finite & (record.norms > threshold if factor is None else factor < 1)


def _nonfinite(record: Record) -> np.ndarray:
    finite, counts = np.isfinite(record.norms), record.reading("nonfinite_steps")
    known = np.zeros_like(finite) if counts is None else np.isfinite(counts)
    if counts is not None and known.any():
        nonfinite = known & ~finite
        # A first row that counts several is of a log that begins late: one of them at the most.
        first = counts[known][0]
        nonfinite[known] |= np.diff(counts[known], prepend=first if first > 1 else 0.0) > 0
        return nonfinite
    if not finite.any():  # a log of other things
        return finite
    # Where norms are logged now and then a missing one says nothing, and only an infinity does.
    dense = finite[: np.flatnonzero(finite)[-1] + 1].mean() >= 0.5
    return ~finite if dense else np.isinf(record.norms)


def places(steps: np.ndarray) -> np.ndarray:
    """Where each step is drawn: its number, or its place where the numbers do not rise."""
    return steps if (np.diff(steps) > 0).all() else np.arange(1.0, len(steps) + 1)


# Saying ------------------------------------------------------------------------------------------


def _about_broken_loss(found: Findings) -> str:
    if found.loss is None:
        return ""
    finite = np.flatnonzero(np.isfinite(found.loss))
    end = int(finite.max(initial=-1)) + 1
    if len(found.loss) - end < np.diff(finite, prepend=-1).max(initial=1):  # as often before
        return ""
    return f"no finite loss from step {found.steps[end]:,.0f} of {found.steps[-1]:,.0f}"


def _about_spikes(record: Record, found: Findings, usual: np.ndarray) -> str:
    count, at = int(found.spikes.sum()), found.worst
    said = counted(count, "spike") if count else ""
    if at is None:
        return said
    largest = "the largest " if count > 1 else ""
    said += f", {largest}{_times(found.relative_norm[at])} the usual norm"
    let_through = record.reading("clipped_norm")
    if found.skipped[at]:
        said += ", skipped"
    elif found.clipped[at] and let_through is not None:
        said += f", clipped to {_times(let_through[at] / usual[at])}"
    return said


def about_leaves(rose_first: dict[str, float], most: int = 1) -> str:
    """Which leaves rose first at the worst spike."""
    named = [f"{path} ({_times(height)} its usual norm)" for path, height in rose_first.items()]
    return f"{', then '.join(named[:most])} rose first" if named else ""


def _about_nonfinite(record: Record, found: Findings) -> str:
    count = int(found.nonfinite.sum())
    if not count or not np.isfinite(record.norms).any():
        return ""
    if record.reading("nonfinite_steps") is None:
        return f"no finite norm at {counted(count, 'step')}"
    return counted(count, "gradient") + " not finite"


def _about_clips(record: Record, found: Findings) -> str:
    norms = record.norms[np.isfinite(record.norms)]
    count, clipped = len(norms), int(found.clipped.sum())
    if not count and record.has_norms:
        return f"none of the {len(record.norms):,} norms is finite"
    if not count:
        return f"no norms in the log of {counted(len(record.norms), 'step')}"
    rate, threshold = _last(record.reading("clip_rate")), _last(record.reading("threshold"))
    if threshold is None and not clipped and not rate:
        return _about_norms(norms)
    if record.prefix.startswith("skip"):
        return ""
    if rate is not None and abs(clipped / count - rate) >= 0.005:
        return f"clip rate {percent(rate)} since the start"
    share = clipped / count
    steps = counted(count, "step" if count == len(record.norms) else "finite step")
    return f"{percent(share) if share >= 0.01 else clipped or 'none'} of {steps} clipped"


def _about_norms(norms: np.ndarray) -> str:
    if len(norms) == 1:
        return f"norm {norms[0]:.3g} at the one step"
    if not norms.any():
        return "norm 0 at every step"
    low, high = np.percentile(norms, [5, 95])
    return f"norm from {low:.2g} to {high:.2g} in nine of ten steps"


def _about_skips(record: Record, found: Findings) -> str:
    total = record.columns.get("skip/skipped_steps", np.cumsum(found.skipped))
    if count := int(_last(total) or 0):
        return counted(count, "step") + " skipped"
    steps = counted(len(found.steps), "step")
    return f"none of {steps} skipped" if record.prefix.startswith("skip") else ""


def _about_last_loss(found: Findings) -> str:
    if found.loss is None:
        return ""
    last = found.loss[-max(1, len(found.loss) // 20) :]
    last = last[np.isfinite(last)]
    if not last.size:
        return ""
    mean = float(last.mean())
    return f"loss {number(mean) if abs(mean) >= 1 else f'{mean:.2g}'} at the end"


def _last(column: np.ndarray | None) -> float | None:
    """The last finite value."""
    finite = [] if column is None else column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def _times(ratio: float) -> str:
    return f"{ratio:,.{1 if ratio < 10 else 0}f} times"
