"""Contract 8: an optimizer's state survives a checkpoint, and a resumed run is the same run."""

import jax
import optax
import pytest
from helpers.checkpoints import with_flax, with_orbax
from helpers.samples import (
    ALL_METHODS,
    assert_same,
    detailed,
    gradient,
    quick_jit,
    sample_parameters,
)


@pytest.mark.parametrize("method", ALL_METHODS, ids=str)
def test_a_resumed_run_is_the_same_run_bit_for_bit(method, tmp_path):
    # A non-finite step must not reach the parameters: all NaN, two runs would look alike.
    optimizer = optax.apply_if_finite(
        optax.chain(detailed(method), optax.sgd(0.1, momentum=0.9)), max_consecutive_errors=3
    )

    @quick_jit
    def step(gradient, params, state):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def run(steps, params, state):
        # What was restored lies on a device by decision: let all that comes in, for one program.
        params, state = jax.device_put((params, state), jax.devices()[0])
        for count in steps:
            scale = float("nan") if count == 5 else 1 + count % 3
            params, state = step(gradient("mixed", count, scale), params, state)
        return params, state

    def fresh():
        return sample_parameters("mixed"), optimizer.init(sample_parameters("mixed"))

    whole, halfway = run(range(20), *fresh()), run(range(10), *fresh())
    for save_and_restore in (with_orbax, with_flax):
        restored = save_and_restore(halfway, fresh(), tmp_path)
        assert_same(restored, halfway)
        assert_same(run(range(10, 20), *restored), whole)
