"""Histograms of norms in an optimizer's state: a run's norms in a few kilobytes, in any order.

Bins are equally wide in the logarithm, eighteen to an octave, so that the middle of a bin is within
2% of every norm in it. Counts add up: over steps, over replicas that see other data, over runs.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _jax
from optclip._tree.layout import whole_on_devices_of
from optclip.clipping import NEEDS_STATE_MSG
from optclip.state import ClipState, check_state

BINS_PER_OCTAVE = 18
OCTAVES = 128
LOWEST = 2.0**-64
"""Where the second bin begins; the first holds what is smaller, the last what is larger."""
BINS = BINS_PER_OCTAVE * OCTAVES + 2


@_jax.exportable
class NormHistogram(NamedTuple):
    """How often norms of each size were met; steps that are not finite and norms of 0 left out.

    Attributes:
        counts: Of the norm of the whole gradient; int32, shape (2306,).
        by_group: Of the norm of each group, or of each leaf where the scope is the whole tree;
            int32, shape (leaves, 2306), or under each label (2306,). () without `detail=True`.
    """

    counts: jax.Array
    by_group: jax.Array | dict[str, jax.Array] | tuple[()] = ()


def recording(
    measured: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A transformation with a `ClipState` whose memory becomes a `NormHistogram` of its norms."""

    def init(params: optax.Params) -> ClipState:
        state: Any = measured.init(params)
        by_group = ()
        if state.detail:
            by_group = jax.tree.map(
                lambda norms: jnp.zeros((*norms.shape, BINS), jnp.int32), state.detail.norms
            )
        empty = NormHistogram(jnp.zeros([BINS], jnp.int32), by_group)
        return state._replace(memory=whole_on_devices_of(params, empty))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClipState]:
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        check_state(state, ClipState)
        check_state(state.memory, NormHistogram)
        updates, new = measured.update(updates, state._replace(memory=()), params, **extra_args)
        assert isinstance(new, ClipState)
        with jax.named_scope("optclip/observe"):
            finite = new.nonfinite_steps == state.nonfinite_steps
            histogram: NormHistogram = state.memory
            counts = _counted(histogram.counts, new.norm, finite)
            by_group = histogram.by_group
            if new.detail and not isinstance(by_group, tuple):
                by_group = jax.tree.map(
                    lambda counts, norms: _counted(counts, norms, finite),
                    by_group,
                    new.detail.norms,
                )
        return updates, new._replace(memory=NormHistogram(counts, by_group))

    return optax.GradientTransformationExtraArgs(init, update)


def _counted(counts: jax.Array, norms: jax.Array, finite: jax.Array) -> jax.Array:
    """The counts with one norm more in each row."""
    place = (jnp.log2(norms) - math.log2(LOWEST)) * BINS_PER_OCTAVE + 1
    # Before it is made an integer: the logarithm of 0 is -inf.
    place = jnp.clip(place, 0, BINS - 1).astype(jnp.int32)
    one = (finite & (norms > 0)).astype(jnp.int32)
    if norms.ndim == 0:
        return counts.at[place].add(one)
    return counts.at[jnp.arange(len(norms), dtype=jnp.int32), place].add(one)


def merged(*histograms: NormHistogram) -> NormHistogram:
    """The histogram of all norms together, of several replicas or runs of the same network.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> from optclip import histograms
        >>> recorder = optclip.measure_norms(histogram=True)
        >>> state = recorder.init(jnp.zeros(2))
        >>> _, state = recorder.update(jnp.array([3.0, 4.0]), state)
        >>> both = histograms.merged(state.memory, state.memory)
        >>> int(both.counts.sum())
        2
    """
    return jax.tree.map(lambda *counts: sum(counts[1:], counts[0]), *histograms)


def quantile(histogram: Any, q: Any) -> np.ndarray:
    """The norm below which a share q of the counted norms lies, within 2%.

    The smallest norm that a share of at least q does not exceed, as
    `numpy.quantile(..., method="inverted_cdf")`. 0 and infinity stand for norms out of the range of
    the bins (below 2^-64, from 2^64 on), NaN for an empty histogram.

    Args:
        histogram: A `NormHistogram`, of the whole gradient; or counts of shape (..., 2306), such as
            its `by_group`.
        q: A share or an array of shares, in [0, 1].

    Returns:
        An array of the shape of q, after the leading dimensions of counts.

    Raises:
        ValueError: If a share is out of range, or there are no counts.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> from optclip import histograms
        >>> optimizer = optax.chain(optclip.measure_norms(histogram=True), optax.sgd(0.1))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> bool(4.9 < histograms.quantile(state[0].memory, 0.5) < 5.1)
        True
    """
    counts = histogram.counts if isinstance(histogram, NormHistogram) else histogram
    shares = np.asarray(q, np.float64)
    if not hasattr(counts, "shape") or not counts.shape or counts.shape[-1] != BINS:
        raise ValueError(
            f"quantile(histogram=...) must be a NormHistogram or counts of shape (..., {BINS}), "
            "the memory of measure_norms(histogram=True): opt_state[0].memory, in a chain that "
            f"begins with it; got {type(histogram).__name__}"
        )
    counts = np.asarray(counts, np.int64)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"a quantile is a share in [0, 1], got {q!r}; pass 0.9 for the 90th")
    below = np.cumsum(counts, axis=-1)
    total = below[..., -1:]
    # Rounding must not push a whole number of norms up to the next.
    rank = np.maximum(np.ceil(total * shares.ravel() - 1e-9 * total), 1)
    place = (below[..., None, :] < rank[..., None]).sum(-1)
    found = middles()[np.minimum(place, BINS - 1)]
    found = np.where(total > 0, found, np.nan)
    return found.reshape((*counts.shape[:-1], *shares.shape))


def middles() -> np.ndarray:
    """The norm that stands for each bin, shape (2306,): 0, the middles of the bins, infinity."""
    inner = LOWEST * 2.0 ** ((np.arange(BINS - 2) + 0.5) / BINS_PER_OCTAVE)
    return np.concatenate([[0.0], inner, [np.inf]])
