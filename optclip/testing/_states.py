"""Contracts of the state: in a scan, donated, resumed, and in the hands of Optax's wrappers."""

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip.testing._samples import first_other, is_key, normal, types_of, without_keys
from optclip.testing._subject import Subject, attempt, raised

# A scan's carry ----------------------------------------------------------------------------------


def carry_keeps_its_form(subject: Subject) -> Iterator[str]:
    """From `init` on the state has one structure, and its leaves one shape and dtype."""
    kinds = ("float32", "bfloat16", "float16", "bfloat16 and float32")
    said_so: set[str] = set()
    for of_params, of_updates in itertools.product(kinds[:2], kinds):
        params, updates = _cast(normal(seed=1000), of_params), _cast(normal(seed=1), of_updates)
        said = f"parameters of {of_params}, updates of {of_updates}"
        state = subject.fresh(params)
        found = []
        if other := _other_types(state, state):
            found.append(f"a fresh state has {other}")
        try:
            after = jax.eval_shape(
                lambda *args: subject.transform.update(*args)[1], updates, state, params
            )
        except Exception as error:
            found.append(raised(error))
        else:
            if other := _other_types(state, after):
                found.append(f"after a step the state has {other}")
        yield from (f"{said}: {line}" for line in found if line not in said_so)
        said_so.update(found)


def _cast(tree: Any, kinds: str) -> Any:
    types = itertools.cycle(kinds.split(" and "))
    return {name: x.astype(kind) for (name, x), kind in zip(tree.items(), types, strict=False)}


def _other_types(before: Any, after: Any) -> str | None:
    one, other = types_of(before), types_of(after)
    if one[0] != other[0]:
        return f"another structure, {other[0]} for {one[0]}"
    for (shape, dtype, weak), (_, was, _) in zip(other[1], one[1], strict=True):
        if weak:
            return f"a weakly typed {dtype}{list(shape)}"
        if dtype != was:
            return f"a leaf of {dtype} that was {was}"
    for new, old in zip(other[1], one[1], strict=True):
        if new != old:
            return f"a leaf {new[1]}{list(new[0])} that was {list(old[0])}"
    return None


def scan_is_a_loop(subject: Subject) -> Iterator[str]:
    """Steps in `jax.lax.scan` are the steps of a loop."""
    gradients = _gradients(subject)

    @subject.jit
    def scanned(state: Any, gradients: Any) -> Any:
        def body(state: Any, updates: Any) -> Any:
            updates, state = subject.transform.update(updates, state, subject.params)
            return state, updates

        return jax.lax.scan(body, state, gradients)

    fresh = subject.fresh(subject.params)
    state, updates = attempt("in jax.lax.scan", lambda: scanned(fresh, _stacked(gradients)))
    looped, each = _run(subject.update, fresh, gradients, subject.params)
    right = {"updates": _stacked(each), "state": looped}
    if other := first_other({"updates": updates, "state": state}, right, rtol=1e-6):
        yield f"in jax.lax.scan: {other}"


def init_needs_shapes_only(subject: Subject) -> Iterator[str]:
    """`init` of shapes and dtypes, under `jit` and `eval_shape` too, gives the same state."""
    state = subject.fresh(subject.params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), subject.params)
    abstract = attempt(
        "jax.eval_shape of init",
        lambda: jax.eval_shape(lambda: subject.transform.init(subject.params)),
    )
    if types_of(abstract) != types_of(state):
        yield f"jax.eval_shape of init: {_other_types(state, abstract)}"
    jitted = attempt("init under jit", lambda: subject.jit(subject.transform.init)(subject.params))
    if other := first_other(jitted, state):
        yield f"init under jit: {other}"
    of_shapes = attempt("init of shapes alone", lambda: subject.transform.init(shapes))
    if other := first_other(of_shapes, state):
        yield f"init of shapes alone: {other}"


def _gradients(subject: Subject) -> list[Any]:
    sizes = (0.1, 1.0, 0.0, float("nan"), 0.1, 1.0)
    return [normal(seed, scale=subject.size * size) for seed, size in enumerate(sizes)]


def _run(update: Any, state: Any, gradients: list[Any], params: Any) -> tuple[Any, list[Any]]:
    each = []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        each.append(updates)
    return state, each


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


# Donation ----------------------------------------------------------------------------------------


def no_buffer_is_shared(subject: Subject) -> Iterator[str]:
    """No two leaves of a fresh state, nor a leaf and a parameter, are one buffer."""
    state = subject.fresh(subject.params)
    both = without_keys({"params": subject.params, "state": state})
    named = jax.tree_util.tree_leaves_with_path(both)
    owner: dict[int, str] = {}
    for path, x in named:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(x, jax.Array):
            yield f"{where} is a {type(x).__name__} and no jax.Array, so it cannot be donated"
            continue
        pointer = x.addressable_shards[0].data.unsafe_buffer_pointer()
        if x.size and pointer in owner:
            yield f"{where} is the buffer of {owner[pointer]}: donated, it would be given twice"
        owner[pointer] = where


def donated_steps_are_the_same(subject: Subject) -> Iterator[str]:
    """With gradient and state donated every step is the same."""
    gradients = _gradients(subject)
    donated = subject.jit(
        lambda *args: subject.transform.update(*args), donate_argnums=(0, 1), keep_unused=True
    )
    state = _copied(subject.fresh(subject.params))
    state, each = attempt(
        "with donate_argnums=(0, 1)",
        lambda: _run(donated, state, [_copied(x) for x in gradients], subject.params),
    )
    right, updates = _run(subject.update, subject.fresh(subject.params), gradients, subject.params)
    expected = {"updates": updates, "state": right}
    if other := first_other({"updates": each, "state": state}, expected, rtol=1e-6):
        yield f"with donate_argnums=(0, 1): {other}"


# A run that is resumed ---------------------------------------------------------------------------


def resumed_is_the_same_run(subject: Subject) -> Iterator[str]:
    """A state that was saved and restored goes on bit for bit, in a new process too."""
    gradients = _gradients(subject)
    halfway, _ = _run(subject.update, subject.started, gradients[:2], subject.params)
    leaves = jax.tree.map(np.asarray, jax.tree.leaves(without_keys(halfway)))
    saved = [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if is_key(old) else new
        for old, new in zip(
            jax.tree.leaves(halfway), pickle.loads(pickle.dumps(leaves)), strict=True
        )
    ]
    template = jax.eval_shape(lambda: subject.transform.init(subject.params))
    if jax.tree.structure(template) != jax.tree.structure(halfway):
        yield (
            "a fresh state, into which one restores, has another structure than one after a step: "
            f"{jax.tree.structure(template)} for {jax.tree.structure(halfway)}"
        )
        return
    restored = jax.tree.unflatten(jax.tree.structure(template), saved)
    restored = jax.device_put(restored, jax.devices()[0])
    # Made anew, as a new process makes it: what it kept outside of its state is not there.
    again = subject.build()
    update = subject.jit(lambda *args: again.update(*args))
    right, rest = _run(subject.update, halfway, gradients[2:], subject.params)
    state, each = _run(update, restored, gradients[2:], subject.params)
    if other := first_other({"updates": each, "state": state}, {"updates": rest, "state": right}):
        yield f"resumed after 2 steps: {other}"


# Composition -------------------------------------------------------------------------------------


def composes(subject: Subject) -> Iterator[str]:
    """Inside Optax's wrappers it does, and reads, what it does by itself."""
    params = _pair(subject.params)
    gradients = [_pair(normal(seed, scale=subject.size)) for seed in range(2)]

    def run(optimizer: Any, params: Any, gradients: list[Any], times: int = 1) -> Any:
        @subject.jit
        def step(updates: Any, state: Any) -> Any:
            updates, state = optimizer.update(updates, state, params)
            return updates, state, subject.readings(state)

        state, found = optimizer.init(params), []
        for updates in gradients:
            changed, state, readings = step(updates, state)
            for _ in range(times - 1):
                changed, state, readings = step(updates, state)
            found.append((changed, readings))
        return found

    def halved(steps: Any) -> Any:
        return [(jax.tree.map(lambda x: -x / 2, updates), read) for updates, read in steps]

    def clip() -> Any:
        return subject.build()

    alone = halved(run(clip(), params, gradients))
    second = [{"b": gradient["b"]} for gradient in gradients]
    part = halved(run(clip(), {"b": params["b"]}, second))

    def beside(rest: Any) -> Any:
        return [
            ({"a": rest(g["a"]), **updates}, read)
            for g, (updates, read) in zip(gradients, part, strict=True)
        ]

    sgd, half = optax.sgd(0.5), optax.scale(-0.5)
    cases: dict[str, tuple[Any, Any, int]] = {  # A chain, each of them.
        "optax.apply_if_finite": (
            lambda: optax.apply_if_finite(optax.chain(clip(), sgd), 3),
            alone,
            1,
        ),
        "optax.MultiSteps": (
            lambda: optax.MultiSteps(optax.chain(clip(), sgd), 2).gradient_transformation(),
            alone,
            2,
        ),
        "optax.masked": (
            lambda: optax.masked(optax.chain(clip(), half), {"a": False, "b": True}),
            beside(lambda x: x),
            1,
        ),
        "optax.partition": (
            lambda: optax.partition(
                {"x": optax.chain(clip(), half), "y": sgd}, {"a": "y", "b": "x"}
            ),
            beside(lambda x: -x / 2),
            1,
        ),
    }
    for name, (make, right, times) in cases.items():
        try:
            found = run(make(), params, gradients, times)
        except Exception as error:
            yield f"in {name}: {raised(error)}"
            continue
        if other := first_other(found, right, rtol=1e-6):
            yield f"in {name}: {other}"
    yield from _injects(subject, params, gradients)


def _pair(tree: Any) -> Any:
    return {name: tree[name] for name in "ab"}


def _injects(subject: Subject, params: Any, gradients: list[Any]) -> Iterator[str]:
    """`inject_hyperparams` sets the threshold, in trees of every type."""
    if subject.factory is None or subject.threshold is None:
        return
    fixed = set(subject.parameters) - {subject.threshold}
    try:
        made = optax.inject_hyperparams(subject.factory, static_args=fixed)(
            **{subject.threshold: float(jnp.bfloat16(subject.value))}
        )
    except Exception as error:
        yield f"in optax.inject_hyperparams: {raised(error)}"
        return
    mixed = "bfloat16 and float32"
    for kinds in (mixed,) if subject.quick else ("float32", "bfloat16", mixed):
        cast = [_cast(tree, kinds) for tree in (params, gradients[0])]
        said = f"in optax.inject_hyperparams, updates of {kinds}"
        try:
            state = made.init(cast[0])
            updates, after = subject.jit(made.update)(cast[1], state, cast[0])
        except Exception as error:
            yield f"{said}: {raised(error)}"
            continue
        if other := _other_types(state, after):
            yield f"{said}: after a step the state has {other}"
        plain = subject.build(float(jnp.bfloat16(subject.value)))
        right, _ = subject.jit(plain.update)(cast[1], plain.init(cast[0]), cast[0])
        if other := first_other(updates, right, rtol=1e-6):
            yield f"{said}: {other}"
