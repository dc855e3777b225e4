"""`replay`: what it reports is what the methods do, step by step, and nothing is left unnamed."""

import builtins
import io
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import METHODS, WRAPPERS
from matplotlib.figure import Figure

import optclip
from optclip import catalogue
from optclip._tuning import replay_result
from optclip._tuning.findings import finding
from optclip._tuning.replay_methods import NO_LEAVES, _by_memory, _with_defaults
from optclip.tuning import replay

METHOD = {method.name: method for method in METHODS + WRAPPERS}
PUBLIC = sorted(METHOD)


def noisy(count: int = 400, noise: float = 0.2, seed: int = 0) -> np.ndarray:
    return np.exp(noise * np.random.default_rng(seed).normal(size=count))


def spiky() -> np.ndarray:
    """Two spikes, a NaN, an infinity, a zero, and from step 250 on four times the level."""
    norms = noisy()
    norms[[100, 120]] *= 100, 20
    norms[[50, 60, 70]] = np.nan, np.inf, 0
    norms[250:] *= 4
    return norms


def by_hand(transform, norms, split=(1.0,)):
    """(threshold, norm that comes out, clipped) of each step, in a plain loop."""
    like = [jnp.zeros(1)] * len(split)
    state, update = transform.init(like), jax.jit(transform.update)
    steps = []
    for norm in norms:
        gradient = [jnp.full(1, norm * share, jnp.float32) for share in split]
        updates, state = update(gradient, state)
        readings = optclip.metrics(state)
        kind = "skip" if "skip/norm" in readings else "clip"
        out = math.hypot(*(float(u[0]) for u in updates))
        clipped = out < 0.9999999 * float(readings[f"{kind}/norm"]) and math.isfinite(norm)
        steps.append((float(readings[f"{kind}/threshold"]), out, clipped))
    return (np.array(column) for column in zip(*steps, strict=True))


@pytest.mark.parametrize(
    "transform",
    [
        optclip.clip_by_global_norm(1.3),
        optclip.robust_clip(),
        optclip.skip_spikes(optax.identity(), window=16),
        optax.chain(optclip.zclip(warmup_steps=10), optax.identity()),
    ],
    ids=["fixed", "robust", "skip", "chain"],
)
def test_it_is_what_the_transformation_does(transform):
    norms = spiky()[:140]
    [row] = replay(norms, {"mine": transform}).rows
    thresholds, outputs, clipped = by_hand(transform, norms)
    np.testing.assert_allclose(row.thresholds, thresholds, rtol=1e-5)
    np.testing.assert_allclose(row.outputs, outputs, rtol=1e-5)
    finite = np.isfinite(norms)
    assert row.clipped == pytest.approx(clipped[finite].mean())
    assert row.clipped_last_quarter == pytest.approx(clipped[105:].mean())
    assert row.final_threshold == row.thresholds[-1]


def test_of_safeguard_the_clip_before_the_optimizer_is_replayed():
    """Its bound never acts, whatever the optimizer: what it holds only the parameters tell."""
    norms = spiky()
    deviations = {"deviations": 2.5}
    alone, plain, adam = replay(
        norms,
        {
            "alone": optclip.robust_clip(**deviations),
            "plain": optclip.safeguard(optax.identity(), **deviations),
            "adam": optclip.safeguard(optax.adamw(1e-3), **deviations),
        },
    ).rows
    finite = np.isfinite(norms)
    for row in (plain, adam):
        np.testing.assert_allclose(row.thresholds, alone.thresholds, rtol=1e-5)
        np.testing.assert_allclose(row.outputs[finite], alone.outputs[finite], rtol=1e-5)
        assert row.clipped == alone.clipped
        assert (row.outputs[~finite] == 0).all()  # skipped
    assert "safeguard: its clip" in str(replay(norms, ["safeguard"]))


def test_methods_by_leaf_get_the_norms_of_the_leaves():
    norms = noisy(60)
    columns = {"clip/norm": norms, "clip/norms/a": 0.6 * norms, "clip/norms/b": 0.8 * norms}
    transform = optclip.adagc(warmup_steps=5)
    [row] = replay(columns, {"mine": transform}).rows
    assert row.by_leaf
    thresholds, outputs, _ = by_hand(transform, norms, split=(0.6, 0.8))
    np.testing.assert_allclose(row.thresholds, thresholds, rtol=1e-5)
    np.testing.assert_allclose(row.outputs, outputs, rtol=1e-5)
    fixed = optclip.clip_by_leaf_norm(0.7)
    [row] = replay(columns, {"mine": fixed}).rows
    assert row.clipped == np.mean(0.8 * norms > 0.7)


def test_a_fixed_threshold_clips_exactly_what_exceeds_it():
    norms = spiky()
    [row] = replay(norms, {"mine": optclip.clip_by_global_norm(1.25)}).rows
    finite = norms[np.isfinite(norms)]
    assert row.clipped == np.mean(finite > 1.25)
    assert row.clipped_last_quarter == np.mean(norms[300:] > 1.25)


def test_spikes_and_rises():
    result = replay(
        spiky(),
        {
            "low": optclip.clip_by_global_norm(1.5),
            "high": optclip.clip_by_global_norm(30.0),
            "none": optclip.measure_norms(),
            "robust": optclip.robust_clip(),
        },
    )
    assert result.spikes == 2
    assert result.rise == 251
    low, high, none, robust = result.rows
    assert [row.spikes_through for row in result.rows] == [0, 2, 2, 0]
    assert none.worst_spike == pytest.approx(result.worst_spike)
    assert result.worst_spike == pytest.approx(100, rel=0.3)
    assert none.clipped == 0
    assert high.worst_spike == pytest.approx(30 * result.worst_spike / spiky()[100])
    assert (low.steps_after_spike, high.steps_after_spike) == (0, 0)
    assert (low.steps_after_rise, high.steps_after_rise) == (math.inf, 0)
    assert 3 < robust.steps_after_rise < 60
    after = robust.outputs[250:] < 0.9 * spiky()[250:]
    first = int(robust.steps_after_rise)
    shares = [after[k : k + 20].mean() for k in range(first + 1)]
    assert shares[-1] <= 0.5 < min(shares[:-1])


@pytest.mark.parametrize("change", [0.1, 1.0, 2.0])
def test_what_is_no_rise(change):
    norms = noisy()
    norms[200:] *= change
    norms[100:115] *= 30
    assert replay(norms, ["robust_clip"]).rise is None


def test_no_spike_and_no_rise_are_none_and_have_no_column():
    result = replay(noisy(), ["robust_clip"])
    [row] = result.rows
    assert (row.steps_after_rise, row.steps_after_spike) == (None, None)
    assert math.isnan(row.worst_spike)
    text = str(result)
    assert "threshold" in text
    assert "spike " not in text
    assert "after" not in text


@pytest.fixture(scope="module")
def everything():
    return replay(spiky())


def test_every_public_method_is_replayed_or_named_with_the_reason(everything):
    replayed = {row.method.partition("(")[0] for row in everything.rows}
    assert replayed | everything.not_replayed.keys() == set(PUBLIC)
    assert not replayed & everything.not_replayed.keys()
    assert all(everything.not_replayed.values())
    assert everything.not_replayed["adagc"] == NO_LEAVES
    assert {"robust_clip", "zclip", "autoclip", "clip_by_quantile", "skip_spikes"} <= replayed
    assert "safeguard" in replayed
    assert {"clip_by_window", "clip_by_moving_average", "clip_by_global_norm"} <= replayed
    assert all(not METHOD[name].needs_params for name in replayed - {"safeguard"})
    assert all(METHOD[name].has_memory for name in replayed - {"clip_by_global_norm"})
    assert everything.not_replayed["measure_norms"] == "learns no threshold"
    assert "single entries" in everything.not_replayed["spam_clip"]


@pytest.mark.parametrize("method", [m for m in METHODS if m.has_memory], ids=str)
def test_what_shapes_tell_of_a_method_is_what_it_does_when_it_is_tried_out(method):
    columns = {"norm": noisy(3), "norms/x": 0.6 * noisy(3), "norms/y": 0.8 * noisy(3)}
    tried = replay(columns, {"mine": method.build()})
    without: dict[str, str] = {}
    built = _with_defaults([catalogue.named(method.name)], without)
    told = _by_memory(built[method.name]) if built else without[method.name]
    if method.name != "measure_norms":
        assert [row.by_leaf for row in tried.rows] == ([] if isinstance(told, str) else [told])


OF_MORE = [
    method
    for method in METHODS + WRAPPERS
    if method.name != "safeguard"
    and (method.needs_params or method.scope == "element" or method.norm != "l2")
]


@pytest.mark.parametrize("method", OF_MORE, ids=str)
def test_transformations_that_take_more_than_norms_are_found_out(method):
    result = replay(noisy(40), {"mine": method.build()})
    assert not result.rows
    assert result.not_replayed["mine"]


def test_scope_and_norm_of_a_transformation_are_found_out():
    norms = noisy(40)
    columns = {"norm": norms, "norms/x": norms / 2, "norms/y": norms * 0.75**0.5}
    methods = {
        "leaf": optclip.clip_by_leaf_norm(0.5),
        "group": optclip.clip_by_group_norm(0.5, {"x": "one", "y": "two"}.get),
        "detail": optclip.robust_clip(detail=True),
        "inner": optax.chain(optclip.robust_clip(), optax.adam(1e-3)),
        "l1": optclip.clip_by_global_norm(1.0, ord=1),
        "other": optax.clip_by_global_norm(1.0),
    }
    result = replay(columns, methods)
    assert {row.method: row.by_leaf for row in result.rows} == {
        "leaf": True,
        "group": True,
        "detail": False,
        "inner": False,
    }
    assert result.not_replayed.keys() == {"l1", "other"}
    assert replay(norms, {"leaf": methods["leaf"]}).not_replayed == {"leaf": NO_LEAVES}


def test_it_can_be_written_as_json(everything):
    read = json.loads(json.dumps(everything.to_dict(), allow_nan=False))
    assert len(read["rows"]) == len(everything.rows)
    assert not {"thresholds", "outputs"} & read["rows"][0].keys()
    whole = json.loads(json.dumps(everything.to_dict(every_step=True), allow_nan=False))
    assert len(whole["rows"][0]["thresholds"]) == 400
    assert read["nonfinite_norms"] == 2
    assert read["suggestion"]["method"] == everything.suggestion.method


def test_table_and_what_is_printed(everything, monkeypatch):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(everything.table())
    text = str(everything)
    for shown in (console.export_text(), text):
        assert all(row.method in shown for row in everything.rows)
        for said in ("Open loop", "never", "2 of the norms not finite"):
            assert said in shown.replace("\n", " ")
    assert len(text.splitlines()) < 30
    assert "\x1b" not in text
    assert len(repr(everything)) < 300
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert str(everything) == repr(everything)


def test_the_worst_spike_is_that_of_the_picture():
    norms = noisy()
    norms[200] = 50
    rows = [{"clip/norm": norm, "spike": at == 200} for at, norm in enumerate(norms.tolist())]
    result = replay(rows, {"none": optclip.measure_norms()})
    said = re.search(r"1 spike, (\S+) times the usual norm", finding(rows))
    assert f"{result.worst_spike:.0f}" == said[1]
    assert result.rows[0].worst_spike == result.worst_spike
    assert f"the worst {said[1]}x the usual norm" in str(result).replace("\n", " ")


def test_spikes_are_counted_by_height_whatever_the_log_calls_one():
    columns = {"norm": np.ones(400), "spike": np.arange(400) % 25 == 24}
    result = replay(columns, ["robust_clip"])
    assert result.spikes == 0
    assert math.isnan(result.worst_spike)


def test_leaves_that_do_not_make_up_the_norm_are_refused():
    leaf = noisy()
    now_and_then = np.where(np.arange(400) % 10 == 0, leaf, np.nan)
    whole = {"clip/norm": np.hypot(leaf, leaf), "clip/norms/a": leaf, "clip/norms/b": leaf}
    sparse = whole | {"clip/norms/a": now_and_then, "clip/norms/b": now_and_then}
    one = {"clip/norm": np.hypot(leaf, leaf), "clip/norms/a": leaf}
    for log, said in ((sparse, "at 360 of 400 steps"), (one, "at 400 of 400 steps")):
        for methods in (["adagc"], {"adagc": optclip.adagc()}):
            result = replay(log, methods)
            assert said in result.not_replayed["adagc"]
            assert not result.rows
    assert replay(whole, ["adagc"]).not_replayed == {}


def test_waits_are_in_steps_of_the_run():
    norms = noisy()
    norms[200:] *= 4
    columns = {"norm": norms, "step": 10 * np.arange(400)}
    (row,), (sparse,) = (replay(x, ["robust_clip"]).rows for x in (norms, columns))
    assert sparse.steps_after_rise == 10 * row.steps_after_rise > 0


@pytest.mark.filterwarnings("error")
def test_an_infinity_that_is_skipped_gives_no_warning():
    assert replay([1.0, math.nan, math.inf]).spikes == 0


def test_two_runs_are_drawn_one_after_the_other_and_few_points_are_marked():
    axes = Figure().subplots()
    columns = {"norm": noisy(20), "step": np.r_[:10, :10]}
    result = replay(columns, ["robust_clip"])
    replay_result._panel(axes, result, result.rows[0])
    for line in axes.lines:
        assert (np.diff(line.get_xdata()) > 0).all()
        assert line.get_marker() == "."


@pytest.mark.parametrize("names", [None, ["robust_clip"]])
def test_picture(everything, names, tmp_path):
    result = everything if names is None else replay(noisy(3), names)
    path = result.draw(tmp_path / "replay.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_title_names_the_rule_that_clips_least():
    norms = noisy()
    norms[200] = 100
    rules = {"low": 1.2, "high": 3.0, "none": 1e9}
    methods = {name: optclip.clip_by_global_norm(x) for name, x in rules.items()}
    assert replay_result.finding(replay(norms, methods)) == (
        "2 of 3 rules hold the spike below 5 times the usual norm; of these high clips the fewest "
        "steps, 0.2%"
    )


def test_a_threshold_that_leaves_its_panel_is_noted():
    inside, above = np.full(5, 2.0), np.array([1.0, 2.0, 3.0, 40.0, np.nan])
    said = [replay_result._out_of_sight("threshold", x, 0.5, 10) for x in (inside, above)]
    assert said == ["", "threshold up to 40, above the picture"]
    assert replay_result._out_of_sight("threshold", inside, 3, 10) == "threshold below the picture"


@pytest.mark.parametrize("norms", [noisy(), 3 + 0.01 * noisy(), 10.0 ** np.arange(12)])
def test_a_panel_has_plain_ticks_two_at_least(norms):
    axes = Figure().subplots()
    result = replay(norms, ["robust_clip"])
    replay_result._panel(axes, result, result.rows[0])
    low, high = axes.get_ylim()
    texts = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert 2 <= len(texts) <= 5
    assert len({"^" in text for text in texts}) == 1
    assert ("^" in texts[0]) == (norms.max() > 1e6)


def test_short_and_strange_records():
    for norms in ([2.0], [1.0, np.nan, 1.0], [1.0] * 50, [0.0, 0.0, 3.0], [1e-30, 1e30, 1.0]):
        [row] = replay(np.array(norms), ["robust_clip"]).rows
        assert len(row.outputs) == len(norms)
        assert 0 <= row.clipped <= 1


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("robust_clip", "must be a list of names"),
        (["nonsense"], "no method to replay is called 'nonsense'"),
        (["clip_by_global_norm"], "has no default for max_norm; pass {'mine': optclip.clip"),
        ({"mine": 1.0}, "must be a transformation"),
    ],
)
def test_what_cannot_be_asked_for_is_said_in_one_line(methods, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        replay(noisy(40), methods)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_extras_that_are_missing_are_named(everything, package, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "optclip\[tuning\]"'):
        everything.table() if package == "rich" else everything.draw(tmp_path / "x.png")


def test_what_cannot_be_replayed_is_said_in_its_own_words():
    count = optclip.measure_norms(histogram=True)
    _, counted = count.update(jnp.ones(1), count.init(jnp.zeros(1)))
    for source, said in (
        (1e-40 * noisy(), "beyond what float32 can replay"),
        (1e100 * noisy(), "beyond what float32 can replay"),
        ([0.0, 0.0, 0.0], "none of 3 norms is above 0, so there is nothing to replay"),
        (counted, "does not know the order"),
    ):
        with pytest.raises(ValueError, match=said):
            replay(source)


def test_a_rule_that_always_clips_is_not_late_after_a_spike():
    norms = noisy()
    norms[200] = 50
    low, high = replay(
        norms, {"low": optclip.clip_by_global_norm(0.3), "high": optclip.zclip()}
    ).rows
    assert low.steps_after_spike is None
    assert high.steps_after_spike == 0
