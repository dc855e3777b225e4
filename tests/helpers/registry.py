"""Every method, once, with the arguments the contract tests run it with.

A method exists when it is here and every contract test passes over it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optclip
from optclip._numerics import is_floating
from optclip._tree.layout import whole_on_devices_of


class Method(NamedTuple):
    """A method as the contract tests see it.

    Attributes:
        factory: What makes the transformation: any function of that kind.
        arguments: What the tests pass; chosen so that a gradient of a few dozen entries about 1
            is clipped, and one a thousand times smaller is not.
        scope: Which entries share a norm: "tree", "leaf", "unit", "group", "matrix" or "element".
        norm: "l2", "l1", "l3", "linf", "rms" or "spectral".
        traced: The arguments that may be traced values: all numeric ones that set no shape.
        hard: Whether a gradient below the threshold comes back bit for bit.
        scales_up: Whether a small gradient becomes larger.
        has_memory: Whether it learns from earlier steps.
        needs_params: Whether `update` needs the parameters.
        variant: Tells two entries of one method apart.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    arguments: Mapping[str, Any]
    scope: str = "tree"
    norm: str = "l2"
    traced: tuple[str, ...] = ()
    hard: bool = True
    scales_up: bool = False
    has_memory: bool = False
    needs_params: bool = False
    variant: str = ""

    @property
    def threshold(self) -> str | None:
        """The argument that is a threshold itself, in the gradient's units or the parameters'."""
        names = ("max_norm", "max_value", "init")
        if not self.has_memory:
            names += ("max_delta", "threshold", "clipping", "ratio", "target")
        return next((name for name in names if name in self.traced), None)

    @property
    def name(self) -> str:
        """Its public name."""
        return self.factory.__name__

    def build(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation, with some arguments changed."""
        return self.factory(**{**self.arguments, **changes})

    def takes(self, argument: str) -> bool:
        """Whether it has an argument of this name."""
        return argument in inspect.signature(self.factory).parameters

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def by_first_letter(path: str) -> str:
    """The label of a leaf for `clip_by_group_norm`: two leaves often share one."""
    return path[:1]


def second_moments(b2: float = 0.99) -> optax.GradientTransformation:
    """An Adam that keeps its second moments and hands the gradient on, for `clip_by_adam_rms`."""

    def of_zeros(x: Any) -> Any:
        wide = jnp.float64 if x.dtype in (jnp.float64, jnp.complex128) else jnp.float32
        return jnp.zeros_like(x, dtype=wide)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        nu = jax.tree.map(lambda x: of_zeros(x) if is_floating(x) else (), params)
        count = whole_on_devices_of(params, jnp.zeros([], jnp.int32))
        return optax.ScaleByAdamState(count=count, mu=(), nu=nu)

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def averaged(g: Any, v: Any) -> Any:
            if not is_floating(g):
                return v
            size = jnp.abs(g).astype(v.dtype)
            return b2 * v + (1 - b2) * size * size

        nu = jax.tree.map(averaged, updates, state.nu)
        return updates, state._replace(count=state.count + 1, nu=nu)

    return optax.GradientTransformation(init, update)


FIXED = (
    Method(optclip.clip_by_value, {"max_delta": 0.1}, scope="element", traced=("max_delta",)),
    Method(optclip.clip_by_global_norm, {"max_norm": 1.0}, traced=("max_norm",)),
    Method(
        optclip.clip_by_global_norm,
        {"max_norm": 1.0, "ord": 1},
        norm="l1",
        traced=("max_norm",),
        variant="l1",
    ),
    Method(
        optclip.clip_by_global_norm,
        {"max_norm": 0.5, "ord": 3},
        norm="l3",
        traced=("max_norm",),
        variant="l3",
    ),
    Method(
        optclip.clip_by_global_norm,
        {"max_norm": 0.1, "ord": float("inf")},
        norm="linf",
        traced=("max_norm",),
        variant="linf",
    ),
    Method(optclip.clip_by_leaf_norm, {"max_norm": 0.5}, scope="leaf", traced=("max_norm",)),
    Method(
        optclip.clip_by_group_norm,
        {"max_norm": 0.5, "labels": by_first_letter},
        scope="group",
        traced=("max_norm",),
    ),
    Method(
        optclip.clip_by_block_rms,
        {"threshold": 0.1},
        scope="leaf",
        norm="rms",
        traced=("threshold",),
    ),
    Method(
        optclip.adaptive_grad_clip,
        {"clipping": 0.05, "eps": 1e-3},
        scope="unit",
        traced=("clipping", "eps"),
        needs_params=True,
    ),
    Method(optclip.smooth_clip, {"max_norm": 1.0}, traced=("max_norm",), hard=False),
    # Of the leaves of rank 2; the others are left alone.
    Method(
        optclip.clip_singular_values,
        {"max_value": 0.3},
        scope="matrix",
        norm="spectral",
        traced=("max_value",),
        hard=False,
    ),
    Method(
        optclip.normalize_by_norm,
        {"target": 1.0},
        traced=("target",),
        hard=False,
        scales_up=True,
    ),
    Method(optclip.measure_norms, {}),
    Method(optclip.measure_norms, {"histogram": True}, has_memory=True, variant="histogram"),
)

LEARNING = (
    Method(
        optclip.autoclip,
        {"percentile": 90.0, "window": 32},
        traced=("percentile",),
        has_memory=True,
    ),
    Method(
        optclip.clip_by_quantile,
        {"quantile": 0.9, "step_size": 0.2, "init": 0.5},
        traced=("quantile", "step_size", "init"),
        has_memory=True,
    ),
    Method(
        optclip.zclip,
        {"z_threshold": 2.5, "decay": 0.97, "warmup_steps": 25, "patience": 20},
        traced=("z_threshold", "decay", "warmup_steps", "patience"),
        has_memory=True,
    ),
    Method(
        optclip.zclip,
        {
            "z_threshold": 3.0,
            "decay": 0.9,
            "warmup_steps": 5,
            "patience": 20,
            "variant": "max",
            "learn_from": "winsorized",
        },
        traced=("z_threshold", "decay", "warmup_steps", "patience"),
        has_memory=True,
        variant="max",
    ),
    Method(
        optclip.adagc,
        {"relative": 1.05, "decay": 0.98, "warmup_steps": 10, "max_norm": 1.0, "patience": 20},
        scope="leaf",
        traced=("relative", "decay", "warmup_steps", "max_norm", "patience"),
        has_memory=True,
    ),
    Method(
        optclip.clip_by_window,
        {"deviations": 3.0, "window": 32},
        traced=("deviations",),
        has_memory=True,
    ),
    Method(
        optclip.clip_by_moving_average,
        {"multiplier": 2.0, "decay": 0.99, "patience": 20},
        traced=("multiplier", "decay", "patience"),
        has_memory=True,
    ),
    Method(
        optclip.robust_clip,
        {"deviations": 2.0, "decay": 0.97, "max_rise": 0.1},
        traced=("deviations", "decay", "max_rise"),
        has_memory=True,
    ),
    # A bound for every entry; the readings are of the largest entry and the smallest bound.
    Method(
        optclip.spam_clip,
        {"threshold": 50.0, "decay": 0.99, "warmup_steps": 5},
        scope="element",
        traced=("threshold", "decay", "warmup_steps"),
        has_memory=True,
    ),
    # The norm is the largest ratio of an entry to its bound, and the threshold 1.
    Method(
        optclip.clippy,
        {"relative": 0.1, "absolute": 1e-3},
        scope="leaf",
        norm="linf",
        traced=("relative", "absolute"),
        needs_params=True,
    ),
    Method(
        optclip.clip_by_param_norm,
        {"ratio": 0.05, "eps": 1e-3},
        traced=("ratio", "eps"),
        needs_params=True,
    ),
)
"""A threshold that is learned, or a bound relative to the parameters."""

METHODS = FIXED + LEARNING

WRAPPERS = (
    Method(
        optclip.skip_spikes,
        {"inner": optax.identity(), "deviations": 6.0, "window": 32, "patience": 20},
        traced=("deviations", "patience"),
        has_memory=True,
    ),
    Method(
        optclip.safeguard,
        {"inner": optax.identity(), "deviations": 2.0, "ratio": 0.05},
        traced=("deviations", "ratio"),
        has_memory=True,
        needs_params=True,
    ),
    Method(
        optclip.clip_by_adam_rms,
        {"inner": second_moments(), "threshold": 3.0, "eps": 1e-8, "nonfinite": "skip"},
        scope="leaf",
        norm="rms",
        traced=("threshold", "eps"),
        has_memory=True,
    ),
)
"""Wrappers of optimizers, around one that changes nothing."""


def _one_of_each_kind(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    def kind(method: Method) -> Any:
        own = method.factory if method in WRAPPERS or method.variant == "histogram" else None
        return method.scope, method.norm, method.hard, method.has_memory, method.needs_params, own

    return tuple({kind(method): method for method in reversed(methods)}.values())[::-1]


ONE_OF_EACH_KIND = _one_of_each_kind(METHODS + WRAPPERS)
"""Of methods that differ only in the rule for the threshold the first.

For tests of how devices, platforms and exported programs measure and multiply. That every method
is right on a mesh and in `shard_map` is among what `test_public_suite.py` asks.
"""

WITHOUT_METHOD = {
    "ClipState",
    "Restored",
    "clip_by",
    "grew_most",
    "metrics",
    "restore_state",
    "stable_adamw",
} | {
    "histograms",
    "limiters",
    "norms",
    "scopes",
    "thresholds",
}
"""Public names that are no methods."""


def numeric_arguments(method: Method) -> set[str]:
    """The arguments of a method that are numbers and set no shape, by its signature."""
    plumbing = {"axis_name", "sharded", "nonfinite", "detail", "axis", "ord", "labels"}
    plumbing |= {"scope", "norm", "window", "learn_from", "variant", "histogram", "inner"}
    return set(inspect.signature(method.factory).parameters) - plumbing
