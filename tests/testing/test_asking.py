"""The report, the command and the pytest plugin around the contracts."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.testing import CONTRACTS, _command, check_clip, report
from optclip.testing._subject import Subject

ROOT = Path(__file__).parents[2]
CLIPS = """
import jax, jax.numpy as jnp, optax

def lets_infinity_through(max_norm):
    clip = optax.clip_by_global_norm(max_norm)
    return optax.GradientTransformation(clip.init, clip.update)

ready = optax.clip_by_global_norm(1.0)
number = 1.0

def needs_a_loss(max_norm):
    clip = optax.clip_by_global_norm(max_norm)
    def update(updates, state, params=None, *, value):
        return clip.update(updates, state, params)
    return optax.GradientTransformationExtraArgs(clip.init, update)

def makes_nothing(max_norm):
    return None
"""


@pytest.fixture
def my_clips(tmp_path, monkeypatch):
    (tmp_path / "my_clips.py").write_text(CLIPS)
    (tmp_path / "broken.py").write_text("clip = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_clips", None)


def test_what_is_asked_of_optax_is_found():
    """What is known of its clips: docs/testing.md shows the whole."""
    found = report(
        optax.clip_by_global_norm, contracts=["norms", "zero_and_infinity", "shard_map"], quick=True
    )
    said = str(found)
    for expected in (
        "updates float16[0, 0, 0, 256]: became float16[0, 0, 0, 0] where float64[0, 0, 0, 1]",
        "updates float32[0, -0], max_norm=0: became float32[nan, nan]",
        "the derivative at a gradient of 0 is float32[nan, nan, nan, nan, nan]",
        "inside shard_map over 8 devices (it has no argument axis_name)",
    ):
        assert expected in said
    mixed = report(optax.clip_by_global_norm, contracts=["dtypes", "composition"], quick=True)
    assert "lax.select requires arguments to have the same dtypes" in str(mixed)


def test_a_nan_that_is_learned_is_found_however_long_the_window():
    sys.path.insert(0, str(ROOT / "docs/_support"))
    try:
        import remade
    finally:
        sys.path.pop(0)
    found = report(remade.clip_by_history, contracts=["nonfinite"], quick=True)
    assert any("NaN at steps 301 and 304" in line for line in found.findings), found


def test_a_report_as_text_and_as_json():
    contracts = ["refusals", "host"]
    found = report(optax.clip_by_global_norm(1.0), contracts=contracts, name="mine")
    assert str(found).splitlines() == [
        "mine",
        "  refusals  not asked: nothing to refuse: no threshold to set, and no parameters needed",
        "  host      kept",
    ]
    data = json.loads(found.to_json())
    assert (data["clip"], data["kept"]) == ("mine", True)
    assert [(x["contract"], x["kept"]) for x in data["contracts"]] == [
        ("refusals", None),
        ("host", True),
    ]


def test_every_finding_is_raised():
    with pytest.raises(AssertionError) as caught:
        check_clip(optax.clip_by_global_norm, contracts=["refusals"])
    assert str(caught.value).splitlines() == [
        "clip_by_global_norm does not keep to 2 of its promises:",
        "  refusals: max_norm=-1 is accepted: float32[3, 4] becomes float32[-0.6, -0.8]",
        "  refusals: max_norm=nan is accepted: float32[3, 4] becomes float32[nan, nan]",
    ]


@pytest.mark.parametrize(
    ("ask", "error", "parts"),
    [
        (lambda: report(1.0), TypeError, "GradientTransformation, or a function"),
        (
            lambda: report(optax.clip, contracts=["types"]),
            ValueError,
            r"no contract 'types'; there are dtypes,",
        ),
        (
            lambda: report(optax.clip, threshold="max_norm"),
            ValueError,
            r"clip has no argument 'max_norm'; its arguments: max_delta",
        ),
        (
            lambda: report(optax.clip(1.0), threshold="max_delta"),
            ValueError,
            "pass the function",
        ),
        (
            lambda: report(optclip.clip_by_group_norm),
            ValueError,
            r"needs labels too; give it by functools.partial\(clip_by_group_norm, labels=",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_way_out(ask, error, parts):
    with pytest.raises(error, match=parts):
        ask()


def test_the_threshold_is_the_first_argument_that_has_to_be_given():
    assert Subject(optclip.clip_by_global_norm).threshold == "max_norm"
    assert Subject(optclip.robust_clip).threshold is None
    given = functools.partial(optclip.clip_by_global_norm, max_norm=0.3)
    assert Subject(given).threshold is None
    subject = Subject(given, threshold="max_norm")
    assert (subject.name, subject.tested_with) == ("clip_by_global_norm", "max_norm=0.3")


def test_the_page_and_what_it_shows_are_of_these_contracts():
    page = (ROOT / "docs/testing.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d*) *\|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(CONTRACTS)
    assert f"against {len(CONTRACTS)} promises" in page
    asked = json.loads((ROOT / "docs/data/contracts.json").read_text("utf-8"))
    of_optax = [found for clip, found in asked.items() if clip.startswith("optax.")]
    for name, shown in rows:
        assert int(shown or 0) == sum(len(found[name]["findings"]) for found in of_optax)
    for clip, found in asked.items():
        assert list(found) == list(CONTRACTS)
        if clip.startswith("optclip."):
            assert not [x for x in found.values() if x["findings"]], clip


def with_state(first, following=lambda state: state):
    """A clip that is right, with something beside its state."""

    def make(max_norm):
        clip = optclip.clip_by_global_norm(max_norm)

        def update(updates, state, params=None):
            updates, inner = clip.update(updates, state[0], params)
            return updates, (inner, following(state[1]))

        return optax.GradientTransformation(lambda params: (clip.init(params), first()), update)

    return make


@pytest.mark.parametrize(
    "state",
    [
        lambda: jax.random.key(0),
        lambda: {"ring": jnp.zeros(16)},
        lambda: (jnp.zeros((2, 2)), None),
    ],
)
def test_a_clip_that_is_right_whatever_its_state(state):
    asked = ["scan", "donation", "resume", "meshes", "vmap", "retrace", "host"]
    check_clip(with_state(state), contracts=asked, quick=True)


def test_of_a_state_that_is_no_array_it_is_said():
    found = report(with_state(lambda: np.float32(1)), contracts=["donation", "meshes"], quick=True)
    assert "state/1 is a float32 and no jax.Array, so it cannot be donated" in str(found)
    assert found.results[1].kept


def test_a_threshold_that_is_not_named_is_asked_for():
    def clip(max_norm=1.0):
        return optclip.clip_by_global_norm(max_norm)

    found = report(clip, contracts=["refusals", "scale"], quick=True)
    assert [x.kept for x in found.results] == [None, None]
    assert "threshold= says which of max_norm it is" in report(clip, contracts=["bound"]).to_json()


# The command -------------------------------------------------------------------------------------


def test_the_command_shows_a_table_and_says_by_its_code_what_came_of_it(capsys):
    arguments = ["optax:clip_by_global_norm", "--contract", "refusals", "--contract", "host"]
    assert _command.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "optax:clip_by_global_norm with max_norm=1: 2 findings" in shown
    assert "max_norm=-1 is accepted" in shown
    assert _command.main(["optclip:clip_by_global_norm", *arguments[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is True


def test_a_clip_in_the_folder_where_one_is(my_clips, capsys):
    for clip in ("my_clips:lets_infinity_through", "my_clips:ready"):
        assert _command.main([clip, "--contract", "host", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["clip"] == clip


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["my_clips"], "'my_clips' names no clip; give MODULE:NAME"),
        (["my_clips:clip"], "'my_clips:clip': my_clips has no clip"),
        (["no_such_module:clip"], "'no_such_module:clip': No module named 'no_such_module'"),
        (["my_clips:number"], "a clip is an optax.GradientTransformation"),
        (["my_clips:ready", "--threshold", "max_norm"], "pass the function"),
        (["my_clips:needs_a_loss"], "cannot take a step: TypeError: "),
        (["my_clips:makes_nothing"], "makes no optax.GradientTransformation, but None"),
        (["broken:clip"], "'broken:clip': importing broken raised ZeroDivisionError"),
        (["my_clips:ready", "--contract", "speed"], "invalid choice: 'speed'"),
        ([], "the following arguments are required: MODULE:NAME"),
    ],
)
def test_what_is_mistyped_is_said_in_one_line(my_clips, capsys, arguments, parts):
    assert _command.main(arguments) == 2
    shown = capsys.readouterr()
    assert parts in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out


def test_help_has_examples_and_every_contract(capsys):
    assert _command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "python -m optclip.testing optax:clip_by_global_norm" in shown
    assert all(name in shown for name in CONTRACTS)


# pytest ------------------------------------------------------------------------------------------


def run_pytest(folder, environment, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_plugin_runs_a_test_for_each_contract(my_clips, environment):
    asked = ["--pyargs", "optclip.testing", "--clip", "my_clips:lets_infinity_through"]
    ran = run_pytest(
        my_clips, environment, *asked, "--clip-quick", "-k", "refusals or host or donation", "-q"
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 2 passed" in ran.stdout
    assert "max_norm=-1 is accepted: float32[3, 4] becomes float32[-0.6, -0.8]" in ran.stdout
    assert "Traceback" not in ran.stdout
    assert "FAILED" in ran.stdout
    assert "my_clips:lets_infinity_through-refusals" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which clip? give --clip MODULE:NAME"),
        (["--clip", "my_clips:no"], "'my_clips:no': my_clips has no no"),
    ],
)
def test_the_plugin_asks_for_a_clip(my_clips, environment, arguments, said):
    ran = run_pytest(my_clips, environment, "--pyargs", "optclip.testing", *arguments)
    assert ran.returncode == 4
    assert f"ERROR: {said}" in ran.stderr


def test_without_being_asked_the_plugin_brings_nothing(my_clips, environment):
    (my_clips / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--clip')\n"
    )
    (my_clips / "test_mine.py").write_text(
        "import sys\n\n\ndef test_it():\n    assert 'jax' not in sys.modules\n"
    )
    plain = {k: v for k, v in environment.items() if not k.startswith("PYTEST")}
    ran = run_pytest(my_clips, plain | {"PYTHONPATH": str(ROOT)}, "-q", "test_mine.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
