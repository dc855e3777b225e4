"""Does a clip keep what it promises? Contracts that any Optax transformation can be asked for."""

from optclip.testing import _report
from optclip.testing._report import Report, Result, check_clip, report

CONTRACTS: tuple[str, ...] = tuple(_report.CONTRACTS)
"""The names of what a clip is asked for, in their order."""

__all__ = ["CONTRACTS", "Report", "Result", "check_clip", "report"]
