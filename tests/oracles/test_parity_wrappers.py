"""The wrappers of optimizers, step by step against plain ones, over long and unquiet runs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.streams import (
    CLOSE,
    SIZE,
    STEPS,
    STREAMS,
    Stream,
    assert_run_close,
    deviation,
    float32_oracle,
    gradients_of,
    moving_parameters,
    norms_of,
    norms_of_rows,
    run_stream,
    teaches,
)

import optclip
from oracles import wrappers


def skipping(**arguments):
    return optclip.skip_spikes(optax.sgd(0.1, momentum=0.9), **arguments)


def guarding(**arguments):
    return optclip.safeguard(optax.sgd(0.1, momentum=0.9), **arguments)


def share_skipped(rows, setting, window=128, losses=None):
    """The share of finite steps skipped, once thresholds and updates are found to be right."""
    extra = {} if losses is None else {"loss": losses}
    finite = np.isfinite(np.sum([rows.sum(axis=1), *extra.values()], axis=0))
    result = run_stream(skipping, rows, setting, {"window": window}, **extra)
    oracle = float32_oracle(wrappers.SkipSpikes, wrappers.Momentum(), **setting, window=window)
    given = zip(*(x[finite].astype(np.float64) for x in (rows, *extra.values())), strict=True)
    thresholds, updates = zip(*(oracle.step(*x) for x in given), strict=True)
    assert_run_close(result.readings["skip/threshold"][finite], thresholds, f"threshold, {setting}")
    assert_run_close(result.updates[finite], updates, f"updates, {setting}")
    assert not np.any(result.updates[~finite])
    skipped = result.readings["skip/skipping"]
    np.testing.assert_array_equal(result.readings["skip/skipped_steps"], np.cumsum(skipped))
    return np.mean(skipped[finite])


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("window", "settings"),
    [
        (128, [{}]),
        (10, [{"deviations": 2.0, "patience": 3}, {"deviations": 4.0, "patience": 1}]),
        (100, [{"deviations": 3.0, "patience": 40}, {"deviations": 6.0, "patience": np.inf}]),
        (1, [{"deviations": 1e6, "patience": 7}]),
    ],
    ids=["128", "10", "100", "1"],
)
def test_skip_spikes_is_mean_and_deviation_of_the_last_ordinary_norms(window, settings, stream):
    for setting in settings:
        skipped = share_skipped(gradients_of(STREAMS[stream]), setting, window)
        if window == 128:
            assert (skipped > 0) == (not STREAMS[stream].steady)


def test_skip_spikes_looks_at_the_loss_by_the_same_rule():
    rows = gradients_of(STREAMS["usual"])
    losses = norms_of(Stream(0.1, seed=12)).astype(np.float32)
    losses[[40, 41, 900]] = np.nan, np.inf, np.nan
    alone = share_skipped(rows, {"deviations": 4.0, "patience": 5.0}, 10)
    assert share_skipped(rows, {"deviations": 4.0, "patience": 5.0}, 10, losses) > alone


def rows_with(norms):
    return np.outer(norms, np.ones(SIZE) / np.sqrt(SIZE)).astype(np.float32)


def test_skip_spikes_keeps_its_patience_however_many_spikes_there_are():
    """A window that fills with spikes must not forget what is ordinary."""
    norms = np.exp(0.1 * np.random.default_rng(13).normal(size=STEPS))
    norms[150:300] *= 1000
    norms[150:300:15] /= 1000  # Never twenty spikes in a row.
    readings = run_stream(skipping, rows_with(norms), {}, {"window": 128}).readings
    np.testing.assert_array_equal(readings["skip/skipping"], norms > 100)


@pytest.mark.parametrize("patience", [80, 150, np.inf])
def test_skip_spikes_waits_longer_than_its_window_where_it_is_told_to(patience):
    rows = rows_with(np.where(np.arange(STEPS) < 200, 1.0, 1000.0))
    setting = {"deviations": 6.0, "patience": patience}
    readings = run_stream(skipping, rows, setting, {"window": 100}).readings
    waited = int(min(patience - 1, STEPS - 200))
    assert np.all(readings["skip/skipping"][200 : 200 + waited])
    assert readings["skip/skipped_steps"][-1] == waited


def test_skip_spikes_learns_nothing_from_gradients_of_zeros():
    norms = np.ones(STEPS)
    norms[60:1500] = 0
    readings = run_stream(skipping, rows_with(norms), {}, {"window": 128}).readings
    assert not np.any(readings["skip/skipping"])


LEAVES = (6, 4, 1)
ADAM_FADES = 0.9 * 0.999**-0.5 * ((1 - 0.999**128) / (1 - 0.999**127)) ** 0.5
NATURES = {"momentum": {"gain": 10.0, "fading": 0.9}, "adam": {"fading": ADAM_FADES}}
HELD = {
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), wrappers.Momentum),
    "adam": (optax.adam, wrappers.Adam),
}


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        *(("momentum", stream) for stream in STREAMS),
        # Adam's own squares leave float32 in the others.
        *(("adam", stream) for stream in ("quiet", "usual", "constant")),
    ],
)
@pytest.mark.parametrize("setting", [{}, {"deviations": 0.5, "ratio": 0.1}], ids=["default", "set"])
@pytest.mark.parametrize("rate", [0.001, 0.1])
def test_safeguard_gives_each_gradient_its_share(rate, setting, name, stream):
    optimizer, plain = HELD[name]
    rows, params = gradients_of(STREAMS[stream]), moving_parameters()
    finite = np.all(np.isfinite(rows), axis=1)

    def guarding(**arguments):
        return optclip.safeguard(optimizer(rate), **arguments)

    result = run_stream(guarding, rows, setting, params=params)
    inner = plain(rate)
    oracle = float32_oracle(wrappers.Safeguard, inner, LEAVES, **setting, **NATURES[name])
    pairs = zip(rows[finite].astype(float), params[finite].astype(float), strict=True)
    before, bounds, updates = zip(*(oracle.step(g, w) for g, w in pairs), strict=True)
    learned = teaches(rows)
    thresholds = np.asarray(before)[learned[finite]]
    assert_run_close(result.readings["clip/threshold"][learned], thresholds, "threshold before")
    assert_run_close(result.readings["bound/threshold"][finite], bounds, "bound")
    # What a float32 Adam and its first steps are off by themselves.
    own = {"momentum": CLOSE, "adam": 3 * CLOSE}[name]
    assert deviation(result.updates[finite], updates) <= own
    assert not np.any(result.updates[~finite])
    lengths = np.maximum(norms_of_rows(params[finite]), 1e-3 * np.sqrt(SIZE))
    ratios = norms_of_rows(updates) / lengths
    assert deviation(result.readings["bound/update_ratio"][finite], ratios) <= own
    assert result.readings["skip/skipped_steps"][-1] == np.sum(~finite) > 0


@pytest.mark.parametrize("ratio", [0.0, np.inf])
def test_safeguard_reads_a_ratio_with_the_bound_shut_or_off(ratio):
    rows, params = gradients_of(STREAMS["constant"]), moving_parameters()
    result = run_stream(guarding, rows, {"deviations": 2.0, "ratio": ratio}, params=params)
    seen, lengths = teaches(rows), np.maximum(norms_of_rows(params), 1e-3 * np.sqrt(SIZE))
    right = norms_of_rows(result.updates) / lengths
    assert np.all((right[seen] > 0) == (ratio > 0))
    assert_run_close(result.readings["bound/update_ratio"], right, "ratio")


@pytest.mark.parametrize("stream", ["quiet", "usual", "constant"])
@pytest.mark.parametrize(
    ("b1", "b2", "eps", "decay", "threshold"),
    [(0.9, 0.99, 1e-6, 0.1, 1.0), (0.9, 0.95, 1e-12, 0.0, 1.5), (0.5, 0.999, 1e-8, 0.01, 1.0)],
)
def test_stable_adamw_is_the_papers_algorithm(b1, b2, eps, decay, threshold, stream):
    setting = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": decay, "threshold": threshold}
    rows, params = gradients_of(STREAMS[stream]), moving_parameters()
    finite = np.all(np.isfinite(rows), axis=1)
    result = run_stream(
        lambda **given: optclip.stable_adamw(0.1, nonfinite="skip", **given),
        rows,
        setting,
        params=params,
    )
    # Of the numbers as float32 has them: 1 - b2 is off by 1e-5 there, in Optax too.
    rate, b1, b2, eps, decay = (float(np.float32(x)) for x in (0.1, b1, b2, eps, decay))
    oracle = wrappers.StableAdamW(LEAVES, rate, b1, b2, eps, decay, threshold)
    pairs = zip(rows[finite].astype(float), params[finite].astype(float), strict=True)
    sizes, updates = zip(*(oracle.step(g, w) for g, w in pairs), strict=True)
    assert deviation(result.readings["clip/norm"][finite], sizes) <= 3 * CLOSE
    # Of the learning rate: momentum and weight decay may cancel in an entry.
    assert np.max(np.abs(result.updates[finite] - updates)) <= 1e-4 * rate
    assert not np.any(result.updates[~finite])
    assert STREAMS[stream].steady or np.any(np.asarray(sizes) > 1.1 * threshold)


def test_the_clip_sees_the_gradient_that_adam_gets():
    """After a clip before it, with an accumulation around it, of the leaves that Adam has."""
    rows = gradients_of(STREAMS["usual"])[900:1100]
    clip = optax.clip_by_global_norm(1e-3)
    inside = run_stream(
        lambda: optclip.clip_by_adam_rms(optax.chain(clip, optax.adam(0.1, b2=0.9))), rows, {}
    )
    before = run_stream(
        lambda: optax.chain(clip, optclip.clip_by_adam_rms(optax.adam(0.1, b2=0.9))), rows, {}
    )
    assert np.max(before.readings["clip/norm"]) > 1.1
    assert deviation(inside.readings["clip/norm"], before.readings["clip/norm"]) <= CLOSE
    assert deviation(inside.updates, before.updates) <= CLOSE


def test_leaves_without_an_adam_are_as_they_were():
    params = {"matrix": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    muon, optimizer = (
        wrap(optax.contrib.muon(0.1, adam_b2=0.9))
        for wrap in (lambda inner: inner, lambda inner: optclip.clip_by_adam_rms(inner, 0.5))
    )
    states = muon.init(params), optimizer.init(params)
    plain, _ = muon.update(params, states[0], params)
    updates, state = optimizer.update(params, states[1], params)
    np.testing.assert_array_equal(updates["matrix"], plain["matrix"])
    np.testing.assert_allclose(updates["bias"], 0.5 * plain["bias"], rtol=1e-6)
    assert float(state.clip.clip_rate) == 0.5


@pytest.mark.parametrize(
    "before",
    [optax.trace(0.9), optax.add_decayed_weights(1.0), optax.ema(0.9, debias=False)],
    ids=["momentum", "decay", "average"],
)
def test_what_stands_before_adam_does_not_hide_its_b2(before):
    """It makes a gradient of a zero gradient too."""
    rows, params = gradients_of(STREAMS["quiet"])[:200], moving_parameters()[:200]
    inside = run_stream(
        lambda: optclip.clip_by_adam_rms(optax.chain(before, optax.adam(0.1, b2=0.9))),
        rows,
        {},
        params=params,
    )
    outside = run_stream(
        lambda: optax.chain(before, optclip.clip_by_adam_rms(optax.adam(0.1, b2=0.9))),
        rows,
        {},
        params=params,
    )
    assert np.max(outside.readings["clip/norm"]) > 1.05
    assert deviation(inside.readings["clip/norm"], outside.readings["clip/norm"]) <= CLOSE
    assert deviation(inside.updates, outside.updates) <= CLOSE


@pytest.mark.parametrize("optimizer", [optax.yogi(0.1), optax.adamax(0.1)], ids=["yogi", "adamax"])
def test_what_is_no_average_of_squares_is_refused(optimizer):
    with pytest.raises(ValueError, match="an average of squares"):
        optclip.clip_by_adam_rms(optimizer).init(jnp.ones(3))


def test_an_adam_on_another_tree_is_refused():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    optimizer = optclip.clip_by_adam_rms(optax.flatten(optax.adam(0.1)))
    with pytest.raises(ValueError, match=r"optax\.flatten: put clip_by_adam_rms within"):
        optimizer.update(params, optimizer.init(params), params)


def test_no_adam_or_two_of_one_leaf_are_refused():
    params = jnp.ones(3)
    with pytest.raises(ValueError, match=r"holds no optax\.ScaleByAdamState: put it around"):
        optclip.clip_by_adam_rms(optax.sgd(0.1)).init(params)
    twice = optclip.clip_by_adam_rms(optax.chain(optax.scale_by_adam(), optax.scale_by_adam()))
    with pytest.raises(ValueError, match="two Adams scale"):
        twice.update(params, twice.init(params), params)
