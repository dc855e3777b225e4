"""Does a clip keep what it promises? Contracts that any Optax transformation can be asked for."""

from optclip.testing._report import CONTRACTS, Report, Result, check_clip, report

__all__ = ["CONTRACTS", "Report", "Result", "check_clip", "report"]
