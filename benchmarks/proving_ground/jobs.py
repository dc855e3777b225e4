"""A job is one method on one task, under all settings: trained once, then read from its file."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.proving_ground import scores, training
from benchmarks.proving_ground.contenders import Contender
from benchmarks.proving_ground.task import Setting, Task
from optclip._tuning.plain import plain

RATES = tuple(10.0 ** (k / 2) for k in range(-3, 4))
"""Multiples of the best learning rate without a clip."""
SEEDS = (0, 1, 2)


class Size(NamedTuple):
    """How much is run.

    Attributes:
        rates: Multiples of the task's learning rate.
        seeds: Of the parameters and the data.
        shorter: What the steps of a task are divided by.
        thresholds: How many of a method's thresholds, evenly spread; None for all.
    """

    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS
    shorter: int = 1
    thresholds: int | None = None


FULL = Size()
QUICK = Size(rates=(0.1, 1.0, 10.0), seeds=(0,), shorter=3, thresholds=3)


class Job(NamedTuple):
    """A method on a task.

    Attributes:
        task: The task.
        contender: The method.
        size: How much of it is run.
        folder: Where results are kept.
    """

    task: Task
    contender: Contender
    size: Size
    folder: Path

    @property
    def steps(self) -> int:
        """The length of a run."""
        return self.task.steps // self.size.shorter

    @property
    def settings(self) -> list[Setting]:
        """The settings; a short run leaves out those that need another program.

        Optimizers instead of the task's own have learning rates in other units than the loss.
        """
        short, in_units = self.size.shorter > 1, self.contender.instead is None
        return [
            x
            for x in self.task.settings
            if not (short and x.best_rate_only) and (in_units or x.rate_factor == 1)
        ]

    @property
    def rates(self) -> list[float]:
        """The learning rates of the plain setting."""
        return [float(f"{self.task.rate * x:.4g}") for x in self.size.rates]

    @property
    def thresholds(self) -> list[float]:
        """The thresholds, in the units of the method."""
        unit = self.task.threshold if self.contender.of_norm else 1.0
        every = self.contender.thresholds
        most = self.size.thresholds or len(every)
        places = np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int)
        return [float(f"{every[place] * unit:.4g}") for place in places]

    @property
    def file(self) -> Path:
        """Where its result is."""
        return self.folder / _spelled(self.task.name) / f"{_spelled(self.contender.name)}.json"

    @property
    def seconds(self) -> float:
        """What it takes one core, roughly: for the time left."""
        runs = len(self.thresholds) * len(self.rates) * len(self.size.seeds) / 21
        settings = sum(not setting.best_rate_only for setting in self.settings)
        return COMPILING + self.task.seconds * runs * settings / self.size.shorter


COMPILING = 4.0
"""Seconds that a program takes to be compiled, roughly."""


def read(job: Job) -> dict[str, Any] | None:
    """The result of a job if it was run with the same numbers; None otherwise."""
    try:
        found = json.loads(job.file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("run") == _numbers(job) else None


def run(job: Job) -> dict[str, Any]:
    """Trains and writes the result of a job; `read` has it from then on."""
    result = _train(job)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: somebody may press Ctrl-C here.
    part = job.file.with_suffix(".part")
    part.write_text(json.dumps(plain(result)) + "\n", encoding="utf-8")
    part.replace(job.file)
    return json.loads(job.file.read_text(encoding="utf-8"))


def _numbers(job: Job) -> dict[str, Any]:
    """What decides whether an earlier result is this job's."""
    return {
        "steps": job.steps,
        "rates": job.rates,
        "thresholds": job.thresholds,
        "seeds": list(job.size.seeds),
        "settings": [setting.name for setting in job.settings],
    }


def _train(job: Job) -> dict[str, Any]:
    task, seeds = job.task, job.size.seeds
    train = training.program(task, job.contender)
    curves: dict[str, Any] = {}
    results: dict[str, Any] = {}
    compiled: dict[Any, Any] = {}
    seconds: dict[str, list[float]] = {"compile": [], "run": []}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        began = time.process_time()  # of this process: whatever else the machine does meanwhile
        yield
        seconds[what].append(time.process_time() - began)

    for setting in job.settings:
        rates = np.array(job.rates) * setting.rate_factor
        thresholds = job.thresholds
        if setting.best_rate_only:
            best = scores.best(results[setting.base])
            rates, thresholds = np.array([best.rate]), [best.threshold]
        params = training.starts(task, seeds, setting.dtype)
        feed = setting.feed(job.steps, seeds)
        found = []
        for threshold in thresholds:
            given = training.arguments(params, rates, threshold, feed)
            program = setting.dtype, len(rates)
            if program not in compiled:
                with timed("compile"):
                    compiled[program] = train.lower(*given).compile()
            with timed("run"):
                made = training.by_rate_and_seed(compiled[program](*given), len(rates))
            found.append(made)
        stacked = training.Curves(*(np.stack(x) for x in zip(*found, strict=True)))
        curves[setting.name] = stacked
        of_runs = scores.of_runs(task, setting, stacked, curves.get(setting.base))
        results[setting.name] = {"rates": rates.tolist(), "thresholds": thresholds} | of_runs
    return {
        "task": task.name,
        "method": job.contender.name,
        "run": _numbers(job),
        "settings": results,
        "processor_seconds": {
            "compile": seconds["compile"][0],
            "run": float(np.median(seconds["run"])),  # all rates and seeds of a threshold
            "all": sum(map(sum, seconds.values())),
        },
    }


def _spelled(name: str) -> str:
    """A name as that of a file."""
    return "".join(x if x.isalnum() or x in "._=-" else "_" for x in name)
