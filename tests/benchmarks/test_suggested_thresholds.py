"""The benchmark of suggested thresholds, from an empty folder, on a grid of four runs."""

import json

import pytest

from benchmarks import suggested_thresholds


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suggested_thresholds, "LEARNING_RATES", (0.03,))
    monkeypatch.setattr(suggested_thresholds, "THRESHOLDS", (0.003,))
    monkeypatch.setattr(suggested_thresholds, "FRESH", (2, 3))


def test_it_runs_compares_draws_and_goes_on(small, tmp_path, capsys):
    suggested_thresholds.main(["--task", "digits", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    compared = json.loads((tmp_path / "digits_compared.json").read_text())["held_out"]
    (row,) = compared["rows"]
    # A threshold of 0.003 is too small to learn by; a suggestion is not.
    assert row["best_clip"] == "optclip.measure_norms()"
    assert row["with_suggested"] < 0.5
    assert compared["grid"] == row["no_clip"] == pytest.approx(row["with_suggested"], rel=0.3)
    assert (tmp_path / "suggested.png").stat().st_size > 20_000
    assert "digits, held-out loss" in capsys.readouterr().out

    before = (tmp_path / "digits.json").stat().st_mtime_ns
    suggested_thresholds.main(["--task", "digits", "--out", str(tmp_path)])
    assert (tmp_path / "digits.json").stat().st_mtime_ns == before  # Nothing was run again.
    # The grid and its suggestions with two seeds; no clip, which is best, and those with two more.
    assert len(runs) == 2 * 2 + 2 + 2 * 2


def test_bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        suggested_thresholds.main(["--task", "letters"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
