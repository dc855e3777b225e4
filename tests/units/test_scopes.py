"""Scopes by themselves: units of every kind of layer, labels of every form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.running import assert_right
from helpers.samples import assert_same
from oracles import clips

import optclip
from optclip import scopes

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((5,), (0,)),
        ((1, 4), (0, 1)),
        ((1, 1, 1, 4, 1), (0, 1, 2, 3, 4)),
        ((3, 4), (0,)),
        ((6, 3, 4), (0,)),
        ((3, 1, 4), (0,)),
        ((3, 3, 8, 16), (0, 1, 2)),
        ((2, 3, 3, 8, 16), (0, 1, 2, 3)),
        ((2, 2, 3, 3, 8, 16), (0, 1, 2, 3, 4)),
    ],
    ids=repr,
)
def test_units_where_nothing_is_said(shape, axes):
    assert scopes.fan_in_axes("any", shape) == axes == clips.fan_in_axes("any", shape)


def axes_of_a_model(path, shape):
    """Embeddings by row, stacked layers by layer and output, attention by head; no head."""
    if path.endswith("embedding"):
        return 1
    if path.startswith("layers/"):
        return tuple(range(1, len(shape) - 1))
    if path.endswith("query"):
        return (0, 2)
    return None if path == "head" else scopes.fan_in_axes(path, shape)


def test_units_of_embeddings_stacked_layers_and_heads():
    shapes = {
        "embed/embedding": (5, 3),
        "layers/dense": (2, 3, 4),
        "layers/conv": (2, 3, 3, 2, 4),
        "query": (4, 3, 2),
        "dense": (3, 4),
        "head": (3, 4),
    }
    random = np.random.default_rng(0)
    gradient = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    clip = optclip.clip_by(0.5, scope=scopes.unit(axes_of_a_model), detail=True)
    updates, state = clip.update(gradient, clip.init(gradient))
    spans = {"embed/embedding": (1,), "layers/dense": (1,), "layers/conv": (1, 2, 3)}
    spans |= {"query": (0, 2), "dense": (0,)}
    expected = {
        name: np.sqrt(np.sum(np.asarray(gradient[name], float) ** 2, axes)).ravel()
        for name, axes in sorted(spans.items())
    }
    assert {name: size.size for name, size in expected.items()} == {
        "dense": 4,
        "embed/embedding": 5,
        "layers/conv": 8,
        "layers/dense": 8,
        "query": 3,
    }
    assert_right(state.detail.norms, np.concatenate(list(expected.values())))
    assert updates["head"] is gradient["head"]
    for name, axes in spans.items():
        left = np.sqrt(np.sum(np.asarray(updates[name], float) ** 2, axes)).ravel()
        assert_right(left, np.minimum(expected[name], 0.5), where=name)


@pytest.mark.parametrize("axes", [1, -1, (1,), (-1,), [1], (1, -1), np.int64(1)], ids=repr)
def test_axes_are_said_in_any_form(axes):
    gradient = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    clip = optclip.clip_by(1.0, scope=scopes.unit(axes), detail=True)
    _, state = clip.update(gradient, clip.init(gradient))
    assert_right(state.detail.norms, [5.0, 0.5])


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


MODEL = {
    "body": [Layer(jnp.full((2, 2), 3.0), jnp.full(2, 4.0)), Layer(jnp.ones((2, 2)), jnp.ones(2))],
    "head": jnp.full(4, 2.0),
}
LABELS = {
    "function": lambda path: None if path == "head" else path.split("/")[1],
    "tree": {"body": [Layer("0", "0"), Layer("1", "1")], "head": None},
    "prefix": {"body": ["0", "1"], "head": None},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_in_any_form(labels):
    clip = optclip.clip_by_group_norm({"1": 1.0, "0": 2.0}, labels, detail=True)
    updates, state = clip.update(MODEL, clip.init(MODEL))
    for found, right in (
        (state.detail.norms, [np.sqrt(4 * 9 + 2 * 16), np.sqrt(6)]),
        (state.detail.clipped_norms, [2.0, 1.0]),
    ):
        assert_right([found["0"], found["1"]], right)
    assert updates["head"] is MODEL["head"]
    assert_right(updates["body"][1].bias, np.full(2, 1 / np.sqrt(6)))
    assert_right(updates["body"][0].bias, np.full(2, 8 / np.sqrt(68)))


def test_paths_read_like_a_directory():
    seen = []
    clip = optclip.clip_by_group_norm(1.0, lambda path: seen.append(path) or path)
    clip.update(MODEL, clip.init(MODEL))
    body = [f"body/{layer}/{name}" for layer in (0, 1) for name in ("kernel", "bias")]
    assert seen == [*body, "head"]


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=repr)
@pytest.mark.parametrize("labels", ["x", {"a": "x", "b": "y", "c": "x"}], ids=["prefix", "tree"])
def test_labels_of_trees_with_holes(hole, labels):
    clip = optclip.clip_by_group_norm(1.0, labels)
    gradient = {"a": jnp.full(4, 2.0), "b": hole, "c": jnp.full(5, 0.0)}
    updates, state = clip.update(gradient, clip.init(gradient))
    assert_same(updates, {**gradient, "a": jnp.full(4, 0.5)})
    assert_right(state.norm, 4.0)


def test_a_label_that_no_leaf_has_changes_nothing():
    clips = [
        optclip.clip_by_group_norm(bounds, lambda path: path[0])
        for bounds in ({"a": 1.0, "b": 2.0}, {"z": 0.5, "a": 1.0, "y": 0.1, "b": 2.0})
    ]
    gradient = {"a": jnp.full(4, 2.0), "b": jnp.full(9, 2.0)}
    outcomes = [clip.update(gradient, clip.init(gradient)) for clip in clips]
    assert_same(outcomes[0], outcomes[1])


def test_integers_need_no_label_of_their_own():
    clip = optclip.clip_by_group_norm({"a": 1.0}, lambda path: path)
    gradient = {"a": jnp.full(4, 2.0), "step": jnp.arange(3)}
    updates, _ = clip.update(gradient, clip.init(gradient))
    assert_same(updates, {"a": jnp.full(4, 0.5), "step": gradient["step"]})
