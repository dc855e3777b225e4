"""`metrics`: the readings of every clip in an optimizer's state, as a flat dict of scalars."""

from collections.abc import Iterator
from typing import Any

import jax

from optclip.skipping import SafeguardState, SkipState
from optclip.state import ClipState

_CLIP = (
    "norm",
    "clipped_norm",
    "threshold",
    "factor",
    "clip_rate",
    "recent_clip_rate",
    "nonfinite_steps",
)
_SKIP = ("skipped_steps", "skipping", "norm", "threshold", "nonfinite_steps")


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
        `skip_spikes` adds `skip/skipped_steps`, `skip/skipping`, `skip/norm`, `skip/threshold` and
        `skip/nonfinite_steps`; `safeguard` gives `clip/...` for the clip before the optimizer,
        `bound/...` for the one after it, with `bound/update_ratio`, and `skip/...`. An empty dict
        where there is nothing to read.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.01))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> readings = optclip.metrics(state)
        >>> float(readings["clip/norm"]), float(readings["clip/clip_rate"])
        (5.0, 1.0)
    """
    found = list(_found(opt_state))
    result: dict[str, jax.Array] = {}
    for kind in ("clip", "bound", "skip"):
        readings = [values for of, values in found if of == kind]
        for place, values in enumerate(readings):
            prefix = kind if len(readings) == 1 else f"{kind}/{place}"
            result |= {f"{prefix}/{name}": _array(x) for name, x in values.items()}
    return result


def _found(state: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every set of readings with its kind, in the order of the chain."""
    kinds = (ClipState, SkipState, SafeguardState)
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, ClipState):
            yield "clip", _fields(node, _CLIP)
        elif isinstance(node, SkipState):
            yield "skip", _fields(node, _SKIP)
            yield from _found(node.inner_state)
        elif isinstance(node, SafeguardState):
            yield "clip", _fields(node.clip, _CLIP)
            yield from _found(node.inner_state)
            yield "bound", _fields(node.bound, _CLIP) | _fields(node, ("update_ratio",))
            yield "skip", _fields(node, ("skipped_steps", "skipping"))


def _fields(node: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(node, name) for name in names}


def _array(x: Any) -> jax.Array:
    """The array in a leaf; `nnx.Optimizer` wraps its leaves in variables."""
    return x.get_value() if hasattr(x, "get_value") else x
