"""`restore_state`: an optimizer's state from a checkpoint of another one, as far as it fits.

A state is a nest of NamedTuples, one for each transformation. Of these a checkpoint keeps the names
of fields and the arrays, and not always the types. A transformation's state is taken over as a
whole or not at all: a count without its averages would be worse than a fresh start. States that
are alike are matched in order where there are as many in both, and else by their places.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._paths import array_in, is_variable
from optclip.methods.safeguard import SafeguardState
from optclip.methods.skip_spikes import SkipState
from optclip.state import ClipState

Path = tuple[str, ...]


class Restored(NamedTuple):
    """What `restore_state` made, and from what. Printed, it says so in words.

    Attributes:
        state: The optimizer's state.
        kept: The parts that were taken over, by place and name.
        fresh: The parts that start anew.
        unused: What the checkpoint held beside them, by place.
    """

    state: Any
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{what}: {', '.join(parts) if parts else 'nothing'}"
            for what, parts in (
                ("taken over", self.kept),
                ("fresh", self.fresh),
                ("not used", self.unused),
            )
        ]
        return "\n".join(lines)


def restore_state(
    optimizer: optax.GradientTransformation, params: optax.Params, restored: Any
) -> Restored:
    """A state for `optimizer` from that of another one: what fits is taken over, the rest is fresh.

    For a run that goes on with another clip, another `detail=`, a wrapper more or less, or after
    Optax's own clip. The states of the other transformations, as Adam's averages and the counts of
    schedules, are taken over; so is a clip's state where its rule remembers the same things, or
    nothing. Each is taken over as a whole or not at all.

    Args:
        optimizer: The new optimizer.
        params: The parameters, which lie where training will have them: each array of the state is
            put where `optimizer.init(params)` has it, in its dtype.
        restored: The old state: as it was, or as a checkpoint library returns it without a
            template: what Orbax's `StandardCheckpointer().restore(folder)` or
            `flax.serialization.msgpack_restore(data)` return, or the part of it that is the
            optimizer's state.

    Returns:
        A `Restored`: its `state`, and which parts are `kept`, `fresh` and `unused`.

    Raises:
        ValueError: If `restored` is no tree of arrays or nothing in it fits, or if `optimizer` is
            no transformation.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> params = {"w": jnp.zeros(2)}
        >>> old = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
        >>> new = optax.chain(optclip.robust_clip(), optax.adam(1e-3))
        >>> found = optclip.restore_state(new, params, old)
        >>> print(found)
        taken over: 1/0 ScaleByAdamState
        fresh: 0 ClipState
        not used: nothing
        >>> opt_state = found.state
    """
    if not callable(getattr(optimizer, "init", None)):
        raise ValueError(
            f"restore_state needs an Optax optimizer first, got {type(optimizer).__name__}; of a "
            "linen TrainState pass state.tx"
        )
    if restored is None or isinstance(restored, str | bytes) or hasattr(restored, "__fspath__"):
        raise ValueError(
            "restore_state needs the restored state itself, a tree of arrays, got "
            f"{type(restored).__name__}; read it first, with Orbax's "
            "StandardCheckpointer().restore(folder) or flax.serialization.msgpack_restore(data)"
        )
    fresh = optimizer.init(params)
    source = _source(restored)
    of_params = frozenset(path for path, _ in _leaves(params))
    parts = list(_parts(fresh, (), of_params))
    places = _places(parts, source)
    leaves = [path for path, _ in _leaves(fresh)]
    found: dict[Path, Path] = {}
    kept: list[str] = []
    anew: list[str] = []
    for part in parts:
        place = places.get(part.path)
        here = _said(part.path, part.name)
        if place is None:
            anew.append(f"{here}{source.why_not(part)}")
            continue
        taken = dict.fromkeys(part.required)
        for name, group in part.optional.items():
            known = name != "asked" or _is_known(part, place, parts, places, source)
            if not known:
                anew.append(_said((*part.path, name), "(what it knew of another optimizer)"))
            elif all(source.fits(place + path, x) for path, x in group.items()):
                taken |= dict.fromkeys(group)
            else:
                anew.append(_said((*part.path, name), ""))
        found |= {part.path + path: place + path for path in taken}
        kept.append(
            here if place == part.path else f"{here} (from {_said(place, '') or 'the top'})"
        )
    if parts and source.leaves and not kept:
        raise ValueError(
            "nothing of what was restored fits this optimizer with these parameters: "
            f"{'; '.join(anew[:3])}. Pass the optimizer's part of the checkpoint, and the "
            "parameters that it was made for; to start anew there is optimizer.init(params)"
        )
    values = _values(fresh, leaves, {path: source.leaves[own] for path, own in found.items()})
    used = set(found.values())
    unused = [path for path in source.leaves if path not in used]
    return Restored(values, tuple(kept), tuple(anew), tuple(_summarized(unused, source)))


class _Part(NamedTuple):
    """The state of one transformation, without those that it holds.

    Attributes:
        path: Where it is.
        name: Of its type.
        fields: Of its type.
        required: From path within it to each array without which it means nothing.
        optional: The same of others, those that belong together under one name.
    """

    path: Path
    name: str
    fields: frozenset[str]
    required: dict[Path, Any]
    optional: dict[str, dict[Path, Any]]


class _Source(NamedTuple):
    """A restored state.

    Attributes:
        leaves: Its arrays by path.
        sizes: From a path to how many arrays are there and below.
        children: From a path to the names of what is there.
        names: From a path to the name of the type there, where it is known.
    """

    leaves: dict[Path, Any]
    sizes: Counter[Path]
    children: dict[Path, set[str]]
    names: dict[Path, str]

    def fits(self, path: Path, like: Any) -> bool:
        """Whether there is an array of that shape and kind."""
        x = self.leaves.get(path)
        return x is not None and np.shape(x) == np.shape(like) and _kind(x) == _kind(like)

    def why_not(self, part: _Part) -> str:
        """What is missing where a part was, if there is anything."""
        if not part.fields or not self.children.get(part.path, {""}) <= part.fields:
            return ""
        for path, like in part.required.items():
            if not self.fits(part.path + path, like):
                x = self.leaves.get(part.path + path)
                has = "not there" if x is None else f"{_kind(x)} {np.shape(x)}"
                return f" ({_said(path, '')} is {has})"
        return ""

    def holds(self, place: Path, part: _Part) -> bool:
        """Whether the state of that transformation is there, all of it and nothing else."""
        names = self.children.get(place, set())
        if not part.required or not names <= part.fields:
            return False
        if self.names.get(place, part.name) != part.name:
            return False
        if not all(self.fits(place + path, x) for path, x in part.required.items()):
            return False
        fields = {path[0] for path in part.required}
        known = {path for group in part.optional.values() for path in group} | set(part.required)
        there = (path[len(place) :] for path in self.leaves if path[: len(place)] == place)
        return all(path in known for path in there if path[0] in fields)


def _kind(x: Any) -> str:
    dtype = getattr(x, "dtype", None)
    dtype = jnp.result_type(x) if dtype is None else dtype
    kinds = (jnp.floating, jnp.complexfloating, jnp.bool_, jnp.integer)
    return next((kind.__name__ for kind in kinds if jnp.issubdtype(dtype, kind)), str(dtype))


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """The nodes directly in a node, by name; None for a leaf."""
    if node is None or is_variable(node):
        return None
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if any(not path for path, _ in found):
        return None
    return [(jax.tree_util.keystr(path, simple=True), child) for path, child in found]


def _leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The arrays by path, in the order of the tree."""
    children = _children(node)
    if children is not None:
        for name, child in children:
            yield from _leaves(child, (*path, name))
    elif node is not None:
        yield path, array_in(node)


def _named_nodes(node: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The NamedTuples that hold anything, as `optax.MaskedNode` does not."""
    if getattr(node, "_fields", ()):
        yield path, type(node).__name__
    for name, child in _children(node) or []:
        yield from _named_nodes(child, (*path, name))


def _source(restored: Any) -> _Source:
    leaves = dict(_leaves(restored))
    if bad := [path for path, x in leaves.items() if not hasattr(x, "shape") and not _is_number(x)]:
        raise ValueError(
            f"restore_state needs a tree of arrays, and {_said(bad[0], '') or 'this'} is none: "
            f"{leaves[bad[0]]!r}; pass what the checkpoint library returned"
        )
    if leaves and all(path[-1:] == ("value",) for path in leaves):  # Of a Flax nnx state.
        leaves = {path[:-1]: x for path, x in leaves.items()}
    children: dict[Path, set[str]] = {}
    for path in leaves:
        for depth in range(len(path)):
            children.setdefault(path[:depth], set()).add(path[depth])
    sizes = Counter(path[:depth] for path in leaves for depth in range(len(path) + 1))
    return _Source(leaves, sizes, children, dict(_named_nodes(restored)))


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float | complex)


_OURS: Mapping[type, str] = {ClipState: "", SkipState: "inner_state", SafeguardState: "inner_state"}
"""Our states, with the field in which each holds another's."""


def _parts(node: Any, path: Path, of_params: frozenset[Path]) -> Iterator[_Part]:
    """The transformations' states in a state, in order."""
    children = _children(node) or []
    if not hasattr(node, "_fields"):
        has_arrays = any(_children(child) is None for _, child in children)
        plain = isinstance(node, tuple | list) and not has_arrays
        if plain or any(True for _ in _named_nodes(node)):
            for name, child in children:
                yield from _parts(child, (*path, name), of_params)
        elif leaves := dict(_leaves(node)):  # The state of one transformation, in no NamedTuple.
            fields = frozenset(name for name, _ in children)
            yield _Part(path, type(node).__name__, fields, leaves, {})
        return
    required: dict[Path, Any] = {}
    optional: dict[str, dict[Path, Any]] = {}
    held: list[tuple[Path, Any]] = []
    for name, child in children:
        if _holds_states(node, name, child, of_params):
            held.append(((*path, name), child))
            continue
        for rest, x in _leaves(child):
            group = _group(type(node), (name, *rest))
            if group is None:
                required[(name, *rest)] = x
            else:
                optional.setdefault(group, {})[(name, *rest)] = x
    if required:
        name = type(node).__name__
        fields = frozenset(node._fields)
        yield _Part(path, name, fields, required, optional)
    for place, child in held:
        yield from _parts(child, place, of_params)


def _holds_states(node: Any, name: str, child: Any, of_params: frozenset[Path]) -> bool:
    """Whether a field of a state holds the states of other transformations."""
    if type(node) in _OURS:
        return _OURS[type(node)] == name
    # Parameters, or some of them, may be NamedTuples too.
    like_params = all(path in of_params for path, _ in _leaves(child))
    return not like_params and any(True for _ in _named_nodes(child))


def _group(kind: type, path: Path) -> str | None:
    """With what an array of one of our states may be left out; None where it may not."""
    if kind is SafeguardState:
        if path[0] in ("clip", "bound"):
            group = _group(ClipState, path[1:])
            return None if group is None else f"{path[0]}/{group}"
        return path[0] if path[0] in ("asked", "update_ratio", "skipping") else None
    if kind is ClipState and path[0] not in ("steps", "nonfinite_steps", "memory"):
        return path[0]
    return None


def _places(parts: list[_Part], source: _Source) -> dict[Path, Path]:
    """Where in the source each part is."""
    kinds: dict[Any, list[_Part]] = {}
    for part in parts:
        key = (part.name, tuple((path, np.shape(x)) for path, x in part.required.items()))
        kinds.setdefault(key, []).append(part)
    places: dict[Path, Path] = {}
    for alike in kinds.values():
        there = []
        if alike[0].fields:
            there = [place for place in source.children if source.holds(place, alike[0])]
        if len(there) == len(alike):  # In order, so that neighbors that move are not swapped.
            places |= {part.path: place for part, place in zip(alike, there, strict=True)}
        else:
            places |= {part.path: part.path for part in alike if _fits_here(part, source)}
    # Of a kind that has found no place, what others left. Where some have, which of them moved?
    for alike in kinds.values():
        if not alike[0].fields or any(part.path in places for part in alike):
            continue
        free = set(source.children) - set(places.values())
        there = [x for x in source.children if x in free and source.holds(x, alike[0])]
        if len(there) == len(alike):
            places |= {part.path: place for part, place in zip(alike, there, strict=True)}
    return places


def _fits_here(part: _Part, source: _Source) -> bool:
    if not part.fields:
        return source.fits(part.path, part.required[()])
    return source.holds(part.path, part)


def _is_known(
    part: _Part, place: Path, parts: list[_Part], places: dict[Path, Path], source: _Source
) -> bool:
    """Whether what a safeguard knew is of this optimizer: of its state, and of its nature."""
    if not _is_whole(part.path, parts, places):
        return False
    nature = [(path, x) for path, x in part.optional["asked"].items() if "nature" in path]
    return all(
        source.fits(place + path, x) and np.allclose(source.leaves[place + path], x, rtol=0.25)
        for path, x in nature
    )


def _is_whole(path: Path, parts: list[_Part], places: dict[Path, Path]) -> bool:
    """Whether all that a wrapper holds was found in the wrapper of old."""
    old = places[path]
    inside = [part for part in parts if part.path[: len(path)] == path and part.path != path]
    return all(places.get(x.path) == old + x.path[len(path) :] for x in inside)


def _values(fresh: Any, paths: list[Path], found: dict[Path, Any]) -> Any:
    leaves, structure = jax.tree.flatten(fresh, is_leaf=is_variable)
    values = [
        _placed(found[path], leaf) if path in found else leaf
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)


def _placed(x: Any, like: Any) -> Any:
    """An array where the fresh one lies, in its dtype."""
    if is_variable(like):
        return like.replace(_placed(x, array_in(like)))
    if not isinstance(like, jax.Array):
        return x
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return x
    devices = x.sharding.device_set if isinstance(x, jax.Array) else None
    if getattr(like, "committed", True):
        return jax.device_put(jnp.asarray(x, like.dtype), like.sharding)
    if like.ndim and devices == like.sharding.device_set:
        return jnp.asarray(x, like.dtype)
    # As a fresh scalar: on no device in particular, or it could not meet parameters on others.
    return jnp.asarray(np.asarray(x), like.dtype)


def _said(path: Path, name: str) -> str:
    return f"{'/'.join(path)} {name}".strip()


def _summarized(paths: list[Path], source: _Source) -> Iterator[str]:
    """Paths, with the highest for all that are together."""
    unused = Counter(path[:depth] for path in paths for depth in range(len(path) + 1))
    highest = (
        next(
            path[:depth]
            for depth in range(len(path) + 1)
            if unused[path[:depth]] == source.sizes[path[:depth]]
        )
        for path in paths
    )
    for place in dict.fromkeys(highest):
        many = "" if source.sizes[place] == 1 else f"({source.sizes[place]} arrays)"
        yield _said(place or ("all",), many)
