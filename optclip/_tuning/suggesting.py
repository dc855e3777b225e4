"""`suggest_threshold`: from the norms of a run to a threshold, with its reasons and its doubts."""

import math
from typing import Any, NamedTuple

import numpy as np

from optclip._tuning import statistics, suggestion_text
from optclip._tuning.findings import SPIKE_DEVIATIONS, SPIKE_TIMES, look_at
from optclip._tuning.plain import plain
from optclip._tuning.records import Record, read
from optclip._tuning.states import HistogramCounts, counts_in
from optclip._tuning.statistics import NormStatistics, Sample
from optclip._tuning.suggestion_text import Backtest
from optclip._tuning.wording import LogError

DEVIATIONS = 2.0
"""How many deviations of the log norm the threshold lies above the level."""

MOST_DRIFT = 4.0
"""The factor by which the level may move for a fixed threshold to fit,"""

MOST_DEVIATIONS = 2.0
"""unless the norms are so noisy that it is no more than so many of their deviations."""

DIVERGED = 0.05
"""A run whose last norms are not finite has diverged: this share of them, and three at least."""


_IN_JSON = {
    "clip_rate": "clip_rate_expected",
    "clip_rate_interval": "clip_rate_expected_interval",
}


class Suggestion(NamedTuple):
    """A threshold, or the method that fits better, and why. `print` it to read it.

    Attributes:
        threshold: The largest norm to let through; None where a fixed one does not fit.
        interval: Between which thresholds it would lie for other runs like this one (95%).
        percentile: The percentile of the settled norms that the threshold is.
        clip_rate: Share of steps that it is expected to clip: that of the settled norms above it.
        clip_rate_interval: The binomial interval of that share (95%).
        method: What to paste: "optclip.clip_by_global_norm(0.84)" or "optclip.robust_clip()".
        reason: Why, in a sentence.
        uncertainty: How unsure the answer is, in a sentence; None where that is not worth a word.
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
        notes: What else a reader should know of the record.
    """

    threshold: float | None
    interval: tuple[float, float] | None
    percentile: float | None
    clip_rate: float | None
    clip_rate_interval: tuple[float, float] | None
    method: str
    reason: str
    uncertainty: str | None
    backtest: Backtest
    level: float
    drift: float | None
    noise: float
    steps: int
    spikes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and None, for `json.dumps`.

        The two clip rates are called by what tells them apart: "clip_rate_expected" (after the
        start-up) and, under "backtest", "clip_rate_over_the_run".
        """
        values = {_IN_JSON.get(name, name): value for name, value in self._asdict().items()}
        values["backtest"] = {
            "clip_rate_over_the_run" if name == "clip_rate" else name: value
            for name, value in self.backtest._asdict().items()
        }
        return plain(values)

    def __str__(self) -> str:
        backtest = "" if self.threshold is None else suggestion_text.describe(self.backtest)
        notes = (suggestion_text.sentence(note) for note in self.notes)
        use = f"Use {self.method}."
        if self.steps < statistics.FEWEST:  # nobody may miss it
            doubt = self.uncertainty or f"{suggestion_text.too_few(self.steps)}."
            parts = (doubt, f"Until then {use[:1].lower()}{use[1:]}", self.reason, backtest, *notes)
        else:
            parts = (use, self.reason, backtest, self.uncertainty, *notes)
        return " ".join(part for part in parts if part)


def suggest_threshold(source: Any, *, norm_key: str | None = None) -> Suggestion:
    r"""A threshold for gradient clipping from the norms of a run, with its reasons.

    .. math:: c = m \, e^{2 s}, \quad m = q_{75}(m_p), \quad m_p = \mathrm{median}(n_p), \quad
        s = q_{75}(\log n_p - \log m_p) / 0.6745

    over the norms n_p of eight parts p of the run, after its first tenth. That is two deviations of
    the log norm above what is typical in three quarters of the run, as in `robust_clip`: it clips
    about one ordinary step in 40, which costs nothing, and holds every spike to about the usual
    norm. Medians and quartiles, because spikes do not move them.

    Where the level of the norms (the median of a part) moves by more than a factor of 4, and by
    more than two deviations of the noise, no fixed threshold fits: it would clip most steps at one
    time, or let spikes through at another. The answer then is `optclip.robust_clip()`, which
    follows the level. Of a run that diverged before its level could be told it is
    `optclip.safeguard(optimizer)`, which also bounds the step.

    Measured (`python -m benchmarks.suggested_thresholds`, momentum, five learning rates): at its
    best learning rate the suggestion reaches the loss of the best of 85 pairs of learning rate and
    threshold, within the noise of eight fresh seeds (held-out loss of a byte transformer 2.598
    against 2.591, of a convolutional network on digits 0.253 against 0.288). Known weakness: at
    learning rates that are too large the norms are those of a run that goes wrong, and so is the
    threshold (digits at 30 times the best: 1.3 against 0.33 for the best threshold there).

    Args:
        source: A recorded run: the path of a file with one JSON object in each line, rows (a list
            of dicts) or columns (a dict of arrays) with the names of `optclip.metrics`, the norms
            themselves, or a `Record`. Or an `optclip.histograms.NormHistogram`, or any optimizer
            state with one in it (`optclip.measure_norms(histogram=True)`), which knows no order in
            time, and so no drift. Either way the norm has to be the 2-norm of the whole gradient,
            as `optclip.measure_norms()` logs it: neither a log nor a histogram tells which norm it
            is of, and the norms of `clip_by_value` (the largest entry), of `clip_by_block_rms` or
            of another `ord` give a threshold that does not fit `clip_by_global_norm`.
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
        >>> 1.4 < suggestion.threshold < 1.6, suggestion.spikes
        (True, 1)

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
        2012, arXiv:1211.5063, take half to ten times the average norm over a number of updates.
    """
    counted = None if isinstance(source, Record) else counts_in(source)
    return _from_record(read(source, norm_key)) if counted is None else _from_histogram(counted)


def _from_record(record: Record) -> Suggestion:
    norms = record.norms
    if not statistics.finite_positive(norms).any():
        raise LogError(suggestion_text.nothing(norms, record.source))
    settled = statistics.after_warmup(norms)
    course = statistics.statistics_of_norms(settled, DEVIATIONS)
    found = look_at(record, marked=False)
    notes = (*record.notes, *suggestion_text.notes(record))
    spikes = int(found.spikes.sum())
    relative_norm = statistics.relative_norms(norms, found.relative_norm)
    known = np.isfinite(relative_norm)
    backtest = _backtest(
        norms, _threshold(course), relative_norm, known & found.spikes if spikes else known
    )
    diverged = _divergence(norms, found.steps)
    if diverged is not None and (course.drift is None or _moves(course)):
        reason = suggestion_text.diverged(diverged, int(found.steps[-1]))
        return _adaptive("optclip.safeguard(optimizer)", reason, course, backtest, spikes, notes)
    if _moves(course):
        reason = suggestion_text.moving(course, backtest, MOST_DRIFT)
        return _adaptive("optclip.robust_clip()", reason, course, backtest, spikes, notes)
    if diverged is not None:
        notes = (*notes, suggestion_text.last_finite(diverged, int(found.steps[-1])))
    late = len(settled) < int(statistics.finite_positive(norms).sum())
    uncertainty = suggestion_text.uncertainty(course, backtest.threshold)
    return _fixed(course, backtest, spikes, uncertainty, notes, late)


def _from_histogram(counted: HistogramCounts) -> Suggestion:
    sample = Sample(counted.norms, counted.counts)
    course = statistics.statistics_of_norms_counts(sample, DEVIATIONS)
    level, threshold = course.level, _threshold(course)
    tall = max(SPIKE_TIMES, math.exp(SPIKE_DEVIATIONS * course.spread))
    largest = float(sample.norms[-1])
    backtest = Backtest(
        threshold,
        sample.share_above(threshold),
        quarters=(),
        worst_before=largest / level,
        worst_after=min(largest, threshold) / level,
    )
    spikes = int(sample.counts[sample.norms > tall * level].sum())
    uncertainty = suggestion_text.uncertainty(course, threshold, ordered=False)
    return _fixed(course, backtest, spikes, uncertainty, counted.notes)


def _threshold(course: NormStatistics) -> float:
    return course.level * math.exp(DEVIATIONS * course.spread)


def _moves(course: NormStatistics) -> bool:
    """Whether the level moves by more than one threshold fits."""
    most = max(MOST_DRIFT, math.exp(MOST_DEVIATIONS * course.spread))
    return course.drift is not None and course.drift > most


def _divergence(norms: np.ndarray, steps: np.ndarray) -> int | None:
    """The first of the last steps, if none of them is finite; None for a run that did not diverge.

    In a log that has a norm only now and then gaps are as usual at the end as elsewhere.
    """
    finite = np.flatnonzero(np.isfinite(norms))
    end, count = int(finite[-1]) + 1, len(norms)
    usual = np.diff(finite, prepend=-1).max() - 1
    missing = count - end
    if missing < max(3, DIVERGED * count) or missing <= 2 * usual:
        return None
    return int(steps[end])


def _fixed(
    course: NormStatistics,
    backtest: Backtest,
    spikes: int,
    uncertainty: str | None,
    notes: tuple[str, ...],
    late: bool = False,
) -> Suggestion:
    threshold, share = backtest.threshold, course.sample.share_above(backtest.threshold)
    low, high = course.interval
    few = backtest.clip_rate - spikes / course.sample.size <= suggestion_text.FEW_CLIPPED
    reason = suggestion_text.fitting(course, threshold, DEVIATIONS, MOST_DRIFT, late, few)
    method = f"optclip.clip_by_global_norm({threshold:.3g})"
    return _adaptive(method, reason, course, backtest, spikes, notes)._replace(
        threshold=threshold,
        interval=(threshold * low, threshold * high),
        percentile=100 * (1 - share),
        clip_rate=share,
        clip_rate_interval=statistics.interval_of_share(share, course.sample.size),
        uncertainty=uncertainty,
    )


def _adaptive(
    method: str,
    reason: str,
    course: NormStatistics,
    backtest: Backtest,
    spikes: int,
    notes: tuple[str, ...],
) -> Suggestion:
    return Suggestion(
        threshold=None,
        interval=None,
        percentile=None,
        clip_rate=None,
        clip_rate_interval=None,
        method=method,
        reason=reason,
        uncertainty=None,
        backtest=backtest,
        level=course.level,
        drift=course.drift,
        noise=course.spread,
        steps=course.sample.size,
        spikes=spikes,
        notes=notes,
    )


def _backtest(
    norms: np.ndarray, threshold: float, relative_norm: np.ndarray, among: np.ndarray
) -> Backtest:
    """How a threshold would have done; the worst of the steps among those."""

    def share(part: np.ndarray) -> float | None:
        finite = part[np.isfinite(part)]
        return float((finite > threshold).mean()) if finite.size else None

    known = among if among.any() else np.isfinite(relative_norm)
    after = relative_norm[known] * np.minimum(1, threshold / np.maximum(norms[known], threshold))
    return Backtest(
        threshold,
        share(norms) or 0.0,
        quarters=tuple(share(part) for part in np.array_split(norms, 4)),
        worst_before=float(relative_norm[known].max()),
        worst_after=float(after.max()),
    )
