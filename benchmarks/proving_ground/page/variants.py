"""The tables of the variants that the defaults of `safeguard` were chosen from."""

from benchmarks.proving_ground.claims import Found
from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.page.cells import (
    loss_text,
    range_of,
    range_text,
    ratio_text,
    table,
)
from benchmarks.proving_ground.reporting import FIXED
from benchmarks.proving_ground.tasks import VARIANTS

PLAIN = ("transformer, momentum", "transformer, AdamW")

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
    *(f"safeguard(deviations=2, ratio={ratio})" for ratio in (0.001, 0.003, 0.01, 0.03)),
    "safeguard(deviations=0, ratio=0.01)",
    *(f"robust_clip({deviations})" for deviations in (2, 0, -1)),
    "clip_by_param_norm(0.01, leaf)",
    *(f"guarded({ratio}, unit)" for ratio in (0.003, 0.01, 0.03)),
    "guarded(0.01, unit or tree)",
    "guarded(0.01, running mean)",
    *(f"guarded(0.03 annealed after 100, {scope})" for scope in ("tree", "unit")),
    "guarded(0.1 annealed after 100, tree)",
    *(f"guarded({ratio}, tree, momentum sees it)" for ratio in (0.01, 0.03)),
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


def variants(found: Found) -> str:
    """What the bound sees: the losses, and the ranges of rates."""
    tasks = [task for task in found.scores if task in VARIANTS or task in PLAIN]
    names = dict.fromkeys(name for task in tasks for name in found.scores[task]["clean"])
    wanted = [x for x in names if x == NO_CLIP or x.startswith("safeguard(deviations=2")]
    wanted += [x for x in names if "cosine" in x]
    rows = []
    for name in wanted:
        cells = []
        for task in tasks:
            there = name in found.scores[task]["clean"]
            wide = range_text(range_of(found, task, "clean", name)) if there else ""
            cells.append(f"{loss_text(found, task, 'clean', name)} ({wide})" if there else "")
        rows.append((f"`{name}`", *cells))
    return table(("variant", *tasks), rows)


def _tried(found: Found, task: str, setting: str, name: str) -> str:
    methods = found.scores[task][setting]
    if name not in methods or FIXED not in methods:
        return ""
    ratio = ratio_text(found.over(task, setting, name, FIXED))
    diverged = found.of(task, setting, name, "diverged")
    lost = f", {diverged:.0%} diverge" if diverged else ""
    return f"{ratio} ({range_text(range_of(found, task, setting, name))}{lost})"
