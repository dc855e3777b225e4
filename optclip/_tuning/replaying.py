"""`replay`: what every rule would have done on the norms of a recorded run."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optclip._tuning import (
    replay_methods,
    replay_picture,
    replay_table,
    statistics,
)
from optclip._tuning.findings import look_at
from optclip._tuning.log import Record, read_log
from optclip._tuning.plain import plain
from optclip._tuning.replay_rows import Replayed, in_steps, rise_of, row_of
from optclip._tuning.states import counts_in
from optclip._tuning.suggesting import suggest_threshold
from optclip._tuning.wording import LogError

PLAIN_WIDTH = 100
"""Letters in a line of a replay that is printed."""


class Replay(Replayed):
    """What every method would have done on a recorded run; the fields are those of `Replayed`."""

    __slots__ = ()

    def __str__(self) -> str:
        """The table as plain text, for `print`; in short where rich is not installed."""
        try:
            return replay_table.text(self, PLAIN_WIDTH)
        except ImportError:
            return repr(self)

    def __repr__(self) -> str:
        methods = ", ".join(row.method for row in self.rows)
        return f"<Replay of {len(self.record.norms):,} steps of {self.record.source}: {methods}>"

    def table(self) -> Any:
        """The figures as a `rich.table.Table`.

        Raises:
            ImportError: If rich is not installed.
        """
        return replay_table.table(self)

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draws the norms and the threshold of each method; answers with the path of the PNG.

        Args:
            path: Where the picture goes; its folder has to exist.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return replay_picture.draw(self, Path(path))

    def to_dict(self, *, every_step: bool = False) -> dict[str, Any]:
        """Plain numbers, strings, lists and None (for infinite or unknown), for `json.dumps`.

        Args:
            every_step: Also the threshold of every step, and the norm that comes out of it.
        """
        left_out = () if every_step else ("thresholds", "outputs")
        rows = [
            {name: plain(x) for name, x in row._asdict().items() if name not in left_out}
            for row in self.rows
        ]
        return {
            "steps": len(self.record.norms),
            "source": self.record.source,
            "spikes": self.spikes,
            "worst_spike": plain(self.worst_spike),
            "rise": self.rise,
            "nonfinite_norms": int((~np.isfinite(self.record.norms)).sum()),
            "rows": rows,
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
    chosen = replay_methods.choose(methods, record, suggestion.backtest.threshold)
    found = look_at(record, marked=False)
    rise = rise_of(record.norms)
    relative_norm = statistics.relative_norms(record.norms, found.relative_norm)
    rows = []
    for name, (transform, by_leaf) in chosen.methods.items():
        leaf_norms = record.leaf_norms if by_leaf else {}
        trace = replay_methods.drive(transform, record.norms, leaf_norms)
        row = row_of(name, trace, record.norms, relative_norm, found.spikes, rise, by_leaf)
        rows.append(in_steps(row, record.every))
    return Replay(
        rows=tuple(rows),
        not_replayed=chosen.not_replayed,
        record=record,
        spikes=int(found.spikes.sum()),
        worst_spike=math.nan if found.worst is None else float(relative_norm[found.worst]),
        rise=None if rise is None else float(found.steps[rise]),
        suggestion=suggestion,
    )
