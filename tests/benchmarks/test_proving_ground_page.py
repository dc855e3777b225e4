"""What the proving ground's results say, and that the pages say just that."""

import copy
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.proving_ground import candidates, conditions, training
from benchmarks.proving_ground.candidates import CANDIDATES
from benchmarks.proving_ground.claims import CLAIMS, ONE, Found
from benchmarks.proving_ground.contenders import CONTENDERS, NO_CLIP
from benchmarks.proving_ground.page import __main__ as page
from benchmarks.proving_ground.page import advice, results
from benchmarks.proving_ground.page.cells import SAFEGUARD
from benchmarks.proving_ground.reporting import FIXED
from benchmarks.proving_ground.task import Setting, Task
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
    """A contender may be newer than they are; one that was run was run under every setting."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", REPORT["date"])
    assert REPORT["command"].startswith("python -m benchmarks.proving_ground --full")
    scores = REPORT["scores"]
    assert {(task, setting) for task in scores for setting in scores[task]} == {
        (task.name, setting.name) for task in TASKS.values() for setting in task.settings
    }
    run = set(scores["quadratic"]["gaussian"]) - {ONE}
    assert {NO_CLIP, FIXED, SAFEGUARD} <= run <= {contender.name for contender in CONTENDERS}
    assert all(
        run == set(methods) - {ONE} for settings in scores.values() for methods in settings.values()
    )


@pytest.mark.parametrize("method", ["zclip", "smooth_clip", "clip_by_value", "adagc"])
def test_a_contender_without_results_was_not_run_yet(method):
    without = found()
    for settings in without.scores.values():
        for methods in settings.values():
            del methods[method]
    before, after = (results.claims(x).splitlines() for x in (found(), without))
    [new] = [line for line, old in zip(after, before, strict=True) if line != old]
    assert new.endswith("| not run yet |  |")
    assert results.winners(without).endswith(f"\n\nNot run yet: `{method}` (anywhere).")


def test_a_contender_may_miss_results_of_one_setting():
    without = found()
    del without.scores["ranker"]["rare features"]["clippy"]
    assert results.winners(without).endswith("Not run yet: `clippy` (ranker: rare features).")
    assert "Not run yet" not in results.winners(found())
    assert "`clippy` not run yet" in advice.symptoms(without)


def test_the_pages_say_what_the_results_say():
    assert page.main(["--check"]) == 0


def test_a_page_that_is_old_is_told(tmp_path, monkeypatch, capsys):
    old = tmp_path / "old.md"
    old.write_text("<!-- claims -->\nnothing\n<!-- end of claims -->\nand more\n")
    monkeypatch.setattr(page, "PAGES", (old,))
    monkeypatch.setattr(page, "DOCS", tmp_path)
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

    row = next(x for x in results.duties(found(worse)).splitlines() if "momentum: spikes" in x)
    assert all(text in row for text in ("**2.000**", "**1**", "**50%**", "**+50.00%**"))
    assert "in 0 of" in results.sums(found(worse)) or ": 0 of" in results.sums(found(worse))


def test_advice_tells_what_diverged():
    def broken(task, setting, method, score):
        if method == NO_CLIP:
            score |= {"loss": None}

    table = advice.symptoms(found(broken))
    assert "`no clip` diverged" in table
    assert "None" not in table


# Variants ----------------------------------------------------------------------------------------


def test_a_bias_that_starts_at_zero_moves_as_its_neighbors_do():
    bound = candidates.by_unit_or_tree(0.1)
    updates, _ = bound.update({"a": jnp.ones(2), "b": jnp.ones(2)}, bound.init(PARAMS), PARAMS)
    rms = np.sqrt(25 / 4)
    np.testing.assert_allclose(np.linalg.norm(updates["a"]), 0.1 * 5, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(updates["b"]), 0.1 * rms * np.sqrt(2), rtol=1e-5)


def test_an_annealed_ratio_falls_like_the_root_of_the_step():
    ratio = candidates.annealed(0.03, 100, least=0.01)
    np.testing.assert_allclose([ratio(0), ratio(300), ratio(1e6)], [0.03, 0.015, 0.01], rtol=1e-6)


def test_a_bound_relative_to_the_running_mean_lags_behind():
    bound = candidates.relative_to_mean(0.1, decay=0.5)
    state = bound.init(PARAMS)
    lengths = []
    for scale in (1.0, 3.0):
        params = jax.tree.map(lambda x, scale=scale: scale * x, PARAMS)
        updates, state = bound.update({"a": 10 * jnp.ones(2), "b": jnp.ones(2)}, state, params)
        lengths.append(optax.tree.norm(updates))
    np.testing.assert_allclose(lengths, [0.5, 0.1 * (5 + 15) / 2], rtol=1e-5)


def test_momentum_that_sees_the_bound_is_as_short_as_the_step():
    contender = candidates.seen_by_momentum("", candidates.BOUNDS["tree"](0.1))
    optimizer = contender.build(optax.sgd(1.0, momentum=0.9), 0.0)
    grads = {"a": jnp.array([30.0, 40.0]), "b": jnp.zeros(2)}
    updates, (_, inner, _) = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)
    np.testing.assert_allclose(inner[0].trace["a"], -updates["a"], rtol=1e-5)


def test_what_is_outside_is_seen_by_no_bound():
    task = Task(
        name="still",
        steps=3,
        rate=0.1,
        threshold=1.0,
        init=lambda seed: jnp.ones(4),
        objective=lambda x, batch: (0 * jnp.sum(x), jnp.sum(x)),
        optimizer=lambda rate: optax.sgd(rate),
        settings=(Setting("clean", lambda steps, seeds: None),),
        outside=lambda rate: optax.add_decayed_weights(-rate),
    )
    feed = conditions.plain(np.zeros((3, 1)), 3)
    contender = next(x for x in CONTENDERS if x.name == "safeguard")
    params = training.starts(task, (0,), jnp.float32)
    given = training.arguments(params, [0.1], 0.0, feed)
    losses = training.by_rate_and_seed(training.program(task, contender)(*given), 1).losses
    np.testing.assert_allclose(losses[0, 0], 4 * 0.9 ** np.arange(3), rtol=1e-5)


def test_candidates_have_names_of_their_own():
    names = [contender.name for contender in CANDIDATES]
    assert len(set(names)) == len(names)
