"""Variants that are no public methods: what the defaults of `safeguard` are chosen from.

A line here is a contender with `--candidates`. No clip and the grid of fixed thresholds stay in, to
compare with.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optclip
from benchmarks.proving_ground.contenders import CONTENDERS, Contender, after, around, before
from benchmarks.proving_ground.tasks import transformer
from optclip import scopes, thresholds

RATIOS = (0.001, 0.003, 0.01, 0.03)
SCOPES = {"tree": scopes.tree, "leaf": scopes.leaf, "unit": scopes.unit()}


def annealed(ratio: float, steps: float, least: float = 0.0) -> Any:
    """A ratio that falls like the square root of the step, from about the given one on."""
    return lambda step: jnp.maximum(ratio / jnp.sqrt(1 + step / steps), least)


def relative_to_rms(ratio: Any) -> thresholds.Rule:
    """A bound for each group, whose RMS counts as that of the whole tree where it is smaller.

    So a bias that starts at zero moves as far as its neighbors do.
    """

    def threshold(memory: Any, step: Any, norms: Any, params: Any) -> Any:
        sizes = jnp.asarray(params.sizes, norms.dtype)
        rms = jnp.sqrt(jnp.sum(params.norms**2) / jnp.sum(sizes))
        share: Any = ratio(step.count) if callable(ratio) else ratio
        return share * jnp.maximum(params.norms, jnp.maximum(rms, 1e-3) * jnp.sqrt(sizes))

    return thresholds.constant(jnp.inf)._replace(
        threshold=threshold, needs_params=True, separable=False
    )


def relative_to_mean(ratio: float, decay: float = 0.97) -> optax.GradientTransformation:
    """A bound relative to the running mean of the parameters' norm, instead of the norm now."""

    def update(updates: Any, mean: Any, params: Any) -> tuple[Any, Any]:
        norm = jnp.maximum(optax.tree.norm(params), 1e-3)
        mean = jnp.where(mean > 0, decay * mean + (1 - decay) * norm, norm)
        scale = jnp.minimum(1, ratio * mean / jnp.maximum(optax.tree.norm(updates), 1e-30))
        return jax.tree.map(lambda u: u * scale, updates), mean

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.float32), update)  # pyright: ignore


def guarded(name: str, bound: optax.GradientTransformation) -> Contender:
    """`safeguard` with another bound."""
    clip = optclip.robust_clip()
    return Contender(name, lambda optimizer, _: optax.chain(clip, optimizer, bound))


def seen_by_momentum(name: str, bound: optax.GradientTransformation) -> Contender:
    """`safeguard` with a bound that shrinks the optimizer's momentum as it shrinks the step."""

    def build(optimizer: optax.GradientTransformation, _: Any) -> optax.GradientTransformation:
        clip = optclip.robust_clip()

        def init(params: Any) -> Any:
            return clip.init(params), optimizer.init(params), bound.init(params)

        def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, of_clip = clip.update(updates, state[0], params)
            updates, inner = optimizer.update(updates, state[1], params)
            bounded, of_bound = bound.update(updates, state[2], params)
            shares = jax.tree.map(lambda u, b: jnp.where(u == 0, 1, b / u), updates, bounded)

            def less(moments: Any) -> Any:
                return jax.tree.map(lambda m, share: (m * share).astype(m.dtype), moments, shares)

            def shrunk(part: Any) -> Any:
                if isinstance(part, optax.TraceState):
                    return part._replace(trace=less(part.trace))
                if isinstance(part, optax.ScaleByAdamState):
                    return part._replace(mu=less(part.mu))
                return part

            kinds = (optax.TraceState, optax.ScaleByAdamState)
            inner = jax.tree.map(shrunk, inner, is_leaf=lambda part: isinstance(part, kinds))
            return bounded, (of_clip, inner, of_bound)

        return optax.GradientTransformation(init, update)  # pyright: ignore

    return Contender(name, build)


def by_unit(ratio: Any) -> optax.GradientTransformation:
    """A bound for each unit, relative to its own weights."""
    return optclip.clip_by_param_norm(ratio, scope=scopes.unit())


def by_unit_or_tree(ratio: Any) -> optax.GradientTransformation:
    """The same, relative to the larger of the unit's norm and its share of the tree's."""
    return optclip.clip_by(relative_to_rms(ratio), scope=scopes.unit())


BOUNDS = {
    "tree": optclip.clip_by_param_norm,
    "unit": by_unit,
    "unit or tree": by_unit_or_tree,
}

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
        before(
            f"robust_clip({deviations:g})",
            lambda _, k=deviations: optclip.robust_clip(deviations=k),
        )
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
    *(guarded(f"guarded({ratio:g}, unit)", by_unit(ratio)) for ratio in RATIOS[1:]),
    *(guarded(f"guarded({ratio:g}, unit or tree)", by_unit_or_tree(ratio)) for ratio in RATIOS[1:]),
    *(
        guarded(f"guarded({ratio:g} annealed after {steps}, {name})", bound(annealed(ratio, steps)))
        for ratio, steps in ((0.03, 100), (0.1, 10), (0.1, 100))
        for name, bound in BOUNDS.items()
    ),
    *(
        seen_by_momentum(f"guarded({ratio:g}, {name}, momentum sees it)", bound(ratio))
        for ratio in RATIOS[1:]
        for name, bound in BOUNDS.items()
    ),
    guarded("guarded(0.03 annealed to 0.01, unit)", by_unit(annealed(0.03, 100, 0.01))),
    *(
        guarded(
            f"guarded({ratio:g} cosine, tree)",
            optclip.clip_by_param_norm(optax.cosine_decay_schedule(ratio, transformer.STEPS)),
        )
        for ratio in (0.01, 0.03)
    ),
    guarded("guarded(0.01, running mean)", relative_to_mean(0.01)),
    guarded("guarded(0.03, running mean)", relative_to_mean(0.03)),
)
