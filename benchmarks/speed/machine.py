"""The machine: what it is, and how fast its memory is.

The bandwidth is that of STREAM's copy (c = a) and triad (c = a + s b), counting what is read and
written; a float32 array has 128 MiB, far beyond every cache. The results take the memory of a
donated array, as parameters do: fresh memory would cost the operating system's work too.
"""

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import optax

import optclip
from benchmarks.speed import race

ENTRIES = 2**25
REPEATS = 15


def description(device: Any) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "optax": optax.__version__,
        "optclip": optclip.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def bandwidth(entries: int, repeats: int = REPEATS) -> dict[str, float]:
    """Bytes a second of copy and of triad, the median over the repeats."""
    scalar = jnp.float32(3)
    a, b = (jnp.full(entries, value, jnp.float32) for value in (1, 2))
    copy = _into(lambda a, b: a)
    triad = _into(lambda a, b: a + scalar * b)
    result = {}
    for name, program, arrays in (("copy", copy, 2), ("triad", triad, 3)):
        target = jnp.zeros(entries, jnp.float32)
        seconds = []
        for _ in range(race.WARM_UP + repeats):
            start = time.perf_counter()
            target = jax.block_until_ready(program(target, a, b))
            seconds.append(time.perf_counter() - start)
        result[name] = arrays * 4 * entries / race.median(seconds[race.WARM_UP :])
    return result


def _into(compute: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """Jitted, its result in the memory of the first argument."""

    def program(target: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        del target
        return compute(a, b)

    return jax.jit(program, donate_argnums=0, keep_unused=True)


def _processor() -> str:
    """Its name; that of the architecture where the system does not tell."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
