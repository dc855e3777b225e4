"""`safeguard` beside others that promise a run without a choice."""

import math

import numpy as np

from benchmarks.proving_ground.claims import Found
from benchmarks.proving_ground.contenders import NO_CLIP, RIVALS
from benchmarks.proving_ground.page.cells import SAFEGUARD, settings_of, table

OTHERS = (NO_CLIP, *RIVALS)


def rivals(found: Found) -> str:
    """Each of them against `safeguard`, at the best and at the worst of its learning rates."""
    return table(
        ("", "loss at the best rate", "loss at the worst rate", "diverged"),
        [_row(found, name) for name in (SAFEGUARD, *OTHERS) if _both(found, name)],
    )


def _both(found: Found, name: str) -> list[tuple[str, str]]:
    """The settings in which both were run at all learning rates."""
    return [
        x
        for x in settings_of(found)
        if all("worst" in found.scores[x[0]][x[1]].get(y, ()) for y in (name, SAFEGUARD))
    ]


def _row(found: Found, name: str) -> tuple[str, ...]:
    settings = _both(found, name)

    def ratios(what: str) -> np.ndarray:
        pairs = [[found.of(*x, y, what) for y in (name, SAFEGUARD)] for x in settings]
        return np.array([_over(*pair) for pair in pairs])

    diverged = np.mean([found.of(*x, name, "diverged") for x in settings])
    shown = f"`{name}`" if name != NO_CLIP else name
    return (
        f"{shown} ({len(settings)})",
        _mean(ratios("loss")),
        _mean(ratios("worst")),
        f"{diverged:.0%}",
    )


def _over(ours: float, theirs: float) -> float:
    if math.isinf(ours):
        return math.inf
    return ours / theirs if theirs > 0 else math.nan


def _mean(ratios: np.ndarray) -> str:
    """The geometric mean; of the settings in which it did not diverge at every rate."""
    finite = ratios[np.isfinite(ratios) & (ratios > 0)]
    lost = int(np.sum(np.isinf(ratios)))
    mean = f"{np.exp(np.mean(np.log(finite))):.3g}" if finite.size else "-"
    return f"{mean} ({lost} diverged)" if lost else mean
