"""The largest singular value of a matrix, and all of them limited, by multiplications alone.

On an accelerator a decomposition takes many times as long, and it may stop the host. All functions
take stacks of matrices, of shape (..., rows, columns), whose entries are at most about 1, so that
no square leaves the range.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _numerics

SQUARINGS = 16
"""How often `largest` squares: singular values within about 1e-5 of the largest count as it."""

STEPS = (
    (7.559774, -20.83829, 14.71699),
    *[(4.095313, -3.312813, 0.6866105)] * 5,
    (3.643009, -2.811833, 0.5744731),
    (2.565842, -1.839568, 0.4119554),
    (1.924274, -1.280686, 0.3599856),
    (1.875132, -1.250153, 0.3750218),
    (1.875, -1.25, 0.375),
)
"""Odd polynomials a x + b x^3 + c x^5 that take all of [LEAST, 1] to 1, one after the other.

Each is the one closest to 1 on what the one before leaves, and 2% beyond (room for rounding), found
by linear programming, as in Amsel, Persson, Musco and Gower, arXiv:2505.16932; the last is Newton
and Schulz's.
"""

LEAST = 1e-5
"""The smallest singular value, as a share of the largest, that they reach: below it float32 holds
little of what is beside a spike."""


def multiplied_in(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What matrices of `dtype` are multiplied in: bfloat16 where it holds their entries."""
    info = jnp.finfo(dtype)
    narrow = info.nmant <= jnp.finfo(jnp.bfloat16).nmant
    return jnp.bfloat16 if narrow else _numerics.accumulator(dtype)


def product(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The product, multiplied in `dtype` where it is real, with sums in float32 or wider."""
    if jnp.iscomplexobj(a):
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return jnp.matmul(
        a.astype(dtype),
        b.astype(dtype),
        precision=None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
        preferred_element_type=_numerics.accumulator(dtype),
    )


def as_matrices(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The matrix, or stack of them, that `axes` of an array span; the last of them is its columns.

    The other axes come first, in order.
    """
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    shape = [x.shape[axis] for axis in kept]
    columns = x.shape[axes[-1]] if axes else 1
    return jnp.reshape(jnp.transpose(x, (*kept, *axes)), (*shape, -1, columns))


def from_matrices(x: jax.Array, axes: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """The inverse of `as_matrices`."""
    order = [axis for axis in range(len(shape)) if axis not in axes] + list(axes)
    back = [order.index(axis) for axis in range(len(shape))]
    return jnp.transpose(jnp.reshape(x, [shape[axis] for axis in order]), back)


def upright(x: jax.Array) -> jax.Array:
    """The matrices, or their transposes where those have fewer columns: their squares are small."""
    return x if x.shape[-2] >= x.shape[-1] else x.mT


def gram(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The square x* x, columns by columns."""
    return product(jnp.conj(x.mT), x, dtype)


# Outside of jit a loop is compiled anew at each call, unless its function is the same one.
@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def largest(square: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The largest eigenvalue of x* x, which is never more than that.

    Squared k times, a matrix is but for its length one of the largest eigenvalue alone, whatever
    that is: no vector to start from, which may be the wrong one, and as many multiplications for
    every matrix.
    """

    def squared(_: jax.Array, alone: jax.Array) -> jax.Array:
        return _of_length_1(product(alone, alone, dtype))

    # A loop of known length: there is nothing to ask the device, and little to compile.
    alone = _of_length_1(lax.stop_gradient(square))
    alone = lax.fori_loop(0, SQUARINGS, squared, alone)
    trace = _numerics.widened(jnp.trace(alone, axis1=-2, axis2=-1).real)
    found = jnp.sum((square * jnp.conj(alone)).real, axis=(-2, -1))
    return found / jnp.where(trace > 0, trace, 1)


def _of_length_1(x: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.sum(x.real * x.real + x.imag * x.imag, axis=(-2, -1), keepdims=True))
    return x / jnp.where(length > 0, length, 1).astype(x.dtype)


@functools.partial(jax.jit, inline=True)
def limited(
    x: jax.Array, square: jax.Array, singular_value: jax.Array, threshold: jax.Array
) -> jax.Array:
    """Each singular value s as s / sqrt(s^2 + threshold^2): 1 where it is far above the threshold.

    That is x (x* x + threshold^2)^(-1/2). The root is the lower half of the polar factor of x
    above threshold times the identity, which is iterated without squaring that: a spike of k times
    the threshold costs k roundings, and not k^2. All of it is multiplied in float32 or wider; in
    bfloat16, 41% of the threshold is lost where no singular value is above it, and all from a
    spike of 1,000 times on.

    Args:
        x: The matrices, upright.
        square: x* x.
        singular_value: The largest of each matrix.
        threshold: A number for all, or one for each.
    """
    dtype = _numerics.accumulator(x.dtype)
    largest_now, threshold = singular_value[..., None, None], threshold[..., None, None]
    held = jnp.maximum(threshold, LEAST * largest_now)
    held = jnp.where(held > 0, held, 1)
    # A little longer: what is within rounding of the largest may be larger.
    share = held / jnp.hypot(1.001 * largest_now, held)
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=dtype), square.shape)
    held, share, identity = (y.astype(square.dtype) for y in (held, share, identity))
    root, x = share * identity, x / held

    def nearer(root: jax.Array, both: jax.Array, step: jax.Array) -> jax.Array:
        a, b, c = step
        return product(root, a * identity + b * both + c * product(both, both, dtype), dtype)

    def next_root(root: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        both = gram(product(x, root, dtype), dtype) + product(root, root, dtype)
        return nearer(root, both, step), None

    first, *others = (jnp.asarray(step, square.dtype) for step in STEPS)
    # Of the first root, which is a multiple of the identity, no product is needed.
    root = nearer(root, square * (share / held) * (share / held) + root * root, first)
    root, _ = lax.scan(next_root, root, jnp.stack(others))
    return product(x, root, dtype)
