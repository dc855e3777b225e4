"""Every method, once, with the arguments the contract tests run it with.

A method exists when it is here and every contract test passes over it.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

import optclip


class Method(NamedTuple):
    """A method as the contract tests see it.

    Attributes:
        name: Its public name.
        arguments: What the tests pass; chosen so that a gradient of a few dozen entries about 1
            is clipped, and one a thousand times smaller is not.
        scope: Which entries share a norm: "tree", "leaf", "unit", "group" or "element".
        norm: "l2", "l1", "l3", "linf" or "rms".
        traced: The arguments that may be traced values: all numeric ones that set no shape.
        hard: Whether a gradient below the threshold comes back bit for bit.
        has_memory: Whether it learns from earlier steps.
        needs_params: Whether `update` needs the parameters.
        variant: Tells two entries of one method apart.
    """

    name: str
    arguments: Mapping[str, Any]
    scope: str = "tree"
    norm: str = "l2"
    traced: tuple[str, ...] = ()
    hard: bool = True
    has_memory: bool = False
    needs_params: bool = False
    variant: str = ""

    def build(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation, with some arguments changed."""
        return getattr(optclip, self.name)(**{**self.arguments, **changes})

    def takes(self, argument: str) -> bool:
        """Whether it has an argument of this name."""
        return argument in inspect.signature(getattr(optclip, self.name)).parameters

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def by_first_letter(path: str) -> str:
    """The label of a leaf for `clip_by_group_norm`: two leaves often share one."""
    return path[:1]


METHODS = (
    Method("clip_by_value", {"max_delta": 0.1}, scope="element", traced=("max_delta",)),
    Method("clip_by_global_norm", {"max_norm": 1.0}, traced=("max_norm",)),
    Method(
        "clip_by_global_norm",
        {"max_norm": 1.0, "ord": 1},
        norm="l1",
        traced=("max_norm",),
        variant="l1",
    ),
    Method(
        "clip_by_global_norm",
        {"max_norm": 0.5, "ord": 3},
        norm="l3",
        traced=("max_norm",),
        variant="l3",
    ),
    Method(
        "clip_by_global_norm",
        {"max_norm": 0.1, "ord": float("inf")},
        norm="linf",
        traced=("max_norm",),
        variant="linf",
    ),
    Method("clip_by_leaf_norm", {"max_norm": 0.5}, scope="leaf", traced=("max_norm",)),
    Method(
        "clip_by_group_norm",
        {"max_norm": 0.5, "labels": by_first_letter},
        scope="group",
        traced=("max_norm",),
    ),
    Method(
        "clip_by_block_rms", {"threshold": 0.1}, scope="leaf", norm="rms", traced=("threshold",)
    ),
    Method(
        "adaptive_grad_clip",
        {"clipping": 0.05, "eps": 1e-3},
        scope="unit",
        traced=("clipping", "eps"),
        needs_params=True,
    ),
    Method("smooth_clip", {"max_norm": 1.0}, traced=("max_norm",), hard=False),
    Method("measure_norms", {}),
)

WITHOUT_METHOD = {"ClipState", "clip_by", "limiters", "metrics", "norms", "scopes", "thresholds"}
"""Public names that are no methods."""


def numeric_arguments(method: Method) -> set[str]:
    """The arguments of a method that are numbers and set no shape, by its signature."""
    plumbing = {"axis_name", "sharded", "nonfinite", "detail", "axis", "ord", "labels"}
    plumbing |= {"scope", "norm", "window", "learn_from", "variant", "histogram", "inner"}
    return set(inspect.signature(getattr(optclip, method.name)).parameters) - plumbing
