"""The named methods: each a composition of a few lines, with its formula, defaults and source."""

from optclip.methods.clip_by_value import clip_by_value
from optclip.methods.clip_singular_values import clip_singular_values
from optclip.methods.clippy import clippy
from optclip.methods.fixed import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    measure_norms,
    normalize_by_norm,
    smooth_clip,
)
from optclip.methods.learned import (
    adagc,
    autoclip,
    clip_by_moving_average,
    clip_by_quantile,
    clip_by_window,
    robust_clip,
    zclip,
)
from optclip.methods.relative import adaptive_grad_clip, clip_by_param_norm
from optclip.methods.spam_clip import spam_clip

__all__ = [
    "adagc",
    "adaptive_grad_clip",
    "autoclip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_moving_average",
    "clip_by_param_norm",
    "clip_by_quantile",
    "clip_by_value",
    "clip_by_window",
    "clip_singular_values",
    "clippy",
    "measure_norms",
    "normalize_by_norm",
    "robust_clip",
    "smooth_clip",
    "spam_clip",
    "zclip",
]
