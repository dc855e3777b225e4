"""Which tasks and methods are meant."""

import difflib
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from benchmarks.proving_ground.candidates import CANDIDATES
from benchmarks.proving_ground.contenders import CONTENDERS, NO_CLIP
from benchmarks.proving_ground.jobs import Size
from benchmarks.proving_ground.running import Order
from benchmarks.proving_ground.tasks import TASKS

QUICK_TASKS = ("quadratic", "transformer, momentum", "ranker")
QUICK_METHODS = (NO_CLIP, "clip_by_global_norm", "zclip", "robust_clip", "safeguard")


def orders(
    tasks: list[str] | None,
    methods: list[str] | None,
    *,
    candidates: bool,
    quick: bool,
    size: Size,
    folder: Path,
) -> list[Order]:
    """The jobs that are meant, task by task.

    Args:
        tasks: How the names of the tasks begin; None for all (a few, if `quick`).
        methods: How the names of the methods begin; None for all (a few, if `quick`).
        candidates: Whether the methods are those of candidates.py.
        quick: Whether a few are enough.
        size: How much is run of each.
        folder: Where results are kept.

    Raises:
        ValueError: If no name begins so.
    """
    every = CANDIDATES if candidates else CONTENDERS
    names = [contender.name for contender in every]
    families = {contender.name: contender.family for contender in every}
    few_tasks, few_methods = QUICK_TASKS, tuple(names) if candidates else QUICK_METHODS
    known = list(TASKS)
    meant_tasks = _begin("--task", tasks or (few_tasks if quick else None), known)
    meant_methods = _begin("--method", methods or (few_methods if quick else None), names)
    return [
        Order(task, method, size, folder)
        for task in meant_tasks
        for method in meant_methods
        if families[method] in ("", TASKS[task].family)
    ]


def _begin(option: str, starts: list[str] | tuple[str, ...] | None, names: list[str]) -> list[str]:
    """The names that begin with one of the words; one that is a name means itself alone."""
    if starts is None:
        return names
    meant = set()
    for start in starts:
        found = {start} if start in names else {name for name in names if name.startswith(start)}
        if not found:
            close = difflib.get_close_matches(start, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "see --list"
            raise ValueError(f"{option}: there is no {start!r}; {hint}")
        meant |= found
    return [name for name in names if name in meant]


def listed(candidates: bool) -> Group:
    """Tasks with their settings, and methods with their thresholds."""
    tasks = Table(title="tasks", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("task", "steps", "settings"):
        tasks.add_column(heading)
    for task in TASKS.values():
        settings = "; ".join(setting.name for setting in task.settings)
        tasks.add_row(task.name, f"{task.steps:,}", settings)
    methods = Table(title="methods", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("method", "thresholds"):
        methods.add_column(heading)
    for contender in CANDIDATES if candidates else CONTENDERS:
        values = ", ".join(f"{x:.3g}" for x in contender.thresholds) if contender.chooses else ""
        unit = " of the usual norm" if contender.of_norm else ""
        methods.add_row(contender.name, values and f"{values}{unit}")
    return Group(tasks, methods)
