"""`metrics(opt_state, params)`: readings of single leaves by path; and what readings cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers.running import each_method, passes_over_leaves
from helpers.samples import quick_jit

import optclip
from optclip import scopes

PARAMS = {
    "embedding": jnp.ones((3, 2)),
    "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "count": jnp.zeros([], jnp.int32),
    "empty": jnp.zeros((0, 2)),
}
GRADIENT = {
    "embedding": jnp.full((3, 2), 2.0),
    "dense": {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 1.0)},
    "count": jnp.zeros([], jnp.int32),
    "empty": jnp.zeros((0, 2)),
}
TREES = (PARAMS, GRADIENT)
NORMS = {"dense/bias": 2**0.5, "dense/kernel": 8.0, "embedding": 24**0.5}
"""Of the leaves, in the order of the tree. Integers and empty leaves have none."""
WHOLE = (2 + 64 + 24) ** 0.5


def readings(optimizer, names=PARAMS, params=PARAMS, gradient=GRADIENT):
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    return optclip.metrics(state, names)


def named(read, kind):
    return {key.removeprefix(kind): float(x) for key, x in read.items() if key.startswith(kind)}


def test_leaves_are_named_by_path(strict):
    read = readings(optclip.clip_by_global_norm(3.0, detail=True))
    assert named(read, "clip/norms/") == pytest.approx(NORMS)
    clipped = {name: norm * 3 / WHOLE for name, norm in NORMS.items()}
    assert named(read, "clip/clipped_norms/") == pytest.approx(clipped)
    assert float(read["clip/norm"]) == pytest.approx(WHOLE)
    assert all(x.shape == () for x in read.values())


def test_nothing_is_named_where_nothing_was_asked_for(strict):
    asked, silent = (optclip.clip_by_global_norm(1.0, detail=detail) for detail in (True, False))
    assert not named(readings(asked, names=None), "clip/norms/")
    assert not named(readings(silent), "clip/norms/")


def test_labels_name_their_groups(strict):
    clip = optclip.clip_by_group_norm(
        {"body": 1.0, "head": 5.0, "absent": 1.0},
        lambda path: "body" if "dense" in path else "head",
        detail=True,
    )
    read = readings(clip)
    expected = {"body": 66**0.5, "head": 24**0.5, "absent": 0.0}
    assert named(read, "clip/norms/") == pytest.approx(expected)
    assert named(read, "clip/clipped_norms/") == pytest.approx(
        {"body": 1, "head": 24**0.5 and 24**0.5, "absent": 0}
    )
    numbered = optclip.clip_by_group_norm(1.0, lambda path: len(path), detail=True)
    assert set(named(readings(numbered), "clip/norms/")) == {str(len(name)) for name in NORMS}


def test_labels_of_one_text_are_refused(strict):
    clip = optclip.clip_by_group_norm(1.0, {"a": 1, "b": "1"}, detail=True)
    with pytest.raises(ValueError, match="two labels read '1'"):
        clip.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_a_list_names_the_units(strict):
    clip = optclip.clip_by(9.0, scope=scopes.unit(), detail=True)
    _, state = clip.update(jnp.ones((4, 2)), clip.init(jnp.ones((4, 2))))
    assert named(optclip.metrics(state, ["left", "right"]), "clip/norms/") == {
        "left": 2,
        "right": 2,
    }


def test_groups_that_are_no_leaves_are_numbered(strict):
    read = readings(optclip.clip_by(9.0, scope=scopes.unit(), detail=True))
    assert list(named(read, "clip/norms/")) == [str(number) for number in range(1 + 2 + 2)]


def test_groups_as_many_as_leaves_are_not_taken_for_them(strict):
    swapped = {"a": "x", "b": "y"}
    clip = optclip.clip_by_group_norm({"y": 9.0, "x": 9.0}, lambda path: swapped[path], detail=True)
    tree = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}
    _, state = clip.update(tree, clip.init(tree))
    assert named(optclip.metrics(state, tree), "clip/norms/") == {"y": 4.0, "x": 3.0}


GROWING = {
    "leaves": optclip.clip_by_leaf_norm(1.0, detail=True),
    "the whole": optclip.clip_by_global_norm(1.0, detail=True),
    "labels": optclip.clip_by_group_norm(1.0, lambda path: path, detail=True),
    "entries": optclip.clip_by_value(1.0, detail=True),
    "measured": optclip.measure_norms(detail=True),
}


@pytest.mark.parametrize("clip", GROWING.values(), ids=GROWING)
def test_what_grew_at_the_last_spike(clip, strict):
    usual = {"a": 3.0, "b": 4.0, "c": 0.0}
    update = quick_jit(clip.update)

    def after(state, *several):
        for norms in several:
            gradient = {name: jnp.full(1, norm) for name, norm in norms.items()}
            _, state = update(gradient, state)
        return state

    zeros = {name: jnp.zeros(1) for name in usual}
    state = after(clip.init(zeros), *[usual] * 5)
    assert optclip.grew_most(state, zeros) == {}
    # Twice the usual norm is no spike, nor is what is not finite.
    calm = after(state, {**usual, "a": 6.0}, {**usual, "a": float("nan")})
    assert optclip.grew_most(calm, zeros) == {}
    spiked = after(state, {"a": 30.0, "b": 4.0, "c": 1.0}, usual)
    most = float(jnp.finfo(jnp.float32).max)  # It had no gradient before.
    expected = {"c": most, "a": 10.0, "b": 1.0}
    assert optclip.grew_most(spiked, zeros) == pytest.approx(expected)
    assert list(optclip.grew_most(spiked, zeros)) == ["c", "a", "b"]
    assert list(optclip.grew_most(spiked, zeros, k=1)) == ["c"]
    growth = named(optclip.metrics(spiked, zeros), "clip/growth/")
    assert growth == pytest.approx(expected)
    # Only the last one counts, against what is usual, of which a spike counts as 3 times.
    again = after(spiked, {"a": 30.0, "b": 400.0, "c": 0.0})
    growth = optclip.grew_most(again, zeros)
    assert list(growth) == ["b", "a"]
    assert growth["a"] == pytest.approx(30 / ((6 * 3 + 9) / 7), rel=1e-3)


def test_a_lasting_rise_is_usual_after_a_while(strict):
    clip = optclip.measure_norms(detail=True)
    update, state = quick_jit(clip.update), clip.init(jnp.zeros(1))
    for norm in [1.0] * 10 + [10.0] * 300:
        _, state = update(jnp.full(1, norm), state)
    assert state.detail.growth.usual_norm > 8


def test_growth_needs_details_and_one_member(strict):
    clip = optclip.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=r"detail=True, as optclip.clip_by_global_norm"):
        optclip.grew_most(clip.init(jnp.ones(2)))
    clip = optclip.clip_by_global_norm(1.0, detail=True)
    states = jax.vmap(clip.init)(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"several members.*x\[0\]"):
        optclip.grew_most(states, jnp.ones((3, 2)))


COUNTED = {
    "alone": (lambda clip: clip, 6),
    "MultiSteps": (lambda clip: optax.MultiSteps(clip, 3), 2),
    "conditionally_transform": (
        lambda clip: optax.conditionally_transform(clip, lambda step: step < 4),
        4,
    ),
    "conditionally_mask": (lambda clip: optax.conditionally_mask(clip, lambda step: step < 4), 4),
    "apply_if_finite": (lambda clip: optax.apply_if_finite(clip, 9), 5),
    "skip_spikes": (optclip.skip_spikes, 5),
    "maybe_update": (lambda clip: optax.transforms.maybe_update(clip, lambda step: step < 4), 4)
    if hasattr(optax.transforms, "maybe_update")
    else (lambda clip: clip, 6),
}


@pytest.mark.parametrize(("wrap", "seen"), COUNTED.values(), ids=COUNTED)
def test_the_steps_that_a_clip_saw_are_read(wrap, seen):
    """Of six updates, the fifth of which is not finite."""
    optimizer = wrap(optclip.clip_by_global_norm(1.0))
    params = jnp.ones(2)
    state = optimizer.init(params)
    for entry in (1.0, 2.0, 1.0, 2.0, jnp.nan, 1.0):
        _, state = optimizer.update(jnp.array([3.0, entry]), state, params)
    assert int(optclip.metrics(state)["clip/steps"]) == seen


@pytest.mark.parametrize("detail", ["first", "second"])
def test_several_clips_are_numbered_and_named(detail, strict):
    clips = [
        optclip.clip_by_leaf_norm(1.0, detail=detail == which) for which in ("first", "second")
    ]
    read = readings(optax.chain(*clips))
    place = ("first", "second").index(detail)
    assert set(named(read, f"clip/{place}/norms/")) == set(NORMS)
    assert not named(read, f"clip/{1 - place}/norms/")


def test_from_any_nest():
    clip = optclip.clip_by_global_norm(3.0, detail=True)
    params, gradient = ({name: tree[name] for name in ("embedding", "dense")} for tree in TREES)
    optimizer = optclip.skip_spikes(optax.chain(clip, optax.adam(0.1)))
    assert named(readings(optimizer, params, params, gradient), "clip/norms/") == pytest.approx(
        NORMS
    )


def test_inside_masked_a_part_of_the_parameters_names_them(strict):
    clip = optclip.clip_by_leaf_norm(1.0, detail=True)
    mask = {"embedding": False, "dense": True, "count": False, "empty": False}
    read = readings(optax.masked(clip, mask), names={"dense": PARAMS["dense"]})
    assert named(read, "clip/norms/") == pytest.approx({"dense/bias": 2**0.5, "dense/kernel": 8.0})


def test_nnx_variables_have_the_paths_of_their_gradients():
    model, seen = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), set()
    by_path = optclip.clip_by_group_norm(99.0, lambda path: seen.add(path) or path)
    clip = optax.chain(by_path, optclip.clip_by_leaf_norm(1.0, detail=True))
    optimizer = nnx.Optimizer(model, clip, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2)).sum())(model))
    assert seen == {"kernel", "bias"}
    for names in (model, nnx.state(model, nnx.Param)):
        read = optclip.metrics(optimizer.opt_state, names)
        expected = {"bias": 3**0.5, "kernel": 6**0.5}
        assert named(read, "clip/1/norms/") == pytest.approx(expected)


LARGE = {"kernel": jnp.ones((16, 20)), "embedding": jnp.ones((20, 16)), "bias": jnp.ones(300)}


@each_method
def test_readings_are_free(method):
    """A step that reads everything reduces no more than one that only clips and remembers."""
    params = gradient = LARGE
    transform = method.build(**({"detail": True} if method.takes("detail") else {}))
    state = transform.init(params)
    kept = ("steps", "nonfinite_steps", "memory")

    def clips(gradient, state, params):
        updates, new = transform.update(gradient, state, params)
        return updates, [getattr(new, name) for name in kept]

    def reads(gradient, state, params):
        updates, new = transform.update(gradient, state, params)
        names = params if method.takes("detail") else None
        return updates, new, optclip.metrics(new, names)

    clipping, reading = (passes_over_leaves(f, gradient, state, params) for f in (clips, reads))
    assert reading >= len(LARGE)
    if method.scope != "element":  # There the clipped entries are counted.
        assert reading == clipping


def test_they_are_the_same_inside_jit_and_outside(strict):
    clip = optclip.clip_by_leaf_norm(1.0, detail=True)

    @quick_jit
    def step(gradient, state):
        updates, state = clip.update(gradient, state)
        return updates, state, optclip.metrics(state, gradient)

    _, state, inside = step(GRADIENT, clip.init(PARAMS))
    outside = optclip.metrics(state, PARAMS)
    assert set(inside) == set(outside)
    for key in inside:
        np.testing.assert_array_equal(inside[key], outside[key])


def test_readings_of_stacked_states_stand_under_their_own_leaves(strict):
    """With as many members as leaves too."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4))}
    gradient = {"a": jnp.array([[2.0] * 3, [200.0] * 3]), "b": jnp.zeros((2, 4))}
    clip = optclip.clip_by_leaf_norm(1.0, detail=True)
    _, state = jax.vmap(clip.update)(gradient, jax.vmap(clip.init)(params))
    read = optclip.metrics(state, params)
    assert read["clip/norms/a"].tolist() == pytest.approx([12**0.5, 120000**0.5])
    assert read["clip/norms/b"].tolist() == [0, 0]

    # Of a history of three steps, by group.
    one = jax.tree.map(lambda x: x[0], (gradient, params))
    labeled = optclip.clip_by_group_norm(1.0, lambda path: "xy"["b" in path], detail=True)

    def step(state, scale):
        _, state = labeled.update(jax.tree.map(lambda x: x * scale, one[0]), state)
        return state, state

    _, history = jax.lax.scan(step, labeled.init(one[1]), jnp.array([1.0, 10.0, 100.0]))
    read = optclip.metrics(history, one[1])
    assert read["clip/norms/x"].tolist() == pytest.approx([12**0.5 * 10**i for i in range(3)])
    assert read["clip/norms/y"].tolist() == [0, 0, 0]
    assert read["clip/norm"].shape == (3,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.apply_if_finite(inner, 5),
        optclip.skip_spikes,
        optclip.safeguard,
        lambda inner: optax.apply_if_finite(optclip.skip_spikes(inner), 5),
        lambda inner: optclip.skip_spikes(inner, nonfinite="propagate"),
    ],
)
def test_nonfinite_steps_are_counted_where_a_wrapper_drops_the_state(wrap):
    optimizer = wrap(optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.1)))
    params = jnp.ones(2)
    state = optimizer.init(params)
    for entry in (1.0, jnp.nan, jnp.inf, 2.0):
        _, state = optimizer.update(jnp.array([1.0, entry]), state, params)
    read = optclip.metrics(state)
    counted = {
        name: int(x)
        for name, x in read.items()
        if name.startswith("clip") and name.endswith("nonfinite_steps")
    }
    assert set(counted.values()) == {2}, counted


def test_what_is_no_state_is_refused_with_the_way():
    optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(0.1))
    state = optimizer.init(PARAMS)
    restored = jax.tree.map(lambda x: x, serialization.to_state_dict(state))
    for wrong in (PARAMS, restored, [jnp.ones(2)]):
        with pytest.raises(ValueError, match=r"state of an optimizer.*restored into a fresh one"):
            optclip.metrics(wrong)
    for empty in (optax.sgd(0.1).init(PARAMS), optax.adam(0.1).init(PARAMS), ()):
        assert optclip.metrics(empty) == {}
    assert optclip.metrics(serialization.from_state_dict(state, restored)) != {}
