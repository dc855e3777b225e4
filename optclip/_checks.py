"""Numbers that callers pass: refused early where they are concrete, given a meaning where not."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _jax


def check_number(
    value: Any,
    name: str,
    *,
    low: float = 0.0,
    high: float = float("inf"),
    hint: str,
    schedule: bool = True,
) -> None:
    """Refuses a concrete `value` that is not one real number in [low, high].

    Args:
        value: What the caller passed. Traced values and schedules are let through.
        name: The argument: "max_norm=".
        low: Smallest number allowed.
        high: Largest number allowed.
        hint: What to pass instead.
        schedule: Whether it may be a schedule, too.

    Raises:
        ValueError: With the value and the hint.
    """
    if _jax.is_traced(value) or (schedule and callable(value)):
        return
    array = _as_array(value)
    if array is None or array.ndim or not np.issubdtype(array.dtype, np.number):
        kind = "one number or an Optax schedule" if schedule else "one number"
        raise ValueError(f"{name} must be {kind}, got {value!r}; {hint}")
    if not (low <= float(array) <= high):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}; {hint}")


def _as_array(value: Any) -> np.ndarray | None:
    if isinstance(value, str | bool):
        return None
    try:
        array = np.asarray(float(value) if isinstance(value, int) else value)
    except (TypeError, ValueError):
        return None
    if array.dtype.isbuiltin != 1 and jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float32)  # bfloat16 and 8-bit floats are no numbers to numpy.
    return None if array.dtype.kind in "cOUSb" else array


def check_count(value: Any, name: str) -> int:
    """Refuses anything but a plain whole number of at least 1: it sets a shape."""
    if _jax.is_traced(value) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"{name} must be a whole number of at least 1, got {value!r}: it sets the shape of the "
            "memory; under optax.inject_hyperparams list it in static_args"
        )
    return int(value)


def check_choice(value: Any, choices: tuple[str, ...], name: str) -> None:
    """Refuses anything but one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_optimizer(inner: Any, name: str) -> None:
    """Refuses what is no transformation: a factory that was not called, or a number."""
    if callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None)):
        return
    call = f"; call {inner.__name__}(...) first" if hasattr(inner, "__name__") else ""
    raise ValueError(
        f"{name} goes around an optimizer, as in {name}(optax.adamw(1e-3)), got {inner!r}{call}"
    )


def check_sharded(axis_name: Any, sharded: Any) -> None:
    """Refuses `sharded` where `axis_name` names no axis: it would be ignored."""
    if sharded is not None and not axis_name:
        raise ValueError(
            "sharded= says over which mesh axes leaves are split inside shard_map and pmap; name "
            "those axes with axis_name= too, or leave sharded= out: under plain jit arrays are "
            "whole"
        )


def check_norm(grad_norm: Any) -> None:
    """Refuses what is not one number, and a negative one that is concrete; not what overflowed."""
    hint = "pass the norm of the whole gradient, or leave grad_norm= out"
    if _jax.is_traced(grad_norm):
        real = jnp.issubdtype(grad_norm.dtype, jnp.floating)
        if jnp.shape(grad_norm) or not (real or jnp.issubdtype(grad_norm.dtype, jnp.integer)):
            kind = f"{grad_norm.dtype} of shape {jnp.shape(grad_norm)}"
            raise ValueError(f"grad_norm= must be one real number, got {kind}; {hint}")
        return
    array = _as_array(grad_norm)
    if array is None or array.ndim or not np.isnan(array):
        check_number(grad_norm, "grad_norm=", hint=hint, schedule=False)


def number_at(value: optax.ScalarOrSchedule, count: jax.Array, like: jax.Array) -> jax.Array:
    """A number, traced scalar or schedule, now, as a scalar in the dtype of `like`."""
    now: Any = value(count) if callable(value) else value
    if isinstance(now, jax.Array):
        return now.astype(like.dtype)
    number, most = float(now), float(jnp.finfo(like.dtype).max)
    # A number beyond the dtype's range is as large as can be, and not infinite.
    number = number if math.isinf(number) else min(max(number, -most), most)
    return jnp.asarray(number, like.dtype)


def at(value: optax.ScalarOrSchedule, count: jax.Array, like: jax.Array) -> jax.Array:
    """The same for a threshold: a negative number counts as 0, a NaN clips nothing."""
    number = number_at(value, count, like)
    return jnp.where(jnp.isnan(number), jnp.inf, jnp.maximum(number, 0)).astype(like.dtype)


def check_decay(decay: optax.ScalarOrSchedule) -> None:
    """Refuses a concrete decay outside [0, 1): at 1 nothing is ever learned."""
    below_one = 1 - 2.0**-24
    check_number(decay, "decay=", high=below_one, hint="0.97 looks back over about 33 steps")
