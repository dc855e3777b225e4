"""Contract 12: what does not move is on neither side of a bound relative to the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.samples import quick_jit

import optclip
from optclip._zeros import always_zero

HEAD, BODY = np.full((3, 3), 0.5, np.float32), np.full((40, 40), 10, np.float32)
PARAMS = {"head": jnp.asarray(HEAD), "body": jnp.asarray(BODY)}
GRADIENT = {"head": jnp.full((3, 3), 0.5), "body": jnp.full((40, 40), 4.0)}
FROZEN = {"head": False, "body": True}
LABELS = {"head": "train", "body": "frozen"}


def partitioned(optimizer):
    return optax.partition({"train": optimizer, "frozen": optax.set_to_zero()}, LABELS)


FREEZING = {
    "partition": partitioned,
    "freeze": lambda optimizer: optax.chain(optimizer, optax.transforms.freeze(FROZEN)),
    "selective": lambda optimizer: optax.transforms.selective_transform(
        optimizer, freeze_mask=FROZEN
    ),
    "inside apply_if_finite": lambda optimizer: optax.apply_if_finite(partitioned(optimizer), 3),
    "inside a chain": lambda optimizer: optax.chain(partitioned(optimizer), optax.scale(0.5)),
    "inside inject_hyperparams": lambda optimizer: optax.inject_hyperparams(
        lambda scale: optax.chain(partitioned(optimizer), optax.scale(scale))
    )(scale=0.5),
}
OPTIMIZERS = {"sgd": optax.sgd(10.0), "adam": optax.adam(1.0), "lion": optax.lion(1.0)}


def first_step(optimizer, params=PARAMS, gradient=GRADIENT):
    update = quick_jit(optimizer.update)
    return update(gradient, optimizer.init(params), params)


def length(x):
    return np.linalg.norm(np.asarray(x, np.float64))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("freezing", FREEZING)
def test_what_moves_is_bound_by_what_moves(freezing, name):
    frozen, allowed = FREEZING[freezing](OPTIMIZERS[name]), 0.01 * length(HEAD)
    updates, _ = first_step(optax.chain(frozen, optclip.clip_by_param_norm(0.01)))
    np.testing.assert_allclose(length(updates["head"]), allowed, rtol=1e-5)
    np.testing.assert_array_equal(updates["body"], 0)
    updates, state = first_step(optclip.safeguard(frozen, ratio=0.01))
    np.testing.assert_allclose(optclip.metrics(state)["bound/threshold"], allowed, rtol=1e-5)
    np.testing.assert_array_equal(updates["body"], 0)
    # The first steps of Adam, and all of Lion's, go further than one gradient's share.
    least, most = {"sgd": (1, 1), "adam": (0.09, 0.1), "lion": (0.2, 0.5)}[name]
    assert least * (1 - 1e-5) <= length(updates["head"]) / allowed <= most * (1 + 1e-5)


def test_safeguard_measures_the_gradient_of_what_moves():
    _, state = first_step(optclip.safeguard(partitioned(optax.adam(1.0))))
    np.testing.assert_allclose(optclip.metrics(state)["clip/norm"], 1.5, rtol=1e-6)


def test_masked_leaves_count_on_neither_side():
    masked = optax.masked(optclip.clip_by_param_norm(0.01), {"head": True, "body": False})
    updates, _ = first_step(optax.chain(optax.sgd(10.0), masked))
    np.testing.assert_allclose(length(updates["head"]), 0.01 * length(HEAD), rtol=1e-5)
    np.testing.assert_allclose(updates["body"], -40)


def test_adapters_that_start_at_zero_move_by_the_floor():
    """LoRA: the product of two small matrices beside a frozen one, one of them zero at first."""
    params = {"base": jnp.full((64, 64), 3.0), "a": jnp.full((64, 2), 0.1), "b": jnp.zeros((2, 64))}
    gradient = {name: jnp.ones_like(x) for name, x in params.items()}
    gradient["a"] = jnp.zeros_like(params["a"])  # Since b is zero.
    labels = {"base": "frozen", "a": "train", "b": "train"}
    inner = optax.partition({"train": optax.sgd(1.0), "frozen": optax.set_to_zero()}, labels)
    updates, _ = first_step(optclip.safeguard(inner), params, gradient)
    np.testing.assert_allclose(length(updates["b"]), 0.03 * length(params["a"]) / 2**0.5, rtol=1e-5)
    # To a bound that sees updates only, what did not move in this step is frozen in it.
    bounded = optax.chain(inner, optclip.clip_by_param_norm(0.01))
    updates, _ = first_step(bounded, params, gradient)
    np.testing.assert_allclose(length(updates["b"]), 0.01 * 1e-3 * 128**0.5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, optax.linear_schedule(0.0, 1.0, 10)])
def test_a_rate_of_0_and_an_idle_expert_do_not_change_the_reference(rate):
    params = {"used": jnp.full(4, 1.0), "idle": jnp.full(4, 5.0)}
    gradient = {"used": jnp.ones(4), "idle": jnp.zeros(4)}
    optimizer = optclip.safeguard(optax.sgd(rate))
    state = optimizer.init(params)
    assert state.frozen == {}
    _, state = optimizer.update(gradient, state, params)
    bound = optclip.metrics(state)["bound/threshold"]
    np.testing.assert_allclose(bound, 0.03 * 2 * (104 / 8) ** 0.5, rtol=1e-5)


def test_groups_of_labels_count_what_moves_too():
    params = PARAMS | {"other": jnp.full((3, 3), 2.0)}
    gradient = GRADIENT | {"other": jnp.ones((3, 3))}
    inner = optax.chain(
        optax.sgd(10.0), optax.transforms.freeze({"head": False, "body": True, "other": False})
    )
    scope = optclip.scopes.group(lambda path: "other" if path == "other" else "network")
    optimizer = optax.chain(inner, optclip.clip_by_param_norm(0.01, scope=scope))
    updates, _ = first_step(optimizer, params, gradient)
    for name in ("head", "other"):
        np.testing.assert_allclose(length(updates[name]), 0.01 * length(params[name]), rtol=1e-5)


@pytest.mark.parametrize("kind", [jnp.int8, jnp.int32, bool])
@pytest.mark.parametrize(
    "inner", [optax.sgd(1.0), optax.adam(1.0), optax.adamw(1.0), optax.sgd(1.0, momentum=0.9)]
)
def test_integers_count_on_neither_side(inner, kind):
    """Quantized weights beside float ones: an optimizer may hand on floats for them."""
    params = {"w": jnp.ones(3), "q": jnp.ones(300, kind)}
    gradient = {"w": jnp.ones(3), "q": jnp.zeros(300, jnp.int8)}
    alone, _ = inner.update(gradient, inner.init(params), params)
    bounded = optax.chain(inner, optclip.clip_by_param_norm(0.01))
    for optimizer in (bounded, optclip.safeguard(inner, ratio=0.01)):
        updates, state = first_step(optimizer, params, gradient)
        bound = optclip.metrics(state)[
            "bound/threshold" if optimizer is not bounded else "clip/threshold"
        ]
        np.testing.assert_allclose(bound, 0.01 * 3**0.5, rtol=1e-5)
        assert length(updates["w"]) <= 0.01 * 3**0.5 * (1 + 1e-5)
        np.testing.assert_allclose(updates["q"], alone["q"], rtol=1e-6)


def test_an_optimizer_that_asks_for_the_loss_moves_everything():
    optimizer = optclip.safeguard(optax.polyak_sgd())
    state = optimizer.init(PARAMS)
    assert state.frozen == {}
    optimizer.update(GRADIENT, state, PARAMS, value=jnp.float32(1.0))


def test_zeros_are_seen_through_what_optimizers_are_made_of():
    def results(x, wanted):
        zeros = jnp.zeros_like(x)
        return {
            "zeros": zeros,
            "scaled": jax.jit(lambda z: -0.1 * z.astype(jnp.bfloat16))(zeros),
            "divided": zeros / (1 + x),
            "chosen": jnp.where(wanted, zeros, -zeros),
            "branch": jax.lax.cond(wanted, lambda: x * zeros, lambda: zeros),
            "x": x,
            "rate": 0.0 * x,
            "sum": zeros + x,
            "one branch": jax.lax.cond(wanted, lambda: x, lambda: zeros),
            "after": x / (1 + zeros),
        }

    names = sorted(results(jnp.ones(3), True))
    found = dict(zip(names, always_zero(results, jnp.ones(3), jnp.bool_(True)), strict=True))
    assert {name for name, zero in found.items() if zero} == {
        "zeros", "scaled", "divided", "chosen", "branch"
    }  # fmt: skip
