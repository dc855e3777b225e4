"""What a rule is, and the rules without memory: constant, scheduled, relative to the parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._checks import at, check_number

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
    sizes: jax.typing.ArrayLike


class Rule(NamedTuple):
    """A threshold rule, as three pure functions.

    Attributes:
        init: (norms) -> memory; `norms` are zeros of the shape and dtype that will follow. Arrays
            of fixed dtypes whose last dimensions are those of `norms`; `()` for no memory.
        threshold: (memory, step, norms, params) -> the largest norm allowed now, broadcastable to
            `norms`. Infinity means: do not clip yet.
        observe: (memory, step, norms, clipped_norms) -> memory. Its result is dropped, group by
            group, where the norm is 0, and in all groups where the gradient is not finite.
        needs_params: Whether `threshold` reads `params`, a `ParameterNorms` (None otherwise).
        has_memory: Whether `init` returns anything to remember.
        separable: Whether there is no memory and the threshold of a group depends on that group
            alone, so that `threshold` may be asked for one leaf's groups at a time, in a shape
            that broadcasts against the leaf.
    """

    init: Callable[[jax.Array], Memory]
    threshold: Callable[[Memory, Step, jax.Array, ParameterNorms | None], jax.Array]
    observe: Callable[[Memory, Step, jax.Array, jax.Array], Memory]
    needs_params: bool = False
    has_memory: bool = False
    separable: bool = False


RuleLike = Rule | optax.ScalarOrSchedule
"""A rule, or what `as_rule` makes one of: a number, traced scalar or Optax schedule."""


def _forgetful(
    threshold: Callable[..., jax.Array], *, needs_params: bool = False, separable: bool = True
) -> Rule:
    return Rule(
        init=lambda norms: (),
        threshold=threshold,
        observe=lambda memory, step, norms, clipped_norms: (),
        needs_params=needs_params,
        separable=separable,
    )


def constant(value: optax.ScalarOrSchedule) -> Rule:
    """The same threshold always, or as a schedule of the step says.

    Args:
        value: A number or traced scalar (0 stops everything, infinity clips nothing), or an Optax
            schedule: a function from the number of earlier updates to a number. A negative number
            from a schedule or a traced value counts as 0; a NaN clips nothing.

    Returns:
        A `Rule` without memory.

    Raises:
        ValueError: If `value` is concrete and is not a number of at least 0.

    Example:
        >>> import optax, optclip
        >>> warming = optax.linear_schedule(0.1, 1.0, transition_steps=1000)
        >>> transform = optclip.clip_by(optclip.thresholds.constant(warming))
    """
    check_number(value, "a threshold", hint="pass jnp.inf to switch clipping off")
    return _forgetful(lambda memory, step, norms, params: at(value, step.count, norms))


def per_group(values: Mapping[Any, optax.ScalarOrSchedule]) -> Rule:
    """One number or schedule for each group, in the order of `values`.

    Args:
        values: From label to number or schedule; the scope must list its groups in this order.

    Returns:
        A `Rule` without memory.

    Raises:
        ValueError: If a concrete value is not a number of at least 0.
    """
    for label, value in values.items():
        check_number(value, f"the threshold of label {label!r}", hint="pass jnp.inf for no bound")
    rules = [constant(value) for value in values.values()]

    def threshold(memory, step, norms, params):
        return jnp.stack([rule.threshold((), step, norms, params) for rule in rules])

    return _forgetful(threshold, separable=False)


def relative_to_params(
    ratio: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule,
    *,
    eps_is_rms: bool = False,
) -> Rule:
    """`ratio` times the norm of the parameters, which counts as `eps` where it is smaller.

    Args:
        ratio: Largest norm allowed, as a share of the parameters' norm; number, traced scalar or
            schedule.
        eps: Smallest parameter norm reckoned with, so that parameters that start at zero can
            move; number, traced scalar or schedule.
        eps_is_rms: Whether `eps` is a root mean square, to be multiplied by the square root of the
            number of entries, and not a norm.

    Returns:
        A `Rule` without memory that needs `params`.

    Raises:
        ValueError: If `ratio` or `eps` is concrete and negative or NaN.
    """
    check_number(ratio, "ratio=", hint="pass jnp.inf to switch clipping off")
    check_number(eps, "eps=", hint="pass 0 for no floor")

    def threshold(memory, step, norms, params):
        if params is None:
            raise ValueError("this rule needs the norms of the parameters")
        floor = at(eps, step.count, norms)
        if eps_is_rms:
            floor = floor * jnp.sqrt(jnp.asarray(params.sizes, norms.dtype))
        share, length = at(ratio, step.count, norms), jnp.maximum(params.norms, floor)
        plain = (share > 0) & jnp.isfinite(share)
        # A ratio of 0 or infinity means just that, whatever the parameters.
        return jnp.where(plain, jnp.where(plain, share, 1) * length, share)

    return _forgetful(threshold, needs_params=True)


def as_rule(rule: RuleLike) -> Rule:
    """`rule` itself if it is a `Rule`; a constant or scheduled one if a number or function."""
    return rule if isinstance(rule, Rule) else constant(rule)


def first_memory(rule: Rule, norms: jax.Array) -> Memory:
    """What a rule remembers before it has seen anything.

    Args:
        rule: The rule.
        norms: Zeros, of the shape and dtype that the norms will have.

    Raises:
        ValueError: If it is not of the shape that `Rule.init` asks for, or was not to be expected.
    """
    if not rule.has_memory:
        if jax.tree.leaves(jax.eval_shape(rule.init, norms)):
            raise ValueError("rule.init returns a memory; pass has_memory=True, or return ()")
        return ()
    if norms.ndim:
        # With another number of groups, so that nothing fits by chance.
        more = jax.ShapeDtypeStruct((norms.size + 1,), norms.dtype)
        for kept in jax.tree.leaves(jax.eval_shape(rule.init, more)):
            if kept.shape[-1:] != more.shape:
                raise ValueError(
                    f"rule.init makes a memory of shape {kept.shape} for norms of shape "
                    f"{more.shape}; that must come last, as in (window, *norms.shape)"
                )
    return rule.init(norms)
