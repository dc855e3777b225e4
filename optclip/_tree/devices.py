"""Which leaves are split over which mesh axes, inside `shard_map` and `pmap`.

Under `jit`, with automatic or explicit mesh axes, an array is whole whatever its sharding, and
nothing here is used. Inside `shard_map` and `pmap` an array is one device's part. Statistics are
then summed over the axes that `axis_name` names, and a leaf that is the same on all devices of an
axis must be counted once: its statistic is divided by the axis' size before the sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optclip import _jax

Sharded = Callable[[str], Any] | Any


class LeafSharding(NamedTuple):
    """How one leaf lies on the mesh axes a norm is taken over.

    Attributes:
        names: Axes over which the leaf is split.
        dims: From dimension to the axes that split it; None where that is not known.
        copies: On how many devices each of the leaf's entries lies.
    """

    names: tuple[str, ...] = ()
    dims: Mapping[int, tuple[str, ...]] | None = None
    copies: int = 1

    @property
    def parts(self) -> int:
        """Into how many parts the leaf is split."""
        return axis_size(self.names)


WHOLE = LeafSharding(dims={})


def axis_names(axis_name: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """`axis_name` as a tuple; None stays None."""
    if axis_name is None:
        return None
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (cast(str, axis_name),)


def are_bound(axis_name: str | Sequence[str] | None) -> bool:
    """Whether this is inside the `shard_map` or `pmap` that `axis_name` speaks of."""
    try:
        axis_size(axis_names(axis_name) or ())
    except NameError:
        return False
    return True


def axis_size(names: tuple[str, ...]) -> int:
    """How many devices lie along all the axes together; 1 for none."""
    return math.prod(lax.axis_size(name) for name in names)


def as_varying(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The same value, to JAX one that varies along all the axes.

    Sums over several axes refuse what varies along some of them only: a statistic of leaves that
    are split over "tensor", where "fsdp" is named as well.
    """
    varying = _jax.varying_axes(x)
    missing = tuple(name for name in names if name not in varying and _jax.tracks_axis(name))
    return lax.pcast(x, missing, to="varying") if missing else x


def sharding_of(
    path: str, leaf: jax.Array, axis_name: str | Sequence[str] | None, sharded: Any
) -> LeafSharding:
    """How `leaf` lies on the axes of `axis_name`.

    Args:
        path: Where the leaf is in its tree, for messages.
        leaf: One device's part of the leaf, or the whole leaf outside `shard_map` and `pmap`.
        axis_name: The axes over which leaves may be split: a name, a tuple of names (empty: every
            device clips its own part on purpose), or None.
        sharded: The caller's answer for this leaf: a name, a tuple of names, a `PartitionSpec`,
            `()` for a leaf that is not split, or `...` where the caller said nothing.

    Raises:
        ValueError: Where the leaf may be split and nobody says over what.
    """
    names = axis_names(axis_name)
    varying = _jax.varying_axes(leaf)
    if names is None:
        if varying:
            raise ValueError(
                f"{path!r} differs between devices along {sorted(varying)}, so its norm here would "
                f"be one device's own: pass axis_name={_quoted(varying)} if the leaf is split over "
                "it, or average the gradients first (jax.lax.pmean); axis_name=() clips every "
                "device's part by itself"
            )
        return WHOLE
    if not names:
        return WHOLE
    if not are_bound(names):
        raise ValueError(
            f"axis_name={axis_name!r}: there is no such mesh axis here. It is for shard_map and "
            "pmap, with the names of their axes; under plain jit arrays are whole: leave it out"
        )
    tracked = all(_jax.tracks_axis(name) for name in names)
    if sharded is not ...:
        split = _said(path, sharded, names)
        if tracked:
            _agreed(path, split.names, varying)
    elif tracked:
        if varying - set(names):
            raise ValueError(
                f"{path!r} differs between devices along {sorted(varying - set(names))}, which "
                f"axis_name={axis_name!r} does not name: add it if the leaf is split over it, or "
                "average the gradients over it first (jax.lax.pmean)"
            )
        over = tuple(name for name in names if name in varying)
        split = LeafSharding(over, None if over else {})
    else:
        raise ValueError(
            f"axis_name={axis_name!r}: JAX does not track here over which axes {path!r} is split "
            "(pmap, or shard_map with check_vma=False); say it with sharded=, a tree of "
            "PartitionSpecs or a function from path to axis names (() for a leaf that every device "
            "holds whole), or use jax.shard_map with check_vma=True"
        )
    return split._replace(
        copies=axis_size(tuple(name for name in names if name not in split.names))
    )


def _said(path: str, answer: Any, names: tuple[str, ...]) -> LeafSharding:
    """The caller's `sharded=` answer for one leaf."""
    if answer is None:
        return WHOLE
    if isinstance(answer, NamedSharding):
        answer = answer.spec
    if isinstance(answer, PartitionSpec):
        dims = {dim: _flat(entry) for dim, entry in enumerate(answer) if entry is not None}
        # Axes that are not manual here are the compiler's: along them the leaf is whole.
        dims = {dim: tuple(n for n in entry if are_bound(n)) for dim, entry in dims.items()}
        _known(path, tuple(name for entry in dims.values() for name in entry), names)
        return LeafSharding(tuple(name for entry in dims.values() for name in entry), dims)
    flat = _flat(answer)
    _known(path, flat, names)
    return LeafSharding(flat, None if flat else {})


def _agreed(path: str, answer: tuple[str, ...], varying: frozenset[str]) -> None:
    """Refuses an answer that contradicts what JAX tracks; an axis of one device splits nothing."""
    said, known = (sorted(x for x in names if axis_size((x,)) > 1) for names in (answer, varying))
    if said == known:
        return
    speak = [f"over {names}" if names else "over nothing" for names in (said, known)]
    raise ValueError(
        f"sharded= says that {path!r} is split {speak[0]}, and JAX tracks here that it is split "
        f"{speak[1]}: leave sharded= out, or say the same"
    )


def _known(path: str, answer: tuple[str, ...], names: tuple[str, ...]) -> None:
    unknown = [name for name in answer if name not in names]
    if unknown:
        raise ValueError(
            f"sharded= says that {path!r} is split over {unknown[0]!r}, which axis_name={names!r} "
            "does not name: add it there"
        )


def _flat(entry: Any) -> tuple[str, ...]:
    return tuple(entry) if isinstance(entry, tuple | list | set | frozenset) else (entry,)


def _quoted(names: frozenset[str]) -> str:
    ordered = sorted(names)
    return repr(ordered[0]) if len(ordered) == 1 else repr(tuple(ordered))


def whole(path: str, part: jax.Array, sharding: LeafSharding, axes: Sequence[int]) -> jax.Array:
    """One device's part of a leaf, with what the others have along some axes.

    Raises:
        ValueError: Where the leaf is split, and nobody says along which of its axes.
    """
    if sharding.names and sharding.dims is None:
        raise ValueError(
            f"{path!r} is split over {list(sharding.names)}, but along which of its dimensions? "
            "Singular values need to know: pass sharded= with a PartitionSpec for it"
        )
    for axis, names in (sharding.dims or {}).items():
        if axis in axes:
            part = lax.all_gather(part, names, axis=axis, tiled=True)
    return part


def offset(
    sharding: LeafSharding, part: Sequence[int], axes: Sequence[int]
) -> list[jax.Array | int]:
    """Where this device's part of a leaf begins, along those of its axes that `axes` names."""
    dims = sharding.dims or {}
    return [
        lax.axis_index(tuple(dims[axis])) * length if dims.get(axis) and axis in axes else 0
        for axis, length in enumerate(part)
    ]
