"""Norms as monoids: what `clip_by` measures, right at every magnitude and on every device layout.

A norm is a statistic that adds up. Each leaf is mapped to a statistic, statistics are combined
across leaves and across devices, and only the total is finished into a norm::

    l2     sum of |x|^2    added     psum    square root
    linf   largest |x|     maximum   pmax    nothing
    rms    sum of |x|^2    added     psum    square root of the mean
    lp     sum of |x|^p    added     psum    p-th root

Statistics are accumulated in float32, or in float64 for float64 leaves, whatever the type of the
gradient. A sum of squares leaves float32's range long before the norm does (at entries of 1e19
and of 1e-19), so a leaf can be measured at a `scale`: once plainly, and again at a power of two
only where the first answer was out of range. `optclip._tree.measure` does that; nothing here sees a
tree.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip import _jax, _matrices, _numerics
from optclip._numerics import Axes

Size = int | float | np.ndarray | jax.Array


class Norm(NamedTuple):
    """A norm, as the functions that measure one group of entries.

    Attributes:
        name: What messages call it.
        degree: How the statistic grows: statistic(k x) = k^degree statistic(x).
        statistic: (leaf, axes, scale) -> statistic of the scaled entries along `axes`, in the
            leaf's accumulator dtype: dimensions kept, or a scalar where `axes` are all of them.
            `scale` is None for 1.
        combine: (statistics, axis) -> their total along `axis`; None for a norm that exists only
            for a whole leaf and cannot be added up.
        across: (statistic, axis names) -> total over the devices of a mesh.
        finish: (statistic, number of entries) -> norm.
        lift: (norm, number of entries) -> statistic; undoes `finish`.
        adds: Whether combining adds, so that a copy on another device would count twice.
        safety: How the statistic stays in range. "exact": it cannot leave it. "range": measured
            plainly, and again with a power-of-two scale where that was out of range. "peak":
            always measured relative to the largest entry.
        entries: (leaf, scale) -> what the statistic is the sum of, entry by entry; None where it
            is no such sum.
        averages: Whether it is a mean: the norm of two groups may be smaller than that of one.
    """

    name: str
    degree: float
    statistic: Callable[[jax.Array, Axes, jax.Array | None], jax.Array]
    combine: Callable[..., jax.Array] | None
    across: Callable[[jax.Array, tuple[str, ...]], jax.Array]
    finish: Callable[[jax.Array, Size], jax.Array]
    lift: Callable[[jax.Array, Size], jax.Array]
    adds: bool = True
    safety: Literal["exact", "range", "peak"] = "range"
    entries: Callable[[jax.Array, jax.Array | None], jax.Array] | None = None
    averages: bool = False


def read(x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """A leaf as statistics read it: widened, and scaled."""
    x = _numerics.widened(x)
    if scale is None:
        return x
    return _numerics.scaled_opaquely(x, scale, -jnp.inf * lax.stop_gradient(scale))


def _root(statistic: jax.Array, power: float) -> jax.Array:
    """statistic^(1/power), with derivative 0 at 0 so that a zero gradient has no NaN slope."""
    zero = statistic == 0
    inner = jnp.where(zero, jnp.ones_like(statistic), statistic)
    root = jnp.sqrt(inner) if power == 2 else inner ** (1 / power)
    return jnp.where(zero, jnp.zeros_like(statistic), root)


def _squares(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    x = read(x, scale)
    if jnp.iscomplexobj(x):
        return x.real * x.real + x.imag * x.imag
    return lax.mul(x, x)  # As x * x, but traced faster: there may be thousands of leaves.


def _moduli(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    return _numerics.modulus(read(x, scale))


@jax.custom_jvp
def _power(x: jax.Array, power: jax.Array) -> jax.Array:
    """x^power for x >= 0, in two steps that XLA fuses into a sum; 0 at 0."""
    return jnp.exp(power * jnp.log(x))


@_power.defjvp
def _power_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> Any:
    (x, power), (x_dot, _) = primals, tangents
    zero = x == 0
    slope = jnp.where(zero, 0, power * _power(jnp.where(zero, 1, x), power - 1))
    return _power(x, power), slope * x_dot


def _powers(x: jax.Array, scale: jax.Array | None, *, power: float) -> jax.Array:
    dtype = _numerics.accumulator(x.dtype)
    factor = jnp.ones([], dtype) if scale is None else scale
    x, factor, exponent = _numerics.computed_anew(x, factor, jnp.full([], power, dtype))
    return _power(_numerics.modulus(_numerics.scaled(_numerics.widened(x), factor)), exponent)


def _largest(x: jax.Array, axes: Axes, scale: jax.Array | None) -> jax.Array:
    return _numerics.peak(_moduli(x, scale), x, axes)


def _mean(statistic: jax.Array, size: Size) -> jax.Array:
    return statistic / jnp.maximum(jnp.asarray(size, statistic.dtype), 1)


def _of_sums(name: str, degree: float, entries: Callable[..., jax.Array], **others: Any) -> Norm:
    """A norm whose statistic is a sum over entries."""
    return Norm(
        name,
        degree,
        statistic=lambda x, axes, scale: _numerics.sum_along(entries(x, scale), axes),
        combine=jnp.sum,
        across=lax.psum,
        entries=entries,
        **others,
    )


l2 = _of_sums(
    "l2",
    2,
    _squares,
    finish=lambda statistic, size: _root(statistic, 2),
    lift=lambda norm, size: norm * norm,
)
"""The Euclidean norm, `sqrt(sum |x|^2)`."""

rms = _of_sums(
    "rms",
    2,
    _squares,
    finish=lambda statistic, size: _root(_mean(statistic, size), 2),
    lift=lambda norm, size: norm * norm * jnp.asarray(size, norm.dtype),
    averages=True,
)
"""The root mean square, `sqrt(mean |x|^2)`."""

l1 = _of_sums(
    "l1",
    1,
    _moduli,
    finish=lambda statistic, size: statistic,
    lift=lambda norm, size: norm,
)
"""The sum of absolute values."""

linf = Norm(
    "linf",
    degree=1,
    statistic=_largest,
    combine=jnp.max,
    across=lax.pmax,
    finish=lambda statistic, size: statistic,
    lift=lambda norm, size: norm,
    adds=False,
    safety="exact",
)
"""The largest absolute value. A CPU reads the gradient once more, for NaN."""


def lp(power: float) -> Norm:
    """The p-norm, `(sum |x|^p)^(1/p)`, for any p > 0.

    Args:
        power: p. 1, 2 and infinity return `l1`, `l2` and `linf`. Below 1 it is not a norm in the
            mathematical sense, but it is a length, and can be clipped.

    Returns:
        A `Norm`. For p other than 1, 2 and infinity a measurement reads the gradient again, for
        the powers relative to the largest entry.

    Raises:
        ValueError: If `power` is not a number above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from optclip import norms
        >>> cubic = norms.lp(3)
        >>> float(cubic.finish(cubic.statistic(jnp.array([1.0, 2.0, 3.0]), (0,), None), 3))
        3.30...
    """
    if _jax.is_traced(power) or not isinstance(power, int | float | np.number):
        raise ValueError(
            f"the order of a norm shapes the program and must be a plain number, got {power!r}; "
            'under optax.inject_hyperparams list it: static_args=("ord",)'
        )
    power = float(power)
    if not power > 0:
        raise ValueError(f"the order of a norm must be above 0, got {power}; use 1, 2 or jnp.inf")
    named: dict[float, Norm] = {1.0: l1, 2.0: l2, math.inf: linf}
    if power in named:
        return named[power]
    return _of_sums(
        f"l{power:g}",
        power,
        functools.partial(_powers, power=power),
        finish=lambda statistic, size: _root(statistic, power),
        lift=lambda norm, size: norm**power,
        safety="peak",
    )


def _squared_singular_value(x: jax.Array, axes: Axes, scale: jax.Array | None) -> jax.Array:
    dtype = _matrices.multiplied_in(x.dtype)
    power = rest = jnp.ones([], _numerics.accumulator(x.dtype))
    if scale is not None:
        power = _numerics.power_of_two(scale)  # So that it is exact in the leaf's type.
        rest = scale / power
    matrices = _matrices.upright(_matrices.as_matrices(read(x, power), axes))
    found = _matrices.largest(_matrices.gram(matrices, dtype), dtype)
    if len(axes) < x.ndim:
        found = jnp.expand_dims(found, axes)
    return found * rest * rest


spectral = Norm(
    "spectral",
    degree=2,
    statistic=_squared_singular_value,
    combine=None,
    across=lax.pmax,
    finish=lambda statistic, size: _root(statistic, 2),
    lift=lambda norm, size: norm * norm,
    adds=False,
    safety="peak",
)
"""The largest singular value of each matrix; of several together, the largest of all.

For `scopes.leaf`, or `scopes.unit` with the axes that one matrix spans: the last of them counts its
columns, the others together its rows, so that a convolution kernel is one matrix, and
`scopes.unit((1, 2))` measures each layer of a stack. Of a vector it is the 2-norm. By 16 squarings
of the smaller square of the matrix, in bfloat16 where the leaf is (its sums are float32): right to
1e-6, to 5e-5 where many are within 1e-4 of the largest, and to 1e-4 in bfloat16. Power iteration
would be a hundred times as cheap, and reads too little where two singular values are near each
other, as of noise. Inside `shard_map` every device gathers the matrix."""


class Magnitude(NamedTuple):
    """A norm that cannot overflow: value / scale, with scale 1 in the usual case.

    Attributes:
        value: The norm of the scaled entries. Non-finite if and only if an entry is.
        scale: What the entries were multiplied by before they were measured.
    """

    value: jax.Array
    scale: jax.Array

    def clamped(self) -> jax.Array:
        """The norm as one number, held to the largest finite one where it would overflow.

        A gradient of finite entries is finite, even when its norm is not a float32; only a
        gradient with a non-finite entry has a non-finite norm.
        """
        norm = self.value / self.scale
        return jnp.where(
            jnp.isfinite(self.value), jnp.minimum(norm, _numerics.largest(norm.dtype)), norm
        )


class _Range(NamedTuple):
    """Where a plain statistic is trusted, and how to bring it there, for one dtype.

    Attributes:
        high: Above this a statistic is measured again; the room above it is for adding up.
        lost: Below this, times the number of entries, squares that were flushed to zero could
            have mattered.
        shrink: Scale for what was too large: the largest entries square to about 1e28.
        grow: Scale for what was too small: the smallest normal entries square to about 1e-22.
    """

    high: float
    lost: float
    shrink: float
    grow: float


RANGES = {
    jnp.dtype(jnp.float32): _Range(high=1e30, lost=2.0**-106, shrink=2.0**-80, grow=2.0**90),
    jnp.dtype(jnp.float64): _Range(high=1e290, lost=2.0**-970, shrink=2.0**-600, grow=2.0**600),
}


def can_leave_range(dtype: jax.typing.DTypeLike) -> bool:
    """Whether squares of `dtype` can leave their accumulator's range; 8- and 16-bit floats' cannot.

    The exception among the narrow ones is bfloat16, which has float32's exponents.
    """
    info = jnp.finfo(dtype)
    limits = RANGES[_numerics.accumulator(dtype)]
    highest = 2 * math.log2(float(info.max)) + 40  # A sum of 2^40 squares.
    lowest = 2 * math.log2(float(info.tiny))
    return highest > math.log2(limits.high) or lowest < math.log2(limits.lost)


def range_scale(norm: Norm, statistic: jax.Array, size: Size) -> jax.Array:
    """The scale to measure again with: 1 where `statistic`, measured at scale 1, can be trusted.

    A statistic of exactly 0 is measured again too: zeros and squares that were flushed to zero
    look alike.
    """
    limits = RANGES[jnp.dtype(statistic.dtype)]
    one = jnp.ones_like(statistic)
    scale = jnp.where(statistic > limits.high, limits.shrink * one, one)
    if norm.degree > 1:
        low = jnp.asarray(size, statistic.dtype) * limits.lost
        scale = jnp.where(statistic < low, limits.grow * one, scale)
    return scale


def window_scales(norm: Norm, dtype: jax.typing.DTypeLike) -> tuple[float, ...]:
    """Scales of which one brings any statistic into range, 1 the first."""
    limits = RANGES[jnp.dtype(dtype)]
    # A sum of moduli is too small only where the norm is.
    return (1.0, limits.shrink) if norm.degree <= 1 else (1.0, limits.shrink, limits.grow)


def window(norm: Norm, statistics: Sequence[jax.Array], size: Size) -> Magnitude:
    """The norm from the statistic that is in range, of those at `window_scales`."""
    scale = range_scale(norm, statistics[0], size)
    chosen = jnp.where(scale < 1, statistics[1], statistics[0])
    if len(statistics) > 2:
        chosen = jnp.where(scale > 1, statistics[2], chosen)
    return Magnitude(norm.finish(chosen, size), scale)


def peak_scale(peak: jax.Array, measured_at: jax.Array) -> jax.Array:
    """The scale that brings the largest entry to about 1, if `peak` is it at another scale."""
    usable = (peak > 0) & jnp.isfinite(peak)
    scale = measured_at * jnp.where(usable, 1 / jnp.where(usable, peak, 1), 1)
    # At the top of the range the scale itself would be subnormal, and flushed.
    return jnp.maximum(scale, jnp.asarray(jnp.finfo(peak.dtype).tiny, peak.dtype))


Total = Callable[[Callable[..., jax.Array], list[jax.Array]], jax.Array]
"""(jnp.sum, jnp.min or jnp.max, arrays) -> one number, over all entries of all arrays."""


def total_of_one(reduce: Callable[..., jax.Array], arrays: list[jax.Array]) -> jax.Array:
    """The `Total` of one array."""
    (array,) = arrays
    return reduce(array)


def pool(
    norm: Norm, groups: Sequence[Magnitude], sizes: Sequence[Size], total: Total = total_of_one
) -> Magnitude:
    """The norm of several groups together, from their norms: the norm of a vector of norms.

    Args:
        norm: The norm.
        groups: The norms, in one array or several.
        sizes: Entries per group, for each of the arrays.
        total: How arrays are reduced to a number.
    """
    if not sum(x.value.size for x in groups):
        return plain(jnp.zeros([], groups[0].value.dtype))
    entries = sum(
        jnp.sum(size)
        if isinstance(size, jax.Array)
        else np.sum(np.broadcast_to(np.asarray(size), x.value.shape))
        for x, size in zip(groups, sizes, strict=True)
    )
    if norm.safety == "range":
        dtype, sums = groups[0].value.dtype, []
        others = [jnp.asarray(x, dtype) for x in (*window_scales(norm, dtype)[1:], -jnp.inf)]
        # Not as constants, whose squares XLA would take out of the sum; nor may it, on a CPU, know
        # the norms, as of a gradient that is a constant to it.
        *others, floor = _numerics.computed_anew(*others)
        values = _numerics.by_platform(
            {"cpu": _at_least, "default": lambda values, _: values},
            [x.value for x in groups],
            floor,
        )
        for scale in (1, *others):
            lengths = [x * (scale / y.scale) for x, y in zip(values, groups, strict=True)]
            lifted = [norm.lift(x, size) for x, size in zip(lengths, sizes, strict=True)]
            sums.append(total(jnp.sum, lifted))
        return window(norm, sums, entries)
    least = total(functools.partial(jnp.min, initial=1), [x.scale for x in groups])
    values = [x.value * (least / x.scale) for x in groups]
    # A maximum may pass over NaN; infinity is as non-finite, and does not get lost.
    values = [jnp.where(jnp.isfinite(x), x, jnp.inf) for x in values]
    peak = total(functools.partial(jnp.max, initial=0), values)
    # Room for a total above the largest number; and XLA multiplies by reciprocals, of which that
    # of the largest number would be flushed to zero.
    room = jnp.where(jnp.isfinite(peak) & (peak > 1e25), jnp.asarray(2.0**-60, peak.dtype), 1)
    values, peak = [x * room for x in values], peak * room
    unit = jnp.where((peak > 0) & jnp.isfinite(peak), peak, jnp.ones_like(peak))
    lifted = [norm.lift(x / unit, size) for x, size in zip(values, sizes, strict=True)]
    share = norm.finish(total(norm.combine or jnp.max, lifted), entries)
    return Magnitude(share * unit, least * room)


def _at_least(values: list[jax.Array], floor: jax.Array) -> list[jax.Array]:
    return [jnp.maximum(x, floor) for x in values]


def plain(norms: jax.Array) -> Magnitude:
    """Norms that are numbers, as a `Magnitude`."""
    return Magnitude(norms, jnp.ones_like(norms))
