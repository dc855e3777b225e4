"""`sweep`: the final loss for every threshold and seed, all from one compiled step."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._tuning.sweep_result import Sweep

State = Any
Batch = Any

LAST = 0.1
"""Share of the steps at the end whose mean training loss is the final loss."""
FETCH_EVERY = 20
"""Steps between two waits for the device."""


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
            it is called again for every threshold.
        steps: How many steps each run takes.
        evaluate: state -> final loss; compiled here. Default: the mean training loss of the last
            tenth of the steps.
        vectorize: True runs them all in one `vmap`, False one after the other, which needs the
            memory of one run. Default: one after the other on a CPU, where a `vmap` mostly is no
            faster; one `vmap` elsewhere.
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
            kind = type(function).__name__
            raise ValueError(f"sweep({name}=...) must be a function, got a {kind}")
    listed: Any = list(thresholds) if isinstance(thresholds, Iterable) else thresholds
    sizes = np.unique(np.asarray(listed, np.float64))
    if not sizes.size or not (sizes >= 0).all():
        raise ValueError(
            "sweep(thresholds=...) must be numbers of at least 0, one or more (numpy.inf for no "
            f"clipping), got {sizes.tolist()}; pass numpy.geomspace(0.01, 100, 13), for example"
        )
    numbers = tuple(range(seeds) if isinstance(seeds, int) else seeds)
    if not numbers:
        raise ValueError(f"sweep(seeds=...) must be at least one seed, got {seeds!r}; pass 3")
    if steps < 1:
        raise ValueError(f"sweep(steps=...) must be at least 1, got {steps}")
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError('the progress bar needs tqdm: pip install "optclip[tuning]"') from None

    def step(state: State, threshold: jax.Array, batch: Batch) -> tuple[State, jax.Array]:
        taken = train_step(state, threshold, batch)
        if not isinstance(taken, tuple) or len(taken) != 2:
            raise ValueError("sweep(train_step=...) must give (state, loss) or (state, dict)")
        state, read = taken
        read = read if isinstance(read, dict) else {"loss": read}
        if "loss" not in read:
            raise ValueError(f"sweep(train_step=...) gave a dict without 'loss': {list(read)}")
        found = read["loss"], read.get("clip/clip_rate", jnp.nan)
        return state, jnp.stack([_number(x, "train_step") for x in found])

    def final(state: State) -> jax.Array:
        return _number(jnp.nan if evaluate is None else evaluate(state), "evaluate")

    def batches_of_all(_: Any, number: int) -> Batch:
        return jax.tree.map(lambda *x: jnp.stack(x), *(batches(seed, number) for seed in numbers))

    traced = jnp.asarray(sizes, jnp.float32)
    runs: list[Any] = [(seed, size, batches) for size in traced for seed in numbers]
    together = jax.default_backend() != "cpu" if vectorize is None else vectorize
    if together:
        # States have two more dimensions in front, thresholds and seeds; batches that of the seeds.
        runs = [(jnp.asarray(numbers), traced, batches_of_all)]
        init = jax.vmap(jax.vmap(init, (0, None)), (None, 0))
        step = jax.vmap(jax.vmap(step, (0, None, 0)), (0, 0, None))
        final = jax.vmap(jax.vmap(final))
    init, step, final = jax.jit(init), jax.jit(step), jax.jit(final)

    def train(seed: Any, threshold: Any, batch_of: Callable[..., Batch]) -> tuple[Any, Any]:
        """What was read of each step, and the final losses; the state is let go of."""
        state, read = init(seed, threshold), []
        for number in range(steps):
            state, reading = step(state, threshold, batch_of(seed, number))
            read.append(reading)
            if len(read) % FETCH_EVERY == 0:
                jax.block_until_ready(reading)  # The bar tells what is done, not what is queued.
                bar.update(FETCH_EVERY)
        bar.update(steps % FETCH_EVERY)
        return np.stack(jax.device_get(read), axis=-1), np.asarray(final(state))

    hidden = None if progress is None else not progress  # None: off but for a terminal
    with tqdm(total=steps * len(runs), desc="sweep", unit="step", disable=hidden) as bar:
        read, losses = zip(*(train(*run) for run in runs), strict=True)
    read = np.reshape(read, (len(sizes), len(numbers), 2, steps)).astype(np.float64)
    losses = np.reshape(losses, read.shape[:2]).astype(np.float64)
    if evaluate is None:
        losses = read[:, :, 0, -max(1, round(LAST * steps)) :].mean(axis=-1)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    return Sweep(sizes, numbers, losses, read[:, :, 1, -1], together)


def _number(x: Any, name: str) -> jax.Array:
    if jnp.shape(x):
        shape = f"an array of shape {jnp.shape(x)}; take its mean"
        raise ValueError(f"sweep({name}=...) must give one number as the loss, got {shape}")
    return jnp.asarray(x).astype(jnp.float32)
