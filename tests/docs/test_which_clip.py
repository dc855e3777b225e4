"""The page "Which clip?" and `optclip suggest` say the same of the same run."""

import pathlib
import re

import pytest
from helpers.made_up_runs import RUNS

from optclip._tuning.suggesting import ANSWERS
from optclip.tuning import replay, suggest_threshold

PAGE = (pathlib.Path(__file__).parents[2] / "docs/which_clip.md").read_text()


def block(name: str) -> list[list[str]]:
    """The cells of a marked table, without its head."""
    lines = PAGE.partition(f"<!-- {name} -->\n")[2].partition("<!-- end")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS = {verdict.strip("`"): what for verdict, _, what in block("verdicts")}


def functions(code: str | None) -> list[str]:
    return re.findall(r"optclip\.(\w+)\(", code or "")


def test_every_verdict_is_on_the_page_in_the_order_in_which_it_is_asked():
    assert list(ROWS) == list(ANSWERS)


@pytest.mark.parametrize("verdict", RUNS)
def test_the_page_and_the_answer_name_the_same_clips(verdict):
    suggestion = suggest_threshold(RUNS[verdict])
    assert suggestion.verdict == verdict
    on_the_page = functions(ROWS[verdict])
    assert on_the_page[0] == functions(suggestion.method)[0]
    assert set(on_the_page) <= {*functions(suggestion.method), *functions(suggestion.alternative)}


def test_the_symptoms_name_them_too():
    symptoms = {symptom: functions(what) for symptom, what, _ in block("symptoms")}
    for verdict, symptom in (
        ("spikes", "Single steps with a huge gradient"),
        ("diverged", "It diverges at the learning rate you would like"),
    ):
        assert symptoms[symptom][0] == functions(ANSWERS[verdict][0])[0]
    assert "measure_norms" in symptoms["Nothing is wrong"]


@pytest.mark.parametrize("verdict", ["spikes", "level moves"])
def test_a_replay_of_the_answer_holds_the_run(verdict):
    """What is suggested lets no spike through, and clips few of the ordinary steps."""
    result = replay(RUNS[verdict], ["safeguard", "robust_clip"])
    for row in result.rows:
        assert row.spikes_through == 0
        assert row.clipped < 0.15
    assert result.suggestion.verdict == verdict
