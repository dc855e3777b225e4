"""What this library needs of JAX beyond its public names, and what differs between its versions.

No other file of the library reads an internal of JAX. Each function says for which versions it is
as it is; `.ci/run` tests the oldest that `pyproject.toml` allows and the newest there is.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.core
from jax import export, lax
from jax.sharding import AxisType

State = TypeVar("State")


def exportable(kind: type[State]) -> type[State]:
    """Registers a NamedTuple, so that a program that takes or returns one can be exported."""
    # A module that is loaded twice finds its names taken.
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(kind, serialized_name=f"optclip.{kind.__name__}")
    return kind


def is_traced(x: Any) -> bool:
    """Whether a value is not known yet, since a program is being traced.

    jax 0.10 to 0.12: `jax.core.Tracer` has no other public name.
    """
    return isinstance(x, jax.core.Tracer)


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array differs between devices, where JAX tracks that.

    Empty outside `shard_map`, in `pmap`, and with `check_vma=False`.

    jax 0.10 to 0.12: `manual_axis_type.varying`; up to 0.9 it was the type's `vma`.
    """
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def may_be_split(x: Any) -> bool:
    """Whether XLA lays an array out over several devices of a mesh, under `jit`.

    False inside `shard_map`, where an array is one device's part.
    """
    mesh = getattr(jax.typeof(x).sharding, "mesh", None)
    if mesh is None or mesh.empty:
        return False
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != AxisType.Manual and size > 1 for kind, size in sizes)


def tracks_axis(name: str) -> bool:
    """Whether JAX tracks here what varies over a bound mesh axis: its index does, where it does.

    jax 0.10 to 0.12: nothing else tells `check_vma=True` from `check_vma=False`.
    """
    return name in varying_axes(lax.axis_index(name))


def is_literal(x: Any) -> bool:
    """Whether an operand in a jaxpr is a constant that is written there; jax 0.10 to 0.12."""
    return hasattr(x, "val")  # As `jax.extend.core.Literal`, which is not imported for that.


def evaluated(equations: Sequence[Any], known: dict[Any, Any], wanted: Sequence[Any]) -> list[Any]:
    """Some results of a jaxpr, with the functions inside that are jitted taken apart.

    jax 0.10 to 0.12: as `jax.core.eval_jaxpr`, which finds all of them and keeps such functions.

    Args:
        equations: Those that are needed, in order.
        known: The values of variables; those of the equations are added.
        wanted: The variables.
    """

    def read(x: Any) -> Any:
        return x.val if is_literal(x) else known[x]

    for equation in equations:
        operands, primitive = [read(x) for x in equation.invars], equation.primitive
        if primitive.name in ("jit", "pjit"):
            found = evaluated_whole(equation.params["jaxpr"], operands)
        else:
            with equation.ctx.manager:
                found = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
            found = found if primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in wanted]


def evaluated_whole(closed: Any, arguments: list[Any]) -> list[Any]:
    """All results of a closed jaxpr; see `evaluated`."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))
    return evaluated(jaxpr.eqns, known, jaxpr.outvars)
