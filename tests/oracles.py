"""What every method should answer: float64 loops over groups, from the papers and docstrings.

Nothing here calls optclip. An oracle is a small object with a `step`; one for a method without
memory answers the same at every step. A new method gets an entry in `ORACLES`: a `Clip` with
other thresholds, or a class that inherits from it and remembers (`thresholds` before the gradient
is limited, `learn` after).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

Selector = tuple[Any, ...]
Group = list[tuple[int, Selector]]
"""Which entries share a norm: places of leaves in the tree, and an index into each of them."""


class Outcome(NamedTuple):
    """What a clip makes of one gradient.

    Attributes:
        updates: The clipped tree, its floating leaves in float64 or complex128.
        norms: The norm of every group, in order; of single entries the largest.
        clipped: The same after clipping.
        thresholds: The threshold of every group.
        groups: The groups.
    """

    updates: Any
    norms: list[float]
    clipped: list[float]
    thresholds: list[float]
    groups: list[Group]


# Leaves


def takes_part(x: Any) -> bool:
    """Whether a leaf is clipped at all: floating point or complex, and not without entries."""
    array = np.asarray(x)
    return jax.dtypes.issubdtype(array.dtype, np.inexact) and array.size > 0


def wide(x: Any) -> np.ndarray:
    """A floating leaf in float64 or complex128."""
    array = np.asarray(x)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def moduli(x: Any) -> np.ndarray:
    """|x| in float64, flat; exact up to rounding also where a square would overflow."""
    entries = wide(x).ravel()
    return np.hypot(entries.real, entries.imag) if entries.dtype.kind == "c" else np.abs(entries)


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """The leaves and where they are: "block_0/attention/kernel"."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in found]


# Norms


def norm(entries: Iterable[float], kind: str) -> float:
    """The norm "l1", "l2", "l3" and so on, "linf" or "rms" of absolute values.

    Reckoned with ratios to the largest, so that no power leaves float64.
    """
    entries = np.fromiter(entries, np.float64) if not isinstance(entries, np.ndarray) else entries
    if not np.all(np.isfinite(entries)):
        return math.nan if np.any(np.isnan(entries)) else math.inf
    peak = float(np.max(entries, initial=0.0))
    if kind == "linf" or peak == 0:
        return peak
    ratios = entries / peak
    if kind == "rms":
        return peak * math.sqrt(math.fsum(ratios * ratios) / len(ratios))
    power = float(kind[1:])
    return peak * math.fsum(ratios if power == 1 else ratios**power) ** (1 / power)


def norm_of(tree: Any, group: Group, kind: str) -> float:
    """The norm of one group of a tree."""
    leaves = jax.tree.leaves(tree)
    parts = [moduli(np.asarray(leaves[place])[selector]) for place, selector in group]
    return norm(np.concatenate([np.zeros(0), *parts]), kind)


# Scopes


def fan_in_axes(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The weights into one output, in Flax's layout, whose last axis counts the outputs.

    A vector is one unit. A matrix has a unit per column, a stack of matrices one per matrix and
    column, a convolution kernel one per output channel.
    """
    rank = len(shape)
    if len([length for length in shape if length != 1]) <= 1:
        return tuple(range(rank))
    return {2: (0,), 3: (0,)}.get(rank, tuple(range(rank - 1)))


def groups_of(
    tree: Any,
    scope: str,
    *,
    axes: Callable[[str, tuple[int, ...]], tuple[int, ...] | None] = fan_in_axes,
    label: Callable[[str], Any] = lambda path: path,
) -> list[Group]:
    """The groups of a scope, in the order of the tree and, within a leaf, of its entries."""
    leaves = [(place, path, x) for place, (path, x) in enumerate(leaves_with_paths(tree))]
    leaves = [(place, path, np.asarray(x)) for place, path, x in leaves if takes_part(x)]
    if scope in ("tree", "element"):
        return [[(place, ...) for place, _, _ in leaves]]
    if scope == "leaf":
        return [[(place, ...)] for place, _, _ in leaves]
    if scope == "group":
        labelled: dict[Any, Group] = {}
        for place, path, _ in leaves:
            if label(path) is not None:
                labelled.setdefault(label(path), []).append((place, ...))
        return list(labelled.values())
    assert scope == "unit"
    return [
        [(place, selector)]
        for place, path, x in leaves
        for selector in units_of(x.shape, axes(path, x.shape))
    ]


def units_of(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> Iterator[Selector]:
    """An index for every unit of a leaf; a unit spans `axes`."""
    if axes is not None:
        kept = [1 if axis in axes else length for axis, length in enumerate(shape)]
        for place in np.ndindex(*kept):
            yield tuple(slice(None) if a in axes else i for a, i in enumerate(place))


# Limiters


def rescale(norm: float, threshold: float) -> float:
    """min(1, threshold / norm)."""
    return threshold / norm if norm > threshold else 1.0


def smooth(norm: float, threshold: float) -> float:
    """threshold / (norm + threshold); a gradient of norm 0 keeps its 0."""
    return 1.0 if norm == 0 or math.isinf(threshold) else threshold / (norm + threshold)


# Clips


class Clip:
    """One clip: groups, norms, thresholds, limits. Without memory, as it stands.

    Args:
        threshold: A number for every group alike, or a function from the norms of the parameters
            (one for each group) to numbers. None where `thresholds` is overridden.
        scope: "tree", "leaf", "unit", "group" or "element".
        kind: The norm: "l2", "linf", "rms" and so on.
        limiter: (norm, threshold) -> factor.
        **walk: `axes` or `label` of `groups_of`.
    """

    def __init__(
        self,
        threshold: Any = None,
        scope: str = "tree",
        kind: str = "l2",
        limiter: Callable[[float, float], float] = rescale,
        **walk: Any,
    ):
        self.threshold, self.scope, self.kind = threshold, scope, kind
        self.limiter, self.walk = limiter, walk

    def thresholds(self, norms: list[float], params: list[float] | None) -> list[float]:
        """The threshold of every group, from norms of the gradient and of the parameters."""
        if callable(self.threshold):
            assert params is not None
            return [self.threshold(size) for size in params]
        return [float(self.threshold)] * len(norms)

    def learn(self, norms: list[float], clipped: list[float]) -> None:
        """What a rule with memory does with the norms of a finite step."""

    def step(self, updates: Any, params: Any = None) -> Outcome:
        """Clips one finite gradient, and learns from it."""
        groups = groups_of(updates, self.scope, **self.walk)
        kind = "linf" if self.scope == "element" else self.kind
        norms = [norm_of(updates, group, kind) for group in groups]
        sizes = None if params is None else [norm_of(params, group, kind) for group in groups]
        thresholds = self.thresholds(norms, sizes)
        leaves, structure = jax.tree.flatten(updates)
        leaves = [wide(x) if takes_part(x) else x for x in leaves]
        for group, size, threshold in zip(groups, norms, thresholds, strict=True):
            for place, selector in group:
                part = leaves[place][selector]
                if self.scope == "element":
                    flat = [self.limiter(abs(x), threshold) * x for x in np.ravel(part).tolist()]
                    leaves[place] = np.reshape(np.asarray(flat, part.dtype), part.shape)
                else:
                    leaves[place][selector] = part * self.limiter(size, threshold)
        clipped = [
            size * self.limiter(size, bound) for size, bound in zip(norms, thresholds, strict=True)
        ]
        self.learn(norms, clipped)
        return Outcome(jax.tree.unflatten(structure, leaves), norms, clipped, thresholds, groups)

    def peek(self, updates: Any, params: Any = None) -> Outcome:
        """What `step` would answer, without learning from it."""
        return copy.deepcopy(self).step(updates, params)


def clip_by_value(max_delta: float) -> Clip:
    return Clip(max_delta, "element")


def clip_by_global_norm(max_norm: float, ord: float | None = None) -> Clip:
    return Clip(max_norm, kind="linf" if ord == math.inf else f"l{2 if ord is None else ord:g}")


def clip_by_leaf_norm(max_norm: float) -> Clip:
    return Clip(max_norm, "leaf")


def clip_by_group_norm(max_norm: float, labels: Callable[[str], Any]) -> Clip:
    return Clip(max_norm, "group", label=labels)


def clip_by_block_rms(threshold: float) -> Clip:
    return Clip(threshold, "leaf", "rms")


def adaptive_grad_clip(
    clipping: float, eps: float = 1e-3, axis: Callable[..., Any] = fan_in_axes
) -> Clip:
    return Clip(lambda size: clipping * max(size, eps), "unit", axes=axis)


def smooth_clip(max_norm: float) -> Clip:
    return Clip(max_norm, limiter=smooth)


def measure_norms() -> Clip:
    return Clip(math.inf)


ORACLES: dict[str, Callable[..., Clip]] = {
    oracle.__name__: oracle
    for oracle in (
        adaptive_grad_clip,
        clip_by_block_rms,
        clip_by_global_norm,
        clip_by_group_norm,
        clip_by_leaf_norm,
        clip_by_value,
        measure_norms,
        smooth_clip,
    )
}
"""From a method's name to its oracle, which takes the method's own arguments."""


def oracle_of(method: Any, **changes: Any) -> Clip:
    """A fresh oracle for an entry of the registry."""
    return ORACLES[method.name](**{**method.arguments, **changes})
