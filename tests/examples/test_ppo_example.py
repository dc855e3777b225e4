"""examples/ppo.py: an ensemble is its members, a sweep its runs; what a person types and sees."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.samples import QUICK, assert_close, quick_jit, unstacked

# The libraries that only the example needs may warn as they like.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "ppo.py"
SEEDS = np.arange(3, dtype=np.uint32)
READINGS = {"norm", "clipped_norm", "threshold", "factor", "clip_rate", "recent_clip_rate"}
READINGS |= {"nonfinite_steps"}


@pytest.fixture(scope="module")
def keys():
    return jax.vmap(jax.random.key)(SEEDS)


@pytest.fixture(scope="module")
def tiny(example):
    """Two updates of eight steps of Adam: later a rounding may turn an action, and all after it."""
    sizes = {"updates": 2, "envs": 4, "steps": 16, "epochs": 4, "minibatches": 2, "width": 8}
    return dataclasses.replace(example.Config(), **sizes)


@pytest.fixture(scope="module")
def ensemble(example, tiny, keys):
    return quick_jit(lambda keys: example.train_ensemble(tiny, keys))(keys)


def test_it_learns_in_a_short_run(example, keys):
    config = example.Config(lr=5e-3, updates=12, envs=8, steps=64, width=32)
    history = quick_jit(lambda keys: example.train_ensemble(config, keys))(keys)["history"]
    returned = np.asarray(history["return"])
    # Of 16 seeds the first return was at most 30, and the last at least 122.
    assert np.max(returned[:, 0]) < 50
    assert np.min(returned[:, -1]) > 90


def test_a_member_of_the_ensemble_is_its_seed_alone(example, tiny, keys, ensemble):
    alone = quick_jit(example.make_train(tiny))
    for place, key in enumerate(keys):
        assert_close(unstacked(ensemble, place), alone(key), rtol=1e-4, atol=1e-5)
    assert len(np.unique(ensemble["history"]["clip/norm"])) == 2 * len(keys)


def test_a_sweep_is_its_runs(example, tiny, keys, ensemble):
    max_norms = jnp.float32([0.05, 0.5, 50.0])
    sweep = quick_jit(lambda keys, max_norms: example.train_sweep(tiny, keys, max_norms))
    together = sweep(keys, max_norms)
    assert_close(unstacked(together, 1), ensemble, rtol=1e-4, atol=1e-5)  # at the default of 0.5
    apart = dataclasses.replace(tiny, clip_args={"max_norm": 0.05})
    apart = quick_jit(lambda keys: example.train_ensemble(apart, keys))(keys)
    assert_close(unstacked(together, 0), apart, rtol=1e-4, atol=1e-5)
    rates = together["history"]["clip/clip_rate"]
    assert np.all(rates[0] == 1)
    assert np.all(rates[2] == 0)
    assert sweep(keys, max_norms * 2)["history"]["clip/threshold"][0, 0, 0] == np.float32(0.1)
    assert sweep._cache_size() == 1


def test_every_seed_has_its_own_readings_of_every_update(tiny, ensemble):
    history = {name: np.asarray(x) for name, x in ensemble["history"].items()}
    assert set(history) >= {"return"} | {f"clip/{name}" for name in READINGS}
    assert all(x.shape == (len(SEEDS), tiny.updates) for x in history.values())
    assert np.all((history["clip/clip_rate"] >= 0) & (history["clip/clip_rate"] <= 1))
    assert np.all(history["clip/threshold"] == 0.5)
    assert np.all(history["clip/clipped_norm"] <= 0.5 * (1 + 2e-6))
    assert np.all(history["clip/norm"] > 0)
    assert not history["clip/nonfinite_steps"].any()


def test_with_the_clip_of_optax_it_is_the_same_training(example, tiny, keys, ensemble):
    config = dataclasses.replace(tiny, clip="optax")
    trained = quick_jit(lambda keys: example.train_ensemble(config, keys))(keys)
    assert set(trained["history"]) == {"return"}
    for name in ("params", "return"):
        ours, theirs = ({**run, **run["history"]}[name] for run in (ensemble, trained))
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_cost_is_the_median_of_the_ratios(example, tiny, keys, monkeypatch, capsys):
    monkeypatch.setattr(example, "ROUNDS", 3)
    jit = functools.partial(jax.jit, compiler_options=QUICK)
    monkeypatch.setattr(example.jax, "jit", jit)
    told = example.compare_cost(tiny, keys)
    ours, theirs = (told["seconds"][name] for name in ("optclip", "optax"))
    assert len(ours) == len(theirs) == 3
    assert told["ratio"] == np.median(np.divide(ours, theirs))
    assert f"{told['ratio']:.3f} times as long" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rate", "means"),
    [(0.995, "left equally long"), (0.5, "ordinary"), (0.04, "stands out"), (0.0, "no norm was")],
)
def test_the_verdict_goes_by_the_share(example, tiny, rate, means):
    reading = np.ones((3, 2))
    names = {"norm": 8 * reading, "threshold": reading / 2, "clip_rate": rate * reading}
    share, said = example.verdict(tiny, {f"clip/{name}": x for name, x in names.items()})
    assert share.endswith("% of the steps clipped (usual norm 8, threshold 0.5)")
    assert means in said


def test_skipped_steps_and_no_readings_have_a_verdict_too(example, tiny):
    skipped = {"norm": np.ones((3, 2)), "threshold": np.ones((3, 2))}
    skipped |= {"skipped_steps": np.array([[0, 4]] * 3)}  # of 16
    share, _ = example.verdict(tiny, {f"skip/{name}": x for name, x in skipped.items()})
    assert share.startswith("25% of the steps")
    assert "not known" in example.verdict(tiny, {})[0]


def test_runs_as_typed(environment, tmp_path):
    options = "--updates 2 --seeds 2 --sweep 0.5 500 --json out/ppo.json --picture ppo.png"
    command = [sys.executable, SCRIPT, *options.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "max_norm 500: 0% of the steps clipped" in done.stdout.splitlines()[-1]
    told = json.loads((tmp_path / "out/ppo.json").read_text())
    assert list(told["runs"]) == ["max_norm 0.5", "max_norm 500"]
    assert np.shape(told["runs"]["max_norm 0.5"]["clip/norm"]) == (2, 2)
    assert (tmp_path / "ppo.png").stat().st_size > 10_000


def test_without_readings_there_is_a_picture_of_the_return(example, tiny, tmp_path):
    runs = {"3 seeds": {"return": np.array([[20.0, 30.0]] * 3)}}
    example.draw(tmp_path / "ppo.svg", tiny, runs, example.report(tiny, runs), "none")
    assert "return" in (tmp_path / "ppo.svg").read_text()
    assert example.json_ready(np.array([[1.0, np.inf]])) == [[1.0, None]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--seeds 0", "at least 1"),
        ("--sweep -1", "give a number above 0"),
        ("--clip zclp", "did you mean zclip?"),
        ("--clip zclip --sweep", "take clip_by_global_norm"),
        ("--sweep 1 --clip-arg max_norm=2", "leave out --clip-arg"),
        ("--clip-arg max_norm=-1", "must be in [0, inf]"),
        ("--clip optax --clip-arg ord=1", "unexpected keyword argument 'ord'"),
        ("--compare-cost --picture a.png", "leave out --sweep and --picture"),
        ("--picture a.bmp", ".png, .pdf or .svg"),
        ("--json .", "name another file"),
        ("--update 3", "unrecognized arguments: --update"),
    ],
)
def test_bad_input_is_one_line(example, capsys, arguments, said):
    assert example.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("ppo.py: ")
    assert err.count("\n") == 1
