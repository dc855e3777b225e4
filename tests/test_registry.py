"""The registry and the oracles know every method, and the registry tells the truth about it."""

import inspect

import oracles
import pytest
from registry import FIXED, METHODS, WITHOUT_METHOD, WRAPPERS, numeric_arguments
from running import each_method

import optclip


def test_every_public_name_is_in_the_registry():
    named = {method.name for method in METHODS + WRAPPERS}
    assert named | WITHOUT_METHOD == set(optclip.__all__)
    assert not named & WITHOUT_METHOD
    assert len(set(map(str, METHODS))) == len(METHODS)


def test_every_method_has_an_oracle():
    assert set(oracles.ORACLES) == {method.name for method in FIXED}


@each_method
def test_the_traced_arguments_are_the_numeric_ones(method):
    assert set(method.traced) == numeric_arguments(method)
    assert set(method.traced) <= set(method.arguments)


@each_method
def test_defaults_are_in_the_signature_and_options_are_keywords(method):
    parameters = inspect.signature(getattr(optclip, method.name)).parameters
    for name in ("axis_name", "sharded", "nonfinite"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["nonfinite"].default == "propagate"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_the_registry_says_about_memory_and_params(method):
    params = {"a": 1.0}
    transform = method.build()
    state = transform.init(params)
    remembers = any(size for size in map(len, [str(getattr(state, "memory", ""))]) if size > 2)
    assert remembers == method.has_memory
    if not method.needs_params:
        transform.update(params, state)
    else:
        with pytest.raises(ValueError, match="params"):
            transform.update(params, state)
