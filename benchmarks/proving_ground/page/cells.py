"""What stands in the cells of the tables: numbers of a report as they are read."""

import math

from benchmarks.proving_ground.claims import Found

SAFEGUARD = "safeguard"
WIDE = 30.0
"""The range of learning rates that is asked of `safeguard`."""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def settings_of(found: Found) -> list[tuple[str, str]]:
    """Every task with each of its settings."""
    return [(task, setting) for task, settings in found.scores.items() for setting in settings]


def ratio_text(x: float) -> str:
    """A ratio of losses."""
    if math.isnan(x) or math.isinf(x):
        return "diverged"
    return f"{x:.3f}" if x < 10 else f"{x:.0f}"


def range_of(found: Found, task: str, setting: str, method: str) -> float | None:
    """The largest over the smallest of the good learning rates; None where one was run."""
    return found.scores[task][setting][method].get("rates_range")


def too_narrow(x: float) -> bool:
    """Whether a range is below what is asked of `safeguard`."""
    return x < WIDE
