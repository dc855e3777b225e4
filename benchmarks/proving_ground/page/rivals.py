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
        (
            "",
            "settings",
            "loss at the best rate over `safeguard`'s",
            "lower in",
            "loss at the worst rate over `safeguard`'s",
            "lower in",
            "runs that diverge",
            "sensitivity over `safeguard`'s",
            "mean rank, best and worst rate",
        ),
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

    best, worst, sensitive = (ratios(what) for what in ("loss", "worst", "sensitivity"))
    diverged = np.mean([found.of(*x, name, "diverged") for x in settings])
    return (
        f"`{name}`" if name != NO_CLIP else name,
        str(len(settings)),
        _mean(best),
        f"{np.sum(best < 1)}",
        _mean(worst),
        f"{np.sum(worst < 1)}",
        f"{diverged:.0%}",
        _mean(sensitive),
        " and ".join(f"{_rank(found, settings, name, what):.2f}" for what in ("loss", "worst")),
    )


def _rank(found: Found, settings: list[tuple[str, str]], name: str, what: str) -> float:
    """Among all of them that were run under a setting, the lowest loss first."""
    ranks = []
    for task, setting in settings:
        run = [x for x in (SAFEGUARD, *OTHERS) if (task, setting) in _both(found, x)]
        values = {x: found.of(task, setting, x, what) for x in run}
        before = sum(x < values[name] for x in values.values())
        alike = sum(x == values[name] for x in values.values())
        ranks.append(before + (alike + 1) / 2)
    return float(np.mean(ranks))


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
