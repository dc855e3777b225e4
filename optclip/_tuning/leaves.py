"""The norms of single leaves as a table that can be drawn: a row a leaf, a column some steps."""

from collections.abc import Mapping
from itertools import takewhile
from typing import NamedTuple

import numpy as np

MOST_ROWS = 40
"""Of the table; more leaves are put together by the beginning of their paths, or left out."""

MOST_COLUMNS = 400
"""Of the table; more steps are put together by their median."""

_LONGEST = 28  # letters of a path


class LeafTable(NamedTuple):
    """Rows that fit into a picture.

    Attributes:
        names: Of the rows.
        norms: Of shape (rows, steps); NaN where the norm is zero or not finite.
        label: What a row is, and what was put together or left out.
    """

    names: list[str]
    norms: np.ndarray
    label: str


def tabulate(leaf_norms: Mapping[str, np.ndarray]) -> LeafTable:
    """All leaves where they fit; else groups of them by path; else a sample."""
    paths = list(leaf_norms)
    norms = np.array([leaf_norms[path] for path in paths])
    norms = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)
    count = len(paths)
    if count <= MOST_ROWS:
        return LeafTable(_short(paths), norms, "leaf")
    depth = _depth(paths)
    if depth:
        groups: dict[str, list[int]] = {}
        for at, path in enumerate(paths):
            groups.setdefault(_beginning(path, depth), []).append(at)
        rows = np.array([np.fmax.reduce(norms[members]) for members in groups.values()])
        return LeafTable(_short(list(groups)), rows, f"largest of a group\n({count:,} leaves)")
    shown = np.unique(np.linspace(0, count - 1, MOST_ROWS).astype(int))
    names = _short([paths[at] for at in shown])
    return LeafTable(names, norms[shown], f"leaf\n({len(shown)} of {count:,})")


def binned(steps: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges of at most `MOST_COLUMNS` columns, and the median norm in each.

    Args:
        steps: Of shape (steps,), rising.
        norms: Of shape (rows, steps), NaN where there is none.

    Returns:
        Edges of shape (columns + 1,) and medians of shape (rows, columns).
    """
    stretch = -(-len(steps) // MOST_COLUMNS)
    starts = np.arange(0, len(steps), stretch)
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    edges = np.append(steps[starts], steps[-1] + gap) - gap / 2
    columns = [_median(norms[:, start : start + stretch]) for start in starts]
    return edges, np.stack(columns, axis=1)


def _median(norms: np.ndarray) -> np.ndarray:
    """Of every row, over what is there; NaN where nothing is."""
    in_order = np.sort(norms, axis=1)  # NaN comes last
    count = np.isfinite(in_order).sum(axis=1)
    rows = np.arange(len(norms))
    low = in_order[rows, np.maximum(count - 1, 0) // 2]
    high = in_order[rows, np.minimum(count // 2, norms.shape[1] - 1)]
    return np.where(count > 0, (low + high) / 2, np.nan)


def _depth(paths: list[str]) -> int:
    """How many parts of the paths to keep, so that at most `MOST_ROWS` differ; 0 if none do."""
    deepest = max(path.count("/") for path in paths)
    for depth in range(deepest, 0, -1):
        if 1 < len({_beginning(path, depth) for path in paths}) <= MOST_ROWS:
            return depth
    return 0


def _beginning(path: str, depth: int) -> str:
    return "/".join(path.split("/")[:depth])


def _short(paths: list[str]) -> list[str]:
    """Names that leave room for the picture: without what all begin with, and cut in the middle."""
    half = (_LONGEST - 3) // 2
    folders = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
    paths = ["/".join(path.split("/")[shared:]) for path in paths]
    return [p if len(p) <= _LONGEST else f"{p[:half]}...{p[-half - 1 :]}" for p in paths]
