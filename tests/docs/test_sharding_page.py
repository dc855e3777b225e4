"""The shard_map recipe of docs/sharding.md, made a whole script, gives a single device's result.

And what it warns of: JAX sums the gradients of what is whole on every device by itself.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

PAGE = pathlib.Path(__file__).parents[2] / "docs/sharding.md"
SPECS = {"w": P("fsdp", "tensor"), "v": P("tensor"), "b": P()}
THRESHOLD = 0.5


def values():
    random = np.random.default_rng(0)
    shapes = {"w": (8, 8), "v": (8, 4), "b": (4,)}
    params = {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}
    return params, jnp.asarray(random.normal(size=(16, 8)), jnp.float32)


def loss_on_one_device(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["w"]) @ params["v"] + params["b"]) ** 2)


def loss(params, batch):
    """The same of one device's share: `w` gathered over fsdp, products summed over tensor."""
    w = lax.all_gather(params["w"], "fsdp", axis=0, tiled=True)
    hidden = jnp.tanh(batch @ w)
    out = lax.psum(hidden @ params["v"], "tensor") + params["b"]
    return jnp.mean(out**2)


@pytest.fixture(scope="module")
def page():
    """The names that the recipe's code leaves behind."""
    code = re.search(r"<!-- recipe -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    params, _ = values()
    names = {"specs": SPECS, "params": params, "loss": loss}
    names |= {"functools": functools, "jax": jax, "optax": optax, "optclip": optclip, "P": P}
    exec(compile(code, PAGE, "exec"), names)
    return names


def test_the_recipe_gives_the_result_of_one_device(page):
    params, batch = values()
    mesh = page["mesh"]
    place = lambda tree, specs: jax.tree.map(  # noqa: E731
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    state = optax.chain(optclip.clip_by_global_norm(THRESHOLD), optax.sgd(0.1)).init(params)
    placed = place(params, SPECS), place(batch, P(("data", "fsdp")))
    after, opt_state = page["train_step"](placed[0], state, placed[1])

    gradient = jax.grad(loss_on_one_device)(params, batch)
    clip = optclip.clip_by_global_norm(THRESHOLD)
    clipped, expected = clip.update(gradient, clip.init(params))
    assert float(expected.norm) > THRESHOLD
    np.testing.assert_allclose(optclip.metrics(opt_state)["clip/norm"], expected.norm, rtol=1e-5)
    for name in params:
        moved = params[name] - 0.1 * clipped[name]
        np.testing.assert_allclose(after[name], moved, rtol=1e-5, atol=1e-6)


def test_a_mean_of_the_gradients_comes_too_late_where_jax_tracks():
    """What the page warns of."""
    params, batch = values()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    norms = []
    for averaged_loss, check in ((True, True), (False, True), (False, False)):

        def step(params, batch, averaged_loss=averaged_loss):
            if averaged_loss:
                of = lambda p, b: lax.pmean(loss_on_one_device(p, b), "data")  # noqa: E731
                return jax.grad(of)(params, batch)
            return lax.pmean(jax.grad(loss_on_one_device)(params, batch), "data")

        gradient = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check
        )(params, batch)
        norms.append(float(optax.tree.norm(gradient)))
    right = float(optax.tree.norm(jax.grad(loss_on_one_device)(params, batch)))
    np.testing.assert_allclose(norms, [right, 4 * right, right], rtol=1e-5)
