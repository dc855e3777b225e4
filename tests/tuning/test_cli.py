"""The command line: what a person types, sees, and reads where something is wrong."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import registry

import optclip
from optclip import catalogue, cli
from optclip.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = ("suggest", "replay", "plot", "methods")
ON_A_RUN = ("suggest", "replay", "plot")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs it in an empty folder; hands back exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def log(tmp_path):
    """The log of a run with one spike, in the folder where a run of the examples has it."""
    norms = np.exp(0.2 * np.random.default_rng(0).normal(size=120))
    norms[60] = 100.0
    path = tmp_path / "steps.jsonl"
    rows = [{"step": at + 1, "loss": 2.0, "clip/norm": x} for at, x in enumerate(norms.tolist())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    (line,) = text.splitlines()
    return json.loads(line, parse_constant=refuse)


def in_a_process(*arguments, **settings):
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


# The commands ------------------------------------------------------------------------------------


def test_suggest(run, log):
    code, shown, error = run("suggest", log)
    assert (code, error) == (0, "")
    assert shown.startswith("Use optclip.safeguard(optimizer).")
    assert max(map(len, shown.splitlines())) <= 100
    code, shown, _ = run("suggest", log, "--json")
    suggestion = strict_json(shown)
    assert code == 0
    assert suggestion["spikes"] == 1
    fixed = f"optclip.clip_by_global_norm({suggestion['threshold']:.3g})"
    assert suggestion["alternative"] == fixed
    assert fixed in shown.replace("\n", "") or fixed in run("suggest", log)[1]


def test_replay(run, log):
    code, shown, error = run("replay", log, "--method", "zclip", "--method", "robust_clip")
    assert (code, error) == (0, "")
    assert "1 of 1" in shown or "0 of 1" in shown
    names = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert {"zclip", "robust_clip"} <= names
    calls = ("--method", "clip_by_global_norm(1.5)", "--method", "skip_spikes(deviations=4)")
    code, shown, _ = run("replay", log, *calls, "-o", "replay", "--json", "--thresholds")
    replayed = strict_json(shown)
    assert code == 0
    assert [row["method"] for row in replayed["rows"]] == list(calls[1::2])
    assert max(replayed["rows"][0]["thresholds"]) == 1.5
    assert replayed["path"] == "replay.png"
    assert Path("replay.png").read_bytes().startswith(b"\x89PNG")


def test_replay_says_what_it_left_out(run, log):
    code, shown, _ = run("replay", log, "--method", "zclip", "--method", "adagc")
    assert code == 0
    assert "adagc was not replayed: it takes the norm of each leaf" in shown


def test_plot(run, log):
    code, shown, error = run("plot", log)
    assert (code, error) == (0, "")
    assert shown.startswith("1 spike, ")
    assert shown.splitlines()[-1] == f"picture: {log.with_suffix('.png')}"
    assert log.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", log.parent)[1] == shown
    code, shown, _ = run("plot", log, "-o", "run.svg", "--json")
    assert code == 0
    said = strict_json(shown)
    assert said["path"] == "run.svg"
    assert said["finding"].startswith("1 spike, ")
    assert said["notes"] == []
    assert "<svg" in Path("run.svg").read_text()


def test_a_folder_a_pipe_and_another_name(run, log, monkeypatch):
    by_file = run("suggest", log, "--json")[1]
    assert run("suggest", log.parent, "--json")[1] == by_file
    monkeypatch.setattr(sys, "stdin", io.StringIO(log.read_text()))
    assert run("suggest", "-", "--json")[1] == by_file
    log.write_text(log.read_text().replace("clip/norm", "length of g").replace("step", "n"))
    assert run("suggest", log)[0] == 2
    keys = ("--norm-key", "length of g", "--step-key", "n", "--format", "jsonl")
    named = run("suggest", log, *keys, "--json")[1]
    assert named.replace("length of g", "clip/norm") == by_file


@pytest.mark.parametrize("command", ON_A_RUN)
def test_what_is_whole_of_a_broken_log_is_used_and_said(command, run, log):
    rows = log.read_text().splitlines()
    rows[20] = '{"step": 21, "clip/norm": NaN}'
    rows[21] = '{"step": 22, "clip/norm": null}'
    log.write_text("\n".join([*rows, '{"step": 121, "cli']))
    command = [command, log, *(["--method", "zclip"] if command == "replay" else [])]
    code, shown, error = run(*command)
    assert (code, error) == (0, "")
    assert "line 121 of" in shown.lower()
    assert "is cut short and was left out" in shown.replace("\n", " ")
    code, shown, _ = run(*command, "--json")
    assert code == 0
    assert "is cut short" in json.dumps(strict_json(shown))


def test_a_log_broken_in_the_middle_and_a_byte_order_mark(run, log):
    whole = log.read_text()
    log.write_bytes(b"\xef\xbb\xbf" + whole.encode())
    expected = run("suggest", log)[1]
    assert expected.startswith("Use ")
    log.write_text(whole + '{"step": 121, "clip/no{"step": 121}\n' + '{"step": 122}\n')
    code, shown, _ = run("suggest", log)
    assert code == 0
    assert f"Line 121 of {log} cannot be read: 1 left out." in shown.replace("\n", " ")


def test_a_short_answer_without_thresholds(run, log):
    short, whole = (run("replay", log, "--json", *more)[1] for more in ((), ("--thresholds",)))
    assert len(short) < 6000 < len(whole)
    assert strict_json(short)["rows"][0].keys() < strict_json(whole)["rows"][0].keys()


def test_a_replay_fits_a_narrow_terminal(run, log, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("replay", log)[1]
    table = shown.partition("Open loop")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in shown
    for word in ("clip_by_", "robust_clip", "skip_spikes", "safeguard"):  # in one piece
        assert any(line.strip().startswith(word) for line in table.splitlines())


# Methods -----------------------------------------------------------------------------------------


def test_every_method_is_listed(run):
    code, shown, error = run("methods")
    assert (code, error) == (0, "")
    listed = {line.split()[1] for line in shown.splitlines() if line.startswith("│ ")}
    known = {method.name for method in registry.METHODS + registry.WRAPPERS}
    assert known <= listed
    methods = strict_json(run("methods", "--json")[1])
    assert {method["name"] for method in methods} == known


def test_what_is_listed_of_a_method(run):
    zclip = strict_json(run("methods", "zclip", "--json")[1])
    assert zclip["arguments"][0] == {
        "name": "z_threshold",
        "default": "2.5",
        "keyword_only": True,
    }
    assert zclip["summary"] == "Clips norms that are outliers by their z-score (ZClip)."
    assert zclip["papers"] == [
        {
            "authors": "Kumar et al.",
            "title": "ZClip: adaptive spike mitigation for LLM pre-training",
            "year": 2025,
            "url": "https://arxiv.org/abs/2504.02507",
        }
    ]
    code, shown, _ = run("methods", "zclip")
    assert code == 0
    assert shown.startswith("optclip.zclip(*, z_threshold=2.5, decay=0.97, ")
    assert shown.rstrip().endswith(catalogue.named("zclip").document)
    assert "scope=scopes.tree, norm=norms.l2, limiter=limiters.rescale" in run(
        "methods", "optclip.clip_by"
    )[1].replace("\n", " ")


def test_every_paper_of_a_docstring_is_found():
    for method in catalogue.methods():
        assert len(method.papers) == method.document.count("arXiv:"), method.name
        for paper in method.papers:
            assert paper.authors[0].isupper()
            assert len(paper.authors) < 25


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_tables_fit_their_width(columns, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run("methods")[1]
    assert max(map(len, shown.splitlines())) <= int(columns)
    assert "\x1b" not in shown
    assert "…" not in shown


# What is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", ["optclip: say what to do", "suggest", "methods"]),
        ("plott x", ["optclip: there is no command 'plott'", "did you mean plot?"]),
        ("suggest", ["optclip suggest: ", "required: RUN", "or - for what comes in by a pipe"]),
        ("suggest {log} --jsn", ["optclip suggest: unrecognized arguments: --jsn"]),
        ("suggest none.jsonl", ["there is no file none.jsonl"]),
        ("suggest empty", ["empty is a folder with no log in it that is known", "steps.jsonl"]),
        ("suggest empty.jsonl", ["empty.jsonl is empty"]),
        ("suggest text", ["text is not a log", "line 1 is 'hello'", "(--format)"]),
        ("suggest two", ["two has several norms: a/gnorm, b/gnorm", "(--norm-key)"]),
        ("suggest {log} --step-key at", ["no numbers under at", "it has step, loss, clip/norm"]),
        ("suggest {log} --format yaml", ["format must be one of json, jsonl, numbers, csv, text"]),
        ("suggest loss", ["loss has no norms under clip/norm", "it has step, loss", "--norm-key"]),
        ("plot accuracy", ["optclip plot: accuracy has no norms"]),
        ("suggest words", ["words has the norm as a str", "float(norm)"]),
        ("replay loss", ["optclip replay: loss has no norms"]),
        ("suggest nan", ["none of 2 norms is finite"]),
        ("plot nan", ["there is nothing to draw of nan"]),
        ("replay nan", ["none of 2 norms is finite"]),
        ("suggest {log} --norm-key grad", ["no norms under grad", "clip/norm"]),
        ("plot {log} -o none/run.png", ["there is no folder none", "make it first"]),
        ("plot {log} -o empty", ["empty is a folder", "-o empty/run.png"]),
        ("plot {log} -o run.foo", [".foo is no picture", ".png, .svg, .pdf"]),
        ("replay {log} --thresholds", ["--thresholds goes with --json", "-o replay.png"]),
        ("replay {log} --method zclp", ["no method 'zclp'", "did you mean zclip?"]),
        ("replay {log} --method metrics", ["no method 'metrics'"]),
        ("replay {log} --method clip_by_leaf_norm", ["needs max_norm", "(max_norm=...)'"]),
        ("replay {log} --method spam_clip", ["cannot be replayed: it takes single entries"]),
        ("replay {log} --method zclip(z=1)", ["zclip has no argument 'z'; it takes z_threshold, "]),
        ("replay {log} --method zclip(z_treshold=3)", ["did you mean z_threshold?"]),
        ("replay {log} --method zclip(decay=2)", ["got 2"]),
        ("replay {log} --method zclip(", ["is no call with plain values"]),
        ("replay {log} --method zclip(open('x'))", ["is no call with plain values"]),
        ("methods zclp", ["optclip methods: ", "did you mean zclip?"]),
        ("methods qqq", ["no method 'qqq'", "there are adagc, "]),
    ],
)
def test_bad_input_is_one_line_that_says_how_to_mend_it(typed, words, run, log, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "accuracy").write_text('{"step": 1, "accuracy": 2.0}\n')
    (tmp_path / "words").write_text('{"clip/norm": "high"}\n')
    (tmp_path / "two").write_text('{"a/gnorm": 1, "b/gnorm": 2}\n')
    (tmp_path / "loss").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "nan").write_text('{"norm": NaN}\n{"norm": null}\n')
    code, shown, error = run(*typed.replace("{log}", str(log)).split())
    assert (code, shown) == (2, "")
    assert len(error.splitlines()) == 1
    name = typed.split(" ")[0]
    assert error.startswith(f"optclip {name}: " if name in COMMANDS else "optclip: ")
    for word in words:
        assert word in error
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example(command, run):
    code, shown, error = run(*filter(None, [command, "--help"]))
    assert (code, error) == (0, "")
    examples = shown.partition("examples:\n")[2]
    assert f"optclip {command}" in examples


def test_version(run):
    assert run("--version") == (0, f"optclip {optclip.__version__}\n", "")


def test_what_the_extra_would_bring(run, log, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich.box", None)
    for typed in (("methods",), ("replay", log)):
        code, shown, error = run(*typed)
        assert (code, shown) == (2, "")
        assert 'pip install "optclip[tuning]"' in error
        assert len(error.splitlines()) == 1
    assert run("methods", "--json")[0] == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, error = run("plot", log)
    assert (code, error) == (
        2,
        'optclip plot: pictures need matplotlib: pip install "optclip[tuning]"\n',
    )


def test_a_bug_is_no_bad_input(run, log, monkeypatch):
    def broken(*arguments):
        raise ValueError("setting an array element with a sequence")

    monkeypatch.setattr("optclip._tuning.replay_methods.drive", broken)
    with pytest.raises(ValueError, match="array element"):
        run("replay", str(log), "--json")


def test_the_kind_of_picture_is_found_out_first(run, log, monkeypatch):
    monkeypatch.setattr("optclip._tuning.replaying.replay", lambda *_: pytest.fail("worked for it"))
    code, _, error = run("replay", str(log), "--json", "-o", "run.jpg")
    assert code == 2
    assert ".jpg is no picture" in error


def test_ctrl_c(run, log, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_suggest", interrupted)
    assert run("suggest", log) == (130, "", "optclip suggest: interrupted\n")


def test_a_closed_pipe_is_silent():
    process = in_a_process("-m", "optclip", "methods")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_help_loads_nothing_heavy_and_errors_reach_the_shell(tmp_path):
    code = (
        "import sys; from optclip.cli import main; main(['--help']); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    shown, error = in_a_process("-c", code).communicate(timeout=60)
    assert error == ""
    assert not {"matplotlib", "rich", "flax"} & set(shown.splitlines()[-1].split())
    process = in_a_process("-m", "optclip", "suggest", "none.jsonl", cwd=tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("optclip suggest: there is no file none.jsonl")
    assert len(error.splitlines()) == 1
