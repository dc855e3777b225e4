"""Gradients to test with, what they are in words, and how far from right an entry may be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROUNDOFF = {"float64": 1e-12, "complex128": 1e-12, "float32": 2e-6, "complex64": 2e-6}
ROUNDOFF |= {"bfloat16": 2.0**-8, "float16": 2.0**-11}
ROUNDOFF |= {"float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}
"""By how much, relatively, an entry may be off in its own type."""

TYPES = ("float32", "bfloat16", "float16", "complex64", "float8_e4m3fn", "float8_e5m2")
"""The types of leaves that a clip has to do with."""

SHAPES = {"a": (8, 4), "b": (24,), "c": (5,)}
"""An ordinary tree, the same for all that compiles: a matrix and two vectors."""


FEW = 12
"""As many entries as are shown in words."""


class Broken(AssertionError):
    """A promise that is not kept; one line with the input that shows it."""


class NotAsked(Exception):
    """What a contract would say does not apply, or cannot be tried here; one line says why."""


def require(kept: Any, said: str) -> None:
    """Raises `Broken` with what is said of a promise that is not kept."""
    if not kept:
        raise Broken(said)


def falsify(strategy: st.SearchStrategy[Any], holds: Callable[[Any], None], examples: int) -> None:
    """Looks for an input for which a promise is not kept, and hands on the smallest.

    The same inputs are tried at every run.

    Args:
        strategy: Where inputs are drawn from.
        holds: Raises `Broken` for an input for which it is not kept.
        examples: How many inputs are drawn.

    Raises:
        Broken: With the smallest input that was found.
    """
    everything: Any = list(HealthCheck)
    tried = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=everything,
    )(given(strategy)(lambda drawn: holds(drawn)))
    tried()


def is_floating(x: Any) -> bool:
    """Whether a leaf has real or complex floating-point entries."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def slack(dtype: Any) -> float:
    """By how much an entry may be off that is too small for its type: flushed, or half a step."""
    limits = jnp.finfo(dtype)
    return 2 * float(limits.tiny) if is_flushed(dtype) else float(limits.smallest_subnormal) / 2


def is_flushed(dtype: Any) -> bool:
    """Whether entries too small for the type become 0 on a CPU, and not the nearest step."""
    return jnp.finfo(dtype).dtype.name in ("float64", "float32", "bfloat16")


def wide(x: Any) -> np.ndarray:
    """The entries in 64 bits."""
    x = np.asarray(x)
    return x.astype(np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64)


def l2_of(tree: Any) -> float:
    """The 2-norm of a tree of real leaves, in 64 bits."""
    return float(np.sqrt(sum(np.sum(np.square(wide(x))) for x in jax.tree.leaves(tree))))


def entries(dtype: str, count: int = 4) -> st.SearchStrategy[Any]:
    """Leaves of so many entries of any normal size, or 0; the smallest example is of small ones."""
    limits = jnp.finfo(dtype)
    exponents = st.integers(int(limits.minexp) + 1, int(limits.maxexp) - 3)
    number = st.one_of(
        st.just(0.0),
        st.builds(
            lambda sign, digits, power: sign * digits * 2.0**power,
            st.sampled_from((1, -1)),
            st.integers(1, 7),
            exponents,
        ),
    )
    parts = 2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1

    def leaf(drawn: list[float]) -> jax.Array:
        x = np.asarray(drawn)
        if parts == 2:
            x = x[:count] + 1j * x[count:]
        return jnp.asarray(x.astype(jnp.dtype(dtype)))

    return st.lists(number, min_size=parts * count, max_size=parts * count).map(leaf)


def normal(seed: int, scale: float = 1.0, dtype: Any = "float32", shapes: Any = None) -> Any:
    """A tree of normal entries, of `SHAPES` or of others."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(np.asarray(scale * random.normal(size=shape)), dtype),
        SHAPES if shapes is None else shapes,
        is_leaf=lambda node: isinstance(node, tuple) and all(isinstance(n, int) for n in node),
    )


def in_words(tree: Any) -> str:
    """A tree of few entries, in one line."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name}: {in_words(x)}" for name, x in tree.items()) + "}"
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return "[" + ", ".join(map(in_words, tree)) + "]"
    if isinstance(tree, jax.ShapeDtypeStruct):
        return f"{tree.dtype}{list(tree.shape)}"
    x: Any = tree
    if not hasattr(x, "dtype"):
        return repr(x)
    if x.dtype == jax.dtypes.float0 or x.size > FEW:
        return f"{x.dtype}{list(x.shape)}"
    return f"{x.dtype}{in_digits(np.asarray(x).tolist())}"


def in_digits(x: Any) -> str:
    """Numbers, and lists of them, in three digits."""
    if isinstance(x, list):
        return "[" + ", ".join(map(in_digits, x)) + "]"
    if isinstance(x, complex):
        return f"{x.real:.3g}{x.imag:+.3g}j"
    return str(x) if isinstance(x, bool | int) else f"{x:.4g}"


def without_keys(tree: Any) -> Any:
    """The tree with the numbers of random keys in their place."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def is_key(x: Any) -> bool:
    """Whether a leaf is of typed random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def types_of(tree: Any) -> tuple[Any, list[Any]]:
    """Structure, and of every leaf shape, dtype and weakness of type."""
    leaves = [
        (x.shape, x.dtype, bool(getattr(x, "weak_type", False)))
        for x in jax.tree.leaves(jax.eval_shape(lambda: tree))
    ]
    return jax.tree.structure(tree), leaves


def first_other(actual: Any, expected: Any, rtol: float = 0.0) -> str | None:
    """The first leaf that is another one, in words; None where two trees are the same.

    Args:
        actual: A tree.
        expected: What it should be.
        rtol: By how much entries may be off, beside the roundoff of their type; 0 asks for the
            same bits.
    """
    actual, expected = without_keys(actual), without_keys(expected)
    structures = jax.tree.structure(actual), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        return f"another structure: {structures[0]} for {structures[1]}"
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        where = jax.tree_util.keystr(path, simple=True, separator="/") or "it"
        if np.shape(a) != np.shape(e) or jnp.result_type(a) != jnp.result_type(e):
            return f"{where} became {in_words(a)} where {in_words(e)} is right"
        if not np.all(alike := same(a, e, rtol)):
            if np.size(a) <= FEW:
                return f"{where} became {in_words(a)} where {in_words(e)} is right"
            place = tuple(map(int, np.argwhere(~alike)[0]))
            one, right = (in_digits(np.asarray(x)[place].tolist()) for x in (a, e))
            return f"{where}{list(place)} became {one} where {right} is right"
    return None


def same(actual: Any, expected: Any, rtol: float = 0.0) -> np.ndarray:
    """Where two leaves of one type are the same to `rtol`, or bit for bit where it is 0."""
    if not np.size(actual) or jnp.result_type(actual) == jax.dtypes.float0:
        return np.ones(np.shape(actual), bool)
    a, e = (np.asarray(jnp.asarray(x)) for x in (actual, expected))
    if not rtol or not jnp.issubdtype(a.dtype, jnp.inexact):
        one, other = (np.frombuffer(x.tobytes(), np.uint8).reshape(x.size, -1) for x in (a, e))
        return np.all(one == other, axis=1).reshape(a.shape)
    allowed = rtol + ROUNDOFF[a.dtype.name]
    return np.isclose(wide(a), wide(e), allowed, slack(a.dtype), equal_nan=True)
