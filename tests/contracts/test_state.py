"""Contracts 8 and 11: a state that keeps its form, in one program that asks nothing of the host.

What a state must survive outside a program, in a checkpoint, is in `test_resume.py`; what any clip
can be asked for, in `test_public_suite.py`.
"""

import inspect
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from helpers.samples import (
    ALL_METHODS,
    assert_close,
    assert_same,
    canceled,
    detailed,
    gradient,
    once_a_method,
    quick_jit,
    sample_parameters,
    shapes_of,
    stacked,
    unstacked,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

SPECS = {
    "attention": {"kernel": P("model", "data"), "query": P(None, None, "data")},
    "bias": P("data"),
    "scale": P(),
}
SCALES = (1.0, 1e-3, 0.0, float("nan"), 1e25, 1.0)
"""Steps that are clipped, not clipped, zero, non-finite, beyond the plain sum of squares."""

pytestmark = pytest.mark.usefixtures("strict")

each_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
each_mesh = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


class Programs(NamedTuple):
    """A method's transformation, and programs with it for the trees of `samples`, "mixed" kind.

    Attributes:
        run: (arguments, gradients) -> (updates, state): a run from a fresh state, by `scan`.
        jitted_run: The same, jitted.
        arguments: The arguments of the registry that may be traced.
    """

    run: Any
    jitted_run: Any
    arguments: dict[str, Any]


@once_a_method
def programs_of(method):
    params = sample_parameters("mixed")
    signature = inspect.signature(method.factory).parameters

    def run(arguments, gradients):
        traced = detailed(method, **arguments)

        def body(state, updates):
            updates, state = traced.update(updates, state, params)
            return state, updates

        state, updates = jax.lax.scan(body, traced.init(params), gradients)
        return updates, state

    return Programs(
        run,
        quick_jit(run),
        {name: method.arguments.get(name, signature[name].default) for name in method.traced},
    )


def strong(numbers):
    """Python numbers as arrays that are not weakly typed."""
    return {
        name: jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32)
        for name, x in numbers.items()
    }


def gradients_of(scales, start=0):
    return [gradient("mixed", start + place, scale) for place, scale in enumerate(scales)]


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def on_mesh(tree, axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS)


def types_of(tree):
    """Structure, and of every leaf shape, dtype and weakness of type."""
    return jax.tree.structure(tree), [jax.typeof(x) for x in jax.tree.leaves(tree)]


@each_method
@each_mesh
def test_every_way_to_a_fresh_state_gives_the_same_one(method, axis_type):
    transform, params = detailed(method), on_mesh(sample_parameters("mixed"), axis_type)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    state = transform.init(params)
    from_shapes = transform.init(shapes)
    with jax.set_mesh(params["scale"].sharding.mesh):  # Where JAX places what comes from nothing.
        from_program = quick_jit(transform.init)(params)
    for other in (from_shapes, from_program):
        assert_same(other, state)
        for there, here in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            if here.sharding.is_fully_replicated:  # XLA places what lies as the parameters do.
                assert jax.typeof(there) == jax.typeof(here)
                assert there.sharding == here.sharding


@each_method
@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit])
def test_no_two_leaves_of_a_fresh_state_share_a_buffer(method, axis_type):
    params = sample_parameters() if axis_type is None else on_mesh(sample_parameters(), axis_type)
    assert_distinct((params, detailed(method).init(params)))


def assert_distinct(tree):
    """Donated, a buffer that two leaves share would be given away twice."""
    buffers = [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
    ]
    assert len(set(buffers)) == len(buffers)


@each_method
def test_vmap_over_arguments_states_and_gradients_is_a_loop(method):
    programs = programs_of(method)
    given = programs.arguments
    rows = [given, given] + [{**given, name: type(x)(x * 0.8)} for name, x in given.items()]
    rows = [strong(row) for row in rows]
    scales = itertools.cycle([SCALES, (3.0, 1e-3, 1.0) * 2])
    runs = [stacked(gradients_of(next(scales), start=10 * place)) for place in range(len(rows))]
    batch = quick_jit(jax.vmap(programs.run))(stacked(rows), stacked(runs))
    for place, (row, gradients) in enumerate(zip(rows, runs, strict=True)):
        alone = programs.jitted_run(row, gradients)
        assert_close(unstacked(batch, place), alone, atol=canceled(method))


@each_method
def test_without_a_state_a_clip_starts_afresh_or_says_what_is_missing(method):
    transform, params, updates = detailed(method), sample_parameters()["bias"], gradient()["bias"]
    fresh = transform.update(updates, transform.init(params), params)
    assert_distinct(fresh[1])
    if method.has_memory:
        with pytest.raises(ValueError, match=r"needs its state: .*init\(params\)"):
            transform.update(updates, None, params)
    else:
        assert_same(transform.update(updates, None, params), fresh)


@each_method
def test_outside_jit_later_steps_compile_nothing(method):
    transform, params = method.build(), sample_parameters()["bias"]
    state, compiled = transform.init(params), []

    def listen(event, duration, **details):
        compiled.extend([event] * ("backend_compile" in event))

    def two_steps(state):
        for seed, scale in enumerate((1.0, 1e-3)):
            _, state = transform.update(gradient(seed=seed, scale=scale)["bias"], state, params)
        return state

    state = two_steps(state)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        two_steps(state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@each_method
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_parameters_and_gradients_of_any_two_types(method, promotion):
    """In 64 bits too: a step gives the gradient's types and keeps those of the state."""
    real, complex_ = (jnp.bfloat16, jnp.float32, jnp.float64), (jnp.complex64, jnp.complex128)
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        for kinds in (real, complex_):
            for of_params, of_updates in itertools.product(kinds, kinds):
                transform, shape = method.build(), (3, 2)
                params = {"a": jnp.ones(shape, of_params)}
                gradient = {"a": jnp.ones(shape, of_updates)}
                state = transform.init(params)
                updates, after = jax.eval_shape(transform.update, gradient, state, params)
                assert updates["a"].dtype == of_updates
                assert shapes_of(after) == shapes_of(state)


@each_method
def test_a_derivative_through_several_steps_is_finite(method):
    """As a learned optimizer or a hypergradient takes it; also where gradients are equal or 0."""
    transform, params = method.build(), {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}

    def loss(gradient):
        def step(state, size):
            given = jax.tree.map(lambda x: x * size, gradient)
            updates, state = transform.update(given, state, params)
            return state, sum(jnp.sum(x) for x in jax.tree.leaves(updates))

        sizes = jnp.array([1.0, 2.0, 3.0, 1.0])
        return jnp.sum(jax.lax.scan(step, transform.init(params), sizes)[1])

    slope = quick_jit(jax.grad(loss))
    for size in (0.0, 0.3):
        found = slope(jax.tree.map(lambda x, size=size: size * x, params))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found)), size


@each_method
def test_nothing_makes_a_nan_on_its_way(method):
    """`jax_debug_nans` stops at the first, with every operation by itself too."""
    transform, params = method.build(), {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.debug_nans(True):
        for gradients in ((zero, params, params), (params, zero)):
            state = transform.init(params)
            for gradient in gradients:
                _, state = transform.update(gradient, state, params)
        _, state = transform.update({}, transform.init({}), {})
    assert not any(np.any(np.isnan(x)) for x in optclip.metrics(state).values())


@each_method
def test_a_state_of_another_kind_is_refused_with_the_way(method):
    transform, params = method.build(), sample_parameters()["bias"]
    state, updates = transform.init(params), gradient()["bias"]
    restored = (
        optax.EmptyState(),
        serialization.to_state_dict(state),
        jax.tree.leaves(state),
        tuple(state),
    )
    for wrong in restored:
        kinds = f"expected a {type(state).__name__} as state, got {type(wrong).__name__}"
        with pytest.raises(ValueError, match=rf"{kinds}.*init\(params\)"):
            transform.update(updates, wrong, params)


def test_a_state_of_another_size_is_refused_with_both():
    params, fewer = {"a": jnp.ones(3), "b": jnp.ones(2)}, {"a": jnp.ones(3)}
    window = optclip.clip_by_window
    for transform, state, sizes in (
        (optclip.adagc(), optclip.adagc().init(fewer), r"\(1,\).*\(2,\)"),
        (optclip.spam_clip(), optclip.spam_clip().init(fewer), r"\(3,\)\].*\(3,\), \(2,\)"),
        (window(window=8), window(window=16).init(params), r"\(16,\).*\(8,\)"),
        (
            optclip.skip_spikes(optax.sgd(0.1), window=8),
            optclip.skip_spikes(optax.sgd(0.1), window=16).init(params),
            r"\(16,\).*\(8,\)",
        ),
        (optclip.robust_clip(), optclip.zclip().init(params), "Spread.*expected Level"),
        (optclip.robust_clip(), optclip.clip_by_global_norm(1.0).init(params), "expected Level"),
    ):
        with pytest.raises(ValueError, match=rf"{sizes}.*init\(params\)"):
            transform.update(params, state, params)
    with pytest.raises(ValueError, match=r"without detail=True.*with it"):
        optclip.clip_by_global_norm(1.0, detail=True).update(
            params, optclip.clip_by_global_norm(1.0).init(params)
        )
