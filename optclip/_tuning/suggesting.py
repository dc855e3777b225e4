"""`suggest_threshold`: from the norms of a run to one answer, with its reasons and its doubts."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from optclip._tuning import statistics, suggestion_text
from optclip._tuning.findings import SPIKE_DEVIATIONS, SPIKE_TIMES, about_leaves, look_at
from optclip._tuning.log import Record, read_log
from optclip._tuning.plain import plain
from optclip._tuning.states import HistogramCounts, counts_in
from optclip._tuning.statistics import NormStatistics, Sample
from optclip._tuning.suggestion_text import Backtest
from optclip._tuning.wording import LogError, percent

Verdict = Literal["diverged", "too short", "clipped", "spikes", "level moves", "quiet"]
"""What a run is like, in the order in which it is asked."""

DEVIATIONS = 2.0
"""How many deviations of the log norm the threshold lies above the level."""

FEWEST = 50
"""So many norms at least, finite and above 0, are enough to tell."""

MOST_DRIFT = 4.0
"""The factor by which the level may move for a fixed threshold to fit,"""

MOST_DEVIATIONS = 2.0
"""unless the norms are so noisy that it is no more than so many of their deviations."""

DIVERGED = 0.05
"""A run whose last norms are not finite has diverged: this share of them, and three at least."""

ANSWERS: dict[Verdict, tuple[str, str | None]] = {
    "diverged": ("optclip.safeguard(optimizer)", None),
    "too short": ("optclip.measure_norms()", "optclip.safeguard(optimizer)"),
    "clipped": ("optclip.measure_norms()", "optclip.safeguard(optimizer)"),
    "spikes": ("optclip.safeguard(optimizer)", "{fixed}"),
    "level moves": ("optclip.safeguard(optimizer)", "{fixed}"),
    "quiet": ("{fixed}", "optclip.safeguard(optimizer)"),
}
"""What to paste, and what else would do; {fixed} is the fixed threshold, or `robust_clip`, which
follows the level, where none fits."""


class Suggestion(NamedTuple):
    """What a run's norms say about clipping it. `print` it to read it.

    Attributes:
        verdict: What the run is like: "diverged", "too short" to tell, "clipped" most of the time,
            with "spikes", its "level moves", or "quiet", so that no clip is needed.
        method: What to paste: "optclip.safeguard(optimizer)", "optclip.clip_by_global_norm(0.84)"
            as a guard that costs nothing, or "optclip.measure_norms()" where another run has to be
            recorded.
        alternative: What else would do: "optclip.robust_clip()"; None if nothing.
        threshold: The fixed threshold that fits the run; None where none does.
        interval: Between which thresholds it would lie for other runs like this one (95%); None
            without a threshold, and of a histogram.
        clip_rate: Share of steps that it is expected to clip: that of the settled norms above it.
        held: How sure that is: of so many test runs with this verdict (last number) `method`
            (first number) and `alternative` (second) ended within 5% of the best of a sweep in so
            many. None for a verdict that names no clip.
        reason: Why, in a sentence or two.
        uncertainty: How unsure the threshold is, in a sentence; None where not worth a word.
        backtest: How a fixed threshold would have done over the run.
        level: The typical norm: after the start-up, the median; of the medians of eight parts of
            the run the upper quartile.
        drift: The factor by which the typical norm moves over the run: the largest of these medians
            over the smallest. None where that cannot be told.
        noise: The usual deviation of the log norm above its level: 0.2 is about 20%.
        steps: How many settled norms it is read from: of the finite ones above 0 all after the
            first tenth; of a short run all.
        spikes: How many steps stand out: at least 5 times the usual norm around them, and 4
            deviations above it.
        spike_score: Share of the steps more than 6 deviations above the mean of the 128 before
            them; None where that cannot be told.
        rose_first: The leaves that rose at the worst spike, and how many times their usual norm
            they were; those that rose first in front. Empty without norms of leaves in the log.
        notes: What else a reader should know of the record.
    """

    verdict: Verdict
    method: str
    alternative: str | None
    threshold: float | None
    interval: tuple[float, float] | None
    clip_rate: float | None
    held: tuple[int, int, int] | None
    reason: str
    uncertainty: str | None
    backtest: Backtest
    level: float
    drift: float | None
    noise: float
    steps: int
    spikes: int
    spike_score: float | None
    rose_first: dict[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and None, for `json.dumps`.

        The two clip rates are called by what tells them apart: "clip_rate_expected" (after the
        start-up) and, under "backtest", "clip_rate_over_the_run".
        """
        values = self._asdict()
        values["clip_rate_expected"] = values.pop("clip_rate")
        backtest = self.backtest._asdict()
        backtest["clip_rate_over_the_run"] = backtest.pop("clip_rate")
        return plain(values | {"backtest": backtest})

    def __str__(self) -> str:
        """The whole answer: what to do, why, what else would do, and how sure that is."""
        lead, other = _WORDS[self.verdict]
        said = [f"{lead} {self.method}.", self.reason]
        if self.threshold is not None:
            fixed = (
                "It" if "global_norm" in self.method else f"A fixed threshold, {self.alternative},"
            )
            said.append(f"{fixed} {suggestion_text.would(self.backtest)}")
            said.append(self.uncertainty or "")
        elif self.alternative:
            said.append(f"{other} {self.alternative}.")
        leaves = about_leaves(self.rose_first, most=3)
        said.append(f"At the worst spike {leaves}." if leaves else "")
        if self.spikes and self.spike_score is not None:
            said.append(
                f"Spike score {percent(self.spike_score)}: the steps more than 6 deviations above "
                "the mean of the 128 before."
            )
        if self.held is not None:
            good, others, runs = self.held
            said.append(
                f"On {runs} similar test runs {_name(self.method)} was near the best in {good}"
                + (f", {_name(self.alternative)} in {others}." if self.alternative else ".")
            )
        for note in self.notes:
            said.append(f"{note[:1].upper()}{note[1:]}{'' if note.endswith('?') else '.'}")
        return "\n".join(part for part in said if part)


_WORDS: dict[Verdict, tuple[str, str]] = {
    "diverged": ("Use", ""),
    "too short": ("Too short to tell: record a longer run with", "What needs no threshold:"),
    "clipped": (
        "This log cannot tell: record a run without the clip, with",
        "What needs no threshold:",
    ),
    "spikes": ("Use", "Its clip alone:"),
    "level moves": ("Use", "Its clip alone:"),
    "quiet": ("No clip is needed; as a guard that costs nothing, use", ""),
}
"""What stands before the answer, and before what else would do."""


def _name(code: str) -> str:
    return code.removeprefix("optclip.").partition("(")[0]


def suggest_threshold(source: Any, *, norm_key: str | None = None) -> Suggestion:
    r"""Whether to clip, how, and with what threshold, from the norms of a run.

    .. math:: c = m \, e^{2 s}, \quad m = q_{75}(m_p), \quad m_p = \mathrm{median}(n_p), \quad
        s = q_{75}(\log n_p - \log m_p) / 0.6745

    over the norms n_p of eight parts p of the run, after its first tenth. That is two deviations of
    the log norm above what is typical in three quarters of the run, as in `robust_clip`: it clips
    about one ordinary step in 40, and holds every spike to about the usual norm. Medians and
    quartiles, because spikes do not move them.

    The answer is the first of these that is true of the run:

    - **diverged**: its last norms are not finite, and its level could not be told before:
      `optclip.safeguard(optimizer)`, which also bounds the step.
    - **too short**: fewer than 50 norms are finite and above 0. Record more.
    - **clipped**: more than half of its steps were clipped, or the norms were logged after a clip.
      Record a run with `optclip.measure_norms()`.
    - **spikes**: steps of 5 times the usual norm or more, and 4 deviations above it:
      `optclip.safeguard(optimizer)`, or the fixed threshold.
    - **level moves**: by more than a factor of 4, and than two deviations of the noise, so that a
      fixed threshold would clip most steps at one time, or let spikes through at another:
      `optclip.safeguard(optimizer)`, or `optclip.robust_clip()`, which follow the level.
    - **quiet**: none of these, and no clip is needed. The fixed threshold is a guard that costs
      nothing: in test runs that looked quiet it did better than none.

    How often that came within 5% of the best of a sweep is in `Suggestion.held`, measured by
    `python -m benchmarks.suggested_thresholds`. Known weakness: at learning rates that are too
    large the norms are those of a run that goes wrong, and they do not tell how long a step may be.

    Args:
        source: A recorded run: whatever `read_log` takes. Or an
            `optclip.histograms.NormHistogram`, or any optimizer state with one in it
            (`optclip.measure_norms(histogram=True)`), which knows no order in time. Either way the
            norm has to be the 2-norm of the whole gradient, as `optclip.measure_norms()` logs it:
            neither a log nor a histogram tells which norm it is of, and the norms of
            `clip_by_value` (the largest entry), of `clip_by_block_rms` or of another `ord` give a
            threshold that does not fit `clip_by_global_norm`.
        norm_key: The name of the norm in a log, where it is none of the usual ones.

    Returns:
        A `Suggestion`. Norms that are not finite, or 0, are counted in its notes and left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With one line, where there is no norm to choose from.

    Example:
        >>> import numpy as np
        >>> norms = np.exp(0.2 * np.random.default_rng(0).normal(size=1000))
        >>> norms[500] = 100.0
        >>> suggestion = suggest_threshold(norms)
        >>> suggestion.verdict, suggestion.spikes, 1.4 < suggestion.threshold < 1.6
        ('spikes', 1, True)

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
        2012, arXiv:1211.5063, take half to ten times the average norm over a number of updates.
    """
    counted = None if isinstance(source, Record) else counts_in(source)
    if counted is None:
        return _from_record(read_log(source, norm_key=norm_key))
    return _from_histogram(counted)


def _from_record(record: Record) -> Suggestion:
    norms = record.norms
    known = statistics.finite_positive(norms)
    if not known.any():
        raise LogError(suggestion_text.nothing(norms, record.source))
    found = look_at(record, marked=False)
    course = statistics.statistics_of_norms(statistics.after_warmup(norms), DEVIATIONS)
    relative_norm = statistics.relative_norms(norms, found.relative_norm)
    among = found.spikes if found.spikes.any() else np.isfinite(relative_norm)
    share = suggestion_text.clipped_share(record)
    # Without a share only norms that were logged after the clip can tell.
    clipped = suggestion_text.capped(norms[known])
    if share is not None:
        clipped = suggestion_text.clipped(share)
    diverged = _divergence(norms, found.steps)
    notes = (*record.notes, *suggestion_text.notes(record))
    if diverged is not None and not _moves(course) and course.drift is not None:
        notes = (*notes, f"the run diverged: {diverged}; the answer is that of the steps before")
        diverged = None
    return _answer(
        course,
        _backtest(norms, _threshold(course), relative_norm, among),
        count=int(known.sum()),
        moves=_moves(course),
        spikes=int(found.spikes.sum()),
        # Where a run begins wildly its own neighbors cannot tell, but the spread of the rest can.
        wild=float(np.nanmax(relative_norm)) > _least_spike(course, SPIKE_DEVIATIONS + 1),
        clipped=clipped,
        diverged=diverged,
        notes=notes,
    )._replace(spike_score=found.spike_score, rose_first=found.rose_first)


def _from_histogram(counted: HistogramCounts) -> Suggestion:
    """The same without an order: norms as wide apart as a drift would put them are one."""
    sample = Sample(counted.norms, counted.counts)
    course = statistics.statistics_of_counts(sample)
    low, high = sample.quantile(0.1), sample.quantile(0.9)
    moves = high > MOST_DRIFT * low
    usual = high if moves else course.level
    tall = _least_spike(course, SPIKE_DEVIATIONS) * usual
    threshold, largest = _threshold(course), float(sample.norms[-1])
    backtest = Backtest(
        threshold,
        sample.share_above(threshold),
        quarters=(),
        worst_before=largest / usual,
        worst_after=min(largest, threshold) / usual,
    )
    return _answer(
        course,
        backtest,
        count=sample.size,
        moves=moves,
        spikes=int(sample.counts[sample.norms > tall].sum()),
        wild=False,
        clipped=suggestion_text.clipped(counted.clip_rate),
        diverged=_divergence_of_counts(counted),
        notes=counted.notes,
    )


def _answer(
    course: NormStatistics,
    backtest: Backtest,
    *,
    count: int,
    moves: bool,
    spikes: int,
    wild: bool,
    clipped: str | None,
    diverged: str | None,
    notes: tuple[str, ...],
) -> Suggestion:
    """The one decision, for logs and histograms alike."""
    verdict: Verdict = "quiet"
    if diverged is not None:
        verdict = "diverged"
    elif count < FEWEST:
        verdict = "too short"
    elif clipped is not None:
        verdict = "clipped"
    elif spikes or wild:
        verdict = "spikes"
    elif moves:
        verdict = "level moves"
    fits = not moves and verdict in ("spikes", "quiet")
    threshold = backtest.threshold if fits else None
    fixed = f"optclip.clip_by_global_norm({threshold:.3g})" if fits else "optclip.robust_clip()"
    method, alternative = (x and x.format(fixed=fixed) for x in ANSWERS[verdict])
    assert method is not None
    interval = course.interval if fits else None
    return Suggestion(
        verdict=verdict,
        method=method,
        alternative=alternative,
        threshold=threshold,
        interval=interval and (backtest.threshold * interval[0], backtest.threshold * interval[1]),
        clip_rate=None if threshold is None else course.sample.share_above(threshold),
        held=suggestion_text.HELD.get(verdict),
        reason=(clipped if verdict == "clipped" else None)
        or suggestion_text.reason(verdict, course, backtest, count, spikes, diverged),
        uncertainty=suggestion_text.uncertainty(course, backtest.threshold) if fits else None,
        backtest=backtest,
        level=course.level,
        drift=course.drift,
        noise=course.spread,
        steps=course.sample.size,
        spikes=spikes,
        spike_score=None,
        rose_first={},
        notes=notes,
    )


def _least_spike(course: NormStatistics, deviations: float) -> float:
    """How many times the usual norm a spike is at least."""
    return max(SPIKE_TIMES, math.exp(deviations * course.spread))


def _threshold(course: NormStatistics) -> float:
    return course.level * math.exp(DEVIATIONS * course.spread)


def _moves(course: NormStatistics) -> bool:
    """Whether the level moves by more than one threshold fits."""
    most = max(MOST_DRIFT, math.exp(MOST_DEVIATIONS * course.spread))
    return course.drift is not None and course.drift > most


def _divergence_of_counts(counted: HistogramCounts) -> str | None:
    known, infinite = int(counted.counts.sum()), counted.nonfinite
    diverged = known < FEWEST and infinite > known
    return f"{infinite:,} of its {known + infinite:,} gradients not finite" if diverged else None


def _divergence(norms: np.ndarray, steps: np.ndarray) -> str | None:
    """From where on no norm is finite; None for a run that did not diverge.

    In a log that has a norm only now and then gaps are as usual at the end as elsewhere.
    """
    finite = np.flatnonzero(np.isfinite(norms))
    end, count = int(finite[-1]) + 1, len(norms)
    usual = np.diff(finite, prepend=-1).max() - 1
    missing = count - end
    if missing < max(3, DIVERGED * count) or missing <= 2 * usual:
        return None
    return f"no finite norm from step {steps[end]:,.0f} of {steps[-1]:,.0f} on"


def _backtest(
    norms: np.ndarray, threshold: float, relative_norm: np.ndarray, among: np.ndarray
) -> Backtest:
    """How a threshold would have done; the worst of the steps among those."""

    def share(part: np.ndarray) -> float | None:
        finite = part[np.isfinite(part)]
        return float((finite > threshold).mean()) if finite.size else None

    before, height = norms[among], relative_norm[among]
    after = height * np.minimum(1, threshold / np.maximum(before, threshold))
    return Backtest(
        threshold,
        share(norms) or 0.0,
        quarters=tuple(share(part) for part in np.array_split(norms, 4)),
        worst_before=float(np.nanmax(height)),
        worst_after=float(np.nanmax(after)),
    )
