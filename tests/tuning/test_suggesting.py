"""`suggest_threshold` on streams of norms whose truth is known."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.made_up_runs import RUNS, drifting, noisy, spiky

import optclip
from optclip import histograms
from optclip.tuning import read_log, suggest_threshold


def by_hand(norms: np.ndarray) -> tuple[float, float, list[float]]:
    """(threshold, deviation, medians of the parts), by the formula in the docstring."""
    norms = norms[len(norms) // 10 :]
    parts = np.array_split(norms, 8)
    medians = [np.median(part) for part in parts]
    logs = np.concatenate([np.log(part) - np.log(np.median(part)) for part in parts])
    raw = np.quantile(logs, 0.75) / 0.6745
    spread = math.sqrt((len(norms) * raw**2 + 4 * 0.25**2) / (len(norms) + 4))
    level = math.exp(np.quantile(np.log(medians), 0.75))
    return level * math.exp(2 * spread), spread, medians


def histogram_of(norms: np.ndarray) -> histograms.NormHistogram:
    places = np.floor((np.log2(norms) - np.log2(histograms.LOWEST)) * 18 + 1).astype(int)
    return histograms.NormHistogram(np.bincount(places, minlength=histograms.BINS))


# What is suggested -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5, 1.0])
def test_formula_and_clip_rate(noise):
    norms = noisy(4000, noise)
    suggestion = suggest_threshold(norms)
    threshold, spread, medians = by_hand(norms)
    assert suggestion.threshold == pytest.approx(threshold, rel=1e-9)
    assert suggestion.noise == pytest.approx(spread)
    assert suggestion.drift == pytest.approx(max(medians) / min(medians))
    settled = norms[400:]
    assert suggestion.clip_rate == np.mean(settled > threshold)
    # For a log-normal distribution it is the 97.7th percentile, about two deviations up.
    assert 0.01 < suggestion.clip_rate < 0.04
    # The threshold, but for the rounding to three digits, is what is pasted.
    clip = eval(suggestion.method, {"optclip": optclip})
    _, state = clip.update(jnp.array([1e3]), clip.init(jnp.zeros(1)))
    assert float(state.clipped_norm) == pytest.approx(threshold, rel=5e-3)


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_intervals_hold_the_truth(noise):
    true = math.exp(2 * noise)  # of the median; that of parts is a little higher
    suggestions = [suggest_threshold(noisy(800, noise, seed)) for seed in range(40)]
    inside = [s.interval[0] <= true * 1.02 <= s.interval[1] for s in suggestions]
    assert np.mean(inside) > 0.85
    wide, narrow = (suggest_threshold(noisy(n, noise)).interval for n in (100, 10_000))
    assert math.log(wide[1] / wide[0]) > 4 * math.log(narrow[1] / narrow[0])


def test_how_it_would_have_done_is_counted():
    norms = spiky()
    suggestion = suggest_threshold(norms)
    backtest = suggestion.backtest
    assert backtest.threshold == suggestion.threshold
    assert backtest.clip_rate == np.mean(norms > backtest.threshold)
    assert backtest.quarters == tuple(np.mean(q > backtest.threshold) for q in np.split(norms, 4))
    assert suggestion.spikes == 25
    assert backtest.worst_before == pytest.approx(norms.max(), rel=0.15)
    assert backtest.worst_after < 2


def test_spikes_move_neither_threshold_nor_drift():
    plain, spikes = (suggest_threshold(norms) for norms in (noisy(), spiky()))
    assert spikes.alternative.startswith("optclip.clip_by_global_norm(")
    assert spikes.threshold == pytest.approx(plain.threshold, rel=0.05)
    assert spikes.drift == pytest.approx(plain.drift, rel=0.1)


@pytest.mark.parametrize("factor", [10, 0.1])
def test_a_drifting_run_is_told_from_a_spiky_one(factor):
    norms = drifting(factor)
    suggestion = suggest_threshold(norms)
    medians = by_hand(norms)[2]
    assert suggestion.threshold is None
    assert suggestion.method == "optclip.safeguard(optimizer)"
    assert suggestion.alternative == "optclip.robust_clip()"
    assert suggestion.verdict == "level moves"
    assert suggestion.drift == pytest.approx(max(medians) / min(medians))
    assert suggestion.drift > 4
    assert ("rises" if factor > 1 else "falls") in suggestion.reason
    assert suggestion.backtest.quarters == tuple(
        np.mean(q > suggestion.backtest.threshold) for q in np.split(norms, 4)
    )


def test_what_one_threshold_fits():
    for norms in (drifting(2.5), drifting(0.4), noisy(200, noise=1.0), np.linspace(3, 1, 500)):
        assert suggest_threshold(norms).threshold is not None
    # A linear decay to nothing does not.
    assert suggest_threshold(np.linspace(1, 0.01, 500)).threshold is None


def test_noise_is_no_drift():
    drifts = [suggest_threshold(noisy(160, 1.0, seed)) for seed in range(30)]
    assert {s.verdict for s in drifts} == {"quiet"}


def test_the_start_of_a_run_is_left_out():
    norms = noisy()
    norms[:100] *= 30
    assert suggest_threshold(norms).threshold == pytest.approx(
        suggest_threshold(noisy()).threshold, rel=1e-9
    )


def test_a_wild_start_has_spikes_though_its_own_neighbors_cannot_tell():
    norms = noisy()
    norms[:40] = noisy(40, noise=1.5, seed=1)
    norms[30] = 8.0
    wild = suggest_threshold(norms)
    assert (wild.verdict, wild.spikes) == ("spikes", 0)
    assert wild.reason.startswith("No step stands out as a spike, but the norms vary up to ")
    assert suggest_threshold(noisy(1000, noise=1.0)).verdict == "quiet"


def test_the_start_of_a_run_is_that_of_the_steps_with_norms():
    norms = np.concatenate([20 * noisy(30), noisy(270), np.full(630, np.nan)])
    threshold = suggest_threshold(norms).threshold
    assert threshold == pytest.approx(by_hand(norms[:300])[0], rel=1e-9)


def test_a_steep_start_is_told_of():
    norms = noisy() * np.concatenate([np.geomspace(8, 1, 200), np.ones(800)])
    steep, flat = suggest_threshold(norms), suggest_threshold(noisy())
    assert steep.backtest.clip_rate > 0.1
    assert "% of the steps, most of them in the first quarter of the run," in str(steep)
    assert "most of them" not in str(flat)


@pytest.mark.parametrize("scale", [1e-12, 1e6, 1e12])
@pytest.mark.parametrize("norms", [noisy(), drifting(10), noisy(3)], ids=["noisy", "drift", "3"])
def test_it_has_no_scale(norms, scale):
    one, other = suggest_threshold(norms), suggest_threshold(scale * norms)
    assert one.verdict == other.verdict
    assert other.backtest.threshold == pytest.approx(scale * one.backtest.threshold, rel=1e-6)
    assert (one.threshold is None) == (other.threshold is None)
    assert other.drift == pytest.approx(one.drift) if one.drift else other.drift is None
    if one.interval:
        assert other.interval == pytest.approx([scale * x for x in one.interval], rel=1e-6)


# Records of every kind ---------------------------------------------------------------------------


def test_short_records_are_answered_with_what_to_record():
    for count in (1, 2, 3, 20, 49):
        suggestion = suggest_threshold(noisy(count))
        assert suggestion.verdict == "too short"
        assert suggestion.threshold is suggestion.interval is None
        assert suggestion.method == "optclip.measure_norms()"
        assert suggestion.alternative == "optclip.safeguard(optimizer)"
        assert str(suggestion).startswith("Too short to tell: record a longer run with ")
        assert f"{count} norm" in suggestion.reason
    assert suggest_threshold(noisy(50)).threshold is not None
    assert suggest_threshold(noisy(100_000)).uncertainty is None


def test_norms_that_were_logged_after_a_clip_are_found_out():
    for norms in (np.full(500, 3.0), np.minimum(noisy(), 0.9), np.minimum(noisy(), 1.15)):
        capped = suggest_threshold(norms)
        assert (capped.verdict, capped.threshold) == ("clipped", None)
        assert "were logged after a clip" in capped.reason
    assert suggest_threshold(np.minimum(noisy(), 1.3)).verdict == "quiet"
    assert suggest_threshold({"clip/norm": noisy(), "clip/factor": np.ones(1000)}).notes == ()


def test_what_is_not_finite_or_0_is_left_out_and_counted():
    norms = noisy()
    holes = np.insert(norms, [200, 300, 301, 900], [np.nan, np.inf, 0, np.nan])
    plain, suggestion = suggest_threshold(norms), suggest_threshold(holes)
    assert suggestion.threshold == pytest.approx(plain.threshold, rel=0.02)
    assert suggestion.notes == (
        "3 of 1,004 norms not finite, and left out",
        "1 of 1,004 norms 0, and left out",
    )
    assert suggestion.backtest.clip_rate == np.mean(
        holes[np.isfinite(holes)] > suggestion.backtest.threshold
    )


def test_a_run_that_diverged():
    norms = np.full(200, np.nan)
    norms[:12] = np.geomspace(1, 1e15, 12)
    suggestion = suggest_threshold(norms)
    assert suggestion.threshold is None
    assert suggestion.method == "optclip.safeguard(optimizer)"
    assert "no finite norm from step 13 of 200 on" in suggestion.reason
    # Where the level is known in spite of it, the threshold is too.
    late = np.concatenate([noisy(150), np.full(50, np.nan)])
    assert suggest_threshold(late).threshold is not None
    assert (
        suggest_threshold(late)
        .notes[-1]
        .startswith("the run diverged: no finite norm from step 151 of 200 on")
    )
    # Gaps as anywhere else are no divergence.
    sparse = np.full(800, np.nan)
    sparse[::12] = noisy(67)
    assert suggest_threshold(sparse).verdict == "quiet"


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ([0.0] * 9, "the log: none of 9 norms is above 0"),
        ([np.nan, np.inf], "the log: none of 2 norms is finite"),
        ([], "has no norms"),
        ([[1.0, 2.0]], "must be of shape (steps,)"),
    ],
)
def test_what_there_is_no_answer_to_is_said_in_one_line(norms, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        suggest_threshold(np.array(norms))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_source_of_the_same_norms(tmp_path):
    norms = noisy(100)
    rows = [{"step": i, "clip/norm": norm} for i, norm in enumerate(norms.tolist())]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources = (norms, norms.tolist(), jnp.asarray(norms), rows, {"clip/norm": norms}, file)
    answers = [
        suggest_threshold(source).threshold for source in (*sources, str(file), read_log(file))
    ]
    assert answers == pytest.approx([answers[0]] * len(answers), rel=1e-6)
    named = suggest_threshold({"g": norms, "norm": norms * 2}, norm_key="g")
    assert named.threshold == answers[0]


def test_a_run_that_was_clipped_cannot_tell_or_is_noted():
    norms = noisy(200)
    columns = {"clip/norm": norms, "clip/factor": np.minimum(1, 0.5 / norms)}
    clipped = suggest_threshold(columns)
    assert (clipped.verdict, clipped.threshold, clipped.notes) == ("clipped", None, ())
    assert "of its steps were clipped" in clipped.reason
    columns["clip/factor"] = np.minimum(1, np.quantile(norms, 0.7) / norms)
    (note,) = suggest_threshold(columns).notes
    assert note.startswith("30% of the steps were clipped")
    columns["clip/factor"] = np.minimum(1, 10 / norms)
    assert suggest_threshold(columns).notes == ()


def test_a_run_whose_loss_did_not_fall_is_noted():
    norms, noise = noisy(400), 0.1 * np.random.default_rng(0).normal(size=(3, 400))
    falling, flat, rising = np.array([[2, 1], [1, 1], [1, 2]]) @ np.linspace([1, 0], [0, 1], 400).T
    losses = np.stack([falling, flat, rising]) + noise
    noted = [suggest_threshold({"norm": norms, "loss": loss}).notes for loss in losses]
    assert [len(notes) for notes in noted] == [0, 1, 1]
    assert "the loss did not fall" in noted[2][0]


def test_the_spike_score_is_the_share_of_outliers_of_a_moving_mean():
    norms = noisy()
    norms[[300, 500, 501]] = 40, 40, 9
    outliers = [
        norms[at] > norms[at - 128 : at].mean() + 6 * norms[at - 128 : at].std()
        for at in range(128, 1000)
    ]
    assert sum(outliers) >= 1
    suggestion = suggest_threshold(norms)
    assert suggestion.spike_score == pytest.approx(np.mean(outliers))
    assert suggest_threshold(noisy(128)).spike_score is None
    assert f"Spike score {100 * np.mean(outliers):.1f}%: " in str(suggestion)


def test_the_leaves_that_rose_first_at_the_worst_spike_are_named():
    norms = noisy()
    leaves = {path: norms.copy() for path in ("embed", "head", "late")}
    leaves["embed"][600:602] *= 20  # a step before the others
    leaves["head"][601] *= 60
    total = np.sqrt(sum(x**2 for x in leaves.values()))
    columns = {f"clip/norms/{path}": x for path, x in leaves.items()}
    suggestion = suggest_threshold({"clip/norm": total, **columns})
    assert list(suggestion.rose_first) == ["embed", "head"]
    usual = np.median(leaves["head"][547:597])
    assert suggestion.rose_first["head"] == pytest.approx(leaves["head"][601] / usual, rel=0.1)
    assert "At the worst spike embed (" in str(suggestion)
    assert suggest_threshold(total).rose_first == {}


def test_a_note_that_asks_ends_in_its_question_mark():
    columns = {"norm": noisy(40), "step": np.r_[:20, :20]}
    assert "two runs in one file?" in str(suggest_threshold(columns))


def test_a_step_number_is_put_beside_a_step_number():
    norms = np.where(np.arange(160) < 80, noisy(160), np.nan)
    columns = {"norm": norms, "step": 100 * np.arange(160)}
    assert "from step 8,000 of 15,900 on" in str(suggest_threshold(columns))


def test_spikes_are_counted_by_height_whatever_the_log_calls_one():
    columns = {"norm": noisy(400), "spike": np.arange(400) % 25 == 24}
    assert suggest_threshold(columns).verdict == "quiet"


def test_only_rows_with_a_factor_count_as_clipped():
    norms = noisy(400)
    factor = np.where(np.arange(400) % 100 < 30, 0.5, 1.0)
    factor[1::2] = np.nan
    (note,) = suggest_threshold({"clip/norm": norms, "clip/factor": factor}).notes
    assert note.startswith("30% of the steps were clipped")


def test_accumulated_gradients_count_once():
    norms = noisy(200)
    for early in (0, 3):  # of a state before its first update
        log = np.concatenate([np.zeros(early), np.repeat(norms, 4)])[: 800 - 2]
        record = read_log(
            {"clip/norm": log, "clip/factor": np.ones(len(log)), "loss": -np.arange(len(log))}
        )
        np.testing.assert_array_equal(record.norms, norms[: len(record.norms)])
        assert record.steps[:3].tolist() == [early + 1, early + 5, early + 9]
        assert len(record.columns["loss"]) == len(record.steps) == len(record.norms)
        assert len(record.norms) == (200 if not early else 199)
        (note,) = suggest_threshold(record).notes
        assert note.startswith("each norm stands 4 times in a row and is counted once")
        once = suggest_threshold(norms[: len(record.norms)])
        assert suggest_threshold(record).threshold == once.threshold
    for other in (np.ones(50), noisy(50), np.repeat([1.0, 2.0], 10), np.tile([1.0, 1, 2], 20)):
        assert len(read_log(other).norms) == len(other)


def test_two_runs_in_one_log_are_noted():
    rows = [{"step": step, "norm": 1.0 + step} for step in (*range(1, 31), *range(1, 31))]
    (note,) = suggest_threshold(rows).notes
    assert note == "the steps do not rise (1 after 30); two runs in one file?"


# Histograms --------------------------------------------------------------------------------------


def test_a_histogram_gives_the_tail_and_says_that_it_knows_no_drift():
    norms = spiky(20_000)
    whole = suggest_threshold(histogram_of(norms))
    level, upper = np.quantile(norms, [0.5, 0.75])
    expected = level * math.exp(2 * math.log(upper / level) / 0.6745)
    assert whole.threshold == pytest.approx(expected, rel=0.1)  # bins are 4% wide
    assert whole.clip_rate == pytest.approx(np.mean(norms > whole.threshold), abs=0.01)
    assert whole.drift is None
    assert whole.spikes == 500
    assert whole.backtest.quarters == ()
    assert whole.backtest.worst_after < 2 < 50 < whole.backtest.worst_before
    assert whole.verdict == "spikes"
    assert whole.interval is whole.spike_score is None


def test_states_with_a_histogram():
    optimizer = optax.chain(optclip.measure_norms(histogram=True), optax.adam(1e-3))
    state = optimizer.init(jnp.zeros(2))
    update = jax.jit(optimizer.update)
    for norm in (*noisy(60), np.nan):
        _, state = update(jnp.array([norm, 0.0]), state)
    first: optclip.ClipState = state[0]
    answers = [suggest_threshold(source) for source in (state, first, first.memory, {"a": state})]
    assert len({answer.threshold for answer in answers}) == 1
    assert 1.3 < answers[0].threshold < 1.8
    assert answers[0].notes == ("not finite, and left out: 1 of the gradients",)
    assert answers[2].notes == ()  # the histogram alone does not know


@pytest.mark.parametrize("hidden", [lambda s: {"train": {"opt": s}}, lambda s: {"all": [{"s": s}]}])
def test_states_deep_in_mappings_are_found(hidden):
    state = optclip.measure_norms(histogram=True).init({"w": jnp.zeros(1)})
    state = state._replace(memory=histogram_of(noisy(100)))
    assert suggest_threshold(hidden(state)).steps == 100


def test_states_without_norms_are_refused_in_one_line():
    state = optclip.robust_clip().init(jnp.zeros(2))
    empty = optclip.measure_norms(histogram=True).init(jnp.zeros(2))
    twice = histograms.NormHistogram(np.ones((2, histograms.BINS)))
    for source, said in (
        (state, "optclip.measure_norms(histogram=True)"),
        (empty, "the histogram is empty"),
        (twice, "optclip.histograms.merged"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+$") as raised:
            suggest_threshold(source)
        assert said in str(raised.value)


# What a person reads -----------------------------------------------------------------------------

SOURCES = RUNS | {
    "holes": np.r_[noisy(), np.nan, 0.0, noisy()],
    "histogram": histogram_of(noisy()),
    "wide histogram": histogram_of(drifting(10)),
}
VERDICTS = {"holes": "quiet", "histogram": "quiet"}
VERDICTS["wide histogram"] = "level moves"


@pytest.mark.parametrize("name", SOURCES)
def test_it_reads_as_a_paragraph_and_writes_as_json(name):
    suggestion = suggest_threshold(SOURCES[name])
    text = str(suggestion)
    assert suggestion.verdict == VERDICTS.get(name, name)
    assert suggestion.method in text
    assert text.endswith(".")
    assert not {"nan", "inf", "None"} & set(text.replace(",", " ").split())
    assert len(text) < 800
    assert text.count(". ") < 8
    written = json.loads(json.dumps(suggestion.to_dict(), allow_nan=False))
    assert written["threshold"] == suggestion.threshold
    assert written["clip_rate_expected"] == suggestion.clip_rate
    assert written["backtest"]["clip_rate_over_the_run"] == suggestion.backtest.clip_rate
    assert "clip_rate" not in written | written["backtest"]


@pytest.mark.parametrize("name", ["quiet", "spikes", "level moves", "diverged", "too short"])
def test_a_histogram_of_the_same_norms_says_the_same(name):
    norms = SOURCES[name]
    finite = np.isfinite(norms)
    state = optclip.measure_norms(histogram=True).init({"w": jnp.zeros(1)})
    state = state._replace(
        memory=histogram_of(norms[finite]), nonfinite_steps=jnp.asarray(np.sum(~finite), jnp.int32)
    )
    by_log, by_state = suggest_threshold(norms), suggest_threshold(state)
    assert by_state.verdict == by_log.verdict
    assert by_state.spikes == by_log.spikes
    assert by_state.method.partition("(")[0] == by_log.method.partition("(")[0]
    if by_log.threshold is not None:
        assert by_state.threshold == pytest.approx(by_log.threshold, rel=0.1)


def test_a_state_with_a_clip_that_clipped_says_so():
    optimizer = optax.chain(
        optclip.measure_norms(histogram=True), optclip.clip_by_global_norm(0.1), optax.sgd(0.1)
    )
    state = optimizer.init(jnp.zeros(1))
    update = jax.jit(optimizer.update)
    for norm in noisy(60):
        _, state = update(jnp.array([norm]), state)
    assert suggest_threshold(state).verdict == "clipped"


@pytest.mark.parametrize("name", ["quiet", "spikes", "level moves", "diverged"])
def test_what_is_suggested_can_be_pasted(name):
    suggestion, optimizer = suggest_threshold(SOURCES[name]), optax.sgd(0.1)
    for code in filter(None, (suggestion.method, suggestion.alternative)):
        clip = eval(code, {"optclip": optclip, "optimizer": optimizer})
        params = jnp.ones(2)
        clip.update(jnp.array([3.0, 4.0]), clip.init(params), params)


def test_long_records_take_little_time_and_memory():
    norms = np.tile(noisy(1000), 300)
    assert suggest_threshold(norms).threshold == pytest.approx(
        suggest_threshold(noisy(1000)).threshold, rel=0.05
    )
