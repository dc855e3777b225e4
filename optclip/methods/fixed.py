"""Clips by a fixed or scheduled threshold."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from optclip import histograms, limiters, norms, scopes, thresholds
from optclip._checks import check_number
from optclip.clipping import Nonfinite, bound_on_updates, clip_by
from optclip.norms import Norm
from optclip.scopes import Scope


def clip_by_global_norm(
    max_norm: optax.ScalarOrSchedule,
    *,
    ord: float | None = None,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the whole gradient so that its norm is at most `max_norm`.

    .. math:: u \leftarrow u \, \min(1, c / \|u\|)

    Like `optax.clip_by_global_norm`, `torch.nn.utils.clip_grad_norm_`.

    The direction is kept, and below the threshold nothing changes, bit for bit. The norm is in
    float32 or wider, whatever the dtype of the gradient.

    Args:
        max_norm: c, the largest norm, in units of the gradient's norm; a number, traced scalar or
            Optax schedule. 1.0 is the convention for large language models; Pascanu et al. look
            at the average norm of a run and choose a value near it.
        ord: Which norm: None or 2 for the Euclidean, 1, any p > 0, or `jnp.inf`. A plain number:
            it shapes the program.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: ten scalars at the
        most. Cost: one pass over the gradient for the norm; two for other orders than 1 and 2.

    Raises:
        ValueError: If `max_norm` is concrete and negative or NaN, or `ord` is not a number above 0.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.01))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> float(optclip.metrics(state)["clip/norm"])
        5.0

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
        2012, arXiv:1211.5063.
    """
    check_number(max_norm, "max_norm=", hint="pass jnp.inf to switch clipping off")
    return clip_by(
        max_norm,
        norm=norms.l2 if ord is None else norms.lp(ord),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_leaf_norm(
    max_norm: optax.ScalarOrSchedule,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every leaf so that its own norm is at most `max_norm`.

    .. math:: u_l \leftarrow u_l \, \min(1, c / \|u_l\|) \quad \text{for each leaf } l

    Like Keras' `clipnorm`.

    One large layer no longer shrinks the others, and the direction of the gradient as a whole
    changes.

    Args:
        max_norm: c, the largest norm of a leaf, in units of the gradient's norm; a number, traced
            scalar or Optax schedule. There is no customary value.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `clip_rate` reads the share
        of leaves clipped. Cost: one pass over the gradient; on a CPU another one where a leaf is
        all zero.

    Raises:
        ValueError: If `max_norm` is concrete and negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.clip_by_leaf_norm(1.0)
        >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
        >>> updates, state = clip.update(grads, clip.init(grads))
        >>> float(updates["b"][0]), float(optclip.metrics(state)["clip/clip_rate"])
        (0.5, 0.5)
    """
    check_number(max_norm, "max_norm=", hint="pass jnp.inf to switch clipping off")
    return clip_by(
        max_norm,
        scope=scopes.leaf,
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_group_norm(
    max_norm: optax.ScalarOrSchedule | Mapping[Any, optax.ScalarOrSchedule],
    labels: Any,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the leaves of each label so that their common norm is at most that label's bound.

    .. math:: u_l \leftarrow u_l \, \min(1, c_k / \|u_{(k)}\|) \quad \text{for each leaf } l
        \text{ of label } k

    With one label for all it is one shared norm, also where `optax.partition` gives each part an
    optimizer of its own: a clip inside each part sees that part's norm only. Put this one before
    the partition.

    Args:
        max_norm: c, the largest norm, in units of the gradient's norm: one number for every label,
            or a mapping from label to number. Numbers may be traced scalars or Optax schedules.
        labels: A tree of labels with the structure of the gradient, or of a prefix of it, or a
            function from a leaf's path ("block_0/attention/kernel") to its label. Label None
            leaves a leaf alone: it is neither measured nor clipped.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `clip_rate` reads the share
        of groups clipped. Cost: one pass over the gradient; on a CPU another one where a group is
        all zero.

    Raises:
        ValueError: If a bound is concrete and negative or NaN, or, when it meets a gradient, if a
            label has no bound.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.clip_by_group_norm(
        ...     {"embedding": 0.1, "body": 1.0},
        ...     labels=lambda path: "embedding" if "embedding" in path else "body",
        ... )
        >>> grads = {"embedding": jnp.array([3.0]), "dense": jnp.array([0.5])}
        >>> updates, _ = clip.update(grads, clip.init(grads))
        >>> round(float(updates["embedding"][0]), 6), float(updates["dense"][0])
        (0.1, 0.5)
    """
    if isinstance(max_norm, Mapping):
        if not max_norm:
            raise ValueError(
                f"max_norm= must name at least one label, got {max_norm!r}; pass a number"
            )
        rule, order = thresholds.per_group(max_norm), list(max_norm)
    else:
        check_number(max_norm, "max_norm=", hint="pass jnp.inf to switch clipping off")
        rule, order = thresholds.constant(max_norm), None
    return clip_by(
        rule,
        scope=scopes.group(labels, order),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_block_rms(
    threshold: optax.ScalarOrSchedule,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every leaf so that its root mean square is at most `threshold`.

    .. math:: u_l \leftarrow u_l / \max(1, \mathrm{RMS}(u_l) / d) \quad \text{for each leaf } l

    Like `optax.clip_by_block_rms`.

    Adafactor's update clip: meant for after the optimizer's scaling, where an entry is about 1.

    Args:
        threshold: d, the largest root mean square of a leaf, in units of its entries; a number,
            traced scalar or Optax schedule. Adafactor takes 1.0.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `norm` reads the root mean
        square of all leaves together. Cost: one pass over the updates; on a CPU another one where
        a leaf is all zero.

    Raises:
        ValueError: If `threshold` is concrete and negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.clip_by_block_rms(1.0)
        >>> updates, _ = clip.update(jnp.array([4.0, -4.0]), None)
        >>> updates.tolist()
        [1.0, -1.0]

    References:
        Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018,
        arXiv:1804.04235.
    """
    check_number(threshold, "threshold=", hint="pass jnp.inf to switch clipping off")
    return bound_on_updates(
        clip_by(
            threshold,
            scope=scopes.leaf,
            norm=norms.rms,
            axis_name=axis_name,
            sharded=sharded,
            nonfinite=nonfinite,
            detail=detail,
        )
    )


def smooth_clip(
    max_norm: optax.ScalarOrSchedule,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the whole gradient smoothly, so that its norm stays below `max_norm`.

    .. math:: u \leftarrow u \, c / (\|u\| + c)

    A gradient far below the threshold passes nearly unchanged, one at the threshold is halved,
    and none gets there. With a step size eta it is the step eta c / (c + norm) of clipped
    gradient descent under relaxed smoothness, which equals the hard clip up to a factor of 2.

    Args:
        max_norm: c, the norm that is never reached, in units of the gradient's norm; a number,
            traced scalar or Optax schedule. There is no customary value.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `clip_rate` reads the share
        of steps whose norm was above c. Cost: one pass over the gradient.

    Raises:
        ValueError: If `max_norm` is concrete and negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> clip = optclip.smooth_clip(5.0)
        >>> updates, _ = clip.update(jnp.array([3.0, 4.0]), None)
        >>> updates.tolist()
        [1.5, 2.0]

    References:
        Zhang, He, Sra and Jadbabaie, "Why gradient clipping accelerates training", 2019,
        arXiv:1905.11881.
    """
    check_number(max_norm, "max_norm=", hint="pass jnp.inf to switch clipping off")
    return clip_by(
        max_norm,
        limiter=limiters.smooth,
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def normalize_by_norm(
    target: optax.ScalarOrSchedule,
    *,
    scope: Scope = scopes.tree,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every gradient to the norm `target`: large ones down and small ones up.

    .. math:: u \leftarrow u \, \min(c / \|u\|, m)

    Like `optax.normalize_by_update_norm`.

    m is 1e6, a floor under the norm; `clip_by` with `limiters.normalize(m)` takes another one.

    Normalized gradient descent: the step has the same length on a plateau as on a cliff, so
    vanishing gradients are cured as exploding ones are. It is no clip. Of a batch near a minimum
    the noise is scaled up too, so that the run circles the minimum at the distance of a step, and
    the learning rate must fall. Momentum before it (Cutkosky and Mehta), as in
    `optax.chain(optax.ema(0.9), normalize_by_norm(1.0), ...)`, averages noise out on the way, and
    by itself cures that no more. Adam and Muon normalize by themselves, and have no use for it.

    Args:
        target: c, the norm that every gradient gets, in units of the gradient's norm; a number,
            traced scalar or Optax schedule. With plain gradient descent the length of a step is
            target times learning rate; 1.0 leaves it to the learning rate.
        scope: Which entries share a norm; see `clip_by`. Default: all of them. With `scopes.leaf`
            every leaf takes a step of the same length.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `threshold` reads the target,
        `factor` is above 1 where a gradient was scaled up, and `clip_rate` the share of steps (or
        groups) whose norm was above the target. Cost: one pass over the gradient.

    Raises:
        ValueError: If `target` is concrete and negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> normalize = optclip.normalize_by_norm(1.0)
        >>> updates, state = normalize.update(jnp.array([3e-5, 4e-5]), None)
        >>> [round(float(u), 4) for u in updates], round(float(state.factor))
        ([0.6, 0.8], 20000)

    References:
        Hazan, Levy and Shalev-Shwartz, "Beyond convexity: stochastic quasi-convex optimization",
        2015, arXiv:1507.02030. With momentum: Cutkosky and Mehta, "Momentum improves normalized
        SGD", 2020, arXiv:2002.03305.
    """
    check_number(target, "target=", hint="1.0 leaves the length of a step to the learning rate")
    return clip_by(
        target,
        scope=scope,
        limiter=limiters.normalize(),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def measure_norms(
    *,
    scope: Scope = scopes.tree,
    norm: Norm = norms.l2,
    histogram: bool = False,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Measures the gradient and hands it on untouched.

    Put one before and one after any transformation to see what it does to the norm.

    Args:
        scope: Which entries share a norm; see `clip_by`. Default: all of them.
        norm: How a group is measured; see `clip_by`. Default: the 2-norm.
        histogram: Whether the state's memory also counts the norms of all steps by size, as an
            `optclip.histograms.NormHistogram`: 9.2 kB, and as much again for every leaf (or label)
            with `detail=True`. `optclip.tuning.suggest_threshold(opt_state)` reads a threshold
            from it, `optclip.histograms.quantile` any quantile of the norms within 2%.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`. "zero" is the one way in which this changes an update.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState` whose threshold is infinite.
        Cost: one pass over the gradient; counting takes the same time at any length of run.

    Raises:
        ValueError: If there would be a histogram for every unit.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.measure_norms(), optax.adam(1e-3))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> float(optclip.metrics(state)["clip/norm"])
        5.0
    """
    measured = bound_on_updates(  # It may stand anywhere, and is there to measure.
        clip_by(
            jnp.inf,
            scope=scope,
            norm=norm,
            axis_name=axis_name,
            sharded=sharded,
            nonfinite=nonfinite,
            detail=detail,
        )
    )
    if histogram and detail and not (scope.whole_leaves or scope.labels):
        raise ValueError(
            "measure_norms(histogram=True, detail=True) would keep 9.2 kB for every single unit; "
            "pass scope=scopes.leaf for a histogram of each leaf, or leave detail out"
        )
    return histograms.recording(measured) if histogram else measured
