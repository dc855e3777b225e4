"""The oracle of every method in the registry, which takes the method's own arguments."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from helpers.registry import Method

from oracles import learned
from oracles.clips import (
    Clip,
    EntryClip,
    Group,
    SingularValueClip,
    fan_in_axes,
    moduli,
    normalize,
    smooth,
)


def clip_by_value(max_delta: float) -> Clip:
    return EntryClip(max_delta)


def clip_by_global_norm(max_norm: float, ord: float | None = None) -> Clip:
    return Clip(max_norm, kind="linf" if ord == math.inf else f"l{2 if ord is None else ord:g}")


def clip_by_leaf_norm(max_norm: float) -> Clip:
    return Clip(max_norm, "leaf")


def clip_by_group_norm(max_norm: float, labels: Callable[[str], Any]) -> Clip:
    return Clip(max_norm, "group", label=labels)


def clip_by_block_rms(threshold: float) -> Clip:
    return Clip(threshold, "leaf", "rms")


def adaptive_grad_clip(
    clipping: float, eps: float = 1e-3, axis: Callable[..., Any] = fan_in_axes
) -> Clip:
    return Clip(lambda size, entries: clipping * max(size, eps), "unit", axes=axis)


def clip_by_param_norm(ratio: float, eps: float = 1e-3) -> Clip:
    return Clip(lambda size, entries: ratio * max(size, eps * math.sqrt(entries)))


def smooth_clip(max_norm: float) -> Clip:
    return Clip(max_norm, limiter=smooth)


def clip_singular_values(max_value: float) -> Clip:
    return SingularValueClip(max_value)


def normalize_by_norm(target: float) -> Clip:
    return Clip(target, limiter=normalize)


def measure_norms(histogram: bool = False) -> Clip:
    return Clip(math.inf)


class Clippy(Clip):
    """A tensor times min(1, min_i (rho |w_i| + alpha) / |u_i|): its norm is the largest inverse."""

    def __init__(self, relative: float = 0.1, absolute: float = 1e-7):
        super().__init__(1.0, "leaf")
        self.relative, self.absolute = relative, absolute

    def measure(self, tree: Any, params: Any, group: Group) -> float:
        leaves, weights = jax.tree.leaves(tree), jax.tree.leaves(params)
        largest = 0.0
        for place, _ in group:
            bounds = self.relative * moduli(weights[place]) + self.absolute
            for size, bound in zip(moduli(leaves[place]).tolist(), bounds.tolist(), strict=True):
                largest = max(largest, (size / bound if bound else math.inf) if size else 0.0)
        return largest


class Spam(EntryClip):
    """sign(u) min(|u|, sqrt(theta v)), v an average of the clipped u^2 (arXiv:2501.06842).

    v starts at 0, and an entry whose v is 0 is not clipped; nor is any in the first steps. With
    "raw" v learns from u as it came.
    """

    def __init__(
        self,
        threshold: float = 5000.0,
        decay: float = 0.999,
        warmup_steps: float = 20,
        learn_from: str = "clipped",
    ):
        super().__init__()
        self.theta, self.decay, self.warmup_steps = threshold, decay, warmup_steps
        self.learn_from, self.steps, self.moments = learn_from, 0, {}

    def bounds(self, sizes: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        bounds = {}
        for place, size in sizes.items():
            v = self.moments.get(place, np.zeros(size.shape))
            acting = (v > 0) & (self.steps >= self.warmup_steps)
            bounds[place] = np.where(acting, np.sqrt(self.theta * v), np.inf)
            seen = size if self.learn_from == "raw" else np.minimum(size, bounds[place])
            self.moments[place] = self.decay * v + (1 - self.decay) * seen**2
        self.steps += 1
        return bounds


class Learned(Clip):
    """The whole gradient, by an oracle that learns from its norms, of `learned`."""

    def __init__(self, learner: Any):
        super().__init__()
        self.learner = learner

    def thresholds(self, norms: list[float], params: Any, groups: list[Group]) -> list[float]:
        # A gradient of zeros teaches nothing, and is not shown to the learner.
        return [self.learner.step(norm)[0] if norm > 0 else math.nan for norm in norms]


class LearnedByLeaf(Learned):
    """Every leaf by itself, likewise."""

    def __init__(self, learner: Any):
        super().__init__(learner)
        self.scope = "leaf"

    def thresholds(self, norms: list[float], params: Any, groups: list[Group]) -> list[float]:
        return self.learner.step(norms)[0]


def learning(learner: Callable[..., Any], wrap: Callable[[Any], Clip] = Learned) -> Any:
    """An oracle that builds `learner` with a method's arguments."""
    return lambda **arguments: wrap(learner(**arguments))


ORACLES: dict[str, Callable[..., Clip]] = {
    **{name: learning(learner) for name, learner in learned.OF_THE_NORM.items()},
    "adagc": learning(learned.AdaGC, LearnedByLeaf),
    "adaptive_grad_clip": adaptive_grad_clip,
    "clip_by_block_rms": clip_by_block_rms,
    "clip_by_global_norm": clip_by_global_norm,
    "clip_by_group_norm": clip_by_group_norm,
    "clip_by_leaf_norm": clip_by_leaf_norm,
    "clip_by_param_norm": clip_by_param_norm,
    "clip_by_value": clip_by_value,
    "clip_singular_values": clip_singular_values,
    "clippy": Clippy,
    "measure_norms": measure_norms,
    "normalize_by_norm": normalize_by_norm,
    "smooth_clip": smooth_clip,
    "spam_clip": Spam,
}


def oracle_of(method: Method, **changes: Any) -> Clip:
    """A fresh oracle for an entry of the registry."""
    return ORACLES[method.name](**{**method.arguments, **changes})
