"""The proving ground, tiny: what reaches the gradient, what is scored, what is run again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.samples import QUICK

from benchmarks.proving_ground import (
    __main__,
    conditions,
    jobs,
    pictures,
    reporting,
    running,
    scores,
    training,
)
from benchmarks.proving_ground.candidates import CANDIDATES
from benchmarks.proving_ground.contenders import CONTENDERS, NO_CLIP, RIVALS, Contender, before
from benchmarks.proving_ground.jobs import Job, Size
from benchmarks.proving_ground.task import Feed, Setting, Task
from benchmarks.proving_ground.tasks import TASKS, transformer
from optclip import catalogue

STEPS = 100
SMALL = Size(rates=(0.1, 1.0, 1000.0), seeds=(0, 1))


def feed(steps: int, seeds: tuple[int, ...]) -> Feed:
    noise = [np.random.default_rng(seed).standard_normal((steps, 4)) for seed in seeds]
    return conditions.plain(np.stack(noise, axis=1).astype(np.float32), steps)


def objective(x, noise):
    value = 0.5 * jnp.sum(x["w"] ** 2) + 0.5 * jnp.sum(x["late"] ** 2)
    return value + 0.01 * jnp.sum(noise * x["w"]), value


BOWL = Task(
    name="bowl",
    steps=STEPS,
    rate=0.1,
    threshold=1.0,
    init=lambda seed: {"w": jnp.full(4, 1.0 + seed), "late": jnp.ones(2)},
    objective=objective,
    optimizer=lambda rate: optax.sgd(rate),
    settings=(
        Setting("clean", feed),
        Setting(
            "spikes",
            lambda steps, seeds: conditions.with_spikes(feed(steps, seeds)),
            "clean",
            conditions.spikes_at,
        ),
        Setting("late start", lambda steps, seeds: conditions.with_late_start(feed(steps, seeds))),
        Setting(
            "x100",
            lambda steps, seeds: conditions.in_other_units(feed(steps, seeds), 100.0),
            "clean",
            rate_factor=0.01,
        ),
        Setting("bfloat16", feed, "clean", dtype=jnp.bfloat16, best_rate_only=True),
    ),
    frozen=lambda path: path == "late",
)
"""A noisy quadratic, as small as a task can be."""

METHODS = {contender.name: contender for contender in CONTENDERS}


def curves(contender: Contender, setting: str = "clean", rates=(0.1,), threshold=1.0):
    """The curves of a method on the bowl, under a setting."""
    [found] = [x for x in BOWL.settings if x.name == setting]
    params = training.starts(BOWL, (0, 1), found.dtype)
    given = training.arguments(params, rates, threshold, found.feed(STEPS, (0, 1)))
    return training.by_rate_and_seed(training.program(BOWL, contender)(*given), len(rates))


# What is trained ---------------------------------------------------------------------------------


def test_one_seed_sees_the_same_data_whatever_the_method():
    none = curves(METHODS[NO_CLIP])
    idle = curves(METHODS["clip_by_global_norm"], threshold=1e9)
    tight = curves(METHODS["clip_by_global_norm"], threshold=0.01)
    np.testing.assert_allclose(none.losses, idle.losses, rtol=1e-5)
    assert np.all(tight.losses[..., -1] > 2 * none.losses[..., -1])
    # Two seeds are two runs.
    assert not np.any(none.losses[0, 0] == none.losses[0, 1])


def test_every_run_is_what_a_plain_loop_makes():
    rate, seed = 0.1, 1
    noise = feed(STEPS, (0, 1)).batches[:, seed]
    params = BOWL.init(seed)
    optimizer = optax.chain(METHODS["clip_by_global_norm"].build(optax.sgd(rate), 0.5))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, noise):
        (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(params, noise)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for at_step in noise:
        params, state, loss = step(params, state, at_step)
        losses.append(loss)
    ours = curves(METHODS["clip_by_global_norm"], rates=(1.0, rate), threshold=0.5)
    np.testing.assert_allclose(ours.losses[1, seed], losses, rtol=1e-5)


def test_spikes_reach_the_gradient():
    # The norm is at most 5, and never below 0.01: of a threshold of 10 only spikes are above.
    clip = METHODS["clip_by_global_norm"]
    rates = [curves(clip, name, threshold=10.0).clip_rate for name in ("clean", "spikes")]
    assert np.all(rates[0] == 0)
    np.testing.assert_allclose(rates[1], len(conditions.spikes_at(STEPS)) / STEPS, rtol=1e-5)
    # And without a clip they move the run, at that step and not before.
    clean, spikes = (curves(METHODS[NO_CLIP], name).losses for name in ("clean", "spikes"))
    first = conditions.spikes_at(STEPS)[0]
    np.testing.assert_allclose(clean[..., : first + 1], spikes[..., : first + 1], rtol=1e-5)
    assert np.all(spikes[..., first + 1] > 100 * clean[..., first + 1])


def test_bursts_and_wrong_labels_are_where_they_are_said_to_be():
    factor = conditions.with_bursts(feed(STEPS, (0,))).gradient_factor
    at = np.flatnonzero(factor != 1)
    expected = [first + k for first in conditions.bursts_at(STEPS) for k in range(5)]
    assert at.tolist() == expected
    [wrong] = [x for x in TASKS["transformer, AdamW"].settings if x.name == "wrong labels"]
    batches = wrong.feed(STEPS, (0, 1)).batches
    differ = np.any(batches["inputs"] != batches["labels"], axis=(1, 2))
    assert tuple(np.flatnonzero(differ)) == wrong.events(STEPS)


def test_what_is_frozen_waits():
    losses = curves(METHODS[NO_CLIP], "late start").losses[0]
    # The frozen half is worth 1; it is learned from the middle on.
    np.testing.assert_allclose(losses[:, STEPS // 2 - 1], 1.0, atol=0.01)
    assert np.all(losses[:, -1] < 0.01)


def test_in_other_units_the_run_is_the_same_and_a_fixed_threshold_is_not():
    def end(method, setting, rate):
        return curves(METHODS[method], setting, (rate,)).losses[..., :20]

    np.testing.assert_allclose(end(NO_CLIP, "clean", 0.1), end(NO_CLIP, "x100", 0.001), rtol=1e-4)
    np.testing.assert_allclose(
        end("autoclip", "clean", 0.1), end("autoclip", "x100", 0.001), rtol=1e-4
    )
    fixed = [end("clip_by_global_norm", *x) for x in (("clean", 0.1), ("x100", 0.001))]
    assert np.all(fixed[1][..., -1] > 2 * fixed[0][..., -1])


# Scores ------------------------------------------------------------------------------------------


def test_a_run_that_diverges_counts_as_diverged(tmp_path):
    outcome = jobs.run(Job(BOWL, METHODS[NO_CLIP], SMALL, tmp_path))
    score = scores.score(outcome["settings"]["clean"])
    assert score.diverged == pytest.approx(1 / 3)
    assert outcome["settings"]["clean"]["loss"][0][2] == [None, None]
    assert np.isfinite(score.loss)
    # Not finite, or far above the start: not a loss that merely is where it began.
    losses = np.ones((4, 20), np.float32)
    losses[1, -1], losses[2, -2:], losses[3, -2:] = np.nan, 1.2, 1.05
    assert scores.result(BOWL, losses).tolist() == [1.0, np.inf, np.inf, pytest.approx(1.05)]


def test_scores_of_hand_made_runs():
    runs = {
        "rates": [0.01, 0.1, 1.0, 10.0],
        "thresholds": [1.0, 3.0],
        # (threshold, learning rate, seed)
        "loss": [
            [[4.0, 4.0], [2.0, 2.0], [None, 1.0], [None, None]],
            [[1.04, 1.04], [0.9, 1.1], [1.05, 1.05], [1.2, 1.2]],
        ],
        "first": [[[6.0, 6.0]] * 4] * 2,
        "held_out": [[[9.0, 9.0]] * 4, [[9.0, 9.0], [5.0, 7.0], [9.0, 9.0], [9.0, 9.0]]],
        "clip_rate": [[[0.0, 0.0]] * 4, [[0.0, 0.0], [0.2, 0.4], [0.0, 0.0], [0.0, 0.0]]],
        "steps_lost": [[[[0], [0]]] * 4, [[[0], [0]], [[3], [5]], [[0], [0]], [[0], [0]]]],
    }
    base = runs | {"loss": [[[0.5, 0.5], *([[3.0, 3.0]] * 3)], [[3.0, 3.0]] * 4]}
    score = scores.score(runs, base)
    assert (score.loss, score.threshold, score.rate) == (1.0, 3.0, 0.1)
    assert (score.threshold_at_edge, score.rate_at_edge) == (True, False)
    assert score.spread == pytest.approx(0.1)
    assert score.held_out == 6.0
    assert score.clip_rate == pytest.approx(0.3)
    assert score.steps_lost == 4.0
    assert score.rates_range == pytest.approx(100.0)
    assert score.sensitivity == pytest.approx((0.04 + 0.05 + 0.2) / 4)
    assert score.worst == pytest.approx(1.2)
    assert score.diverged == 0
    assert score.cost == 2.0
    assert score.transferred == 4.0  # At 0.01 and 1.0, where the plain setting is best.
    only = scores.score(runs, None, only=0)
    assert (only.loss, only.rate, only.diverged) == (2.0, 0.1, 3 / 8)
    assert not only.threshold_at_edge
    # A run that diverged counts as the loss it began with; the best of these is 2.
    assert only.sensitivity == pytest.approx((2 + 0 + 1.5 + 4) / 4)
    assert only.worst == 6.0
    assert scores.score(base).rate_at_edge
    assert (only.cost, only.transferred) == (None, None)


def test_only_rates_next_to_the_best_count():
    rates = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert scores.rates_range(rates, np.array([1.0, 2.0, 1.04, 1.0, 1.06])) == 1.0
    assert scores.rates_range(rates, np.array([3.0, 1.04, 1.0, 1.05, np.inf])) == 4.0
    assert scores.rates_range(rates, np.full(5, np.inf)) == 0.0


def test_steps_lost_are_counted_to_where_the_clean_run_is():
    base = np.ones(100)
    losses = base.copy()
    losses[21:27] = 2.0  # Moved by the event at 20, back at step 27.
    losses[61:] = 5.0  # Never back from the event at 60.
    lost = scores.steps_lost(losses[None], base[None], (20, 60, 80))
    # A step is back when the mean of the ten from it on is.
    assert lost.tolist() == [[6, 19, 19]]
    assert scores.steps_lost(base[None], base[None], (20,)).tolist() == [[0]]
    gone = np.where(np.arange(100) > 20, np.nan, base)
    assert scores.steps_lost(gone[None], base[None], (20,)).tolist() == [[79]]


# Jobs --------------------------------------------------------------------------------------------


@pytest.fixture
def bowl(monkeypatch):
    """The bowl as the only task, at a small size."""
    monkeypatch.setitem(TASKS, BOWL.name, BOWL)
    monkeypatch.setattr(__main__, "FULL", SMALL)


ARGUMENTS = ["--task", "bowl", "--method", NO_CLIP, "--method", "clip_by_global_norm"]
ARGUMENTS += ["--workers", "1"]


def test_it_runs_says_draws_and_goes_on_without_running_again(bowl, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path), "--json", str(tmp_path / "scores.json")]
    assert __main__.main([*ARGUMENTS, *out]) == 0
    said = capsys.readouterr().out
    assert "bowl: spikes" in said
    for picture in ("summary.png", "rates.png", "thresholds.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]["bowl"]
    assert set(found) == {setting.name for setting in BOWL.settings}
    spikes = found["spikes"]
    assert spikes[NO_CLIP]["loss"] is None  # null: six spikes are too many
    assert spikes["clip_by_global_norm"]["loss"] < 0.01
    assert "threshold" in spikes["clip_by_global_norm"]
    assert "threshold" not in spikes[NO_CLIP]
    # In other units the rates are others too; lower precision is a run of its own.
    clean = found["clean"][NO_CLIP]["loss"]
    assert found["x100"][NO_CLIP]["transferred"] == pytest.approx(clean, rel=1e-3)
    assert found["bfloat16"][NO_CLIP]["loss"] == pytest.approx(clean, rel=0.5)
    assert found["bfloat16"][NO_CLIP]["loss"] != pytest.approx(clean, rel=1e-3)
    assert "rates_range" not in found["bfloat16"][NO_CLIP]  # run with one rate
    assert found["clean"][NO_CLIP]["rates_range"] == 1.0

    # What was stopped in between goes on: only what is missing is trained.
    trained = []
    train = jobs._train
    monkeypatch.setattr(
        jobs, "_train", lambda job: trained.append(job.contender.name) or train(job)
    )
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    (tmp_path / "bowl" / "clip_by_global_norm.json").unlink()
    assert __main__.main([*ARGUMENTS, *out]) == 0
    assert trained == ["clip_by_global_norm"]
    again = json.loads((tmp_path / "scores.json").read_text())["scores"]["bowl"]
    for setting in again:
        for method in again[setting]:
            old, new = (x[setting][method] | {"slower": 0} for x in (found, again))
            assert new == old
    # Other numbers are another run.
    monkeypatch.setattr(__main__, "FULL", SMALL._replace(rates=(0.1, 1.0)))
    with pytest.raises(SystemExit):
        __main__.main([*ARGUMENTS, "--out", str(tmp_path), "--export", str(tmp_path / "x.json")])
    assert "nothing is done" in capsys.readouterr().err


def test_export_writes_what_is_done_and_runs_nothing(bowl, tmp_path, capsys, monkeypatch):
    jobs.run(Job(BOWL, METHODS[NO_CLIP], SMALL, tmp_path))
    monkeypatch.setattr(jobs, "_train", None)
    file = tmp_path / "results.json"
    assert __main__.main([*ARGUMENTS, "--out", str(tmp_path), "--export", str(file)]) == 0
    assert "1 of 2 jobs are not done yet" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert list(written["scores"]["bowl"]["clean"]) == [NO_CLIP]
    [part] = written["parts"]
    assert set(part["versions"]) == {"optclip", "jax", "optax", "numpy"}
    assert "--export" in part["command"]


def test_export_keeps_what_the_file_has_beside_it(bowl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "FULL", SMALL._replace(rates=(0.1,), thresholds=1))
    file = tmp_path / "results.json"
    for folder, method in (("a", NO_CLIP), ("b", "clip_by_global_norm"), ("c", NO_CLIP)):
        arguments = ["--task", "bowl", "--method", method, "--out", str(tmp_path / folder)]
        assert __main__.main([*arguments, "--workers", "1"]) == 0
        assert __main__.main([*arguments, "--export", str(file)]) == 0
    written = json.loads(file.read_text())
    parts = {name: score["part"] for name, score in written["scores"]["bowl"]["clean"].items()}
    assert parts == {NO_CLIP: 1, "clip_by_global_norm": 0}  # Nothing is left of the first run.
    assert len(written["parts"]) == 2
    # A method that is gone is not kept, and a file of another kind is not overwritten.
    written["scores"]["bowl"]["clean"]["gone"] = written["scores"]["bowl"]["clean"][NO_CLIP]
    file.write_text(json.dumps(written))
    assert __main__.main([*arguments, "--export", str(file)]) == 0
    assert "gone" not in json.loads(file.read_text())["scores"]["bowl"]["clean"]
    file.write_text("{}")
    with pytest.raises(SystemExit):
        __main__.main([*arguments, "--export", str(file)])
    assert "holds something else" in capsys.readouterr().err
    assert file.read_text() == "{}"


def test_a_method_that_fails_does_not_stop_the_others(bowl, tmp_path, capsys, monkeypatch):
    train = jobs._train

    def fails_for_one(job):
        if job.contender.name == NO_CLIP:
            raise RuntimeError("no such thing")
        return train(job)

    monkeypatch.setattr(jobs, "_train", fails_for_one)
    monkeypatch.setattr(__main__, "FULL", SMALL._replace(rates=(1.0,), thresholds=1))
    # With one learning rate and one threshold there is nothing for two of the pictures, either.
    assert __main__.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "bowl, no clip failed: see" in said.err
    assert "clip_by_global_norm" in said.out
    assert "no such thing" in (tmp_path / "bowl" / "no_clip.error").read_text()


def test_interrupted_it_says_how_to_go_on(bowl, tmp_path, capsys, monkeypatch):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_train", interrupted)
    assert __main__.main([*ARGUMENTS, "--out", str(tmp_path)]) == 130
    [line] = [x for x in capsys.readouterr().err.splitlines() if "interrupted" in x]
    assert "To go on: python -m benchmarks.proving_ground --task bowl" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--quick"),
        (["--task", "transfomer, AdamW"], "did you mean 'transformer, AdamW'?"),
        (["--method", "robust_clap"], "did you mean 'robust_clip'?"),
        (["--candidates", "--method", "zclip"], "there is no 'zclip'"),
        (["--full", "--workers", "0"], "1 to 256"),
        (["--quick", "--json", "no/such/folder/scores.json"], "--json"),
        (["--full", "--quick"], "not allowed with"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


# The registry ------------------------------------------------------------------------------------


def test_contenders_are_public_methods_with_names_of_their_own():
    public = {method.name for method in catalogue.methods()}
    assert set(METHODS) - {NO_CLIP, *RIVALS} <= public
    names = [contender.name for contender in (*CONTENDERS, *CANDIDATES)]
    assert len(set(names)) == len(names) - 2  # No clip and the fixed thresholds are in both.


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_learns(name, monkeypatch):
    """At one of its rates, on the task of its kind."""
    monkeypatch.setattr(transformer, "LAYERS", 1)
    monkeypatch.setattr(training.jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
    kinds = {"": "transformer, momentum", "momentum": "transformer, momentum"}
    task = TASKS[kinds.get(METHODS[name].family, "transformer, AdamW")]
    setting, steps = task.settings[0], 60
    params = training.starts(task, (0,), jnp.float32)
    rates = (task.rate / 10, task.rate, 10 * task.rate)
    given = training.arguments(params, rates, 1.0, setting.feed(steps, (0,)))
    losses = training.program(task, METHODS[name])(*given).losses
    assert np.nanmin(losses[:, -5:].mean(axis=1)) < 0.95 * losses[0, 0]


def test_what_is_listed_is_all_there_is(capsys):
    assert __main__.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name.split(",")[0] in listed for name in (*TASKS, *METHODS))


@pytest.mark.parametrize("name", ["quadratic", "recurrent", "transformer, AdamW", "ranker"])
def test_every_task_learns(name, monkeypatch):
    """At its own learning rate, without a clip: what is trained is a task, and not noise."""
    task = TASKS[name]
    monkeypatch.setattr(transformer, "LAYERS", 1)  # half the time to compile
    steps = min(task.steps, 40)
    setting = task.settings[-1 if name == "quadratic" else 0]
    params = training.starts(task, (0,), jnp.float32)
    given = training.arguments(params, (task.rate,), 1.0, setting.feed(steps, (0,)))
    losses = training.program(task, before("none", lambda _: optax.identity()))(*given).losses[0]
    assert losses[-5:].mean() < 0.95 * losses[0]


def test_tables_have_a_row_for_every_method_and_the_customary_threshold(bowl, tmp_path):
    job = Job(BOWL, METHODS["clip_by_global_norm"], SMALL, tmp_path)
    jobs.run(job)
    order = running.Order(BOWL.name, job.contender.name, SMALL, tmp_path)
    found = reporting.by_setting(reporting.rows([order]))
    methods = [row.method for row in found["bowl", "clean"]]
    assert methods == ["clip_by_global_norm", "clip_by_global_norm(1.0)"]
    tuned, customary = (row.score for row in found["bowl", "spikes"])
    assert tuned.loss <= customary.loss
    assert customary.threshold == 1.0
