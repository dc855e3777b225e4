"""Every way to measure that another machine would take, on this one, and under `vmap`.

What XLA makes of them there (kernels, passes, conditionals) is `benchmarks.accelerators`' business.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import METHODS, ONE_OF_EACH_KIND, WRAPPERS
from helpers.running import assert_as_the_oracle, start
from helpers.samples import assert_close, quick_jit
from helpers.strategies import KINDS, TREES, values

import optclip
from benchmarks.speed.work import work_of
from optclip import _numerics, norms, scopes

OTHERS = ("cuda", "tpu")
each_kind = pytest.mark.parametrize(
    "method", [m for m in ONE_OF_EACH_KIND if m not in WRAPPERS], ids=str
)
each_platform = pytest.mark.parametrize("platform", OTHERS)


@pytest.fixture
def forced(monkeypatch, platform):
    monkeypatch.setattr(_numerics, "FORCED_PLATFORM", platform)


@each_platform
@each_kind
def test_2_and_3_are_right_at_every_magnitude(method, platform, forced):
    begin = start(method, "types")
    update = quick_jit(method.build().update)
    for seed, kind in enumerate(KINDS):
        for mixed in ((kind,), (kind, "ordinary")):
            gradient = values(TREES["types"], mixed, seed)
            outcome = begin.oracle.peek(gradient, begin.params)
            updates, state = update(gradient, begin.state, begin.params)
            assert_as_the_oracle(method, begin.state, updates, state, outcome)


CLIPS = {
    f"{norm.name} by {scope.name}": optclip.clip_by(0.5, norm=norm, scope=scope)
    for norm in (norms.l1, norms.l2, norms.rms, norms.linf)
    for scope in (scopes.leaf, scopes.unit())
} | {
    "clip_by_value": optclip.clip_by_value(0.5),
    "clippy": optclip.clippy(),
    "spam_clip": optclip.spam_clip(threshold=0.5, warmup_steps=0),
}


@each_platform
@pytest.mark.parametrize("name", CLIPS)
def test_4_derivatives_are_those_of_a_cpu(name, platform, monkeypatch):
    clip = CLIPS[name]
    ordinary, weights = values(TREES["nested"], seed=3), values(TREES["nested"], seed=4)

    def loss(gradient):
        first = jax.tree.map(lambda u, w: u + w.astype(u.dtype), gradient, weights)
        state = clip.update(first, clip.init(gradient), weights)[1]
        updates, _ = clip.update(gradient, state, weights)
        products = jax.tree.map(lambda u, w: jnp.sum((u * w).real), updates, weights)
        return jax.tree.reduce(jnp.add, products)

    slopes = {}
    for name in ("cpu", platform):
        monkeypatch.setattr(_numerics, "FORCED_PLATFORM", name)
        slopes[name] = quick_jit(lambda gradient: jax.grad(loss)(gradient))
        slopes[name](ordinary)  # Traced here.
    for scale in (1.0, 0.0, 1e30, 1e-30):
        gradient = jax.tree.map(lambda x, scale=scale: (scale * x).astype(x.dtype), ordinary)
        expected = slopes["cpu"](gradient)
        pairs = map(jax.tree.leaves, (slopes[platform](gradient), expected))
        largest = max(np.max(np.abs(x), initial=0) for x in jax.tree.leaves(expected))
        for ours, right in zip(*pairs, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("platform", ["cpu", *OTHERS])
@each_kind
def test_4_a_gradient_that_the_compiler_knows_is_measured_as_any_other(method, platform, forced):
    """Zeros of a part that is frozen: of squares XLA would take out that of a scale, infinity."""
    transform, params = method.build(), {"a": jnp.ones((40, 30)), "b": jnp.ones(3)}
    state = transform.init(params)
    for size in (0.0, 1e-30, 1e30):

        def constant(x, size=size):
            return transform.update({"a": jnp.full((40, 30), size), "b": x}, state, params)

        given = {"a": jnp.full((40, 30), size), "b": jnp.ones(3)}
        expected = quick_jit(transform.update)(given, state, params)
        assert_close(quick_jit(constant)(given["b"]), expected, rtol=1e-5)


def test_a_narrow_matrix_is_added_up_in_stripes():
    with jax.enable_x64(True):
        for shape, axes in (((64, 8), (0,)), ((3, 64, 8), (0, 1)), ((63, 8), (0,)), ((8, 5), (1,))):
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            total = _numerics.sum_in_64_bits(lambda x, scale: x * x, jnp.asarray(x), axes)
            right = np.sum(np.square(x.astype(np.float64)), axis=axes, keepdims=True)
            np.testing.assert_allclose(total, right, rtol=1e-14)


BATCH, SHAPE = 5, (33, 7)


@pytest.mark.parametrize("method", [m for m in METHODS if m.variant == ""], ids=str)
def test_under_vmap_everything_is_measured_once(method):
    """A conditional is a select there, and would measure twice."""
    transform = method.build()
    params = {"a": jnp.ones(SHAPE), "b": jnp.ones(SHAPE)}
    batch = jax.tree.map(lambda x: jnp.ones((BATCH, *x.shape)), params)
    state = transform.init(params)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (BATCH, *jnp.shape(x))), state)

    def reductions(function, size, *args):
        compiled = jax.jit(function).lower(*args).compile()
        return work_of(compiled.as_text(), {size}).reductions

    one = reductions(transform.update, np.prod(SHAPE), params, state, params)
    several = reductions(jax.vmap(transform.update), BATCH * np.prod(SHAPE), batch, states, batch)
    assert several <= one


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_an_example_is_clipped_alike_beside_any_other(inner):
    """The second look that one example needs does no harm to those that do not."""
    for clip in (
        optclip.clip_by_global_norm(1.0),
        optclip.clip_by_leaf_norm(1.0),
        optclip.adaptive_grad_clip(0.1),
        optclip.clip_by_value(0.5),
    ):
        optimizer = optax.chain(clip, inner)
        params = {"w": jnp.ones((4, 3))}
        sizes = jnp.array([1.0, 1e25, 1e-25, 0.0, 3.0])
        gradients = jax.vmap(lambda size: {"w": size * (1 + jnp.arange(12.0).reshape(4, 3))})(sizes)

        @jax.jit
        def step(gradient, optimizer=optimizer, params=params):
            return optimizer.update(gradient, optimizer.init(params), params)

        together = jax.vmap(step)(gradients)
        for place in range(len(sizes)):
            alone = step(jax.tree.map(lambda x, place=place: x[place], gradients))
            for ours, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(ours[place], right, rtol=1e-6)
