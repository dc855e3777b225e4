"""Gradients of every shape, type and magnitude: hypothesis strategies, and fixed trees.

`structures` draws any tree of shapes and dtypes; tests that compile take one of the fixed `TREES`
and fill it with drawn `fillings`, so that a compiled clip serves every example.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64")
"""Every type of leaf that is clipped without 64-bit types."""

SHAPES = ((), (0,), (1,), (5,), (0, 3), (3, 4), (1, 4), (4, 1), (2, 1, 3), (3, 2, 2), (2, 3, 0, 2))
SHAPES += ((2, 2, 1, 3), (1, 2, 1, 2, 3), (2, 1, 2, 1, 2, 2))
"""Scalars, leaves without entries, axes of length 1, up to rank 6."""

KINDS = ("ordinary", "zeros", "huge", "tiny", "mixed", "largest")
"""Sorts of values: about 1, all 0, about 1e30, about 1e-30, from one end of the range to the other,
and at its very end, where four float32 entries have a norm that is none."""


def few(examples: int = 15) -> settings:
    """Settings for a test that pays for every example: few of them, the same at every run.

    Function-scoped fixtures are allowed: `strict` holds for all examples alike.
    """
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def spec(shape: tuple[int, ...], dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    """A leaf's shape and dtype."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


TREES: dict[str, Any] = {
    "nested": {
        "a": {"kernel": spec((3, 4)), "bias": spec((4,))},
        "b": [spec((2, 1, 3)), (), spec(())],
        "c": (spec((0, 3)), spec((1, 2, 1, 2, 3)), {"row": spec((1, 4)), "none": None}),
        "d": (spec((2, 1, 2, 1, 2, 2)), spec((2,), jnp.complex64)),
    },
    "small": {"a": spec((3, 4)), "b": [spec((4,)), spec((2,), jnp.complex64)]},
    "types": {
        "a": {"float32": spec((3, 4)), "bfloat16": spec((4,), jnp.bfloat16)},
        "c": {"complex64": spec((2, 2), jnp.complex64)},
        "f": [spec((2, 3, 2), jnp.float16), spec((5,), jnp.float8_e4m3fn)],
        "g": (spec((), jnp.float8_e5m2), spec((3, 3), jnp.bfloat16)),
    },
}
"""Trees that stay the same, so that a compiled clip can be used again."""


def structures(types: tuple[str, ...] = TYPES) -> st.SearchStrategy[Any]:
    """Nested dicts, lists and tuples of `jax.ShapeDtypeStruct`s, empty ones too."""
    leaf = st.builds(spec, st.sampled_from(SHAPES), st.sampled_from(types))
    nested = st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.dictionaries(st.sampled_from(("a", "b", "a_kernel", "bias")), inner, max_size=3)
            | st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=6,
    )
    return nested.filter(lambda tree: tree is not None)


def fillings() -> st.SearchStrategy[tuple[tuple[str, ...], int]]:
    """A sort of values for each leaf in turn, and a seed."""
    kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=7).map(tuple)
    return st.tuples(kinds, st.integers(0, 2**16))


def values(
    tree: Any, kinds: tuple[str, ...] = ("ordinary",), seed: int = 0, scale: float = 1.0
) -> Any:
    """A tree of arrays for a tree of specs; the leaves take the `kinds` in turn.

    All values are finite and zero or normal in the leaf's type: what would overflow or be
    subnormal is held to nearly the largest and to the smallest normal number.
    """
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(tree)
    filled = [
        leaf_of(x, kinds[place % len(kinds)], random, scale) for place, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, filled)


def leaf_of(
    spec: jax.ShapeDtypeStruct, kind: str, random: np.random.Generator, scale: float = 1.0
) -> jax.Array:
    """One leaf."""
    if jnp.issubdtype(spec.dtype, jnp.complexfloating):
        parts = [part_of(spec.shape, spec.dtype, kind, random, scale) for _ in range(2)]
        return jnp.asarray(parts[0] + 1j * parts[1], spec.dtype)
    return jnp.asarray(part_of(spec.shape, spec.dtype, kind, random, scale).astype(spec.dtype))


def part_of(
    shape: tuple[int, ...], dtype: Any, kind: str, random: np.random.Generator, scale: float
) -> np.ndarray:
    """The real or imaginary part of a leaf, in float64, within the normal range of its type."""
    limits = jnp.finfo(dtype)
    normal = random.normal(size=shape)
    powers = {"huge": 30.0, "tiny": -30.0, "mixed": random.uniform(-37, 37, shape), "largest": 40.0}
    sizes = scale * np.abs(normal) * 10.0 ** np.asarray(powers.get(kind, 0.0))
    held = np.clip(sizes, float(limits.tiny), 0.9 * float(limits.max))
    return np.zeros(shape) if kind == "zeros" else np.copysign(held, normal)


def parameters(tree: Any, seed: int = 1000) -> Any:
    """Ordinary parameters that fit a gradient."""
    return values(tree, seed=seed)
