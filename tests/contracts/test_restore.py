"""`restore_state`: another clip in mid-run, with all that fits of the old state."""

import functools
import re
import time
from typing import NamedTuple

import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen, nnx
from helpers.samples import (
    ALL_METHODS,
    assert_same,
    detailed,
    gradient,
    quick_jit,
    sample_parameters,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

PARAMS = sample_parameters()
each_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
each_without_adam = pytest.mark.parametrize(
    "method", [m for m in ALL_METHODS if m.name != "clip_by_adam_rms"], ids=str
)


def in_memory(state, folder):
    del folder
    return state


def with_orbax(state, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", state, force=True)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "orbax")


def with_flax(state, folder):
    (folder / "state.msgpack").write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.msgpack_restore((folder / "state.msgpack").read_bytes())


WAYS = (in_memory, with_orbax, with_flax)
each_way = pytest.mark.parametrize("way", WAYS)


def with_adam(clip):
    return optax.chain(clip, optax.adam(1e-3))


def trained(optimizer, steps=6, params=PARAMS):
    state, update = optimizer.init(params), quick_jit(optimizer.update)
    for seed in range(steps):
        _, state = update(gradient(seed=seed), state, params)
    return state


def states_in(tree, kinds):
    """The states of those kinds, in order."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


@functools.cache
def after_adam():
    """The state of Adam after some steps, behind Optax's clip."""
    return trained(with_adam(optax.clip_by_global_norm(1.0)))


@functools.cache
def after_zclip():
    return trained(with_adam(optclip.zclip()))


@each_method
def test_the_same_clip_goes_on_bit_for_bit(method, tmp_path):
    optimizer = optax.chain(detailed(method), optax.sgd(0.1, momentum=0.9))
    state = trained(optimizer)
    for way in WAYS:
        found = optclip.restore_state(optimizer, PARAMS, way(state, tmp_path))
        assert_same(found.state, state)
        assert not found.fresh
        assert not found.unused


@each_without_adam
def test_after_the_clip_of_optax_the_optimizer_goes_on(method):
    optimizer = with_adam(detailed(method))
    found = optclip.restore_state(optimizer, PARAMS, after_adam())
    assert_same(found.state[1], after_adam()[1])
    assert_same(found.state[0], optimizer.init(PARAMS)[0])
    assert found.kept == ("1/0 ScaleByAdamState",)
    assert found.unused == ()
    assert all(part.startswith("0") for part in found.fresh)


def test_an_adam_goes_on_when_a_wrapper_takes_it_in():
    optimizer = optax.chain(
        optclip.clip_by_global_norm(1.0), optclip.clip_by_adam_rms(optax.adam(1e-3))
    )
    found = optclip.restore_state(optimizer, PARAMS, after_adam())
    assert_same(found.state[1].inner_state, after_adam()[1])


@each_without_adam
@each_way
def test_another_clip_keeps_what_means_the_same(method, way, tmp_path):
    state = after_zclip()
    found = optclip.restore_state(with_adam(method.build()), PARAMS, way(state, tmp_path))
    assert_same(found.state[1], state[1])
    new = found.state[0]
    if method.name == "zclip" and "patience" not in str(method.arguments):
        assert_same(new, state[0])
    elif isinstance(new, optclip.ClipState) and not method.has_memory:
        # Its count goes on, so that a threshold on a schedule does.
        assert int(new.steps) == 6
    else:
        assert_same(new, method.build().init(PARAMS))
    assert any(part.startswith("0/memory") or part.startswith("0 ") for part in found.unused) or (
        new is not None and "0 ClipState" in found.kept
    )


@pytest.mark.parametrize("before", [False, True])
@each_way
def test_details_may_come_and_go(before, way, tmp_path):
    old, new = (with_adam(optclip.robust_clip(detail=detail)) for detail in (before, not before))
    state = trained(old)
    found = optclip.restore_state(new, PARAMS, way(state, tmp_path))
    assert_same(found.state[0].memory, state[0].memory)
    assert_same(found.state[0].detail, new.init(PARAMS)[0].detail)
    assert int(found.state[0].steps) == 6
    assert_same(found.state[1], state[1])
    assert found.fresh == (() if before else ("0/detail",))


def test_a_state_of_before_a_reading_was_added():
    """Readings may be missing; what a rule remembers may not."""
    optimizer = with_adam(optclip.robust_clip())
    state = flax.serialization.to_state_dict(trained(optimizer))
    del state["0"]["given_steps"]
    found = optclip.restore_state(optimizer, PARAMS, state)
    assert found.fresh == ("0/given_steps",)
    assert int(found.state[0].steps) == 6
    del state["0"]["memory"]["level"]
    found = optclip.restore_state(optimizer, PARAMS, state)
    assert found.fresh == ("0 ClipState (memory/level is not there)",)


CLIP = optclip.clip_by_global_norm(1.0)
ADAM = optax.adamw(optax.cosine_decay_schedule(1e-3, 100))
NESTS = {
    "bare": lambda: ADAM,
    "a chain": lambda: optax.chain(CLIP, ADAM),
    "a chain, the clip behind": lambda: optax.chain(ADAM, CLIP),
    "flat": lambda: optax.chain(
        CLIP,
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1e-3, 100)),
    ),
    "safeguard": lambda: optclip.safeguard(ADAM),
    "skip_spikes": lambda: optclip.skip_spikes(optax.chain(CLIP, ADAM)),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(CLIP, ADAM), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(CLIP, ADAM), 3),
    "masked": lambda: optax.chain(
        optax.masked(CLIP, {"attention": True, "bias": False, "scale": True}), ADAM
    ),
    "named": lambda: optax.named_chain(("clip", CLIP), ("adam", ADAM)),
    "injected": lambda: optax.chain(
        optax.inject_hyperparams(optclip.clip_by_global_norm)(max_norm=1.0), ADAM
    ),
}


@functools.cache
def trained_nest(name):
    return trained(NESTS[name]())


@pytest.mark.parametrize("after", NESTS)
@pytest.mark.parametrize("before", NESTS)
def test_wrappers_may_come_and_go(before, after):
    """Adam's averages and the schedule's count are found wherever they are."""
    new, state = NESTS[after](), trained_nest(before)
    found = optclip.restore_state(new, PARAMS, state)
    assert jax.tree.structure(found.state) == jax.tree.structure(new.init(PARAMS))
    kinds = optax.ScaleByAdamState, optax.ScaleByScheduleState
    here, there = (states_in(x, kinds) for x in (found.state, state))
    assert len(here) == 2
    assert_same(here, there)


def test_a_run_that_changes_its_clip_is_the_run_it_should_be():
    """Adam goes on as it was, and the new clip as a fresh one."""
    old, new = with_adam(optclip.clip_by_global_norm(1.0)), with_adam(optclip.robust_clip())
    state = optclip.restore_state(new, PARAMS, trained(old)).state
    clip, adam = new.init(PARAMS)[0], trained(old)[1]
    fresh, moving = optclip.robust_clip(), optax.adam(1e-3)
    for seed in range(6, 12):
        updates, state = new.update(gradient(seed=seed), state, PARAMS)
        right, clip = fresh.update(gradient(seed=seed), clip)
        right, adam = moving.update(right, adam)
        assert_same(updates, right)


def test_what_does_not_fit_starts_anew_as_a_whole():
    """Averages of a model with one leaf more, or of another shape, and a count without them."""
    for change in ({"more": jnp.ones(3)}, {"bias": jnp.ones(5)}):
        params = PARAMS | change
        found = optclip.restore_state(with_adam(CLIP), params, trained(with_adam(CLIP)))
        assert_same(found.state[1], with_adam(CLIP).init(params)[1])
        assert found.fresh[0].startswith("1/0 ScaleByAdamState (mu/")
    fewer = {name: PARAMS[name] for name in ("bias", "scale")}
    found = optclip.restore_state(with_adam(CLIP), fewer, trained(with_adam(CLIP)))
    assert found.kept == ("0 ClipState",)


def test_of_another_optimizer_nothing_is_taken():
    state = trained(optax.chain(CLIP, optax.lion(1e-3)))
    found = optclip.restore_state(with_adam(CLIP), PARAMS, state)
    assert found.kept == ("0 ClipState",)
    assert found.fresh == ("1/0 ScaleByAdamState (nu/attention/kernel is not there)",)
    assert found.unused == ("1 (5 arrays)",)


def test_safeguard_forgets_what_it_knew_of_another_optimizer():
    old, new = (optclip.safeguard(x) for x in (optax.adam(1e-3), optax.sgd(0.1, momentum=0.9)))
    found = optclip.restore_state(new, PARAMS, trained(old))
    assert_same(found.state.clip, trained(old).clip)
    assert_same(found.state.asked, new.init(PARAMS).asked)
    assert any("what it knew of another optimizer" in part for part in found.fresh)


def test_none_is_taken_for_another():
    """Two that are alike where one is wanted: which of them?"""
    three = optax.chain(CLIP, optax.trace(0.9), optax.identity(), optax.trace(0.5))
    state = trained(three)
    one = optax.chain(CLIP, optax.identity(), optax.trace(0.5))
    assert optclip.restore_state(one, PARAMS, state).fresh == ("2 TraceState",)
    both = optax.chain(optax.identity(), three)
    assert_same(optclip.restore_state(both, PARAMS, state).state[1], state)


class Net(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.inner(x)


def test_with_nnx(tmp_path):
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2)).sum())(model))

    old = nnx.Optimizer(Net(), with_adam(optax.clip_by_global_norm(1.0)), wrt=nnx.Param)
    step(Net(), old)
    for way in (with_orbax, in_memory):
        restored = way(nnx.state(old), tmp_path)
        model, transform = Net(), with_adam(optclip.robust_clip())
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
        found = optclip.restore_state(transform, nnx.state(model, nnx.Param), restored["opt_state"])
        nnx.update(optimizer.opt_state, nnx.state(found.state))
        assert found.kept == ("1/0 ScaleByAdamState",)
        step(model, optimizer)
        assert int(optclip.metrics(optimizer.opt_state)["clip/steps"]) == 1
        assert int(jax.tree.leaves(optimizer.opt_state[1][0].count)[0]) == 2


def test_with_a_linen_train_state(tmp_path):
    model = linen.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones(2))

    def fresh(optimizer):
        return flax.training.train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optimizer
        )

    old = fresh(with_adam(optax.clip_by_global_norm(1.0))).apply_gradients(grads=params)
    restored = with_flax(old, tmp_path)
    new = fresh(optclip.safeguard(optax.adam(1e-3)))
    # The optimizer's part, or all of it: the rest is not touched.
    for part in (restored["opt_state"], restored):
        found = optclip.restore_state(new.tx, params, part)
        assert found.kept[0].startswith("inner_state/0 ScaleByAdamState (from")
    state = new.replace(step=restored["step"], params=params, opt_state=found.state)
    state.apply_gradients(grads=params)


@each_way
def test_on_a_mesh_it_lies_where_a_fresh_state_does(way, tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(8)}
    params = jax.device_put(params, NamedSharding(mesh, P("data")))
    old, new = with_adam(optclip.clip_by_global_norm(1.0)), with_adam(optclip.robust_clip())
    step = quick_jit(new.update)
    # A template made under jit lies on one device: what comes out of that must do too.
    for state in (old.init(params), jax.jit(old.init)(params)):
        found = optclip.restore_state(new, params, way(state, tmp_path))
        expected = new.init(params)
        for x, right in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected), strict=True):
            assert x.sharding == right.sharding
            assert x.dtype == right.dtype
        updates, _ = step(params, found.state, params)
        assert updates["w"].sharding.device_set == params["w"].sharding.device_set
    assert step._cache_size() == 1


def test_it_has_the_types_of_a_fresh_state():
    """Averages that were kept in float32 go on in bfloat16, and counts stay int32."""
    state = flax.serialization.to_state_dict(after_adam())
    state["1"]["0"]["count"] = np.int64(6)
    optimizer = optax.chain(CLIP, optax.adam(1e-3, mu_dtype=jnp.bfloat16))
    found = optclip.restore_state(optimizer, PARAMS, state)
    assert found.state[1][0].mu["bias"].dtype == jnp.bfloat16
    assert (found.state[1][0].count.dtype, int(found.state[1][0].count)) == (jnp.int32, 6)


def test_its_report():
    found = optclip.restore_state(
        optclip.safeguard(optax.adam(1e-3)), PARAMS, trained(with_adam(CLIP))
    )
    assert str(found).splitlines() == [
        "taken over: inner_state/0 ScaleByAdamState (from 1/0)",
        "fresh: SafeguardState",
        "not used: 0 (9 arrays)",
    ]
    assert str(optclip.restore_state(optax.sgd(0.1), PARAMS, ())) == (
        "taken over: nothing\nfresh: nothing\nnot used: nothing"
    )


@pytest.mark.parametrize("wrong", ["folder", b"bytes", {"a": "text"}, {"a": object()}])
def test_what_is_no_state_is_refused(wrong):
    with pytest.raises(ValueError, match=r"restore_state needs .*(got|is none)"):
        optclip.restore_state(with_adam(CLIP), PARAMS, wrong)
    with pytest.raises(ValueError, match="needs an Optax optimizer first, got"):
        optclip.restore_state(optax.adam, PARAMS, {})


@each_method
def test_a_foreign_state_names_the_way(method):
    transform = method.build()
    for state in (optax.EmptyState(), optax.adam(0.1).init(PARAMS), {"steps": jnp.zeros([])}):
        with pytest.raises(ValueError, match=re.escape("optclip.restore_state(optimizer, params")):
            transform.update(gradient(), state, PARAMS)


def test_thousands_of_leaves_take_a_moment():
    layers = [f"layer_{place}" for place in range(1000)]
    params = {name: {"kernel": jnp.ones(2), "bias": jnp.ones(1)} for name in layers}
    state = with_adam(optclip.adagc()).init(params)
    start = time.perf_counter()
    found = optclip.restore_state(optclip.skip_spikes(with_adam(CLIP)), params, state)
    assert time.perf_counter() - start < 30
    assert found.kept == (
        "inner_state/0 ClipState (from 0)",
        "inner_state/1/0 ScaleByAdamState (from 1/0)",
    )


def parts_of(kind):
    """An optimizer that gives parts of the parameters an Adam each, or a frozen part none."""
    makes = {
        "partition": lambda: optax.partition(
            {"x": optax.adam(1e-3), "y": optax.adam(1e-2)},
            {"attention": "x", "bias": "y", "scale": "x"},
        ),
        "frozen": lambda: optax.partition(
            {"x": optax.adam(1e-3), "y": optax.set_to_zero()},
            {"attention": "x", "bias": "y", "scale": "x"},
        ),
        "masked": lambda: optax.masked(
            optax.adam(1e-3), {"attention": True, "bias": False, "scale": True}
        ),
    }
    return makes[kind]()


@pytest.mark.parametrize("kind", ["partition", "frozen", "masked"])
@each_way
def test_averages_of_a_part_of_the_parameters_move_with_their_count(kind, way, tmp_path):
    old = parts_of(kind)
    restored = way(trained(old), tmp_path)
    for new in (
        parts_of(kind),
        optax.chain(optclip.robust_clip(), parts_of(kind)),
        optclip.safeguard(parts_of(kind)),
    ):
        found = optclip.restore_state(new, PARAMS, restored)
        adams = (states_in(x, optax.ScaleByAdamState) for x in (found.state, trained(old)))
        assert_same(*adams)
        assert not found.unused


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def test_parameters_may_be_named_tuples():
    params = {"first": Layer(jnp.ones(2), jnp.ones(1)), "second": Layer(jnp.ones(3), jnp.ones(1))}
    old, new = with_adam(optax.clip_by_global_norm(1.0)), with_adam(optclip.robust_clip())
    state = old.init(params)
    _, state = old.update(params, state, params)
    found = optclip.restore_state(new, params, state)
    assert found.kept == ("1/0 ScaleByAdamState",)
    assert_same(found.state[1], state[1])


def counting(decay):
    """A transformation whose state is a plain dict."""

    def update(updates, state, params=None):
        del params
        mean = jax.tree.map(lambda m, u: decay * m + u, state["mean"], updates)
        return mean, {"count": state["count"] + 1, "mean": mean}

    def init(params):
        return {"count": jnp.zeros([], jnp.int32), "mean": jax.tree.map(jnp.zeros_like, params)}

    return optax.GradientTransformation(init, update)


@each_way
def test_states_that_are_no_named_tuples_are_taken_as_a_whole_too(way, tmp_path):
    old = optax.chain(optclip.clip_by_global_norm(1.0), counting(0.9))
    new = optax.chain(optclip.robust_clip(), counting(0.9))
    state = way(trained(old), tmp_path)
    assert_same(optclip.restore_state(new, PARAMS, state).state[1], trained(old)[1])
    more = PARAMS | {"more": jnp.ones(2)}
    again = optax.chain(optclip.clip_by_global_norm(1.0), counting(0.9))
    found = optclip.restore_state(again, more, state)
    assert found.fresh == ("1 dict (mean/more is not there)",)
    assert int(found.state[1]["count"]) == 0


def test_why_a_part_starts_anew():
    params = PARAMS | {"bias": jnp.ones(5)}
    found = optclip.restore_state(with_adam(CLIP), params, trained(with_adam(CLIP)))
    assert found.fresh == ("1/0 ScaleByAdamState (mu/bias is floating (4,))",)


@pytest.mark.parametrize("wrong", [None, {"w": jnp.ones(3)}, PARAMS])
def test_where_nothing_fits_it_is_said(wrong):
    with pytest.raises(ValueError, match=r"needs the restored state|nothing of what was restored"):
        optclip.restore_state(with_adam(CLIP), PARAMS, wrong)


def test_neighbors_that_are_alike_are_not_swapped_when_they_move():
    both = [optax.trace(0.9), optax.trace(0.5)]
    state = trained(optax.chain(*both))
    found = optclip.restore_state(optax.chain(optclip.robust_clip(), *both), PARAMS, state)
    assert_same(found.state[1:], state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (optax.adam(1e-3), optax.sgd(0.1)),
        (optax.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.99)),
    ],
)
def test_safeguard_keeps_nothing_of_an_optimizer_of_another_nature(before, after):
    new = optclip.safeguard(after)
    found = optclip.restore_state(new, PARAMS, trained(optclip.safeguard(before)))
    assert_same(found.state.asked, new.init(PARAMS).asked)
    assert any("what it knew of another optimizer" in part for part in found.fresh)
