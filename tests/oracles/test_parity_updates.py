"""Clips with a norm per tensor, clips of entries, and clips of updates, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.streams import (
    EARLY,
    LATER,
    SIZE,
    STEPS,
    Stream,
    assert_run_close,
    float32_oracle,
    leaves_of,
    moving_parameters,
    norms_of,
    norms_of_rows,
    rows_of,
    run_stream,
    tree_of,
    with_holes,
)

import optclip
from oracles import learned, methods

# AdaGC


def leafwise(scale, holes):
    """Gradients whose leaves have norms of their own, one of them often zero."""
    random, parts = np.random.default_rng(5), []
    for place, size in enumerate(leaves_of(np.zeros((1, SIZE)))):
        direction = random.normal(size=size.shape[1])
        norms = norms_of(Stream((0.05, 0.4, 0.2)[place], scale * (1, 30, 0.02)[place], seed=place))
        norms *= (random.random(STEPS) > 0.1) if place == 1 else 1
        parts.append(np.outer(norms, direction / np.linalg.norm(direction)))
    return with_holes(np.concatenate(parts, axis=1), holes)


@pytest.mark.parametrize("holes", [EARLY, LATER], ids=["early", "later"])
@pytest.mark.parametrize(
    ("static", "settings"),
    [
        ({}, [{}]),
        (
            {"learn_from": "clipped"},
            [
                {"relative": 1.5, "decay": 0.9, "warmup_steps": 0, "max_norm": 0.3},
                {"relative": 2.0, "decay": 0.5, "warmup_steps": 2, "max_norm": np.inf},
                {"relative": 1.0, "decay": 0.99, "warmup_steps": 60, "max_norm": 10.0},
            ],
        ),
        ({"learn_from": "raw"}, [{}, {"relative": 1.3, "decay": 0.9}]),
        ({"learn_from": "clipped"}, [{"patience": 1}, {"patience": 3}, {"patience": 20}]),
    ],
    ids=["defaults", "numbers", "raw", "patience"],
)
def test_adagc_is_the_papers_leaf_by_leaf(static, settings, holes, strict):
    rows = leafwise(1.0, holes)
    finite, zero = np.all(np.isfinite(rows), axis=1), np.all(rows == 0, axis=1)
    norms = np.stack([norms_of_rows(leaf) for leaf in leaves_of(rows)], axis=1)
    for setting in settings:
        result = run_stream(optclip.adagc, rows, setting, static)
        oracle = float32_oracle(learned.AdaGC, **setting, **static)
        # The paper's step counts whatever the gradient: one of zeros too.
        right = np.array([oracle.step(list(row)) for row in norms[finite]])
        applied = np.stack([norms_of_rows(x) for x in leaves_of(result.updates)], axis=1)
        shown = finite & ~zero
        limits = np.min(right[:, 0], axis=1)[~zero[finite]]
        assert_run_close(result.readings["clip/threshold"][shown], limits, f"threshold, {setting}")
        assert_run_close(applied[finite], right[:, 1], f"applied norms, {setting}")
        np.testing.assert_array_equal(result.updates[~finite], rows[~finite])


# SPAM


def entrywise(scale, holes):
    """Gradients whose entries are normal, of many sizes, with spikes of single entries."""
    random = np.random.default_rng(6)
    rows = scale * random.normal(size=(STEPS, SIZE)) * 10 ** random.uniform(-2, 2, SIZE)
    spikes = random.random(rows.shape) < 0.005
    rows[spikes] *= 10 ** random.uniform(1, 4, spikes.sum())
    rows[:100, ::4] = 0  # Entries that begin late: nothing is known of them yet.
    rows[1000:1200] *= 30
    return with_holes(rows, holes)


@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e22])
@pytest.mark.parametrize("source", ["clipped", "raw"])
def test_spam_is_the_papers_entry_by_entry(source, scale, strict):
    rows = entrywise(scale, ((0, "nan"), (15, "inf"), (16, "zero"), *LATER))
    finite = np.all(np.isfinite(rows), axis=1)
    for setting in (
        {},
        {"threshold": 50.0, "decay": 0.9, "warmup_steps": 0},
        {"threshold": 1000.0, "decay": 0.99, "warmup_steps": 1},
    ):
        result = run_stream(optclip.spam_clip, rows, setting, {"learn_from": source})
        oracle = float32_oracle(methods.Spam, **setting, learn_from=source)
        right = [oracle.step(row) for row in rows[finite].astype(np.float64)]
        bounds, clipped = [x.thresholds[0] for x in right], [x.updates for x in right]
        assert np.any(np.abs(clipped) < np.abs(rows[finite]))
        assert_run_close(result.updates[finite], clipped, f"entries, {setting}")
        assert_run_close(result.readings["clip/threshold"][finite], bounds, f"bound, {setting}")
        np.testing.assert_array_equal(result.updates[~finite], rows[~finite])


def test_spams_defaults_are_the_papers():
    rows = entrywise(1.0, ())
    oracle = float32_oracle(methods.Spam)
    right = [oracle.step(row).updates for row in rows.astype(np.float64)]
    assert_run_close(run_stream(optclip.spam_clip, rows, {}).updates, right, "entries")


# Relative to the parameters


def updates_of(scale, holes=LATER):
    random = np.random.default_rng(9)
    rows = random.normal(size=(STEPS, SIZE)) * 10 ** random.uniform(-5, 0.5, (STEPS, 1))
    rows[random.random(rows.shape) < 0.2] = 0
    return with_holes(scale * rows, holes)


@pytest.mark.parametrize(
    "setting", [{}, {"relative": 0.5, "absolute": 0.01}, {"relative": 0.0, "absolute": 1e-3}]
)
def test_clippy_is_the_papers_tensor_by_tensor(setting, strict):
    rows, params = updates_of(1.0), moving_parameters()
    finite = np.all(np.isfinite(rows), axis=1)
    result = run_stream(optclip.clippy, rows, setting, params=params)
    oracle = float32_oracle(methods.Clippy, **setting)
    pairs = zip(rows[finite].astype(float), params[finite].astype(float), strict=True)
    right = [oracle.step(leaves_of(u), leaves_of(w)) for u, w in pairs]
    factors, tensors = [min(x.factors) for x in right], [x.updates for x in right]
    assert 0.05 < np.mean(np.array(factors) < 1) < 0.999
    assert_run_close(result.updates[finite], [np.concatenate(x) for x in tensors], "entries")
    assert_run_close(result.readings["clip/factor"][finite], factors, "factor")
    np.testing.assert_array_equal(result.updates[~finite], rows[~finite])


def test_clippy_clips_nothing_at_its_bound_and_everything_above():
    clip = optclip.clippy(relative=0.5, absolute=0.25)
    params = jnp.asarray([1.0, -2.0, 0.0], jnp.float32)
    bounds = jnp.asarray([0.75, -1.25, 0.25], jnp.float32)
    updates, state = clip.update(bounds, clip.init(params), params)
    assert float(state.clip_rate) == 0
    assert float(state.factor) == 1
    np.testing.assert_array_equal(updates, bounds)
    for place in range(3):
        over = bounds.at[place].multiply(1 + 1e-5)
        updates, state = clip.update(over, clip.init(params), params)
        assert float(state.clip_rate) == 1
        np.testing.assert_allclose(updates, over / (1 + 1e-5), rtol=2e-6)


def test_clippy_without_a_bound_moves_parameters_of_zero_too():
    params = jnp.asarray([0.0, 1.0], jnp.float32)
    update = jnp.asarray([1e30, -3.0], jnp.float32)
    for clip in (optclip.clippy(relative=jnp.inf), optclip.clippy(absolute=jnp.inf)):
        updates, state = clip.update(update, clip.init(params), params)
        np.testing.assert_array_equal(updates, update)
        assert float(state.clip_rate) == 0
        assert float(state.factor) == 1
        assert not np.isnan(float(state.norm))


@pytest.mark.parametrize("setting", [{"ratio": 0.01}, {"ratio": 0.3, "eps": 0.2}])
def test_clip_by_param_norm_is_its_formula(setting, strict):
    rows, params = updates_of(1.0), moving_parameters()
    finite = np.all(np.isfinite(rows), axis=1)
    result = run_stream(optclip.clip_by_param_norm, rows, setting, params=params)
    oracle = float32_oracle(methods.clip_by_param_norm, **setting)
    pairs = zip(rows[finite].astype(float), params[finite].astype(float), strict=True)
    right = [oracle.step(tree_of(u[None]), tree_of(w[None])) for u, w in pairs]
    limits = [x.thresholds[0] for x in right]
    assert_run_close(result.readings["clip/threshold"][finite], limits, "threshold")
    assert_run_close(result.updates[finite], [rows_of(x.updates)[0] for x in right], "entries")
    np.testing.assert_array_equal(result.updates[~finite], rows[~finite])
