"""Variants that are no public methods: what the defaults of `safeguard` are chosen from.

A line here is a contender with `--candidates`. No clip and the grid of fixed thresholds stay in, to
compare with.
"""

from functools import partial

import optclip
from benchmarks.proving_ground.contenders import CONTENDERS, Contender, after, around, before
from optclip import scopes

RATIOS = (0.001, 0.003, 0.01, 0.03)
SCOPES = {"tree": scopes.tree, "leaf": scopes.leaf, "unit": scopes.unit()}

CANDIDATES: tuple[Contender, ...] = (
    *CONTENDERS[:2],
    *(
        around(
            f"safeguard(deviations={deviations:g}, ratio={ratio:g})",
            partial(optclip.safeguard, deviations=deviations, ratio=ratio),
        )
        for deviations in (2.0, 0.0)
        for ratio in RATIOS
    ),
    *(
        before(f"robust_clip({deviations:g})", lambda _, k=deviations: optclip.robust_clip(k))
        for deviations in (2.0, 0.0, -1.0)
    ),
    *(
        after(
            f"clip_by_param_norm({ratio:g}, {name})",
            lambda _, ratio=ratio, scope=scope: optclip.clip_by_param_norm(ratio, scope=scope),
        )
        for name, scope in SCOPES.items()
        for ratio in RATIOS[1:]
    ),
)
