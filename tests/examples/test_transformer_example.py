"""examples/fsdp_transformer.py: what a person types, sees and finds on disk."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# The libraries that only the example needs may warn as they like.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "fsdp_transformer.py"
SMALL = ["--layers=1", "--width=16", "--heads=2", "--context=32", "--batch-size=16"]
GUARDED = ("--clip", "safeguard")
SIXTY = ("--steps", 60)
MESH = ("--mesh", "fsdp=4,tensor=2")


@pytest.fixture
def undrawn(example, monkeypatch):
    """Without the picture, which takes as long as the training."""
    monkeypatch.setattr(example.run_report, "draw", lambda *args: None)


@pytest.fixture
def run(example, capsys):
    """Runs it, tiny; hands back exit code, stdout and stderr."""

    def run(*options):
        code = example.main([*SMALL, *map(str, options)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def result_of(run, undrawn, tmp_path):
    """The result of a run in a folder of its own, and its log."""

    def result_of(*options):
        out = tmp_path / "run"
        code, _, stderr = run(*options, "--overwrite", "--out", out)
        assert (code, stderr) == (0, "")
        return told_in(out), log_of(out)

    return result_of


@pytest.fixture(scope="module")
def guarded(example, tmp_path_factory):
    """Sixty steps on one device, under safeguard: result and log."""
    out = tmp_path_factory.mktemp("guarded")
    assert example.main([*SMALL, *map(str, (*GUARDED, *SIXTY, "--out", out))]) == 0
    assert (out / "run.png").stat().st_size > 10_000
    return told_in(out), log_of(out)


def told_in(out):
    return json.loads((Path(out) / "result.json").read_text())


def log_of(out):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    text = (Path(out) / "steps.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_mesh_trains_as_one_device_and_two_halves_as_one_run(guarded, undrawn, run, tmp_path):
    at_once, in_two = tmp_path / "at_once", tmp_path / "in_two"
    code, stdout, stderr = run(*GUARDED, *MESH, *SIXTY, "--out", at_once)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1].startswith("safeguard ")
    mesh, mesh_log = told_in(at_once), log_of(at_once)
    one, one_log = guarded
    assert (one["devices"], mesh["devices"]) == (1, 8)
    assert one_log[0].keys() == mesh_log[0].keys()
    for name in ("loss", "clip/norm", "clip/threshold", "bound/norm"):
        # At the first step there is no threshold yet.
        here, there = ([row[name] for row in log[1:]] for log in (one_log, mesh_log))
        np.testing.assert_allclose(here, there, rtol=1e-3)
    assert mesh["held_out_loss"] == pytest.approx(one["held_out_loss"], abs=1e-4)

    run(*GUARDED, *MESH, "--steps", 30, "--out", in_two)
    with (in_two / "steps.jsonl").open("a") as log:
        log.write('{"step": 31, "lo')  # a step after the checkpoint, cut off
    code, stdout, stderr = run(*GUARDED, *MESH, *SIXTY, "--resume", "--out", in_two)
    assert (code, stderr) == (0, "")
    assert f"Going on after step 30 of {in_two}." in stdout
    assert (in_two / "steps.jsonl").read_text() == (at_once / "steps.jsonl").read_text()
    assert told_in(in_two)["held_out_loss"] == mesh["held_out_loss"]

    code, _, stderr = run(*GUARDED, "--steps", 5, "--resume", "--out", in_two)
    assert code == 2
    assert "give --steps 60 or more" in stderr
    code, _, stderr = run("--clip", "none", "--steps", 70, "--resume", "--out", in_two)
    assert code == 2
    assert "--clip was safeguard, not none" in stderr


def test_a_run_is_replaced_only_if_asked_for_and_json_is_alone(undrawn, run, tmp_path):
    code, stdout, _ = run("--steps", 2, "--json", "--out", tmp_path)
    assert code == 0
    assert json.loads(stdout) == told_in(tmp_path)
    code, _, stderr = run("--steps", 3, "--out", tmp_path)
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert "--resume" in stderr
    assert "--overwrite" in stderr
    code, _, _ = run("--steps", 3, "--overwrite", "--clip-arg", "max_norm=-1", "--out", tmp_path)
    assert code == 2
    assert len(log_of(tmp_path)) == 2
    assert (tmp_path / "checkpoints/2").exists()
    code, _, _ = run("--steps", 3, "--overwrite", "--out", tmp_path)
    assert code == 0
    assert len(log_of(tmp_path)) == 3
    assert not (tmp_path / "checkpoints/2").exists()


def test_the_state_is_split_and_stays_so(example):
    options = example.parse_options([*SMALL, *GUARDED, *MESH])
    training = example.start(options, example.make_mesh(options))
    leaves = jax.tree.leaves(training.state)
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert share < 0.3 * sum(leaf.nbytes for leaf in leaves)
    before = [leaf.sharding for leaf in leaves]
    state, text = training.state, example.load_text()
    for number in (1, 2):
        batch = example.training_batch(text, 16, 32, 0, number)
        batch = example.on_devices(batch, training.batch_sharding)
        state, _ = training.train_step(state, *batch)
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == before
    assert training.train_step._cache_size() == 1


def test_what_a_spike_does_and_what_safeguard_does_about_it(guarded, result_of):
    clean, _ = guarded
    spikes = (*SIXTY, "--spike-every", 15)
    unclipped, log = result_of("--clip", "none", *spikes)
    assert [row["step"] for row in log if row["spike"]] == [15, 30, 45, 60]
    spiked, log = result_of(*GUARDED, *spikes)
    assert spiked["loss"] == pytest.approx(clean["loss"], rel=0.02)
    assert unclipped["loss"] > 1.05 * spiked["loss"]
    spike, before = log[14], log[13]
    assert spike["clip/norm"] > 100 * before["clip/norm"]
    assert spike["clip/factor"] < 0.01


def test_spikes_are_in_their_steps_alone(example):
    def put(kind, number):
        options = example.parse_options(["--spike-every", "5", "--spike-kind", kind])
        spike = example.is_spike(options, number)
        return (
            example.shuffled_at(spike, options, number, labels),
            example.enlarged_at(spike, options, grads),
        )

    labels = jnp.arange(32).reshape(4, 8)
    grads = {"kernel": jnp.ones(3, jnp.bfloat16)}
    for kind in ("labels", "gradient"):
        there, enlarged = put(kind, 6)
        np.testing.assert_array_equal(there, labels)
        assert float(enlarged["kernel"][0]) == 1
    shuffled, enlarged = put("labels", 5)
    assert float(enlarged["kernel"][0]) == 1
    assert np.mean(shuffled == labels) < 0.5
    np.testing.assert_array_equal(np.sort(shuffled, axis=None), labels.reshape(-1))
    there, enlarged = put("gradient", 5)
    np.testing.assert_array_equal(there, labels)
    assert float(enlarged["kernel"][0]) == 1000
    assert enlarged["kernel"].dtype == jnp.bfloat16


def test_bfloat16_is_that_of_parameters_and_moments(example):
    options = example.parse_options([*SMALL, "--dtype", "bfloat16"])
    with jax.set_mesh(example.make_mesh(options)):
        _, state = jax.eval_shape(lambda: example.create(options))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim} == {"bfloat16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mesh fsdp=4,tensor=2 --devices 4", ["takes 8 devices", "give --devices 8"]),
        ("--mesh model=2", ["data, fsdp, tensor", "data=2,fsdp=2,tensor=2"]),
        ("--mesh fsdp=2,fsdp=2", ["at most once"]),
        ("--mesh fsdp", ["for example"]),
        ("--mesh fsdp=16 --batch-size 16", ["there are only 8", "or fewer"]),
        ("--mesh tensor=4", ["--heads 2", "try --heads 4"]),
        ("--mesh fsdp=8 --width 20", ["--width 20", "fsdp=8", "try --width 16"]),
        ("--mesh data=3", ["--batch-size 16", "try --batch-size 15"]),
        ("--width 15", ["--heads 2", "try --width 14"]),
        ("--step 3", ["--step 3", "--help"]),
        ("--processes 2", ["belong together", "--process-id 0"]),
        ("--coordinator 127.0.0.1 --processes 2 --process-id 0", ["HOST:PORT"]),
        ("--coordinator 127.0.0.1:1 --processes 2 --process-id 2", ["the ids 0 to 1"]),
        ("--coordinator h:1 --processes 2 --process-id 0 --devices 3 --batch-size 9", ["--mesh"]),
        ("--spike-kind labels", ["add --spike-every"]),
        ("--spike-every 0", ["at least 1"]),
        ("--clip clip_by_globl_norm", ["did you mean clip_by_global_norm?"]),
        ("--clip robust_clip --clip-arg deviations=big", ["robust_clip", "'big'"]),
        ("--dtype float16", ["bfloat16"]),
        ("--optimizer adam", ["choose from", "adamw"]),
        ("--lr 0", ["above 0"]),
        ("--out {tmp}/file", ["cannot be written", "another folder"]),
        ("--out {tmp}/none --resume", ["no checkpoint", "leave --resume out"]),
    ],
)
def test_bad_input_is_one_line_that_says_how_to_mend_it(options, words, run, tmp_path):
    (tmp_path / "file").touch()
    options = options.replace("{tmp}", str(tmp_path)).split()
    if "--out" not in options:
        options += ["--out", str(tmp_path / "run")]
    code, _, stderr = run(*options)
    assert code == 2
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert word in stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("size", "option"), [(4000, "--context"), (99999, "--batch-size")])
def test_more_windows_than_there_are_are_refused_with_the_most_there_are(
    example, size, option, run, tmp_path
):
    """How long the text is differs with the version of Python."""
    options = ("--batch-size", str(size), "--context", "64", "--out", str(tmp_path / "run"))
    code, _, stderr = run(*options)
    per_window = 64 if option == "--batch-size" else size
    most = (len(example.load_text().held_out) - 1) // per_window
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert f"give {option} {most} or less" in stderr


def test_help_has_examples_to_type(run, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        run("--help")
    shown = capsys.readouterr().out
    assert "python examples/fsdp_transformer.py --mesh fsdp=4,tensor=2" in shown
    assert "clips: " in shown
