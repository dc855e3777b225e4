"""Rules by themselves: numbers, schedules, and rules of one's own."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.running import assert_right
from helpers.samples import assert_same

import optclip
from optclip import limiters, scopes, thresholds
from optclip.thresholds import Rule

GRADIENT = jnp.array([3.0, 4.0])


def run(rule, gradients, params=None, **options):
    """The threshold read at every step, and the last state."""
    clip = optclip.clip_by(rule, **options)
    state, read = clip.init(gradients[0]), []
    for gradient in gradients:
        _, state = clip.update(gradient, state, params)
        read.append(float(state.threshold))
    return read, state


@pytest.mark.parametrize(
    "number",
    [
        *(3_000_000_000, 10**20, np.int64(2**62), np.uint8(3)),
        *(1e39, np.float64(1e300), np.finfo(np.float64).max, np.float64(5e-324)),
        *(np.float16(2), jnp.float8_e4m3fn(2), jnp.float8_e5m2(2)),
    ],
    ids=repr,
)
def test_numbers_of_any_type_and_size(strict, number):
    ((threshold,), _) = run(number, [GRADIENT])
    exact = float(number)
    assert_right(min(threshold, 1e38), min(exact, 1e38))


def test_a_schedule_is_called_with_the_number_of_earlier_updates(strict):
    read, _ = run(lambda count: 10 * (count + 1), [GRADIENT] * 3)
    assert read == [10.0, 20.0, 30.0]


def test_a_schedule_of_optax():
    schedule = optax.linear_schedule(4.0, 1.0, transition_steps=3)
    read, _ = run(schedule, [GRADIENT] * 5)
    assert_right(read, [4.0, 3.0, 2.0, 1.0, 1.0])


def test_nonsense_from_a_schedule_has_a_meaning(strict):
    wild = jnp.array([-1.0, math.nan, math.inf, -math.inf, 2.0])
    read, _ = run(lambda count: wild[count], [GRADIENT] * 5)
    assert read == [0.0, math.inf, math.inf, 0.0, 2.0]


def test_a_threshold_for_each_group_in_order(strict):
    rule = thresholds.per_group({"b": 2.0, "a": lambda count: count + 1})
    scope = scopes.group(lambda path: path, order=["b", "a"])
    clip = optclip.clip_by(rule, scope=scope, detail=True)
    tree = {"a": GRADIENT, "b": GRADIENT}
    state = clip.init(tree)
    for step in range(3):
        _, state = clip.update(tree, state)
        clipped = state.detail.clipped_norms
        assert_right([clipped["b"], clipped["a"]], [2.0, step + 1])


@pytest.mark.parametrize(("is_rms", "floor"), [(False, 0.5), (True, 0.5 * math.sqrt(2))])
def test_relative_to_the_parameters_with_a_floor(strict, is_rms, floor):
    rule = thresholds.relative_to_params(0.1, 0.5, eps_is_rms=is_rms)
    for size in (0.0, 0.3, 20.0):
        (threshold,), _ = run(rule, [GRADIENT], jnp.array([size, 0.0]))
        assert_right(threshold, 0.1 * max(size, floor))


@pytest.mark.parametrize("is_rms", [False, True])
def test_relative_to_the_parameters_has_no_0_times_infinity(strict, is_rms):
    for ratio, eps, size in itertools.product((0.0, 0.1, math.inf), (0.0, math.inf), (0.0, 3e38)):
        rule = thresholds.relative_to_params(ratio, eps, eps_is_rms=is_rms)
        (threshold,), _ = run(rule, [GRADIENT], jnp.full(2, size))
        where = f"ratio {ratio}, eps {eps}, parameters {size}"
        assert not math.isnan(threshold), where
        assert threshold == ratio or ratio == 0.1, where


def test_rules_are_combined_group_by_group(strict):
    falling = lambda count: 3 - count  # noqa: E731
    for rule, expected in (
        (thresholds.minimum(falling, 2.0, 5.0), [2.0, 2.0, 1.0, 0.0]),
        (thresholds.maximum(falling, 2.0), [3.0, 2.0, 2.0, 2.0]),
        (thresholds.switch(2, 7.0, falling), [7.0, 7.0, 1.0, 0.0]),
        (thresholds.switch(0, 7.0, falling), [3.0, 2.0, 1.0, 0.0]),
    ):
        read, state = run(rule, [GRADIENT] * 4)
        assert read == expected
        assert not jax.tree.leaves(state.memory)


def test_a_switch_counts_finite_steps_and_both_its_rules_observe(strict):
    rule = thresholds.switch(2, 1.0, thresholds.moving_average(2.0, 0.5, "raw"))
    gradients = [GRADIENT, jnp.full(2, jnp.nan), GRADIENT, GRADIENT]
    read, _ = run(rule, gradients)
    assert_right(read, [1.0, 1.0, 1.0, 10.0])


def diary(threshold):
    """A rule that writes down what it is shown at the last step it may learn from."""

    def observe(memory, step, norms, clipped_norms):
        counts = jnp.stack([step.count, step.finite])
        counts = jnp.broadcast_to(jnp.reshape(counts, (2, *[1] * norms.ndim)), (2, *norms.shape))
        return counts, norms, clipped_norms

    return Rule(
        init=lambda norms: (jnp.full((2, *norms.shape), -1, jnp.int32), norms, norms),
        threshold=lambda memory, step, norms, params: jnp.full(norms.shape, threshold, norms.dtype),
        observe=observe,
        has_memory=True,
    )


def test_a_rule_of_ones_own_is_shown_steps_norms_and_what_is_left_of_them(strict):
    bad = jnp.full(2, jnp.inf)
    _, state = run(diary(2.0), [GRADIENT, bad, bad, 2 * GRADIENT, bad])
    steps, norms, clipped = state.memory
    assert steps.tolist() == [3, 1]
    assert_right([norms, clipped], [10.0, 2.0])


def test_a_rule_of_ones_own_has_an_entry_for_each_group(strict):
    clip = optclip.clip_by(diary(2.0), scope=scopes.leaf)
    state = clip.init([GRADIENT] * 3)
    for last in (1.0, 0.0):  # Where the norm is 0, nothing is learned from it.
        _, state = clip.update([GRADIENT, 0.1 * GRADIENT, last * GRADIENT], state)
    assert state.memory[0].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert_right(state.memory[1], [5.0, 0.5, 5.0])
    assert_right(state.memory[2], [2.0, 0.5, 2.0])


def test_a_rule_is_taken_for_itself_and_a_number_for_a_rule():
    rule = diary(1.0)
    assert thresholds.as_rule(rule) is rule
    assert not thresholds.as_rule(2.0).has_memory
    assert_same(run(thresholds.as_rule(2.0), [GRADIENT])[1], run(2.0, [GRADIENT])[1])


RULES = {
    "moving_average": thresholds.moving_average(2.0, 0.9),
    "moving_average, raw": thresholds.moving_average(2.0, 0.9, "raw"),
    "zscore": thresholds.zscore(1.0, 0.9, 3),
    "zscore, max": thresholds.zscore(1.0, 0.9, 3, "max"),
    "robust": thresholds.robust(1.0, 0.9, math.inf),
    "robust, clipped": thresholds.robust(1.0, 0.9, math.inf, "clipped"),
    "mean_over_window": thresholds.mean_over_window(1.0, 8, "clipped"),
    "quantile_over_window": thresholds.quantile_over_window(50.0, 8, "clipped"),
    "leaf_average": thresholds.leaf_average(1.05, 0.9, 3, 1e3),
    "switch": thresholds.switch(3, 2.0, thresholds.moving_average(2.0, 0.9)),
}


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_learns_under_the_smooth_limiter_is_what_that_leaves(strict, name):
    """By hand: the rule is asked, the norm shrinks to n c / (n + c), and the rule is shown both."""
    rule, sizes = RULES[name], np.exp(0.5 * np.random.default_rng(0).normal(size=20))
    gradients = [jnp.asarray([0.6, 0.8], jnp.float32) * jnp.float32(size) for size in sizes]
    read, _ = run(rule, gradients, limiter=limiters.smooth)
    memory, expected = rule.init(jnp.zeros([], jnp.float32)), []
    for count, size in enumerate(sizes):
        step = thresholds.Step(jnp.int32(count), jnp.int32(count))
        norm = jnp.float32(size)
        threshold = jnp.asarray(rule.threshold(memory, step, norm, None))
        expected.append(float(threshold))
        left = norm if math.isinf(expected[-1]) else norm * threshold / (norm + threshold)
        memory = rule.observe(memory, step, norm, left)
    np.testing.assert_allclose(read, expected, rtol=1e-5)
    hard, _ = run(rule, gradients)
    # The winsorized rule and the raw one learn from what comes, and not from what is left.
    assert (hard == read) == (name in ("robust", "moving_average, raw"))


@pytest.mark.parametrize(("quantile", "init", "size"), [(1.0, 3e38, 3.4e38), (0.0, 2e-38, 1e-38)])
def test_the_online_quantile_stays_a_normal_number_at_the_ends_of_the_range(quantile, init, size):
    rule = thresholds.online_quantile(quantile, 5.0, init)
    read, state = run(rule, [jnp.full(1, size, jnp.float32)] * 4)
    limits = np.finfo(np.float32)
    for threshold in (*read, float(state.memory)):
        assert limits.tiny <= threshold <= limits.max
    assert_right(float(state.memory), limits.max if quantile else limits.tiny)


def test_quantiles_of_0_and_1_are_the_least_and_the_largest(strict):
    sizes = [3.0, 1.0, 2.0, 5.0]
    for percentile, expected in ((0.0, [3.0, 1.0, 1.0, 1.0]), (100.0, [3.0, 3.0, 3.0, 5.0])):
        rule = thresholds.quantile_over_window(percentile, 4)
        read, _ = run(rule, [jnp.full(1, size) for size in sizes])
        assert_right(read, expected)


# A rule of one's own -----------------------------------------------------------------------------


def own_rule(init, has_memory=True):
    return thresholds.Rule(
        init=init,
        threshold=lambda memory, step, norms, params: jnp.full_like(norms, jnp.inf),
        observe=lambda memory, step, norms, clipped_norms: memory,
        has_memory=has_memory,
    )


def test_a_window_whose_axes_are_the_wrong_way_round_is_refused():
    # Three groups and a window of three: the shape fits by chance.
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    wrong = own_rule(lambda norms: jnp.zeros((*norms.shape, 3), norms.dtype))
    with pytest.raises(ValueError, match=r"must come last, as in \(window, \*norms.shape\)"):
        optclip.clip_by(wrong, scope=scopes.leaf).init(params)
    right = own_rule(lambda norms: jnp.zeros((3, *norms.shape), norms.dtype))
    assert optclip.clip_by(right, scope=scopes.leaf).init(params).memory.shape == (3, 3)
    assert optclip.clip_by(wrong).init(params).memory.shape == (3,)  # one norm has no axes


def test_a_memory_that_was_not_announced_is_refused():
    rule = own_rule(jnp.zeros_like, has_memory=False)
    with pytest.raises(ValueError, match="has_memory=True"):
        optclip.clip_by(rule).init(jnp.ones(2))
