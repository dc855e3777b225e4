"""Eight CPU devices, strictness around optclip's own code, examples as modules; what runs when.

Warnings are errors.
"""

import fcntl
import importlib
import os
import sys
import warnings
from pathlib import Path
from zlib import crc32

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="of every test with cases one case in N, of each method others; for a second version "
        "of Python or JAX",
    )


def pytest_configure(config):
    """A program is compiled once, for all workers and for the processes that tests start.

    It is kept with what else pytest keeps, in `.pytest_cache`: the next run takes less time.
    """
    if hasattr(config, "cache"):
        kept = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("programs")),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in kept.items():
            jax.config.update(name, value)
        os.environ |= {name.upper(): str(value) for name, value in kept.items()}


def pytest_xdist_auto_num_workers(config):
    """A worker for every core, and none where files are named: starting them takes seconds."""
    named = config.args and all(".py" in arg for arg in config.args)
    return 0 if named else len(os.sched_getaffinity(0))


def pytest_collection_modifyitems(config, items):
    """Tests of one method together, since they share compiled programs; those that time at the end.

    Workers begin with a half of the list each, so every program is compiled by one of them.
    """
    one_in = config.getoption("--sample")
    parts: tuple[list, list] = [], []
    for item in items:
        parts[hasattr(item, "callspec") and crc32(item.name.encode()) % one_in > 0].append(item)
    items[:], left_out = parts
    if left_out:
        config.hook.pytest_deselected(items=left_out)

    def place(item):
        method = getattr(item, "callspec", None) and item.callspec.params.get("method")
        return item.get_closest_marker("timing") is not None, str(method or "")

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """While a test that times runs, no other does, in no worker."""
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("timing") else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture
def strict():
    """Accidental promotions of dtype or rank are errors, for optclip's own code.

    Optax's adam, its schedules and MultiSteps on mixed trees, and Flax's layers raise under it, so
    tests that run them leave it off.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """64-bit types, for the tests of float64 leaves."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def environment():
    """For processes that run an example: eight devices as here, and the programs compiled here."""
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_NUM_CPU_DEVICES": "8"}


@pytest.fixture(scope="module")
def example(request):
    """The test module's SCRIPT as a module: without a process for every call."""
    script = request.module.SCRIPT
    jax.devices()  # before --devices asks for another number of them
    sys.path.insert(0, str(script.parent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(script.stem)
    yield module
    sys.path.remove(str(script.parent))
