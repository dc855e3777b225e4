"""Gradient clipping for JAX: every norm clip as a pure Optax transformation.

    import optax, optclip

    optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.01))

A clip measures norms, asks a rule for a threshold, limits, and lets the rule observe. `clip_by`
runs these four steps; a named method is a composition of `norms`, `scopes`, `thresholds` and
`limiters`. `metrics` reads what a clip did from any optimizer state.
"""

from optclip import histograms, limiters, norms, scopes, thresholds
from optclip.clipping import clip_by
from optclip.methods import (
    adagc,
    adaptive_grad_clip,
    autoclip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_moving_average,
    clip_by_param_norm,
    clip_by_quantile,
    clip_by_value,
    clip_by_window,
    clippy,
    measure_norms,
    robust_clip,
    smooth_clip,
    spam_clip,
    zclip,
)
from optclip.methods.safeguard import safeguard
from optclip.methods.skip_spikes import skip_spikes
from optclip.readings import metrics
from optclip.state import ClipState

__version__ = "0.1.0"

__all__ = [
    "ClipState",
    "adagc",
    "adaptive_grad_clip",
    "autoclip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_moving_average",
    "clip_by_param_norm",
    "clip_by_quantile",
    "clip_by_value",
    "clip_by_window",
    "clippy",
    "histograms",
    "limiters",
    "measure_norms",
    "metrics",
    "norms",
    "robust_clip",
    "safeguard",
    "scopes",
    "skip_spikes",
    "smooth_clip",
    "spam_clip",
    "thresholds",
    "zclip",
]
