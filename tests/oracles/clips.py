"""What every method should answer: float64 loops over groups, from the papers and docstrings.

Nothing here calls optclip. An oracle is a small object with a `step`; one for a method without
memory answers the same at every step. Which method has which oracle stands in
`methods.py`.
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
        groups: The groups.
        norms: The norm of every group, in order; of single entries the largest.
        thresholds: The threshold of every group; of single entries the smallest. NaN where a group
            is zero and its threshold is nobody's business.
        factors: The factor of every group; of single entries the smallest.
        share: The share of groups, or of entries, above their threshold.
        norm: The norm of all groups together.
        clipped_norm: The same after clipping.
        bounds: Of single entries: the bound of every entry, for each leaf that has entries.
        rounding: For some leaves how far float32 may be off in any entry.
    """

    updates: Any
    groups: list[Group]
    norms: list[float]
    thresholds: list[float]
    factors: list[float]
    share: float
    norm: float
    clipped_norm: float
    bounds: dict[int, np.ndarray]
    rounding: dict[int, float] = {}  # noqa: RUF012 - nobody changes it


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


def size_of(tree: Any, group: Group) -> int:
    """The number of entries of one group."""
    leaves = jax.tree.leaves(tree)
    return sum(np.size(np.asarray(leaves[place])[selector]) for place, selector in group)


def _moving(updates: Any, group: Group) -> Group:
    """Of a group of several leaves those that move, or all where none does: contract 12."""
    leaves = jax.tree.leaves(updates)
    moving = [(place, at) for place, at in group if np.any(np.asarray(leaves[place])[at] != 0)]
    return moving or group


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
    if scope == "tree":
        return [[(place, ...) for place, _, _ in leaves]]
    if scope == "leaf":
        return [[(place, ...)] for place, _, _ in leaves]
    if scope == "group":
        labeled: dict[Any, Group] = {}
        for place, path, _ in leaves:
            if label(path) is not None:
                labeled.setdefault(label(path), []).append((place, ...))
        return list(labeled.values())
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


def normalize(norm: float, threshold: float, max_factor: float = 1e6) -> float:
    """min(threshold / norm, max_factor); an infinite threshold changes nothing."""
    if math.isinf(threshold):
        return 1.0
    return max_factor if norm * max_factor <= threshold else threshold / norm


# Clips


class Clip:
    """One clip: groups, norms, thresholds, limits. Without memory, as it stands.

    Args:
        threshold: A number for every group alike, or a function of a group's parameters: of their
            norm and their number. None where `thresholds` is overridden.
        scope: "tree", "leaf", "unit" or "group".
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

    def measure(self, tree: Any, params: Any, group: Group) -> float:
        """The norm of a group, or of all groups as one."""
        return norm_of(tree, group, self.kind)

    def thresholds(self, norms: list[float], params: Any, groups: list[Group]) -> list[float]:
        """The threshold of every group. Called once a step: a rule with memory also learns here."""
        if not callable(self.threshold):
            return [float(self.threshold)] * len(norms)
        return [
            self.threshold(norm_of(params, group, self.kind), size_of(params, group))
            for group in groups
        ]

    def step(self, updates: Any, params: Any = None) -> Outcome:
        """Clips one finite gradient, and learns from it."""
        groups = groups_of(updates, self.scope, **self.walk)
        norms = [self.measure(updates, params, group) for group in groups]
        thresholds = self.thresholds(norms, params, [_moving(updates, x) for x in groups])
        pairs = list(zip(norms, thresholds, strict=True))
        factors = [self.limiter(*pair) for pair in pairs]
        leaves, structure = jax.tree.flatten(updates)
        leaves = [wide(x) if takes_part(x) else x for x in leaves]
        for group, factor in zip(groups, factors, strict=True):
            for place, selector in group:
                leaves[place][selector] = leaves[place][selector] * factor
        clipped, whole = jax.tree.unflatten(structure, leaves), [x for g in groups for x in g]
        return Outcome(
            updates=clipped,
            groups=groups,
            norms=norms,
            thresholds=thresholds,
            factors=factors,
            share=float(np.mean([size > bound for size, bound in pairs])) if pairs else 0.0,
            norm=self.measure(updates, params, whole),
            clipped_norm=self.measure(clipped, params, whole),
            bounds={},
        )

    def peek(self, updates: Any, params: Any = None) -> Outcome:
        """What `step` would answer, without learning from it."""
        return copy.deepcopy(self).step(updates, params)


class EntryClip(Clip):
    """A clip of every entry by itself; a complex one in modulus."""

    kind = "linf"

    def __init__(self, threshold: float = math.inf):
        super().__init__(threshold, kind=self.kind)

    def bounds(self, sizes: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """The bound of every entry, for each leaf. Called once a step, as `thresholds` is."""
        return {place: np.full(x.shape, float(self.threshold)) for place, x in sizes.items()}

    def step(self, updates: Any, params: Any = None) -> Outcome:
        leaves, structure = jax.tree.flatten(updates)
        sizes = {place: moduli(x) for place, x in enumerate(leaves) if takes_part(x)}
        bounds, factors = self.bounds(sizes), {}
        for place, size in sizes.items():
            pairs = zip(size.tolist(), bounds[place].tolist(), strict=True)
            factors[place] = np.array([self.limiter(*pair) for pair in pairs])
            x = wide(leaves[place])
            leaves[place] = x * factors[place].reshape(x.shape)
        flat = {
            name: np.concatenate([np.zeros(0), *of_leaf.values()])
            for name, of_leaf in (("size", sizes), ("bound", bounds), ("factor", factors))
        }
        return Outcome(
            updates=jax.tree.unflatten(structure, leaves),
            groups=[[(place, ...) for place in sizes]],
            norms=[norm(flat["size"], self.kind)],
            thresholds=[float(np.min(flat["bound"], initial=math.inf))],
            factors=[float(np.min(flat["factor"], initial=1.0))],
            share=float(np.mean(flat["size"] > flat["bound"])) if sizes else 0.0,
            norm=norm(flat["size"], self.kind),
            clipped_norm=norm(flat["size"] * flat["factor"], self.kind),
            bounds=bounds,
        )


class SingularValueClip(Clip):
    """Every singular value s of every leaf as s / sqrt(1 + s^2 / c^2).

    The last axis of a leaf counts its columns. Where the largest is more than 1e5 c, h, the
    100,000th of it, takes the place of c, and the result is multiplied by c / h.
    """

    LARGEST = 1e5

    def __init__(self, threshold: float):
        super().__init__(threshold, "leaf")

    def measure(self, tree: Any, params: Any, group: Group) -> float:
        leaves = jax.tree.leaves(tree)
        return max((float(_decomposed(leaves[place])[1][0]) for place, _ in group), default=0.0)

    def step(self, updates: Any, params: Any = None) -> Outcome:
        leaves, structure = jax.tree.flatten(updates)
        groups = groups_of(updates, "leaf")
        factors, norms, rounding = [], [], {}
        for ((place, _),) in groups:
            left, values, right = _decomposed(leaves[place])
            held = max(self.threshold, values[0] / self.LARGEST)
            shares = _soft(values, held) * (self.threshold / held if values[0] else 1)
            shares = shares if math.isfinite(self.threshold) else np.ones_like(values)
            leaves[place] = ((left * (values * shares)) @ right).reshape(np.shape(leaves[place]))
            norms.append(float(values[0]))
            factors.append(float(shares[0]))
            # A rounding of the largest, of which all but the threshold is taken away.
            rounding[place] = 1e-6 * min(values[0], self.LARGEST * self.threshold)
        clipped = [x * factor for x, factor in zip(norms, factors, strict=True)]
        return Outcome(
            updates=jax.tree.unflatten(structure, leaves),
            groups=groups,
            norms=norms,
            thresholds=[float(self.threshold)] * max(len(groups), 1),
            factors=factors or [1.0],
            share=float(np.mean(np.asarray(norms) > self.threshold)) if norms else 0.0,
            norm=max(norms, default=0.0),
            clipped_norm=max(clipped, default=0.0),
            bounds={},
            rounding=rounding,
        )


def _decomposed(x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of a leaf of any magnitude."""
    matrix = wide(x).reshape(-1, np.shape(x)[-1] if np.ndim(x) > 1 else 1)
    peak = float(np.max(np.abs(matrix), initial=0.0)) or 1.0
    left, values, right = np.linalg.svd(matrix / peak, full_matrices=False)
    return left, values * peak, right


def _soft(values: np.ndarray, threshold: float) -> np.ndarray:
    """1 / sqrt(1 + s^2 / c^2), at every pair of s and c."""
    ratios = values / threshold if threshold else np.zeros_like(values)
    return 1 / np.hypot(1, ratios)
