"""The steps that are compiled: a clip around an optimizer, on a tree of parameters."""

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import optclip
from benchmarks.accelerators import reading
from benchmarks.accelerators.targets import AXES, Target, mesh_of
from benchmarks.speed import contenders, trees
from benchmarks.speed.contenders import Contender
from benchmarks.speed.trees import Tree, hint
from optclip import scopes

ADAMW = "optax.adamw"
CLIPPED_ADAMW = "optax.clip_by_global_norm + adamw"
WRAPPERS = ("clip_by_adam_rms", "safeguard", "skip_spikes")
LIKE = {
    "adagc": "optax.clip_by_block_rms",
    "clip_by_adam_rms": CLIPPED_ADAMW,
    "clip_by, layers": "optax.clip_by_block_rms",
    "clip_by_leaf_norm": "optax.clip_by_block_rms",
    "safeguard": CLIPPED_ADAMW,
    "skip_spikes": CLIPPED_ADAMW,
}
"""What a method without a counterpart is set beside; others: the global clip."""

GIVEN = ", norm given"
"""End of the names of those that get `grad_norm=`, and need not measure."""

TREES = ("16-leaves", "1000-leaves", "stacked")
SLICED = trees.transformer(100_000_000)
SPLIT_BACK = ("attention_out", "narrowing", "embedding")
"""Ends of the names of matrices that are split (tensor, fsdp), and not the other way."""


class Case(NamedTuple):
    """One program.

    Attributes:
        target: What it is compiled for.
        tree: The parameters.
        dtype: Of parameters and gradient.
        contender: The step.
    """

    target: Target
    tree: Tree
    dtype: str
    contender: Contender

    @property
    def place(self) -> tuple[str, str, str]:
        """Device, tree and dtype: of one table."""
        return self.target.name, self.tree.name, self.dtype

    @property
    def key(self) -> str:
        """By which results are kept."""
        return "|".join((*self.place, self.contender.name))


def known() -> dict[str, Contender]:
    """Everybody, by name: Optax first."""
    clip = optax.clip_by_global_norm(1.0)
    references = [x for x in contenders.references() if x.name != contenders.FLOOR]
    adamw = [
        Contender(ADAMW, lambda optimizer: optimizer),
        Contender(CLIPPED_ADAMW, lambda optimizer: optax.chain(clip, optimizer)),
    ]
    methods = {x.name: x for x in contenders.methods()}
    given = [
        methods[name]._replace(name=name + GIVEN, counterpart=contenders.SGD)
        for name in ("clip_by_global_norm", "robust_clip")
    ]
    by_layer = optclip.clip_by(0.1, scope=scopes.layer(lambda path: path.startswith("stacked_")))
    layers = Contender("clip_by, layers", lambda optimizer: optax.chain(by_layer, optimizer))
    return {x.name: x for x in [*references, *adamw, *methods.values(), *given, layers]}


def counterpart(contender: Contender) -> str:
    """Optax's step that a method is set beside."""
    return contender.counterpart or LIKE.get(contender.name, "optax.clip_by_global_norm")


def chosen(names: Iterable[str] | None) -> list[Contender]:
    """The contenders of these names (None: all), with those that they are set beside.

    Raises:
        ValueError: If there is none of a name.
    """
    everyone = known()
    if names is None:
        return list(everyone.values())
    wanted = {contenders.SGD}
    for name in names:
        name = name.removeprefix("optclip.")
        if name not in everyone:
            raise ValueError(f"there is no method {name!r}; {hint(name, everyone)}")
        wanted.add(name)
        if not name.startswith("optax.") and name != contenders.SGD:
            wanted.add(counterpart(everyone[name]))
    return [x for name, x in everyone.items() if name in wanted]


def measure(case: Case) -> dict[str, Any]:
    """Compiles a step and reads it; multiples are of one device's part of the gradient."""
    mesh = mesh_of(case.target)
    with_adamw = case.contender.name in (*WRAPPERS, ADAMW, CLIPPED_ADAMW)
    optimizer = case.contender.around(optax.adamw(1e-3) if with_adamw else optax.sgd(0.01))

    def placed(tree: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            tree,
            specs,
        )

    params = {
        name: jax.ShapeDtypeStruct(shape, case.dtype) for name, shape in case.tree.shapes.items()
    }
    specs = {name: _spec(case.target, name, x) for name, x in params.items()}
    state = jax.eval_shape(optimizer.init, params)
    by_shape = {x.shape: specs[name] for name, x in params.items()}
    of_state = jax.tree.map(lambda x: by_shape.get(x.shape, PartitionSpec()), state)

    with_norm = optax.with_extra_args_support(optimizer)

    def step(params: Any, state: Any, gradient: Any, **known: Any) -> Any:
        updates, state = with_norm.update(gradient, state, params, **known)
        return optax.apply_updates(params, updates), state

    whole = NamedSharding(mesh, PartitionSpec())
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    known = {"grad_norm": number} if case.contender.name.endswith(GIVEN) else {}
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        placed(params, specs), placed(state, of_state), placed(params, specs), **known
    )
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    found, memory = reading.read(compiled.as_text() or ""), compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory is not None else math.nan
    parts = {axis: size for axis, size in zip(AXES, case.target.mesh or (1, 1), strict=True)}
    size = jax.numpy.dtype(case.dtype).itemsize * sum(
        math.prod(x.shape) / math.prod(parts[axis] for axis in specs[name] if axis)
        for name, x in params.items()
    )
    return {
        "passes": found.bytes / size,
        "kernels": found.kernels,
        "conditionals": found.conditionals,
        "collectives": dict(found.collectives),
        "cycles": found.cycles,
        "temporary_share": temporary / size,
        "compile_seconds": seconds,
    }


def _spec(target: Target, name: str, x: Any) -> PartitionSpec:
    if not target.mesh or x.ndim < 2:
        return PartitionSpec()
    return PartitionSpec(*(reversed(AXES) if name.endswith(SPLIT_BACK) else AXES))
