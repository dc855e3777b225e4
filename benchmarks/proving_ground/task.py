"""What a task is: a small network, its data, and the settings under which it is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax


class Feed(NamedTuple):
    """All that a run is given from outside. It is data: one program serves every feed of a task.

    Attributes:
        batches: What the objective reads; every array has the axes (step, seed, ...).
        gradient_factor: What the gradient is multiplied by at each step.
        loss_factor: What the loss is multiplied by at each step, before its gradient is taken.
        thawed: Whether the parameters that `Task.frozen` names learn at this step; bool.
    """

    batches: Any
    gradient_factor: Any
    loss_factor: Any
    thawed: Any


class Setting(NamedTuple):
    """One way to train on a task.

    Attributes:
        name: As in tables and files.
        feed: From the number of steps and the seeds to what the runs are given.
        base: The setting without what this one adds, with which it is compared; "" if none.
        events: From the number of steps to the steps at which something hits the run; the way back
            from each is measured.
        rate_factor: What the learning rates of the task are multiplied by.
        dtype: Of the parameters.
        best_rate_only: Run only with the rate and threshold that were best under `base`.
    """

    name: str
    feed: Callable[[int, tuple[int, ...]], Feed]
    base: str = ""
    events: Callable[[int], tuple[int, ...]] = lambda steps: ()
    rate_factor: float = 1.0
    dtype: Any = jnp.float32
    best_rate_only: bool = False


class Task(NamedTuple):
    """A network and its data.

    Attributes:
        name: As in tables and files.
        steps: How long a run is.
        rate: The best learning rate without a clip, found in a coarse run; the middle of those
            that are tried.
        threshold: About the median norm of the gradient there, as a power of ten; the middle of
            the thresholds that are tried.
        init: From the seed to the parameters.
        objective: (parameters, batch) to (the loss whose gradient is taken, the loss to record).
        optimizer: From the learning rate to the optimizer, which the method is put before, after or
            around.
        settings: The first is the plain one.
        held_out: From the parameters to the loss on data not trained on; None where there are none.
        family: What kind of optimizer it has, for the rivals of that kind.
        frozen: From the path of a parameter to whether it waits for `Feed.thawed`.
        last: The share of the steps whose losses are the result.
        settle: How the losses of the last steps become one number.
        seconds: What 21 runs under one setting take one core, roughly; for the time left.
    """

    name: str
    steps: int
    rate: float
    threshold: float
    init: Callable[[int], Any]
    objective: Callable[[Any, Any], tuple[Any, Any]]
    optimizer: Callable[[Any], optax.GradientTransformation]
    settings: tuple[Setting, ...]
    held_out: Callable[[Any], Any] | None = None
    family: str = ""
    frozen: Callable[[str], bool] = lambda path: False
    last: float = 0.1
    settle: Callable[..., Any] = np.mean
    seconds: float = 10.0
