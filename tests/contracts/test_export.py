"""Contract 8: a step is exported with the state at its boundary, and read again elsewhere."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.registry import ONE_OF_EACH_KIND
from helpers.samples import assert_same, detailed, gradient, sample_parameters

import optclip
from optclip import _jax, scopes

PARAMS = sample_parameters()

# Optax registers none of its states: whoever exports them does.
for kind in (optax.EmptyState, optax.ScaleByAdamState):
    with contextlib.suppress(ValueError):
        jax.export.register_namedtuple_serialization(kind, serialized_name=f"optax.{kind.__name__}")


def assert_exported_as(transform):
    state = transform.init(PARAMS)
    step = jax.jit(transform.update)
    exported = jax.export.export(step)(gradient(), state, PARAMS)
    again = jax.export.deserialize(exported.serialize())
    found, right = (call(gradient(), state, PARAMS) for call in (again.call, step))
    assert_same(found, right)
    assert jax.tree.structure(found[1]) == jax.tree.structure(state)


@pytest.mark.parametrize("method", ONE_OF_EACH_KIND, ids=str)
def test_a_step_is_exported(method):
    assert_exported_as(detailed(method))


OTHERS = {
    "labels": optclip.clip_by_group_norm(1.0, lambda path: path[0], detail=True),
    "layers": optclip.clip_by(1.0, scope=scopes.layer(lambda path: path == "bias"), detail=True),
    "units": optclip.clip_by(1.0, scope=scopes.unit(), detail=True),
    "a histogram of each leaf": optclip.measure_norms(histogram=True, detail=True),
    "several rules": optclip.clip_by(
        optclip.thresholds.minimum(1.0, optclip.thresholds.moving_average(2.0, 0.9, "raw"))
    ),
}


@pytest.mark.parametrize("transform", OTHERS.values(), ids=OTHERS)
def test_every_kind_of_memory_is_exported(transform):
    assert_exported_as(transform)


def test_for_other_machines_too():
    clip = optclip.robust_clip(detail=True)
    arguments = gradient(), clip.init(PARAMS)
    exported = jax.export.export(jax.jit(clip.update), platforms=["cpu", "cuda", "tpu"])(*arguments)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    assert_same(again.call(*arguments), jax.jit(clip.update)(*arguments))


def test_a_module_that_is_loaded_twice_is_no_error():
    kind = type("ClipState", (tuple,), {"_fields": ()})
    assert _jax.exportable(kind) is kind
    assert jnp.shape(optclip.clip_by_global_norm(1.0).init(PARAMS).norm) == ()
