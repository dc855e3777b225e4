"""`sweep`: the final loss for every threshold and seed, all from one compiled step."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

State = Any
Batch = Any

TRIAL_STEPS = 3
"""By so many steps it is told which way of running them all is the faster."""

LAST = 0.1
"""Share of the steps at the end whose mean training loss is the final loss."""

FETCH_EVERY = 20
"""Steps between two waits for the device."""

FLAT = 0.02
"""Median losses within this share of the best are called as good."""


class Sweep(NamedTuple):
    """What a sweep found; arrays with a row for each threshold and a column for each seed.

    Attributes:
        thresholds: In rising order; infinity is no clipping. Shape (thresholds,).
        seeds: Of the runs.
        losses: Final loss of each run; infinite where it was not finite.
        clip_rates: Share of the steps that were clipped; NaN where the steps do not report it.
        vectorized: Whether all runs were one `vmap`, or were made one after the other.
    """

    thresholds: np.ndarray
    seeds: tuple[int, ...]
    losses: np.ndarray
    clip_rates: np.ndarray
    vectorized: bool

    @property
    def medians(self) -> np.ndarray:
        """The median loss of the seeds, for each threshold."""
        return np.median(self.losses, axis=1)

    @property
    def best(self) -> float:
        """The threshold with the smallest median loss; NaN where all diverged."""
        found = self.medians.min()
        return float(self.thresholds[self.medians.argmin()]) if np.isfinite(found) else np.nan

    @property
    def flat(self) -> tuple[float, float]:
        """From where to where around the best the median losses are within 2% of its own."""
        place = low = high = int(self.medians.argmin())
        good = self.medians <= self.medians[place] + FLAT * abs(self.medians[place])
        while low > 0 and good[low - 1]:
            low -= 1
        while high < len(good) - 1 and good[high + 1]:
            high += 1
        return float(self.thresholds[low]), float(self.thresholds[high])

    def finding(self) -> str:
        """What the sweep says, in a sentence."""
        if np.isnan(self.best):
            return "Every threshold diverged: lower the learning rate"
        found = f"Lowest loss, {self.medians.min():.3g}, {_at(self.best)}"
        low, high = self.flat
        if low < high:
            end = "no clipping" if np.isinf(high) else f"{high:.3g}"
            found += f"; within {FLAT:.0%} of it from {low:.3g} to {end}"
        free, best = np.isinf(self.thresholds), self.losses[self.medians.argmin()]
        if np.isfinite(high) and (self.losses[free].min(initial=np.inf) <= best.max()):
            found += "; seeds overlap with those without clipping"
        lost = int(np.sum(~np.isfinite(self.medians)))
        return found + (f"; {lost} of {len(self.medians)} thresholds diverged" if lost else "")

    def table(self) -> Any:
        """The losses as a `rich.table.Table`.

        Raises:
            ImportError: If rich is not installed.
        """
        from optclip.tuning import sweep_picture

        return sweep_picture.table(self)

    def draw(self, path: str | os.PathLike[str] | None = None, *, subtitle: str = "") -> Any:
        """Draws loss against threshold: the median in a band from the lowest seed to the highest.

        Args:
            path: Where to save it; its ending gives the format. None: nowhere.
            subtitle: What was trained.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from optclip.tuning import sweep_picture

        return sweep_picture.draw(self, path, subtitle)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON, where infinity is the word "inf" and NaN is None."""

        def plain(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return [plain(one) for one in x]
            if isinstance(x, float):
                return None if np.isnan(x) else x if np.isfinite(x) else "inf"
            return x

        found = {
            name: plain(x.tolist() if isinstance(x, np.ndarray) else x)
            for name, x in self._asdict().items()
        }
        more = {"best": plain(self.best), "flat": plain(self.flat), "finding": self.finding()}
        return found | more


def _at(threshold: float) -> str:
    return "without clipping" if np.isinf(threshold) else f"at threshold {threshold:.3g}"


def sweep(
    train_step: Callable[[State, jax.Array, Batch], tuple[State, Any]],
    thresholds: Iterable[float],
    seeds: Iterable[int] | int = 3,
    *,
    init: Callable[[Any], State],
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
        init: seed -> state: parameters, the optimizer's state and so on. It is compiled here, so
            the seed is a traced integer: for `jax.random.key`, not for numpy.
        batches: (seed, number of the step from 0 on) -> batch, arrays; the same for all thresholds.
        steps: How many steps each run takes.
        evaluate: state -> final loss. Default: the mean training loss of the last tenth.
        vectorize: True runs them all in one `vmap`, False one after the other. Default: whichever
            takes less time over three steps; a `vmap` of convolutions on a CPU mostly does not.
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
        >>> def init(seed):
        ...     params = jax.random.normal(jax.random.key(seed), 3)
        ...     return params, optimizer(1.0).init(params)
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
            raise ValueError(f"sweep({name}=...) must be a function, got {_kind(function)}")
    sizes, numbers = _sizes(thresholds), _numbers(seeds)
    if steps < 1:
        raise ValueError(f"sweep(steps=...) must be at least 1, got {steps!r}")
    given = _Given(train_step, init, batches, jnp.asarray(sizes, jnp.float32), numbers)
    if vectorize is None:
        vectorize = len(sizes) * len(numbers) > 1 and _is_faster(given)
    ways = [_all_together(given)] if vectorize else _one_by_one(given)
    read, states = [], []
    with _bar(steps * len(ways), progress) as bar:
        for way in ways:
            state, readings = _train(way, steps, bar)
            read.append(readings)
            states.append(state)
    # (steps, 2) for each threshold and seed, in this order of the dimensions.
    shape = (len(sizes), len(numbers), steps, 2)
    read = np.moveaxis(read[0], 0, 2) if vectorize else np.reshape(read, shape)
    losses = read[..., -max(1, round(LAST * steps)) :, 0].mean(axis=-1)
    if evaluate is not None:
        evaluated = jax.jit(jax.vmap(jax.vmap(evaluate)) if vectorize else evaluate)
        losses = np.reshape([np.asarray(evaluated(state)) for state in states], shape[:2])
    losses = np.where(np.isfinite(losses), losses, np.inf).astype(np.float64)
    return Sweep(sizes, numbers, losses, read[..., -1, 1].astype(np.float64), bool(vectorize))


def _sizes(thresholds: Iterable[float]) -> np.ndarray:
    sizes = np.unique(np.asarray(thresholds if _is_number(thresholds) else list(thresholds), float))
    if not sizes.size or np.isnan(sizes).any() or (sizes < 0).any():
        raise ValueError(
            "sweep(thresholds=...) must be numbers of at least 0, one or more (numpy.inf for no "
            f"clipping), got {sizes.tolist()}; pass numpy.geomspace(0.01, 100, 13), for example"
        )
    return sizes


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or getattr(x, "ndim", None) == 0


def _numbers(seeds: Iterable[int] | int) -> tuple[int, ...]:
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers:
        raise ValueError(f"sweep(seeds=...) must be at least one seed, got {seeds!r}; pass 3")
    return numbers


def _bar(total: int, progress: bool | None) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError('the progress bar needs tqdm: pip install "optclip[tuning]"') from None
    hidden = None if progress is None else not progress  # None: shown on a terminal only.
    return tqdm(total=total, desc="sweep", unit="step", disable=hidden)


class _Given(NamedTuple):
    """What was passed to `sweep`."""

    train_step: Callable[..., Any]
    init: Callable[..., Any]
    batches: Callable[[int, int], Batch]
    sizes: jax.Array
    seeds: tuple[int, ...]

    def step(self, state: State, threshold: jax.Array, batch: Batch) -> tuple[State, jax.Array]:
        """A step of one run; the state, and loss and clip rate."""
        taken = self.train_step(state, threshold, batch)
        if not isinstance(taken, tuple) or len(taken) != 2:
            raise ValueError(
                "sweep(train_step=...) must give (state, loss), or (state, dict with a loss), got "
                f"{_kind(taken)}"
            )
        state, read = taken
        read = read if isinstance(read, dict) else {"loss": read}
        if "loss" not in read:
            raise ValueError(
                f"sweep(train_step=...) gives a dict without 'loss' in it; it has {list(read)}"
            )
        loss, rate = read["loss"], read.get("clip/clip_rate", jnp.nan)
        if jnp.shape(loss):
            raise ValueError(
                "sweep(train_step=...) must give one number as the loss, got an array of shape "
                f"{jnp.shape(loss)}; take its mean"
            )
        return state, jnp.stack([jnp.asarray(x).astype(jnp.float32) for x in (loss, rate)])


def _kind(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"{len(x)} things"
    return f"a {type(x).__name__}"


class _Way(NamedTuple):
    """One run, or all in one: how to begin, and (state, number of the step) -> (state, read)."""

    start: Callable[[], State]
    step: Callable[[State, int], tuple[State, jax.Array]]


def _one_by_one(given: _Given) -> list[_Way]:
    started, compiled = jax.jit(given.init), jax.jit(given.step)

    def way(size: jax.Array, seed: int) -> _Way:
        return _Way(
            lambda: started(seed),
            lambda state, number: compiled(state, size, given.batches(seed, number)),
        )

    return [way(size, seed) for size in given.sizes for seed in given.seeds]


def _all_together(given: _Given) -> _Way:
    """States with two more dimensions in front: thresholds, seeds."""
    over_seeds = jax.vmap(given.step, in_axes=(0, None, 0))
    compiled = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)))
    count = len(given.sizes)

    @jax.jit
    def start(seeds: jax.Array) -> State:
        states = jax.vmap(given.init)(seeds)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), states)

    def step(state: State, number: int) -> tuple[State, jax.Array]:
        batches = [given.batches(seed, number) for seed in given.seeds]
        return compiled(state, given.sizes, jax.tree.map(lambda *x: jnp.stack(x), *batches))

    return _Way(lambda: start(jnp.asarray(given.seeds, jnp.int32)), step)


def _is_faster(given: _Given) -> bool:
    """Whether all runs together take less time than one by one."""
    count = len(given.sizes) * len(given.seeds)
    return _seconds(_all_together(given)) < count * _seconds(_one_by_one(given)[0])


def _seconds(way: _Way) -> float:
    """What a step takes, once it is compiled."""
    state, _ = jax.block_until_ready(way.step(way.start(), 0))
    began = time.perf_counter()
    for number in range(TRIAL_STEPS):
        state, _ = way.step(state, number)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / TRIAL_STEPS


def _train(way: _Way, steps: int, bar: Any) -> tuple[State, np.ndarray]:
    """The state after the last step, and what was read of each."""
    state, read = way.start(), []
    for number in range(steps):
        state, reading = way.step(state, number)
        read.append(reading)
        if len(read) % FETCH_EVERY == 0:
            jax.block_until_ready(reading)  # The bar tells what is done, not what is queued.
            bar.update(FETCH_EVERY)
    bar.update(steps % FETCH_EVERY)
    return state, np.stack(jax.device_get(read))
