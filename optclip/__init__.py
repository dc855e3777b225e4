"""Gradient clipping for JAX: every norm clip as a pure Optax transformation.

    import optax, optclip

    optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.01))

A clip measures norms, asks a rule for a threshold, limits, and lets the rule observe. `clip_by`
runs these four steps; a named method is a composition of `norms`, `scopes`, `thresholds` and
`limiters`. `metrics` reads what a clip did from any optimizer state.
"""

from optclip import histograms, limiters, methods, norms, scopes, thresholds
from optclip.clipping import clip_by
from optclip.methods import *  # noqa: F403 - they are listed there, once
from optclip.methods.clip_by_adam_rms import clip_by_adam_rms, stable_adamw
from optclip.methods.safeguard import safeguard
from optclip.methods.skip_spikes import skip_spikes
from optclip.readings import grew_most, metrics
from optclip.restoring import Restored, restore_state
from optclip.state import ClipState

__version__ = "0.1.0"

__all__ = [
    "ClipState",
    "Restored",
    "clip_by",
    "clip_by_adam_rms",
    "grew_most",
    "histograms",
    "limiters",
    "metrics",
    "norms",
    "restore_state",
    "safeguard",
    "scopes",
    "skip_spikes",
    "stable_adamw",
    "thresholds",
]
__all__ += methods.__all__
