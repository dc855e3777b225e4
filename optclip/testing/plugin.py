"""The contracts as tests: `pytest --pyargs optclip.testing --clip my_module:my_clip`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optclip.testing._command import devices, named
from optclip.testing._report import CONTRACTS, ask
from optclip.testing._subject import Subject

FILE = Path(__file__).with_name("_report.py")
"""Where the contracts are listed: the file that stands for the tests."""


def add_options(parser: Any) -> None:
    """The options, in a group of their own in `--help`."""
    group = parser.getgroup("optclip.testing", "what a gradient clip keeps to")
    group.addoption(
        "--clip",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a clip, or a function that makes one; may be given again",
    )
    group.addoption("--clip-threshold", metavar="NAME", help="the argument that is the threshold")
    group.addoption("--clip-quick", action="store_true", help="fewer inputs and types")


SUBJECTS = pytest.StashKey[list[Subject]]()


def pytest_configure(config: pytest.Config) -> None:
    """The clips that were named, before anything is collected."""
    clips: list[str] = config.getoption("--clip") or []
    if not clips:
        raise pytest.UsageError("which clip? give --clip MODULE:NAME")
    devices()
    try:
        config.stash[SUBJECTS] = [
            Subject(
                named(clip),
                threshold=config.getoption("--clip-threshold"),
                name=clip,
                quick=bool(config.getoption("--clip-quick")),
            )
            for clip in clips
        ]
        for subject in config.stash[SUBJECTS]:
            subject.try_out()
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collect_file(file_path: Path, parent: Any) -> Any:
    """Tests for the file that lists the contracts."""
    if file_path == FILE:
        return Contracts.from_parent(parent, path=file_path)
    return None


class Contracts(pytest.File):
    """All contracts of the clips that were named."""

    def collect(self) -> Iterator[Any]:
        """One test for each clip and contract."""
        for subject in self.config.stash[SUBJECTS]:
            for contract in CONTRACTS:
                yield Contract.from_parent(
                    self, name=f"{subject.name}-{contract}", subject=subject, contract=contract
                )


class Contract(pytest.Item):
    """One contract of one clip."""

    def __init__(self, *, subject: Subject, contract: str, **settings: Any):
        """Keeps what it is given."""
        super().__init__(**settings)
        self.subject, self.contract = subject, contract

    def runtest(self) -> None:
        """Fails with every finding; is skipped where nothing could be asked."""
        result = ask(self.subject, self.contract)
        if result.kept is None:
            pytest.skip("; ".join(result.not_asked))
        if result.findings:
            raise AssertionError("\n".join(result.findings))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The findings, a line each, without a traceback through the suite."""
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where it is listed, and its name."""
        return FILE, None, self.name
