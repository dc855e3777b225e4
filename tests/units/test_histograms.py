"""What `measure_norms(histogram=True)` counts, against numpy over the list of all norms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.samples import quick_jit

import optclip
from optclip import histograms

SHARES = np.array([0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])


def gradients(count, scale=1.0, seed=0):
    """Gradients of two leaves; the first one's norms spread over four decades."""
    random = np.random.default_rng(seed)
    sizes = scale * 10.0 ** random.uniform(-2, 2, size=count)
    return [
        {"a": jnp.asarray(size * random.normal(size=3), jnp.float32), "b": jnp.full(2, scale / 4)}
        for size in sizes
    ]


def recorded(steps, **arguments):
    recorder = optclip.measure_norms(histogram=True, **arguments)
    state, update = recorder.init(steps[0]), quick_jit(recorder.update)
    for gradient in steps:
        _, state = update(gradient, state)
    return state


def norms_of(steps, names=("a", "b")):
    """In float64; one a step."""
    return np.array(
        [
            math.sqrt(sum(np.sum(np.asarray(step[name], np.float64) ** 2) for name in names))
            for step in steps
        ]
    )


def assert_quantiles(counts, norms):
    expected = np.quantile(norms, SHARES, method="inverted_cdf")
    np.testing.assert_allclose(histograms.quantile(counts, SHARES), expected, rtol=0.02)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_quantiles_are_within_two_percent(scale, strict):
    steps = gradients(300, scale)
    assert_quantiles(recorded(steps).memory.counts, norms_of(steps))


@pytest.mark.parametrize("arguments", [{}, {"scope": optclip.scopes.leaf}])
def test_every_leaf_has_its_own_on_request(arguments, strict):
    steps = gradients(100)
    memory = recorded(steps, detail=True, **arguments).memory
    assert_quantiles(memory.counts, norms_of(steps))
    for row, name in enumerate("ab"):
        assert_quantiles(memory.by_group[row], norms_of(steps, name))


def test_replicas_and_runs_add_up(strict):
    one, other = gradients(60, seed=1), gradients(140, 30.0, seed=2)
    memories = [recorded(steps, detail=True).memory for steps in (one, other)]
    together = histograms.merged(*memories)
    assert_quantiles(together.counts, norms_of(one + other))
    jax.tree.map(np.testing.assert_array_equal, together, recorded(one + other, detail=True).memory)


def test_steps_without_a_size_are_left_out(strict):
    steps = gradients(20)
    strange = [
        jax.tree.map(lambda x, size=size: x * size, steps[0]) for size in (0, np.nan, np.inf)
    ]
    jax.tree.map(
        np.testing.assert_array_equal, recorded(steps + strange).memory, recorded(steps).memory
    )


def test_norms_beyond_the_bins_are_counted_at_the_ends(strict):
    ends = [jnp.full(1, size, jnp.float32) for size in (1e-30, 3e-38, 1e30, 3e38)]
    counts = recorded(ends).memory.counts
    np.testing.assert_array_equal(histograms.quantile(counts, [0.5, 0.51]), [0, np.inf])


def test_the_edges_of_the_bins_are_met_exactly(strict):
    """A norm at the edge of two bins is counted in one of them, and each is within 2%."""
    powers = [2.0**k for k in range(-63, 64)]
    for power in powers[::7]:
        counts = recorded([jnp.full(1, power, jnp.float32)]).memory.counts
        assert int(counts.sum()) == 1
        np.testing.assert_allclose(histograms.quantile(counts, 0.5), power, rtol=0.02)


def test_a_histogram_of_nothing_has_no_quantiles_and_a_share_is_a_share():
    empty = optclip.measure_norms(histogram=True).init(jnp.zeros(2)).memory
    assert np.isnan(histograms.quantile(empty, 0.5))
    for wrong in (1.5, -0.1, np.nan, [0.5, 90]):
        with pytest.raises(ValueError, match=r"share in \[0, 1\].*pass 0.9"):
            histograms.quantile(empty.counts, wrong)


def test_a_histogram_for_every_unit_is_refused():
    units = {"scope": optclip.scopes.unit(), "histogram": True}
    with pytest.raises(ValueError, match=r"9.2 kB for every single unit.*scopes.leaf"):
        optclip.measure_norms(**units, detail=True)
    state = optclip.measure_norms(**units).init(jnp.ones((3, 4)))
    assert state.memory.by_group == ()


def test_what_is_no_histogram_is_refused():
    optimizer = optax.chain(optclip.measure_norms(histogram=True), optax.sgd(0.1))
    state = optimizer.init(jnp.zeros(2))
    for wrong in (state, state[0], [1, 2], jnp.zeros(3)):
        with pytest.raises(ValueError, match=r"NormHistogram.*opt_state\[0\].memory"):
            histograms.quantile(wrong, 0.5)


def test_inside_a_chain_and_across_replicas(strict):
    """Replicas that see other data may add their counts up, as in any sum over devices."""
    optimizer = optax.chain(optclip.measure_norms(histogram=True), optax.scale(-1.0))
    steps = gradients(8)
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *steps)
    states = jax.vmap(optimizer.init)(stacked)
    _, states = jax.vmap(optimizer.update)(stacked, states)
    counts = states[0].memory.counts.sum(0, dtype=jnp.int32)
    assert_quantiles(counts, norms_of(steps))
