"""Contract 5: concrete nonsense is refused with a message that helps, traced nonsense defined."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.registry import METHODS
from helpers.running import (
    compiled_with_traced_arguments,
    each_method,
    each_method_with_a_threshold,
    each_method_with_numbers,
)
from helpers.samples import assert_same, detailed, gradient

import optclip
from optclip import limiters, norms, scopes

pytestmark = pytest.mark.usefixtures("strict")

MATRIX = jnp.asarray([[0.6, -0.8], [0.8, 0.6]], jnp.float32)


def shows(*parts):
    """A pattern for a message that shows all parts, in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


@each_method_with_numbers
def test_5_a_nan_is_refused_for_every_number(method):
    for name in method.traced:
        for nan in (math.nan, np.float32("nan"), jnp.asarray(math.nan, jnp.bfloat16)):
            with pytest.raises(ValueError, match=shows(f"{name}=", "nan", "; ")):
                method.build(**{name: nan})


@each_method_with_a_threshold
def test_5_a_negative_threshold_is_refused(method):
    for name in method.traced:
        for negative in (-0.5, np.float64(-0.5), jnp.asarray(-0.5), -math.inf):
            with pytest.raises(ValueError, match=shows(f"{name}=", f"{negative!r}", "; ")):
                method.build(**{name: negative})


@each_method_with_numbers
@pytest.mark.parametrize(
    "nonsense", ["1.0", None, [1.0, 2.0], np.ones(2), jnp.ones(1), True, 1 + 2j, {}], ids=repr
)
def test_5_what_is_no_number_is_refused(method, nonsense):
    if method.name == "clip_by_group_norm" and isinstance(nonsense, dict):
        with pytest.raises(ValueError, match=shows("at least one label", "{}", "pass")):
            method.build(max_norm=nonsense)
    else:
        name = method.traced[0]
        with pytest.raises(ValueError, match=shows(f"{name}=", repr(nonsense), "; ")):
            method.build(**{name: nonsense})


@each_method
def test_5_an_unknown_way_with_nonfinite_steps_is_refused(method):
    with pytest.raises(ValueError, match=shows("propagate", "zero", "'skip'")):
        method.build(nonfinite="skip")


@pytest.mark.parametrize("method", [m for m in METHODS if m.needs_params], ids=str)
def test_5_missing_params_are_refused_in_optax_own_words(method):
    with pytest.raises(ValueError) as optax_says:  # noqa: PT011 - its message is what is compared
        optax.adaptive_grad_clip(0.1).update({"w": MATRIX}, optax.EmptyState(), None)
    transform = method.build()
    with pytest.raises(ValueError, match=shows(str(optax_says.value))):
        transform.update({"w": MATRIX}, transform.init({"w": MATRIX}))
    with pytest.raises(ValueError, match=shows("'w'", "updates")):
        transform.update({"w": MATRIX}, transform.init({"w": MATRIX}), {"other": MATRIX})


clip_by_group = functools.partial(optclip.clip_by_group_norm, labels=lambda path: path)

REFUSED_AT_ONCE = {
    "order 0": (lambda: norms.lp(0), "above 0", "0.0", "use 1, 2"),
    "order below 0": (lambda: norms.lp(-2), "above 0", "-2", "use 1, 2"),
    "order NaN": (lambda: norms.lp(math.nan), "above 0", "nan", "use 1, 2"),
    "order of a method": (
        lambda: optclip.clip_by_global_norm(1.0, ord="fro"),
        "order of a norm",
        "'fro'",
        "static_args",
    ),
    "unit uncalled": (lambda: optclip.clip_by(1.0, scope=scopes.unit), "scope=", "called"),
    "lp uncalled": (lambda: optclip.clip_by(1.0, norm=norms.lp), "norm=", "called"),
    "name of a norm": (lambda: optclip.clip_by(1.0, norm="l2"), "norm=", "'l2'"),
    "name of a limiter": (lambda: optclip.clip_by(1.0, limiter="smooth"), "limiter=", "'smooth'"),
    "scope and limiter mixed up": (
        lambda: optclip.clip_by(1.0, scope=limiters.smooth),
        "scope=",
        "optclip.scopes",
    ),
    "a norm of whole leaves only": (
        lambda: optclip.clip_by(1.0, norm=norms.l2._replace(name="spectral", combine=None)),
        "spectral",
        "'tree'",
        "scopes.leaf",
    ),
    "decay 1": (lambda: optclip.zclip(decay=1.0), "decay=", "1.0", "0.97"),
    "decay below 0": (lambda: optclip.spam_clip(decay=-0.1), "decay=", "-0.1"),
    "percentile": (lambda: optclip.autoclip(101), "percentile=", "100", "101", "10"),
    "quantile": (lambda: optclip.clip_by_quantile(1.5), "quantile=", "[0, 1]", "1.5"),
    "warm-up": (lambda: optclip.adagc(warmup_steps=-1), "warmup_steps=", "-1", "0"),
    "no window": (lambda: optclip.clip_by_window(window=0), "window=", "at least 1", "0"),
    "window in parts": (lambda: optclip.autoclip(window=2.5), "window=", "whole", "2.5"),
    "patience": (lambda: optclip.zclip(patience=0), "patience=", "0", "None"),
    "variant": (lambda: optclip.zclip(variant="median"), "variant", "'mean'", "'median'"),
    "learning": (lambda: optclip.adagc(learn_from="all"), "learn_from", "'clipped'", "'all'"),
    "a label's bound": (lambda: clip_by_group({"a": 1.0, "b": -2.0}), "'b'", "-2.0", "jnp.inf"),
    "no bounds": (lambda: clip_by_group({}), "at least one label", "{}"),
    "axis that is no axis": (lambda: scopes.unit("rows"), "axes", "'rows'", "int"),
    "axis in parts": (lambda: scopes.unit(1.5), "axes", "1.5", "int"),
}


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_5_nonsense_is_refused_at_construction(case):
    build, *parts = REFUSED_AT_ONCE[case]
    with pytest.raises(ValueError, match=shows(*parts)):
        build()


REFUSED_AT_A_TREE = {
    "label without a bound": (clip_by_group({"v": 1.0}), "'w'", "['v']", "None"),
    "labels of another tree": (
        optclip.clip_by_group_norm(1.0, {"w": "a", "v": "b"}),
        "labels=",
        "prefix",
    ),
    "axis": (optclip.adaptive_grad_clip(0.1, axis=2), "(2,)", "'w'", "(2, 2)"),
    "axis from the end": (optclip.adaptive_grad_clip(0.1, axis=-3), "(-3,)", "'w'", "(2, 2)"),
    "axis of a function": (
        optclip.clip_by(1.0, scope=scopes.unit(lambda path, shape: (0, 7))),
        "(0, 7)",
        "'w'",
        "(2, 2)",
    ),
}


@pytest.mark.parametrize("case", REFUSED_AT_A_TREE)
def test_5_nonsense_is_refused_at_the_first_tree(case):
    transform, *parts = REFUSED_AT_A_TREE[case]
    tree = {"w": MATRIX}
    with pytest.raises(ValueError, match=shows(*parts)):
        transform.update(tree, transform.init(tree), tree)


def test_5_a_traced_order_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=shows("plain number", 'static_args=("ord",)')):
        jax.jit(lambda order: optclip.clip_by_global_norm(1.0, ord=order).init(MATRIX))(2.0)


@each_method_with_a_threshold
def test_5_traced_nonsense_has_a_meaning(method):
    update, params = compiled_with_traced_arguments(method), {"w": MATRIX}
    gradient, state = {"w": 100 * MATRIX}, method.build().init(params)
    for number, meant in ((-1.0, 0.0), (-math.inf, 0.0), (math.nan, math.inf)):
        nonsense, sense = (dict.fromkeys(method.traced, x) for x in (number, meant))
        updates, after = update(nonsense, gradient, state, params)
        expected, right = update(sense, gradient, state, params)
        assert_same(updates, expected)
        assert_same(after, right)
        assert bool(jnp.any(updates["w"] != 0)) == (meant > 0)


@pytest.mark.parametrize("wrapper", [optclip.skip_spikes, optclip.safeguard])
def test_5_what_is_no_optimizer_is_refused(wrapper):
    with pytest.raises(ValueError, match=r"around an optimizer.*adamw\(1e-3\).*1.0"):
        wrapper(1.0)
    with pytest.raises(ValueError, match=r"function adam.*call adam\(\.\.\.\) first"):
        wrapper(optax.adam)


@pytest.mark.parametrize("rule", [optclip.robust_clip, optclip.zclip])
def test_5_a_max_norm_typed_for_a_rule_is_no_deviation(rule):
    """`robust_clip(1.0)` in place of `clip_by_global_norm(1.0)`."""
    with pytest.raises(TypeError, match="positional argument"):
        rule(1.0)


@pytest.mark.parametrize("method", [m for m in METHODS if m.takes("detail")], ids=str)
def test_5_norms_kept_of_other_leaves_are_refused(method):
    """They would be broadcast, and one leaf's norm would go on as another's."""
    transform, updates = detailed(method), gradient()
    state = transform.init(updates)
    fewer = jax.tree.map(jnp.ones_like, {"alone": jax.tree.leaves(updates)[0]})
    labels = [x for x in jax.tree.leaves(state.detail.norms) if x.shape == ()]
    if labels:  # one number under each label, however many leaves have it
        fewer = {}
    with pytest.raises((ValueError, KeyError), match=r"init\(params\)|label"):
        transform.update(fewer, state, fewer)
