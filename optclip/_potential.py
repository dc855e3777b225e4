"""How far an optimizer could go, asked of the optimizer itself.

It runs on a tree of the same structure whose leaves have one entry each, the root mean square of
the real leaf's gradient: what it makes of that is the length that its update would have if all
gradients so far had pointed the same way. Paths, ranks, labels, schedules and counts are those of
the real tree, so that a schedule, a mask or a partition means the same there. It costs a few
numbers for each leaf, and no pass over the gradient.

A tree may have thousands of leaves, and an optimizer treats most of them alike. Its program is
therefore traced once, and only those parts of it are run that differ, each for all the leaves that
it is the same for.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optclip import _jax, _numerics
from optclip._paths import leaves_with_paths
from optclip._programs import Forms, Input

STEPS, NOISES = 128, 64
"""How long the optimizer is watched when it is met, and on how many streams of random signs."""

SEEN_THROUGH = 1.5
"""From which ratio on noise is said to move the weights further than the update's size tells: a
measurement on 64 streams is not more exact."""

WIDEST, SLOWEST = 20.0, 0.95
"""The most that is believed of what `Small.nature` measures."""


NOBODY = -1
"""The owner of what belongs to no leaf that is asked about."""


@_jax.exportable
class Nature(NamedTuple):
    """What an optimizer is like, leaf by leaf; arrays of shape (leaves,).

    Attributes:
        grows: Whether its update grows with the gradient, as of SGD and momentum; 0 or 1. That of
            Adam, Lion or Muon does not.
        gain: What one gradient adds to all updates in sum, over what it adds to the first: 10 for a
            momentum of 0.9.
        fading: The share of an update that is left when no gradient follows: 0.9 for a momentum of
            0.9 and for Adam. By it an optimizer's first updates are larger than its gradients'
            share, where a bias is corrected.
        reach: How far one gradient moves the weights among others of random direction, over the
            size of an update: 1 but where the update is normalized after it was averaged (Lion
            about 3, LAMB about 4).
    """

    grows: jax.Array
    gain: jax.Array
    fading: jax.Array
    reach: jax.Array


class _Kind(NamedTuple):
    """Leaves that the optimizer treats alike.

    Attributes:
        leaves: Which of the leaves that are asked about.
        equations: The part of the program that the first of them needs.
        own: For each of the leaves the places of its own state among all of it.
    """

    leaves: tuple[int, ...]
    equations: list[Any]
    own: tuple[tuple[int, ...], ...]


class Small:
    """An optimizer on one entry a leaf.

    Args:
        inner: The optimizer.
        updates: The gradient, for its structure.
        params: The parameters, likewise.
        inner_state: The real optimizer's state.
        paths: Of the leaves that are asked about.
        dtype: Of what is asked and answered.
        extra_args: What else its `update` takes. An argument like the gradient, as `grad=`, is the
            gradient.
    """

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        updates: optax.Updates,
        params: optax.Params,
        inner_state: Any,
        paths: Sequence[str],
        dtype: Any,
        extra_args: dict[str, Any],
    ) -> None:
        self.inner, self.dtype = inner, dtype
        self.gradient, self.params = (jax.tree.map(_small_like, x) for x in (updates, params))
        self.of_gradient, self.of_params = (_places(x, paths) for x in (updates, params))
        like = jax.tree.structure(updates)
        copies = [x for x, y in extra_args.items() if jax.tree.structure(y) == like]
        self.copies = copies if like.num_leaves > 1 else []
        self.extra_args = {x: y for x, y in extra_args.items() if x not in self.copies}
        self.state = jax.eval_shape(lambda: inner.init(self.params))
        small, real = jax.tree.leaves(self.state), jax.tree.leaves(inner_state)
        same = jax.tree.structure(self.state) == jax.tree.structure(inner_state)
        self.shared = {
            place: real[place]
            for place, x in enumerate(small)
            if same and _as_large(x, real[place])
        }
        """What the real state has as well: counts, learning rates."""
        self.starts: dict[int, int] = {}
        """Where in the numbers of its own each other leaf of its state begins."""
        self.size = 0
        for place, x in enumerate(small):
            if place not in self.shared:
                self.starts[place] = self.size
                self.size += x.size

    # Its state -----------------------------------------------------------------------------------

    def fresh(self) -> jax.Array | tuple[()]:
        """What its state has of its own at the start."""
        return self._packed(jax.tree.leaves(self.inner.init(self.params)))

    def _packed(self, state: list[Any]) -> jax.Array | tuple[()]:
        own = [jnp.ravel(jnp.asarray(state[place])).astype(self.dtype) for place in self.starts]
        return jnp.concatenate(own) if own else ()

    def _unpacked(self, numbers: Any) -> list[Any]:
        leaves, found = jax.tree.leaves(self.state), []
        for place, x in enumerate(leaves):
            if place in self.shared:
                found.append(self.shared[place])
            else:
                start = self.starts[place]
                own = jnp.reshape(jnp.asarray(numbers[start : start + x.size]), x.shape)
                found.append(own.astype(x.dtype))
        return found

    # What it is asked ----------------------------------------------------------------------------

    def ask(self, gradient: jax.Array, numbers: Any, weights: jax.Array) -> tuple[jax.Array, Any]:
        """What the optimizer makes of gradients.

        Args:
            gradient: The size of each leaf's.
            numbers: What its state has of its own.
            weights: The size of each leaf's.

        Returns:
            The size of its updates, one number a leaf, and what its state has of its own then.
        """
        if self.kinds is None:
            updates, state = self._whole(gradient, weights, self._unpacked(numbers))
            return jnp.abs(updates), self._packed(state)
        sizes, own, at = [jnp.zeros([0], self.dtype)], [], []
        for kind in self.kinds:
            of_kind = np.array(kind.leaves)
            places = [self._numbers_of(kind, slot) for slot in range(len(kind.own[0]))]
            before = [numbers[place] for place in places]
            run = functools.partial(self._of_kind, kind, self.shared)
            updates, after = jax.vmap(run)(gradient[of_kind], weights[of_kind], before)
            sizes.append(jnp.abs(updates))
            own += [jnp.ravel(x) for x in after]
            at += [np.ravel(place) for place in places]
        order = np.argsort([leaf for kind in self.kinds for leaf in kind.leaves])
        return jnp.concatenate(sizes)[order.astype(int)], self._replaced(numbers, own, at)

    def _numbers_of(self, kind: _Kind, slot: int) -> np.ndarray:
        """Where in all numbers one part of the state of each leaf is; one row a leaf."""
        places = [own[slot] for own in kind.own]
        entries = jax.tree.leaves(self.state)[places[0]].size
        return np.array([self.starts[place] for place in places])[:, None] + np.arange(entries)

    def _replaced(self, numbers: Any, own: list[jax.Array], at: list[np.ndarray]) -> Any:
        """All numbers with those at some places replaced."""
        if not own:
            return numbers
        places = np.concatenate(at)
        left = np.setdiff1d(np.arange(self.size), places)  # Of leaves that nobody asks about.
        if left.size:
            own, places = [*own, numbers[left]], np.concatenate([places, left])
        return jnp.concatenate(own)[np.argsort(places)]

    def _of_kind(
        self, kind: _Kind, shared: dict[int, Any], gradient: Any, weights: Any, own: list[Any]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The update of a leaf and its own state then, as entries of numbers."""
        first, leaves = kind.leaves[0], jax.tree.leaves(self.state)
        gradients, params, state = self._inputs()
        known = {state[place]: x for place, x in shared.items()}
        for place, x in zip(kind.own[0], own, strict=True):
            like = leaves[place]
            known[state[place]] = jnp.reshape(x, like.shape).astype(like.dtype)
        for var, value in (
            (gradients[self.of_gradient[first]], gradient),
            (params[self.of_params[first]], weights),
        ):
            known[var] = jnp.full(var.aval.shape, value, var.aval.dtype)
        updates, after = self._outputs()
        wanted = [updates[self.of_gradient[first]], *(after[place] for place in kind.own[0])]
        update, *after = self._evaluated(kind.equations, known, wanted)
        return self._entry(update), [jnp.ravel(x).astype(self.dtype) for x in after]

    def _entry(self, update: Any) -> jax.Array:
        return jnp.real(jnp.ravel(jnp.asarray(update))[0]).astype(self.dtype)

    def _whole(
        self, gradient: jax.Array, weights: jax.Array, state: list[Any]
    ) -> tuple[jax.Array, list[Any]]:
        """The same of all leaves at once, of an optimizer that makes one of what another is."""
        updates, new = self._update(
            _filled(self.gradient, self.of_gradient, gradient),
            _filled(self.params, self.of_params, weights),
            jax.tree.unflatten(jax.tree.structure(self.state), state),
            self.extra_args,
        )
        leaves = jax.tree.leaves(updates)
        entries = [self._entry(leaves[place]) for place in self.of_gradient]
        together = jnp.stack(entries) if entries else jnp.zeros([0], self.dtype)
        return together, jax.tree.leaves(new)

    def _update(self, gradient: Any, params: Any, state: Any, extra_args: Any) -> Any:
        copies = dict.fromkeys(self.copies, gradient)
        return self.inner.update(gradient, state, params, **extra_args, **copies)

    # Its program ---------------------------------------------------------------------------------

    @functools.cached_property
    def program(self) -> Any:
        """Its update as a closed jaxpr: of gradients, parameters, state, and what else it takes.

        Without jitted functions in it, of which one may be for all leaves.
        """
        arguments = self.gradient, self.params, self.state, self.extra_args
        closed = jax.make_jaxpr(self._update)(*arguments)
        taken_apart = functools.partial(_jax.evaluated_whole, closed)
        return jax.make_jaxpr(taken_apart)(jax.tree.leaves(arguments))

    def _inputs(self) -> tuple[list[Any], list[Any], list[Any]]:
        variables = self.program.jaxpr.invars
        ends = np.cumsum(
            [len(jax.tree.leaves(x)) for x in (self.gradient, self.params, self.state)]
        )
        return variables[: ends[0]], variables[ends[0] : ends[1]], variables[ends[1] : ends[2]]

    def _outputs(self) -> tuple[list[Any], list[Any]]:
        variables, updates = self.program.jaxpr.outvars, len(jax.tree.leaves(self.gradient))
        return variables[:updates], variables[updates:]

    def _evaluated(
        self, equations: list[Any], known: dict[Any, Any], wanted: list[Any]
    ) -> list[Any]:
        """Some results of the program.

        Args:
            equations: Those that they need.
            known: Its inputs; what stands for the constants and for what else it takes is added.
            wanted: The variables.
        """
        jaxpr = self.program.jaxpr
        extra = jax.tree.leaves(self.extra_args)
        known = known | dict(zip(jaxpr.constvars, self.program.consts, strict=True))
        known |= dict(zip(jaxpr.invars[len(jaxpr.invars) - len(extra) :], extra, strict=True))
        return _jax.evaluated(equations, known, wanted)

    @functools.cached_property
    def kinds(self) -> list[_Kind] | None:
        """The leaves by what the optimizer does with them; None if it mixes them, as by a norm."""
        of_state, owned = self._parts_of_state()
        forms = Forms(self.program, [*self._other_inputs(), *of_state, *self._extra_inputs()])
        updates, after = self._outputs()
        if any(forms.leaves(after[place]) for place in self.shared):
            return None
        alike: dict[Any, list[int]] = {}
        for leaf, place in enumerate(self.of_gradient):
            results = [updates[place], *(after[own] for own in owned.get(leaf, ()))]
            if any(forms.leaves(x) - {leaf} for x in results):
                return None
            mine = tuple(of_state[own].token for own in owned.get(leaf, ()))
            alike.setdefault((tuple(map(forms.form, results)), mine), []).append(leaf)
        self._for_shared = forms.needed([after[place] for place in self.shared])
        return [
            _Kind(
                tuple(leaves),
                forms.needed([updates[self.of_gradient[leaves[0]]], *(after[x] for x in own[0])]),
                own,
            )
            for leaves in alike.values()
            for own in [tuple(tuple(owned.get(leaf, ())) for leaf in leaves)]
        ]

    def _parts_of_state(self) -> tuple[list[Input], dict[int, list[int]]]:
        """What each leaf of the state is to the program, and which belong to each leaf asked about.

        A part of the state has the structure of the parameters: its paths end as theirs do.
        """
        paths = [path for path, _ in jax.tree.flatten_with_path(self.gradient)[0]]
        asked = {paths[place]: leaf for leaf, place in enumerate(self.of_gradient)}
        lengths = sorted({len(path) for path in asked}, reverse=True)
        inputs, owned = [], {}
        for place, (path, x) in enumerate(jax.tree.flatten_with_path(self.state)[0]):
            if place in self.shared:
                inputs.append(Input(("shared", place)))
                continue
            ends = [len(path) - length for length in lengths if length <= len(path)]
            end = next((end for end in ends if path[end:] in asked), None)
            if end is None:
                inputs.append(Input(("state", place), NOBODY))
                continue
            leaf = asked[path[end:]]
            owned.setdefault(leaf, []).append(place)
            inputs.append(Input(("state", path[:end], x.shape, x.dtype), leaf))
        return inputs, owned

    def _other_inputs(self) -> list[Input]:
        """What the leaves of gradient and parameters are to the program."""
        inputs = []
        for kind, tree, places in (
            ("gradient", self.gradient, self.of_gradient),
            ("parameter", self.params, self.of_params),
        ):
            asked = {place: leaf for leaf, place in enumerate(places)}
            for place, x in enumerate(jax.tree.leaves(tree)):
                own = place in asked
                token = (kind, np.shape(x), jnp.result_type(x)) if own else (kind, place)
                inputs.append(Input(token, asked.get(place, NOBODY)))
        return inputs

    def _extra_inputs(self) -> list[Input]:
        return [Input(("extra", place)) for place, _ in enumerate(jax.tree.leaves(self.extra_args))]

    # What it is like -----------------------------------------------------------------------------

    def nature(self) -> Nature:
        """Watches it on streams of gradients of size 1: equal, a single one, random signs.

        What it does with zeros, as by weight decay, is taken off everywhere.
        """
        ones = np.ones(STEPS)
        pulse, stopped = np.zeros(STEPS), np.ones(STEPS)
        pulse[-1], stopped[-2:] = 1, 0
        signs = np.where(np.random.default_rng(0).random((NOISES, STEPS)) < 0.5, -1.0, 1.0)
        streams = np.stack([ones, 2 * ones, 0 * ones, pulse, stopped, *signs]).astype(np.float32)
        kinds = self.kinds
        asked = np.arange(len(self.of_gradient)) if kinds is None else [x.leaves[0] for x in kinds]

        def step(carry: tuple[Any, jax.Array], values: jax.Array) -> tuple[Any, jax.Array]:
            states, total = carry
            updates, new = jax.vmap(functools.partial(self._watched, kinds))(values, states)
            # In float16 Adam makes 0 / 0 of a gradient of 0.
            updates = jnp.where(jnp.isfinite(updates), updates, 0)
            # Against the updates of the same step: a schedule, or steps that shrink, say nothing.
            now = jnp.abs(updates[:1] - updates[2:3])
            relative = (updates[5:] - updates[2:3]) / jnp.where(now > 0, now, 1)
            return (new, total + jnp.where(now > 0, relative, 0)), updates[:5]

        start = jax.tree.leaves(self.inner.init(self.params))
        states = [jnp.stack([x] * len(streams)) for x in start]
        total = jnp.zeros([NOISES, len(asked)], self.dtype)
        (_, totals), updates = lax.scan(step, (states, total), jnp.asarray(streams.T, self.dtype))
        found = _nature_of(updates[-2], updates[-1], totals)
        if kinds is None:
            return found
        of_leaf = np.zeros(len(self.of_gradient), int)
        for place, kind in enumerate(kinds):
            of_leaf[list(kind.leaves)] = place
        return jax.tree.map(lambda x: x[of_leaf], found)

    def _watched(
        self, kinds: list[_Kind] | None, value: jax.Array, state: list[Any]
    ) -> tuple[jax.Array, list[Any]]:
        """One step of each leaf, or of one of each kind, on gradients of one size."""
        one = jnp.ones([], self.dtype)
        if kinds is None:
            all_leaves = jnp.full([len(self.of_gradient)], value, self.dtype)
            updates, new = self._whole(all_leaves, jnp.ones_like(all_leaves), state)
        else:
            shared, new = {place: state[place] for place in self.shared}, list(state)
            found = []
            for kind in kinds:
                own = [jnp.ravel(state[place]) for place in kind.own[0]]
                update, own = self._of_kind(kind, shared, value, one, own)
                found.append(update)
                for place, x in zip(kind.own[0], own, strict=True):
                    new[place] = x
            for place, x in zip(self.shared, self._shared_after(shared), strict=True):
                new[place] = x
            updates = jnp.stack(found) if found else jnp.zeros([0], self.dtype)
        return updates, [
            jnp.reshape(jnp.asarray(x), old.shape).astype(old.dtype)
            for old, x in zip(state, new, strict=True)
        ]

    def _shared_after(self, shared: dict[int, Any]) -> list[Any]:
        """Counts and learning rates of the next step."""
        (_, _, state), (_, after) = self._inputs(), self._outputs()
        known, wanted = {state[x]: y for x, y in shared.items()}, [after[x] for x in shared]
        return self._evaluated(self._for_shared, known, wanted)


def _nature_of(before: jax.Array, last: jax.Array, totals: jax.Array) -> Nature:
    """From the updates of the last two steps of all streams but the random ones."""
    steady, doubled, single, left = (jnp.abs(last[x] - last[2]) for x in (0, 1, 3, 4))
    left_before = jnp.abs(before[4] - before[2])

    def over(a: jax.Array, b: jax.Array, otherwise: float) -> jax.Array:
        return jnp.where((steady > 0) & (b > 0), a / jnp.where(b > 0, b, 1), otherwise)

    grows = (over(doubled, steady, 1) > 2**0.5).astype(last.dtype)
    fading = jnp.where(left_before > 1e-3 * steady, over(left, left_before, 0), 0)
    reach = jnp.clip(jnp.std(totals, axis=0) / math.sqrt(STEPS), 1, WIDEST)
    reach = jnp.where(reach < SEEN_THROUGH, 1, reach)
    fading = jnp.where(reach > 1, 0, jnp.clip(fading, 0, SLOWEST))
    gain = jnp.where(grows > 0, jnp.maximum(over(steady, single, 1), 1), 1)
    return Nature(grows, gain, fading, reach)


def _small_like(x: Any) -> Any:
    """Ones, with as many axes as a leaf has and one entry; never as large as the leaf itself.

    By its size the state of the one is told from that of the other.
    """
    if not hasattr(x, "dtype"):
        return x
    shape = (1,) * max(np.ndim(x), 1)
    shape = (2,) * len(shape) if shape == np.shape(x) else shape
    if x.dtype == jax.dtypes.float0:
        return np.zeros(shape, jax.dtypes.float0)
    return jnp.ones(shape, x.dtype)


def _filled(tree: Any, places: Sequence[int], values: jax.Array) -> Any:
    """A small tree with the values at their places, zeros elsewhere."""
    leaves, structure = jax.tree.flatten(tree)
    asked = {place: leaf for leaf, place in enumerate(places)}

    def entry(place: int, x: Any) -> Any:
        if place in asked:
            return x * values[asked[place]].astype(x.dtype)
        return jnp.zeros_like(x) if _numerics.is_floating(x) else x

    return structure.unflatten([entry(place, x) for place, x in enumerate(leaves)])


def _places(tree: Any, paths: Sequence[str]) -> list[int]:
    at = {path: place for place, (path, _) in enumerate(leaves_with_paths(tree))}
    return [at[path] for path in paths]


def _as_large(x: Any, y: Any) -> bool:
    return jnp.shape(x) == jnp.shape(y) and jnp.result_type(x) == jnp.result_type(y)
