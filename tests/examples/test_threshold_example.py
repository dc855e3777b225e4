"""examples/choose_threshold.py runs as typed, and says what is wrong with what is typed."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples/choose_threshold.py"


def typed(folder, *arguments):
    command = [sys.executable, SCRIPT, *arguments, "--out", folder]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_whole_path(tmp_path):
    done = typed(tmp_path / "out", "--quick")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["suggested"].startswith("optclip.")
    losses = [min(row) for row in told["sweep"]["losses"]]
    assert min(losses) < losses[0]  # A threshold of 0.01 is too small to learn by in 40 steps.
    assert told["loss"] < losses[0]
    assert len((tmp_path / "out/measured.jsonl").read_text().splitlines()) == 40
    for picture in ("measured", "replay", "sweep"):
        assert (tmp_path / f"out/{picture}.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "-1"], "give a number above 0"),
        (["--steps", "0"], "at least 1"),
        (["--optimizer", "lion"], "momentum"),
        (["--step", "3"], "unrecognized arguments: --step"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said):
    done = typed(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
