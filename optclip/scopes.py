"""Scopes: which entries share a norm.

A scope says which axes of a leaf one group spans and which leaves share a group::

    tree            the whole tree is one group
    leaf            a group per leaf
    group(labels)   a group per label
    layer(stacked)  a group per layer of leaves that are stacked for a scan, across those leaves
    unit(axes)      groups within a leaf: for most layers, the weights into one output

`optclip._tree.measure` looks at a tree with a scope, and walks it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optclip._numerics import Axes
from optclip._paths import answer_per_leaf, leaves_with_paths

Label = Hashable
AxesOf = Callable[[str, tuple[int, ...]], Axes | int | None]
UnitAxes = int | Axes | AxesOf | None


class Scope(NamedTuple):
    """Which entries share a norm.

    Attributes:
        name: What messages call it.
        axes: (path, shape) -> the axes of a leaf that one group spans; None leaves the leaf alone.
        labels: (tree) -> a label for each leaf, in order; leaves of equal label share a group (or
            as many as their axes leave), and None leaves a leaf alone. The function itself is None
            where groups stay within leaves.
        order: The labels in the order of their groups; None for the order of appearance.
        one_group: Whether there is one norm, a scalar, however many leaves there are (also none).
        whole_leaves: Whether no leaf is divided, whatever its shape.
    """

    name: str
    axes: AxesOf
    labels: Callable[[Any], Sequence[Label | None]] | None = None
    order: tuple[Label, ...] | None = None
    one_group: bool = False
    whole_leaves: bool = False


def _whole(path: str, shape: tuple[int, ...]) -> Axes:
    return tuple(range(len(shape)))


def _same(updates: optax.Updates) -> list[Label]:
    return ["all"] * len(jax.tree.leaves(updates))


tree = Scope("tree", _whole, labels=_same, one_group=True, whole_leaves=True)
"""The whole tree shares one norm: the global norm."""

leaf = Scope("leaf", _whole, whole_leaves=True)
"""Every leaf has a norm of its own."""


def group(labels: Any, order: Sequence[Label] | None = None) -> Scope:
    """The leaves of one label share a norm.

    Args:
        labels: A tree of labels (the updates' structure, or a prefix of it), or a function from a
            leaf's path ("block_0/attention/kernel") to its label. Label None leaves a leaf alone.
        order: The labels in the order in which a rule expects their norms; None for the order in
            which they appear.

    Returns:
        A `Scope`.

    Raises:
        ValueError: When it meets a tree, if a label is not in `order`.

    Example:
        >>> from optclip import scopes
        >>> by_block = scopes.group(lambda path: path.split("/")[0])
    """

    def labels_of(updates: optax.Updates) -> list[Label | None]:
        return answer_per_leaf(labels, updates, "labels")

    ordered = None if order is None else tuple(order)
    return Scope("group", _whole, labels_of, ordered, whole_leaves=True)


def layer(stacked: Callable[[str], bool]) -> Scope:
    """The leaves of one layer share a norm, where the layers are stacked for `jax.lax.scan`.

    Entry i along axis 0 of all stacked leaves together is one group; every other leaf is a group
    of its own.

    Args:
        stacked: From a leaf's path ("layers/attention/kernel") to whether it is stacked. All that
            are must be equally long along axis 0.

    Returns:
        A `Scope`.

    Raises:
        ValueError: If `stacked` is no function; when it meets a tree, if no leaf is stacked, or
            stacked leaves are not equally long, or one is a scalar.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> from optclip import scopes
        >>> by_layer = scopes.layer(lambda path: path.startswith("layers/"))
        >>> clip = optclip.clip_by(5.0, scope=by_layer, detail=True)
        >>> grads = {
        ...     "layers": {"kernel": jnp.full((2, 4, 4), 3.0), "bias": jnp.zeros((2, 4))},
        ...     "head": jnp.ones(4),
        ... }
        >>> _, state = clip.update(grads, clip.init(grads))
        >>> readings = optclip.metrics(state, grads)
        >>> float(readings["clip/norms/layers/0"]), float(readings["clip/norms/head"])
        (12.0, 2.0)
    """
    if not callable(stacked):
        raise ValueError(
            f"scopes.layer needs a function from a leaf's path to whether its layers are stacked "
            f'along axis 0, got {stacked!r}; for example lambda path: path.startswith("layers/")'
        )

    def axes(path: str, shape: tuple[int, ...]) -> Axes:
        if not stacked(path):
            return _whole(path, shape)
        if not shape:
            raise ValueError(
                f"{path!r} is a scalar, which holds no layers; let stacked({path!r}) be False"
            )
        return tuple(range(1, len(shape)))

    def labels(updates: optax.Updates) -> list[Label]:
        found: list[Label] = []
        alike: Counter[str] = Counter()
        for path, _ in leaves_with_paths(updates):
            alike[path] += 1  # Of two leaves whose paths read alike each is a group.
            own = path if alike[path] == 1 else f"{path} ({alike[path]})"
            found.append("layers" if stacked(path) else own)
        if found and "layers" not in found:
            raise ValueError(
                "scopes.layer(stacked) names no leaf as stacked: it is False for all of "
                f"{', '.join(map(repr, found[:4]))}{', ...' if len(found) > 4 else ''}"
            )
        return found

    return Scope("layer", axes, labels)


def unit(axes: UnitAxes = None) -> Scope:
    """Every unit of a leaf has a norm of its own: the weights into one output, for most layers.

    Args:
        axes: The axes that one unit spans: an int or a tuple for every leaf, or a function
            (path, shape) -> axes, which may answer None to leave a leaf alone. None takes Flax's
            and Optax's layout, `fan_in_axes`.

    Returns:
        A `Scope`.

    Raises:
        ValueError: If `axes` is none of these; when it meets a tree, if an axis does not exist.

    Example:
        Embedding tables by row, stacked layers by layer and output, the rest as usual:

        >>> from optclip import scopes
        >>> def axes(path, shape):
        ...     if path.endswith("embedding"):
        ...         return (1,)
        ...     if path.startswith("layers/"):
        ...         return tuple(range(1, len(shape) - 1))
        ...     return scopes.fan_in_axes(path, shape)
        >>> by_unit = scopes.unit(axes)
    """
    if axes is None:
        return Scope("unit", fan_in_axes)
    if callable(axes):
        return Scope("unit", axes)
    given = axes if isinstance(axes, tuple | list) else (axes,)
    if not all(isinstance(axis, int | np.integer) and not isinstance(axis, bool) for axis in given):
        raise ValueError(
            f"the axes of a unit cannot be {axes!r}; pass an int, a tuple of ints or a function"
        )
    fixed = tuple(int(axis) for axis in given)
    return Scope("unit", lambda path, shape: fixed)


def fan_in_axes(path: str, shape: tuple[int, ...]) -> Axes:
    """The axes of one unit where nothing else is said: Optax's, extended to any rank.

    In Flax's layout the last axis counts the outputs. For a convolution over one axis, whose kernel
    has rank 3, it is wrong: there a unit spans axes 0 and 1.

    Args:
        path: Where the leaf is; not looked at.
        shape: The leaf's shape.

    Returns:
        All axes of a vector or scalar (also one with axes of length 1), axis 0 of a matrix or of
        rank 3, all but the last from rank 4 on.

    Example:
        >>> fan_in_axes("conv/kernel", (3, 3, 16, 32))
        (0, 1, 2)
    """
    rank = len(shape)
    if sum(length > 1 for length in shape) <= 1:
        return tuple(range(rank))
    return (0,) if rank <= 3 else tuple(range(rank - 1))
