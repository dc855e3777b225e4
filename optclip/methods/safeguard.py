"""`safeguard`: no gradient may do more than its share, around any optimizer."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _jax, _numerics, _potential, limiters, norms, scopes
from optclip._checks import check_choice, check_number, check_optimizer, check_sharded, number_at
from optclip._paths import leaves_with_paths
from optclip._tree import limit, measure
from optclip._tree.layout import (
    Layout,
    layout_at_init,
    layout_of,
    select_leaves,
    whole_on_devices_of,
)
from optclip._tree.statistics import finished, statistics_of
from optclip._zeros import always_zero
from optclip.clipping import NEEDS_STATE_MSG, NO_PARAMS_MSG, norm_given
from optclip.limiters import Factor
from optclip.methods.learned import robust_clip
from optclip.methods.skip_spikes import SkipNonfinite, unless
from optclip.norms import Magnitude
from optclip.state import (
    ClipState,
    Outcome,
    check_state,
    init_state,
    update_state,
)

Frozen = dict[str, tuple[()]]

LEAST = 1e-3
"""The smallest root mean square of weights reckoned with, so that weights that start at zero move;
the 1e-3 of Adafactor's relative step size."""

FREE = 2.0
"""An optimizer that asks for no more than so many times the bound is bounded, and no more."""

PATIENCE = 400.0
"""After so many steps beyond that the bound has fallen to 1 / sqrt(2), and then like one over the
square root of their number."""


@_jax.exportable
class Asked(NamedTuple):
    """What `safeguard` knows of its optimizer; but for `numbers` and `steps` one number a leaf.

    Attributes:
        numbers: State of the optimizer on a tree with one entry for each leaf, without what it
            shares with the real one's; a vector, or () if nothing is left.
        nature: What the optimizer is like.
        reached: The largest update so far, over what it would be were all gradients aligned; 0
            before the first.
        excess: In how many steps it asked for far more than the bound.
        steps: Steps that it made; int32.
    """

    numbers: jax.Array | tuple[()]
    nature: _potential.Nature
    reached: jax.Array
    excess: jax.Array
    steps: jax.Array


@_jax.exportable
class SafeguardState(NamedTuple):
    """What `safeguard` remembers.

    Attributes:
        clip: Of the clip before the optimizer.
        inner_state: State of the optimizer it holds.
        asked: What is known of that.
        bound: Of the bound on one gradient's share. `norm` and `clipped_norm` are the update's,
            `threshold` the smallest share allowed, `factor` the least that was let through.
        update_ratio: Norm of the last update over that of the parameters (or the floor under it).
        skipping: Whether the last step was skipped; bool.
        skipped_steps: Steps skipped so far; int32.
        frozen: By path the leaves that the optimizer never moves, which do not count among the
            parameters; with () for each, so that it holds no arrays.
    """

    clip: ClipState
    inner_state: Any
    asked: Asked
    bound: ClipState
    update_ratio: jax.Array
    skipping: jax.Array
    skipped_steps: jax.Array
    frozen: Frozen


def safeguard(
    inner: optax.GradientTransformation,
    *,
    deviations: optax.ScalarOrSchedule = 2.0,
    ratio: optax.ScalarOrSchedule = 0.03,
    nonfinite: SkipNonfinite = "skip",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits what one gradient may do to each leaf, around any optimizer; no threshold to choose.

    .. math:: g_l \to \min\left(1, \frac{\rho L_l}{s_l}\right) \mathrm{robust\_clip}(g)_l
        \to \mathrm{inner} \to \min\left(1, \frac{\rho L_l}{p_l}\right) u_l

    for each leaf l. L is the norm of its weights. s is how far this one gradient would move the
    leaf in all steps to come. p is how long the update would be if all gradients so far pointed the
    same way. So where gradients agree, a step may be as long as rho times the norm of the weights.
    Where they are noise to a momentum of 0.9, it is about a quarter of that. Before all this,
    `robust_clip` cuts spikes. A step whose gradient is not finite is skipped: `inner` keeps its
    state.

    To find s and p, a copy of `inner` runs on a tree with one entry for each leaf. It is fed with
    the root mean squares of the gradients, and has the counts, schedules and learning rates of the
    real one. `init` runs it for 128 steps to learn what it does. s is 0 where the update does not
    grow with the gradient (Adam, Lion, Muon). p leaves out the long first steps of an Adam, and
    adds what noise contributes in an optimizer that normalizes its average (Lion, Muon).

    - An optimizer that asks for at most twice the bound is bounded, and no more happens. Steps in
      which it asks for far more are counted, leaf by leaf. After n of them the bound has fallen by
      1 / sqrt(1 + n / 400), since a learning rate that is far too large cannot say when to slow
      down. Below the bound, schedules keep their meaning.
    - Weight decay and whatever else `inner` adds to the update are bounded with it.
    - A leaf whose weights are smaller than those of the others, entry by entry, counts as if they
      were as large. So a bias of zeros moves.
    - Leaves that `inner` never moves (as with `optax.set_to_zero`) and leaves that are not floating
      point take no part.

    Measured in 38 settings of small networks (`python -m benchmarks.proving_ground`): no run
    diverged at any of seven learning rates over three decades. The final loss is within 2% of the
    best fixed threshold's in 33 settings, both at their best learning rate. In 31 settings the good
    learning rates without a clip span a factor of three or less; here they span thirty or more in
    26 of them. Spikes and bursts raise the final loss by at most 0.2%. It ends above the best fixed
    threshold in a run of 58 steps (1.23 times the loss), under Lion (1.04) and in a recurrent
    network (1.17, mostly the noise of three seeds).

    Args:
        inner: The optimizer.
        deviations: Of `robust_clip`.
        ratio: rho, the largest share of a leaf's norm that one gradient may move it; a number,
            traced scalar or Optax schedule. Infinity means no bound. On the proving ground 0.03 is
            good over the widest range of learning rates, 0.01 is slow, and 0.1 is better in runs of
            a few dozen steps.
        nonfinite: "skip", or "propagate" to hand non-finite gradients to `inner`.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `SafeguardState`. `metrics` reports
        `clip/...` for the clip before, `bound/...` for the bound (`bound/factor`: the least share
        of a gradient that was let through; `bound/clip_rate`: the share of leaves held back;
        `bound/update_ratio`) and `skip/...`. `update` needs `params`; extra arguments go to
        `inner`. State: a few numbers for each leaf beside that of `inner`. Cost: one pass over the
        gradient and one over the parameters; the update is measured while it is applied.

    Raises:
        ValueError: If a concrete argument is out of its range, or `update` gets no `params`.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optclip.safeguard(optax.adamw(1e-3))
        >>> params = jnp.ones(2)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([3.0, 4.0]), state, params)
        >>> float(optclip.metrics(state)["bound/update_ratio"]) <= 0.03
        True

    References:
        Why the length of a step relative to the weights is what counts: Kosson, Messmer and Jaggi,
        "Rotational equilibrium: how weight decay balances learning across neural networks", 2023,
        arXiv:2305.17212.

        Why early gradients go too far: Kosson, Messmer and Jaggi, "Analyzing and reducing the need
        for learning rate warmup in GPT training", 2024, arXiv:2410.23922.
    """
    check_optimizer(inner, "safeguard")
    held = optax.with_extra_args_support(inner)
    check_choice(nonfinite, ("skip", "propagate"), "nonfinite=")
    check_number(ratio, "ratio=", hint="pass jnp.inf to switch the bound off")
    check_sharded(axis_name, sharded)
    clip: Any = robust_clip(deviations=deviations, axis_name=())  # It gets one number.

    def init(params: optax.Params) -> SafeguardState:
        whole = functools.partial(whole_on_devices_of, params)
        inner_state = held.init(params)
        _check_no_secants(inner_state)
        frozen = _frozen(held, inner_state, params)
        layout = layout_at_init(_but(frozen, scopes.leaf), params, axis_name, sharded)
        paths = [member.path for member in layout.members]
        dtype = _numerics.tree_dtype(params)
        small = functools.partial(_potential.Small, held, params, params, inner_state, paths, dtype)
        asked = Asked(
            numbers=small(extra_args={}).fresh(),
            nature=_nature(small, len(paths), dtype),
            reached=jnp.zeros([len(paths)], dtype),
            excess=jnp.zeros([len(paths)], dtype),
            steps=jnp.zeros([], jnp.int32),
        )
        return SafeguardState(
            clip=clip.init(params),
            inner_state=inner_state,
            asked=whole(asked),
            bound=init_state(params),
            update_ratio=whole(jnp.zeros([], dtype)),
            skipping=whole(jnp.zeros([], bool)),
            skipped_steps=whole(jnp.zeros([], jnp.int32)),
            frozen=frozen,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad_norm: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SafeguardState]:
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        check_state(state, SafeguardState)
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        if evaluating := [name for name, x in extra_args.items() if callable(x)]:
            raise ValueError(
                f"safeguard asks its optimizer on a small tree first, and {evaluating[0]}= cannot "
                "be called there: an optimizer that evaluates the loss itself, as a line search "
                "does, goes without it"
            )
        scope = _but(state.frozen, scopes.leaf)
        layout = layout_of(scope, updates, axis_name, sharded, params)
        with jax.named_scope("optclip/measure"):
            found = measure.measure(layout, norms.l2, updates)
            gradient = found.clamped()
            # Weights are of ordinary size, or count as if they were.
            weights = _root_mean_squares(layout, params) * _roots(layout)
        if grad_norm is None:
            norm, given_steps = norms.pool(norms.l2, [found], [layout.sizes]).clamped(), 0
        else:
            norm, given_steps = norm_given(grad_norm, layout.dtype), 1
        # What the clip makes of a number says its factor, whose root is in range where it is not.
        made, clip_state = clip.update(jnp.full_like(norm, 2.0**64), state.clip, grad_norm=norm)
        root_of_clip = _numerics.square_root(made) * 2.0**-32
        clip_state = clip_state._replace(given_steps=state.clip.given_steps + given_steps)
        skipping = clip_state.nonfinite_steps > state.clip.nonfinite_steps
        skipping &= nonfinite == "skip"
        gradient = gradient * root_of_clip * root_of_clip
        now = number_at(ratio, state.bound.steps, weights)

        def step(
            updates: optax.Updates, states: Any, params: optax.Params, **extra_args: Any
        ) -> tuple[Any, Any]:
            inner_state, asked, bound_state, _ = states
            lengths, root = _lengths(layout, weights), _roots(layout)
            room = now * lengths / jnp.sqrt(1 + asked.excess.astype(now.dtype) / PATIENCE)
            paths = [member.path for member in layout.members]
            small = _potential.Small(
                held, updates, params, inner_state, paths, layout.dtype, extra_args
            )
            ask = functools.partial(small.ask, numbers=asked.numbers, weights=weights / root)
            nature, seen = _as(layout.dtype, (asked.nature, asked.reached))
            # Before the optimizer, where its update grows with the gradient: how far this one would
            # move each leaf by itself, in all steps to come.
            size = gradient / root
            with_it, without = jax.vmap(lambda x: ask(x)[0])(
                jnp.stack([size, jnp.zeros_like(size)])
            )
            share = nature.grows * nature.gain * jnp.abs(with_it - without) * root
            before = _limited(layout, share, room)
            updates = _scaled(layout, updates, root_of_clip * _numerics.square_root(before))
            # After it, by what it may make of that. Mostly this does nothing where that did.
            one_size, numbers = ask(before * size)
            steps = jnp.asarray(optax.safe_increment(asked.steps))
            corrected = 1 - nature.fading ** steps.astype(layout.dtype)
            length = one_size * root * nature.reach * jnp.where(seen > 0, seen, 1) / corrected
            after = _limited(layout, length, room)
            updates, inner_state = held.update(updates, inner_state, params, **extra_args)
            reached = _reached(layout, updates, one_size)
            updates = _scaled(layout, updates, _numerics.square_root(after))
            new = asked._replace(
                numbers=jax.tree.map(_finite_or, asked.numbers, numbers),
                reached=_reached_so_far(asked.reached, reached),
                excess=asked.excess + _excess(jnp.maximum(share, length), now * lengths, asked),
                steps=steps,
            )
            factor = before * after
            gone = reached * one_size * root
            outcome = _outcome(gone, after, factor, room)
            least = jnp.asarray(LEAST * math.sqrt(layout.sizes.sum() or 1), weights.dtype)
            relative = outcome.clipped_norm / jnp.maximum(_together(weights), least)
            update_ratio = relative.astype(state.update_ratio.dtype)
            return updates, (inner_state, new, update_state(bound_state, outcome), update_ratio)

        states = (state.inner_state, state.asked, state.bound, jnp.zeros_like(state.update_ratio))
        updates, states = unless(skipping, step, updates, states, params, extra_args)
        inner_state, asked, bound_state, update_ratio = states
        return updates, SafeguardState(
            clip=clip_state,
            inner_state=inner_state,
            asked=asked,
            bound=bound_state,
            update_ratio=update_ratio,
            skipping=skipping,
            skipped_steps=state.skipped_steps + skipping.astype(jnp.int32),
            frozen=state.frozen,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_no_secants(inner_state: Any) -> None:
    """Refuses L-BFGS: from gradients and steps that were bounded it learns no curvature."""
    kind = optax.ScaleByLBFGSState
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, kind))
    if any(isinstance(node, kind) for node in nodes):
        raise ValueError(
            "safeguard cannot hold optax.lbfgs: that learns the curvature from differences of "
            "gradients and of parameters, which a clip changes. Take it alone; against gradients "
            "that are not finite, optclip.skip_spikes(optax.lbfgs(), deviations=jnp.inf)"
        )


def _finite_or(old: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(old.dtype)
    return jnp.where(jnp.isfinite(new), new, old)


def _reached_so_far(before: jax.Array, now: jax.Array) -> jax.Array:
    now = jnp.where(jnp.isfinite(now), now, 0).astype(before.dtype)
    return jnp.clip(now, before, 1)


def _excess(asks: jax.Array, allowed: jax.Array, asked: Asked) -> jax.Array:
    """Whether an optimizer asks for far more than the bound: 0 to 1."""
    over = asks / jnp.where(allowed > 0, allowed, 1) / FREE - 1
    return jnp.where(jnp.isnan(over), 0, jnp.clip(over, 0, 1)).astype(asked.excess.dtype)


def _as(dtype: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _roots(layout: Layout) -> jax.Array:
    """Of the number of entries of each leaf."""
    return jnp.sqrt(jnp.asarray(layout.sizes, layout.dtype))


def _together(lengths: jax.Array) -> jax.Array:
    """The norm of all leaves from those of each; no square leaves the range."""
    most = jnp.max(lengths, initial=0)
    unit = jnp.where((most > 0) & jnp.isfinite(most), most, 1)
    return jnp.minimum(
        unit * jnp.sqrt(jnp.sum((lengths / unit) ** 2)), _numerics.largest(lengths.dtype)
    )


def _lengths(layout: Layout, weights: jax.Array) -> jax.Array:
    """The norm of each leaf's weights; at least what it would be were they as large as all are."""
    typical = _together(weights) / math.sqrt(max(layout.sizes.sum(), 1))
    return jnp.maximum(weights, jnp.maximum(typical, LEAST) * _roots(layout))


def _limited(layout: Layout, lengths: jax.Array, room: jax.Array) -> jax.Array:
    """By what to multiply each leaf."""
    # In low precision the small optimizer may overflow; of what is no number nothing is known.
    lengths = jnp.nan_to_num(lengths, nan=0.0, posinf=_numerics.largest(lengths.dtype))
    magnitude = Magnitude(lengths, jnp.ones([], lengths.dtype))
    return limiters.factor_of(limiters.rescale, magnitude, room).product()


def _scaled(layout: Layout, updates: optax.Updates, roots: jax.Array) -> optax.Updates:
    """Each leaf times its root, twice."""
    factors = {start: Factor(root, root) for start, root in _cut(layout, roots).items()}
    return limit.rescale(layout, updates, factors, measured=False)


def _cut(layout: Layout, vector: jax.Array) -> dict[int, jax.Array]:
    """The number of each leaf, none of them negative."""

    def cut(vector: jax.Array) -> list[jax.Array]:
        return [vector[member.start] for member in layout.members]

    def by_themselves(vector: jax.Array) -> list[jax.Array]:
        # Of leaves whose numbers are cut out of one array XLA for a GPU would make one kernel,
        # which could not write where it reads. As results of an operation, here of none, the
        # numbers come out of one kernel; as mere cuts out of one for each.
        return list(_numerics.computed_anew(*map(jnp.abs, cut(vector))))

    found = _numerics.by_platform({"cpu": cut, "default": by_themselves}, vector)
    return {member.start: x for member, x in zip(layout.members, found, strict=True)}


def _reached(layout: Layout, updates: optax.Updates, one_size: jax.Array) -> jax.Array:
    """The root mean square of each leaf of the update, over that of the small one.

    At that scale no square leaves the range.
    """
    scale = 1 / jnp.where(one_size > 0, one_size, 1)
    reached = _root_mean_squares(layout, updates, _cut(layout, scale))
    return jnp.where(one_size > 0, reached, 0)


def _root_mean_squares(
    layout: Layout, tree: Any, scales: dict[int, jax.Array] | None = None
) -> jax.Array:
    """Of each leaf, times its scale; right where no square leaves the range of float32."""

    def squares(leaves: list[jax.Array]) -> dict[int, jax.Array]:
        wide = [_numerics.widened(x, layout.dtype) for x in leaves]
        return statistics_of(layout, norms.rms, [wide], [scales])[0]

    ways = {"cpu": lambda leaves: squares(_numerics.cast_anew(leaves)), "default": squares}
    found = _numerics.by_platform(ways, select_leaves(layout, tree))
    return finished(layout, norms.rms, found, 1, gathered=True).blocks[0].value


def _outcome(gone: jax.Array, after: jax.Array, factor: jax.Array, room: jax.Array) -> Outcome:
    limited = factor < 1 - 1e-5
    return Outcome(
        finite=jnp.all(jnp.isfinite(gone)),
        norm=_together(gone),
        clipped_norm=_together(gone * after),
        threshold=jnp.min(room, initial=jnp.inf),
        factor=jnp.min(factor, initial=1),
        share=jnp.sum(limited.astype(gone.dtype)) / max(limited.size, 1),
    )


def _nature(small: Callable[..., _potential.Small], leaves: int, dtype: Any) -> _potential.Nature:
    """What an optimizer is like; of one that asks for more than a loss only what is so of all."""
    for extra_args in ({}, {"value": jnp.ones([])}):
        try:
            return small(extra_args=extra_args).nature()
        except TypeError:
            pass
    # An array of its own for each: a state with one buffer twice cannot be donated.
    none, one = (functools.partial(make, [leaves], dtype) for make in (jnp.zeros, jnp.ones))
    return _potential.Nature(grows=none(), gain=one(), fading=none(), reach=one())


def _but(frozen: Frozen, scope: scopes.Scope) -> scopes.Scope:
    """A scope without the leaves that never move."""

    def labels(updates: optax.Updates) -> list[scopes.Label | None]:
        paths = [path for path, _ in leaves_with_paths(updates)]
        own = scope.labels(updates) if scope.labels else range(len(paths))
        return [None if path in frozen else x for path, x in zip(paths, own, strict=True)]

    return scope._replace(labels=labels) if frozen else scope


def _frozen(
    inner: optax.GradientTransformationExtraArgs, inner_state: Any, params: optax.Params
) -> Frozen:
    """The leaves whose updates are zero whatever the gradient is, as of `optax.set_to_zero`."""

    def step(updates: optax.Updates, inner_state: Any, params: optax.Params) -> Any:
        return inner.update(updates, inner_state, params)[0]

    try:
        zeros = always_zero(step, params, inner_state, params)
    except TypeError:  # It asks for more than that, as for the loss: all its leaves may move.
        return {}
    paths = [path for path, _ in leaves_with_paths(params)]
    return {path: () for path, zero in zip(paths, zeros, strict=True) if zero}
