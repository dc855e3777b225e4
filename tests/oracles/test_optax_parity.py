"""A drop-in for Optax: its own tests pass, signatures agree, and so do the numbers."""

import functools
import importlib.util
import inspect
import pathlib
import types
import unittest

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.samples import quick_jit
from optax.transforms import _clipping as optax_clipping

import optclip

SAME_NAME = {
    "clip": optclip.clip_by_value,
    "clip_by_block_rms": optclip.clip_by_block_rms,
    "clip_by_global_norm": optclip.clip_by_global_norm,
    "adaptive_grad_clip": optclip.adaptive_grad_clip,
}
"""Ours by the name of Optax's; its `clip` is called here by the name of what it does."""

AGC = "adaptive_grad_clip"
NUMBERS = {
    "clip": [{"max_delta": value} for value in (0.0, 0.3, 2.0, 1e3)],
    "clip_by_block_rms": [{"threshold": value} for value in (0.1, 0.9, 1.1, 1e3)],
    "clip_by_global_norm": [{"max_norm": value} for value in (0.0, 0.5, 20.0, 1e3)],
    AGC: [{"clipping": c, "eps": e} for c in (0.01, 0.5) for e in (1e-3, 2.0)],
}


def passed_tests(**swapped):
    """The names of Optax's own tests of clipping that pass, with some functions swapped."""
    file = pathlib.Path(optax_clipping.__file__).with_name("_clipping_test.py")
    spec = importlib.util.spec_from_file_location("optax_clipping_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._clipping = types.SimpleNamespace(**{**vars(optax_clipping), **swapped})
    names = unittest.defaultTestLoader.getTestCaseNames(module.ClippingTest)
    return {name for name in names if module.ClippingTest(name).run().wasSuccessful()}


def test_optax_s_own_tests_pass():
    with_optax, with_optclip = passed_tests(), passed_tests(**SAME_NAME)
    assert len(with_optax) >= 8  # One fails with Optax itself on some CPUs, by rounding.
    assert with_optclip >= with_optax


def test_the_swap_is_one():
    """The test above would notice a clip that does not clip."""
    broken = passed_tests(**dict.fromkeys(SAME_NAME, lambda *args, **kwargs: optax.identity()))
    assert not broken & {f"test_{name}" for name in SAME_NAME}


@pytest.mark.parametrize("name", SAME_NAME)
def test_signatures_begin_with_optax_s(name):
    theirs = inspect.signature(getattr(optax, name)).parameters.values()
    ours = list(inspect.signature(SAME_NAME[name]).parameters.values())
    for place, argument in enumerate(theirs):
        assert (ours[place].name, ours[place].kind) == (argument.name, argument.kind)
        assert ours[place].default == argument.default
    assert all(extra.kind is extra.KEYWORD_ONLY for extra in ours[len(theirs) :])


def random_trees(seed, rank):
    """Updates of two magnitudes, and parameters, of ranks from `rank` to 5."""
    random = np.random.default_rng(seed)
    shapes = [(), (1,), (7,), (5, 3), (1, 6), (2, 3, 4), (3, 3, 2, 4), (2, 1, 2, 3, 2)]
    shapes = [shape for shape in shapes if len(shape) >= rank and random.random() < 0.8]
    return [
        [jnp.asarray(scale * random.normal(size=shape), jnp.float32) for shape in shapes]
        for scale in (1.0, 10.0 ** random.integers(-3, 3), 1.0)
    ]


@pytest.mark.parametrize(("name", "axis"), [(name, None) for name in SAME_NAME] + [(AGC, -1)])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_optax_s(name, axis, seed, strict):
    *gradients, params = random_trees(seed, rank=0 if axis is None else 1)
    static = {} if axis is None else {"axis": axis}

    @functools.partial(quick_jit, static_argnums=0)
    def clipped(function, arguments, updates, params):
        transform = function(**arguments, **static)
        return transform.update(updates, transform.init(params), params)[0]

    for arguments in NUMBERS[name]:
        for updates in gradients:
            ours = clipped(SAME_NAME[name], arguments, updates, params)
            theirs = clipped(getattr(optax, name), arguments, updates, params)
            for our, their in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(our, their, rtol=2e-6, atol=0)
