"""Choosing a threshold from a recorded run. Needs the extra: `pip install optclip[tuning]`."""

from optclip._tuning.log import Record, read_log
from optclip._tuning.plotting import plot_run
from optclip._tuning.replay_result import Replay
from optclip._tuning.replaying import replay
from optclip._tuning.suggesting import Suggestion, suggest_threshold
from optclip._tuning.sweep_result import Sweep
from optclip._tuning.sweeping import sweep

__all__ = [
    "Record",
    "Replay",
    "Suggestion",
    "Sweep",
    "plot_run",
    "read_log",
    "replay",
    "suggest_threshold",
    "sweep",
]
