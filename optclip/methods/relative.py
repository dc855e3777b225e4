"""Clips by a threshold relative to the parameters."""

from collections.abc import Sequence
from typing import Any

import optax

from optclip import scopes, thresholds
from optclip._checks import check_number
from optclip.clipping import Nonfinite, bound_on_updates, clip_by
from optclip.scopes import Scope, UnitAxes


def adaptive_grad_clip(
    clipping: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    axis: UnitAxes = None,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the gradient of every unit relative to the unit's weights (AGC).

    .. math:: u_i \leftarrow u_i \, \min\left(1,
        \lambda \max(\|w_i\|, \epsilon) / \|u_i\|\right) \quad \text{for each unit } i

    Like `optax.adaptive_grad_clip`.

    A unit is the weights into one output. The default axes are Optax's, and fit dense layers and
    convolutions; for embeddings, stacked layers, attention and mixture-of-experts kernels let
    `axis` be a function. The paper leaves the last layer unclipped: answer None for it.

    Args:
        clipping: lambda, the largest ratio of the gradient's norm to the weights'; a number,
            traced scalar or Optax schedule. The paper uses 0.01 at batch size 4096 and larger
            values at smaller ones.
        eps: Smallest norm of weights reckoned with, so that weights that start at zero can move;
            the paper's default.
        axis: The axes that one unit spans: an int or tuple for every leaf, or a function
            (path, shape) -> axes, which may answer None to leave a leaf alone. None: see
            `optclip.scopes.fan_in_axes`.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `clip_rate` reads the share
        of units clipped. Cost: one pass over the gradient and one over the parameters; on a CPU
        another one over those of the two in which a unit is all zero.

    Raises:
        ValueError: If `clipping` or `eps` is concrete and negative or NaN, if an axis does not
            exist, or if `update` gets no `params`.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> def axis(path, shape):
        ...     if path.startswith("head"):
        ...         return None
        ...     return (1,) if "embedding" in path else optclip.scopes.fan_in_axes(path, shape)
        >>> clip = optclip.adaptive_grad_clip(0.01, axis=axis)
        >>> params = {"dense": jnp.array([[3.0], [4.0]]), "head": jnp.ones((2, 2))}
        >>> grads = {"dense": jnp.array([[0.0], [1.0]]), "head": jnp.ones((2, 2))}
        >>> updates, _ = clip.update(grads, clip.init(params), params)
        >>> round(float(updates["dense"][1, 0]), 6), float(updates["head"][0, 0])
        (0.05, 1.0)

    References:
        Brock, De, Smith and Simonyan, "High-performance large-scale image recognition without
        normalization", 2021, arXiv:2102.06171.
    """
    check_number(clipping, "clipping=", hint="pass jnp.inf to switch clipping off")
    return clip_by(
        thresholds.relative_to_params(clipping, eps),
        scope=scopes.unit(axis),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_param_norm(
    ratio: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    *,
    scope: Scope = scopes.tree,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the update relative to the parameters; for after the optimizer.

    .. math:: u \leftarrow u \, \min\left(1, \rho \max(\|w\|, \epsilon \sqrt{n}) / \|u\|\right)

    where n is the number of entries. A step that is too long is cut to a share of the parameters'
    length, whatever the learning rate and the scale of the loss. In a group of several leaves those
    whose update is zero in this step count on neither side.

    Args:
        ratio: rho, the largest norm of the update as a share of the parameters'; a number, traced
            scalar or Optax schedule. There is no customary value; on the proving ground
            (docs/proving_ground.md) small transformers did best at 0.01, a recurrent network and
            an embedding ranker at 0.03, and at 0.03 the transformer with momentum diverged at the
            largest learning rates.
        eps: Smallest root mean square of the parameters reckoned with, so that parameters that
            start at zero move; the 1e-3 of Adafactor's relative step size.
        scope: Which entries share a norm; see `clip_by`. Default: all of them.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. Cost: one pass over the
        updates and one over the parameters.

    Raises:
        ValueError: If `ratio` or `eps` is concrete and negative or NaN, or `update` gets no
            `params`.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optax.sgd(1.0), optclip.clip_by_param_norm(0.01))
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, _ = optimizer.update(jnp.array([0.0, 7.0]), optimizer.init(params), params)
        >>> round(float(updates[1]), 6)
        -0.05

    References:
        The floor under the parameters' root mean square: Shazeer and Stern, "Adafactor: adaptive
        learning rates with sublinear memory cost", 2018, arXiv:1804.04235.
    """
    return bound_on_updates(
        clip_by(
            thresholds.relative_to_params(ratio, eps, eps_is_rms=True),
            scope=scope,
            axis_name=axis_name,
            sharded=sharded,
            nonfinite=nonfinite,
            detail=detail,
        )
    )
