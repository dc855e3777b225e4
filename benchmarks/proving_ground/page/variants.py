"""The tables of the variants that the defaults of `safeguard` were chosen from."""

from benchmarks.proving_ground.claims import Found
from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.page.cells import (
    range_of,
    range_text,
    ratio_text,
    table,
)
from benchmarks.proving_ground.reporting import FIXED

TRIED = (
    ("quadratic", "heavy tails"),
    ("quadratic", "gaussian"),
    ("recurrent", "adding"),
    ("deep network, batch 16", "clean"),
    ("deep network, batch 64", "clean"),
    ("deep network, batch 256", "clean"),
    ("deep network, batch 1024", "clean"),
    ("ranker", "rare features"),
    ("transformer, momentum", "clean"),
    ("transformer, AdamW", "clean"),
)

SHOWN = (
    NO_CLIP,
    *(f"safeguard(ratio={ratio})" for ratio in (0.01, 0.02, 0.03, 0.05, 0.1)),
    *(f"safeguard(deviations={deviations})" for deviations in (0, "inf")),
    *(f"robust_clip({deviations})" for deviations in (2, 0, -1)),
    *(f"guarded({ratio}, {scope})" for scope in ("tree", "unit") for ratio in (0.01, 0.03)),
)
"""The variants that the text speaks of; the others are in candidates.json."""


def candidates(found: Found) -> str:
    """Variants of `safeguard`: the loss over the best fixed threshold's, and the range of rates."""
    settings = [x for x in TRIED if x[1] in found.scores.get(x[0], {})]
    rows = [
        (f"`{name}`", *(_tried(found, task, setting, name) for task, setting in settings))
        for name in SHOWN
    ]
    return table(("variant", *(f"{task}: {setting}" for task, setting in settings)), rows)


def _tried(found: Found, task: str, setting: str, name: str) -> str:
    methods = found.scores[task][setting]
    if name not in methods or FIXED not in methods:
        return ""
    ratio = ratio_text(found.over(task, setting, name, FIXED))
    diverged = found.of(task, setting, name, "diverged")
    lost = f", {diverged:.0%} diverge" if diverged else ""
    return f"{ratio} ({range_text(range_of(found, task, setting, name))}{lost})"
