"""Threshold rules: how large may each norm be now?

A rule sees norms, steps and the norms of the parameters, never a gradient, and works in two
phases: `threshold` before the gradient is limited, `observe` after. Its memory is whatever
`init` returns; the array of norms it is given has one entry per group, so that one rule serves
every scope.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Memory = Any


class Step(NamedTuple):
    """Where in the run a rule is asked.

    Attributes:
        count: Updates before this one, all of them; int32. What schedules are called with.
        finite: Updates before this one whose gradient was finite; int32. What warm-ups count.
    """

    count: jax.Array
    finite: jax.Array


class ParameterNorms(NamedTuple):
    """The norms of the parameters, in the groups of the gradient's norms.

    Attributes:
        norms: Same shape as the gradient's norms.
        sizes: Entries per group, broadcastable to `norms`.
    """

    norms: jax.Array
    sizes: Any


class Rule(NamedTuple):
    """A threshold rule, as three pure functions.

    Attributes:
        init: (norms) -> memory, of fixed shapes and dtypes; `norms` are zeros of the shape and
            dtype that will follow. `()` for a rule without memory.
        threshold: (memory, step, norms, params) -> the largest norm allowed now, broadcastable to
            `norms`. Infinity means: do not clip yet.
        observe: (memory, step, norms, clipped_norms) -> memory. Not called for its effect on a
            step with a non-finite gradient: what it returns then is dropped.
        needs_params: Whether `threshold` reads `params`, a `ParameterNorms` (None otherwise).
        has_memory: Whether `init` returns anything to remember.
    """

    init: Callable[[jax.Array], Memory]
    threshold: Callable[[Memory, Step, jax.Array, ParameterNorms | None], jax.Array]
    observe: Callable[[Memory, Step, jax.Array, jax.Array], Memory]
    needs_params: bool = False
    has_memory: bool = False


def _forgetful(threshold: Callable[..., jax.Array], *, needs_params: bool = False) -> Rule:
    return Rule(
        init=lambda norms: (),
        threshold=threshold,
        observe=lambda memory, step, norms, clipped_norms: (),
        needs_params=needs_params,
    )


def is_concrete(value: Any) -> bool:
    """Whether `value` can be looked at now: not traced, not a schedule."""
    return not isinstance(value, Tracer) and not callable(value)


def check_number(
    value: Any, name: str, *, low: float = 0.0, high: float = float("inf"), mend: str
) -> None:
    """Refuses a concrete `value` that is not one real number in [low, high].

    Args:
        value: What the caller passed. Traced values and schedules are let through.
        name: The argument, with its function: "clip_by_global_norm(max_norm=...)".
        low: Smallest number allowed.
        high: Largest number allowed.
        mend: What to pass instead.

    Raises:
        ValueError: With the value and the mend.
    """
    if not is_concrete(value):
        return
    array = None if isinstance(value, str | bool) else _as_array(value)
    if array is None or array.ndim or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"{name} must be one number or an Optax schedule, got {value!r}; {mend}")
    if not (low <= float(array) <= high):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}; {mend}")


def _as_array(value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    if array.dtype.kind == "V":  # bfloat16 and the 8-bit floats are numbers to everyone but numpy
        array = array.astype(np.float32)
    return None if array.dtype.kind in "cOUSb" else array


def constant(value: Any, name: str = "threshold") -> Rule:
    """The same threshold always, or as a schedule of the step says.

    Args:
        value: A number or traced scalar (0 stops everything, infinity clips nothing), or an Optax
            schedule: a function from the number of earlier updates to a number. A negative number
            from a schedule or a traced value counts as 0; a NaN clips nothing.
        name: What error messages call the argument.

    Returns:
        A `Rule` without memory.

    Raises:
        ValueError: If `value` is concrete and is not a number of at least 0.

    Example:
        >>> import optax, optclip
        >>> warming = optax.linear_schedule(0.1, 1.0, transition_steps=1000)
        >>> transform = optclip.clip_by(optclip.thresholds.constant(warming))
    """
    if callable(value):
        return _forgetful(lambda memory, step, norms, params: _sane(value(step.count), norms))
    check_number(value, name, mend="pass jnp.inf to switch clipping off")
    return _forgetful(lambda memory, step, norms, params: _sane(value, norms))


def per_group(values: dict[Any, Any], name: str = "threshold") -> Rule:
    """One number or schedule for each group, in the order of `values`.

    Args:
        values: From label to number or schedule; the scope must list its groups in this order.
        name: What error messages call the argument.

    Returns:
        A `Rule` without memory.

    Raises:
        ValueError: If a concrete value is not a number of at least 0.
    """
    rules = [constant(value, f"{name}[{label!r}]") for label, value in values.items()]

    def threshold(memory, step, norms, params):
        return jnp.stack([rule.threshold((), step, norms, params) for rule in rules])

    return _forgetful(threshold)


def relative_to_params(ratio: Any, eps: Any, name: str = "relative_to_params") -> Rule:
    """`ratio` times the norm of the parameters, which counts as `eps` where it is smaller.

    Args:
        ratio: Largest norm allowed, as a share of the parameters' norm; number, traced scalar or
            schedule.
        eps: Smallest parameter norm reckoned with, so that parameters that start at zero can
            move; number, traced scalar or schedule.
        name: What error messages call the function.

    Returns:
        A `Rule` without memory that needs `params`.

    Raises:
        ValueError: If `ratio` or `eps` is concrete and negative or NaN.
    """
    ratio_of, eps_of = constant(ratio, f"{name}(ratio)"), constant(eps, f"{name}(eps)")

    def threshold(memory, step, norms, params):
        if params is None:
            raise ValueError("this rule needs the norms of the parameters")
        floor = eps_of.threshold((), step, norms, None)
        return ratio_of.threshold((), step, norms, None) * jnp.maximum(params.norms, floor)

    return _forgetful(threshold, needs_params=True)


def as_rule(rule: Any, name: str = "rule") -> Rule:
    """`rule` itself if it is a `Rule`; a constant or scheduled one if a number or function."""
    return rule if isinstance(rule, Rule) else constant(rule, name)


def _sane(value: Any, norms: jax.Array) -> jax.Array:
    """A scalar threshold in the dtype of the norms: negative to 0, NaN to infinity."""
    value = jnp.asarray(value).astype(norms.dtype)
    return jnp.where(jnp.isnan(value), jnp.inf, jnp.maximum(value, 0)).astype(norms.dtype)
