"""Small gradients and parameters, a few steps of a clip, and comparisons of trees."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from helpers.registry import METHODS, WRAPPERS, Method
from optclip.testing._subject import quick_options

ALL_METHODS = METHODS + WRAPPERS
T = TypeVar("T")

QUICK = quick_options()
"""Options of XLA's CPU backend."""

SHAPES = {"attention": {"kernel": (6, 4), "query": (2, 3, 4)}, "bias": (4,), "scale": ()}
"""A matrix, a stack of them, a vector and a scalar; two groups by first letter."""

KINDS = {
    "float32": ("float32",) * 4,
    "bfloat16": ("bfloat16",) * 4,
    "float16": ("float16",) * 4,
    "mixed": ("bfloat16", "float32", "bfloat16", "float32"),
}
"""The dtypes of the leaves, in order."""


def once_a_method(prepare: Callable[[Method], T]) -> Callable[[Method], T]:
    """What several tests of one method share, prepared once.

    Only the last method's is kept: tests of one method follow one another.
    """
    last: dict[str, T] = {}

    @functools.wraps(prepare)
    def prepared(method: Method) -> T:
        if str(method) not in last:
            last.clear()
            last[str(method)] = prepare(method)
        return last[str(method)]

    return prepared


def quick_jit(function: Any, **options: Any) -> Any:
    """`jax.jit`, compiled several times as fast by optimizing less.

    For what is asked of a program whatever its speed.
    """
    return jax.jit(function, compiler_options=QUICK, **options)


def detailed(method: Method, **changes: Any) -> optax.GradientTransformationExtraArgs:
    """The method with all that its state can hold."""
    return method.build(**changes, **({"detail": True} if method.takes("detail") else {}))


def gradient(kind: str = "float32", seed: int = 0, scale: float = 1.0) -> Any:
    """Normal entries: at scale 1 every method of the registry clips some, at 1e-3 none."""
    random = np.random.default_rng(seed)
    shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    with np.errstate(over="ignore"):  # What a float16 does not hold is infinite.
        leaves = [
            jnp.asarray(np.asarray(scale * random.normal(size=shape)), dtype)
            for shape, dtype in zip(shapes, KINDS[kind], strict=True)
        ]
    return jax.tree.unflatten(structure, leaves)


def sample_parameters(kind: str = "float32") -> Any:
    """Parameters that fit `gradient`."""
    return gradient(kind, seed=1000)


def shapes_of(tree: Any) -> Any:
    """The tree with `jax.ShapeDtypeStruct`s for arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def specs_of_state(state: Any, params: Any, specs: Any) -> Any:
    """PartitionSpecs for a state: what lies as the parameters do has theirs, the rest is whole.

    Args:
        state: The state of a transformation.
        params: A dict of parameters.
        specs: A dict of their specs.
    """

    def spec(path: Any, x: Any) -> PartitionSpec:
        name = getattr(path[-1], "key", None)
        as_params = name in params and x.shape == params[name].shape
        return specs[name] if as_params else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def stacked(trees: list[Any]) -> Any:
    """A tree of batches from a list of trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree: Any, place: int) -> Any:
    """One tree of a tree of batches."""
    return jax.tree.map(lambda x: x[place], tree)


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, dtypes and shapes, and the same bits."""

    def same(a: np.ndarray, e: np.ndarray, where: str) -> None:
        assert a.tobytes() == e.tobytes(), f"{where}: {a} against {e}"

    compare(actual, expected, same)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """The same structure, dtypes and shapes; float32 to `rtol`, 16-bit floats to their last bit.

    `atol` is for sums in which terms cancel: their roundings are those of the terms.
    """

    def close(a: np.ndarray, e: np.ndarray, where: str) -> None:
        if a.dtype.itemsize == 2 and a.dtype.kind != "i":
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e), where)
            apart = np.abs(_ordinal(a) - _ordinal(e))[np.isfinite(e)]
            assert np.max(apart, initial=0) <= 1, f"{where}: {a} against {e}"
        else:
            np.testing.assert_allclose(a, e, rtol=rtol, atol=atol, err_msg=where)

    compare(actual, expected, close)


def canceled(method: Method) -> float:
    """What multiplications in another order leave in an entry of about 1 in which most cancel."""
    return 2e-6 if method.scope == "matrix" else 0.0


def compare(actual: Any, expected: Any, check: Any) -> None:
    """Compares structures, dtypes and shapes, and calls `check` on each pair of leaves."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        where = jax.tree_util.keystr(path)
        assert a.dtype == e.dtype, where
        assert a.shape == e.shape, where
        check(np.asarray(a), np.asarray(e), where)


def _ordinal(x: np.ndarray) -> np.ndarray:
    """Integers in the order of 16-bit floats, one apart where the floats are neighbors."""
    assert x.dtype in (np.float16, jnp.bfloat16)
    bits = x.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
