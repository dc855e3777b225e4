"""`metrics`: the readings of every clip in an optimizer's state, as a flat dict of scalars."""

from typing import Any

import jax

from optclip.state import ClipState

_READINGS = (
    "norm",
    "clipped_norm",
    "threshold",
    "factor",
    "clip_rate",
    "recent_clip_rate",
    "nonfinite_steps",
)


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """The readings of every clip in an optimizer's state.

    It only looks them up: nothing is computed, so it costs nothing inside a jitted step.

    Args:
        opt_state: Any nest of states with `ClipState`s in it: a chain's, an optimizer's inside
            `optax.MultiSteps` or `optax.inject_hyperparams`, the `opt_state` of a linen
            `TrainState` or an `nnx.Optimizer`.

    Returns:
        For one clip `clip/norm` (before clipping), `clip/clipped_norm` (after), `clip/threshold`,
        `clip/factor`, `clip/clip_rate`, `clip/recent_clip_rate` and `clip/nonfinite_steps`, as
        `ClipState` defines them. For several, `clip/0/norm` and so on, in the order of the chain.
        An empty dict where there is none.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.01))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> readings = optclip.metrics(state)
        >>> float(readings["clip/norm"]), float(readings["clip/clip_rate"])
        (5.0, 1.0)
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ClipState))
    clips = [node for node in nodes if isinstance(node, ClipState)]
    prefixes = ["clip"] if len(clips) == 1 else [f"clip/{place}" for place in range(len(clips))]
    return {
        f"{prefix}/{name}": _array(getattr(clip, name))
        for prefix, clip in zip(prefixes, clips, strict=True)
        for name in _READINGS
    }


def _array(x: Any) -> jax.Array:
    """The array in a leaf; `nnx.Optimizer` wraps its leaves in variables."""
    return x if not hasattr(x, "get_value") else x.get_value()
