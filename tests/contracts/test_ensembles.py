"""Contract 8, of ensembles: under `vmap`, `scan` and `pmap` a member is what it is alone.

Each member has parameters, gradients and a state of its own. That the numbers of a method may
differ too is in `test_state.py`. Around every method is an optimizer with a memory of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.jax_utils import replicate
from helpers.checkpoints import with_flax, with_orbax
from helpers.samples import (
    ALL_METHODS,
    assert_close,
    assert_same,
    canceled,
    detailed,
    gradient,
    once_a_method,
    quick_jit,
    sample_parameters,
    stacked,
    unstacked,
)

import optclip

pytestmark = pytest.mark.usefixtures("strict")

each_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)

MEMBERS, STEPS, BROKEN = 3, 5, 1
"""Members, steps, and the member that a NaN comes to."""

CANCELED = 2.0**-23
"""What the rounding of a gradient of about 1 leaves in a momentum in which it cancels."""


def pair(tree):
    """A bfloat16 and a float32 leaf, in two groups by first letter."""
    return {"a": tree["attention"]["kernel"], "b": tree["attention"]["query"]}


def gradients_at(step):
    """A gradient for each member: one far below every threshold, one above, one about there."""
    scales = (1e-3, 1.0 + step, 0.1)
    seeds = range(10 * step, 10 * step + MEMBERS)
    return stacked([pair(gradient("mixed", *of)) for of in zip(seeds, scales, strict=True)])


PARAMS = stacked([pair(sample_parameters("mixed")), *(pair(gradient("mixed", n)) for n in (7, 8))])
GRADIENTS = [gradients_at(step) for step in range(STEPS)]


class Programs(NamedTuple):
    """An optimizer with the method in it.

    Attributes:
        init: Of one member.
        one: (gradient, state, params) -> (updates, state, readings) of one member.
        alone: The same, jitted.
        together: The same of all members, jitted.
    """

    init: Any
    one: Any
    alone: Any
    together: Any


@once_a_method
def programs_of(method):
    momentum = optax.sgd(0.1, momentum=0.9)
    optimizer = (
        method.build(inner=optax.chain(method.arguments["inner"], momentum))
        if "inner" in method.arguments
        else optax.chain(detailed(method), momentum)
    )

    def one(updates, state, params):
        updates, state = optimizer.update(updates, state, params)
        return updates, state, optclip.metrics(state, params)

    return Programs(optimizer.init, one, quick_jit(one), quick_jit(jax.vmap(one)))


def run(program, state, gradients=GRADIENTS, params=PARAMS):
    """The state at the end, and updates, state and readings of each step."""
    steps = []
    for updates in gradients:
        updates, state, readings = program(updates, state, params)
        steps.append((updates, state, readings))
    return state, steps


def with_nan(gradients):
    """Gradients of which the third has a NaN in the member BROKEN."""
    broken = dict(gradients[2], b=gradients[2]["b"].at[BROKEN, 0, 0, 0].set(jnp.nan))
    return [*gradients[:2], broken, *gradients[3:]]


@each_method
def test_a_member_is_what_it_is_alone(method):
    programs = programs_of(method)
    fresh = jax.vmap(programs.init)(PARAMS)
    assert_same(fresh, stacked([programs.init(unstacked(PARAMS, n)) for n in range(MEMBERS)]))
    gradients = with_nan(GRADIENTS)
    _, together = run(programs.together, fresh, gradients)
    for n in range(MEMBERS):
        given = [unstacked(updates, n) for updates in gradients]
        member = unstacked(PARAMS, n)
        _, alone = run(programs.alone, programs.init(member), given, member)
        own = unstacked(stacked(together), (slice(None), n))
        assert_close(own, stacked(alone), atol=canceled(method))
    assert programs.together._cache_size() == 1


@each_method
def test_a_nan_of_one_member_changes_no_other(method):
    programs = programs_of(method)
    fresh = jax.vmap(programs.init)(PARAMS)
    _, whole = run(programs.together, fresh)
    _, broken = run(programs.together, fresh, with_nan(GRADIENTS))
    for n in {*range(MEMBERS)} - {BROKEN}:
        assert_same(
            unstacked(stacked(broken), (slice(None), n)),
            unstacked(stacked(whole), (slice(None), n)),
        )
    read = broken[-1][2]  # Of `safeguard` the bound is not asked in such a step.
    kind = "clip" if "clip/norm" in read else "skip"
    assert read[f"{kind}/nonfinite_steps"].tolist() == [0, 1, 0]


@each_method
def test_a_scan_over_the_steps_of_all_members_is_the_loop(method):
    programs = programs_of(method)
    fresh = jax.vmap(programs.init)(PARAMS)

    @quick_jit
    def scanned(state, gradients):
        def step(state, updates):
            updates, state, readings = jax.vmap(programs.one)(updates, state, PARAMS)
            return state, (updates, state, readings)

        return jax.lax.scan(step, state, gradients)

    state, history = scanned(fresh, stacked(GRADIENTS))
    last, steps = run(programs.together, fresh)
    assert_close((state, history), (last, stacked(steps)), atol=CANCELED)
    assert all(x.shape[:2] == (STEPS, MEMBERS) for x in jax.tree.leaves(history))
    # Of the states that a scan stacks, the readings are those that were taken within it.
    assert_same(optclip.metrics(history[1], PARAMS), history[2])


@each_method
def test_replicas_read_with_the_axis_of_devices_in_front(method):
    programs, params = programs_of(method), unstacked(PARAMS, BROKEN)
    gradients = [unstacked(updates, BROKEN) for updates in GRADIENTS[:2]]
    _, steps = run(programs.alone, programs.init(params), gradients, params)
    replicas, readings = replicate(programs.init(params)), {}
    step = quick_jit(jax.pmap(programs.one))
    for updates in gradients:
        _, replicas, readings = step(replicate(updates), replicas, replicate(params))
    right = jax.tree.map(in_front, steps[-1][1:])
    assert_close((replicas, readings), right, atol=canceled(method))
    assert_same(optclip.metrics(replicas, replicate(params)), readings)


def in_front(x):
    return jnp.stack([x] * jax.device_count())


@each_method
def test_a_restored_ensemble_goes_on_bit_for_bit(method, tmp_path):
    programs = programs_of(method)
    init = jax.vmap(programs.init)

    def rest(state):
        # What was restored lies on a device by decision: let all do, for one program.
        return run(programs.together, jax.device_put(state, jax.devices()[0]), GRADIENTS[2:])

    halfway, _ = run(programs.together, init(PARAMS), GRADIENTS[:2])
    for save_and_restore in (with_orbax, with_flax):
        restored = save_and_restore(halfway, init(PARAMS), tmp_path)
        assert_same(restored, halfway)
        assert_same(rest(restored), rest(halfway))
