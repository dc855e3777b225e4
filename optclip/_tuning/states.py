"""Norms that an optimizer's state counted: from any state with a histogram to its bins."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optclip import histograms
from optclip._paths import array_in
from optclip._tuning.wording import LogError
from optclip.histograms import NormHistogram
from optclip.methods.safeguard import SafeguardState
from optclip.methods.skip_spikes import SkipState
from optclip.state import ClipState


class HistogramCounts(NamedTuple):
    """The bins of a histogram that are not empty."""

    norms: np.ndarray  # the one that stands for each; ascending, positive and finite
    counts: np.ndarray  # how many steps had it
    nonfinite: int  # gradients that were not; 0 where the state does not tell
    clip_rate: float  # share of the steps that the clip in the same state clipped; 0 without one
    notes: tuple[str, ...]  # what a reader should know


def counts_in(source: Any) -> HistogramCounts | None:
    """The norms in a histogram or a state that has one; None for what is no state.

    Raises:
        ValueError: With one line, if a state has no histogram, or the histogram no norm.
    """
    if isinstance(source, str | bytes | os.PathLike | np.ndarray | jax.Array) or _is_log(source):
        return None
    clips = list(_clips_in(source))
    found = [clip for clip in clips if isinstance(_memory(clip), NormHistogram)]
    if found:
        rates = [float(array_in(x.clip_rate)) for x in clips if isinstance(x, ClipState)]
        return _counted(found[0], len(found), max(rates, default=0.0))
    if clips:
        raise LogError(
            "no clip in this state keeps the norms of its steps; put "
            "optclip.measure_norms(histogram=True) first in the chain, or log optclip.metrics"
        )
    return None


def _is_log(source: Any) -> bool:
    """Whether it is rows or columns, which a search for states need not look through."""
    if isinstance(source, list):
        return not source or not isinstance(source[0], tuple)
    return isinstance(source, Mapping) and all(
        isinstance(x, np.ndarray | jax.Array)
        or (isinstance(x, list) and (not x or not isinstance(x[0], tuple | Mapping)))
        for x in source.values()
    )


def _clips_in(source: Any) -> Iterator[Any]:
    """Every histogram, and every state of a clip, with or without one."""
    kinds = (NormHistogram, ClipState, SkipState, SafeguardState)
    for node in jax.tree.leaves(source, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, kinds):
            yield node
        if isinstance(node, SkipState | SafeguardState):
            yield from _clips_in(node.inner_state)


def _memory(clip: Any) -> Any:
    return clip if isinstance(clip, NormHistogram) else getattr(clip, "memory", None)


def _counted(clip: Any, found: int, clip_rate: float) -> HistogramCounts:
    counts = np.asarray(array_in(_memory(clip).counts), np.int64)
    if counts.shape != (histograms.BINS,):
        raise LogError(
            f"the counts of one histogram have shape {(histograms.BINS,)}, got {counts.shape}; of "
            "several runs or replicas pass one, or what optclip.histograms.merged makes of them"
        )
    notes = [f"the first of {found} histograms in the state was read"] if found > 1 else []
    infinite = int(array_in(clip.nonfinite_steps)) if isinstance(clip, ClipState) else 0
    if infinite:
        notes.append(f"not finite, and left out: {infinite:,} of the gradients")
    norms = histograms.middles()
    known = (counts > 0) & (norms > 0) & np.isfinite(norms)
    if outside := int(counts[~known].sum()):
        notes.append(f"below 2^-64 or from 2^64 on, and left out: {outside:,} of the norms")
    if not known.any():
        raise LogError("the histogram is empty, so there is nothing to choose from; train first")
    return HistogramCounts(norms[known], counts[known], infinite, clip_rate, tuple(notes))
