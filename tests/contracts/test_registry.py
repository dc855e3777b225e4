"""The registry and the oracles know every method. What it says: test_registry_arguments.py."""

import inspect

from helpers.registry import METHODS, WITHOUT_METHOD, WRAPPERS
from helpers.running import each_method
from oracles.methods import ORACLES

import optclip


def test_every_public_name_is_in_the_registry():
    named = {method.name for method in METHODS + WRAPPERS}
    assert named | WITHOUT_METHOD == set(optclip.__all__)
    assert not named & WITHOUT_METHOD
    assert len(set(map(str, METHODS))) == len(METHODS)


def test_every_method_has_an_oracle():
    assert set(ORACLES) == {method.name for method in METHODS}


@each_method
def test_defaults_are_in_the_signature_and_options_are_keywords(method):
    parameters = inspect.signature(method.factory).parameters
    for name in ("axis_name", "sharded", "nonfinite"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["nonfinite"].default == "propagate"
