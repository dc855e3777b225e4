"""`skip_spikes` and `safeguard`: what is skipped, what is left alone, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.samples import quick_jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optclip

AS_ONE = 1.2**0.5
"""How far all of `PARAMS` move where each leaf moves as far as it may, over the norm of the kernel:
3 of the 15 entries are a bias that is zero, and counts as large as the others are."""

PARAMS = {"kernel": np.full((4, 3), 0.5, np.float32), "bias": np.zeros(3, np.float32)}


def gradients(steps, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield {
            name: (scale * rng.normal(size=x.shape)).astype(x.dtype) for name, x in PARAMS.items()
        }


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


def warmed_up(optimizer, steps=60):
    update, state = quick_jit(optimizer.update), optimizer.init(PARAMS)
    for gradient in gradients(steps):
        _, state = update(gradient, state, PARAMS)
    return update, state


def is_zero(updates):
    return all(not np.any(np.asarray(x)) for x in jax.tree.leaves(updates))


def bad(value):
    gradient = next(gradients(1, seed=7))
    gradient["kernel"][1, 2] = value
    return gradient


INNERS = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(1e-3, 1e-4, 100)),
    "momentum": lambda: optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)),
}


@pytest.mark.parametrize("name", INNERS)
def test_a_spike_leaves_the_inner_state_untouched(name):
    update, state = warmed_up(optclip.skip_spikes(INNERS[name]()))
    updates, after = update(next(gradients(1, scale=1000.0)), state, PARAMS)
    assert is_zero(updates)
    assert equal(after.inner_state, state.inner_state)
    readings = optclip.metrics(after)
    assert int(readings["skip/skipped_steps"]) == 1
    assert bool(readings["skip/skipping"])
    updates, _ = update(next(gradients(1, seed=3)), after, PARAMS)
    assert not is_zero(updates)


@pytest.mark.parametrize("wrapper", [optclip.skip_spikes, optclip.safeguard])
@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_step_is_skipped_for_as_long_as_it_lasts(wrapper, name, value):
    update, state = warmed_up(wrapper(INNERS[name]()))
    after = state
    for step in range(1, 50):
        updates, after = update(bad(value), after, PARAMS)
        assert is_zero(updates)
        assert int(optclip.metrics(after)["skip/skipped_steps"]) == step
    assert equal(after.inner_state, state.inner_state)
    # And the next ordinary step is what it would have been.
    ordinary = next(gradients(1, seed=5))
    ours, without = update(ordinary, after, PARAMS), update(ordinary, state, PARAMS)
    assert equal(ours[0], without[0])
    assert equal(ours[1].inner_state, without[1].inner_state)


@pytest.mark.parametrize("wrapper", [optclip.skip_spikes, optclip.safeguard])
def test_propagate_hands_nonfinite_gradients_to_the_inner_optimizer(wrapper):
    update, state = warmed_up(wrapper(optax.sgd(0.1), nonfinite="propagate"))
    updates, after = update(bad(np.nan), state, PARAMS)
    assert np.isnan(updates["kernel"][1, 2])
    assert int(optclip.metrics(after)["skip/skipped_steps"]) == 0


def test_a_lasting_rise_is_accepted_after_patience():
    update, state = warmed_up(optclip.skip_spikes(optax.sgd(0.1), patience=7), steps=150)
    skipped = []
    for gradient in gradients(60, seed=1, scale=50.0):
        updates, state = update(gradient, state, PARAMS)
        skipped.append(is_zero(updates))
    assert skipped == [True] * 6 + [False] * 54
    # The new level guards as the old one did.
    updates, _ = update(next(gradients(1, scale=50_000.0)), state, PARAMS)
    assert is_zero(updates)


def test_two_spikes_close_together_are_both_skipped():
    update, state = warmed_up(optclip.skip_spikes(optax.sgd(0.1)), steps=150)
    for scale in (100.0, 1.0, 1.0, 20.0):
        updates, state = update(next(gradients(1, seed=2, scale=scale)), state, PARAMS)
        assert is_zero(updates) == (scale > 1)


def test_a_spike_of_the_loss_is_skipped_where_it_is_passed():
    optimizer = optclip.skip_spikes(optax.sgd(0.1))
    update, state = quick_jit(optimizer.update), optimizer.init(PARAMS)
    rng = np.random.default_rng(0)
    for gradient in gradients(60):
        _, state = update(gradient, state, PARAMS, loss=np.float32(2 + 0.1 * rng.normal()))
    ordinary = next(gradients(1, seed=4))
    assert is_zero(update(ordinary, state, PARAMS, loss=np.float32(9.0))[0])
    assert is_zero(update(ordinary, state, PARAMS, loss=np.float32(np.nan))[0])
    assert not is_zero(update(ordinary, state, PARAMS, loss=np.float32(2.1))[0])
    assert update._cache_size() == 1


@pytest.mark.parametrize("loss", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_is_skipped_before_there_are_many(loss):
    optimizer = optclip.skip_spikes(optax.sgd(0.1))
    update, state = quick_jit(optimizer.update), optimizer.init(PARAMS)
    first, *rest = gradients(40)
    updates, state = update(first, state, PARAMS, loss=np.float32(loss))
    assert is_zero(updates)
    assert int(state.skipped_steps) == int(state.nonfinite_steps) == 1
    assert int(state.losses.seen) == int(state.norms.seen) == 0
    for gradient in rest:
        updates, state = update(gradient, state, PARAMS, loss=np.float32(2.0))
        assert not is_zero(updates)
    updates, _ = update(first, state, PARAMS, loss=np.float32(5.0))
    assert is_zero(updates)


def test_a_schedule_waits_while_steps_are_skipped_as_that_of_the_learning_rate_does():
    rate = lambda count: 1e6 * 0.5**count  # noqa: E731
    optimizer = optclip.safeguard(optax.sgd(rate), ratio=lambda count: 0.01 * (1 + count))
    update, state = quick_jit(optimizer.update), optimizer.init(PARAMS)
    read = []
    for scale in (1.0, np.nan, 1.0, np.nan, np.nan, 1.0):
        _, state = update(next(gradients(1, scale=scale)), state, PARAMS)
        read.append(float(optclip.metrics(state)["bound/update_ratio"]))
    # The bias, which is zero, may move as the kernel does. And where every step asks for far too
    # much, the bound falls.
    right = (
        np.array([0.01, 0, 0.02, 0, 0, 0.03])
        * AS_ONE
        / np.sqrt(1 + np.array([0, 1, 1, 2, 2, 2]) / 400)
    )
    np.testing.assert_allclose(read, right, rtol=1e-5)
    assert int(state.skipped_steps) == 3


def test_readings_of_a_clip_inside_safeguard_come_after_its_own():
    inner = optax.chain(optclip.clip_by_global_norm(0.5), optax.sgd(0.1))
    update, state = warmed_up(optclip.safeguard(inner))
    spike = next(gradients(1, scale=1000.0))
    _, state = update(spike, state, PARAMS)
    read = {name: float(x) for name, x in optclip.metrics(state).items()}
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in spike.values()))
    np.testing.assert_allclose(read["clip/0/norm"], norm, rtol=1e-5)
    # What the first leaves is what the second measures; then the learning rate, then the bound.
    np.testing.assert_allclose(read["clip/1/norm"], read["clip/0/clipped_norm"], rtol=1e-5)
    np.testing.assert_allclose(read["clip/1/clipped_norm"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(read["bound/norm"], 0.05, rtol=1e-5)
    assert (
        read["clip/0/norm"] > read["clip/1/norm"] > read["bound/norm"] >= read["bound/clipped_norm"]
    )


def test_the_norm_of_a_skipped_step_is_read_as_it_was():
    optimizer = optclip.skip_spikes(optax.sgd(0.1))
    for value in (np.inf, -np.inf):
        _, state = optimizer.update(bad(value), optimizer.init(PARAMS), PARAMS)
        assert np.isinf(optclip.metrics(state)["skip/norm"])


def test_constant_and_zero_gradients_are_never_spikes():
    optimizer = optclip.skip_spikes(optax.sgd(0.1))
    update, state = quick_jit(optimizer.update), optimizer.init(PARAMS)
    for value in [1.0] * 150 + [0.0] * 150 + [0.1]:
        gradient = jax.tree.map(lambda x, value=value: np.full_like(x, value), PARAMS)
        _, state = update(gradient, state, PARAMS)
    readings = optclip.metrics(state)
    # Only the step up from all zeros stands out, and that is one.
    assert int(readings["skip/skipped_steps"]) <= 1


def test_other_extra_arguments_reach_the_inner_optimizer():
    for wrapper in (optclip.skip_spikes, optclip.safeguard):
        optimizer = wrapper(optax.chain(optax.scale_by_polyak(), optax.scale(1.0)))
        state = optimizer.init(PARAMS)
        updates, _ = optimizer.update(next(gradients(1)), state, PARAMS, value=1.0)
        assert not is_zero(updates)


@pytest.mark.parametrize("wrapper", [optclip.skip_spikes, optclip.safeguard])
def test_state_is_stable_from_init_on(wrapper):
    optimizer = wrapper(optax.adam(1e-3))
    state = optimizer.init(PARAMS)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)

    def body(state, gradient):
        updates, state = optimizer.update(gradient, state, PARAMS)
        return state, updates["bias"]

    stacked = jax.tree.map(lambda *x: np.stack(x), *gradients(30))
    scanned, biases = quick_jit(lambda s, g: jax.lax.scan(body, s, g))(state, stacked)
    update = quick_jit(optimizer.update, donate_argnums=1)
    for gradient, bias in zip(gradients(30), biases, strict=True):
        updates, state = update(gradient, state, PARAMS)
        np.testing.assert_allclose(updates["bias"], bias, rtol=2e-6)
    assert update._cache_size() == 1
    assert jax.tree.structure(state) == jax.tree.structure(scanned)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("wrapper", [optclip.skip_spikes, optclip.safeguard])
def test_on_a_mesh_as_on_one_device(wrapper, kind):
    params = {"kernel": np.full((16, 8), 0.5, np.float32), "bias": np.zeros(8, np.float32)}
    rng = np.random.default_rng(0)
    steps = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)] * 3
    optimizer = wrapper(optax.sgd(0.1))  # Adam's own counters cost a second compilation.
    alone = optimizer.init(params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(AxisType, kind),))
    specs = {"kernel": PartitionSpec("data"), "bias": PartitionSpec()}

    def put(tree):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    update, expected_updates = quick_jit(wrapper(optax.sgd(0.1)).update), []
    for gradient in steps:
        expected, alone = update(gradient, alone, params)
        expected_updates.append(expected)
    with jax.set_mesh(mesh):
        spread = optimizer.init(put(params))
        update = quick_jit(optimizer.update)
        for gradient, expected in zip(steps, expected_updates, strict=True):
            updates, spread = update(put(gradient), spread, put(params))
            for name in params:
                np.testing.assert_allclose(updates[name], expected[name], rtol=2e-6, atol=1e-9)
        assert update._cache_size() == 1
    for name, value in optclip.metrics(alone).items():
        np.testing.assert_allclose(optclip.metrics(spread)[name], value, rtol=2e-6, atol=1e-9)


def test_safeguard_bounds_the_update_and_tells_its_ratio():
    optimizer = optclip.safeguard(optax.sgd(1e6), ratio=0.01)
    update, state = warmed_up(optimizer)
    steps = int(state.bound.steps)
    updates, state = update(next(gradients(1, seed=9)), state, PARAMS)
    fallen = 0.01 / np.sqrt(1 + steps / 400)
    weights = float(np.linalg.norm(PARAMS["kernel"]))
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"]), fallen * weights, rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(updates["bias"]), fallen * weights * (3 / 15) ** 0.5, rtol=1e-5
    )
    readings = optclip.metrics(state)
    np.testing.assert_allclose(readings["bound/update_ratio"], fallen * AS_ONE, rtol=1e-5)
    assert float(readings["bound/clip_rate"]) == 1.0


def test_an_optimizer_that_asks_for_little_more_than_the_bound_is_never_held_below_it():
    optimizer = optclip.safeguard(optax.sgd(1.0), deviations=np.inf)
    update, state = quick_jit(optimizer.update), optimizer.init(PARAMS)
    gradient = {name: 0.05 * x / np.linalg.norm(PARAMS["kernel"]) for name, x in PARAMS.items()}
    gradient["kernel"] = 0.05 * PARAMS["kernel"]
    for _ in range(30):
        _, state = update(gradient, state, PARAMS)
    np.testing.assert_array_equal(state.asked.excess, 0)
    np.testing.assert_allclose(optclip.metrics(state)["bound/factor"], 0.6, rtol=1e-5)


def test_parameters_that_start_at_zero_move():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    optimizer = optclip.safeguard(optax.sgd(0.1))
    updates, _ = optimizer.update(next(gradients(1)), optimizer.init(zeros), zeros)
    entries = sum(x.size for x in zeros.values())
    length = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in updates.values()))
    np.testing.assert_allclose(length, 0.03 * 1e-3 * np.sqrt(entries), rtol=1e-5)


def test_a_spike_does_not_spoil_the_momentum_under_safeguard():
    update, state = warmed_up(optclip.safeguard(optax.sgd(0.01, 0.9), ratio=1e6))
    ordinary = max(float(np.abs(x).max()) for x in jax.tree.leaves(state.inner_state))
    _, after = update(next(gradients(1, scale=1e6)), state, PARAMS)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(after.inner_state)) < 3 * ordinary


def test_settings_may_be_traced():
    gradient = next(gradients(1))

    def ratio_of(ratio, deviations):
        optimizer = optclip.safeguard(optax.sgd(1e6), ratio=ratio, deviations=deviations)
        _, state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
        return optclip.metrics(state)["bound/update_ratio"]

    ratios = jnp.array([0.001, 0.01, 0.1])
    np.testing.assert_allclose(jax.vmap(ratio_of)(ratios, ratios), AS_ONE * ratios, rtol=1e-5)
    injected = optax.inject_hyperparams(optclip.skip_spikes, static_args=("inner", "window"))(
        inner=optax.sgd(0.1), deviations=6.0, patience=20
    )
    updates, _ = injected.update(gradient, injected.init(PARAMS), PARAMS)
    assert not is_zero(updates)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: optclip.skip_spikes(optax.sgd(0.1), window=0), "window"),
        (lambda: optclip.skip_spikes(optax.sgd(0.1), deviations=-1.0), "-1.0"),
        (lambda: optclip.skip_spikes(optax.sgd(0.1), patience=0), "patience"),
        (lambda: optclip.skip_spikes(optax.sgd(0.1), deviations=lambda count: 6.0), "one number"),
        (lambda: optclip.skip_spikes(optax.sgd(0.1), nonfinite="zero"), "'skip'"),
        (lambda: optclip.safeguard(optax.sgd(0.1), ratio=float("nan")), "nan"),
        (lambda: optclip.safeguard(optax.sgd(0.1), nonfinite="zero"), "'skip'"),
    ],
)
def test_concrete_nonsense_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_safeguard_without_parameters_says_so():
    optimizer = optclip.safeguard(optax.sgd(0.1))
    with pytest.raises(ValueError, match="params"):
        optimizer.update(next(gradients(1)), optimizer.init(PARAMS))


def test_after_a_patience_longer_than_its_window_the_last_spikes_fill_the_window():
    optimizer = optclip.skip_spikes(optax.sgd(0.1), window=4, patience=10, deviations=2.0)
    state, update = optimizer.init(jnp.zeros(1)), quick_jit(optimizer.update)
    spikes = [100.0 + place for place in range(10)]
    for size in [1.0, 1.1, 0.9, 1.0, *spikes, 105.0]:
        _, state = update(jnp.full(1, size), state, jnp.zeros(1))
    assert int(state.skipped_steps) == 9
    last = np.array(spikes[-4:])
    np.testing.assert_allclose(state.threshold, last.mean() + 2 * last.std(), rtol=1e-5)
