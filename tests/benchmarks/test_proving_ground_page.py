"""What the proving ground's results say, and that the pages say just that."""

import copy
import json
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.proving_ground.candidates import CANDIDATES
from benchmarks.proving_ground.claims import CLAIMS, ONE, Found
from benchmarks.proving_ground.contenders import CONTENDERS, NO_CLIP
from benchmarks.proving_ground.page import __main__ as page
from benchmarks.proving_ground.page import picture, results, rivals
from benchmarks.proving_ground.page.cells import SAFEGUARD
from benchmarks.proving_ground.reporting import FIXED
from benchmarks.proving_ground.tasks import TASKS

REPORT = json.loads(page.RESULTS.read_text())
TESTED = [claim for claim in CLAIMS if claim.test is not None]
PARAMS = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}


def found(change=None):
    """The committed scores; changed, where asked for."""
    scores = copy.deepcopy(REPORT["scores"])
    if change is not None:
        for task, settings in scores.items():
            for setting, methods in settings.items():
                for method, score in methods.items():
                    change(task, setting, method, score)
    return Found(scores)


# The committed results ---------------------------------------------------------------------------


def test_the_results_are_of_every_setting_and_of_contenders():
    """A contender may be newer than they are, or a setting; `safeguard` was run under every one."""
    for part in REPORT["parts"]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"])
        assert part["command"].startswith("python -m benchmarks.proving_ground ")
    scores = REPORT["scores"]
    assert {(task, setting) for task in scores for setting in scores[task]} == {
        (task.name, setting.name) for task in TASKS.values() for setting in task.settings
    }
    for settings in scores.values():
        for methods in settings.values():
            assert {NO_CLIP, FIXED, SAFEGUARD} <= set(methods)
            assert set(methods) - {ONE} <= {contender.name for contender in CONTENDERS}
            assert all(0 <= x["part"] < len(REPORT["parts"]) for x in methods.values())


@pytest.mark.parametrize("method", ["zclip", "smooth_clip", "clip_by_value", "adagc"])
def test_a_contender_without_results_was_not_run_yet(method):
    without = found()
    for settings in without.scores.values():
        for methods in settings.values():
            methods.pop(method, None)
    before, after = (results.claims(x).splitlines() for x in (found(), without))
    [new] = [line for line, old in zip(after, before, strict=True) if line != old]
    assert new.endswith("|  | not run yet |")
    nowhere = next(x for x in results.waiting(without).splitlines() if x.endswith(": anywhere."))
    assert method in nowhere


def test_a_contender_may_miss_results_of_one_setting():
    name = "clip_singular_values"

    def places(results_found):
        [line] = [x for x in results.waiting(results_found).splitlines() if f"`{name}`" in x]
        return line.partition(": ")[2]

    without = found()
    del without.scores["recurrent"]["adding"][name]
    assert places(found()) == "35 of 38 settings."
    assert places(without) == "36 of 38 settings."


def test_a_rival_is_missed_only_on_tasks_of_its_kind():
    waiting = results.waiting(found())
    assert "`lamb`" not in waiting
    assert "`lars`" not in waiting


def test_rivals_are_compared_where_both_were_run():
    def alike(task, setting, method, score):
        if "worst" in score:
            score |= {"loss": 1.0, "worst": 2.0, "sensitivity": 0.5, "diverged": 0.0}
        if method == "mechanize" and "worst" in score:
            score |= {"loss": 1.1, "worst": 3.0, "sensitivity": 1.0, "diverged": 0.5}
        if method == "prodigy":
            score |= {"loss": 0.5}

    lines = rivals.rivals(found(alike)).splitlines()
    row = {line.split("`")[1]: line.strip("| ").split(" | ")[1:] for line in lines if "`" in line}
    assert row["mechanize"] == ["1.1", "1.5", "50%"]
    assert row["prodigy"][0] == "0.5"
    settings = {line.split("`")[1]: line.partition("(")[2] for line in lines if "`" in line}
    of = {name: int(text.partition(")")[0]) for name, text in settings.items()}
    assert of["prodigy"] < of["mechanize"]


def test_the_pages_say_what_the_results_say():
    assert page.main(["--check"]) == 0


def test_a_page_that_is_old_is_told(tmp_path, monkeypatch, capsys):
    old = tmp_path / "old.md"
    old.write_text("<!-- claims -->\nnothing\n<!-- end of claims -->\nand more\n")
    monkeypatch.setattr(page, "PAGES", (old,))
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "PICTURE", tmp_path / "summary.png")
    assert page.main(["--check"]) == 1
    assert "old.md is old; run python -m benchmarks.proving_ground.page" in capsys.readouterr().err
    assert page.main([]) == 0
    assert "Pascanu" in old.read_text()
    assert old.read_text().endswith("<!-- end of claims -->\nand more\n")
    assert page.main(["--check"]) == 0


@pytest.mark.parametrize("claim", TESTED, ids=lambda claim: claim.claimed)
def test_a_claim_is_not_reproduced_where_all_methods_are_alike(claim):
    def alike(task, setting, method, score):
        score |= {"loss": 1.0, "diverged": 0.0, "rate": 1.0, "transferred": 1.0}

    outcome = claim.test(found(alike))
    alike_is_claimed = "gains nothing" in claim.claimed or "what the hard one does" in claim.claimed
    assert outcome.held == alike_is_claimed
    assert outcome.figure


@pytest.mark.parametrize("claim", TESTED, ids=lambda claim: claim.claimed)
def test_a_claim_is_not_reproduced_where_its_method_diverges(claim):
    ours = {"clip_by_value", "smooth_clip", "adaptive_grad_clip", "autoclip", "zclip", "adagc"}
    ours |= {"spam_clip", "clippy", "clip_by_block_rms", "clip_by_quantile"}
    ours = ours & set(re.findall(r"\w+", f"{claim.tested} {METHOD_OF.get(claim.claimed, '')}"))
    ours = ours or {FIXED}

    def broken(task, setting, method, score):
        if method in ours:
            score |= {"loss": None, "transferred": None, "diverged": 1.0}

    assert not claim.test(found(broken)).held


METHOD_OF = {
    "A smooth clip does what the hard one does, up to a constant.": "smooth_clip",
    "There, a clip entry by entry does better than one by the norm.": "clip_by_value",
    "One percentile does for a loss of any scale.": "autoclip",
    "AGC lets networks without normalization train with large batches.": "adaptive_grad_clip",
    "ZClip ends lower than a fixed threshold of 1 where the loss spikes.": "zclip",
    "AdaGC ends lower than a fixed threshold of 1.": "adagc",
    "SPAM's clip by entries cures spikes of the gradient under Adam.": "spam_clip",
    "Clippy trains a ranker with Adagrad better than a clip of the gradient.": "clippy",
}


def test_what_is_missed_is_bold():
    def worse(task, setting, method, score):
        if method == "safeguard":
            score |= {"loss": 2.0, "rates_range": 1.0, "diverged": 0.5, "cost": 1.5}
        if method == FIXED:
            score |= {"loss": 1.0}

    row = next(x for x in results.settings(found(worse)).splitlines() if "momentum: spikes" in x)
    assert "| **2.000** |" in row
    sums = results.sums(found(worse))
    assert all(text in sums for text in ("At most 50%", "In 0 of", "more in 0 of", "50.00%"))


def test_every_method_with_many_settings_is_drawn(tmp_path):
    picture.draw(tmp_path / "summary.png", found())
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


# Variants ----------------------------------------------------------------------------------------


def test_guarded_is_a_clip_before_and_a_bound_after():
    contender = next(x for x in CANDIDATES if x.name == "guarded(0.01, tree)")
    optimizer = contender.build(optax.sgd(1.0), 0.0)
    grads = {"a": jnp.array([30.0, 40.0]), "b": jnp.zeros(2)}
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.01 * 5, rtol=1e-5)


def test_candidates_have_names_of_their_own():
    names = [contender.name for contender in CANDIDATES]
    assert len(set(names)) == len(names)
