"""Who is timed: every method of optclip, and what it is measured against.

sgd: `optax.sgd(0.01)` alone, the step without a clip.
floor: the least that a clip by the global norm can be. Float32 squares of the gradient are summed,
    and the factor is multiplied into the update, which fuses with SGD: two reads of the gradient,
    one read and one write of the parameters. An `optimization_barrier` lies between the gradient
    and the sum, since XLA would otherwise write a float32 copy of a bfloat16 gradient for both
    passes. It is no usable clip: it keeps no state, and overflows at entries of 1e19.
optax.*: Optax's method of the same meaning.

Methods come from `optclip.catalogue`, with their defaults: what people run. Where there is no
default, `ARGUMENTS` has a value at which the random gradient (entries of about 0.01) is clipped; a
method without either is not timed. Wrappers hold the optimizer; bounds on the update stand behind
it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import optclip
from benchmarks.speed.trees import hint
from optclip import catalogue

Optimizer = optax.GradientTransformation

SGD, FLOOR, GLOBAL = "sgd", "floor", "clip_by_global_norm"

ARGUMENTS: dict[str, dict[str, Any]] = {
    "adaptive_grad_clip": {"clipping": 0.01},
    "clip_by_block_rms": {"threshold": 0.005},
    "clip_by_global_norm": {"max_norm": 1.0},
    "clip_by_group_norm": {"max_norm": 1.0, "labels": lambda path: path[-1]},
    "clip_by_leaf_norm": {"max_norm": 0.1},
    "clip_by_param_norm": {"ratio": 0.0001},
    "clip_by_value": {"max_delta": 0.01},
    "clip_singular_values": {"max_value": 0.1},
    "normalize_by_norm": {"target": 1.0},
    "smooth_clip": {"max_norm": 1.0},
}
"""Arguments that have no default. Leaves whose names end alike are a group: at most ten."""

COUNTERPARTS = {
    "adaptive_grad_clip": "optax.adaptive_grad_clip",
    "clip_by_block_rms": "optax.clip_by_block_rms",
    "clip_by_global_norm": "optax.clip_by_global_norm",
    "clip_by_value": "optax.clip",
}
"""Optax's method of the same meaning."""

QUICK = (
    "adaptive_grad_clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "robust_clip",
    "safeguard",
    "skip_spikes",
)


class Contender(NamedTuple):
    """One step to time.

    Attributes:
        name: What tables call it.
        around: From an optimizer to the same with the clip.
        counterpart: Optax's method of the same meaning, if there is one.
    """

    name: str
    around: Callable[[Optimizer], Optimizer]
    counterpart: str | None = None


def floor(max_norm: float) -> Optimizer:
    """The least that a clip by the global norm can be."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves = [lax.optimization_barrier(x) for x in jax.tree.leaves(updates)]
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves]
        factor = max_norm / jnp.maximum(jnp.sqrt(jnp.sum(jnp.stack(squares))), max_norm)
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def methods() -> list[Contender]:
    """All methods of optclip whose arguments are known."""
    return [_of_method(method) for method in catalogue.methods() if _is_known(method)]


def references() -> list[Contender]:
    """What methods are measured against."""
    value = ARGUMENTS["clip_by_value"]["max_delta"]
    return [
        Contender(SGD, lambda optimizer: optimizer),
        Contender(FLOOR, _before(floor(1.0))),
        Contender("optax.clip", _before(optax.clip(value))),
        *(
            Contender(f"optax.{name}", _before(getattr(optax, name)(*ARGUMENTS[name].values())))
            for name in ("adaptive_grad_clip", "clip_by_block_rms", "clip_by_global_norm")
        ),
    ]


def known() -> dict[str, Contender]:
    """All contenders by name, what they are measured against first."""
    return {contender.name: contender for contender in references() + methods()}


def chosen(names: list[str] | None) -> list[Contender]:
    """The contenders of these names (None: all), with those that they are measured against.

    Raises:
        ValueError: If there is no contender of a name.
    """
    everyone = known()
    untimed = {x.name: ", ".join(x.needs) for x in catalogue.methods() if not _is_known(x)}
    if names is None:
        return list(everyone.values())
    wanted = {SGD, FLOOR, GLOBAL}
    for name in names:
        name = name.strip().removeprefix("optclip.")
        if name in untimed:
            raise ValueError(f"{name} needs {untimed[name]}: add it to ARGUMENTS in {__name__}")
        if name not in everyone:
            raise ValueError(f"there is no method {name!r}; {hint(name, everyone)}")
        wanted |= {name, everyone[name].counterpart or name}
    wanted.add(COUNTERPARTS[GLOBAL])
    return [contender for name, contender in everyone.items() if name in wanted]


def _is_known(method: catalogue.Method) -> bool:
    return set(method.needs) <= ARGUMENTS.get(method.name, {}).keys()


def _of_method(method: catalogue.Method) -> Contender:
    name, function = method.name, getattr(optclip, method.name)
    arguments = ARGUMENTS.get(name, {})
    if method.needs_adam:  # SGD, around which the others are timed, has none.
        return Contender(name, lambda _: function(optax.adamw(1e-3), **arguments))
    if method.wraps:
        return Contender(name, lambda optimizer: function(optimizer, **arguments))
    place = _after if method.follows else _before
    return Contender(name, place(function(**arguments)), COUNTERPARTS.get(name))


def _before(clip: Optimizer) -> Callable[[Optimizer], Optimizer]:
    return lambda optimizer: optax.chain(clip, optimizer)


def _after(clip: Optimizer) -> Callable[[Optimizer], Optimizer]:
    return lambda optimizer: optax.chain(optimizer, clip)
