"""Variants that are no public methods: what the defaults of `safeguard` are chosen from.

A line here is a contender with `--candidates`. No clip and the grid of fixed thresholds stay in, to
compare with.
"""

import math
from functools import partial

import optax

import optclip
from benchmarks.proving_ground.contenders import CONTENDERS, Contender, around, before
from optclip import scopes

RATIOS = (0.01, 0.02, 0.03, 0.05, 0.1)
DEVIATIONS = (2.0, 0.0, math.inf)
SCOPES = {"tree": scopes.tree, "unit": scopes.unit()}


def guarded(ratio: float, scope: str) -> Contender:
    """A clip before the optimizer, and a bound on the length of the step that it makes."""
    clip = optclip.robust_clip()
    bound = optclip.clip_by_param_norm(ratio, scope=SCOPES[scope])
    name = f"guarded({ratio:g}, {scope})"
    return Contender(name, lambda optimizer, _: optax.chain(clip, optimizer, bound))


CANDIDATES: tuple[Contender, ...] = (
    *CONTENDERS[:2],
    *(
        around(f"safeguard(ratio={ratio:g})", partial(optclip.safeguard, ratio=ratio))
        for ratio in RATIOS
    ),
    *(
        around(
            f"safeguard(deviations={deviations:g})",
            partial(optclip.safeguard, deviations=deviations),
        )
        for deviations in DEVIATIONS
    ),
    *(
        before(
            f"robust_clip({deviations:g})",
            lambda _, k=deviations: optclip.robust_clip(deviations=k),
        )
        for deviations in (2.0, 0.0, -1.0)
    ),
    *(guarded(ratio, scope) for scope in SCOPES for ratio in (0.01, 0.03)),
)
