"""Numbers as people read them."""

import math


class LogError(ValueError):
    """What was given cannot be used; its one line says how to fix it."""


def percent(share: float) -> str:
    """A share; never rounded to all or nothing."""
    if 0 < share < 0.0995 or 0.9905 < share < 1:
        return f"{share:.1%}" if 0.0005 <= share <= 0.9995 else "<0.1%" if share < 0.5 else ">99.9%"
    return f"{share:.0%}"


def number(x: float) -> str:
    """Three digits, with thousands marked."""
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"


def times(ratio: float) -> str:
    """A ratio."""
    if not math.isfinite(ratio):
        return "-"
    return f"{ratio:.3g}x" if ratio >= 1e6 else f"{ratio:,.{1 if ratio < 10 else 0}f}x"


def steps_taken(steps: float | None) -> str:
    """How long something took."""
    if steps is None:
        return "-"
    return f"{steps:,.0f}" if math.isfinite(steps) else "never"


def counted(count: int, noun: str) -> str:
    """So many of something."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
