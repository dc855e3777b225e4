"""Choosing a threshold from a recorded run. Needs the extra: `pip install optclip[tuning]`."""

from optclip.tuning.plotting import plot_run
from optclip.tuning.replaying import Replay, replay
from optclip.tuning.suggesting import Suggestion, suggest_threshold
from optclip.tuning.sweep_result import Sweep
from optclip.tuning.sweeping import sweep

__all__ = ["Replay", "Suggestion", "Sweep", "plot_run", "replay", "suggest_threshold", "sweep"]
