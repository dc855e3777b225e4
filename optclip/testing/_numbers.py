"""Contracts of the numbers: types, norms, bounds, 0, infinity, NaN, and what is no number."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from optclip.testing._samples import (
    ROUNDOFF,
    TYPES,
    NotAsked,
    entries,
    falsify,
    first_other,
    in_words,
    l2_of,
    normal,
    require,
    same,
    slack,
    types_of,
    wide,
)
from optclip.testing._subject import Subject, attempt, like, raised

THRESHOLDS = {
    "a float": float,
    "a numpy float64": np.float64,
    "a float32": jnp.float32,
    "a bfloat16": jnp.bfloat16,
}
"""What a threshold may be given as; and as a traced value."""


# Types -------------------------------------------------------------------------------------------


def types_are_kept(subject: Subject) -> Iterator[str]:
    """Updates have the types and shapes of the gradient, whatever those of the parameters."""
    shapes = ((), (3,), (2, 3), (0, 2), (1, 4), (2, 1, 3), (2, 2, 1, 3), (1, 2, 1, 2, 3))
    leaf = st.builds(
        jax.ShapeDtypeStruct, st.sampled_from(shapes), st.sampled_from(TYPES).map(jnp.dtype)
    )
    names = st.sampled_from(("a", "b", "a_kernel", "bias"))

    def holds(drawn: Any) -> None:
        leaves, params_type = drawn
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(params_type)), leaves
        )
        said = f"updates {in_words(leaves)}, parameters of {params_type}"
        _types_kept(said, lambda: _updated(subject.transform, leaves, params), leaves)

    falsify(
        st.tuples(st.dictionaries(names, leaf, min_size=1, max_size=3), st.sampled_from(TYPES[:3])),
        holds,
        subject.examples,
    )
    yield from ()


def types_of_thresholds(subject: Subject) -> Iterator[str]:
    """A threshold of any type gives updates of the gradient's types, and the same ones."""
    subject.need_threshold()
    value = float(jnp.bfloat16(subject.value))  # what every type of threshold holds

    def holds(drawn: Any) -> None:
        kinds, given = drawn
        leaves = [jax.ShapeDtypeStruct((3,), jnp.dtype(kind)) for kind in kinds]
        said = f"updates {in_words(leaves)}, the threshold {given}"
        if given == "traced":
            threshold = jax.ShapeDtypeStruct((), jnp.float32)
            _types_kept(
                said,
                lambda: jax.eval_shape(
                    lambda t, *args: _one_step(subject.build(t), *args), threshold, leaves, leaves
                ),
                leaves,
            )
        else:
            cast = THRESHOLDS[given](value)
            _types_kept(said, lambda: _updated(subject.build(cast), leaves, leaves), leaves)

    falsify(
        st.tuples(
            st.lists(st.sampled_from(TYPES[:3]), min_size=1, max_size=2),
            st.sampled_from((*THRESHOLDS, "traced")),
        ),
        holds,
        subject.examples,
    )
    gradient = normal(seed=3, scale=subject.value, dtype="float16")

    @subject.jit
    def with_each(gradient: Any) -> Any:
        return [
            _one_step(subject.build(cast(value)), gradient, gradient)
            for cast in THRESHOLDS.values()
        ]

    outcomes = attempt("thresholds of every type on float16", lambda: with_each(gradient))
    for given, updates in zip(THRESHOLDS, outcomes, strict=True):
        if other := first_other(updates, outcomes[0]):
            yield f"the threshold {given} instead of a float: {other}"


def _one_step(transform: Any, updates: Any, params: Any) -> Any:
    return transform.update(updates, transform.init(params), params)[0]


def _updated(transform: Any, updates: Any, params: Any) -> Any:
    return jax.eval_shape(lambda *args: _one_step(transform, *args), updates, params)


def _types_kept(said: str, update: Any, leaves: Any) -> None:
    updates = attempt(said, update)
    kept, given = types_of(updates), types_of(leaves)
    if kept == given:
        return
    for after, before in zip(kept[1], given[1], strict=False):
        weak = " (weak)" if after[2] else ""
        require(
            after == before,
            f"{said}: {before[1]}{list(before[0])} came back as {after[1]}{list(after[0])}{weak}",
        )
    require(False, f"{said}: came back as another structure, {kept[0]}")


# Norms -------------------------------------------------------------------------------------------


class InDouble:
    """The same clip with everything in 64 bits, where no norm of float32 entries overflows."""

    def __init__(self, subject: Subject):
        """Compiles nothing yet."""
        self._subject = subject

        def update(updates: Any, state: Any, params: Any) -> Any:
            return subject.build().update(updates, state, params)

        self._update = subject.jit(update)
        self._states: dict[str, Any] = {}

    def __call__(self, updates: Any, params: Any) -> Any:
        """The updates after ordinary steps, for 64-bit copies of what is given."""
        subject = self._subject
        key = str(jax.tree.map(lambda x: (x.shape, x.dtype), updates))
        with jax.enable_x64(True):
            wide_params = jax.tree.map(lambda x: jnp.asarray(wide(x)), params)
            if key not in self._states:
                state = subject.build().init(wide_params)
                for seed in range(subject.steps_before):
                    given = like(params, seed, 0.1)
                    given = jax.tree.map(lambda x: jnp.asarray(wide(x)), given)
                    _, state = self._update(given, state, wide_params)
                self._states[key] = state
            wide_updates = jax.tree.map(lambda x: jnp.asarray(wide(x)), updates)
            found, _ = self._update(wide_updates, self._states[key], wide_params)
            return jax.tree.map(np.asarray, found)


def norms_are_right(subject: Subject) -> Iterator[str]:
    """Entries of any size in any type are clipped as copies of them in 64 bits are."""
    in_double = InDouble(subject)
    for dtype in TYPES[:3] if subject.quick else TYPES:
        params = {"w": normal(seed=5, shapes={"w": (4,)}, dtype=dtype)["w"]}
        try:
            state = subject.warm(params)
        except Exception as error:
            yield f"updates {dtype}[4]: {raised(error)}"
            continue

        def holds(leaf: Any, params: Any = params, state: Any = state) -> None:
            gradient = {"w": leaf}
            said = f"updates {in_words(leaf)}{subject.after}"
            updates, _ = attempt(said, lambda: subject.update(gradient, state, params))
            right = in_double(gradient, params)["w"]
            a = updates["w"]
            # Of what is clipped twice, as by a wrapper, the entries are rounded twice.
            rtol = (1e-4 if subject.learns else 1e-5) + 2 * ROUNDOFF[a.dtype.name]
            close = np.allclose(wide(a), right, rtol, slack(a.dtype), equal_nan=True)
            require(close, f"{said}: became {in_words(a)} where {in_words(right)} is right")

        try:
            falsify(entries(dtype), holds, subject.examples)
        except AssertionError as broken:
            yield str(broken)


def norms_of_many_leaves(subject: Subject) -> Iterator[str]:
    """Rounding does not add up over the leaves of a tree."""
    in_double, count = InDouble(subject), 12
    # In bfloat16 256 + 0.9 is 256: what is added up there loses all leaves but the first.
    sizes = [16.0] + [0.95] * (count - 1)
    gradient = [jnp.full(1, subject.size * size, jnp.bfloat16) for size in sizes]
    params = [jnp.ones(1, jnp.bfloat16)] * count
    said = f"a leaf of bfloat16[1] of {sizes[0] * subject.size:g} and {count - 1} of "
    said += f"{sizes[1] * subject.size:.3g}"
    state = attempt(said, lambda: subject.warm(params))
    updates, _ = attempt(said, lambda: subject.update(gradient, state, params))
    pairs = zip(updates, in_double(gradient, params), strict=True)
    ratios = [float(wide(a)[0] / right[0]) for a, right in pairs if right[0]]
    off = max((abs(ratio - 1) for ratio in ratios), default=0.0)
    if not off < 3 * ROUNDOFF["bfloat16"]:
        why = "; a sum over leaves may be rounded" if off < 0.05 else ""
        yield f"{said}{subject.after}: the updates are {off:.1%} off{why}"


# The bound ---------------------------------------------------------------------------------------


def bound_holds(subject: Subject) -> Iterator[str]:
    """However large a gradient, what comes out of it is no larger than the clip allows."""
    subject.scale  # noqa: B018 - not asked of what never clips
    at = [
        subject.update(
            normal(seed=1, scale=subject.scale * power), subject.started, subject.params
        )[0]
        for power in (1e6, 1e9)
    ]
    sizes = [max(float(np.max(np.abs(wide(x)))) for x in jax.tree.leaves(u)) for u in at]
    if not sizes[1] <= 1.02 * sizes[0]:
        yield (
            f"the largest entry of the updates is {sizes[0]:.4g} for normal entries of "
            f"{1e6 * subject.scale:g}, and {sizes[1]:.4g} for a thousand times that gradient"
        )


def threshold_is_the_bound(subject: Subject) -> Iterator[str]:
    """The norm after clipping is at most the threshold, to a rounding of the entries' type."""
    subject.need_threshold()
    if (measured := subject.measured) is None:
        raise NotAsked("its norm after clipping is none of the usual")
    threshold = float(np.float32(0.3 * subject.value))  # a number that lower types do not hold
    clip = subject.build(threshold)
    update = subject.jit(lambda *args: clip.update(*args))

    def holds(gradient: Any, kind: str = "float32") -> None:
        said = f"updates {in_words(gradient)}"
        params = jax.tree.map(jnp.ones_like, gradient)
        updates, _ = attempt(said, lambda: update(gradient, clip.init(params), params))
        norm = max(measured.norms(updates), default=0.0)
        require(
            norm <= threshold * (1 + ROUNDOFF[kind]) + 4 * slack(kind),
            f"{said}: the {measured.name} is {norm:.7g} after clipping to {threshold:g}",
        )

    for dtype in TYPES[: 3 if subject.quick else 4]:
        try:
            falsify(entries(dtype), lambda leaf, k=dtype: holds({"w": leaf}, k), subject.examples)
        except AssertionError as broken:
            yield str(broken)
    ten = jnp.full(2, 10 * subject.value, jnp.float32)
    holds({"x": {"y": [ten, ten], "z": (ten, {"w": ten[:1]})}, "b": ten, "last": ten})


def small_is_left_alone(subject: Subject) -> Iterator[str]:
    """What is below the threshold comes back bit for bit, negative zeros too."""
    if not subject.is_hard:
        raise NotAsked("it changes small gradients too")
    for scale in (0.0, 1e-3, 1.0):
        gradient = jax.tree.map(lambda x, scale=scale: x * jnp.float32(scale), subject.soft)
        updates, _ = subject.update(gradient, subject.started, subject.params)
        if other := first_other(updates, gradient):
            yield f"normal entries of {subject.size / 1000 * scale:g}: {other}"
    zeros = {kind: jnp.asarray([-0.0, 0.0], kind) for kind in TYPES}
    try:
        updates, _ = subject.update(zeros, subject.warm(zeros), jax.tree.map(jnp.ones_like, zeros))
    except Exception:  # Of other types than one: said by the contract of types.
        return
    if other := first_other(updates, zeros):
        yield f"zeros: {other}"


# 0 and infinity ----------------------------------------------------------------------------------

SIZES = (0.0, 1e-35, 1.0, 1e30)
DIRECTION = np.array([0.6, -0.8], np.float32)


def no_nan_of_finite_numbers(subject: Subject) -> Iterator[str]:
    """Under any threshold, 0 and infinity too, no NaN comes of a gradient of any size."""
    has_threshold = subject.threshold is not None and not subject.learns
    params = {"w": jnp.ones(2)}
    for threshold in (0.0, 1e-35, 1.0, 1e30, math.inf) if has_threshold else (subject.value,):
        for size in SIZES:
            gradient = {"w": jnp.asarray(size * DIRECTION, jnp.float32)}
            said = f"updates {in_words(gradient['w'])}"
            said += f", {subject.threshold}={threshold:g}" if has_threshold else ""
            state = subject.build(threshold if has_threshold else None).init(params)
            updates = gradient
            for _ in range(2):
                updates, state = subject.update_with(threshold, gradient, state, params)
            if np.any(np.isnan(updates["w"])):
                yield f"{said}: became {in_words(updates['w'])}"


def threshold_0_and_infinity(subject: Subject) -> Iterator[str]:
    """A threshold of 0 gives zeros, and one of infinity the gradient."""
    name = subject.need_threshold()
    if subject.learns:
        raise NotAsked("its threshold is learned")
    subject.scale  # noqa: B018 - not asked of what never clips
    gradient = subject.loud
    for threshold in (0.0, math.inf):
        state = subject.build(threshold).init(subject.params)
        updates, _ = subject.update_with(threshold, gradient, state, subject.params)
        right = gradient if threshold else jax.tree.map(lambda x: 0 * jnp.abs(x), gradient)
        found = updates if threshold else jax.tree.map(jnp.abs, updates)
        if other := first_other(found, right):
            yield f"{name}={threshold:g}: {other}"


def derivatives_are_finite(subject: Subject) -> Iterator[str]:
    """Derivatives through the clip are finite, at a gradient of 0 too."""
    weights = normal(seed=7)

    def loss(gradient: Any, state: Any, params: Any) -> Any:
        updates, _ = subject.transform.update(gradient, state, params)
        products = jax.tree.map(lambda w, u: jnp.sum(w * u), weights, updates)
        return jax.tree.reduce(jnp.add, products)

    slope = subject.jit(jax.grad(loss))
    for scale in (0.0, 1e-3, 1.0):
        gradient = jax.tree.map(lambda x, scale=scale: x * jnp.float32(scale), subject.loud)
        found = attempt(
            "jax.grad through it", lambda g=gradient: slope(g, subject.started, subject.params)
        )
        bad = [x for x in jax.tree.leaves(found) if not np.all(np.isfinite(x))]
        if bad:
            which = "0" if not scale else f"normal entries of {scale * subject.size:g}"
            yield f"the derivative at a gradient of {which} is {in_words(bad[-1])}"


# Refusals ----------------------------------------------------------------------------------------


def nonsense_is_refused(subject: Subject) -> Iterator[str]:
    """A threshold that is negative or NaN raises an error, and so do missing parameters."""
    gradient = {"w": jnp.asarray([3.0, 4.0])}
    if subject.threshold is None and not subject.needs_params:
        raise NotAsked("nothing to refuse: no threshold to set, and no parameters needed")
    for nonsense in (-1.0, math.nan) if subject.threshold else ():
        try:
            updates = _one_step(subject.build(nonsense), gradient, gradient)
        except Exception:
            continue
        yield (
            f"{subject.threshold}={nonsense:g} is accepted: {in_words(gradient['w'])} becomes "
            f"{in_words(updates['w'])}"
        )
    if subject.needs_params:
        try:
            subject.transform.update(gradient, subject.transform.init(gradient), None)
        except ValueError:
            return
        except Exception as error:
            yield f"without params: {raised(error)}, where a ValueError would say what is missing"


# NaN ---------------------------------------------------------------------------------------------


def nonfinite_is_all_or_nothing(subject: Subject) -> Iterator[str]:
    """A gradient with a NaN or an infinity comes back whole as it is, or as zeros."""
    for bad in (math.nan, math.inf):
        gradient = {"v": jnp.ones(2), "w": jnp.asarray([1.0, bad, 1.0])}
        params = jax.tree.map(jnp.ones_like, gradient)
        updates, _ = subject.update(gradient, subject.warm(params), params)
        zeros = jax.tree.map(jnp.zeros_like, gradient)
        if first_other(updates, gradient) and first_other(updates, zeros):
            yield f"updates {in_words(gradient)}: became {in_words(updates)}"


def nonfinite_is_forgotten(subject: Subject) -> Iterator[str]:
    """After a step with a NaN everything goes on as without it."""
    params = {"v": jnp.ones(2), "w": jnp.ones(3)}
    shapes = jax.tree.map(jnp.shape, params)
    scale = subject.scale
    for warm_up in (0, subject.steps_before or 20):
        clean = disturbed = subject.fresh(params)
        for step in range(warm_up + 25):
            spike = 1.0 if step >= warm_up and step % 3 == 2 else 0.1
            gradient = normal(seed=step, scale=scale * spike, shapes=shapes)
            if step in (warm_up, warm_up + 3):
                bad = jax.tree.map(lambda x: x.at[0].set(math.nan), gradient)
                _, disturbed = subject.update(bad, disturbed, params)
            right, clean = subject.update(gradient, clean, params)
            updates, disturbed = subject.update(gradient, disturbed, params)
            if other := first_other(updates, right, rtol=1e-6):
                yield f"NaN at steps {warm_up + 1} and {warm_up + 4}; at step {step + 1} {other}"
                break


# What is no number -------------------------------------------------------------------------------


def others_are_not_touched(subject: Subject) -> Iterator[str]:
    """Integers, booleans, float0, None, masked and empty leaves come back as they are."""
    cases = {
        "an integer leaf": jnp.arange(3),
        "a leaf of bytes": jnp.full(2, 7, jnp.uint8),
        "a boolean leaf": jnp.array([True, False]),
        "a float0 leaf": np.zeros(2, jax.dtypes.float0),
        "a leaf without entries": jnp.zeros((0, 3)),
        "a Python integer": 3,
        "None": None,
        "a masked leaf": optax.MaskedNode(),
        "empty containers": [{}, (), []],
    }
    alone: Any = {"w": jnp.asarray([3.0, -4.0]) * subject.value}
    params = {"w": jnp.ones(2)}
    right, _ = subject.transform.update(alone, subject.fresh(params), params)

    def touched(case: str, other: Any) -> str | None:
        gradient, beside = {**alone, "x": other}, {**params, "x": other}
        try:
            updates, _ = subject.transform.update(gradient, subject.fresh(beside), beside)
        except Exception as error:
            return f"{case} beside float32[2]: {raised(error)}"
        for a, r in zip(jax.tree.leaves(updates["x"]), jax.tree.leaves(other), strict=True):
            kept = isinstance(r, int) or types_of(a) == types_of(r)
            if not kept or not (np.size(r) == 0 or np.array_equal(a, r)):
                return f"{case}: became {in_words(a)}"
        if not np.all(same(updates["w"], right["w"])):
            return f"{case}: float32[2] beside it became {in_words(updates['w'])}"
        return None

    if touched("all of these", list(cases.values())):
        yield from filter(None, itertools.starmap(touched, cases.items()))
    empty: tuple[Any, ...] = ({}, (), {"a": None}, {"z": jnp.zeros((0, 2))})
    for tree in empty:
        said = f"the tree {in_words(tree)}"
        try:
            updates, _ = subject.transform.update(tree, subject.fresh(tree), tree)
        except Exception as error:
            yield f"{said}: {raised(error)}"
            continue
        if other := first_other(updates, tree):
            yield f"{said}: {other}"


# Scales ------------------------------------------------------------------------------------------


def scales_with_the_gradient(subject: Subject) -> Iterator[str]:
    """In other units (gradient, and threshold or parameters, times a number) it does the same."""
    ways = [
        (name, *which)
        for name, which in WAYS.items()
        if which[0] is False or (subject.threshold is not None)
    ]
    subject.scale  # noqa: B018 - not asked of what never clips

    def run(factor: float, with_threshold: bool, with_params: bool) -> Any:
        threshold = subject.value * (factor if with_threshold else 1.0)
        params = jax.tree.map(
            lambda x: x * jnp.float32(factor if with_params else 1), subject.params
        )
        state = subject.build(threshold).init(params)
        found = []
        steps = itertools.chain((0.1,) * 12, (1.0, 0.1, 1.0))
        for seed, size in enumerate(steps):
            gradient = normal(seed, scale=subject.scale * size * factor)
            updates, state = subject.update_with(threshold, gradient, state, params)
            found.append(jax.tree.map(lambda x: wide(x) / factor, updates))
        return found

    own = run(1.0, False, False)

    def apart(factor: float, *how: bool) -> float:
        pairs = zip(jax.tree.leaves(run(factor, *how)), jax.tree.leaves(own), strict=True)
        return max(
            float(np.max(np.abs(a - b) / (np.abs(b) + subject.scale * 1e-6))) for a, b in pairs
        )

    for name, *how in ways:
        if apart(4.0, *how) < 1e-4:
            for factor in (2.0**-20, 2.0**20, 2.0**60):
                if (off := apart(factor, *how)) > 1e-3 and not (factor < 1 and how[1]):
                    yield f"{name} times {factor:.3g}: the updates are {off:.2g} off, relatively"
            return
    if subject.threshold is None and not subject.learns:
        raise NotAsked("in which units it clips is not known: its threshold is not")
    name, *how = ways[0]
    norms = [[l2_of(updates) for updates in steps] for steps in (own, run(4.0, *how))]
    step = max(range(len(norms[0])), key=lambda step: abs(norms[1][step] - norms[0][step]))
    yield (
        f"{name} times 4: at step {step + 1} the norm of the updates is {4 * norms[1][step]:.4g}, "
        f"where 4 times {norms[0][step]:.4g} is right"
    )


WAYS: dict[str, tuple[bool, bool]] = {
    "gradient and threshold": (True, False),
    "the gradient": (False, False),
    "gradient and parameters": (False, True),
    "gradient, parameters and threshold": (True, True),
}
"""Whether the threshold and the parameters are measured in the gradient's units."""
