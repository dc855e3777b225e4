"""`metrics`: the readings of every clip in an optimizer's state, as a flat dict of scalars."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip._numerics import is_floating
from optclip._paths import array_in, leaves_with_paths
from optclip.methods.safeguard import SafeguardState
from optclip.methods.skip_spikes import SkipState
from optclip.state import ClipState, LeafDetail

_CLIP = (
    "norm",
    "clipped_norm",
    "threshold",
    "factor",
    "clip_rate",
    "recent_clip_rate",
    "steps",
    "nonfinite_steps",
    "given_steps",
    "detail",
)
_SKIP = ("skipped_steps", "skipping", "norm", "threshold", "nonfinite_steps")


def metrics(opt_state: Any, params: Any = None) -> dict[str, jax.Array]:
    """The readings of every clip in an optimizer's state.

    It only looks them up: no norm is computed again. With `params` it cuts a vector into one number
    for each leaf, which a step with thousands of leaves may want to do only now and then.

    Args:
        opt_state: Any nest of states with a `ClipState` in it: a chain's, an optimizer's inside
            `optax.MultiSteps` or `optax.inject_hyperparams`, the `opt_state` of a linen
            `TrainState` or an `nnx.Optimizer`.
        params: What names the readings of single leaves, where `detail=True` keeps them: a tree
            with the leaves that the clip sees (the parameters, a part of them inside
            `optax.masked`), or a list with a name for every unit. Groups that have labels have
            their names from those. Default: they are left out.

    Returns:
        For one clip `clip/norm` (before clipping), `clip/clipped_norm` (after), `clip/threshold`,
        `clip/factor`, `clip/clip_rate`, `clip/recent_clip_rate`, `clip/steps`,
        `clip/nonfinite_steps` and `clip/given_steps`, as `ClipState` defines them. For several,
        `clip/0/norm` and so on, in the order of the chain.
        `skip_spikes` adds `skip/skipped_steps`, `skip/skipping`, `skip/norm`, `skip/threshold` and
        `skip/nonfinite_steps`; `safeguard` gives `clip/...` for the clip before the optimizer,
        `bound/...` for the bound on each gradient's share, with `bound/update_ratio`, and
        `skip/...`. An empty dict where there is nothing to read.

        With `params` also `clip/norms/dense/kernel`, `clip/clipped_norms/dense/kernel` and so on,
        by path, label, or label and number of a layer (`clip/norms/layers/3`); by number,
        `clip/norms/0`, where the groups are units that no list of names was given for, or where the
        names are not as many as they. `clip/growth/dense/kernel`: how many times its usual norm
        that leaf was at the last spike (a step of more than 3 times the usual norm), 0 before the
        first; see `grew_most`. The readings of stacked states (of a vmapped ensemble, a scan's
        history, replicated for pmap) are stacked alike.

        `nonfinite_steps` counts what a wrapper saw and kept from the clip inside it too:
        `skip_spikes`, `safeguard` and `optax.apply_if_finite` leave the state of what they hold as
        it was in such a step.

    Raises:
        ValueError: If it is a tree of arrays without any state in it.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_global_norm(1.0, detail=True), optax.sgd(0.01))
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
        >>> _, state = optimizer.update(grads, optimizer.init(params))
        >>> readings = optclip.metrics(state, params)
        >>> float(readings["clip/norm"]), float(readings["clip/clip_rate"])
        (5.0, 1.0)
        >>> float(readings["clip/norms/w"]), float(readings["clip/norms/b"])
        (3.0, 4.0)
    """
    found = list(_found(opt_state))
    if not found:
        _check_state(opt_state)
    result: dict[str, jax.Array] = {}
    for kind in ("clip", "bound", "skip"):
        readings = [values for of, values in found if of == kind]
        for place, values in enumerate(readings):
            prefix = kind if len(readings) == 1 else f"{kind}/{place}"
            detail = values.pop("detail", ())
            result |= {f"{prefix}/{name}": array_in(x) for name, x in values.items()}
            if params is not None and detail:
                result |= {f"{prefix}/{name}": x for name, x in _named(detail, params)}
    return result


def _check_state(opt_state: Any) -> None:
    """Refuses what is no optimizer's state: parameters, or what a checkpoint made of a state."""
    nodes: list[Any] = []
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: bool(nodes.append(node)))
    if leaves and not any(hasattr(node, "_fields") for node in nodes):
        raise ValueError(
            "metrics reads the state of an optimizer, and this is none: it holds no NamedTuple, "
            f"but {type(opt_state).__name__} of arrays. Pass what optimizer.init(params) or the "
            "last update(...) returned; a state that came back from a checkpoint as dicts and "
            "lists must be restored into a fresh one (for Orbax its abstract target, for flax "
            "from_state_dict(optimizer.init(params), restored))"
        )


def grew_most(opt_state: Any, params: Any = None, k: int = 5) -> dict[str, float]:
    """The leaves that grew most at the last spike, with how many times their usual norm they were.

    A spike is a step whose whole norm was more than 3 times its average over about 128 steps, which
    the first steps only begin to know. For a clip with `detail=True`, outside of jit.

    Args:
        opt_state: As in `metrics`; of an ensemble or of replicas that of one member.
        params: As in `metrics`; None where groups have labels.
        k: How many leaves.

    Returns:
        From name to growth, the largest first, for at most `k` leaves (or labels, layers, units);
        empty before the first spike. The largest number stands for a leaf whose gradient had been
        zero. Of several clips with details, the first.

    Raises:
        ValueError: If no clip in the state has details, or several members are stacked in it.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.clip_by_global_norm(1.0, detail=True)
        >>> grads = {"body": jnp.ones(4), "head": jnp.ones(4)}
        >>> _, state = clip.update(grads, clip.init(grads))
        >>> _, state = clip.update({"body": 2 * jnp.ones(4), "head": 50 * jnp.ones(4)}, state)
        >>> optclip.grew_most(state, grads)
        {'head': 50.0, 'body': 2.0}
    """
    details = [x["detail"] for kind, x in _found(opt_state) if kind == "clip" and x.get("detail")]
    if not details:
        raise ValueError(
            "no clip in this state keeps the norms of single leaves; make one with detail=True, as "
            "optclip.clip_by_global_norm(1.0, detail=True)"
        )
    detail = details[0]
    if jnp.ndim(array_in(detail.growth.usual_norm)):
        raise ValueError(
            "this state holds several members (of an ensemble, or replicas): pass that of one, as "
            "jax.tree.map(lambda x: x[0], opt_state)"
        )
    growth = dict(_of_groups(detail, detail.growth.at_spike, params))
    found = [(name, float(x)) for name, x in growth.items() if float(x) > 0]
    return dict(sorted(found, key=lambda each: -each[1])[:k])


def _named(detail: Any, params: Any) -> Iterator[tuple[str, jax.Array]]:
    """The readings of single groups by name; by number, where the names are not theirs."""
    readings = {
        "norms": detail.norms,
        "clipped_norms": detail.clipped_norms,
        "growth": detail.growth.at_spike,
    }
    for what, values in readings.items():
        for name, x in _of_groups(detail, values, params):
            yield f"{what}/{name}", x


def _of_groups(detail: Any, values: Any, params: Any) -> Iterator[tuple[str, jax.Array]]:
    """Each group's number under its name."""
    # Before the groups there may be members of an ensemble, steps, or devices.
    before = jnp.ndim(array_in(detail.growth.usual_norm))
    if isinstance(values, dict):
        for label, x in values.items():
            own = array_in(x)
            if jnp.ndim(own) == before:
                yield label, own
            else:
                yield from ((f"{label}/{place}", own[..., place]) for place in range(own.shape[-1]))
        return
    given = isinstance(params, list | tuple) and all(isinstance(name, str) for name in params)
    names = list(params) if given else _paths(params) if isinstance(detail, LeafDetail) else []
    vector = array_in(values)
    numbers = [vector[..., place] for place in range(jnp.shape(vector)[-1])]
    fitting = names if len(names) == len(numbers) else range(len(numbers))
    yield from ((str(name), x) for name, x in zip(fitting, numbers, strict=True))


def _paths(params: Any) -> list[str]:
    """Of the leaves that a clip by leaf measures."""
    leaves = leaves_with_paths(params)
    return [path for path, x in leaves if is_floating(x) and math.prod(jnp.shape(x))]


def _found(state: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every set of readings with its kind, in the order of the chain."""
    kinds = (ClipState, SkipState, SafeguardState, optax.ApplyIfFiniteState)
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, ClipState):
            yield "clip", _fields(node, _CLIP)
        elif isinstance(node, SkipState):
            yield "skip", _fields(node, _SKIP)
            yield from _counted(node.inner_state, node.nonfinite_steps)
        elif isinstance(node, optax.ApplyIfFiniteState):
            yield from _counted(node.inner_state, node.total_notfinite)
        elif isinstance(node, SafeguardState):
            yield "clip", _fields(node.clip, _CLIP)
            yield from _counted(node.inner_state, node.clip.nonfinite_steps)
            yield "bound", _fields(node.bound, _CLIP) | _fields(node, ("update_ratio",))
            yield "skip", _fields(node, ("skipped_steps", "skipping"))


def _counted(state: Any, nonfinite_steps: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The readings inside a wrapper that drops the state of a non-finite step, with its count."""
    for kind, values in _found(state):
        own = array_in(values["nonfinite_steps"]) if "nonfinite_steps" in values else None
        if own is not None:
            values["nonfinite_steps"] = jnp.maximum(own, array_in(nonfinite_steps))
        yield kind, values


def _fields(node: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(node, name) for name in names}
