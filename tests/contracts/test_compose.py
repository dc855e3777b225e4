"""Contract 9: every method composes with Optax's wrappers and Flax's optimizers.

Whatever a clip is nested in must hand on what the clip alone gives, and let `metrics` find its
readings. The clips are followed by a factor of -1/2, which is exact in every dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.registry import Method
from helpers.samples import (
    ALL_METHODS,
    assert_close,
    assert_same,
    gradient,
    once_a_method,
    quick_jit,
    sample_parameters,
)

import optclip

CLIP = {"norm", "threshold", "factor", "clip_rate", "clipped_norm", "nonfinite_steps"}
SKIP = {"skip/skipped_steps", "skip/skipping"}

each_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)


def pair(tree):
    """A bfloat16 and a float32 leaf, in two groups by first letter."""
    return {"a": tree["attention"]["kernel"], "b": tree["attention"]["query"]}


PARAMS = pair(sample_parameters("mixed"))
GRADIENTS = [pair(gradient("mixed", seed)) for seed in range(2)]


class Alone(NamedTuple):
    """A method run by itself over `GRADIENTS`.

    Attributes:
        method: The method.
        transform: Its transformation.
        updates: -1/2 times what it gives at each step.
        readings: The readings after each step.
    """

    method: Method
    transform: optax.GradientTransformationExtraArgs
    updates: list[Any]
    readings: list[dict[str, jax.Array]]


def run(optimizer, params=PARAMS, gradients=GRADIENTS, times=1):
    """Updates and readings of each step, `metrics` being called inside the jitted step."""

    @quick_jit
    def step(updates, state):
        updates, state = optimizer.update(updates, state, params, value=jnp.float32(1))
        return updates, state, optclip.metrics(state)

    state, all_updates, all_readings = optimizer.init(params), [], []
    for updates in gradients:
        for _ in range(times):
            changed, state, readings = step(updates, state)
        all_updates.append(changed)
        all_readings.append(readings)
    assert step._cache_size() == 1
    assert_same(optclip.metrics(state), readings)
    return all_updates, all_readings


@once_a_method
def alone(method):
    transform = method.build()
    updates, readings = run(transform)
    assert set(readings[0]) >= {f"clip/{name}" for name in CLIP} or set(readings[0]) >= SKIP
    assert all(reading.shape == () for reading in readings[0].values())
    return Alone(method, transform, jax.tree.map(lambda x: -x / 2, updates), readings)


@each_method
def test_several_clips_are_numbered_in_the_order_of_the_chain(method):
    optimizer = optax.named_chain(
        ("before", optclip.measure_norms()),
        ("clip", optax.chain(optax.identity(), method.build())),
        ("sgd", optax.sgd(0.5)),
        ("after", optclip.measure_norms()),
    )
    updates, readings = run(optimizer)
    assert_close(updates, alone(method).updates)
    one_clip = [key.split("/")[-1] for key in readings[0] if key.startswith("clip/0/")]
    for at_step, by_itself, before, after in zip(
        readings, alone(method).readings, GRADIENTS, alone(method).updates, strict=True
    ):
        numbered = {key.replace("clip/", "clip/1/"): x for key, x in by_itself.items()}
        last = 2 if "clip/norm" in by_itself else 1  # `skip_spikes` itself is no clip.
        ends = {f"clip/{place}/{key}" for place in (0, last) for key in one_clip}
        assert set(at_step) == set(numbered) | ends
        assert_close({key: at_step[key] for key in numbered}, numbered)
        np.testing.assert_allclose(at_step["clip/0/norm"], euclidean(before), rtol=1e-6)
        np.testing.assert_allclose(at_step[f"clip/{last}/norm"], euclidean(after), rtol=1e-6)


def euclidean(tree):
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    return np.linalg.norm(flat)


def injected(method, **arguments):
    """The method under `inject_hyperparams`, with all that is no number kept out of it."""
    arguments = {**method.arguments, **arguments}
    static = set(method.arguments) - set(method.traced)
    return optax.inject_hyperparams(method.factory, static_args=static)(**arguments)


@each_method
def test_injected_numbers_and_schedules_are_those_numbers(method):
    numbers = injected(method)
    state = numbers.init(PARAMS)
    assert set(state.hyperparams) >= set(method.traced)
    step = quick_jit(numbers.update)
    for updates, expected in zip(GRADIENTS, alone(method).updates, strict=True):
        updates, state = step(updates, state, PARAMS)
        assert_same(jax.tree.map(lambda x: -x / 2, updates), expected)

    # `init` is read once, before any step, so a schedule of it has no later values.
    scheduled_names = set(method.traced) - {"init"}
    schedules = {name: falling(state.hyperparams[name]) for name in scheduled_names}
    scheduled = injected(method, **schedules)
    start = {name: schedule(0) for name, schedule in schedules.items()}
    by_schedule, by_hand = scheduled.init(PARAMS), injected(method, **start).init(PARAMS)
    scheduled_step = quick_jit(scheduled.update)
    for count, updates in enumerate(GRADIENTS):
        now = {name: schedule(count) for name, schedule in schedules.items()}
        by_hand = by_hand._replace(hyperparams={**by_hand.hyperparams, **now})
        expected, by_hand = step(updates, by_hand, PARAMS)
        updates, by_schedule = scheduled_step(updates, by_schedule, PARAMS)
        assert_same(updates, expected)
        assert_same(optclip.metrics(by_schedule), optclip.metrics(by_hand))
    assert step._cache_size() == 1


def falling(value):
    """A schedule that halves a number at each step, and keeps its type."""
    if value.dtype == jnp.int32:
        return lambda count: value // 2 ** (count + 1)
    return lambda count: (value * 0.5 ** (count + 1.0)).astype(value.dtype)


@each_method
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "mixed"])
def test_injection_keeps_types_in_half_precision(method, kind):
    params, updates = pair(sample_parameters(kind)), pair(gradient(kind))
    transform = injected(method)
    state = transform.init(params)
    changed, new = jax.eval_shape(transform.update, updates, state, params)
    for after, before in ((changed, updates), (new.inner_state, state.inner_state)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), before
        )


@once_a_method
def trained(method):
    """Optimizer, and what it makes of the parameters in a loop in plain Optax, with readings."""
    optimizer = optax.chain(method.build(), optax.sgd(0.5))

    @quick_jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optclip.metrics(state)

    params, state, steps = PARAMS, optimizer.init(PARAMS), []
    for grads in GRADIENTS:
        params, state, readings = step(params, state, grads)
        steps.append((params, readings))
    return optimizer, steps


@each_method
def test_linen_train_state(method):
    optimizer, steps = trained(method)
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=optimizer)

    @quick_jit
    def step(train_state, grads):
        train_state = train_state.apply_gradients(grads=grads)
        return train_state, optclip.metrics(train_state.opt_state)

    for grads, expected in zip(GRADIENTS, steps, strict=True):
        train_state, readings = step(train_state, grads)
        assert_close((train_state.params, readings), expected)


class Model(nnx.Module):
    def __init__(self, params):
        self.a, self.b = nnx.Param(params["a"]), nnx.Param(params["b"])


@each_method
def test_nnx_optimizer(method):
    optimizer, steps = trained(method)
    model = Model(PARAMS)
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    graph, variables = nnx.split((model, optimizer))

    @quick_jit
    def step(variables, wanted):
        model, optimizer = nnx.merge(graph, variables)

        def loss(model):  # Its gradient is `wanted`.
            products = [
                jnp.sum(param[...].astype(jnp.float32) * grad.astype(jnp.float32))
                for param, grad in ((model.a, wanted["a"]), (model.b, wanted["b"]))
            ]
            return sum(products)

        optimizer.update(model, nnx.grad(loss)(model), value=jnp.float32(1))
        return nnx.state((model, optimizer)), optclip.metrics(optimizer.opt_state)

    for grads, expected in zip(GRADIENTS, steps, strict=True):
        variables, readings = step(variables, grads)
        nnx.update((model, optimizer), variables)
        assert_close(({"a": model.a[...], "b": model.b[...]}, readings), expected)
        assert_same(optclip.metrics(optimizer.opt_state), readings)


def test_one_norm_for_all_parts_of_a_partition_is_measured_before_it():
    gradients = {"a": jnp.full(3, 2.0), "b": jnp.full(4, 1.0)}  # Norms 12^(1/2), 2; together 4.

    def parts(*clip):
        slow, fast = optax.chain(*clip, optax.sgd(0.5)), optax.chain(*clip, optax.sgd(2.0))
        return optax.partition({"x": slow, "y": fast}, {"a": "x", "b": "y"})

    before = optax.chain(optclip.clip_by_group_norm(1.0, lambda path: "all"), parts())
    (updates,), (readings,) = run(before, gradients, [gradients])
    np.testing.assert_allclose(updates["a"], -0.5 * 2 / 4, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -2.0 * 1 / 4, rtol=1e-6)
    assert float(readings["clip/norm"]) == 4
    assert float(readings["clip/clip_rate"]) == 1

    inside = parts(optclip.clip_by_group_norm(1.0, lambda path: "all"))
    (updates,), (readings,) = run(inside, gradients, [gradients])
    np.testing.assert_allclose(updates["a"], -0.5 * 2 / 12**0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -2.0 * 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(readings["clip/0/norm"], 12**0.5, rtol=1e-6)
    assert float(readings["clip/1/norm"]) == 2


def test_a_state_without_a_clip_has_no_readings():
    assert optclip.metrics(optax.adam(0.1).init(PARAMS)) == {}


@each_method
def test_what_people_look_up_in_optax_is_not_found_in_ours(method):
    """`optax.tree.get(state, "count")` finds Adam's alone, and setting it leaves a clip's alone."""
    looked_up = ("count", "mu", "nu", "learning_rate", "hyperparams", "trace", "notfinite_count")
    transform = method.build()
    state = transform.init(PARAMS)
    state = quick_jit(transform.update)(GRADIENTS[0], state, PARAMS)[1]
    if hasattr(state, "inner_state"):
        state = state._replace(inner_state=())  # What an optimizer in it has is not ours.
    for name in looked_up:
        assert not optax.tree.get_all_with_path(state, name), name
    both = (state, optax.adam(0.1).init(PARAMS))
    assert int(optax.tree.get(both, "count")) == 0
    assert_same(optax.tree.set(both, count=7)[0], state)
