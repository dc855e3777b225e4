"""Contracts of programs: meshes, `shard_map`, `vmap`, one compilation, nothing of the host."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optclip.testing._samples import SHAPES, NotAsked, first_other, is_key, l2_of, normal, types_of
from optclip.testing._subject import Subject, attempt, raised

SPECS = {"a": P("data", "model"), "b": P("data"), "c": P()}
"""A leaf of the ordinary tree is split along two axes, one along one, and one not at all."""


def mesh_of(axis_type: Any = AxisType.Auto) -> Mesh:
    """Eight devices of this machine, or four, as a mesh.

    Raises:
        NotAsked: If there are fewer.
    """
    devices = jax.devices()
    if len(devices) < 4:
        devices = jax.devices("cpu")
    count = 8 if len(devices) >= 8 else 4
    if len(devices) < count:
        raise NotAsked(
            "needs 4 devices; before JAX is used: jax.config.update('jax_num_cpu_devices', 8)"
        )
    shape = (count // 2, 2)
    return Mesh(np.array(devices[:count]).reshape(shape), ("data", "model"), (axis_type,) * 2)


def same_on_a_mesh(subject: Subject) -> Iterator[str]:
    """Under `jit` arrays that are split over a mesh give what whole ones give."""
    params, gradients, right = _on_one_device(subject)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(axis_type)
        said = f"on a mesh with {axis_type.name.lower()} axes"

        def run(mesh: Mesh = mesh) -> Any:
            update = subject.jit(lambda *args: subject.transform.update(*args))
            split = _split(params, mesh)
            state = subject.fresh(split)
            state = jax.tree.map(_placed_as, state, subject.started)
            found = []
            for gradient in gradients:
                updates, state = update(_split(gradient, mesh), state, split)
                found.append(jax.device_get(updates))
            return found

        if other := first_other(attempt(said, run), right, rtol=1e-5):
            yield f"{said}: {other}"


def same_in_shard_map(subject: Subject) -> Iterator[str]:
    """Inside `shard_map`, where each device has its part, the parts are those of the whole."""
    params, gradients, right = _on_one_device(subject)
    mesh = mesh_of()
    told: dict[str, Any] = {}
    if subject.takes("axis_name"):
        told["axis_name"] = ("data", "model")
    if subject.takes("sharded"):
        told["sharded"] = SPECS
    transform = subject.build(**told)
    state = subject.started
    specs = _specs_of_state(state)
    for tracked in (False, True) if told else (False,):
        update = jax.shard_map(
            transform.update,
            mesh=mesh,
            in_specs=(SPECS, specs, SPECS),
            out_specs=(SPECS, specs),
            check_vma=tracked,
        )
        said = f"inside shard_map over {mesh.size} devices"

        def run(update: Any = update) -> Any:
            step, at, found = subject.jit(update), state, []
            for gradient in gradients:
                updates, at = step(gradient, at, params)
                found.append(jax.device_get(updates))
            return found

        found = attempt(said, run)
        if other := first_other(found, right, rtol=1e-5):
            without = "" if told else " (it has no argument axis_name)"
            sizes = [l2_of(trees[-1]) for trees in (found, right)]
            told_sizes = f"the norm of the whole update is {sizes[0]:.4g} where {sizes[1]:.4g} is "
            yield f"{said}{without}: " + (
                told_sizes + "right" if abs(sizes[0] - sizes[1]) > 1e-3 * sizes[1] else other
            )
            return


def _on_one_device(subject: Subject) -> tuple[Any, list[Any], list[Any]]:
    params = subject.params
    gradients = [normal(seed, scale=subject.size * k) for seed, k in enumerate((0.1, 3.0))]
    state, right = subject.started, []
    for gradient in gradients:
        updates, state = subject.update(gradient, state, params)
        right.append(jax.device_get(updates))
    return params, gradients, right


def _placed_as(x: Any, at: Any) -> Any:
    """The second array where the first lies; anywhere, if that is nobody's decision."""
    if is_key(x) or not hasattr(x, "sharding"):
        return at
    return jax.device_put(at, x.sharding) if x.committed else jnp.asarray(np.asarray(at))


def _split(tree: Any, mesh: Mesh) -> Any:
    explicit = AxisType.Explicit in mesh.axis_types

    def put(x: Any, spec: Any) -> Any:
        # As JAX itself writes them: with explicit axes a spec names every dimension.
        entries = (*spec, *(None,) * (x.ndim - len(spec))) if explicit else spec
        return jax.device_put(x, NamedSharding(mesh, P(*entries)))

    return {name: put(x, SPECS[name]) for name, x in tree.items()}


def _specs_of_state(state: Any) -> Any:
    """What lies as the parameters do has their spec, the rest is whole."""

    def spec(path: Any, x: Any) -> Any:
        named = str(getattr(path[-1], "key", "")) if path else ""
        for name in (named, *SHAPES):
            if np.shape(x) == SHAPES.get(name):
                return SPECS[name]
        return P()

    return jax.tree_util.tree_map_with_path(spec, state)


# vmap --------------------------------------------------------------------------------------------


def vmap_is_a_loop(subject: Subject) -> Iterator[str]:
    """Under `jax.vmap` each member of a batch is what it is alone, beside a NaN too."""
    sizes = (1.0, 1e-3, float("nan"), 0.0, 3.0)
    members = [
        (normal(seed, scale=subject.size * size), subject.started, normal(seed=1000 + seed))
        for seed, size in enumerate(sizes)
    ]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = attempt(
        "under jax.vmap", lambda: subject.jit(jax.vmap(subject.transform.update))(*batch)
    )
    for place, member in enumerate(members):
        found = jax.tree.map(lambda x, place=place: x[place], together)
        right = dict(zip(("updates", "state"), subject.update(*member), strict=True))
        if other := first_other(dict(zip(right, found, strict=True)), right, rtol=1e-6):
            yield f"under jax.vmap, member {place} of {len(members)}: {other}"
            return


# Compiled once -----------------------------------------------------------------------------------


def compiled_once(subject: Subject) -> Iterator[str]:
    """All steps run in one compiled program."""
    step = subject.jit(lambda *args: subject.transform.update(*args))
    state = subject.fresh(subject.params)
    for count, size in enumerate((1.0, 0.0, float("nan"), 1e-3, 1e25)):
        before = types_of(state)
        gradient = jax.tree.map(lambda x, size=size: x * jnp.float32(size), subject.loud)
        _, state = attempt(
            f"at step {count + 1}", lambda g=gradient, s=state: step(g, s, subject.params)
        )
        if step._cache_size() > 1:
            changed = "" if types_of(state) == before else ": the state has another form"
            yield f"step {count + 1} was compiled anew{changed}"
            return


def transformation_remembers_nothing(subject: Subject) -> Iterator[str]:
    """What is remembered is in the state: another tree in between changes no program."""

    def program(transform: Any) -> str:
        def two_steps(params: Any, updates: Any) -> Any:
            _, state = transform.update(updates, transform.init(params), params)
            return transform.update(updates, state, params)

        closed = jax.make_jaxpr(two_steps)(subject.params, subject.loud)
        return f"{closed} {[np.asarray(x).tolist() for x in closed.consts]}"

    transform, other = subject.build(), {"z": jnp.ones((2, 2))}
    first = program(transform)
    jax.eval_shape(lambda x: transform.update(x, transform.init(x), x), other)
    jax.eval_shape(subject.build().update, subject.soft, subject.started, subject.params)
    if program(transform) != first:
        yield "after a step of another tree the same clip traces another program"


def without_jit_it_does_the_same(subject: Subject) -> Iterator[str]:
    """A step that is not compiled is the compiled one."""
    names, args = ("updates", "state"), (subject.loud, subject.started, subject.params)
    found = dict(zip(names, subject.transform.update(*args), strict=True))
    right = dict(zip(names, subject.update(*args), strict=True))
    if other := first_other(found, right, rtol=1e-6):
        yield f"without jit: {other}"


# The host ----------------------------------------------------------------------------------------

TO_HOST = re.compile(r"callback|infeed|outfeed", re.IGNORECASE)


def nothing_is_asked_of_the_host(subject: Subject) -> Iterator[str]:
    """A compiled step calls nothing on the host, and asks for no value while it is traced."""
    args = subject.loud, subject.fresh(subject.params), subject.params
    try:
        program = str(jax.make_jaxpr(subject.transform.update)(*args))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        yield f"while traced it asks for a value: {raised(error)}"
        return
    if found := TO_HOST.search(program):
        line = next(line for line in program.splitlines() if TO_HOST.search(line))
        yield f"the program has a {found[0]}: {line.strip()[:120]}"
