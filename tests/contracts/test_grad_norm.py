"""`update(..., grad_norm=n)`: a norm known elsewhere, for clips of the whole gradient alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import WRAPPERS
from helpers.running import clip_state, each, passes_over_leaves
from helpers.samples import (
    assert_close,
    assert_same,
    detailed,
    gradient,
    quick_jit,
    sample_parameters,
)

import optclip

PARAMS = sample_parameters()
BOUNDS = {
    "clip_by_block_rms",
    "clip_by_param_norm",
    "clip_singular_values",
    "clippy",
    "measure_norms",
}
"""They are for after the optimizer too."""


def uses(method):
    return method.scope == "tree" and method.name not in BOUNDS


each_that_uses_it = each(uses)
each_that_ignores_it = each(lambda method: method.name in BOUNDS)
each_that_refuses_it = each(lambda method: not uses(method) and method.name not in BOUNDS)
each_wrapper = pytest.mark.parametrize(
    "method", [method for method in WRAPPERS if method.scope == "tree"], ids=str
)


def steps(method, transform=None, count=40):
    """(gradient, state before, updates, state after) of some steps that measure."""
    transform = method.build() if transform is None else transform
    update, state = quick_jit(transform.update), transform.init(PARAMS)
    for seed in range(count):
        tree = gradient(seed=seed, scale=0.1 if seed < count - 2 else 2.0)
        updates, new = update(tree, state, PARAMS)
        yield tree, state, updates, new
        state = new


@each_that_uses_it
def test_with_the_norm_it_does_what_it_does_by_measuring(method, strict):
    transform = method.build()
    given = quick_jit(lambda n, *args: transform.update(*args, grad_norm=n))
    for tree, state, updates, new in steps(method):
        found, after = given(new.norm, tree, state, PARAMS)
        assert_close(found, updates)
        assert int(after.given_steps) == int(state.given_steps) + 1
        assert_close(after._replace(given_steps=new.given_steps), new)


@each_that_uses_it
def test_nothing_is_measured(method, strict):
    transform, leaf = method.build(), {"leaf": jnp.ones((64, 64))}
    given = functools.partial(transform.update, grad_norm=jnp.float32(1.0))
    assert passes_over_leaves(transform.update, leaf, transform.init(leaf)) > 0
    assert passes_over_leaves(given, leaf, transform.init(leaf)) == 0


@each_that_uses_it
def test_the_norm_decides(method, strict):
    """A part of a gradient is clipped by the norm of the whole."""
    *_, (tree, state, _, _) = steps(method)
    transform = method.build()
    whole, _ = transform.update(tree, state, grad_norm=1e4)
    part = {"bias": tree["bias"]}
    updates, new = transform.update(part, state, grad_norm=jnp.float32(1e4))
    assert_close(updates["bias"], whole["bias"])
    assert float(new.norm) == 1e4
    assert float(new.factor) < 0.5


@each_that_uses_it
@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_what_is_no_norm_is_as_a_gradient_that_is_not_finite(method, norm, nonfinite, strict):
    transform = method.build(nonfinite=nonfinite)
    *_, (tree, _, _, state) = steps(method, transform)
    update = quick_jit(lambda n, *args: transform.update(*args, grad_norm=n))
    updates, new = update(jnp.float32(norm), tree, state)
    assert int(new.nonfinite_steps) == 1
    right = tree if nonfinite == "propagate" else jax.tree.map(jnp.zeros_like, tree)
    assert_same(updates, right)
    assert_same(new.memory, state.memory)


@pytest.mark.parametrize(
    "norm", [4, 4.0, np.float64(4), np.float32(4), jnp.bfloat16(4), jnp.float32(4), np.array(4)]
)
def test_any_number_will_do(norm, strict):
    updates, state = optclip.clip_by_global_norm(1.0).update(jnp.ones(4), None, grad_norm=norm)
    assert_same(updates, jnp.full(4, 0.25))
    assert state.norm.dtype == jnp.float32


def test_a_number_beyond_the_type_is_as_large_as_can_be(strict):
    clip = optclip.clip_by_global_norm(1.0)
    _, state = clip.update(jnp.ones(4), None, grad_norm=1e300)
    assert float(state.norm) == float(jnp.finfo(jnp.float32).max)
    with jax.enable_x64(True):
        updates, state = clip.update(jnp.ones(4, jnp.float64), None, grad_norm=jnp.float32(4))
        assert (state.norm.dtype, updates.dtype) == (jnp.float64, jnp.float64)
        _, state = clip.update(jnp.ones(4, jnp.float32), None, grad_norm=jnp.float64(1e300))
        assert float(state.norm) == float(jnp.finfo(jnp.float32).max)


@pytest.mark.parametrize("norm", [-1.0, "4", True, jnp.ones(2), [4.0], 1j, None.__class__])
def test_nonsense_is_refused_with_the_way(norm):
    clip = optclip.clip_by_global_norm(1.0)
    for optimizer in (clip, optclip.skip_spikes(optax.sgd(0.1)), optclip.safeguard(optax.sgd(0.1))):
        state = optimizer.init(PARAMS)
        with pytest.raises(ValueError, match=r"grad_norm= must be .*leave grad_norm= out"):
            optimizer.update(gradient(), state, PARAMS, grad_norm=norm)


@each_that_refuses_it
def test_a_clip_with_several_norms_refuses_it(method, strict):
    transform = method.build()
    with pytest.raises(ValueError, match=r"a norm for each \w+: .*Leave grad_norm= out"):
        transform.update(gradient(), transform.init(PARAMS), PARAMS, grad_norm=1.0)


@each_that_ignores_it
def test_what_may_stand_after_the_optimizer_ignores_it(method, strict):
    transform = detailed(method)
    given, new = quick_jit(functools.partial(transform.update, grad_norm=1e9)), None
    for tree, state, updates, new in steps(method, transform):
        assert_same(given(tree, state, PARAMS), (updates, new))
    assert int(clip_state(new).given_steps) == 0


def test_details_are_measured_all_the_same(strict):
    clip = optclip.clip_by_global_norm(1.0, detail=True)
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = clip.update(tree, clip.init(tree), grad_norm=10.0)
    read = optclip.metrics(state, tree)
    assert float(read["clip/norm"]) == 10
    assert float(read["clip/norms/b"]) == 4
    assert float(read["clip/clipped_norms/b"]) == pytest.approx(0.4)


def recording(seen):
    def update(updates, state, params=None, **extra_args):
        del params
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@each_wrapper
def test_wrappers_use_it(method):
    """A spike that only the whole shows is caught, and other arguments go on."""
    seen = []
    transform = method.build(inner=recording(seen))
    state = transform.init(PARAMS)
    update = quick_jit(
        lambda n, *args: transform.update(*args, grad_norm=n, value=jnp.float32(2.0))
    )
    for seed in range(40):
        _, state = update(jnp.float32(5.0 + 0.1 * (seed % 3)), gradient(seed=seed), state, PARAMS)
    updates, state = update(jnp.float32(1e4), gradient(seed=41), state, PARAMS)
    read = optclip.metrics(state)
    norm = read["clip/norm"] if "clip/norm" in read else read["skip/norm"]
    assert float(norm) == 1e4
    assert float(optax.tree.norm(updates)) < 0.01 * float(optax.tree.norm(gradient(seed=41)))
    handed_on = {"value", "grad_norm"} if method.name == "skip_spikes" else {"value"}
    assert seen
    assert set(seen[-1]) == handed_on
    assert method.name == "skip_spikes" or not any("grad_norm" in extra for extra in seen)
    _, state = update(jnp.float32(math.nan), gradient(seed=42), state, PARAMS)
    assert bool(optclip.metrics(state)["skip/skipping"])


def test_a_wrapper_that_measures_something_else_hands_it_on():
    inner = optax.chain(optclip.clip_by_global_norm(1.0), optax.scale_by_adam())
    optimizer = optclip.clip_by_adam_rms(inner)
    _, state = optimizer.update(gradient(), optimizer.init(PARAMS), PARAMS, grad_norm=1e9)
    assert float(state.inner_state[0].norm) == 1e9
    assert float(state.clip.norm) < 2


def test_safeguard_counts_and_hides_it():
    """What it hands on is no longer the gradient of that norm."""
    chain = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(1e-3))
    optimizer = optclip.safeguard(chain)
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(gradient(), state, PARAMS, grad_norm=50.0)
    _, state = optimizer.update(gradient(), state, PARAMS)
    read = optclip.metrics(state)
    assert int(read["clip/0/given_steps"]) == 1
    assert int(read["clip/1/given_steps"]) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(0.1)),
        lambda: optax.chain(optclip.robust_clip(), optax.sgd(0.1, momentum=0.9)),
        lambda: optclip.skip_spikes(optax.chain(optclip.zclip(), optax.adam(0.1))),
        lambda: optax.chain(
            optclip.clip_by_global_norm(1.0), optax.adam(0.1), optclip.clip_by_block_rms(1.0)
        ),
    ],
)
def test_two_stages_of_a_pipeline_are_clipped_as_one(make):
    """Each has its own optimizer and its own part, and both the norm of all."""
    stages = (("attention",), ("bias", "scale"))
    update = quick_jit(make().update)

    def cut(tree, names):
        return {name: tree[name] for name in names}

    states = [make().init(cut(PARAMS, names)) for names in stages]
    whole_state = make().init(PARAMS)
    for seed in range(30):
        tree = gradient(seed=seed, scale=30.0 if seed == 25 else 1.0)
        right, whole_state = update(tree, whole_state, PARAMS)
        squares = [optax.tree.norm(cut(tree, names)) ** 2 for names in stages]
        norm, found = jnp.sqrt(squares[0] + squares[1]), {}
        for place, names in enumerate(stages):
            updates, states[place] = update(
                cut(tree, names), states[place], cut(PARAMS, names), grad_norm=norm
            )
            found |= updates
        assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_in_a_scan_and_under_vmap(strict):
    clip = optclip.robust_clip()

    def step(state, norm):
        updates, state = clip.update(jnp.ones(4), state, grad_norm=norm)
        return state, updates

    state, updates = jax.lax.scan(step, clip.init(jnp.ones(4)), jnp.array([2.0, 2.0, 200.0]))
    assert float(updates[2, 0]) < 0.1
    assert int(state.given_steps) == 3
    norms = jnp.array([1.0, 10.0])
    fixed = optclip.clip_by_global_norm(1.0)
    updates = jax.vmap(lambda n: fixed.update(jnp.ones(4), None, grad_norm=n)[0])(norms)
    assert updates[:, 0].tolist() == pytest.approx([1.0, 0.1])
