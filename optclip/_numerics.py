"""Arithmetic on leaves and norms that stays right at every magnitude and cheap under XLA."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from optclip import _jax

Axes = tuple[int, ...]


def accumulator(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype a leaf is measured and rescaled in: float32, or float64 for 64-bit leaves."""
    if dtype in (jnp.float64, jnp.complex128):
        return jnp.dtype(jnp.float64)
    return jnp.dtype(jnp.float32)


def wide_dtype(x: jax.Array, dtype: np.dtype | None = None) -> np.dtype:
    """The accumulator dtype of `x` (or `dtype`), or the complex one of the same precision."""
    dtype = accumulator(x.dtype) if dtype is None else dtype
    if jnp.iscomplexobj(x):
        return jnp.dtype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    return dtype


def widened(x: jax.Array, dtype: np.dtype | None = None) -> jax.Array:
    """`x` in its `wide_dtype`."""
    wide = wide_dtype(x, dtype)
    return x if x.dtype == wide else x.astype(wide)


def computed_anew(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, to XLA different ones: what is computed from them is computed anew.

    XLA computes once what several passes over a leaf have in common, and writes it to memory: a
    leaf's worth of bytes written and read again, where computing it a second time in the register
    costs nothing. Each of these places had such a temporary array before it had a barrier:

    - A cast. A bfloat16 leaf widened to measure it (`norms`) and to rescale it (`_tree.limit`)
      would be one float32 copy of the whole gradient.
    - A broadcast. A scalar that multiplies several leaves of one shape is broadcast once for all
      of them (`unshared`); so are the powers, bounds and constants of `norms`, `_tree` and
      `methods.clippy`, which pass together with the leaf.
    - A bound for each entry, by which `methods.spam_clip` first counts and then clips.
    - `0 * x`, which is no 0 where x is not finite (`peak`): as constant it is folded.
    """
    return lax.optimization_barrier(arrays)


def cast_anew(leaves: list[jax.Array]) -> list[jax.Array]:
    """The same leaves, whose casts XLA shares with no other pass over them.

    For a CPU only: XLA for a GPU casts in every kernel, and what an optimizer hands on would be
    written to memory first.
    """
    return [x if x.dtype == wide_dtype(x) else computed_anew(x)[0] for x in leaves]


def unshared(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, each a different one to XLA, even where one stands there several times."""
    distinct = len({id(x) for x in arrays}) == len(arrays)
    return arrays if distinct else list(computed_anew(*arrays))


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` times a real factor, a complex `x` part by part: inf times a complex 1 would be NaN."""
    if jnp.iscomplexobj(x):
        return lax.complex(scaled(x.real, factor), scaled(x.imag, factor))
    return x * (factor if factor.dtype == x.dtype else factor.astype(x.dtype))


def scaled_opaquely(x: jax.Array, scale: jax.Array, floor: jax.Array) -> jax.Array:
    """`x` times `scale`, a product that XLA does not take apart.

    Of the square of a leaf that it knows to be constant (zeros, from a frozen part of a model) it
    would take out the square of the scale: infinity, times 0.

    Args:
        x: The leaf.
        scale: Above 0.
        floor: Minus infinity, which XLA must not know.
    """
    if jnp.iscomplexobj(x):
        parts = (scaled_opaquely(part, scale, floor) for part in (x.real, x.imag))
        return lax.complex(*parts)
    return jnp.maximum(scaled(x, scale), lax.stop_gradient(floor).astype(x.dtype))


def modulus(x: jax.Array) -> jax.Array:
    """|x|, with derivative 0 at 0 for complex entries too (jnp.abs gives NaN there)."""
    if not jnp.iscomplexobj(x):
        return jnp.abs(x)
    zero = x == 0
    return jnp.where(zero, 0, jnp.abs(jnp.where(zero, jnp.ones_like(x), x)))


def sum_along(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=len(axes) < x.ndim)


def max_along(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.max(x, axis=axes, keepdims=len(axes) < x.ndim)


@jax.custom_jvp
def square_root(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0, in a form that XLA fuses into a reduction."""
    return jnp.sqrt(x)


@square_root.defjvp
def _square_root_jvp(primals: tuple[jax.Array], tangents: tuple[Any]) -> Any:
    root = square_root(primals[0])
    zero = root == 0
    return root, jnp.where(zero, 0, 0.5 / jnp.where(zero, 1, root)) * tangents[0]


def peak(sizes: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """The largest of `sizes` along `axes`; infinity where an entry of `x` is not finite.

    Args:
        sizes: At least 0, made of `x`, and not finite where that is not.
        x: A leaf with entries.
        axes: The axes, which are dropped where they are all and kept otherwise.
    """
    own = {"cpu": _peak_and_sum, "default": _peak_at_once}
    return by_platform({k: functools.partial(way, axes) for k, way in own.items()}, sizes, x)


def _peak_at_once(axes: Axes, sizes: jax.Array, x: jax.Array) -> jax.Array:
    del x
    return max_along(infinite_unless_finite(sizes), axes)


def _peak_and_sum(axes: Axes, sizes: jax.Array, x: jax.Array) -> jax.Array:
    """A maximum on a CPU passes over NaN, and comparing first takes it five times as long.

    A sum does not: 0 * x adds nothing where x is finite and NaN elsewhere. It reads the leaf once
    more.
    """
    x, nothing = computed_anew(x, jnp.zeros([], accumulator(x.dtype)))
    zero = scaled(widened(x), nothing)
    poison = sum_along(zero.real if jnp.iscomplexobj(zero) else zero, axes)
    return jnp.where(jnp.isnan(poison), jnp.inf, max_along(sizes, axes))


def infinite_unless_finite(sizes: jax.Array) -> jax.Array:
    """Sizes with infinity, which no maximum passes over, in place of NaN."""
    return jnp.where(jnp.isfinite(sizes), sizes, jnp.inf)


def power_of_two(scale: jax.Array) -> jax.Array:
    """About the same scale, by which a number of any type is multiplied without rounding."""
    bits = jnp.finfo(scale.dtype).nexp
    return lax.stop_gradient(lax.reduce_precision(scale, exponent_bits=bits, mantissa_bits=0))


def largest(dtype: jax.typing.DTypeLike) -> float:
    """The largest finite number of `dtype`."""
    return float(jnp.finfo(dtype).max)


def narrowed(norms: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Norms in another float type; what is finite stays so, at most its largest number."""
    if norms.dtype == dtype:
        return norms
    most = min(largest(dtype), largest(norms.dtype))
    return jnp.where(jnp.isfinite(norms), jnp.minimum(norms, most), norms).astype(dtype)


def where_needed(
    needed: jax.Array, compute: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any
) -> Any:
    """One of two functions; the branch is Python's outside jit, where XLA's would compile anew.

    Under `vmap` the first for all examples where one of them needs it, and not, as a conditional
    would have it, both at every step: `compute` must do no harm to those that do not.
    """
    if _jax.is_traced(needed):
        return lax.cond(_any_example(needed), compute, otherwise, *operands)
    return compute(*operands) if needed else otherwise(*operands)


@custom_vmap
def _any_example(needed: jax.Array) -> jax.Array:
    return needed


@_any_example.def_vmap
def _any_of_batch(axis_size: int, in_batched: list[bool], needed: jax.Array) -> Any:
    del axis_size, in_batched
    return jnp.any(needed), False


FORCED_PLATFORM: str | None = None
"""For tests: the platform whose way `by_platform` takes everywhere."""


def by_platform(ways: dict[str, Callable[..., Any]], *operands: Any) -> Any:
    """One of several functions that answer the same, as suits the machine; chosen when lowered.

    Args:
        ways: From "cpu", "cuda" or "tpu" to the function for it; "default" for the others.
        *operands: What it takes.
    """
    if FORCED_PLATFORM is not None:
        return ways.get(FORCED_PLATFORM, ways["default"])(*operands)
    first = jax.tree.leaves(operands)[0] if jax.tree.leaves(operands) else np.zeros([])
    if _jax.is_traced(first):
        return lax.platform_dependent(*operands, **ways)
    known = isinstance(first, jax.Array)
    platform = next(iter(first.devices())).platform if known else jax.default_backend()
    return ways.get({"gpu": "cuda"}.get(platform, platform), ways["default"])(*operands)


InTwo = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def reduced_together(
    kinds: tuple[InTwo, ...], axes: Axes, *terms: jax.Array
) -> tuple[jax.Array, ...]:
    """Several arrays of one shape, reduced along `axes` in one look at what they are made of.

    Of a leaf that may be split over a mesh in several looks: XLA's partitioner adds up the parts
    of a reduction with one result, and gathers those of one with more.

    Args:
        kinds: For each array lax.add or lax.max.
        axes: The axes, which are dropped where they are all and kept otherwise.
        *terms: The arrays, which have entries.
    """
    if _jax.may_be_split(terms[0]):
        return _reduced_apart(kinds, axes, *terms)
    shape = terms[0].shape
    starts = (
        np.full([], 0 if kind is lax.add else -np.inf, x.dtype)
        for kind, x in zip(kinds, terms, strict=True)
    )
    found = lax.reduce(terms, tuple(starts), _combination(kinds), axes)
    if len(axes) == len(shape):
        return tuple(found)
    return tuple(jnp.reshape(x, _kept(shape, axes)) for x in found)


def _reduced_apart(kinds: tuple[InTwo, ...], axes: Axes, *terms: jax.Array) -> Any:
    return tuple(
        sum_along(x, axes) if kind is lax.add else max_along(x, axes)
        for kind, x in zip(kinds, terms, strict=True)
    )


@reduced_together.defjvp
def _reduced_together_jvp(kinds: tuple[InTwo, ...], axes: Axes, primals: Any, tangents: Any) -> Any:
    apart = functools.partial(_reduced_apart, kinds, axes)
    return reduced_together(kinds, axes, *primals), jax.jvp(apart, primals, tangents)[1]


@functools.cache
def _combination(kinds: tuple[InTwo, ...]) -> Callable[..., Any]:
    """How two entries of each are combined; the same function in every trace."""

    def combined(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [kind(x, y) for kind, x, y in zip(kinds, a, b, strict=True)]

    return combined


def _kept(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(1 if axis in axes else length for axis, length in enumerate(shape))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def sums_at(
    entries: Callable[..., jax.Array], scales: tuple[float, ...], axes: Axes, x: jax.Array
) -> tuple[jax.Array, ...]:
    """The sums along `axes` of entries(x, scale) for every scale; see `reduced_together`."""
    terms = [_entries_at(entries, x, factor) for factor in _factors(scales, x)]
    return reduced_together((lax.add,) * len(terms), axes, *terms)


@sums_at.defjvp
def _sums_at_jvp(entries: Any, scales: Any, axes: Axes, primals: Any, tangents: Any) -> Any:
    (x,), (x_dot,) = primals, tangents

    def slope(factor: _Factor) -> jax.Array:
        own = functools.partial(_entries_at, entries, factor=factor)
        # At a scale that is not for this entry its slope may be infinite, and 0 * inf is NaN.
        tame = jnp.where(jnp.isfinite(own(x)), x, jnp.zeros_like(x))
        return sum_along(jax.jvp(own, (tame,), (x_dot,))[1], axes)

    return sums_at(entries, scales, axes, x), tuple(map(slope, _factors(scales, x)))


_Factor = tuple[jax.Array, jax.Array] | None
"""A scale, and minus infinity."""


def _factors(scales: tuple[float, ...], x: jax.Array) -> list[_Factor]:
    """Scales as XLA must not know them: it would take squares of constants, 0 or infinity, out."""
    dtype = accumulator(x.dtype)
    numbers = [jnp.full([], number, dtype) for number in (*scales, -math.inf) if number != 1]
    *others, floor = computed_anew(*numbers)
    unknown = iter(others)
    return [None if scale == 1 else (next(unknown), floor) for scale in scales]


def _entries_at(entries: Callable[..., jax.Array], x: jax.Array, factor: _Factor) -> jax.Array:
    return entries(x if factor is None else scaled_opaquely(widened(x), *factor), None)


def sum_in_64_bits(entries: Callable[..., jax.Array], x: jax.Array, axes: Axes) -> jax.Array:
    """The sum of entries(x) along `axes`, dimensions kept, in float64; within `jax.enable_x64`.

    A narrow matrix, of few columns, is added up in several stripes first, and then those: XLA
    gives a block of a GPU to 32 columns, and for a few blocks it does not fuse the conversion.
    """
    x = lax.convert_element_type(x, jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)
    kept = _kept(x.shape, axes)
    if axes != tuple(range(len(axes))) or len(axes) in (0, x.ndim):
        return sum_along(entries(x, None), axes)
    rows, columns, stripes = x.shape[axes[-1]], math.prod(kept), 1
    whole = not _jax.may_be_split(x)  # Stripes of a leaf that is split would be exchanged.
    while whole and rows % (2 * stripes) == 0 and columns * stripes < WIDE:
        stripes *= 2
    if stripes == 1:
        return sum_along(entries(x, None), axes)
    striped = (*x.shape[: axes[-1]], rows // stripes, stripes, *x.shape[len(axes) :])
    partial = jnp.sum(entries(x.reshape(striped), None), axis=axes)
    (partial,) = computed_anew(partial)  # Or XLA makes one reduction of both.
    return jnp.sum(partial, axis=0).reshape(kept)


WIDE = 2048
"""Columns from which on XLA fuses it for an H100, found by trying."""


def in_pairs(combine: Callable[..., jax.Array], terms: list[jax.Array]) -> jax.Array:
    """All terms combined, two at a time: roundings grow with the logarithm of their number.

    As a reduction of their stack, a thousand would take XLA much longer to compile.
    """
    while len(terms) > 1:
        pairs = [combine(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def is_floating(x: Any) -> bool:
    """Whether a leaf is measured and clipped: floating point or complex, float0 not.

    A model may hold functions and strings beside its arrays.
    """
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        if not isinstance(x, bool | int | float | complex):
            return False
        dtype = jnp.result_type(x)
    return dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.inexact)


def tree_dtype(updates: Any) -> np.dtype:
    """The dtype norms of a tree are kept in: float64 where a leaf is 64-bit, else float32."""
    floating = [jnp.result_type(x) for x in jax.tree.leaves(updates) if is_floating(x)]
    wide = any(accumulator(dtype) == jnp.float64 for dtype in floating)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def scaled_by_exp(x: jax.Array, rate: jax.Array) -> jax.Array:
    """Of x and exp(rate) the product, without the rounding of exp, which would add up."""
    return jnp.where(jnp.abs(rate) < 0.5, x + x * jnp.expm1(rate), x * jnp.exp(rate))


def rms_ema(old: jax.Array, new: jax.Array, keep: jax.Array) -> jax.Array:
    """sqrt(keep old^2 + (1 - keep) new^2), as a change of `old`: roundings do not add up."""
    far = new >= 1e15 * old  # Also where both are 0; squares stay in range below that.
    ratio = jnp.where(far, 1, new) / jnp.where(far, 1, old)
    more = (1 - keep) * (ratio - 1) * (ratio + 1)
    near = old + old * (more / (1 + jnp.sqrt(1 + more)))
    return jnp.where(far, jnp.sqrt(1 - keep) * new, near)
