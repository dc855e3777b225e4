"""Streams of gradient norms whose truth is known: noise, spikes, shifts, drift, odd values.

Every stream has a typical norm of 1 before anything happens to it. Steps count from 0. A seed draws
the same noise in every stream and for every length, so that streams differ in their event alone.
"""

import numpy as np

Streams = dict[str, np.ndarray]
"""From the name of a stream to its norms; float32, shape (seeds, steps)."""

SIGMAS = (0.02, 0.1, 0.2, 0.5, 1.0)
"""Deviations of the log norm in the stationary streams; the others have `NOISE`."""
NOISE = 0.2
SPIKE, SECOND, BURST, EARLY = 700, 720, 20, 9
"""Steps of the first and the second spike, length of the burst, and the tenth step of the run."""
FIRST_SIZE, SECOND_SIZE = 100.0, 20.0
SHIFT = 1000
"""Where the level shifts and the drift begins; by then every warm-up is over."""
SHIFTS = {"x3": 3.0, "x10": 10.0, "x100": 100.0, "x1/3": 1 / 3, "x0.1": 0.1, "x0.01": 0.01}
DRIFT_STEPS, DRIFT_DECADES = 5000, 3.0
DEGREES, TAIL = 1.2, 1.5
"""Of Student's t, and the exponent of the Pareto distribution: both have no variance."""
T_MEDIAN = 0.9336
"""Median of |t| at 1.2 degrees of freedom."""
NAN_AT, INF_AT, ZEROS_AT, ZEROS = 50, 700, 700, 100
"""What is put in between the norms of the stationary stream, and where."""
PICTURE_SPIKE, PICTURE_RISE, PICTURE_FALL, PICTURE_STEPS = 200, 400, 650, 900
"""Two spikes, a tenfold rise and the way back; close together, so that all can be seen."""


def sigma(value: float) -> str:
    """The name of the stationary stream with this deviation of the log norm."""
    return f"sigma {value:g}"


REFERENCE = sigma(NOISE)
"""The stream in which nothing happens, of which most others are made."""


def make(seeds: int, steps: int) -> Streams:
    """All streams.

    Args:
        seeds: Independent draws of the noise.
        steps: Length of every stream; more than `SHIFT` for any figure after the shift.

    Returns:
        A mapping from name to norms of shape (seeds, steps).
    """
    draws = [np.random.default_rng([seed, 0]).standard_normal(steps) for seed in range(seeds)]
    normal = np.stack(draws)
    base = np.exp(NOISE * normal)
    step = np.arange(steps)
    streams = {sigma(value): np.exp(value * normal) for value in SIGMAS}
    streams |= _heavy_tailed(seeds, steps)
    streams["one spike"] = _with(base, {SPIKE: FIRST_SIZE})
    streams["two spikes"] = _with(base, {SPIKE: FIRST_SIZE, SECOND: SECOND_SIZE})
    streams["burst"] = _with(base, dict.fromkeys(range(SPIKE, SPIKE + BURST), SECOND_SIZE))
    streams["early spike"] = _with(base, {EARLY: FIRST_SIZE})
    for name, factor in SHIFTS.items():
        streams[name] = base * np.where(step >= SHIFT, factor, 1.0)
    streams["drift"] = base * 10 ** (
        DRIFT_DECADES * np.clip((step - SHIFT) / DRIFT_STEPS, 0.0, 1.0)
    )
    streams["constant"] = np.ones_like(base)
    streams["zeros"] = _inserted(base, ZEROS_AT, 0.0, ZEROS)
    streams["nan"] = _inserted(base, NAN_AT, np.nan)
    streams["inf"] = _inserted(base, INF_AT, np.inf)
    level = np.where((step >= PICTURE_RISE) & (step < PICTURE_FALL), 10.0, 1.0)
    second = PICTURE_SPIKE + SECOND - SPIKE
    streams["picture"] = _with(base * level, {PICTURE_SPIKE: FIRST_SIZE, second: SECOND_SIZE})
    return {name: norms.astype(np.float32) for name, norms in streams.items()}


def shortened(streams: Streams, seeds: int, steps: int) -> Streams:
    """The first seeds and steps of every stream."""
    return {name: norms[:seeds, :steps] for name, norms in streams.items()}


def _heavy_tailed(seeds: int, steps: int) -> Streams:
    students, paretos = [], []
    for seed in range(seeds):
        students.append(np.random.default_rng([seed, 1]).standard_t(DEGREES, steps))
        paretos.append(np.random.default_rng([seed, 2]).pareto(TAIL, steps))
    return {
        "student t": np.abs(students) / T_MEDIAN,
        "pareto": (1 + np.asarray(paretos)) / 2 ** (1 / TAIL),
    }


def _with(norms: np.ndarray, spikes: dict[int, float]) -> np.ndarray:
    """The norms with those at some steps replaced."""
    spiked = norms.copy()
    for step, size in spikes.items():
        spiked[:, step] = size
    return spiked


def _inserted(norms: np.ndarray, step: int, value: float, times: int = 1) -> np.ndarray:
    """The norms with a value put in between, so that what follows is the same, only later."""
    between = np.full((norms.shape[0], times), value)
    return np.concatenate([norms[:, :step], between, norms[:, step:]], axis=1)[:, : norms.shape[1]]
