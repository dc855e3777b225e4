"""Contract 10: what is refused where a norm could go wrong, and how often devices must talk."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import ONE_OF_EACH_KIND
from helpers.samples import (
    ALL_METHODS,
    assert_close,
    assert_same,
    canceled,
    quick_jit,
    specs_of_state,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

SPECS = {"a": P("data", "model"), "b": P("model"), "bias": P(), "c": P(None, "data")}
NAMES = {"a": ("data", "model"), "b": "model", "bias": (), "c": "data"}
SHAPES = {"a": (16, 32), "b": (16, 16), "bias": (64,), "c": (32, 16)}
SMALLEST = 256
"""Entries of the smallest leaf that is split."""

pytestmark = pytest.mark.usefixtures("strict")

each_kind = pytest.mark.parametrize("method", ONE_OF_EACH_KIND, ids=str)


def ones():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def mapped(method, check_vma=True, specs=SPECS, axis_names=frozenset(), **arguments):
    """(updates, params) -> updates: a first step inside `shard_map`, over both axes or those."""
    transform, state = method.build(**arguments), method.build().init(ones())
    state_specs = specs_of_state(state, ones(), specs)
    update = jax.shard_map(
        lambda *args: transform.update(*args)[0],
        mesh=mesh_of(),
        in_specs=(specs, state_specs, specs),
        out_specs=specs,
        check_vma=check_vma,
        axis_names=axis_names,
    )
    return lambda updates, params: update(updates, state, params)


def refused(function, *parts, tree=None):
    """Tracing it raises a ValueError whose message has all the parts, in this order."""
    tree = ones() if tree is None else tree
    with pytest.raises(ValueError, match=".*".join(re.escape(part) for part in parts)):
        jax.eval_shape(function, tree, tree)


@each_kind
def test_a_part_is_not_taken_for_the_whole(method):
    refused(
        mapped(method),
        "'a' differs between devices along ['data', 'model']",
        "axis_name=('data', 'model')",
        "jax.lax.pmean",
        "axis_name=()",
    )


@each_kind
def test_an_axis_left_out_of_axis_name_is_noticed(method):
    refused(
        mapped(method, axis_name="data"),
        "'a' differs between devices along ['model']",
        "axis_name='data'",
        "add it",
        "jax.lax.pmean",
    )


@each_kind
def test_where_jax_does_not_track_sharded_is_asked_for(method):
    ways_out = "'a'", "sharded=", "PartitionSpecs", "function from path", "check_vma=True"
    refused(mapped(method, check_vma=False, axis_name=("data", "model")), *ways_out)

    transform, tree = method.build(axis_name="part"), {"a": jnp.ones((8, 4))}
    state = method.build().init({"a": jnp.ones(4)})
    pmapped = jax.pmap(
        lambda updates, params: transform.update(updates, state, params)[0], axis_name="part"
    )
    refused(pmapped, "axis_name='part'", *ways_out[1:], tree=tree)


@each_kind
def test_an_axis_that_is_none_here_is_refused(method):
    transform, state = method.build(axis_name=("data", "tensr")), method.build().init(ones())

    def outside(updates, params):
        return transform.update(updates, state, params)[0]

    refused(
        outside, "axis_name=('data', 'tensr')", "no such mesh axis", "plain jit", "leave it out"
    )
    refused(mapped(method, axis_name=("data", "tensr")), "no such mesh axis", "names of their axes")


@each_kind
@pytest.mark.parametrize("sharded", [SPECS, lambda path: SPECS[path], NAMES.get])
def test_an_answer_with_an_axis_that_axis_name_lacks_is_refused(method, sharded):
    update = mapped(method, check_vma=False, axis_name="data", sharded=sharded)
    refused(update, "'a'", "'model'", "axis_name")


@each_kind
@pytest.mark.parametrize("axis_name", [None, ()])
def test_sharded_without_a_name_of_an_axis_is_refused(method, axis_name):
    for sharded in (SPECS, NAMES.get):
        with pytest.raises(ValueError, match=r"sharded= .*shard_map and pmap.*axis_name="):
            method.build(axis_name=axis_name, sharded=sharded)


CONTRADICTIONS = {
    "a whole leaf said to be split": ("bias", P("model"), ["model"], "nothing"),
    "a split leaf said to be whole": ("b", P(), "nothing", ["model"]),
    "one of two axes left out": ("a", P("data"), ["data"], ["data", "model"]),
    "another axis": ("c", P(None, "model"), ["model"], ["data"]),
}


@each_kind
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_answer_that_contradicts_what_jax_tracks_is_refused(method, name):
    leaf, spec, said, known = CONTRADICTIONS[name]
    sharded = SPECS | {leaf: spec}
    refused(
        mapped(method, axis_name=("data", "model"), sharded=sharded),
        f"'{leaf}' is split over {said}",
        f"tracks here that it is split over {known}",
        "leave sharded= out",
    )


@each_kind
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_tree_of_shardings_means_their_specs(method, check_vma):
    shardings = {name: NamedSharding(mesh_of(), spec) for name, spec in SPECS.items()}
    updates = [
        quick_jit(mapped(method, check_vma, axis_name=("data", "model"), sharded=said))(
            ones(), ones()
        )
        for said in (SPECS, shardings)
    ]
    assert_same(*updates)


@each_kind
def test_an_axis_that_the_compiler_manages_may_stand_in_an_answer(method):
    manual = {"a": P("data"), "b": P(), "bias": P(), "c": P(None, "data")}
    arguments = {"axis_name": "data", "sharded": SPECS}
    update = mapped(method, specs=manual, axis_names={"data"}, **arguments)
    changed = jax.eval_shape(update, ones(), ones())
    assert jax.tree.map(jnp.shape, changed) == SHAPES


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if m.scope == "unit"], ids=str)
@pytest.mark.parametrize(
    ("check_vma", "sharded"), [(True, None), (True, NAMES.get), (False, NAMES.get)]
)
def test_units_need_to_know_which_dimension_is_split(method, check_vma, sharded):
    update = mapped(method, check_vma, axis_name=("data", "model"), sharded=sharded)
    refused(update, "'a' is split over ['data', 'model']", "dimensions", "PartitionSpec")


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if m.scope == "unit"], ids=str)
def test_a_part_of_length_one_is_not_taken_for_a_vector(method):
    split = P(None, ("data", "model"))  # Of eight columns, each device has one.
    update = jax.shard_map(
        method.build(axis_name=("data", "model")).update,
        mesh=mesh_of(),
        in_specs=(split, P(), split),
        out_specs=(split, P()),
    )
    with pytest.raises(ValueError, match=r"dimensions.*PartitionSpec"):
        jax.eval_shape(
            update, jnp.ones((3, 8)), method.build().init(jnp.ones((3, 8))), jnp.ones((3, 8))
        )


@each_kind
def test_no_axis_name_on_purpose_clips_each_part_by_itself(method):
    random = np.random.default_rng(0)

    def normal():
        return {name: jnp.asarray(random.normal(size=SHAPES[name]), jnp.float32) for name in "bc"}

    gradient, params, transform = normal(), normal(), method.build(axis_name=())
    specs = {"b": P("data"), "c": P("data")}
    update = jax.shard_map(
        lambda updates, params: transform.update(updates, transform.init(updates), params)[0],
        mesh=mesh_of(),
        in_specs=(specs, specs),
        out_specs=specs,
    )
    together = quick_jit(update)(gradient, params)
    alone = quick_jit(method.build().update)
    for device in range(4):

        def part(tree, device=device):
            return jax.tree.map(lambda x: jnp.split(x, 4)[device], tree)

        state = method.build().init(part(params))
        expected, _ = alone(part(gradient), state, part(params))
        assert_close(part(together), expected, atol=canceled(method))


def collectives(function, *args):
    """(where, what, entries) of each collective in the compiled program, counted.

    Where: "always" in the main program, "rarely" in what a condition chooses.
    """
    found, computation = Counter(), ""
    for line in quick_jit(function).lower(*args).compile().as_text().splitlines():
        if head := re.match(r"(ENTRY )?%?[\w.\-]+ \(", line):
            computation = "always" if head[1] else "rarely"
        kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
        if collective := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"\w\d*\[([\d,]*)\]", collective[1])
            entries = sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
            found[computation, collective[2], entries] += 1
    return found


def total(found, where, what):
    return sum(n for (place, kind, _), n in found.items() if (place, kind) == (where, what))


def passes(method):
    """How often the devices talk in the ordinary case: once for all that is measured at a time."""
    if method.norm == "l3":  # The largest entry comes first.
        return 2
    others = {"safeguard": 3, "spam_clip": 3}  # Gradient, update, parameters; norms, two readings.
    return others.get(method.name, 1)


def reductions(method):
    """How many reductions of the whole tree, one by one, that takes; those for NaN included."""
    if method.norm == "l3":
        return 3
    if method.name == "spam_clip":
        return 5
    if method.scope == "unit":  # The norms; whether all are finite; four of some readings each.
        return 6
    return {"linf": 2, "l2": passes(method)}.get(method.norm, 1) + (method.scope == "element")


each_that_adds = pytest.mark.parametrize(
    "method", [method for method in ONE_OF_EACH_KIND if method.scope != "matrix"], ids=str
)


def test_every_split_matrix_is_gathered_once():
    """One gathering for each mesh axis that splits it, and all-reduces of a few numbers."""
    clip = optclip.clip_singular_values(1.0, axis_name=("data", "model"), sharded=SPECS)
    state = clip.init(ones())
    update = jax.shard_map(
        clip.update, mesh=mesh_of(), in_specs=(SPECS, P(), SPECS), out_specs=(SPECS, P())
    )
    found = collectives(update, ones(), state, ones())
    split = sum(axis is not None for spec in SPECS.values() for axis in spec)
    assert sum(n for (_, kind, _), n in found.items() if kind == "all-gather") <= split
    assert {kind for _, kind, _ in found} == {"all-reduce", "all-gather"}
    assert total(found, "always", "all-reduce") <= 2
    assert all(entries < SMALLEST for _, kind, entries in found if kind == "all-reduce")


@each_that_adds
def test_one_collective_a_measurement_under_shard_map(method):
    transform = method.build(axis_name=("data", "model"), sharded=SPECS)
    state = transform.init(ones())
    state_specs = specs_of_state(state, ones(), SPECS)
    update = jax.shard_map(
        transform.update,
        mesh=mesh_of(),
        in_specs=(SPECS, state_specs, SPECS),
        out_specs=(SPECS, state_specs),
    )
    found = collectives(update, ones(), state, ones())
    assert 1 <= total(found, "always", "all-reduce") <= passes(method)
    assert total(found, "rarely", "all-reduce") <= passes(method)
    assert {kind for _, kind, _ in found} == {"all-reduce"}
    assert all(entries < SMALLEST for _, _, entries in found)


@each_that_adds
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_as_few_collectives_as_optax_under_jit(method, axis_type):
    mesh = mesh_of(axis_type)
    place = functools.partial(
        jax.tree.map, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    )
    transform, tree, of_optax = method.build(), place(ones(), SPECS), optax.clip_by_global_norm(1.0)
    found = collectives(transform.update, tree, transform.init(tree), tree)
    least = collectives(of_optax.update, tree, of_optax.init(tree))
    assert total(found, "always", "all-reduce") >= total(least, "always", "all-reduce") > 0
    assert total(found, "always", "all-reduce") <= total(
        least, "always", "all-reduce"
    ) * reductions(method)
    assert all(entries < SMALLEST for _, _, entries in found)
    assert {kind for _, kind, _ in found} == {"all-reduce"}
