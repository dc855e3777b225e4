"""StableAdamW's clip of the update: a shorter step where Adam's second moment is out of date."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _jax, _numerics, limiters, norms, scopes
from optclip._checks import at, check_choice, check_number, check_optimizer, check_sharded
from optclip._numerics import Axes
from optclip._paths import array_in, leaves_with_paths
from optclip._tree import limit
from optclip._tree.layout import Layout, layout_of, select_leaves
from optclip._tree.pieces import PerGroup
from optclip._tree.statistics import finished, statistics_of
from optclip.clipping import NEEDS_STATE_MSG
from optclip.methods.skip_spikes import SkipNonfinite, unless
from optclip.state import ClipState, Outcome, check_state, init_state_by_leaf, update_state


def _sum_beside_nothing(axes: Axes, x: jax.Array) -> jax.Array:
    """A sum that XLA for a CPU does not take out by itself, with `x` written to memory for it."""
    total, nothing = _numerics.reduced_together((lax.add, lax.add), axes, x, x - x)
    return total + nothing


def _sum_of_squares(x: jax.Array, axes: Axes, scale: jax.Array | None) -> jax.Array:
    """Of squares their sum."""
    del scale
    ways = {
        "cpu": functools.partial(_sum_beside_nothing, axes),
        "default": functools.partial(_numerics.sum_along, axes=axes),
    }
    return _numerics.by_platform(ways, x)


_OF_SQUARES = norms.rms._replace(statistic=_sum_of_squares, entries=None)
"""The root mean square from squares, which are not written to memory."""


LARGE = 2.0**60
"""A second moment beside which a gradient is nothing."""


@_jax.exportable
class AdamRmsState(NamedTuple):
    """What `clip_by_adam_rms` remembers.

    Attributes:
        clip: What it read. `norm` is the largest root mean square of a leaf, `factor` the smallest
            factor.
        inner_state: State of the optimizer it holds.
    """

    clip: ClipState
    inner_state: Any


class _Adam(NamedTuple):
    """What is known of the leaves that one Adam scales.

    Attributes:
        decay: Its b2, found by asking.
        count: Its steps, this one included.
        second_moments: By path the average of squares before this gradient.
        shares: By path what this gradient adds to that: (1 - b2) g^2, of the g that Adam gets.
    """

    decay: jax.Array
    count: jax.Array
    second_moments: dict[str, jax.Array]
    shares: dict[str, jax.Array]


def clip_by_adam_rms(
    inner: optax.GradientTransformation,
    threshold: optax.ScalarOrSchedule = 1.0,
    *,
    eps: optax.ScalarOrSchedule = 1e-8,
    nonfinite: SkipNonfinite = "propagate",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes a shorter step where the gradient is larger than Adam expects (StableAdamW).

    .. math:: u_l \leftarrow u_l / \max(1, \mathrm{RMS}_l / d), \quad \mathrm{RMS}_l =
        \sqrt{\mathrm{mean}(g_l^2 / \max(\hat v_l, \epsilon^2))} \quad \text{for each leaf } l

    v is Adam's bias-corrected second moment, with this gradient included. With b2 = 0.999, v learns
    slowly. When the gradient of a layer grows, Adam's steps are then too long for a while, which a
    clip of the gradient does not see. Unlike `clip_by_block_rms`, which measures the update, this
    measures the gradient, without momentum.

    It goes around any Optax chain that contains an Adam (adam, adamw, nadamw, radam, lamb, and
    `optax.contrib.muon` for its Adam leaves). It multiplies the whole update of the chain, weight
    decay included. Leaves that no Adam scales pass unchanged. It finds b2, and the gradient that
    Adam receives after any clip, by tracing the update of the chain three times. Squares that the
    moments cannot hold (of entries below 2e-4 in float16 or above 1e19 in float32) are as invisible
    to it as to Adam.

    An ordinary gradient has an RMS around 1, so about a third of the leaves take a step that is
    shorter by a few percent. With b2 = 0.99, a gradient of ten times the usual size has an RMS of
    7. No gradient has one above 1 / sqrt(1 - b2).

    It does not protect against spikes, which stay in both moments. On the proving ground with
    spikes, AdamW ends at a loss of 3.21 with it, 3.27 without a clip and 2.50 with `safeguard`.

    Args:
        inner: The optimizer.
        threshold: d, the largest RMS without a factor; a number, traced scalar or Optax schedule.
            1.0 is the paper's: the RMS of a gradient as v expects it.
        eps: epsilon, the least that the root of v counts; likewise. 1e-8 is `optax.adamw`'s.
        nonfinite: "propagate" hands a non-finite gradient to `inner`, whose moments it corrupts
            permanently, as without this clip. "skip" leaves the step out, and `inner` keeps its
            state.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with an `AdamRmsState`. `clip/norm` reads the
        largest RMS, `clip/clip_rate` the share of leaves clipped. Extra arguments go to `inner`.
        State: nine scalars beside that of `inner`. Cost: one read of the gradient and of the second
        moments, 9 passes with AdamW's 7; on a GPU "skip" costs up to 2 more, since XLA makes two
        kernels of the step.

    Raises:
        ValueError: If an argument is concrete and makes no sense, or `inner` holds no Adam.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optclip.clip_by_adam_rms(optax.adamw(1e-3, b2=0.99))
        >>> params = jnp.ones(2)
        >>> state = optimizer.init(params)
        >>> for gradient in (jnp.full(2, 0.1), jnp.full(2, 0.1), jnp.full(2, 100.0)):
        ...     _, state = optimizer.update(gradient, state, params)
        >>> round(float(optclip.metrics(state)["clip/norm"]), 3)
        1.723

    References:
        Wortsman, Dettmers, Zettlemoyer, Morcos, Farhadi and Schmidt, "Stable and low-precision
        training for large-scale vision-language models", 2023, arXiv:2304.13013.
    """
    check_optimizer(inner, "clip_by_adam_rms")
    held = optax.with_extra_args_support(inner)
    check_number(threshold, "threshold=", hint="pass jnp.inf to switch clipping off")
    check_number(eps, "eps=", hint="the default is 1e-8")
    check_choice(nonfinite, ("skip", "propagate"), "nonfinite=")
    check_sharded(axis_name, sharded)

    def init(params: optax.Params) -> AdamRmsState:
        inner_state = held.init(params)
        if not _adam_states(inner_state):
            raise ValueError(
                "clip_by_adam_rms reads the second moment of an Adam, and this optimizer holds no "
                "optax.ScaleByAdamState: put it around adam, adamw or a chain with scale_by_adam; "
                "for other optimizers there are clip_by_block_rms and safeguard"
            )
        if not _averages_squares(held):
            raise ValueError(
                "clip_by_adam_rms reads an average of squares, and this optimizer keeps something "
                "else in its optax.ScaleByAdamState, as yogi and adamax do; for it there are "
                "clip_by_block_rms and safeguard"
            )
        clip = init_state_by_leaf(params, axis_name, sharded, detail=detail)
        return AdamRmsState(clip, inner_state)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdamRmsState]:
        if state is None:
            raise ValueError(NEEDS_STATE_MSG)
        check_state(state, AdamRmsState)
        layout = layout_of(scopes.leaf, updates, axis_name, sharded, params)
        steps, one = state.clip.steps, jnp.ones([], layout.dtype)

        def step(updates: optax.Updates, inner_state: Any) -> tuple[Any, Any]:
            return held.update(updates, inner_state, params, **extra_args)

        with jax.named_scope("optclip/measure"):
            # Apart from the step itself, which would be written to memory to be read twice.
            apart = _computed_anew(updates)
            _, of_gradient = step(apart, _with_second_moment(state.inner_state, 0))
            nothing = jax.tree.map(_zeros_like, updates)
            _, of_large = step(nothing, _with_second_moment(state.inner_state, LARGE))
            adams = _adams(state.inner_state, of_gradient, of_large)
            ratios = _ratios(layout, apart, adams, at(eps, steps, one))
            statistics = statistics_of(layout, _OF_SQUARES, [ratios], [None])[0]
            found = finished(layout, norms.rms, statistics, 1, gathered=True)
            sizes = found.blocks[0].value
            finite = jnp.all(jnp.isfinite(sizes))
        with jax.named_scope("optclip/limit"):
            bound = jnp.where(finite, at(threshold, steps, one), jnp.inf)
            bounds = PerGroup(
                [jnp.broadcast_to(bound, sizes.shape)], dict.fromkeys(statistics, bound)
            )
            factors = limit.factors_for(limiters.rescale, layout, found, bounds)
            stepped, inner_state = step(updates, state.inner_state)
            stepped = limit.rescale(layout, stepped, factors.pieces, measured=False)
        if nonfinite == "skip":
            new = stepped, inner_state
            stepped, inner_state = unless(
                ~finite, lambda *_: new, updates, state.inner_state, params, {}
            )
        factor = factors.blocks[0].product()
        clipped = limiters.clipped_norm(
            limiters.rescale, found.blocks[0], factors.blocks[0], bounds.blocks[0]
        )
        outcome = Outcome(
            finite=finite,
            norm=jnp.max(sizes, initial=0),
            clipped_norm=jnp.max(clipped, initial=0),
            threshold=bound,
            factor=jnp.min(factor, initial=1),
            share=jnp.sum((sizes > bound).astype(layout.dtype)) / max(sizes.size, 1),
        )
        groups = (sizes, clipped) if detail else None
        return stepped, AdamRmsState(update_state(state.clip, outcome, (), groups), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros_like(x: Any) -> Any:
    return jnp.zeros_like(x) if _numerics.is_floating(x) else x


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _adam_states(inner_state: Any) -> list[optax.ScaleByAdamState]:
    return [x for x in jax.tree.leaves(inner_state, is_leaf=_is_adam) if _is_adam(x)]


def _with_second_moment(inner_state: Any, value: float) -> Any:
    """The state with the same number for every second moment; wide, where it could not be told."""

    def filled(x: jax.Array) -> jax.Array:
        return jnp.full_like(x, value, dtype=_numerics.accumulator(x.dtype))

    def replaced(node: Any) -> Any:
        return node._replace(nu=jax.tree.map(filled, node.nu)) if _is_adam(node) else node

    return jax.tree.map(replaced, inner_state, is_leaf=_is_adam)


def _computed_anew(tree: Any) -> Any:
    """The same arrays, to XLA others, beside what is none."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [place for place, x in enumerate(leaves) if isinstance(x, jax.Array)]
    anew = _numerics.computed_anew(*(leaves[place] for place in arrays))
    for place, x in zip(arrays, anew, strict=True):
        leaves[place] = x
    return jax.tree.unflatten(structure, leaves)


def _averages_squares(inner: optax.GradientTransformationExtraArgs) -> bool:
    """Whether a first Adam does; True where it cannot be asked on two numbers."""
    try:
        with jax.ensure_compile_time_eval():
            zeros = jnp.zeros(2, jnp.float32)
            state = inner.init(zeros)

            def moment(gradient: float, before: float) -> float:
                given = _with_second_moment(state, before)
                after = inner.update(zeros + gradient, given, zeros)[1]
                return float(jax.tree.leaves(_adam_states(after)[0].nu)[0][0])

            fades = moment(0.0, LARGE) < LARGE
            of_one, of_two = moment(1e-3, 0.0), moment(2e-3, 0.0)
    except Exception:
        return True
    # Of nothing, as in the first of several accumulated steps, nothing is known.
    return of_one == 0 or (fades and not 1.9 < of_two / of_one < 2.1)


def _adams(inner_state: Any, of_gradient: Any, of_large: Any) -> list[_Adam]:
    """What is known of each Adam.

    Args:
        inner_state: The optimizer's state before the step.
        of_gradient: After it, had every second moment been 0: what the gradient adds to them.
        of_large: The same had it been `LARGE`, and the gradient 0: what is left of it, b2 `LARGE`.
            What the chain makes of a gradient of 0, as of momentum, is nothing beside that.
    """
    found = []
    states = map(_adam_states, (inner_state, of_gradient, of_large))
    for before, added, left in zip(*states, strict=True):
        moments, shares, lefts = (dict(leaves_with_paths(x.nu)) for x in (before, added, left))
        known = [x for x in lefts.values() if x.size]
        if known:  # The same number in all of them.
            decay = jnp.max(min(known, key=jnp.size)) / LARGE
            found.append(_Adam(decay, jnp.asarray(array_in(added.count)), moments, shares))
    return found


def _ratios(
    layout: Layout, updates: optax.Updates, adams: list[_Adam], eps: jax.Array
) -> list[jax.Array]:
    """g^2 / max(v, eps^2), entry by entry; NaN where g is not finite."""
    found, paths = [], {path for path, _ in leaves_with_paths(updates)}
    if strange := [path for adam in adams for path in adam.shares if path not in paths]:
        raise ValueError(
            f"an Adam has a leaf {strange[0]!r}, which the gradient lacks, as in optax.flatten: "
            "put clip_by_adam_rms within what changes the tree"
        )
    for member, g in zip(layout.members, select_leaves(layout, updates), strict=True):
        own = [adam for adam in adams if member.path in adam.shares]
        if len(own) > 1:
            raise ValueError(
                f"two Adams scale {member.path!r}, and clip_by_adam_rms can follow one: put it "
                "around the part of the chain that holds the second"
            )
        real = _numerics.widened(g.real, layout.dtype)
        # 0, or NaN; as a choice XLA for a CPU would write all ratios to memory.
        ratio = real - real
        if jnp.iscomplexobj(g):
            ratio += _numerics.widened(g.imag - g.imag, layout.dtype)
        if own:
            ratio += _ratio(own[0], member.path, eps).astype(layout.dtype)
        found.append(ratio)
    return found


def _ratio(adam: _Adam, path: str, eps: jax.Array) -> jax.Array:
    share, moment = adam.shares[path], adam.second_moments[path]
    dtype = _numerics.accumulator(share.dtype)
    decay, eps = adam.decay.astype(dtype), eps.astype(dtype)
    correction, weight = 1 - decay ** adam.count.astype(dtype), 1 - decay
    times = correction / jnp.where(weight > 0, weight, jnp.inf)
    floor = jnp.maximum(eps * eps * correction, jnp.finfo(dtype).tiny)
    # Squares that overflow make no step at all, since they are in both moments.
    share = jnp.minimum(_numerics.widened(share), _numerics.largest(dtype))
    return share / jnp.maximum(decay * _numerics.widened(moment) + share, floor) * times


def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    threshold: optax.ScalarOrSchedule = 1.0,
    nonfinite: SkipNonfinite = "propagate",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with StableAdamW's clip of the update: `clip_by_adam_rms` around `optax.adamw`.

    All arguments by position are those of `optax.adamw`, with its defaults. The paper trains with
    b2 from 0.95 to 0.99 and eps=1e-6. As in the paper the weight decay takes the shorter step too.

    Args:
        learning_rate: See `optax.adamw`; likewise all up to `nesterov`.
        b1: See there.
        b2: See there.
        eps: See there; also the epsilon of `clip_by_adam_rms`.
        eps_root: See there.
        mu_dtype: See there.
        weight_decay: See there.
        mask: See there: which leaves decay.
        nesterov: See there.
        threshold: See `clip_by_adam_rms`; 1.0 is the paper's.
        nonfinite: See there.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with an `AdamRmsState`.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> optimizer = optclip.stable_adamw(1e-3, b2=0.99)
        >>> params = jnp.ones(2)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([3.0, 4.0]), state, params)
        >>> round(float(optclip.metrics(state)["clip/norm"]), 4)
        1.0

    References:
        Wortsman, Dettmers, Zettlemoyer, Morcos, Farhadi and Schmidt, "Stable and low-precision
        training for large-scale vision-language models", 2023, arXiv:2304.13013.
    """
    inner = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    return clip_by_adam_rms(
        inner,
        threshold,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        sharded=sharded,
        detail=detail,
    )
