"""The adaptive rules, and how they are driven: through the real update of the method."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks import dynamics_streams
from benchmarks.dynamics_streams import Streams
from optclip.thresholds import LearnFrom
from optclip.thresholds.outliers import ZVariant


class Family(NamedTuple):
    """Rules that differ in one number, and so are driven by one program.

    Attributes:
        names: Of the rules; the method, then what tells its variants apart.
        build: From the number to the transformation.
        values: The number of each rule.
        leaves: Into how many equal leaves a norm is split.
        most_seeds: The most seeds it is driven with; None for all. A rule that is slow to drive.
        most_steps: The most steps, likewise.
    """

    names: tuple[str, ...]
    build: Callable[[Any], optax.GradientTransformationExtraArgs]
    values: tuple[float, ...] = (0.0,)
    leaves: int = 1
    most_seeds: int | None = None
    most_steps: int | None = None


class Traces(NamedTuple):
    """What a rule did in every stream; arrays of shape (seeds, steps).

    Attributes:
        norms: The norms that went in.
        thresholds: The threshold of each step, for the norm of the whole gradient.
        outputs: The norms that came out.
    """

    norms: Streams
    thresholds: Streams
    outputs: Streams


def _single(name: str, build: Callable[[], Any], leaves: int = 1) -> Family:
    return Family((name,), lambda _: build(), leaves=leaves)


def _zclip(variant: ZVariant, **learning: Any) -> Family:
    how = learning.get("learn_from") or f"patience={learning['patience']}"
    return _single(f"zclip {variant} {how}", lambda: optclip.zclip(variant=variant, **learning))


def _families() -> Iterator[Family]:
    yield _single("fixed 1.5", lambda: optclip.clip_by_global_norm(1.5))
    # It sorts 1,024 norms at every step, a thousand times the work of the others. Its threshold
    # depends on no more than those 1,024 norms, so that nothing new happens after 2,200 steps.
    yield Family(
        ("autoclip p10", "autoclip p90"),
        optclip.autoclip,
        values=(10.0, 90.0),
        most_seeds=3,
        most_steps=2200,
    )
    yield _single("clip_by_quantile", optclip.clip_by_quantile)
    for variant in get_args(ZVariant):
        for learn_from in ("clipped", "raw", "winsorized"):
            yield _zclip(variant, learn_from=learn_from)
        yield _zclip(variant, patience=20)
    yield _single("adagc", optclip.adagc, leaves=3)
    for learn_from in ("raw", "clipped"):
        yield _single(f"clip_by_window {learn_from}", _window(learn_from))
    yield _single("clip_by_moving_average", optclip.clip_by_moving_average)
    yield _single("robust_clip", optclip.robust_clip)


def _window(learn_from: LearnFrom) -> Callable[[], optax.GradientTransformationExtraArgs]:
    return lambda: optclip.clip_by_window(learn_from=learn_from)


FAMILIES = tuple(_families())
NAMES = tuple(name for family in FAMILIES for name in family.names)


def chosen(names: list[str] | None) -> list[Family]:
    """The families with the rules that the caller named; all of them for None.

    Args:
        names: Each the full name of a rule, or its first words: "zclip mean" means four rules.

    Returns:
        Families cut down to these rules, in the order of the table.

    Raises:
        ValueError: If a name fits no rule.
    """
    for name in names or ():
        if not any(_fits(rule, name) for rule in NAMES):
            raise ValueError(f"no rule is called {name!r}; there are: {', '.join(NAMES)}")
    families = []
    for family in FAMILIES:
        rules = [
            (rule, value)
            for rule, value in zip(family.names, family.values, strict=True)
            if names is None or any(_fits(rule, name) for name in names)
        ]
        if rules:
            kept, values = zip(*rules, strict=True)
            families.append(family._replace(names=kept, values=values))
    return families


def _fits(rule: str, name: str) -> bool:
    return f"{rule} ".startswith(f"{name} ")


def drive(family: Family, streams: Streams) -> dict[str, Traces]:
    """Runs the rules of a family through all streams.

    One jitted scan over the steps, mapped over streams, seeds and the rules of the family.

    Args:
        family: The rules.
        streams: Norms of shape (seeds, steps), all of one shape.

    Returns:
        A mapping from the rules' names to what they did.
    """
    streams = dynamics_streams.shortened(
        streams,
        family.most_seeds or len(next(iter(streams.values()))),
        family.most_steps or next(iter(streams.values())).shape[1],
    )
    split = math.sqrt(family.leaves)

    def through(value: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        transform = family.build(value)
        like = [jnp.zeros(1, norms.dtype)] * family.leaves

        def step(state: Any, norm: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            gradient = [jnp.reshape(norm / split, 1)] * family.leaves
            _, state = transform.update(gradient, state)
            readings = optclip.metrics(state)
            threshold = readings["clip/threshold"] * split
            return state, (threshold, readings["clip/clipped_norm"])

        return jax.lax.scan(step, transform.init(like), norms)[1]

    over_lanes = jax.vmap(through, in_axes=(None, 0))
    over_rules = jax.jit(jax.vmap(over_lanes, in_axes=(0, None)))
    lanes = jnp.asarray(np.concatenate(list(streams.values())))
    thresholds, outputs = over_rules(jnp.asarray(family.values, jnp.float32), lanes)
    return {
        name: Traces(streams, _by_stream(thresholds[i], streams), _by_stream(outputs[i], streams))
        for i, name in enumerate(family.names)
    }


def _by_stream(lanes: jax.Array, streams: Streams) -> Streams:
    parts = np.split(np.asarray(lanes), len(streams))
    return dict(zip(streams, parts, strict=True))
