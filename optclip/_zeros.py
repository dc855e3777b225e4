"""Which results of a function are zero whatever it is given, read from its trace.

What an optimizer never moves is known before the first step only from the optimizer itself: a
schedule may begin at 0, and an expert may be idle for a while.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optclip import _jax

_KEEPS_ZERO = {
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "cumsum",
    "max", "min", "neg", "reduce_sum", "reshape", "sign", "squeeze", "sub", "transpose",
}  # fmt: skip
"""Primitives that make zero of nothing but zeros."""


def always_zero(function: Callable[..., Any], *args: Any) -> list[bool]:
    """For each leaf of function(*args) whether it is 0 whatever the arrays in `args` are.

    By the rules of real numbers, where 0 times anything is 0. Where it cannot be seen: no. A number
    that is 0 today, as a learning rate, makes nothing zero.

    Args:
        function: Traced once, and not run.
        *args: Arrays or their shapes.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _of_closed(closed, [False] * len(closed.in_avals))


def _is_zero(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic | int | float) and not np.any(np.asarray(x))


def _zeros(jaxpr: Any, constants: list[bool], inputs: list[bool]) -> list[bool]:
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def zero(x: Any) -> bool:
        return _is_zero(x.val) if _jax.is_literal(x) else known.get(x, False)

    for equation in jaxpr.eqns:
        inputs = [zero(x) for x in equation.invars]
        if equation.primitive.name == "mul":
            variables = [not _jax.is_literal(x) for x in equation.invars]
            found = [any(map(operator.and_, inputs, variables))]
        else:
            found = _of_equation(equation, inputs)
        known |= dict(zip(equation.outvars, found, strict=True))
    return [zero(x) for x in jaxpr.outvars]


def _of_equation(equation: Any, inputs: list[bool]) -> list[bool]:
    name, parameters = equation.primitive.name, equation.params
    if name in _KEEPS_ZERO and inputs:
        return [all(inputs)]
    if name == "optimization_barrier":
        return inputs
    if name == "div":
        return [inputs[0]]
    if name == "select_n":
        return [all(inputs[1:])]
    if name == "cond":
        branches = [_of_closed(x, inputs[1:]) for x in parameters["branches"]]
        return [all(of_branches) for of_branches in zip(*branches, strict=True)]
    for parameter in ("jaxpr", "call_jaxpr"):  # jit, custom derivatives, checkpoint
        called = parameters.get(parameter)
        if not hasattr(called, "consts") or name in ("scan", "while"):
            continue
        sizes = len(called.in_avals), len(called.out_avals)
        if sizes == (len(inputs), len(equation.outvars)):
            return _of_closed(called, inputs)
    return [False] * len(equation.outvars)


def _of_closed(closed: Any, inputs: list[bool]) -> list[bool]:
    return _zeros(closed.jaxpr, [_is_zero(x) for x in closed.consts], inputs)
