"""`scopes.layer`: one norm for each layer of stacked leaves, as if every layer were leaves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.running import assert_right
from helpers.samples import assert_close, quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import _numerics, norms, scopes, thresholds

LAYERS = 4


def is_stacked(path):
    return path.startswith("layers/")


def tree(seed=0, scale=1.0, dtype="float32"):
    """Stacked leaves of ranks 1 to 4, of other sizes in each layer, and two leaves that are not."""
    random = np.random.default_rng(seed)

    def leaf(*shape):
        sizes = np.geomspace(1, 30, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(scale * random.normal(size=shape) * sizes, dtype)

    stacked = {"kernel": leaf(LAYERS, 6, 8), "conv": leaf(LAYERS, 2, 2, 8)}
    stacked |= {"bias": leaf(LAYERS, 8), "gate": leaf(LAYERS)}
    return {"embed": leaf(8, 4), "head": leaf(16), "layers": stacked}


def apart(whole):
    """The same with a tree of its own for every layer."""
    layers = {
        f"{place}": jax.tree.map(lambda x, place=place: x[place], whole["layers"])
        for place in range(LAYERS)
    }
    return {**whole, "layers": layers}


def together(parts):
    layers = [parts["layers"][str(place)] for place in range(LAYERS)]
    return {**parts, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


LAYER = scopes.layer(is_stacked)
OF_EACH = scopes.group(lambda path: "/".join(path.split("/")[:2]))

RULES = {
    "constant": (5.0, {}),
    "rms": (0.5, {"norm": norms.rms}),
    "linf": (2.0, {"norm": norms.linf}),
    "l3": (2.0, {"norm": norms.lp(3)}),
    "relative to the parameters": (thresholds.relative_to_params(0.1, 1e-3, eps_is_rms=True), {}),
    "learned": (thresholds.leaf_average(1.05, 0.9, 2, 30.0, "clipped"), {}),
    "smooth": (5.0, {"limiter": optclip.limiters.smooth}),
    "zeroed": (5.0, {"nonfinite": "zero"}),
}
each_rule = pytest.mark.parametrize(("rule", "arguments"), RULES.values(), ids=RULES)


def runs(rule, arguments, gradients, params):
    """(updates, readings) of the last step, with stacked layers and with layers apart."""
    found = []
    for scope, change, back in ((LAYER, lambda x: x, lambda x: x), (OF_EACH, apart, together)):
        clip = optclip.clip_by(rule, scope=scope, detail=True, **arguments)
        state, update = clip.init(change(params)), quick_jit(clip.update)
        for gradient in gradients:
            updates, state = update(change(gradient), state, change(params))
        found.append((back(updates), optclip.metrics(state, params)))
    return found


@each_rule
def test_a_stack_is_clipped_as_its_layers_would_be(rule, arguments):
    gradients = [tree(seed, scale) for seed, scale in enumerate((1.0, 0.1, 3.0))]
    (stacked, read), (single, right) = runs(rule, arguments, gradients, tree(9))
    assert_close(stacked, single, rtol=2e-6)
    assert set(read) == set(right)
    assert {"clip/norms/layers/3", "clip/norms/head"} < set(read)
    for name, x in right.items():
        assert_right(read[name], x, 1e-5, name)
    assert 0 < read["clip/clip_rate"] < 1 or "zeroed" in str(arguments)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "default"])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, "float32"), (1e30, "float32"), (1e30, "bfloat16"), (1, "float16")]
)
def test_at_every_magnitude_on_every_platform(scale, dtype, platform, monkeypatch):
    monkeypatch.setattr(_numerics, "FORCED_PLATFORM", platform)
    jax.clear_caches()
    gradient = tree(scale=scale, dtype=dtype)
    clip = optclip.clip_by(5 * scale, scope=LAYER, detail=True)
    updates, state = quick_jit(clip.update)(gradient, clip.init(gradient))
    jax.clear_caches()
    for place in range(LAYERS):
        own = [np.asarray(x[place], np.float64).ravel() for x in gradient["layers"].values()]
        right = np.linalg.norm(np.concatenate(own))
        assert_right(state.detail.norms["layers"][place], right)
        left = [np.asarray(x[place], np.float64).ravel() for x in updates["layers"].values()]
        assert np.linalg.norm(np.concatenate(left)) <= min(right, 5 * scale) * 1.01


def test_a_step_that_is_not_finite_is_handed_on_whole(strict):
    gradient = tree()
    gradient["layers"]["bias"] = gradient["layers"]["bias"].at[1, 0].set(jnp.nan)
    clip = optclip.clip_by(1e-3, scope=LAYER)
    updates, state = clip.update(gradient, clip.init(gradient))
    assert_close(updates, gradient)
    assert int(state.nonfinite_steps) == 1


def test_what_cannot_move_counts_on_neither_side(strict):
    gradient, params = tree(1), tree(2)
    gradient["layers"]["kernel"] = gradient["layers"]["kernel"].at[2].set(0)
    clip = optclip.clip_by_param_norm(0.01, scope=LAYER, detail=True)
    _, state = clip.update(gradient, clip.init(params), params)
    for place in range(LAYERS):
        own = [
            np.ravel(params["layers"][name][place])
            for name in params["layers"]
            if np.any(np.asarray(gradient["layers"][name][place]))
        ]
        right = 0.01 * np.linalg.norm(np.concatenate(own).astype(np.float64))
        assert_right(state.detail.clipped_norms["layers"][place], right)


@pytest.mark.parametrize("norm", [norms.l2, norms.linf, norms.rms])
def test_a_bound_by_the_parameters_needs_no_details(norm, strict):
    rule = thresholds.relative_to_params(0.01, 1e-3)
    with_details, without = (
        optclip.clip_by(rule, scope=LAYER, norm=norm, detail=detail) for detail in (True, False)
    )
    right, _ = with_details.update(tree(1), with_details.init(tree()), tree(2))
    found, _ = without.update(tree(1), without.init(tree()), tree(2))
    assert_close(found, right)


SPECS = {
    "embed": P("a"),
    "head": P(),
    "layers": {"kernel": P("a", None, "b"), "conv": P("a"), "bias": P("a"), "gate": P("a")},
}
"""Layers over stages of a pipeline, and one leaf of them along its columns too."""


@each_rule
@pytest.mark.parametrize("way", ["shard_map", "auto", "explicit"])
def test_on_a_mesh(rule, arguments, way):
    mesh = jax.make_mesh(
        (2, 2),
        ("a", "b"),
        axis_types=(AxisType.Explicit if way == "explicit" else AxisType.Auto,) * 2,
    )
    gradient, params = tree(1, 3.0), tree(2)
    alone = optclip.clip_by(rule, scope=LAYER, detail=True, **arguments)
    right = quick_jit(alone.update)(gradient, alone.init(params), params)
    if way == "shard_map":
        names = {"axis_name": ("a", "b"), "sharded": SPECS}
        clip = optclip.clip_by(rule, scope=LAYER, detail=True, **names, **arguments)
        update = jax.shard_map(
            clip.update, mesh=mesh, in_specs=(SPECS, P(), SPECS), out_specs=(SPECS, P())
        )
        found = quick_jit(update)(gradient, clip.init(params), params)
    else:
        with jax.set_mesh(mesh):
            placed = functools.partial(
                jax.tree.map, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
            )
            own = placed(gradient, SPECS), placed(params, SPECS)
            found = quick_jit(alone.update)(own[0], alone.init(own[1]), own[1])
    assert_close(found, right, rtol=1e-5)


def test_a_layer_of_one_and_leaves_that_are_no_floats(strict):
    gradient = {
        "layers": {"kernel": jnp.full((1, 4), 3.0), "bias": jnp.full((1,), 8.0)},
        "count": jnp.arange(3),
    }
    clip = optclip.clip_by(1.0, scope=LAYER, detail=True)
    _, state = clip.update(gradient, clip.init(gradient))
    assert_right(state.detail.norms["layers"], [10.0])


def test_leaves_whose_paths_read_alike_are_a_group_each(strict):
    gradient = {"a": {"b/c": jnp.full(1, 3.0)}, "a/b": {"c": jnp.full(1, 4.0)}}
    gradient |= {"layers": {"w": jnp.ones(2)}}
    clip = optclip.clip_by(1.0, scope=LAYER, detail=True)
    _, state = clip.update(gradient, clip.init(gradient))
    found = {name: float(x) for name, x in state.detail.norms.items() if name != "layers"}
    assert found == {"a/b/c": 3.0, "a/b/c (2)": 4.0}


def test_under_vmap(strict):
    clip = optclip.clip_by(5.0, scope=LAYER)
    both = jax.tree.map(lambda *x: jnp.stack(x), tree(0), tree(1))
    updates = jax.vmap(lambda gradient: clip.update(gradient, None)[0])(both)
    for place in range(2):
        alone, _ = clip.update(tree(place), None)
        assert_close(jax.tree.map(lambda x, place=place: x[place], updates), alone)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_its_derivative_is_finite(scale, strict):
    clip = optclip.clip_by(5.0, scope=LAYER)

    def squares(scale):
        updates, _ = clip.update(jax.tree.map(lambda x: scale * x, tree()), None)
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(updates))

    assert np.isfinite(float(jax.grad(squares)(jnp.asarray(scale))))


REFUSED = {
    "no function": (lambda: scopes.layer("layers"), "function from a leaf's path"),
    "none": (
        lambda: optclip.clip_by(1.0, scope=LAYER).update({"params": {"layers": jnp.ones(2)}}, None),
        "names no leaf as stacked: it is False for all of 'params/layers'",
    ),
    "unequal": (
        lambda: optclip.clip_by(1.0, scope=LAYER).update(
            {"layers": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}, None
        ),
        r"'layers/a' and 'layers/b' .* 2 and 3 entries",
    ),
    "a scalar": (
        lambda: optclip.clip_by(1.0, scope=LAYER).update({"layers": {"a": jnp.ones([])}}, None),
        "'layers/a' is a scalar",
    ),
}


@pytest.mark.parametrize(("do", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_layers_is_refused(do, message):
    with pytest.raises(ValueError, match=message) as caught:
        do()
    assert not re.search(r"Traced|object at", str(caught.value))
