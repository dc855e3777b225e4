"""The speed benchmark: where its figures come from, and what it says when it is used."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.speed import (
    contenders,
    gates,
    machine,
    measuring,
    programs,
    race,
    tables,
    torch_side,
    trees,
)
from benchmarks.speed.command import main
from benchmarks.speed.trees import Tree
from benchmarks.speed.work import work_of
from optclip import catalogue

TREE = Tree("tiny", "a tiny tree", {"kernel": (160, 200), "bias": (3000,), "embedding": (240, 160)})
MATRICES = Tree("matrices", "matrices", {"kernel": (160, 200), "embedding": (240, 160)})
SMALL = ["--parameters", "80k", "--dtype", "float32", "--method", "clip_by_global_norm"]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """The bandwidth of arrays of 256 kB: what it is does not matter here."""
    monkeypatch.setattr(machine, "ENTRIES", 2**16)


def built(name, dtype="float32", tree=TREE):
    return programs.build(contenders.known()[name], tree, dtype)


def figures(name, dtype="float32", tree=TREE):
    size = tree.entries * jnp.dtype(dtype).itemsize
    return measuring.figures(built(name, dtype, tree), size)


# Where figures come from -------------------------------------------------------------------------


def test_every_public_method_with_known_arguments_takes_part_and_steps():
    everyone = contenders.known()
    given = {m.name for m in catalogue.methods() if not m.needs} | contenders.ARGUMENTS.keys()
    assert given <= set(everyone)
    params = programs.shapes(TREE, "bfloat16")
    for contender in everyone.values():
        optimizer = contender.around(optax.sgd(0.01))
        updates, _ = jax.eval_shape(
            lambda params, optimizer=optimizer: optimizer.update(
                params, optimizer.init(params), params
            ),
            params,
        )
        assert jax.tree.map(lambda x: x.shape, updates) == TREE.shapes, contender.name
        assert (contender.counterpart or contenders.SGD) in everyone


def test_bounds_of_updates_stand_behind_the_optimizer():
    gradient = {"w": jnp.full(4, 10.0)}
    follow = {method.name for method in catalogue.methods() if method.follows}
    assert {"clip_by_param_norm", "clippy"} <= follow
    for name in follow & set(contenders.known()):
        optimizer = contenders.known()[name].around(optax.scale(0.0))
        state = optimizer.init(gradient)
        _, state = jax.jit(optimizer.update)(gradient, state, gradient)
        assert float(state[1].norm) == 0, name  # It saw the update, not the gradient.


def test_the_floor_reads_each_leaf_once_to_measure_it_and_once_to_use_it():
    for dtype in gates.DTYPES:
        # Of short vectors XLA writes the squares to memory.
        of = figures("floor", dtype, MATRICES)
        assert of["reductions"] == len(MATRICES.shapes)
        assert of["reductions_rarely"] == of["collectives"] == 0
        assert of["passes"] == 4
        assert of["temporary_share"] < 0.1


def test_sgd_alone_measures_nothing():
    of = figures("sgd")
    assert (of["reductions"], of["passes"], of["temporary_bytes"]) == (0, 3, 0)
    assert of["kernels"] == len(TREE.shapes)


def test_the_float32_copy_in_optax_s_bfloat16_program_is_seen():
    of = figures("optax.clip_by_global_norm", "bfloat16")
    assert of["temporary_share"] >= 2
    assert of["passes"] >= 7


def test_floor_and_optax_agree():
    random = np.random.default_rng(0)
    gradient = {name: jnp.asarray(random.normal(size=s)) for name, s in TREE.shapes.items()}
    floor = contenders.floor(1.0).update(gradient, optax.EmptyState())[0]
    theirs = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())[0]
    for name in gradient:
        np.testing.assert_allclose(floor[name], theirs[name], rtol=1e-5)


def test_what_a_condition_chooses_is_counted_by_itself():
    def rarely(x):
        plain = jnp.sum(x)
        return jax.lax.cond(plain > 1e30, lambda x: jnp.sum(jnp.cos(x)), lambda x: plain, x)

    text = jax.jit(rarely).lower(jnp.ones(300)).compile().as_text()
    work = work_of(text, {300})
    assert (work.reductions, work.reductions_rarely) == (1, 1)


def test_exchanges_between_devices_are_counted():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, P("data")))
    assert work_of(jax.jit(jnp.sum).lower(x).compile().as_text(), {512}).collectives == 1


def test_compiling_starts_afresh(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    program = built("sgd")
    assert cleared == [True]
    assert program.lowering_seconds > 0
    assert program.compile_seconds > 0


def test_contenders_share_parameters_and_hand_them_on():
    arena = race.Arena(TREE, "float32")
    first, second = arena.step_of(built("sgd")), arena.step_of(built("clip_by_global_norm"))
    before = arena.params
    first()
    between = arena.params
    second()
    assert before["bias"].is_deleted()  # donated
    assert between["bias"].is_deleted()
    assert not arena.gradient["bias"].is_deleted()


def test_the_bandwidth_programs_compute_and_take_over_memory():
    target, a, b = (jnp.full(4, value, jnp.float32) for value in (0, 1, 2))
    assert machine._into(lambda a, b: a + 3 * b)(target, a, b).tolist() == [7.0] * 4
    assert target.is_deleted()


def test_trees_are_of_the_size_they_are_said_to_be():
    assert trees.named("16-leaves").entries == 16 * 2**21
    assert len(trees.named("1000-leaves").shapes) == 1000
    assert trees.named("one-leaf").entries == 2**25
    for wanted in (4e6, 50e6, 1e9):
        assert trees.transformer(int(wanted)).entries == pytest.approx(wanted, rel=0.05)


# Time --------------------------------------------------------------------------------------------


def test_everyone_runs_once_a_round_in_changing_order():
    ran = []
    seconds = race.take_turns({x: lambda x=x: ran.append(x) for x in "abc"}, rounds=10)
    rounds = [tuple(ran[place : place + 3]) for place in range(0, len(ran), 3)]
    assert len(rounds) == 10 + race.WARM_UP
    assert {tuple(sorted(x)) for x in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 3
    assert {len(x) for x in seconds.values()} == {10}


@pytest.mark.timing
def test_times_are_those_of_the_steps():
    seconds = race.take_turns({"long": lambda: time.sleep(0.02), "short": lambda: None}, rounds=3)
    assert min(seconds["long"]) >= 0.02
    assert race.median(seconds["short"]) < 0.01


def test_a_busy_machine_does_not_change_the_ratio():
    busy = [1.0] * 10 + [7.0] * 11
    seconds = {"one": [2 * x for x in busy], "other": busy}
    assert race.spread(race.paired(seconds, "one", "other")) == (2, 2, 2)


def test_the_interval_holds_the_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [race.interval(list(x)) for x in random.exponential(size=(2000, 30))]
    held = np.mean([low <= np.log(2) <= high for low, high in found])
    assert 0.94 < held < 0.99


# The command -------------------------------------------------------------------------------------


def refused(capsys, said, *arguments):
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "zcip"], "did you mean zclip?"),
        (["--tree", "16-leafs"], "did you mean 16-leaves?"),
        (["--dtype", "float31"], "float32"),
        (["--rounds", "1"], "at least 2"),
        (["--parameters", "4x"], "such as 4M"),
        (["--parameters", "4M", "--tree", "one-leaf"], "leave --tree out"),
        (["--gates", "--quick"], "leave --quick out"),
        (["--gates", "nowhere.toml"], "nowhere.toml"),
        (["--compare", "nowhere.json"], "No such file"),
        (["--json", "nowhere/out.json"], "cannot write"),
        (["--device", "gpu"], "JAX finds no GPU"),
        (["--device", "tpu"], "gpu"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, capsys):
    refused(capsys, said, *arguments)


def test_a_file_without_tables_is_no_earlier_run(tmp_path, capsys):
    for content in ("{}", "[1]", "not JSON"):
        (tmp_path / "old.json").write_text(content)
        refused(capsys, "make one with", "--compare", str(tmp_path / "old.json"))


def test_the_help_has_examples(capsys):
    assert main(["--help"]) == 0
    assert "python -m benchmarks --quick" in capsys.readouterr().out


def test_a_run_its_json_and_the_comparison_with_it(tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert main([*SMALL, "--rounds", "4", "--json", str(first)]) == 0
    shown = capsys.readouterr().out
    told = json.loads(first.read_text())
    [table] = told["tables"]
    steps = ["sgd", "floor", "optax.clip_by_global_norm", "clip_by_global_norm"]
    assert list(table["contenders"])[:4] == steps
    for name, of in table["contenders"].items():
        assert name in shown
        assert len(of["seconds"]) == 4
        assert of["ratios"]["sgd"]["low"] <= of["ratios"]["sgd"]["median"]
        milliseconds = 1e3 * np.median(of["seconds"])
        assert of["milliseconds"]["median"] == pytest.approx(milliseconds, rel=1e-2)
    assert table["contenders"]["sgd"]["ratios"]["sgd"]["median"] == 1
    assert table["contenders"]["clip_by_global_norm"]["ratios"]["optax"]["median"] > 0
    assert told["machine"]["jax"] == jax.__version__
    assert told["command"][:3] == ["python", "-m", "benchmarks"]
    assert told["bandwidth"]["triad"] > 0

    # As if the clip had taken a hundredth of the time before.
    for spread in table["contenders"]["clip_by_global_norm"]["ratios"].values():
        spread |= {key: value / 100 for key, value in spread.items()}
    first.write_text(json.dumps(told))
    again = [*SMALL, "--rounds", "4", "--compare", str(first), "--json", str(second)]
    assert main(again) == 0
    shown = capsys.readouterr().out
    changed = shown[shown.index("earlier → now") :]
    [row] = [x for x in changed.splitlines() if x.strip().startswith("clip_by_global_norm")]
    assert "→" in row
    assert row.count("*") == 4
    [row] = [x for x in changed.splitlines() if x.strip().startswith("sgd")]
    assert "1.00 → 1.00 +0% " in row
    assert list(json.loads(second.read_text())["tables"][0]) == list(table)


def test_a_change_within_the_spread_is_not_marked():
    old, new = {"low": 1.0, "median": 1.1, "high": 1.2}, {"low": 1.1, "median": 1.15, "high": 1.3}
    assert not tables.beyond_spread(old, new)
    assert tables.beyond_spread(old, {"low": 1.21, "median": 1.3, "high": 1.4})


def test_the_path_of_the_gpu_on_the_cpu(tmp_path, capsys):
    arguments = ["--device", "cpu", "--rounds", "2", "--profile", str(tmp_path)]
    assert main([*SMALL, *arguments]) == 0
    assert list(tmp_path.glob("transformer-float32/**/*.xplane.pb"))
    assert "a transformer-shaped tree of 0.1M" in capsys.readouterr().out


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*args, **kinds):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure", interrupted)
    assert main(["--tree", "one-leaf"]) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--tree one-leaf --dtype float32, --tree one-leaf --dtype bfloat16" in last
    monkeypatch.setattr(machine, "bandwidth", interrupted)
    assert main(["--tree", "one-leaf"]) == 130
    assert "run it again" in capsys.readouterr().err


def test_without_torch_a_line_says_so(monkeypatch):
    monkeypatch.setattr(torch_side, "_torch", lambda: None)
    assert torch_side.step_of(TREE, "float32") is None
    header = measuring.header(jax.devices()[0], [], 2**10)
    assert "no torch" in tables.top(header)


@pytest.mark.parity
def test_torch_clips_and_steps():
    tree = Tree("large", "a large tree", {"kernel": (200, 300), "bias": (300,)})
    step = torch_side.step_of(tree, "float32")
    assert step is not None
    before = [param.detach().clone() for param in step.params]
    step()
    moved = [old - new.detach() for old, new in zip(before, step.params, strict=True)]
    norm = sum(float((x * x).sum()) for x in moved) ** 0.5
    # Entries of about 0.01: the gradient's norm is above 1, and is clipped to it.
    assert norm == pytest.approx(torch_side.MAX_NORM * torch_side.LEARNING_RATE, rel=1e-3)
