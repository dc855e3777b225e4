"""`replay`: what every rule would have done on the norms of a recorded run."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from optclip._tuning import replay_methods, statistics
from optclip._tuning.findings import SPIKE_TIMES, Findings, look_at
from optclip._tuning.log import Record, read_log
from optclip._tuning.replay_result import Replay, Row
from optclip._tuning.states import counts_in
from optclip._tuning.suggesting import suggest_threshold
from optclip._tuning.wording import LogError

# A lasting rise is one by this factor at least, from the median of so many norms before it to that
# of as many after it.
RISE, WINDOW = 2.5, 64

# Recovered: of so many steps from then on, most keep this share of their norm or more.
SOON, CUT = 20, 0.9


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
        source: What `read_log` takes. A histogram knows no order, and cannot be replayed.
        methods: A mapping from name to transformation, which has to be a clip of optclip or have
            one in it; or names of methods, with their defaults; or None for all methods that learn
            a threshold, the wrappers among them, and the fixed one that `suggest_threshold` finds.
            Of `safeguard` it is the clip before the optimizer that is replayed: when its bound acts
            norms cannot tell.
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
    if not isinstance(source, Record) and counts_in(source) is not None:
        raise LogError(
            "a histogram does not know the order of the norms, which a replay needs; log "
            "optclip.metrics(opt_state) at every step"
        )
    record = read_log(source, norm_key=norm_key)
    replay_methods.need_replayable(record)
    suggestion = suggest_threshold(record)
    asked, not_replayed = replay_methods.choose(methods, record, suggestion.backtest.threshold)
    found = look_at(record, marked=False)
    found = found._replace(
        relative_norm=statistics.relative_norms(record.norms, found.relative_norm)
    )
    rise = _rise(record.norms)
    return Replay(
        tuple(_row(name, *method, record, found, rise) for name, method in asked.items()),
        not_replayed,
        record,
        spikes=int(found.spikes.sum()),
        worst_spike=math.nan if found.worst is None else float(found.relative_norm[found.worst]),
        rise=None if rise is None else float(found.steps[rise]),
        suggestion=suggestion,
    )


def _row(
    name: str, transform: Any, by_leaf: bool, record: Record, found: Findings, rise: int | None
) -> Row:
    """What a method does with the norms; the rise is the place of its step."""
    norms, finite = record.norms, np.isfinite(record.norms)
    leaf_norms = record.leaf_norms if by_leaf else {}
    thresholds, outputs, clipped = replay_methods.drive(transform, norms, leaf_norms)
    with np.errstate(all="ignore"):
        kept = np.where(norms > 0, outputs / norms, 1.0)
        out = found.relative_norm * kept  # NaN for an infinity that was skipped
    spikes = found.spikes & finite
    known = statistics.finite_positive(norms)
    cut = kept[known] < CUT

    def wait(begin: int) -> float:
        return record.every * _until_let_through(cut[begin:])

    edges = np.diff(found.spikes[known], prepend=False, append=False).nonzero()[0]
    waits = [
        wait(end)
        for begin, end in edges.reshape(-1, 2)
        if not begin or cut[max(0, begin - SOON) : begin].mean() <= 0.5  # else it always clips
    ]
    last = slice(len(norms) - max(1, len(norms) // 4), None)
    return Row(
        method=name,
        clipped=_share(clipped, finite),
        clipped_last_quarter=_share(clipped[last], finite[last]),
        worst_spike=float(max(out[spikes & np.isfinite(out)], default=math.nan)),
        spikes_through=int((out[spikes] >= SPIKE_TIMES).sum()),
        steps_after_rise=None if rise is None else wait(int(known[:rise].sum())),
        steps_after_spike=max(waits, default=None),
        final_threshold=float(thresholds[-1]),
        by_leaf=by_leaf,
        thresholds=thresholds,
        outputs=outputs,
    )


def _share(clipped: np.ndarray, finite: np.ndarray) -> float:
    return float(clipped[finite].mean()) if finite.any() else 0.0


def _until_let_through(cut: np.ndarray) -> float:
    """Steps until most of the next ones are let through nearly whole."""
    if not len(cut):
        return 0.0
    of_the_next = np.convolve(cut[::-1], np.ones(SOON))[: len(cut)][::-1]
    how_many = np.minimum(SOON, np.arange(len(cut), 0, -1))
    let_through = np.flatnonzero(of_the_next <= 0.5 * how_many)
    return float(let_through[0]) if let_through.size else math.inf


def _rise(norms: np.ndarray) -> int | None:
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
