"""Made-up runs by what `suggest_threshold` is to say of them."""

from typing import Any

import numpy as np


def noisy(count: int = 1000, noise: float = 0.2, seed: int = 0) -> np.ndarray:
    return np.exp(noise * np.random.default_rng(seed).normal(size=count))


def spiky(count: int = 1000, seed: int = 0) -> np.ndarray:
    norms = noisy(count, seed=seed)
    norms[count // 2 :: 20] *= 50
    return norms


def drifting(factor: float, count: int = 1000) -> np.ndarray:
    return noisy(count) * np.geomspace(1, factor, count)


RUNS: dict[str, Any] = {
    "quiet": noisy(),
    "spikes": spiky(),
    "level moves": drifting(10),
    "diverged": np.r_[np.geomspace(1, 1e15, 12), np.full(188, np.nan)],
    "clipped": {
        "clip/norm": noisy(),
        "clip/threshold": np.full(1000, 0.5),
        "clip/factor": np.minimum(1, 0.5 / noisy()),
    },
    "too short": noisy(20),
}
