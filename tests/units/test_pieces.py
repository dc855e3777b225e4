"""Factors from each leaf's own norm, and what must not change by that.

Where a threshold depends on nothing but its own group, the factor of a leaf or unit is computed by
itself, and the functions for it are traced once for all leaves that are alike.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import clip_by, limiters, norms, scopes, thresholds

GRADIENT = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0])}
BOUNDS = [1.0, 2.0]


@pytest.mark.parametrize(
    "rule",
    [
        lambda count: jnp.array(BOUNDS),
        thresholds.minimum(lambda count: jnp.array(BOUNDS), 5.0),
        thresholds.switch(3, lambda count: jnp.array(BOUNDS), 1.0),
    ],
    ids=["schedule", "minimum", "switch"],
)
def test_a_schedule_may_give_each_group_a_threshold_of_its_own(rule):
    """Also where leaves are as long as there are groups, and a vector would broadcast over them."""
    clip = clip_by(rule, scope=scopes.leaf)
    updates, _ = jax.jit(clip.update)(GRADIENT, clip.init(GRADIENT))
    found = [float(jnp.linalg.norm(updates[name])) for name in "ab"]
    np.testing.assert_allclose(found, BOUNDS, rtol=1e-6)


def test_a_limiter_of_ones_own_is_asked_and_asked_anew():
    half = limiters.rescale._replace(factor=lambda norm, threshold: jnp.full_like(norm, share[0]))
    clip, share = clip_by(1.0, scope=scopes.leaf, limiter=half), [0.5]
    for share[0] in (0.5, 0.25):
        updates, _ = clip.update(GRADIENT, clip.init(GRADIENT))
        np.testing.assert_allclose(updates["a"], np.array([3.0, 4.0]) * share[0], rtol=1e-6)


@dataclasses.dataclass
class Unhashable:
    """A function as people may write one."""

    share: float

    def __call__(self, norm, other):
        return self.share * jnp.ones_like(norm) if np.ndim(other) == 0 else norm


def test_functions_need_not_be_hashable():
    limiter = limiters.Limiter("mine", Unhashable(0.5))
    clip = clip_by(1.0, scope=scopes.leaf, limiter=limiter)
    updates, _ = clip.update(GRADIENT, clip.init(GRADIENT))
    np.testing.assert_allclose(updates["a"], [1.5, 2.0], rtol=1e-6)


def test_a_norm_of_ones_own_is_combined_and_finished_by_itself():
    double = norms.l2._replace(
        combine=lambda x, axis: 2 * jnp.sum(x, axis=axis),
        finish=lambda statistic, size: jnp.sqrt(statistic / size.astype(statistic.dtype)),
    )
    clip = clip_by(jnp.inf, norm=double)
    _, state = clip.update(GRADIENT, clip.init(GRADIENT))
    np.testing.assert_allclose(state.norm, np.sqrt(2 * 125 / 4), rtol=1e-6)


@pytest.mark.parametrize("later", [[5.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_spam_reads_a_number_where_entry_and_bound_are_0(later):
    clip = optclip.spam_clip(threshold=0.0, warmup_steps=1)
    state = clip.init(jnp.zeros(3))
    _, state = clip.update(jnp.ones(3), state)
    updates, state = clip.update(jnp.array(later), state)
    assert updates.tolist() == [0, 0, 0]
    assert float(state.clipped_norm) == 0
    assert float(state.factor) == (0 if any(later) else 1)


COMPUTATIONS = {"clip_by_leaf_norm": 52, "clip_by_block_rms": 52, "adaptive_grad_clip": 90}
"""How many different ones a step of SGD may have, on the CPU, with every jax that is supported."""


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_leaves_that_are_alike_share_what_is_compiled(name):
    """A computation of its own for every leaf would take XLA as long as all leaves together."""
    clip = {
        "clip_by_leaf_norm": optclip.clip_by_leaf_norm(1.0),
        "clip_by_block_rms": optclip.clip_by_block_rms(1.0),
        "adaptive_grad_clip": optclip.adaptive_grad_clip(0.01),
    }[name]
    few, many = different_computations(clip, 40), different_computations(clip, 50)
    assert many < few + 5  # Twenty leaves more.
    assert many <= COMPUTATIONS[name]


def different_computations(clip, layers):
    """Of a compiled step of SGD on that many matrices and vectors."""
    layer = {"kernel": jnp.zeros((16, 16)), "bias": jnp.zeros(16)}
    params = {f"layer_{place}": layer for place in range(layers)}
    optimizer = optax.chain(clip, optax.sgd(0.1))

    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step).lower(params, optimizer.init(params), params).compile()
    bodies = re.findall(r"^%?[\w.-]+ \(.*?\{\n(.*?)^\}", compiled.as_text(), re.M | re.S)
    return len(
        {re.sub(r", metadata=\{.*?\}|[\w-]+\.\d+", "", body).replace("%", "") for body in bodies}
    )
