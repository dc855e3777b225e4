"""`tuning.sweep` against a plain loop, and what it says of what it found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.tuning import Sweep, sweep

STEPS = 20
THRESHOLDS = (0.03, 0.3, 3.0, np.inf)


def optimizer(threshold):
    return optax.chain(optclip.clip_by_global_norm(threshold), optax.sgd(0.5))


def init(seed, threshold):
    params = jax.random.normal(jax.random.key(seed), 3)
    return params, optimizer(threshold).init(params)


def batches(seed, number):
    return np.random.default_rng([seed, number]).normal(size=3).astype(np.float32)


def loss_of(params, batch):
    return jnp.sum((params - 5 - batch) ** 2)


def train_step(state, threshold, batch):
    params, opt_state = state
    loss, gradient = jax.value_and_grad(loss_of)(params, batch)
    updates, opt_state = optimizer(threshold).update(gradient, opt_state)
    readings = {"loss": loss, **optclip.metrics(opt_state)}
    return (optax.apply_updates(params, updates), opt_state), readings


def by_hand(threshold, seed):
    """Mean loss of the last two steps, and the clip rate, in numpy."""
    params = np.asarray(init(seed, threshold)[0], np.float64)
    losses, clipped = [], 0
    for number in range(STEPS):
        away = params - 5 - batches(seed, number)
        losses.append(np.sum(away**2))
        norm = np.linalg.norm(2 * away)
        clipped += norm > threshold
        params = params - 0.5 * 2 * away * min(1, threshold / norm)
    return np.mean(losses[-2:]), clipped / STEPS


@pytest.mark.parametrize("vectorize", [True, False, None])
def test_every_run_is_the_one_by_hand(vectorize):
    found = sweep(
        train_step,
        reversed(THRESHOLDS),
        [3, 1],
        init=init,
        batches=batches,
        steps=STEPS,
        vectorize=vectorize,
    )
    by_itself = jax.default_backend() != "cpu"
    assert found.vectorized == (by_itself if vectorize is None else vectorize)
    np.testing.assert_array_equal(found.thresholds, THRESHOLDS)
    expected = np.array([[by_hand(c, seed) for seed in (3, 1)] for c in THRESHOLDS])
    np.testing.assert_allclose(found.losses, expected[..., 0], rtol=1e-4)
    np.testing.assert_allclose(found.clip_rates, expected[..., 1], rtol=1e-5)


@pytest.mark.parametrize("vectorize", [True, False])
def test_evaluate_gives_the_final_loss(vectorize):
    def distance(state):
        return jnp.sum((state[0] - 5) ** 2)

    found = sweep(
        train_step,
        [0.03, 3.0],
        1,
        init=init,
        batches=batches,
        steps=STEPS,
        evaluate=distance,
        vectorize=vectorize,
    )
    params, state = init(0, 0.03)
    for number in range(STEPS):
        (params, state), _ = train_step((params, state), 0.03, batches(0, number))
    np.testing.assert_allclose(found.losses[0, 0], np.sum((params - 5) ** 2), rtol=1e-5)
    assert found.losses.shape == (2, 1)


def test_a_step_that_gives_only_its_loss_has_no_clip_rate():
    found = sweep(
        lambda state, threshold, batch: (state, threshold * batch),
        [2.0, 1.0],
        1,
        init=lambda seed, threshold: seed,
        batches=lambda seed, number: jnp.float32(number),
        steps=3,
    )
    np.testing.assert_array_equal(found.losses, [[2.0], [4.0]])  # A tenth of three steps is one.
    assert np.isnan(found.clip_rates).all()


def made(losses, thresholds=(0.1, 1.0, 10.0, np.inf)):
    losses = np.asarray(losses, np.float64)
    return Sweep(np.asarray(thresholds), (0,) * losses.shape[1], losses, np.nan * losses, True)


def test_the_best_and_the_flat_region():
    found = made([[3.0, 3.0, 9.0], [1.01, 1.01, 1.01], [0.5, 1.0, 2.0], [1.015, 1.0, 1.4]])
    assert found.best == 10.0
    assert found.flat == (1.0, np.inf)
    assert found.finding() == (
        "Lowest loss, 1, at threshold 10; within 2% of it from 1 to no clipping"
    )
    alone = made([[1.01], [5.0], [1.0], [1.01]], (0.1, 1.0, 10.0, 100.0))
    assert alone.flat == (10.0, 100.0)  # What is as good, but apart, is another region.


def test_what_diverged_is_named():
    some = made([[1.0], [2.0], [np.inf], [np.inf]])
    assert some.finding() == "Lowest loss, 1, at threshold 0.1; 2 of 4 thresholds diverged"
    lost = made([[np.inf]] * 4)
    assert np.isnan([lost.best, *lost.flat]).all()
    assert lost.finding() == "Every threshold diverged: lower the learning rate"


def test_a_loss_that_is_not_finite_is_infinite():
    found = sweep(
        lambda state, threshold, batch: (state, jnp.log(threshold - 1)),
        [0.5, 2.0],
        2,
        init=lambda seed, threshold: seed,
        batches=lambda seed, number: 0,
        steps=1,
    )
    np.testing.assert_array_equal(found.losses, [[np.inf] * 2, [0.0] * 2])


@pytest.mark.parametrize("losses", [[[3.0, 4.0], [1.0, 1.2], [1.0, 1.1], [np.inf, 2.0]]])
def test_table_picture_and_json(losses, tmp_path, capsys):
    import rich

    found = made(losses)
    rich.print(found.table())
    printed = capsys.readouterr().out
    assert "diverged" in printed
    assert "none" in printed
    found.draw(tmp_path / "sweep.png", subtitle="a test")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["losses"][3] == [None, 2.0]
    assert told["thresholds"][-1] is None  # No clipping.
    assert told["best"] == found.best
    made([[np.inf]] * 4).draw(tmp_path / "lost.png")
    made([[1.0]], (np.inf,)).draw(tmp_path / "one.png")
    made([[1.0], [2.0]], (0.0, 1.0)).draw(tmp_path / "zero.png")


@pytest.mark.parametrize(
    ("thresholds", "ticks"),
    [
        ((0.0, 0.01, 1.0, 100.0, np.inf), ["0.01", "0.1", "1", "10", "100", "0", "no clip"]),
        ((2.9, 3.0, 3.1), ["2.9", "3.1"]),
        ((2.0, np.inf), ["2", "no clip"]),
        ((0.0, np.inf), ["0", "no clip"]),
        (10.0 ** np.arange(-12, 13), None),
    ],
)
def test_the_ticks_of_the_thresholds_are_plain(thresholds, ticks):
    losses = np.arange(2.0 * len(thresholds)).reshape(-1, 2)
    axis = made(losses, thresholds).draw().axes[0].xaxis
    shown = [text.get_text() for text in axis.get_ticklabels()]
    assert shown == ticks if ticks else len(shown) <= 10


def test_a_bar_shows_the_steps(capsys):
    arguments = {"init": init, "batches": batches, "steps": 3}
    sweep(train_step, [1.0], 2, **arguments, vectorize=False, progress=True)
    assert "6/6" in capsys.readouterr().err
    sweep(train_step, [1.0], 2, **arguments, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_step": lambda s, c, b: (s, 0.0, 0.0)}, r"\(state, loss\) or"),
        ({"train_step": lambda s, c, b: jnp.zeros(2)}, r"\(state, loss\) or"),
        ({"train_step": lambda s, c, b: (s, {"accuracy": c})}, r"without 'loss'.*accuracy"),
        ({"train_step": lambda s, c, b: (s, jnp.ones(3))}, r"one number.*\(3,\).*mean"),
        ({"train_step": None}, "train_step.*must be a function"),
        ({"batches": [1, 2]}, "batches.*must be a function, got a list"),
    ],
)
def test_functions_of_another_kind_are_refused(changes, said):
    arguments = {"train_step": train_step, "init": init, "batches": batches} | changes
    for vectorize in (True, False):
        with pytest.raises(ValueError, match=said):
            sweep(thresholds=[1.0], seeds=1, steps=2, vectorize=vectorize, **arguments)


def test_a_threshold_in_the_state_is_the_one_of_the_run():
    injected = optax.inject_hyperparams(optclip.clip_by_global_norm)

    def start(seed, threshold):
        params = jax.random.normal(jax.random.key(seed), 3)
        return params, injected(max_norm=threshold).init(params)

    def step(state, threshold, batch):
        params, opt_state = state
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = injected(max_norm=0.0).update(gradient, opt_state)
        return (jax.tree.map(lambda w, u: w - 0.5 * u, params, updates), opt_state), loss

    found = sweep(step, THRESHOLDS, [3], init=start, batches=batches, steps=STEPS)
    expected = [[by_hand(c, 3)[0]] for c in THRESHOLDS]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)


def test_a_threshold_that_nothing_takes_is_noticed():
    found = sweep(
        lambda state, threshold, batch: (state, 1.0 * batch),
        [1.0, 9.0],
        2,
        init=lambda seed, threshold: seed,
        batches=lambda seed, number: np.float32(seed),
        steps=2,
    )
    assert "does not pass the threshold to its clip" in found.finding()
    assert found.best == 9.0


def test_a_run_lets_go_of_its_state_and_compiles_once():
    traces = []

    def step(state, threshold, batch):
        traces.append(1)
        held = sum(x.size == 1234 for x in jax.live_arrays())
        assert held <= 3
        return state + threshold, threshold

    sweep(
        step,
        [1.0, 2.0, 3.0],
        2,
        init=lambda seed, threshold: jnp.zeros(1234),
        batches=lambda seed, number: 0,
        steps=2,
        vectorize=False,
    )
    assert len(traces) == 1
    assert sum(x.size == 1234 for x in jax.live_arrays()) <= 1


def test_one_threshold_may_be_a_number():
    found = sweep(train_step, 1.0, 1, init=init, batches=batches, steps=2)
    assert found.thresholds.tolist() == [1.0]


def test_seeds_that_overlap_are_named():
    apart, close = (
        made([[3.0, 3.1], [1.0, 1.2], [4.0, 4.0], [1.3, 1.4]]),
        made([[3.0, 3.1], [1.0, 1.2], [4.0, 4.0], [1.1, 1.5]]),
    )
    assert apart.finding() == "Lowest loss, 1.1, at threshold 1"
    assert close.finding().endswith("; seeds overlap with those without clipping")


@pytest.mark.parametrize(
    ("thresholds", "seeds", "steps", "said"),
    [
        ([], 3, 1, r"thresholds.*one or more.*\[\].*numpy.geomspace"),
        ([1.0, -1.0], 3, 1, r"at least 0.*-1.0"),
        ([np.nan], 3, 1, "nan"),
        ([1.0], 0, 1, r"seeds.*at least one.*0"),
        ([1.0], 1, 0, r"steps.*at least 1.*0"),
    ],
)
def test_nothing_to_run_is_refused(thresholds, seeds, steps, said):
    with pytest.raises(ValueError, match=said):
        sweep(train_step, thresholds, seeds, init=init, batches=batches, steps=steps)
