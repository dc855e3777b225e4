"""`sweep`: the final loss for every threshold and seed, all from one compiled step."""

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._tuning import sweep_runs
from optclip._tuning.sweep_result import Sweep
from optclip._tuning.sweep_runs import Batch, State, SweepSpec, kind

LAST = 0.1
"""Share of the steps at the end whose mean training loss is the final loss."""


def sweep(
    train_step: Callable[[State, jax.Array, Batch], tuple[State, Any]],
    thresholds: Iterable[float],
    seeds: Iterable[int] | int = 3,
    *,
    init: Callable[[Any, jax.Array], State],
    batches: Callable[[int, int], Batch],
    steps: int,
    evaluate: Callable[[State], jax.Array] | None = None,
    vectorize: bool | None = None,
    progress: bool | None = None,
) -> Sweep:
    r"""Trains with every threshold and seed, and compares the final losses.

    .. math:: L(c) = \mathrm{median}_s \; \mathrm{loss}(c, s)

    The threshold is a traced number, so that all runs share one compiled step. A clip takes it as
    any other: `optclip.clip_by_global_norm(threshold)` inside `train_step`.

    Args:
        train_step: (state, threshold, batch) -> (state, loss), without side effects; it is
            compiled here. In place of the loss it may give a dict with a "loss" in it: of
            `optclip.metrics`, the clip rate is read.
        thresholds: Thresholds to try, in units of the gradient's norm; `numpy.inf` for no clipping.
        seeds: Seeds, or how many (0, 1, ...). Default: 3, the least that has a median.
        init: (seed, threshold) -> state: parameters, the optimizer's state and so on. It is
            compiled here, so the seed is a traced integer: for `jax.random.key`, not for numpy. A
            clip that keeps its threshold in the state (`optax.inject_hyperparams`) takes it here.
        batches: (seed, number of the step from 0 on) -> batch, arrays. A function of the two alone:
            it is called for every threshold, and for a trial.
        steps: How many steps each run takes.
        evaluate: state -> final loss; compiled here. Default: the mean training loss of the last
            tenth of the steps.
        vectorize: True runs them all in one `vmap`, False one after the other. Default: whichever
            takes less time over three steps (a `vmap` of convolutions on a CPU mostly does not),
            and one after the other where the states of all runs take more than 1 GiB.
        progress: Whether to show a progress bar. Default: on a terminal.

    Returns:
        A `Sweep`, with `table()`, `draw(path)`, `finding()` and `to_dict()`.

    Raises:
        ImportError: If tqdm is not installed.
        ValueError: If a threshold is negative or NaN, or there is nothing to run.

    Example:
        >>> import jax, jax.numpy as jnp, optax, optclip
        >>> from optclip.tuning import sweep
        >>> def optimizer(threshold):
        ...     return optax.chain(optclip.clip_by_global_norm(threshold), optax.sgd(1.0))
        >>> def init(seed, threshold):
        ...     params = jax.random.normal(jax.random.key(seed), 3)
        ...     return params, optimizer(threshold).init(params)
        >>> def train_step(state, threshold, batch):
        ...     params, opt_state = state
        ...     loss, grads = jax.value_and_grad(lambda w: jnp.sum((w - batch) ** 2))(params)
        ...     updates, opt_state = optimizer(threshold).update(grads, opt_state)
        ...     return (optax.apply_updates(params, updates), opt_state), loss
        >>> found = sweep(
        ...     train_step, [0.1, 1.0], init=init, batches=lambda seed, step: jnp.ones(3), steps=8
        ... )
        >>> found.losses.shape, found.best in (0.1, 1.0)
        ((2, 3), True)
    """
    for name, function in {"train_step": train_step, "init": init, "batches": batches}.items():
        if not callable(function):
            raise ValueError(f"sweep({name}=...) must be a function, got {kind(function)}")
    sizes, numbers = _sizes(thresholds), _numbers(seeds)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sweep(steps=...) must be a whole number of at least 1, got {steps!r}")
    spec = SweepSpec(train_step, init, batches, evaluate, jnp.asarray(sizes, jnp.float32), numbers)
    if vectorize is None:
        ways = sweep_runs.faster(spec)
    else:
        ways = [sweep_runs.all_together(spec)] if vectorize else sweep_runs.one_by_one(spec)
    together = len(ways) == 1 and len(sizes) * len(numbers) > 1
    with _bar(steps * len(ways), progress) as bar:
        read, final = zip(*(sweep_runs.train(way, steps, bar) for way in ways), strict=True)
    shape = (len(sizes), len(numbers))
    read = np.moveaxis(read[0], 0, 2) if together else np.reshape(read, (*shape, steps, 2))
    losses = np.reshape(final, shape)
    if evaluate is None:
        losses = read[..., -max(1, round(LAST * steps)) :, 0].mean(axis=-1)
    losses = np.where(np.isfinite(losses), losses, np.inf).astype(np.float64)
    return Sweep(sizes, numbers, losses, read[..., -1, 1].astype(np.float64), together)


def _sizes(thresholds: Iterable[float]) -> np.ndarray:
    several: Any = thresholds
    sizes = np.unique(np.asarray(several if _is_number(several) else list(several), np.float64))
    if not sizes.size or np.isnan(sizes).any() or (sizes < 0).any():
        raise ValueError(
            "sweep(thresholds=...) must be numbers of at least 0, one or more (numpy.inf for no "
            f"clipping), got {sizes.tolist()}; pass numpy.geomspace(0.01, 100, 13), for example"
        )
    limits, inside = np.finfo(np.float32), sizes[(sizes > 0) & np.isfinite(sizes)]
    if ((inside < limits.tiny) | (inside > limits.max)).any():
        raise ValueError(
            f"sweep(thresholds=...) must be in the range of float32, got {inside.tolist()}"
        )
    return sizes


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or getattr(x, "ndim", None) == 0


def _numbers(seeds: Iterable[int] | int) -> tuple[int, ...]:
    several: Any = seeds
    if _is_number(seeds):
        several = range(operator.index(several))
    numbers = tuple(operator.index(number) for number in several)
    if not numbers or not all(0 <= number < 2**31 for number in numbers):
        raise ValueError(
            "sweep(seeds=...) must be at least one seed, from 0 to 2**31 - 1, or how many, got "
            f"{seeds!r}; pass 3"
        )
    return numbers


def _bar(total: int, progress: bool | None) -> Any:
    if progress is False:
        return contextlib.nullcontext(_NoBar())
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            'the progress bar needs tqdm: pip install "optclip[tuning]", or pass progress=False'
        ) from None
    # None: on a terminal only.
    return tqdm(total=total, desc="sweep", unit="step", disable=False if progress else None)


class _NoBar:
    """Where no progress is to be shown."""

    def update(self, steps: int) -> None:
        """Nothing."""
