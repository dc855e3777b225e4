"""Two adaptive clips as public trainers describe theirs; written from the descriptions alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class History(NamedTuple):
    """The norms of the last steps."""

    norms: jax.Array
    count: jax.Array


def clip_by_history(deviations: float = 3.0, window: int = 128) -> optax.GradientTransformation:
    """Clips to the mean and so many deviations of the last norms, as they came."""

    def init(params: optax.Params) -> History:
        del params
        return History(jnp.zeros(window), jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: History, params: optax.Params | None = None
    ) -> tuple[optax.Updates, History]:
        del params
        norm = optax.tree.norm(updates)
        limit = jnp.mean(state.norms) + deviations * jnp.std(state.norms)
        over = (state.count >= window) & (norm > limit)
        factor = jnp.where(over, limit / norm, 1.0)
        norms = state.norms.at[state.count % window].set(norm)
        return jax.tree.map(lambda x: x * factor, updates), History(norms, state.count + 1)

    return optax.GradientTransformation(init, update)


def drop_by_average(multiplier: float = 20.0, decay: float = 0.99) -> optax.GradientTransformation:
    """Zeros in place of a gradient many times the average, of which such a one is no part."""

    def init(params: optax.Params) -> jax.Array:
        del params
        return jnp.ones([])

    def update(
        updates: optax.Updates, average: jax.Array, params: optax.Params | None = None
    ) -> tuple[optax.Updates, jax.Array]:
        del params
        norm = optax.tree.norm(updates)
        valid = norm <= multiplier * average
        moved = jnp.where(valid, decay * average + (1 - decay) * norm, average)
        return jax.tree.map(lambda x: jnp.where(valid, x, 0), updates), moved

    return optax.GradientTransformation(init, update)
