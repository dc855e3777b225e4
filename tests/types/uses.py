"""What people write, which pyright must let pass. Nothing here is run."""

import jax
import jax.numpy as jnp
import optax

import optclip
from optclip import limiters, norms, scopes, thresholds


def thresholds_of_every_kind(traced: jax.Array) -> None:
    optclip.clip_by_global_norm(1)
    optclip.clip_by_global_norm(1.0)
    optclip.clip_by_global_norm(jnp.inf)
    optclip.clip_by_global_norm(traced)
    optclip.clip_by_global_norm(optax.linear_schedule(1.0, 0.1, 100))
    optclip.clip_by_global_norm(lambda count: 1.0 / (1 + count))
    optclip.clip_by_global_norm(1.0, ord=1, axis_name=("data", "model"), sharded={"w": ("data",)})
    optclip.clip_by_group_norm({"a": 1.0, "b": traced}, labels=lambda path: path[:1])
    optclip.clip_by(thresholds.switch(100, 1.0, thresholds.quantile_over_window(10.0, 100)))
    optclip.clip_by(1.0, scope=scopes.unit((0,)), norm=norms.lp(3), limiter=limiters.smooth)


def in_optimizers(params: optax.Params, loss: jax.Array) -> None:
    optimizer = optax.chain(optclip.robust_clip(), optax.adamw(1e-3))
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    optclip.metrics(state)["clip/norm"].item()
    guarded = optclip.skip_spikes(optclip.safeguard(optimizer))
    updates, _ = guarded.update(updates, guarded.init(params), params, loss=loss)
    optax.apply_updates(params, updates)
    tuned = optax.inject_hyperparams(optclip.clip_by_global_norm)(max_norm=1.0)
    optax.multi_transform({"all": tuned}, "all")
    optax.MultiSteps(optimizer, 4)
