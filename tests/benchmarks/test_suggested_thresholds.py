"""The benchmark of suggested thresholds, on a small sweep; and what it found."""

import json
from pathlib import Path

import pytest

from benchmarks import suggested_thresholds
from optclip._tuning.suggestion_text import HELD

RESULTS = Path(__file__).parents[2] / "docs/data/suggested.json"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suggested_thresholds, "LEARNING_RATES", (0.03,))
    monkeypatch.setattr(suggested_thresholds, "THRESHOLDS", (0.003,))
    monkeypatch.setattr(suggested_thresholds, "LEARNED", suggested_thresholds.LEARNED[:1])
    monkeypatch.setattr(suggested_thresholds, "SEEDS", (0,))


def test_it_runs_compares_draws_and_goes_on(small, tmp_path, capsys):
    suggested_thresholds.main(["--task", "digits", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    found = json.loads((tmp_path / "suggested.json").read_text())
    (row,) = found["rows"]
    # A threshold of 0.003 is too small to learn by; an answer is not.
    assert row["best"] != "optclip.clip_by_global_norm(0.003)"
    assert row["loss_of_best"] <= row["loss"] < 0.5
    assert found["held"][row["verdict"]]["runs"] == 1
    assert (tmp_path / "suggested.png").stat().st_size > 20_000
    assert "held-out loss" in capsys.readouterr().out

    before = (tmp_path / "digits.json").stat().st_mtime_ns
    suggested_thresholds.main(["--task", "digits", "--out", str(tmp_path)])
    assert (tmp_path / "digits.json").stat().st_mtime_ns == before  # Nothing was run again.
    assert 3 <= len(runs) <= 5  # The sweep, and an answer and an alternative that are not in it.


def test_a_loss_holds_within_a_twentieth_or_some_nats():
    assert suggested_thresholds.holds(1.05, 1.0)
    assert suggested_thresholds.holds(0.06, 0.02)
    assert not suggested_thresholds.holds(1.06, 1.0)
    assert not suggested_thresholds.holds(None, 1.0)


def test_how_sure_an_answer_is_is_what_the_benchmark_found():
    found = json.loads(RESULTS.read_text())
    again = suggested_thresholds.held(found["rows"])
    assert again == found["held"]
    counts = {name: (of["answer"], of["alternative"], of["runs"]) for name, of in again.items()}
    assert counts == HELD


def test_bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        suggested_thresholds.main(["--task", "letters"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
