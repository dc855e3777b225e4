"""Which results of a program are computed alike, and from what."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from optclip import _jax

Leaves = frozenset[int]


class Input(NamedTuple):
    """An input of a program.

    Attributes:
        token: What it is; inputs with equal tokens play the same part for their leaves.
        leaf: The leaf that it belongs to; None if it belongs to no one.
    """

    token: Hashable
    leaf: int | None = None


class Forms:
    """The form of each variable of a jaxpr, and the leaves whose inputs it is computed from.

    Two variables have the same form where they are computed by the same operations from inputs with
    the same tokens.

    Args:
        closed: The program.
        inputs: One for each of its inputs.
    """

    def __init__(self, closed: Any, inputs: Sequence[Input]) -> None:
        self._equations: dict[Any, Any] = {}
        self._ids: dict[Hashable, int] = {}
        self._texts: dict[int, Hashable] = {}
        self._forms: dict[Any, int] = {}
        self._leaves: dict[Any, Leaves] = {}
        jaxpr = closed.jaxpr
        for variable, of in zip(jaxpr.invars, inputs, strict=True):
            self._forms[variable] = self._id(("input", of.token))
            self._leaves[variable] = frozenset() if of.leaf is None else frozenset([of.leaf])
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
            self._forms[variable], self._leaves[variable] = (
                self._id(("constant", id(value))),
                Leaves(),
            )
        for equation in jaxpr.eqns:
            operands = tuple(self.form(x) for x in equation.invars)
            options = tuple((name, self._text(x)) for name, x in sorted(equation.params.items()))
            form = self._id((equation.primitive.name, options, operands))
            leaves = Leaves().union(*map(self.leaves, equation.invars))
            for place, variable in enumerate(equation.outvars):
                self._forms[variable] = self._id((form, place))
                self._leaves[variable] = leaves
                self._equations[variable] = equation

    def form(self, x: Any) -> int:
        """The form of a variable; of a literal its value."""
        if _jax.is_literal(x):
            return self._id(("literal", self._text(np.asarray(x.val))))
        return self._forms[x]

    def leaves(self, x: Any) -> Leaves:
        """The leaves whose inputs a variable is computed from."""
        return Leaves() if _jax.is_literal(x) else self._leaves[x]

    def needed(self, variables: Sequence[Any]) -> list[Any]:
        """The equations that some variables need, in order."""
        found: dict[int, Any] = {}
        waiting = [x for x in variables if not _jax.is_literal(x)]
        while waiting:
            equation = self._equations.get(waiting.pop())
            if equation is not None and id(equation) not in found:
                found[id(equation)] = equation
                waiting += [x for x in equation.invars if not _jax.is_literal(x)]
        order = dict.fromkeys(id(x) for x in self._equations.values())
        return [found[x] for x in order if x in found]

    def _id(self, what: Hashable) -> int:
        return self._ids.setdefault(what, len(self._ids))

    def _text(self, x: Any) -> Hashable:
        """An option of an operation, as text that is the same where the option is."""
        if isinstance(x, np.ndarray):
            return (x.shape, str(x.dtype), x.tobytes())
        if callable(x):
            return id(x)
        if not (hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            return repr(x)
        if id(x) not in self._texts:
            self._texts[id(x)] = str(x)
        return self._texts[id(x)]
