"""What `safeguard` asks its optimizer: what it is like, and which leaves it treats alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.samples import quick_jit

import optclip
from optclip import _potential
from optclip._paths import leaves_with_paths
from optclip._programs import Forms, Input

PARAMS = {
    "layers": [{"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)} for _ in range(3)],
    "head": jnp.ones((4, 2)),
}
PATHS = [path for path, _ in leaves_with_paths(PARAMS)]


def small(optimizer, params=PARAMS, extra_args=None):
    inner = optax.with_extra_args_support(optimizer)
    paths = [path for path, _ in leaves_with_paths(params)]
    state = inner.init(params)
    return _potential.Small(inner, params, params, state, paths, np.float32, extra_args or {})


def kinds(optimizer, params=PARAMS):
    found = small(optimizer, params).kinds
    return None if found is None else sorted(len(kind.leaves) for kind in found)


NATURES = {
    # optimizer: grows, gain, fading, reach
    "sgd": (optax.sgd(0.1), 1, 1, 0, 1),
    "momentum": (optax.sgd(0.1, momentum=0.9), 1, 10, 0.9, 1),
    # It adds 0.1, then 0.19, 0.081 and so on: 10 in all, over 1.9.
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), 1, 10 / 1.9, 0.9, 1),
    "a schedule": (optax.sgd(optax.linear_schedule(1.0, 0.5, 10), momentum=0.5), 1, 2, 0.5, 1),
    "adam": (optax.adam(0.1), 0, 1, 0.904, 1),
    "adamw": (optax.adamw(0.1, weight_decay=0.3), 0, 1, 0.904, 1),
    "rmsprop": (optax.rmsprop(0.1), 0, 1, 0, 1),
    "adagrad": (optax.adagrad(0.1), 0, 1, 0, 1),
    "lion": (optax.lion(0.1), 0, 1, 0, 2.6),
    "sign": (optax.sign_sgd(0.1), 0, 1, 0, 1),
    "lamb": (optax.lamb(0.1), 0, 1, 0, 4),
    "warm-up from 0": (optax.adam(optax.linear_schedule(0.0, 0.1, 1000)), 0, 1, 0.91, 1),
    "nothing": (optax.set_to_zero(), 0, 1, 0, 1),
}


@pytest.mark.parametrize("name", NATURES)
def test_what_an_optimizer_is_like_is_seen(name):
    optimizer, *expected = NATURES[name]
    found = small(optimizer).nature()
    for what, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(what, right, rtol=0.02)
        assert what.shape == (len(PATHS),)


def test_leaves_that_are_treated_alike_are_asked_together():
    assert kinds(optax.adam(0.1)) == [3, 4]  # Biases; matrices, of whatever shape.
    assert kinds(optax.adam(0.1), PARAMS | {"head": jnp.ones((4, 2), jnp.bfloat16)}) == [1, 3, 3]


def by_layer(path, _):
    return (
        "slow" if "layers/0" in jax.tree_util.keystr(path, simple=True, separator="/") else "fast"
    )


LABELS = jax.tree_util.tree_map_with_path(by_layer, PARAMS)


def test_leaves_of_the_same_role_with_other_labels_are_not_alike():
    parts = optax.partition({"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)}, LABELS)
    assert kinds(parts) == [1, 1, 2, 3]
    guarded = optclip.safeguard(parts, deviations=np.inf)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = guarded.update(gradient, guarded.init(PARAMS), PARAMS)
    lengths = [np.linalg.norm(x["kernel"]) for x in updates["layers"]]
    # 0.01 times a gradient as large as the weights is within the bound, 0.1 times it is not.
    np.testing.assert_allclose(lengths, [0.04, 0.12, 0.12], rtol=1e-5)


MIXING = {
    "a clip inside": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "prodigy": optax.contrib.prodigy(),
    "one vector": optax.flatten(optax.adam(0.1)),
    "finite or not": optax.apply_if_finite(optax.adam(0.1), 3),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_optimizer_that_mixes_leaves_is_asked_as_a_whole(name):
    assert kinds(MIXING[name]) is None


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.partition({"slow": optax.lion(0.01), "fast": optax.adam(0.1)}, LABELS),
        optax.masked(optax.trace(0.9), jax.tree.map(lambda x: x.ndim > 1, PARAMS)),
    ],
)
def test_asked_together_and_one_by_one_the_answer_is_the_same(optimizer, monkeypatch):
    size = jnp.linspace(0.5, 2, len(PATHS))

    def answers():
        asked = small(optimizer)
        numbers, found = asked.fresh(), []
        for step in range(4):
            of_step, numbers = asked.ask((1 + step) * size, numbers, size)
            found += [of_step, numbers]
        return [*found, *asked.nature()]

    together = answers()
    monkeypatch.setattr(_potential.Small, "kinds", None)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(answers()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_learning_rate_that_is_changed_in_the_state_is_asked_with():
    optimizer = optclip.safeguard(optax.inject_hyperparams(optax.sgd)(learning_rate=0.01))
    state, gradient = optimizer.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    update, read = quick_jit(optimizer.update), []
    for rate in (0.01, 1.0, 0.01):
        state.inner_state.hyperparams["learning_rate"] = jnp.float32(rate)
        _, state = update(gradient, state, PARAMS)
        read.append(float(optclip.metrics(state)["bound/factor"]))
    np.testing.assert_allclose(read[::2], 1, rtol=1e-5)
    assert read[1] < 0.05


@pytest.mark.parametrize("inside", [True, False])
def test_accumulated_gradients_are_bounded_where_they_are_applied(inside):
    many = optax.MultiSteps(optax.sgd(10.0), 4).gradient_transformation()
    optimizer = optclip.safeguard(many)
    if not inside:
        optimizer = optax.MultiSteps(optclip.safeguard(optax.sgd(10.0)), 4)
    state, gradient = optimizer.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    update = quick_jit(optimizer.update)
    for step in range(1, 9):
        updates, state = update(gradient, state, PARAMS)
        lengths = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(updates)]
        if step % 4:
            assert max(lengths) == 0
        else:
            np.testing.assert_allclose(lengths[0], 0.03 * np.linalg.norm(PARAMS["head"]), rtol=0.01)


def test_what_the_update_reaches_is_learned():
    """An orthogonal matrix is short: Muon's step is known by that."""
    params = {"w": jnp.ones((16, 16))}
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)}
    optimizer = optclip.safeguard(optax.contrib.muon(0.001))
    state, update = optimizer.init(params), quick_jit(optimizer.update)
    for _ in range(3):
        _, state = update(gradient, state, params)
    assert 0.2 < float(state.asked.reached[0]) < 0.4  # About 1 / sqrt(16).


def test_a_line_search_is_refused_with_a_reason():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    optimizer = optclip.safeguard(optax.chain(optax.sgd(0.1), search))
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match="value_fn= cannot be called there"):
        optimizer.update(
            PARAMS, state, PARAMS, value=1.0, grad=PARAMS, value_fn=lambda params: jnp.float32(1)
        )


@pytest.mark.parametrize("inner", [optax.lbfgs(), optax.lbfgs(0.1, linesearch=None)])
def test_what_learns_curvature_is_refused_with_the_way(inner):
    for optimizer in (optclip.safeguard(inner), optclip.safeguard(optax.MultiSteps(inner, 2))):
        with pytest.raises(ValueError, match=r"cannot hold optax.lbfgs.*skip_spikes\(optax.lbfgs"):
            optimizer.init(PARAMS)


def test_forms_tell_what_is_computed_alike_and_from_what():
    def program(a, b, c, shared):
        return jnp.sin(a) * shared, jnp.sin(b) * shared, jnp.cos(c) * shared, a + b, shared

    closed = jax.make_jaxpr(program)(*[jnp.ones(2)] * 4)
    inputs = [*(Input("own", leaf) for leaf in range(3)), Input("shared")]
    forms, results = Forms(closed, inputs), closed.jaxpr.outvars
    found = [forms.form(x) for x in results]
    assert found[0] == found[1] != found[2]
    assert [forms.leaves(x) for x in results] == [{0}, {1}, {2}, {0, 1}, set()]
    assert len(forms.needed(results[:1])) == 2
    assert len(forms.needed(results)) == len(closed.jaxpr.eqns)
