"""The arguments in the registry do what it says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import METHODS, WRAPPERS, numeric_arguments
from helpers.samples import quick_jit

each_method = pytest.mark.parametrize("method", METHODS + WRAPPERS, ids=str)
SHAPES = {"a": (4, 5), "b": {"c": (6,), "d": (2, 3, 2)}}


def normal(seed, scale=1.0):
    random = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * random.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=is_shape,
    )


@each_method
def test_every_number_is_given_and_may_be_traced(method):
    assert set(method.traced) == numeric_arguments(method) & set(method.arguments)
    missing = numeric_arguments(method) - set(method.arguments)
    assert not missing, f"{missing} are numbers too"


@each_method
def test_needs_are_as_listed(method):
    transform, params, gradient = method.build(), normal(0), normal(1)
    state = transform.init(params)

    def update(state, params):
        return jax.eval_shape(transform.update, gradient, state, params)

    if method.needs_params:
        with pytest.raises(ValueError, match="params"):
            update(state, None)
    else:
        update(state, None)
    if method.has_memory and method not in WRAPPERS:
        with pytest.raises(ValueError, match="needs its state"):
            update(None, params)


@each_method
def test_a_large_gradient_is_clipped_and_a_small_one_is_not(method):
    transform, params = method.build(), normal(0)
    update, state = quick_jit(transform.update), transform.init(params)
    usual = 1e-3 if method.has_memory else 1.0
    for seed in range(50 if method.has_memory else 0):
        _, state = update(normal(10 + seed, usual), state, params)
    large, small = normal(1), normal(1, 1e-3 * usual)
    updates, _ = update(large, state, params)
    shorter = optax.tree.norm(updates) < 0.999 * optax.tree.norm(large)
    assert bool(shorter) == (method.name != "measure_norms")
    updates, _ = update(small, state, params)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), updates, small)
    assert all(jax.tree.leaves(same)) == method.hard
