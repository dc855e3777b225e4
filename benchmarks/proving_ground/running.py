"""Jobs side by side, each in a process with one core, and how far they are.

Two processes of one core do more than one of two: the arrays are too small to be shared out.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from benchmarks.proving_ground import jobs
from benchmarks.proving_ground.candidates import CANDIDATES
from benchmarks.proving_ground.contenders import CONTENDERS, Contender
from benchmarks.proving_ground.jobs import Job, Size
from benchmarks.proving_ground.tasks import TASKS


class Order(NamedTuple):
    """A job by its names: what can be sent to another process.

    Attributes:
        task: Name of the task.
        method: Name of the contender.
        size: How much of it is run.
        folder: Where results are kept.
    """

    task: str
    method: str
    size: Size
    folder: Path


def contenders() -> dict[str, Contender]:
    """All that can be run, by their names."""
    return {contender.name: contender for contender in (*CONTENDERS, *CANDIDATES)}


def job(order: Order) -> Job:
    """The job that is meant."""
    return Job(TASKS[order.task], contenders()[order.method], order.size, order.folder)


class Done(NamedTuple):
    """How a job ended.

    Attributes:
        order: The job.
        error: The file that says what went wrong; None if nothing did.
    """

    order: Order
    error: Path | None


def run_all(orders: list[Order], workers: int) -> list[Done]:
    """Runs what is not there yet; results are in files afterwards.

    Args:
        orders: What to run.
        workers: How many processes; with one it is this one.

    Returns:
        The jobs that failed: one method that does not work must not cost a night of the others.
    """
    left = [order for order in orders if jobs.read(job(order)) is None]
    total = sum(job(order).seconds for order in left)
    if left:
        hours = total / max(min(workers, len(left)), 1) / 3600
        much = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        print(
            f"{len(left)} of {len(orders)} jobs to run, about {much} on idle cores", file=sys.stderr
        )
    bar = "{desc}{percentage:3.0f}% |{bar}| {elapsed} gone, about {remaining} left"
    with (
        tqdm(total=total, bar_format=bar, disable=None if left else True) as progress,
        _answers(left, min(workers, len(left))) as answers,
    ):
        failed = []
        for count, done in enumerate(answers, 1):
            failed += [done] if done.error else []
            order = done.order
            progress.set_description(f"{count}/{len(left)} {order.task}, {order.method} ")
            progress.update(job(order).seconds)
    return failed


@contextmanager
def _answers(orders: list[Order], workers: int) -> Iterator[Iterator[Done]]:
    """How each ended, in the order in which they do."""
    if workers <= 1:
        yield map(_work, orders)
        return
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for worker in range(workers):
        cores.put(worker)
    # Leaving ends the processes, also those that are at work.
    with context.Pool(workers, _start, (cores,)) as pool:
        yield pool.imap_unordered(_work, orders)


def _start(cores: Any) -> None:
    if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as it may use cores.
        allowed, turn = sorted(os.sched_getaffinity(0)), cores.get()
        cores.put(turn)  # a process that takes the place of a dead one has a turn too
        os.sched_setaffinity(0, {allowed[turn % len(allowed)]})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; one of them says so
    jax.config.update("jax_platforms", "cpu")  # so small that an accelerator would only wait


def _work(order: Order) -> Done:
    of = job(order)
    error = of.file.with_suffix(".error")
    try:
        jobs.run(of)
        error.unlink(missing_ok=True)
        return Done(order, None)
    except Exception:
        error.parent.mkdir(parents=True, exist_ok=True)
        error.write_text(traceback.format_exc(), encoding="utf-8")
        return Done(order, error)
    finally:
        jax.clear_caches()  # a program serves one job
