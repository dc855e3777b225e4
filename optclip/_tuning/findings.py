"""What there is to see in a recorded run: spikes, clipped and skipped steps, and a sentence."""

from typing import Any, NamedTuple

import numpy as np

from optclip._tuning import statistics
from optclip._tuning.log import Record, read_log
from optclip._tuning.wording import counted, number, percent

SPIKE_TIMES = 5.0
"""A spike's norm is at least so many times the usual one,"""

SPIKE_DEVIATIONS = 4.0
"""and so many of the usual deviations above it, on a log scale."""

NEIGHBORS = 50
"""What is usual is said by so many steps before, and as many after."""

ROSE, BEFORE = 3.0, 3
"""A leaf rises with a spike where it is more than so many times its usual norm, at the spike or up
to so many steps before it."""

SCORE_DEVIATIONS, SCORE_WINDOW = 6.0, 128
"""The spike score counts norms so many deviations above the mean of so many before them: the steps
that OLMo's trainer skips (`SkipStepOptimizer` of OLMo-core)."""

_FEWEST = 5  # of them that say anything


class Findings(NamedTuple):
    """What was made out of a `Record`; arrays with one value for each logged step.

    Attributes:
        steps: Where each step is drawn: its number, or its place where the numbers do not rise.
        loss: The loss, or None.
        relative_norm: The norm over what is usual around it; NaN where that is not known.
        clipped: Whether the step was clipped.
        skipped: Whether it was skipped.
        nonfinite: Whether its gradient was not finite.
        spikes: Whether it is a spike: by the column "spike" where there is one, else by height.
        worst: The place of the spike that is the highest; None where the height of none is known.
        rose_first: At the worst spike, the leaves that rose and how many times their usual norm
            they were, those that rose first in front; empty where the log has no norms of leaves.
        spike_score: Share of the steps more than 6 deviations above the mean of the 128 before
            them; None of a run too short to tell.
        sentence: The finding, in a sentence without a full stop.
    """

    steps: np.ndarray
    loss: np.ndarray | None
    relative_norm: np.ndarray
    clipped: np.ndarray
    skipped: np.ndarray
    nonfinite: np.ndarray
    spikes: np.ndarray
    worst: int | None
    rose_first: dict[str, float]
    spike_score: float | None
    sentence: str


def finding(source: Any, *, norm_key: str | None = None) -> str:
    """What there is to see in a run, in one sentence; the title of its picture."""
    return look_at(read_log(source, norm_key=norm_key, loss_will_do=True)).sentence


def look_at(record: Record, *, marked: bool = True) -> Findings:
    """Makes out what there is to see in a run.

    Args:
        record: The run.
        marked: Whether spikes are what a column "spike" says, where there is one; else by height.
    """
    usual = usual_norm(record.norms)
    with np.errstate(all="ignore"):
        relative_norm = record.norms / usual
    spikes = _spikes(relative_norm)
    if marked and "spike" in record.columns:
        spikes = _is_true(record.columns["spike"], len(relative_norm))
    worst = _worst(spikes, relative_norm)
    findings = Findings(
        steps=places(record.steps),
        loss=record.loss,
        relative_norm=relative_norm,
        clipped=_clipped(record),
        skipped=_is_true(record.columns.get("skip/skipping"), len(relative_norm)),
        nonfinite=_nonfinite(record),
        spikes=spikes,
        worst=worst,
        rose_first={} if worst is None else _rose_first(record, worst),
        spike_score=_spike_score(record.norms),
        sentence="",
    )
    clauses = [
        _about_broken_loss(findings),
        _about_spikes(record, findings, usual),
        about_leaves(findings.rose_first),
        _about_nonfinite(record, findings),
        _about_clips(record, findings),
        _about_skips(record, findings),
        _about_last_loss(findings),
    ]
    text = "; ".join(clause for clause in clauses if clause)
    return findings._replace(sentence=text[:1].upper() + text[1:])


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
    before = np.full(count, np.nan)
    for at in range(_FEWEST, min(NEIGHBORS, count)):
        before[at] = np.median(values[:at])
    after = np.full(count, np.nan)
    for at in range(max(0, count - NEIGHBORS), count - _FEWEST):
        after[at] = np.median(values[at + 1 :])
    if count > NEIGHBORS:
        medians = statistics.moving(np.median, values, NEIGHBORS)
        before[NEIGHBORS:] = medians[:-1]
        after[: count - NEIGHBORS] = medians[1:]
    # A run's first steps have nothing before them that could say what is usual.
    return np.where(np.isnan(before), np.nan, np.fmax(before, after))


def _spikes(relative_norm: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        excess = np.log(relative_norm)
    known = np.isfinite(excess)
    spikes = np.zeros(len(relative_norm), bool)
    deviations = np.abs(excess[known])
    deviation = 1.4826 * _level(deviations)
    if known.any():  # the first few cannot tell by themselves
        of_all = 1.4826 * np.median(deviations)
        deviation[:NEIGHBORS] = np.fmax(deviation[:NEIGHBORS], of_all)
    spikes[known] = excess[known] > np.fmax(np.log(SPIKE_TIMES), SPIKE_DEVIATIONS * deviation)
    return spikes


def _worst(spikes: np.ndarray, relative_norm: np.ndarray) -> int | None:
    relative_norms = np.where(spikes & np.isfinite(relative_norm), relative_norm, -1.0)
    at = int(np.argmax(relative_norms)) if relative_norms.size else 0
    return at if relative_norms.size and relative_norms[at] > 0 else None


def _rose_first(record: Record, spike: int) -> dict[str, float]:
    """The leaves that rose at a spike: by when they did, then by how far."""
    rose = []
    for path, norms in record.leaf_norms.items():
        before = norms[max(0, spike - BEFORE - NEIGHBORS) : max(0, spike - BEFORE)]
        before = before[np.isfinite(before) & (before > 0)]
        if len(before) >= _FEWEST:
            near = norms[max(0, spike - BEFORE) : spike + 1] / np.median(before)
            risen = np.flatnonzero(near > ROSE)
            if risen.size:
                rose.append((int(risen[0]), -float(np.nanmax(near)), path))
    return {path: -height for _, height, path in sorted(rose)}


def _spike_score(norms: np.ndarray) -> float | None:
    known = norms[np.isfinite(norms)]
    if len(known) <= SCORE_WINDOW:
        return None
    mean, deviation = (statistics.moving(f, known[:-1], SCORE_WINDOW) for f in (np.mean, np.std))
    return float((known[SCORE_WINDOW:] > mean + SCORE_DEVIATIONS * deviation).mean())


def _clipped(record: Record) -> np.ndarray:
    nothing = np.zeros(len(record.norms), bool)
    factor, threshold = record.reading("factor"), record.reading("threshold")
    if record.prefix.startswith("skip"):  # its threshold is for leaving out
        return nothing
    if factor is not None:
        return (factor < 1) & np.isfinite(record.norms)
    if threshold is not None:
        return (record.norms > threshold) & np.isfinite(record.norms)
    return nothing


def _nonfinite(record: Record) -> np.ndarray:
    counted = record.reading("nonfinite_steps")
    if counted is not None and np.isfinite(counted).any():
        known = np.isfinite(counted)
        nonfinite = np.zeros(len(record.norms), bool)
        # A first row that counts several is of a log that begins late: one of them at the most.
        nonfinite[known] = np.diff(counted[known], prepend=0.0) > 0
        if counted[known][0] > 1:
            nonfinite[np.argmax(known)] = not np.isfinite(record.norms[np.argmax(known)])
        return nonfinite | (known & ~np.isfinite(record.norms))
    if not np.isfinite(record.norms).any():  # a log of other things
        return np.zeros(len(record.norms), bool)
    return _gaps(record.norms)


def _gaps(values: np.ndarray) -> np.ndarray:
    """Where a value is missing or not finite, in a column that has one nearly everywhere.

    In others it is missing because it is logged now and then; only an infinity is no gap there.
    """
    finite = np.isfinite(values)
    return ~finite if _is_dense(values) else np.isinf(values)


def _is_dense(values: np.ndarray) -> bool:
    """Whether a column has a value in most places, up to where it has its last one."""
    finite = np.isfinite(values)[: _end_of_finite(values)]
    return not finite.size or bool(finite.mean() >= 0.5)


def _end_of_finite(values: np.ndarray) -> int:
    """One more than the index of the last finite value; 0 where there is none."""
    return int(np.flatnonzero(np.isfinite(values)).max(initial=-1)) + 1


def _is_true(column: np.ndarray | None, count: int) -> np.ndarray:
    return np.zeros(count, bool) if column is None else np.nan_to_num(column) != 0


def places(steps: np.ndarray) -> np.ndarray:
    """Where each step is drawn: its number, or its place where the numbers do not rise."""
    return steps if (np.diff(steps) > 0).all() else np.arange(1.0, len(steps) + 1)


# Saying ------------------------------------------------------------------------------------------


def _about_broken_loss(findings: Findings) -> str:
    if findings.loss is None:
        return ""
    end, count = _end_of_finite(findings.loss), len(findings.loss)
    at = np.flatnonzero(np.isfinite(findings.loss))
    if count - end < np.diff(at, prepend=-1).max(initial=1):  # as often left out before
        return ""
    return f"no finite loss from step {findings.steps[end]:,.0f} of {findings.steps[-1]:,.0f}"


def _about_spikes(record: Record, findings: Findings, usual: np.ndarray) -> str:
    count = int(findings.spikes.sum())
    if not count:
        return ""
    said = counted(count, "spike")
    at = findings.worst
    if at is None:
        return said
    largest = "the largest " if count > 1 else ""
    said += f", {largest}{_times(findings.relative_norm[at])} the usual norm"
    let_through = record.reading("clipped_norm")
    if findings.skipped[at]:
        said += ", skipped"
    elif findings.clipped[at] and let_through is not None:
        said += f", clipped to {_times(let_through[at] / usual[at])}"
    return said


def about_leaves(rose_first: dict[str, float], most: int = 1) -> str:
    """Which leaves rose first at the worst spike."""
    named = [f"{path} ({_times(height)} its usual norm)" for path, height in rose_first.items()]
    return f"{', then '.join(named[:most])} rose first" if named else ""


def _about_nonfinite(record: Record, findings: Findings) -> str:
    count = int(findings.nonfinite.sum())
    if not count or not np.isfinite(record.norms).any():
        return ""
    if record.reading("nonfinite_steps") is None:
        return f"no finite norm at {counted(count, 'step')}"
    return counted(count, "gradient") + " not finite"


def _about_clips(record: Record, findings: Findings) -> str:
    rate = _last_finite(record.reading("clip_rate"))
    finite = np.isfinite(record.norms)
    count = int(finite.sum())
    if not count and record.has_norms:
        return f"none of the {len(finite):,} norms is finite"
    if not count:
        return f"no norms in the log of {counted(len(finite), 'step')}"
    steps = counted(count, "step" if finite.all() else "finite step")
    share = findings.clipped.sum() / count
    thresholds = record.reading("threshold")
    has_threshold = thresholds is not None and np.isfinite(thresholds).any()
    if not has_threshold and not share and not rate:
        return _about_norms(record.norms[finite])
    if record.prefix.startswith("skip"):
        return ""
    if rate is not None and abs(share - rate) >= 0.005:
        return f"clip rate {percent(rate)} since the start"
    if not share:
        return f"none of {steps} clipped"
    if share < 0.01:
        return f"{int(findings.clipped.sum())} of {steps} clipped"
    return f"{percent(share)} of {steps} clipped"


def _about_norms(norms: np.ndarray) -> str:
    if len(norms) == 1:
        return f"norm {norms[0]:.3g} at the one step"
    if not norms.any():
        return "norm 0 at every step"
    low, high = np.percentile(norms, [5, 95])
    return f"norm from {low:.2g} to {high:.2g} in nine of ten steps"


def _about_skips(record: Record, findings: Findings) -> str:
    total = record.columns.get("skip/skipped_steps")
    count = findings.skipped.sum() if total is None else (_last_finite(total) or 0)
    if count:
        return counted(int(count), "step") + " skipped"
    steps = counted(len(findings.steps), "step")
    return f"none of {steps} skipped" if record.prefix.startswith("skip") else ""


def _about_last_loss(findings: Findings) -> str:
    if findings.loss is None:
        return ""
    last = findings.loss[-max(1, len(findings.loss) // 20) :]
    last = last[np.isfinite(last)]
    if not last.size:
        return ""
    mean = float(last.mean())
    return f"loss {number(mean) if abs(mean) >= 1 else f'{mean:.2g}'} at the end"


def _last_finite(column: np.ndarray | None) -> float | None:
    finite = np.array([]) if column is None else column[np.isfinite(column)]
    return float(finite[-1]) if finite.size else None


def _times(ratio: float) -> str:
    return f"{ratio:,.{1 if ratio < 10 else 0}f} times"
