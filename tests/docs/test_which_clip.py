"""The page "Which clip?" says what `optclip suggest` and the proving ground's results say."""

import json
import pathlib
import re

import pytest
from helpers.made_up_runs import RUNS

import optclip
from optclip._tuning.suggesting import ANSWERS
from optclip.tuning import replay, suggest_threshold

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/which_clip.md").read_text()
SCORES = json.loads((ROOT / "benchmarks/proving_ground/results.json").read_text())["scores"]
SETTINGS = [(task, name, of) for task, settings in SCORES.items() for name, of in settings.items()]


def block(name: str) -> list[list[str]]:
    """The cells of a marked table, without its head."""
    lines = PAGE.partition(f"<!-- {name} -->\n")[2].partition("<!-- end")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS = {verdict.strip("`"): what for verdict, _, what in block("verdicts")}


def functions(code: str | None) -> list[str]:
    return re.findall(r"(\w+)\(", code or "")


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
    symptoms = {symptom: functions(what) for symptom, what in block("symptoms")}
    for verdict, symptom in (
        ("spikes", "Single steps with a huge gradient"),
        ("diverged", "It diverges, or is NaN now and then"),
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


def test_every_function_of_the_tables_is_public():
    named = {name for marked in ("verdicts", "symptoms") for row in block(marked) for name in row}
    assert {name for text in named for name in functions(text)} <= set(optclip.__all__)


def test_the_figures_are_those_of_the_results():
    prose = " ".join(PAGE.split())
    losses = [(of["safeguard"]["loss"], of["clip_by_global_norm"]["loss"]) for *_, of in SETTINGS]
    near = sum(ours <= 1.02 * fixed for ours, fixed in losses)
    assert f"in {near} of {len(SETTINGS)} settings" in prose
    assert all(of["safeguard"]["diverged"] == 0 for *_, of in SETTINGS)
    assert f"up to {max(of['no clip']['diverged'] for *_, of in SETTINGS):.0%} of the" in prose
    spiked = [(task, of) for task, name, of in SETTINGS if name in ("spikes", "bursts")]
    assert all(task.startswith("transformer") for task, _ in spiked)
    cost = max(of["safeguard"]["cost"] for _, of in spiked) - 1
    assert f"at most {100 * cost:.2f}% over the clean run" in prose
    over = {
        f"{task}: {name}": ours / fixed - 1
        for (task, name, _), (ours, fixed) in zip(SETTINGS, losses, strict=True)
    }
    assert f"its loss ends {over['deep network, batch 1024: clean']:.0%} above" in prose
    lion = {f"{over[f'transformer, Lion: {name}']:.0%}" for name in ("clean", "spikes")}
    assert len(lion) == 1
    assert f"Under Lion it ends {lion.pop()} above" in prose
