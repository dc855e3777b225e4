"""Contract 10: on every layout of the devices, the result of a single device.

Eight devices as a mesh of 2 ("data") x 2 ("fsdp") x 2 ("tensor"), with leaves that are split over
one axis, over two along one dimension, along two dimensions, and whole ones. What JAX is made to
say and to compile there is in `test_collectives.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.registry import ONE_OF_EACH_KIND
from helpers.samples import (
    assert_close,
    canceled,
    detailed,
    once_a_method,
    quick_jit,
    specs_of_state,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

pytestmark = pytest.mark.usefixtures("strict")

each_kind = pytest.mark.parametrize("method", ONE_OF_EACH_KIND, ids=str)

SPECS = {
    "kernel": P(("data", "fsdp")),
    "keys": P("tensor", "fsdp"),
    "joint": P(None, ("fsdp", "tensor")),
    "bias": P(),
    "base": P(),
    "empty": P(),
}
SHAPES = {
    "kernel": ((8, 3), "float32"),
    "keys": ((4, 8), "bfloat16"),
    "joint": ((3, 8), "float32"),
    "bias": ((6,), "bfloat16"),
    "base": ((5, 2), "float32"),
    "empty": ((0, 4), "float32"),
}


def tree(seed: int, scale: float = 1.0) -> Any:
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * random.normal(size=shape), dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


PARAMS = tree(100)
GRADIENTS = [tree(0), tree(1), tree(2, scale=1e25), tree(3)]
WARM_UP = 40
GRADIENTS[1]["kernel"] = GRADIENTS[1]["kernel"].at[5, 1].set(jnp.nan)  # On one device's part.


class Single(NamedTuple):
    """A method on a single device.

    Attributes:
        start: Its state after `WARM_UP` ordinary steps, longer than any warm-up of the registry.
        steps: (updates, state) after each of `GRADIENTS` from there.
    """

    start: Any
    steps: list[tuple[Any, Any]]


@once_a_method
def single(method):
    transform = detailed(method)
    update, state = quick_jit(transform.update), transform.init(PARAMS)
    for seed in range(WARM_UP):
        _, state = update(tree(1000 + seed, scale=0.1), state, PARAMS)
    start = jax.tree.map(np.asarray, state)
    return Single(start, steps_of(update, state))


def started(fresh, start):
    """The state of a single device, placed as a fresh one is."""
    return jax.tree.map(lambda x, at: jax.device_put(at, x.sharding), fresh, start)


def steps_of(update, state, place=lambda tree: tree):
    """One program for all steps, and a state that lies where it lay, the same on all devices."""
    params, steps = place(PARAMS), []
    types = [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(state)]
    for gradient in GRADIENTS:
        updates, state = update(place(gradient), state, params)
        assert [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(state)] == types
        for x in jax.tree.leaves(state):
            if x.sharding.is_fully_replicated:
                assert_one_value([shard.data for shard in x.addressable_shards])
        steps.append((updates, state))
    assert update._cache_size() == 1
    return steps


def assert_one_value(copies):
    """Copies on several devices that are the same bit for bit."""
    assert len({np.asarray(copy).tobytes() for copy in copies}) == 1


def placed(tree, mesh, specs):
    """The tree on a mesh, its shardings written as JAX itself writes them there.

    With explicit axes a spec names every dimension; with automatic ones it ends at the last that
    is split. Written otherwise it is equivalent, but to `jit` it is another one.
    """
    explicit = AxisType.Explicit in mesh.axis_types

    def put(x, spec):
        entries = list(spec) + [None] * (x.ndim - len(spec))
        while not explicit and entries and entries[-1] is None:
            entries.pop()
        return jax.device_put(x, NamedSharding(mesh, P(*entries)))

    return jax.tree.map(put, tree, specs)


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(axis_type,) * 3)


def under_jit(method, axis_type):
    """Whole arrays: the compiler (automatic axes) or their types (explicit axes) do the rest."""
    place = functools.partial(placed, mesh=mesh_of(axis_type), specs=SPECS)
    transform, params = detailed(method), place(PARAMS)
    steps = steps_of(
        quick_jit(transform.update), started(transform.init(params), single(method).start), place
    )
    for updates, _ in steps:
        for name, x in updates.items():
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim), name
    return steps


class Manual(NamedTuple):
    """A `shard_map` over some axes.

    Attributes:
        axis_name: What the clip is told.
        check_vma: Whether JAX tracks which values vary over which axes.
        say: From the leaves' PartitionSpecs to `sharded=`; None says nothing.
        over: The axes that leaves are split over; None for all that the clip is told.
    """

    axis_name: Any
    check_vma: bool
    say: Callable[[Any], Any] | None = None
    over: Any = None


def under_shard_map(method, manual):
    over = manual.over or manual.axis_name
    specs = {name: projected(spec, over) for name, spec in SPECS.items()}
    said = manual.say and manual.say(specs)
    transform = detailed(method, axis_name=manual.axis_name, sharded=said)
    place = functools.partial(placed, mesh=mesh_of(), specs=specs)
    state = started(transform.init(place(PARAMS)), single(method).start)
    state_specs = specs_of_state(state, PARAMS, specs)
    update = jax.shard_map(
        transform.update,
        mesh=mesh_of(),
        in_specs=(specs, state_specs, specs),
        out_specs=(specs, state_specs),
        check_vma=manual.check_vma,
    )
    return steps_of(quick_jit(update), state, place)


def projected(spec, axis_name):
    """A PartitionSpec with the named axes only."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    entries = [
        tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name in names)
        for entry in spec
    ]
    return P(*(entry or None for entry in entries))


def by_path(specs):
    return lambda path: specs[path]


def under_pmap_after_pmean(method):
    """Every device holds the whole tree, and its own share of the gradient."""
    transform = detailed(method)

    @quick_jit
    @functools.partial(jax.pmap, axis_name="batch", in_axes=(0, 0, None))
    def update(shares, state, params):
        return transform.update(lax.pmean(shares, "batch"), state, params)

    def shares(x):  # Their mean is exact.
        return np.stack([8 * np.asarray(x)] + [0 * np.ones_like(x)] * 7)

    state, steps = on_each_device(single(method).start), []
    for gradient in GRADIENTS:
        copies = update(jax.tree.map(shares, gradient), state, PARAMS)
        steps.append(the_one(copies))
        state = on_each_device(steps[-1][1])
    return steps


def under_pmap_over_parts(method):
    """Two leaves are split over the eight devices, the others whole on each."""
    split = {name: P() for name in SPECS} | {"kernel": P("part"), "joint": P(None, "part")}
    transform = detailed(method, axis_name="part", sharded=split)
    state = single(method).start
    # Along which dimension a leaf is split; -1 for a copy on each device.
    specs = split, specs_of_state(state, PARAMS, split), split
    axes = jax.tree.map(lambda spec: spec.index("part") if "part" in spec else -1, specs)

    def parts(x, axis):  # pmap takes the axis of devices away: eight parts of length 1 each.
        return np.stack([x] * 8) if axis < 0 else np.expand_dims(x, axis + 1)

    def whole(x, axis):
        if axis < 0:
            assert_one_value(x)
        return np.asarray(x)[0, ...] if axis < 0 else np.squeeze(x, axis + 1)

    given = jax.tree.map(lambda axis: max(axis, 0), axes)
    update = quick_jit(
        jax.pmap(transform.update, axis_name="part", in_axes=given, out_axes=given[:2])
    )
    steps = []
    for gradient in GRADIENTS:
        copies = update(*jax.tree.map(parts, (gradient, state, PARAMS), axes))
        steps.append(jax.tree.map(whole, copies, axes[:2]))
        state = steps[-1][1]
    return steps


def on_each_device(tree):
    return jax.tree.map(lambda x: np.stack([np.asarray(x)] * 8), tree)


def the_one(stacks):
    """What every row of a stack, a row for each device, holds."""
    jax.tree.map(assert_one_value, stacks)
    return jax.tree.map(lambda rows: np.asarray(rows)[0, ...], stacks)


LAYOUTS = {
    "automatic axes": lambda method: under_jit(method, AxisType.Auto),
    "explicit axes": lambda method: under_jit(method, AxisType.Explicit),
    "pmap after pmean": under_pmap_after_pmean,
    "pmap over parts": under_pmap_over_parts,
}
MANUAL = {
    "tracked, data": Manual("data", True),
    "tracked, fsdp": Manual("fsdp", True),
    "tracked, fsdp and tensor": Manual(("fsdp", "tensor"), True),
    "tracked, data and one that splits nothing": Manual(("data", "tensor"), True, over="data"),
    "tracked and said, all": Manual(("tensor", "data", "fsdp"), True, dict),
    "said, tensor": Manual("tensor", False, by_path),
    "said, data and fsdp": Manual(("data", "fsdp"), False, dict),
}


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_whole_arrays_and_pmap(method, layout):
    assert_close(LAYOUTS[layout](method), single(method).steps, atol=canceled(method))


@each_kind
@pytest.mark.parametrize("layout", MANUAL)
def test_shard_map(method, layout):
    manual = MANUAL[layout]
    if method.scope in ("unit", "matrix") and manual.say is None:
        # JAX tracks over which axes a leaf is split, not along which of its dimensions.
        with pytest.raises(ValueError, match=r"sharded= with a PartitionSpec"):
            under_shard_map(method, manual)
    else:
        found = under_shard_map(method, manual)
        assert_close(found, single(method).steps, atol=canceled(method))


@pytest.mark.parametrize("size", [1.0, 1e30])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_leaves_of_one_role_may_lie_differently(axis_type, size):
    """Alike but for a number in their paths, they may be added up entry by entry; here they cannot.

    At 1e30 they are measured a second time.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    specs = [P("data"), P(None, "data"), P()]
    whole = jnp.full((8, 8), size)
    clip = optclip.clip_by_global_norm(1.0)
    with jax.set_mesh(mesh):
        tree = [jax.device_put(whole, NamedSharding(mesh, spec)) for spec in specs]
        updates, state = jax.jit(clip.update)(tree, clip.init(tree))
    np.testing.assert_allclose(state.norm, size * np.sqrt(192), rtol=1e-6)
    for update in updates:
        np.testing.assert_allclose(jax.device_get(update), 1 / np.sqrt(192), rtol=1e-6)


@pytest.mark.parametrize(
    "spec", [P(None, "data"), P("data"), P(None, None, "data"), P("data", "fsdp")]
)
def test_units_of_a_stack_of_matrices_however_it_is_split(spec):
    """A unit spans axis 0; there is one for each place along the other two, split or not."""
    random = np.random.default_rng(0)
    gradient, params = (jnp.asarray(random.normal(size=(4, 4, 6)), jnp.float32) for _ in range(2))
    alone = optclip.adaptive_grad_clip(0.1, detail=True)
    expected = alone.update(gradient, alone.init(params), params)
    clip = optclip.adaptive_grad_clip(
        0.1, axis_name=("data", "fsdp"), sharded=lambda path: spec, detail=True
    )
    whole = jax.tree.map(lambda x: P(), expected[1])
    update = jax.shard_map(
        clip.update, mesh=mesh_of(), in_specs=(spec, whole, spec), out_specs=(spec, whole)
    )
    assert_close(quick_jit(update)(gradient, alone.init(params), params), expected, rtol=2e-6)
