"""Runs worker.py in processes that talk over loopback, and leaves none of them behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.samples import QUICK

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/examples/multihost/worker.py"
COMPILED = ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_")
"""Variables that say where compiled programs are kept."""

LIMIT = 90
"""Seconds for a run, which takes about five where nothing else runs."""


def run_processes(
    processes: int, out: Path, *arguments: object, kill: tuple[int, int] | None = None
) -> None:
    """Runs the workers until all are done or one has failed, and kills those that are left.

    Args:
        processes: How many; one runs without `jax.distributed`.
        out: A new folder, for what they write and print.
        *arguments: More for worker.py.
        kill: A rank, and the step after which it gets a SIGKILL.

    Raises:
        AssertionError: With the end of what each printed, if they do not end as they should.
    """
    if kill:
        arguments = (*arguments, "--kill", *kill)
    with started(processes, out, *arguments) as workers:
        deadline = time.monotonic() + LIMIT
        codes = [worker.poll() for worker in workers]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [worker.poll() for worker in workers]
    done = set(codes) == {0}
    # Those that miss the killed one hang or fail, sooner or later: none can be done.
    died = kill and codes[kill[0]] == -signal.SIGKILL and 0 not in codes
    if not (died if kill else done):
        raise AssertionError(f"exit codes {codes}, None if it had to be killed{tails(out)}")


def tails(out: Path) -> str:
    """The end of what each worker printed."""
    texts = [path.read_text(errors="replace") for path in sorted(out.glob("output-*.txt"))]
    return "".join(f"\n--- worker {rank}:\n{text[-4000:]}" for rank, text in enumerate(texts))


@contextlib.contextmanager
def started(
    processes: int, out: Path, *arguments: object
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The workers, each the leader of a process group, which is killed in the end."""
    out.mkdir()
    coordinator = f"127.0.0.1:{free_port()}"
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            command = [sys.executable, WORKER, "--coordinator", coordinator, "--out", out]
            command += ["--processes", processes, "--rank", rank, "--limit", LIMIT - 10, *arguments]
            with (out / f"output-{rank}.txt").open("wb") as output:
                worker = subprocess.Popen(
                    [str(part) for part in command],
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            workers.append(worker)
        yield workers
    finally:
        for worker in workers:
            if worker.poll() is None:
                # Not SIGTERM, which jax.distributed catches.
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """One CPU device a process, whatever this process has; and no way around loopback."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(COMPILED) or not name.startswith(("JAX_", "XLA_"))
        if not name.lower().endswith("_proxy")
    }
    paths = filter(None, [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH")])
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items()),
    }
