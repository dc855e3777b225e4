"""examples/muon.py: which leaves are clipped, what the table says, what a person types and sees."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.samples import QUICK, assert_close, quick_jit

# The libraries that only the example needs may warn as they like.
pytestmark = pytest.mark.filterwarnings("default")

SCRIPT = Path(__file__).parents[2] / "examples" / "muon.py"
SMALL = ["--layers=1", "--width=8"]
MATRIX, LOUD, HEAD, SCALE = (
    "blocks/0/down/kernel",
    "blocks/0/up/kernel",
    "head/kernel",
    "norm/scale",
)
SHAPES = {MATRIX: (6, 4), LOUD: (4, 6), HEAD: (4, 5), SCALE: (4,)}


@pytest.fixture
def undrawn(example, monkeypatch):
    """Without the picture, which takes as long as the training; compiled in a hurry."""
    monkeypatch.setattr(example.run_report, "draw", lambda *args: None)
    monkeypatch.setattr(example.jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))


@pytest.fixture(scope="module")
def step(example):
    """The updates and the readings of one step, from a gradient with one loud matrix."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    grads = {
        path: jax.random.normal(key, shape)
        for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    params = jax.tree.map(jnp.ones_like, grads)

    def step(loud, *arguments):
        optimizer = example.make_optimizer(example.parse_options([*SMALL, *arguments]))

        def first(grads):
            updates, state = optimizer.update(grads, optimizer.init(params), params)
            return updates, example.readings(jnp.float32(0), state, params)

        return quick_jit(first)(grads | {LOUD: grads[LOUD] * loud})

    return step


def test_muon_has_the_matrices_in_the_blocks_and_no_others(example, step):
    assert [example.trained_by(path) for path in SHAPES] == ["muon", "muon", "adamw", "adamw"]
    updates, read = step(1.0, "--clip", "none")
    for path in (HEAD, SCALE):  # Adam's first step: entries of one size
        size = jnp.abs(updates[path])
        assert_close(size, jnp.full_like(size, size.max()), rtol=1e-5)
    singular = jnp.linalg.svd(updates[MATRIX], compute_uv=False)
    assert np.all((singular > 0.5 * 0.02) & (singular < 1.5 * 0.02))
    length = jnp.hypot(*(jnp.linalg.norm(updates[path]) for path in (HEAD, SCALE)))
    assert_close(read["step/adamw"], length, rtol=1e-5)


def test_a_loud_matrix_does_not_reach_the_leaves_of_adamw_unless_all_are_clipped(step):
    quiet, _ = step(1.0, "--clip", "adamw")
    updates, read = step(1e11, "--clip", "adamw")
    assert_close(updates, quiet, rtol=1e-3, atol=1e-6)
    assert read["norm"] > 1e11
    assert read["clip/clipped_norm"] == pytest.approx(1, rel=1e-5)  # of AdamW's leaves
    assert read["before/muon"] == pytest.approx(float(read[f"after/{LOUD}"]), rel=1e-5)
    short, read = step(1e11, "--clip", "all")
    assert read["after/" + HEAD] < 1e-9
    for path, share in ((HEAD, 0.01), (MATRIX, 0.5), (LOUD, 1.0)):
        ratio = jnp.linalg.norm(short[path]) / jnp.linalg.norm(quiet[path])
        assert ratio < share * 1.001
        assert ratio > 0.99 or path != LOUD


@pytest.mark.parametrize("clip", ["apart", "safeguard"])
def test_of_every_clip_the_norms_before_and_behind_are_read(step, clip):
    _, read = step(1e3, "--clip", clip)
    assert read["before/muon"] > 1e3
    behind = [float(read[f"after/{path}"]) for path in SHAPES]
    assert clip == "safeguard" or max(behind) <= 1 + 1e-5
    assert all(np.isfinite(float(x)) for name, x in read.items() if name != "clip/threshold")


def test_what_a_run_leaves_and_a_resumed_one_finds(example, undrawn, capsys, tmp_path):
    def run(*options):
        code = example.main([*SMALL, *options, "--out", str(tmp_path)])
        return code, *capsys.readouterr()

    code, out, err = run("--steps", "2", "--json")
    assert code == 0
    told = json.loads(out)
    assert told == json.loads((tmp_path / "result.json").read_text())
    assert "No leaf is near the eps" in err.splitlines()[-1]
    assert [told["parts"][part]["leaves"] for part in ("muon", "adamw")] == [6, 9]
    assert told["parts"]["muon"]["parameters"] == 12 * 8**2

    code, out, _ = run("--steps", "2", "--resume")
    assert code == 0
    assert "nothing is left to do" in out
    assert "AdamW" in out
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["held_out_loss"] == pytest.approx(told["held_out_loss"], rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["clip/clipped_norm"] <= 1 + 1e-5

    code, out, err = run("--steps", "3")
    assert (code, out) == (2, "")
    assert "--overwrite" in err


def test_the_verdict_names_whose_leaves_are_too_small(example):
    fine, small = {"least": 1e-3}, {"least": 1e-11}
    assert example.verdict({"muon": fine, "adamw": fine}, "all").startswith("No leaf is near")
    said = example.verdict({"muon": fine, "adamw": small}, "all")
    assert "AdamW's (0.001 eps)" in said
    assert "Muon" not in said
    assert "raise --max-norm" in said
    both = example.verdict({"muon": small, "adamw": small}, "none")
    assert "Muon's (0.001 eps) and AdamW's" in both


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--clip muon", "invalid choice"),
        ("--clip none --max-norm 2", "leave --max-norm out"),
        ("--max-norm 0", "above 0"),
        ("--loud nan", "above 0"),
        ("--width 10", "as 8"),
        ("--spike-every 0", "at least 1"),
        ("--step 3", "unrecognized arguments: --step"),
    ],
)
def test_bad_input_is_one_line(example, capsys, arguments, said):
    assert example.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("muon.py: ")
    assert err.count("\n") == 1


def test_help_has_examples_to_type_and_every_clip(example, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        example.main(["--help"])
    shown = capsys.readouterr().out
    assert "python examples/muon.py --loud 1e11 --clip all" in shown
    assert all(what in shown for what in example.CLIPS.values())
