"""Eight CPU devices, and strictness around optclip's own code; warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


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
