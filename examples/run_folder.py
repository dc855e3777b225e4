"""The folder of one run: the log of its steps and its checkpoints, and how to go on from it.

::

    steps.jsonl     one line of JSON per step; null where a number is not finite
    checkpoints/    by orbax, named after an epoch or a step; the last two are kept
    run.png         the picture, when the run is done
    result.json     what came out of it, when the run is done
    tensorboard/    event files, where asked for

Several processes share one folder: the first one writes the log, and all of them the checkpoints.
No run is deleted unless --overwrite says so; choose_threshold.py keeps to that with the same code.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import jax
import orbax.checkpoint as ocp
from clip_options import UsageError
from jax.experimental import multihost_utils

Row = dict[str, Any]
RESULT = "result.json"


# What the examples' folders have in common -------------------------------------------------------


def add_folder_options(parser: argparse.ArgumentParser, *, resumable: bool = True) -> None:
    """Adds --overwrite, --json and, unless a run cannot be gone on with, --resume."""
    group = parser.add_mutually_exclusive_group()
    if resumable:
        group.add_argument(
            "--resume", action="store_true", help="go on from the last checkpoint in --out"
        )
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"print the result, which is kept as {RESULT}, and nothing else on stdout",
    )


def check_free(path: Path, log: str, others: Iterable[str], overwrite: bool, more: str) -> bool:
    """Makes sure that a run may be kept in a folder; takes nothing away.

    Args:
        path: The folder; made if need be.
        log: The file in it that tells a run: it has something in it.
        others: What else a run leaves there.
        overwrite: Whether a run that is there may be replaced.
        more: What else than --overwrite a person can do with a run that is there.

    Returns:
        Whether there is a run to be replaced.

    Raises:
        UsageError: If the folder cannot be written, holds a run that may not be replaced, or is
            somebody else's.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / log).open("a").close()
    except OSError as error:
        raise UsageError(
            f"--out {path} cannot be written ({error.strerror}); choose another folder"
        ) from None
    if (path / log).stat().st_size:
        if not overwrite:
            raise UsageError(
                f"--out {path} already holds a run; add {more}--overwrite to replace it, or name "
                "another folder with --out"
            )
        return True
    foreign = [name for name in others if (path / name).exists()]
    if foreign:
        raise UsageError(
            f"--out {path} has {' and '.join(foreign)}, not from this script; choose another folder"
        )
    return False


def clear(path: Path, log: str, others: Iterable[str]) -> None:
    """Takes a run away; its log last, so that what is left is known as a run until the end."""
    for name in others:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
    (path / log).write_bytes(b"")


def resuming(typed: list[str]) -> str:
    """The command that goes on with an interrupted run, from what was typed to start it."""
    options = (word for word in typed if word not in ("--overwrite", "--resume"))
    return shlex.join(["python", *options, "--resume"])


@contextlib.contextmanager
def words_aside(aside: bool) -> Iterator[TextIO]:
    """The stdout there is; `aside`, all that is printed meanwhile goes to stderr."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if aside else stdout):
        yield stdout


def keep_result(path: Path, result: Row, stdout: TextIO | None) -> None:
    """Writes the result of a run to its folder and, if `stdout` is given, there in one line."""
    (path / RESULT).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    if stdout is not None:
        print(json.dumps(result), file=stdout)


def json_ready(value: Any) -> Any:
    """A number as JSON knows it: null where it is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """Where one run keeps what it did: `begin` it, then `append` steps and `save` checkpoints.

    Attributes:
        path: The folder.
        picture: Where the picture goes.
        note: What a person should know when the run has begun; empty if nothing.
    """

    LOG = "steps.jsonl"
    OTHERS = ("checkpoints", "run.png", RESULT, "tensorboard")

    def __init__(
        self,
        path: Path,
        settings: Row,
        goal: int,
        resume: bool,
        overwrite: bool,
        tensorboard: bool = False,
        unit: str = "epoch",
    ):
        """Looks whether the run can be kept here; takes nothing away yet.

        Args:
            path: The folder; made if need be.
            settings: What a checkpoint must agree with to be resumed.
            goal: How many epochs (or steps) the run is to have in the end.
            resume: Whether to go on from the last checkpoint, or to start anew.
            overwrite: Whether a run that is there may be replaced.
            tensorboard: Whether to write event files too.
            unit: What checkpoints are numbered by: "epoch" or "step".

        Raises:
            UsageError: If the folder cannot be written, is somebody else's, holds a run that may
                not be replaced, or has nothing to resume.
        """
        self.path = path
        self.picture = path / "run.png"
        self.note = ""
        self._log = path / self.LOG
        self._checkpoints = path / "checkpoints"
        self._board_path = path / "tensorboard"
        self._board: Any = None
        self._board_type: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board_type = SummaryWriter
        self._settings = settings
        self._unit = unit
        self._writes = jax.process_index() == 0
        self._steps = 0
        self._history: list[Row] = []  # of the run to be resumed
        if resume:
            self._history = self._look_at_checkpoint(goal)
        else:
            more = "--resume to go on with it, "
            if check_free(path, self.LOG, self.OTHERS, overwrite, more):
                self.note = f"The earlier run in {path} is replaced."

    def way_on(self, without: str, typed: list[str]) -> str:
        """How to go on after an interruption.

        Args:
            without: Why it has to start again, where there is no checkpoint.
            typed: What was typed to start the run.
        """
        if done := self.last():
            command = resuming(typed)
            return f"{self.path} keeps the log and {self._unit} {done}; go on with: {command}"
        return f"{without}, so start again with --overwrite; the log is in {self.path}"

    def begin(self, state: Any) -> tuple[Any, list[Row]]:
        """Starts the run anew, or goes back to the last checkpoint and cuts the log off there.

        Args:
            state: A fresh state.

        Returns:
            The state to go on from, and the row of each earlier checkpoint.

        Raises:
            UsageError: If the checkpoint or the log does not fit.
        """
        if self._history:
            state = self._restore(state)
            self._steps = self._history[-1]["steps"]
            self._truncate_log(self._steps)
        elif self._writes:
            clear(self.path, self.LOG, self.OTHERS)
        if jax.process_count() > 1:  # nobody saves what the first process is about to clear away
            multihost_utils.sync_global_devices("run folder")
        if self._board_type is not None:
            self._board = self._board_type(str(self._board_path), purge_step=self._steps + 1)
        return state, list(self._history)

    def last(self) -> int:
        """The epoch (or step) of the last checkpoint; 0 if there is none."""
        if not self._checkpoints.is_dir():
            return 0
        with self._manager() as manager:
            return manager.latest_step() or 0

    def append(self, readings: list[Row], **about: Any) -> list[Row]:
        """Adds steps to the log, with what is known of all of them; hands back their rows."""
        rows = []
        for reading in readings:
            self._steps += 1
            values = {name: json_ready(value) for name, value in reading.items()}
            first = {"step": self._steps, **about, "loss": values["loss"]}
            rows.append(first | values)
        if self._writes:
            with self._log.open("a") as log:
                log.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            scalars = {name: row[name] for name in row if name not in ("step", "epoch")}
            self._show_on_board(scalars, row["step"])
        return rows

    def save(self, state: Any, history: list[Row]) -> None:
        """Makes a checkpoint, numbered as the last row of the history says."""
        if self._writes:
            with self._log.open("rb") as log:
                os.fsync(log.fileno())  # a checkpoint never knows of steps that the log does not
        about = {"settings": self._settings, "history": history}
        with self._manager() as manager:
            manager.save(
                history[-1][self._unit],
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
                ),
            )
        tests = {name: value for name, value in history[-1].items() if name.startswith("test_")}
        self._show_on_board(tests, history[-1]["steps"])

    def rows(self) -> list[Row]:
        """Every step in the log."""
        with self._log.open() as log:
            return [json.loads(line) for line in log]

    def close(self) -> None:
        """Finishes the event files."""
        if self._board is not None:
            self._board.close()

    def _look_at_checkpoint(self, goal: int) -> list[Row]:
        last = self.last()
        if not last:
            log = self._log.exists() and self._log.stat().st_size
            instead = "give --overwrite instead" if log else "leave --resume out"
            raise UsageError(f"--resume: there is no checkpoint in {self.path}; {instead} to start")
        with self._manager() as manager:
            args = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = manager.restore(last, args=args)["about"]
        now, then = self._settings, about["settings"]
        other = [name for name in now if now[name] != then.get(name)]
        if other:
            was = "; ".join(
                f"{_flag(name)} was {then.get(name) or 'nothing'}, not {now[name] or 'nothing'}"
                for name in other
            )
            raise UsageError(
                f"--resume: of the run in {self.path} {was}. Repeat its options, or choose another "
                "--out"
            )
        if last > goal:
            raise UsageError(
                f"--resume: the run in {self.path} has {last} {self._unit}s already; "
                f"give --{self._unit}s {last} or more"
            )
        self.note = f"Going on after {self._unit} {last} of {self.path}."
        if last == goal:
            self.note = f"{self.path} has all {last} {self._unit}s: nothing is left to do."
        return about["history"]

    def _restore(self, state: Any) -> Any:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        with self._manager() as manager:
            try:
                return manager.restore(self._history[-1][self._unit], args=args)["state"]
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"--resume: the checkpoint in {self.path} does not fit this network and "
                    f"optimizer ({' '.join(str(error).split())[:200]}); give --overwrite instead"
                    " to start again"
                ) from error

    def _truncate_log(self, steps: int) -> None:
        self._log.touch()
        with self._log.open("rb+" if self._writes else "rb") as log:
            lines = [line for _, line in zip(range(steps), log, strict=False)]
            if len(lines) < steps or json.loads(lines[-1])["step"] != steps:
                raise UsageError(
                    f"--resume: {self._log} does not hold the {steps} steps of the checkpoint; "
                    "give --overwrite instead to start again"
                )
            if self._writes:
                log.seek(sum(map(len, lines)))
                log.truncate()

    def _manager(self) -> ocp.CheckpointManager:
        # Not asynchronous: a checkpoint of this size takes milliseconds, and is then surely there.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._checkpoints.absolute(), options=options)

    def _show_on_board(self, scalars: Row, step: int) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, math.nan if value is None else value, step)


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a flag to be looked at between two steps.

    So that neither a line of the log nor a checkpoint is cut in half. A second one stops at once.
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)):
        self.requested = False
        self._signals = tuple(signals)
        self._earlier: list[Any] = []

    def __enter__(self) -> "Interruption":
        self._earlier = [signal.signal(number, self._handle) for number in self._signals]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(self._signals, self._earlier, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _flag(name: str) -> str:
    """The option that a setting comes from."""
    return f"--{name.replace('_', '-').replace('clip-args', 'clip-arg')}"
