"""examples/choose_threshold.py runs as typed, and says what is wrong with what is typed."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from optclip import tuning

# The libraries that only the example needs may warn as they like.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples/choose_threshold.py"


def typed(folder, *arguments):
    command = [sys.executable, SCRIPT, *arguments, "--out", folder]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_whole_path(tmp_path):
    out = tmp_path / "out"
    done = typed(out, "--quick", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads((out / "result.json").read_text())
    assert json.loads(done.stdout) == told
    assert done.stderr.splitlines()[-1] == told["answer"]
    assert told["suggested"].startswith("optclip.")
    losses = [min(row) for row in told["sweep"]["losses"]]
    assert min(losses) < losses[0]  # A threshold of 0.01 is too small to learn by in 60 steps.
    assert told["loss"] < losses[0]
    assert len((out / "measured.jsonl").read_text().splitlines()) == 60
    for picture in ("measured", "replay", "sweep"):
        assert (out / f"{picture}.png").stat().st_size > 20_000


def test_a_run_is_replaced_only_if_asked_for(tmp_path, monkeypatch, example, capsys):
    for name in ("measured.jsonl", "sweep.png", "result.json"):
        (tmp_path / name).write_text("{}")
    assert example.main(["--out", str(tmp_path)]) == 2
    assert "--overwrite to replace it" in capsys.readouterr().err
    assert example.main(["--overwrite", "--lr", "0", "--out", str(tmp_path)]) == 2
    assert {path.read_text() for path in tmp_path.iterdir()} == {"{}"}

    monkeypatch.setattr(example, "choose", lambda *args: {"answer": "Use it."})
    assert example.main(["--overwrite", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Use it."
    assert not (tmp_path / "sweep.png").exists()
    assert json.loads((tmp_path / "result.json").read_text()) == {"answer": "Use it."}


THRESHOLDS = (0.1, 1.0, 10.0, math.inf)
GUARD, BEST = "optclip.safeguard(optimizer)", "optclip.clip_by_global_norm({})"
DIVERGED = (math.inf,) * 4


@pytest.mark.parametrize(
    ("loss", "medians", "use", "holds", "words"),
    [
        (0.4, (0.9, 0.5, 0.7, 0.7), GUARD, True, "0.4, is no higher than the lowest"),
        (0.52, (0.9, 0.5, 0.7, 0.7), GUARD, True, "within the noise of the lowest"),
        (0.9, (0.5, 0.9, 1.0, 1.2), BEST.format(0.1), False, "90% of the steps, so it works as"),
        (0.9, (0.9, 0.5, 0.7, 0.7), BEST.format(1), False, "shortens 20% of the steps."),
        (0.9, (1.2, 0.9, 0.7, 0.5), "no clip", False, "every clip made the loss higher"),
        (0.9, DIVERGED, GUARD, True, "where every fixed threshold diverged"),
        (math.inf, (0.9, 0.5, 0.7, 0.7), BEST.format(1), False, "is not finite"),
        (math.inf, DIVERGED, None, False, "Lower the learning rate"),
    ],
)
def test_the_answer(example, loss, medians, use, holds, words):
    spread = np.array([-0.02, 0.0, 0.02])
    losses = np.array(medians)[:, None] + spread
    rates = np.repeat([[0.9], [0.2], [0.01], [0.0]], 3, axis=1)
    found = tuning.Sweep(np.array(THRESHOLDS), (0, 1, 2), losses, rates, False)
    told = example.answer(GUARD, loss + spread, found)
    assert (told["use"], told["holds"]) == (use, holds)
    assert words in told["answer"]


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
