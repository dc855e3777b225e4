"""`replay`: what every rule would have done on the norms of a recorded run."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optclip.tuning import replay_methods, statistics
from optclip.tuning.findings import SPIKE_TIMES, look_at
from optclip.tuning.records import Record, read
from optclip.tuning.replay_methods import Trace
from optclip.tuning.suggesting import Suggestion, suggest_threshold

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
        worst_spike: The largest norm that comes out, in multiples of the usual norm around it.
        spikes_through: How many of the record's spikes come out at 5 times the usual norm or more.
        steps_after_rise: How many steps after the level rose for good it goes on taking more than
            10% off most steps; infinite where that never ends, None where the level does not rise.
        steps_after_spike: The same after the spike that it takes longest to get over; None where
            there is no spike.
        final_threshold: The threshold at the last step.
        by_leaf: Whether it clips leaf by leaf; its thresholds then are the smallest of any leaf.
        thresholds: The threshold of every step; infinite where the method does not clip.
        outputs: The norm that comes out of every step; 0 where it is skipped.
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


class Replay(NamedTuple):
    """What every method would have done on a recorded run.

    Attributes:
        rows: One for each method.
        not_replayed: Why the others were not, by name.
        record: The run.
        spikes: How many spikes it has: steps at 5 times the usual norm or more, and 4 deviations
            above it.
        worst_spike: Its largest norm, in multiples of the usual norm around it.
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

    def table(self) -> Any:
        """The figures as a `rich.table.Table`.

        Raises:
            ImportError: If rich is not installed.
        """
        from optclip.tuning.replay_table import table

        return table(self)

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draws the norms and the threshold of each method; answers with the path of the PNG.

        Args:
            path: Where the picture goes; its folder has to exist.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from optclip.tuning.replay_picture import draw

        return draw(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and None (for infinite or unknown), for `json.dumps`."""
        return {
            "steps": len(self.record.norms),
            "source": self.record.source,
            "spikes": self.spikes,
            "worst_spike": _plain(self.worst_spike),
            "rise": self.rise,
            "rows": [{name: _plain(x) for name, x in row._asdict().items()} for row in self.rows],
            "not_replayed": dict(self.not_replayed),
            "suggestion": self.suggestion.to_dict(),
        }


def replay(
    source: Any,
    methods: Mapping[str, Any] | Iterable[str] | None = None,
    *,
    norm_key: str | None = None,
) -> Replay:
    """What every rule would have done on the norms of a recorded run.

    Each method runs through its real `update`, over gradients of one entry with the recorded norm
    (of one entry in each leaf, where the norms of the leaves were recorded and the method takes
    them). Norms that are not finite are fed as they are. This is open loop: had a rule clipped, the
    later norms would have been others.

    Args:
        source: What `suggest_threshold` takes, but for histograms, which know no order.
        methods: A mapping from name to transformation, which has to be a clip of optclip or have
            one in it; or names of methods, with their defaults; or None for all methods that learn
            a threshold and the fixed one that `suggest_threshold` finds.
        norm_key: The name of the norm in a log, where it is none of the usual ones.

    Returns:
        A `Replay`: `rows` with the figures, `table()`, `draw(path)`, `to_dict()`, and
        `not_replayed` with the reason for each method that takes more than norms.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With one line that says what is wrong.

    Example:
        >>> import numpy as np, optclip
        >>> norms = np.exp(0.2 * np.random.default_rng(0).normal(size=500))
        >>> norms[300] = 100.0
        >>> rules = {"fixed": optclip.clip_by_global_norm(1.5), "robust": optclip.robust_clip()}
        >>> for row in replay(norms, rules).rows:
        ...     print(row.method, row.spikes_through, row.worst_spike < 3)
        fixed 0 True
        robust 0 True
    """
    record = read(source, norm_key)
    suggestion = suggest_threshold(record)
    chosen = replay_methods.choose(methods, record, suggestion.fared.threshold)
    found = look_at(record)
    rise = _rise(record.norms)
    height = statistics.heights(record.norms, found.height)
    rows = []
    for name, (transform, by_leaf) in chosen.methods.items():
        leaf_norms = record.leaf_norms if by_leaf else {}
        trace = replay_methods.drive(transform, record.norms, leaf_norms)
        rows.append(_row(name, trace, record.norms, height, found.spikes, rise, by_leaf))
    return Replay(
        rows=tuple(rows),
        not_replayed=chosen.not_replayed,
        record=record,
        spikes=int(found.spikes.sum()),
        worst_spike=_largest(height),
        rise=None if rise is None else float(record.steps[rise]),
        suggestion=suggestion,
    )


def _row(
    name: str,
    trace: Trace,
    norms: np.ndarray,
    height: np.ndarray,
    spikes: np.ndarray,
    rise: int | None,
    by_leaf: bool,
) -> Row:
    finite = np.isfinite(norms)
    with np.errstate(all="ignore"):
        kept = np.where(norms > 0, trace.outputs / norms, 1.0)
    out = height * kept
    last = slice(len(norms) - max(1, len(norms) // 4), None)
    known = finite & (norms > 0)
    cut = kept[known] < CUT
    place = np.cumsum(known) - 1  # of a step among those that say something
    after_rise = None if rise is None else _until_let_through(cut[place[rise] :])
    ends = np.flatnonzero(spikes & ~np.append(spikes[1:], False) & known)
    waits = [_until_let_through(cut[place[end] + 1 :]) for end in ends]
    return Row(
        method=name,
        clipped=_share(trace.clipped, finite),
        clipped_last_quarter=_share(trace.clipped[last], finite[last]),
        worst_spike=_largest(np.where(finite, out, np.nan)),
        spikes_through=int((spikes & finite & (out >= SPIKE_TIMES)).sum()),
        steps_after_rise=after_rise,
        steps_after_spike=max(waits, default=None),
        final_threshold=float(trace.thresholds[-1]),
        by_leaf=by_leaf,
        thresholds=trace.thresholds,
        outputs=trace.outputs,
    )


def _share(clipped: np.ndarray, finite: np.ndarray) -> float:
    return float(clipped[finite].mean()) if finite.any() else 0.0


def _largest(height: np.ndarray) -> float:
    known = height[np.isfinite(height)]
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


def _rise(norms: np.ndarray) -> int | None:
    """The step at which the level rises for good, by the most; None where it does not."""
    places = np.flatnonzero(statistics.ordinary(norms))
    values = norms[places]
    width = min(WINDOW, len(values) // 4)
    if width < 8:
        return None
    medians = statistics.moving_median(values, width)
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
    lasting = statistics.moving_median(values[at:], width).min() > middle
    return int(places[at]) if lasting else None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(float(x)) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
