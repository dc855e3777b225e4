"""From what a rule did to the figures in the table; the definitions are in `dynamics`."""

import numpy as np

from benchmarks import dynamics_streams as streams
from benchmarks.dynamics_rules import Traces

Figures = dict[str, dict[str, float]]
"""From a group of figures and the name in it to the figure; infinity means never."""

WITHIN = 2.0
"""How close to its stationary level a threshold has to be to count as recovered."""
LET_THROUGH, LOOK_AHEAD = 0.9, 20
"""The other definition, of the output: this share of the norm, in most of so many steps."""
HELD, FOLLOWED = 2.5, 1000.0
"""A spike is held if it comes out below this norm; a shift followed if in so many steps."""
AT_THE_END = 200
"""Over how many last steps the drift is judged, when the rule has settled to it."""


def measure(traces: Traces) -> Figures:
    """All figures of a rule: each one per seed, then the median of the seeds."""
    after_one, after_two = traces.outputs["one spike"], traces.outputs["two spikes"]
    burst = traces.outputs["burst"][:, streams.SPIKE : streams.SPIKE + streams.BURST]
    first, second = after_two[:, streams.SPIKE], after_two[:, streams.SECOND]
    early = traces.outputs["early spike"][:, streams.EARLY]
    worst = np.max([after_one[:, streams.SPIKE], first, second, burst.max(axis=1), early], axis=0)
    settled = slice(streams.SHIFT, None)
    stationary = [streams.sigma(value) for value in streams.SIGMAS]
    seeds, steps = after_one.shape
    return {
        "clipped": {name: _median(clipped(traces, name, settled)) for name in stationary},
        "kept": {name: _median(kept(traces, name, settled)) for name in stationary},
        "spikes": {
            "first": _median(first),
            "second": _median(second),
            "burst": _median(burst.mean(axis=1)),
            "step 10": _median(early),
            "worst": _median(worst),
        },
        "recovery": {
            name: _median(steps_to_recover(traces, name, factor))
            for name, factor in streams.SHIFTS.items()
        },
        "let through": {
            name: _median(steps_to_let_through(traces, name))
            for name, factor in streams.SHIFTS.items()
            if factor > 1
        },
        "student t": _of_noise(traces, "student t"),
        "pareto": _of_noise(traces, "pareto"),
        "drift": {
            "clipped": _median(clipped(traces, "drift", slice(-AT_THE_END, None))),
            "kept": _median(kept(traces, "drift", slice(-AT_THE_END, None))),
        },
        "constant": {
            "clipped": _median(clipped(traces, "constant", settled)),
            "kept": _median(kept(traces, "constant", settled)),
        },
        "unmoved by": {
            "zeros": unmoved(traces, "zeros", streams.ZEROS_AT, streams.ZEROS),
            "nan": unmoved(traces, "nan", streams.NAN_AT),
            "inf": unmoved(traces, "inf", streams.INF_AT),
        },
        "run": {"seeds": seeds, "steps": steps},
    }


def holds(figures: Figures) -> bool:
    """Whether no spike gets through: first, second, at step 10, and the mean of the burst."""
    spikes = figures["spikes"]
    return max(spikes[name] for name in ("first", "second", "burst", "step 10")) < HELD


def follows(figures: Figures) -> bool:
    """Whether a lasting tenfold change is followed, up and down."""
    return max(figures["recovery"][name] for name in ("x10", "x0.1")) <= FOLLOWED


def clipped(traces: Traces, stream: str, when: slice) -> np.ndarray:
    """Share of the steps that were clipped, per seed."""
    norms, outputs = traces.norms[stream][:, when], traces.outputs[stream][:, when]
    # Leaves that are put together again may differ from their norm by a rounding.
    return np.mean(outputs < norms * (1 - 1e-6), axis=1)


def kept(traces: Traces, stream: str, when: slice) -> np.ndarray:
    """Sum of the norms that came out over the sum of those that went in, per seed."""
    norms, outputs = traces.norms[stream][:, when], traces.outputs[stream][:, when]
    return outputs.sum(axis=1, dtype=float) / norms.sum(axis=1, dtype=float)


def steps_to_recover(traces: Traces, stream: str, factor: float) -> np.ndarray:
    """Steps after the shift until the threshold is at its new level for good; inf for never."""
    usual = np.median(traces.thresholds[streams.REFERENCE][:, streams.SHIFT :], axis=1)
    away = traces.thresholds[stream][:, streams.SHIFT :] / (usual * factor)[:, None]
    there = (away > 1 / WITHIN) & (away < WITHIN)
    from_there_on = np.logical_and.accumulate(there[:, ::-1], axis=1)[:, ::-1]
    return _first(from_there_on)


def steps_to_let_through(traces: Traces, stream: str) -> np.ndarray:
    """Steps after the shift until most of the next ones are let through; inf for never."""
    norms, outputs = (of[stream][:, streams.SHIFT :] for of in (traces.norms, traces.outputs))
    total = np.cumsum(outputs > LET_THROUGH * norms, axis=1)
    ahead = total[:, LOOK_AHEAD:] - total[:, :-LOOK_AHEAD]
    ahead = np.concatenate([total[:, LOOK_AHEAD - 1 : LOOK_AHEAD], ahead], axis=1)
    return _first(ahead > LOOK_AHEAD / 2)


def unmoved(traces: Traces, stream: str, at: int, times: int = 1) -> bool:
    """Whether all that follows what was put in is as if it had never been."""
    with_it = traces.thresholds[stream][:, at + times :]
    without = traces.thresholds[streams.REFERENCE][:, at:-times]
    return bool(np.allclose(with_it, without, rtol=1e-5, atol=0))


def _of_noise(traces: Traces, stream: str) -> dict[str, float]:
    settled = slice(streams.SHIFT, None)
    return {
        "clipped": _median(clipped(traces, stream, settled)),
        "kept": _median(kept(traces, stream, settled)),
        "largest": _median(traces.outputs[stream][:, settled].max(axis=1)),
    }


def _first(true: np.ndarray) -> np.ndarray:
    """Index of the first True of each row; inf where there is none."""
    return np.where(true.any(axis=1), true.argmax(axis=1), np.inf)


def _median(of_seeds: np.ndarray) -> float:
    return float(np.median(of_seeds))
