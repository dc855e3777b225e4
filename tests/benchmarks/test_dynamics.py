"""The benchmark of the adaptive rules, and what `robust_clip` promises, held on its streams."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dynamics
from benchmarks import dynamics_streams as streams
from benchmarks.dynamics_figures import (
    clipped,
    kept,
    measure,
    steps_to_let_through,
    steps_to_recover,
    unmoved,
)
from benchmarks.dynamics_rules import NAMES, Traces, chosen, drive

ROOT = Path(__file__).parents[2]
SEEDS = 20


def driven(norms: streams.Streams) -> Traces:
    """What `robust_clip` with its defaults makes of the norms."""
    [family] = chosen(["robust_clip"])
    return drive(family, norms)["robust_clip"]


@pytest.fixture(scope="module")
def norms() -> streams.Streams:
    return streams.make(SEEDS, streams.SHIFT + 2000)


@pytest.fixture(scope="module")
def robust(norms) -> Traces:
    return driven(norms)


def test_robust_clips_the_same_share_whatever_the_noise(robust):
    settled = slice(streams.SHIFT, None)
    shares = [np.median(clipped(robust, streams.sigma(sigma), settled)) for sigma in streams.SIGMAS]
    assert min(shares) > 0.01, shares
    assert max(shares) < 2 * min(shares), shares


@pytest.mark.parametrize(
    ("stream", "step"),
    [
        ("one spike", streams.SPIKE),
        ("two spikes", streams.SPIKE),
        ("two spikes", streams.SECOND),
        ("early spike", streams.EARLY),
    ],
)
def test_robust_lets_no_spike_through(robust, stream, step):
    assert np.all(robust.norms[stream][:, step] >= streams.SECOND_SIZE)
    assert np.median(robust.outputs[stream][:, step]) <= 2
    # Nor does the spike cost the steps after it anything.
    after = slice(step + 1, step + 1 + 15)
    assert np.median(kept(robust, stream, after)) > 0.95


def test_robust_holds_a_burst(robust):
    burst = slice(streams.SPIKE, streams.SPIKE + streams.BURST)
    assert np.median(robust.norms["burst"][:, burst]) == streams.SECOND_SIZE
    assert np.median(robust.outputs["burst"][:, burst].mean(axis=1)) <= 2.5


@pytest.mark.parametrize(("shift", "steps"), [("x10", 1000), ("x0.1", 100)])
def test_robust_follows_a_lasting_change(robust, shift, steps):
    taken = steps_to_recover(robust, shift, streams.SHIFTS[shift])
    assert np.median(taken) <= steps
    assert np.all(np.isfinite(taken))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_robust_has_no_scale(norms, robust, scale):
    odd = ("nan", "inf", "zeros")  # They have no factor there, or no scale.
    plain = {name: of for name, of in norms.items() if name not in odd}
    scaled = driven({name: of * np.float32(scale) for name, of in plain.items()})
    for name, of in plain.items():
        factors = scaled.outputs[name] / scaled.norms[name]
        assert np.min(factors) < 0.9 or name in (streams.sigma(0.02), "constant")
        np.testing.assert_allclose(factors, robust.outputs[name] / of, rtol=1e-5, err_msg=name)


def test_robust_survives_zeros(robust):
    assert unmoved(robust, "zeros", streams.ZEROS_AT, streams.ZEROS)
    assert np.all(
        robust.outputs["zeros"][:, streams.ZEROS_AT : streams.ZEROS_AT + streams.ZEROS] == 0
    )
    thresholds = robust.thresholds["zeros"][:, 1:]
    assert np.all(np.isfinite(thresholds) & (thresholds > 0.1))


def test_robust_survives_a_constant_stream(robust):
    np.testing.assert_array_equal(robust.outputs["constant"], 1)
    thresholds = robust.thresholds["constant"][:, 1:]
    assert np.all((thresholds >= 1) & (thresholds < 2))


@pytest.mark.parametrize(("stream", "at"), [("nan", streams.NAN_AT), ("inf", streams.INF_AT)])
def test_robust_does_not_learn_from_what_is_not_finite(robust, stream, at):
    assert not np.any(np.isfinite(robust.norms[stream][:, at]))
    assert unmoved(robust, stream, at)


def by_hand(thresholds: np.ndarray, outputs: np.ndarray | None = None) -> Traces:
    """Traces of one seed, of a threshold of 2 without the change and of these with it."""
    steady = np.full((1, streams.SHIFT + thresholds.size), 2.0)
    changed, out = steady.copy(), np.ones_like(steady)
    changed[0, streams.SHIFT :] = thresholds
    out[0, streams.SHIFT :] = 1 if outputs is None else outputs
    return Traces(
        {"x10": np.ones_like(steady)}, {streams.REFERENCE: steady, "x10": changed}, {"x10": out}
    )


def test_recovered_means_for_good():
    step = np.arange(100)
    soon = np.where(step < 7, 2.0, 20.0)
    assert steps_to_recover(by_hand(soon), "x10", 10.0) == 7
    assert steps_to_recover(by_hand(np.where(step == 50, 41.0, soon)), "x10", 10.0) == 51
    assert steps_to_recover(by_hand(np.where(step == 50, 39.0, soon)), "x10", 10.0) == 7
    assert steps_to_recover(by_hand(np.where(step == 99, 9.0, soon)), "x10", 10.0) == np.inf
    assert steps_to_recover(by_hand(np.full(100, 20.0)), "x10", 10.0) == 0


def test_let_through_looks_ahead():
    step = np.arange(100)
    through = lambda outputs: steps_to_let_through(by_hand(step, outputs), "x10")  # noqa: E731
    assert through(np.where(step < 30, 0.5, 1.0)) == 21  # 11 of the 20 from step 21 on.
    assert through(np.full(100, 0.89)) == np.inf
    assert through(np.full(100, 0.91)) == 0


def test_a_fixed_threshold_is_measured_right(norms):
    [family] = chosen(["fixed 1.5"])
    of = measure(drive(family, streams.shortened(norms, 3, 1500))["fixed 1.5"])
    assert all(x == pytest.approx(1.5) for x in of["spikes"].values())
    assert all(x == np.inf for x in of["recovery"].values())
    assert of["clipped"]["sigma 0.02"] == 0
    above = np.mean(norms["sigma 1"][:3, streams.SHIFT : 1500] > 1.5, axis=1)
    assert of["clipped"]["sigma 1"] == pytest.approx(np.median(above))
    assert of["kept"]["sigma 0.02"] == pytest.approx(1)


def test_rules_of_a_family_do_not_mix(norms):
    """Two rules in one program are each what numpy says."""
    [family] = chosen(["autoclip"])
    stream, steps = streams.REFERENCE, 60
    short = {stream: norms[stream][:2, :steps]}
    together = drive(family, short)
    for name, percentile in (("autoclip p10", 10), ("autoclip p90", 90)):
        expected = [
            np.percentile(short[stream][:, : step + 1], percentile, axis=1) for step in range(steps)
        ]
        thresholds = together[name].thresholds[stream]
        np.testing.assert_allclose(thresholds, np.transpose(expected), rtol=1e-5)
        outputs = np.minimum(thresholds, short[stream])
        np.testing.assert_allclose(together[name].outputs[stream], outputs, rtol=1e-5)


def test_a_longer_run_has_the_same_beginning():
    long, short = streams.make(2, 1400), streams.make(1, 1200)
    for name, of in short.items():
        np.testing.assert_array_equal(of[0], long[name][0, :1200], err_msg=name)
        assert of.dtype == np.float32


def test_names_choose_rules():
    names = lambda *of: [n for family in chosen(list(of)) for n in family.names]  # noqa: E731
    assert names("zclip mean raw", "adagc") == ["zclip mean raw", "adagc"]
    assert names("autoclip p90") == ["autoclip p90"]
    assert len(names("zclip")) == 12
    assert tuple(n for family in chosen(None) for n in family.names) == NAMES
    for wrong in ("z", "zclip me", ""):
        with pytest.raises(ValueError, match="robust_clip"):
            chosen([wrong])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "nothing"], "nothing"),
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "many"], "--seeds"),
        (["--out", __file__], "test_dynamics.py"),
        (["--json", "no/such/folder/x.json"], "folder"),
        (["--wrong"], "--wrong"),
    ],
)
def test_nonsense_is_refused_in_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        dynamics.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_the_quick_run(tmp_path):
    path = tmp_path / "dynamics.json"
    command = [sys.executable, "-m", "benchmarks.dynamics", "--quick", "--json", str(path)]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    told = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    rules = [name for family in chosen(dynamics.QUICK_RULES) for name in family.names]
    assert list(told["rules"]) == rules
    assert all(name in ran.stdout for name in rules)
    assert told["rules"]["fixed 1.5"]["recovery"]["x10"] is None
    assert told["rules"]["robust_clip"]["spikes"]["second"] < 2
    for name, of in told["rules"].items():
        assert all(of["unmoved by"].values()), name
        assert all(isinstance(x, float) for x in of["clipped"].values()), name
    picture = (tmp_path / "out" / "dynamics.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 900
