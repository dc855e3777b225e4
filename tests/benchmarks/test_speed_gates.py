"""The gates of the speed benchmark: what they bind, when they hold, and what a wrong one says."""

import json
import tomllib

import pytest

from benchmarks.speed import contenders, gates, judging, machine, race
from benchmarks.speed.command import main
from benchmarks.speed.gates import Gate


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """The bandwidth of arrays of 256 kB: what it is does not matter here."""
    monkeypatch.setattr(machine, "ENTRIES", 2**16)


def test_the_file_binds_every_method_and_names_what_there_is():
    listed = gates.load(gates.FILE)
    methods = {contender.name for contender in contenders.methods()}
    for dtype in gates.DTYPES:
        of = [x for x in listed if x.dtype == dtype]
        memory = {name for x in of if x.measure == "temporary memory" for name in x.contenders}
        assert memory == methods - {"spam_clip"}
        compiled = {x.contenders for x in of if x.measure == "compile time"}
        assert compiled == {("clip_by_global_norm",), ("adaptive_grad_clip",)}
        for measure in ("time", "bytes accessed"):
            against = {
                name for x in of if x.measure == measure and x.against == contenders.GLOBAL
                for name in x.contenders
            }  # fmt: skip
            assert {"autoclip", "clip_by_quantile", "zclip", "clip_by_window"} <= against
            assert {"clip_by_moving_average", "robust_clip", "skip_spikes"} <= against
        floors = [x for x in of if x.against == contenders.FLOOR]
        assert [x.contenders for x in floors] == [(contenders.GLOBAL,)]
    assert all(x.why.endswith(".") and 0 < x.limit < 2 for x in listed)
    assert len({x.name for x in listed}) == len(listed)


def gate(limit, measure="time", contender="clip_by_global_norm", against="sgd"):
    return (
        f'[[gate]]\nname = "{measure} within {limit}"\nmeasure = "{measure}"\n'
        f'contenders = ["{contender}"]\nagainst = "{against}"\ntree = "small-transformer"\n'
        f'dtype = "float32"\nlimit = {limit}\nwhy = "A test."\nmissed = "It is small."\n'
    )


@pytest.mark.parametrize(("limit", "code"), [(1e-6, 1), (1e6, 0)])
def test_a_gate_that_does_not_hold_is_told_by_the_exit_code(limit, code, tmp_path, capsys):
    file, written = tmp_path / "gates.toml", tmp_path / "out.json"
    kinds = (
        gate(limit),
        gate(limit, "bytes accessed"),
        gate(limit, "temporary memory", against="gradient"),
        gate(limit, "compile time", "floor"),
    )
    file.write_text("\n".join(kinds))
    assert main(["--gates", str(file), "--rounds", "2", "--json", str(written)]) == code
    verdicts = json.loads(written.read_text())["gates"]
    assert [x["holds"] for x in verdicts] == [code == 0] * 4
    assert [x["measure"] for x in verdicts] == [
        "time", "bytes accessed", "temporary memory", "compile time"
    ]  # fmt: skip
    assert all(x["measured"] > 0 for x in verdicts)
    assert verdicts[-1]["rounds"] == 1  # far from the limit, on whichever side
    said = capsys.readouterr().out
    assert ("NO" in said) == (code == 1)
    assert ("known: time" in said) == (code == 1)
    assert ("yes" in said) == (code == 0)


@pytest.mark.parametrize(
    ("ratios", "attempts", "measured"),
    [
        ([0.5] * 30, 1, 0.5),  # clearly within
        ([3.0] * 30, 1, 3.0),  # clearly beyond
        ([0.5, 1.5] * 15, 3, 1.0),  # open to the end, where the median of all decides
    ],
)
def test_what_is_unclear_is_measured_again(ratios, attempts, measured, monkeypatch):
    monkeypatch.setattr(
        race, "take_turns", lambda *args, **kinds: {"one": ratios, "other": [1.0] * len(ratios)}
    )
    limit = Gate("g", "time", ("one",), "other", "16-leaves", "float32", 1.1, "A test.")
    found = judging._timed([limit], {}, 30, lambda: None)[limit, "one"]
    assert found["rounds"] == attempts * len(ratios)
    assert found["measured"] == measured


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contenders": ["zcip"]}, "did you mean zclip?"),
        ({"against": "optax.clp"}, "did you mean optax.clip?"),
        ({"tree": "17-leaves"}, "did you mean 16-leaves?"),
        ({"dtype": "float8"}, "did you mean float32?"),
        ({"measure": "tim"}, "did you mean time?"),
        ({"limt": 1}, "did you mean limit?"),
    ],
)
def test_a_wrong_gate_is_one_line(change, said, tmp_path, capsys):
    entry = tomllib.loads(gate(1.0))["gate"][0] | change
    file = tmp_path / "gates.toml"
    file.write_text("[[gate]]\n" + "".join(f"{x} = {json.dumps(y)}\n" for x, y in entry.items()))
    assert main(["--gates", str(file)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
