"""examples/run_report.py: what a run's clip is said to have done, on made-up logs."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("default")

SCRIPT = Path(__file__).parents[2] / "examples" / "run_report.py"
STEPS = 100
FALLS = np.linspace(2.0, 1.0, STEPS)
LEVEL = np.concatenate([np.linspace(2.0, 1.0, STEPS // 2), np.ones(STEPS // 2)])
RISES = FALLS[::-1]
DIVERGES = np.where(np.arange(STEPS) < 60, FALLS, np.nan)
ASKS = "optclip suggest"
RESCUE = "--clip safeguard"


def rows(loss, **readings):
    """A log; a reading is one number or one for each step."""
    columns = {name.replace("_", "/", 1): np.broadcast_to(x, STEPS) for name, x in readings.items()}
    return [
        {"step": step + 1, "loss": None if np.isnan(loss[step]) else loss[step]}
        | {name: x[step] for name, x in columns.items()}
        for step in range(STEPS)
    ]


def clipped(count, loss=FALLS):
    """A log with so many steps clipped to 1, the others of norm 0.5."""
    norms = np.where(np.arange(STEPS) < count, 2.0, 0.5)
    return rows(loss, clip_norm=norms, clip_threshold=1.0, clip_clip_rate=count / STEPS)


def guarded(bounded, loss=FALLS):
    norm = {"clip_norm": 1.0, "clip_threshold": 9.0, "clip_clip_rate": 0.02}
    return rows(loss, **norm, bound_clip_rate=bounded, skip_skipped_steps=0)


def skipped(count, loss=FALLS):
    return rows(loss, skip_norm=1.0, skip_threshold=9.0, skip_skipped_steps=count)


CLIP = "clip_by_global_norm"
CASES = {
    "none": ("none", "sgd", rows(FALLS), ["No clip", ASKS], [RESCUE]),
    "none, not finite": ("none", "sgd", rows(DIVERGES), ["No clip", "step 61", RESCUE], [ASKS]),
    "none, risen": ("none", "sgd", rows(RISES), ["No clip", "did not fall", RESCUE], [ASKS]),
    "measured": (
        "measure_norms",
        "sgd",
        rows(FALLS, clip_norm=1.0, clip_threshold=np.inf, clip_clip_rate=0.0),
        ["nothing", ASKS],
        ["threshold inf"],
    ),
    "not one": (CLIP, "sgd", clipped(0), ["nothing", "norm, 0.5", "threshold 1:"], [RESCUE]),
    "few": (CLIP, "sgd", clipped(10), ["held 10 of 100 steps (10%)", "what a clip is for"], [ASKS]),
    "many": (CLIP, "sgd", clipped(50), ["held 50 of", "more than spikes"], ["slows", ASKS]),
    "most": (CLIP, "sgd", clipped(97, LEVEL), ["97%", "smaller learning rate", ASKS], ["slows"]),
    "most, falling": (CLIP, "sgd", clipped(97), ["97%", "slows the run", "still falling"], []),
    "most, with Adam": (CLIP, "adamw", clipped(97), ["97%", ASKS], ["smaller learning rate"]),
    "most, behind Adam": ("clippy", "adam", clipped(97), ["smaller learning rate"], [ASKS]),
    "most, risen": (CLIP, "sgd", clipped(97, RISES), ["too short, or too long"], ["lower"]),
    "few, not finite": (CLIP, "sgd", clipped(3, DIVERGES), ["step 61", RESCUE], ["what a clip"]),
    "of groups": (
        "clip_by_leaf_norm",
        "sgd",
        rows(FALLS, clip_norm=5.0, clip_threshold=1.0, clip_clip_rate=0.2),
        ["20% of its groups"],
        ["100 of 100"],
    ),
    "bounded little": ("safeguard", "sgd", guarded(0.03), ["3.0%", "what it is for"], ["lower"]),
    "bounded often": ("safeguard", "sgd", guarded(0.4), ["40%"], ["what it is for", "lower"]),
    "bounded nearly always": ("safeguard", "sgd", guarded(0.9), ["90%", "lower"], []),
    "bounded, not finite": (
        "safeguard",
        "sgd",
        guarded(0.9, DIVERGES),
        ["step 61", "lower learning rate"],
        [RESCUE],
    ),
    "none skipped": ("skip_spikes", "sgd", skipped(0), ["none of 100"], ["left the others"]),
    "few skipped": ("skip_spikes", "sgd", skipped(4), ["4 of 100", "what it is for"], ["lower"]),
    "many skipped": ("skip_spikes", "sgd", skipped(40), ["40%", "lower"], ["what it is for"]),
}


@pytest.mark.parametrize(("clip", "optimizer", "log", "said", "unsaid"), CASES.values(), ids=CASES)
def test_what_the_clip_did(example, clip, optimizer, log, said, unsaid):
    sentence = example.what_the_clip_did(log, clip, optimizer)
    assert sentence.endswith(".")
    assert ". " not in sentence
    assert [words for words in said if words not in sentence] == []
    assert [words for words in unsaid if words in sentence] == []


@pytest.mark.parametrize(
    "added",
    [np.random.default_rng(0).normal(0, 0.2, STEPS), np.linspace(0.02, 0, STEPS)],
    ids=["noise", "a fall of no account"],
)
def test_a_level_loss_is_not_still_falling(example, added):
    assert "still falling" not in example.what_the_clip_did(clipped(97, LEVEL + added), CLIP, "sgd")
