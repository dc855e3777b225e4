"""A contender's step, compiled, with what compiling it tells."""

import time
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.speed.contenders import Contender
from benchmarks.speed.trees import Tree
from benchmarks.speed.work import Work, work_of


class Program(NamedTuple):
    """A compiled step.

    Attributes:
        optimizer: The clip with SGD.
        compiled: (params, state, gradient) -> (params, state).
        lowering_seconds: Time to trace and lower it.
        compile_seconds: Time of XLA.
        temporary_bytes: Memory beside arguments and results.
        bytes_accessed: What XLA expects to be read and written, both branches of a condition
            included; None where its backend does not say.
        work: What it does to the leaves.
    """

    optimizer: optax.GradientTransformation
    compiled: Any
    lowering_seconds: float
    compile_seconds: float
    temporary_bytes: int
    bytes_accessed: float | None
    work: Work


def shapes(tree: Tree, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The tree without its numbers."""
    return {
        name: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))
        for name, shape in tree.shapes.items()
    }


def build(contender: Contender, tree: Tree, dtype: str) -> Program:
    """Compiles a step; nothing of an earlier compilation is used.

    The step is clip, `optax.sgd(0.01)` and `apply_updates`, jitted as a whole. Parameters and state
    are donated.
    """
    optimizer = contender.around(optax.sgd(0.01))

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = shapes(tree, dtype)
    state = jax.eval_shape(optimizer.init, params)
    # JAX remembers what it has traced, per function and shape. A person's first step does not have
    # that, so neither has this one.
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    between = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    sizes = {x.size for x in params.values()}
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}
    return Program(
        optimizer,
        compiled,
        between - start,
        end - between,
        memory.temp_size_in_bytes,
        costs.get("bytes accessed"),
        work_of(compiled.as_text() or "", sizes),
    )
