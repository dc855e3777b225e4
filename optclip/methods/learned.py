"""Clips whose threshold is learned from the norms of the run."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from optclip import scopes, thresholds
from optclip.clipping import Nonfinite, clip_by
from optclip.thresholds import Rule
from optclip.thresholds.averages import LearnFrom
from optclip.thresholds.outliers import LearnFromOutliers, ZVariant


def autoclip(
    percentile: optax.ScalarOrSchedule = 10.0,
    window: int = 1024,
    *,
    learn_from: LearnFrom = "raw",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the whole gradient to a percentile of the norms seen lately (AutoClip).

    .. math:: u \leftarrow u \, \min(1, c / \|u\|), \quad
        c = \mathrm{percentile}_p(\|u_1\|, \dots, \|u_t\|)

    This step's norm is counted before it is clipped. The paper keeps every norm of the run. Here
    the last `window` are kept, so that memory does not grow and the threshold follows a drift,
    with a delay.

    Known weakness (log-normal norms, medians of `python -m benchmarks.dynamics`): the default clips
    nine steps in ten. At a noise of 0.2 it leaves 0.74 of the norm. A lasting tenfold rise is
    followed after 921 steps. At percentile 90 it is followed after 104, but then a fall takes 921,
    and of a spike of 100 at the tenth step a norm of 11 is left.

    Args:
        percentile: p, in [0, 100]; the paper recommends 10, which clips nine steps in ten. With
            plain SGD that is a smaller learning rate too.
        window: How many norms to look at; a plain number. The paper's is unbounded.
        learn_from: "raw", the paper's: the norm before clipping.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: `window` floats and
        a count. Cost: one pass over the gradient, and a sort of `window` numbers.

    Raises:
        ValueError: If `percentile` is concrete and not in [0, 100], or `window` is no whole number.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.autoclip(), optax.adam(1e-3))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> float(optclip.metrics(state)["clip/threshold"])
        5.0

    References:
        Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: adaptive gradient clipping for source
        separation networks", 2020, arXiv:2007.14469.
    """
    return clip_by(
        thresholds.quantile_over_window(percentile, window, learn_from),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_quantile(
    quantile: optax.ScalarOrSchedule = 0.9,
    step_size: optax.ScalarOrSchedule = 0.2,
    init: float | jax.Array | None = None,
    *,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the whole gradient to a quantile of its norms that is tracked with one number.

    .. math:: u \leftarrow u \, \min(1, c / \|u\|), \quad
        c \leftarrow c \, e^{-\eta (\mathbf{1}[\|u\| \le c] - q)}

    The threshold falls a little at a norm below it and rises at one above, so that a share q of the
    norms lies below. The rule of differentially private federated learning, with the norm of the
    batch in place of the share of users, and without noise. It learns only whether a norm was above
    the threshold, so one spike moves it no more than any other norm.

    Known weakness (`python -m benchmarks.dynamics`): it clips 10% of the steps even of a constant
    stream, and of a burst of 20 steps at 20 times the norm it lets out 9.4 on average, the end in
    full.

    Args:
        quantile: q, in [0, 1]: 0.9 clips one step in ten. The paper tracks the median of users.
        step_size: eta, how far log c moves at the most in a step; the paper's 0.2.
        init: The first threshold, in units of the gradient's norm; None for the first norm.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: one float. Cost: one
        pass over the gradient.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_quantile(0.95), optax.sgd(0.1))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> float(optclip.metrics(state)["clip/factor"])
        1.0

    References:
        Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive
        clipping", 2019, arXiv:1905.03871.
    """
    return clip_by(
        thresholds.online_quantile(quantile, step_size, init),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def zclip(
    *,
    z_threshold: optax.ScalarOrSchedule = 2.5,
    decay: optax.ScalarOrSchedule = 0.97,
    warmup_steps: optax.ScalarOrSchedule = 25,
    variant: ZVariant = "reciprocal",
    learn_from: LearnFromOutliers = "clipped",
    patience: float | jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms that are outliers by their z-score (ZClip).

    .. math:: z = (n - \mu) / (\sigma + 10^{-6}), \quad
        n^* = \mu + (z_t^2 / z) \, \sigma \text{ where } z > z_t, \quad u \leftarrow u \, n^* / n

    with mean and variance as exponential moving averages of the norms as they were clipped, the
    variance about the new mean, and after a warm-up in which nothing is clipped. The larger a
    spike, the closer to the mean it is brought.

    Known weakness (log-normal norms, noise 0.2, 20 seeds of `python -m benchmarks.dynamics`): after
    a lasting threefold rise the threshold never recovers within 5,000 steps, in no seed;
    `patience=20` recovers in 22 steps, `learn_from="winsorized"` in 15. A spike in the first 25
    steps passes in full. `learn_from="raw"` lets the second of two spikes 20 steps apart through in
    full; the variant "mean" clips 92% of the steps at a noise of 1. The 1e-6 gives the rule a scale
    where norms are that small.

    Args:
        z_threshold: z_t, deviations above the mean; the paper's 2.5.
        decay: Share of mean and variance that a step keeps, in [0, 1); the paper's 0.97.
        warmup_steps: Norms from which mean and variance start; the paper's 25.
        variant: What an outlier is brought to: "reciprocal" (the paper's choice), "mean", or "max"
            for mean + z_t deviations.
        learn_from: "clipped", the paper's; "winsorized" holds norms to mean + z_t deviations.
        patience: After so many clips in a row learn from raw norms; None, the paper's: never.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: three numbers. Cost:
        one pass over the gradient.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.zclip(), optax.adamw(1e-3))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state, jnp.zeros(2))
        >>> float(optclip.metrics(state)["clip/threshold"])  # warming up
        inf

    References:
        Kumar, Owen, Chowdhury and Gura, "ZClip: adaptive spike mitigation for LLM pre-training",
        2025, arXiv:2504.02507. The released code adds a fixed clip at 1.0 by default; this follows
        the paper: put `clip_by_global_norm` after it for that.
    """
    return clip_by(
        _patient(
            thresholds.zscore(z_threshold, decay, warmup_steps, variant, learn_from), patience
        ),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def adagc(
    relative: optax.ScalarOrSchedule = 1.05,
    decay: optax.ScalarOrSchedule = 0.98,
    warmup_steps: optax.ScalarOrSchedule = 100,
    max_norm: optax.ScalarOrSchedule = 1.0,
    *,
    learn_from: LearnFrom = "clipped",
    patience: float | jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every tensor relative to an average of its own norms (AdaGC).

    .. math:: u_l \leftarrow u_l \, \min(1, \lambda \gamma_l / \|u_l\|), \quad
        \gamma_l \leftarrow \beta \gamma_l + (1 - \beta) \|u_l\| \text{ of the clipped } u_l

    Before step `warmup_steps` the whole gradient is clipped by `max_norm` instead, and gamma_l is
    the smallest clipped norm of the tensor so far.

    Known weakness (log-normal norms, `python -m benchmarks.dynamics`): with 1.05 it clips 42% of
    the steps at a noise of 0.1. At a noise of 0.5 it clips 80%, and 0.55 of the norm is left. The
    threshold rises by at most 0.1% a step, so a tenfold rise takes 1,616 steps (43 with
    `patience=20`, 163 with `relative=1.5`). `max_norm` sets the scale it starts from: with norms
    around 100, most steps lose more than 10% of the norm until step 4,541.

    Args:
        relative: lambda, how many times its average a tensor's norm may be; the paper's 1.05.
        decay: beta, the share of the average that a step keeps, in [0, 1); the paper's 0.98.
        warmup_steps: The first step, counted from 1, that is clipped tensor by tensor; the
            paper's 100.
        max_norm: Largest norm of the whole gradient before that; the paper's 1.0.
        learn_from: "clipped", the paper's.
        patience: After so many clips of a tensor in a row learn from its raw norms; None, the
            paper's: never.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`; `clip_rate` reads the share
        of tensors clipped. State: one float per tensor, in one vector. Cost: one pass over the
        gradient; on a CPU another one where a tensor is all zero.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.adagc(), optax.adamw(1e-3))
        >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
        >>> state = optimizer.init(params)
        >>> _, state = optimizer.update({"a": jnp.ones(2), "b": jnp.ones(3)}, state, params)
        >>> round(float(optclip.metrics(state)["clip/clipped_norm"]), 6)
        1.0

    References:
        Wang et al., "AdaGC: improving training stability for large language model pretraining",
        2025, arXiv:2502.11034. In the paper a tensor whose gradient is zero once while warming up
        gets gamma_l = 0 and never moves again; here zeros are not learned from.
    """
    return clip_by(
        _patient(
            thresholds.leaf_average(relative, decay, warmup_steps, max_norm, learn_from), patience
        ),
        scope=scopes.leaf,
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_window(
    deviations: optax.ScalarOrSchedule = 3.0,
    window: int = 128,
    *,
    learn_from: LearnFrom = "raw",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the whole gradient to the mean of its last norms plus some standard deviations.

    .. math:: u \leftarrow u \, \min(1, c / \|u\|), \quad c = \mathrm{mean} + k \, \mathrm{std}

    Like the trainer Levanter.

    The norms are the last ones before this step. Nothing is clipped before half of the window is
    filled. The deviation counts as 1e-6 of the mean where it is smaller.

    Known weakness (`python -m benchmarks.dynamics`): one spike of 100 raises the threshold 17-fold
    for a window. So the second of two spikes 20 steps apart passes in full, and a burst of 20 steps
    at 20 times the norm leaves at 15 on average. With `learn_from="clipped"` they leave at 1.6 and
    1.9, and a tenfold rise is followed in 71 steps instead of 8.

    Args:
        deviations: k; 3.0 is what the Levanter trainer takes.
        window: How many norms to remember; a plain number. 128 is what Levanter takes.
        learn_from: "raw", Levanter's choice.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: `window` floats and
        a count. Cost: one pass over the gradient.

    Raises:
        ValueError: If `deviations` is concrete and negative or NaN, or `window` is no whole number.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_window(), optax.adam(1e-3))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> float(optclip.metrics(state)["clip/threshold"])  # the window fills
        inf
    """
    return clip_by(
        thresholds.mean_over_window(deviations, window, learn_from),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def clip_by_moving_average(
    multiplier: optax.ScalarOrSchedule = 2.0,
    decay: optax.ScalarOrSchedule = 0.99,
    *,
    learn_from: LearnFrom = "clipped",
    patience: float | jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the whole gradient to a multiple of the moving average of its norms.

    .. math:: u \leftarrow u \, \min(1, k m / \|u\|), \quad
        m \leftarrow \beta m + (1 - \beta) \|u\| \text{ of the clipped } u

    with m corrected for its start at zero, as Adam's averages are. The first norm is not clipped.

    Known weakness (`python -m benchmarks.dynamics`): a tenfold rise takes 165 steps to follow (83
    with `patience=20`), a fall 218. How much it clips depends on the noise: nothing up to 0.2, and
    19% of the steps at 1.

    Args:
        multiplier: k, how many times the average a norm may be. Learning from clipped norms, the
            threshold can rise by (1 - beta)(k - 1) of itself in a step: 1% with the defaults. At 1
            and below it sinks. The default is ours.
        decay: beta, the share of the average that a step keeps, in [0, 1). The default is ours: it
            looks back over about 100 steps.
        learn_from: "clipped" follows a lasting rise at the speed above. "raw" follows a tenfold
            rise in 60 steps, and lets a spike raise the threshold.
        patience: After so many clips in a row learn from raw norms; None: never.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: two floats. Cost: one
        pass over the gradient.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.clip_by_moving_average(), optax.sgd(0.1))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> for _ in range(2):
        ...     _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        >>> round(float(optclip.metrics(state)["clip/threshold"]), 4)
        10.0
    """
    return clip_by(
        _patient(thresholds.moving_average(multiplier, decay, learn_from), patience),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def robust_clip(
    *,
    deviations: optax.ScalarOrSchedule = 2.0,
    decay: optax.ScalarOrSchedule = 0.97,
    max_rise: optax.ScalarOrSchedule = float("inf"),
    learn_from: LearnFromOutliers = "winsorized",
    axis_name: str | Sequence[str] | None = None,
    sharded: Any = None,
    nonfinite: Nonfinite = "propagate",
    detail: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms that are outliers on a log scale; needs no threshold and no warm-up.

    .. math:: u \leftarrow u \, \min(1, e^{m + k \sqrt{v}} / \|u\|)

    where m and v are a moving mean and variance of the logarithm of the norms. Before a norm is
    learned from, it is limited to two deviations around the mean (m accepts small norms down to a
    tenth of the level). So a spike hardly moves the level, and a lasting change is followed faster
    the longer it lasts. Multiplying the loss by a number changes nothing. It stops spikes. It does
    not stop a run that diverges because of its learning rate, since it follows the growing norms:
    use `safeguard` there.

    Measured (log-normal norms, medians of `python -m benchmarks.dynamics`): at noises from 0.02 to
    1 it clips 2.3% to 3.5% of the steps. Spikes leave at 1.4 to 1.5 times the level. A tenfold rise
    is followed in 95 steps, a tenfold fall in 90.

    Known weaknesses: the last of 20 steps at 20 times the norm leaves at 3.0. After a tenfold rise
    the threshold overshoots to 2.3 times its new level. Of Pareto-distributed norms 9.8% are
    clipped. The first norm is never clipped: a spike there leaves the threshold at 33 times the
    norm 20 steps later.

    Args:
        deviations: k, deviations of the log norm above its mean; 2.0 clips about one step in 30,
            whatever the noise. May be negative: then most steps are clipped, to a low level.
        decay: Share of mean and variance that a step keeps, in [0, 1); 0.97 looks back over about
            33 steps. The first steps keep less, so that no warm-up is needed.
        max_rise: The most that the level may rise in one step, as a share of it: 0.01 is 1%. No
            bound by default.
        learn_from: "winsorized" is what makes it robust.
        axis_name: See `clip_by`.
        sharded: See `clip_by`.
        nonfinite: See `clip_by`.
        detail: See `clip_by`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `ClipState`. State: three numbers. Cost:
        one pass over the gradient.

    Raises:
        ValueError: If a concrete argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> optimizer = optax.chain(optclip.robust_clip(), optax.adamw(1e-3))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> for scale in (1.0, 1.1, 0.9, 1.0, 100.0):
        ...     _, state = optimizer.update(scale * jnp.array([3.0, 4.0]), state, jnp.zeros(2))
        >>> readings = optclip.metrics(state)
        >>> float(readings["clip/norm"]), bool(readings["clip/clipped_norm"] < 10)
        (500.0, True)
    """
    return clip_by(
        thresholds.robust(deviations, decay, max_rise, learn_from),
        axis_name=axis_name,
        sharded=sharded,
        nonfinite=nonfinite,
        detail=detail,
    )


def _patient(rule: Rule, patience: float | jax.Array | None) -> Rule:
    """The rule, with patience where there is one."""
    return rule if patience is None else thresholds.patient(rule, patience)
