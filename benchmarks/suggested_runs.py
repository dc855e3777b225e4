"""Training with a clip, at most once: what was trained is remembered in a file."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks import suggested_tasks
from benchmarks.suggested_tasks import Task
from optclip.tuning import Suggestion, suggest_threshold

LAST = 40
"""Steps at the end, whose mean loss is the training loss."""
NO_CLIP = "optclip.measure_norms()"
SPIKE, EVERY, FIRST = 50.0, 20, 30
"""With spikes: the gradient of every so many steps is so many times as large, from that step on."""


class Runner:
    """Trains, and remembers in a file what it trained.

    Args:
        name: Of the task; "digits, spikes" is the task with spikes of the gradient.
        file: The JSON file.
    """

    def __init__(self, name: str, file: Path):
        self.name, self.file = name, file
        self.spikes = name.endswith(", spikes")
        self.done: dict[str, dict[str, Any]] = {}
        if file.exists():
            self.done = json.loads(file.read_text(encoding="utf-8"))["runs"]

    @functools.cached_property
    def task(self) -> Task:
        """The task; its data are read when the first run needs them."""
        return suggested_tasks.start(self.name.removesuffix(", spikes"))

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """The jitted step: one program for all learning rates and thresholds."""
        loss_of = self.task.loss

        @functools.partial(jax.jit, static_argnames="code", donate_argnums=0)
        def step(state, inputs, labels, scale, learning_rate, threshold, code):
            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_of)(params, inputs, labels)
            grads = jax.tree.map(lambda g: scale * g, grads)
            optimizer = _optimizer(learning_rate, threshold, code)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            norm = optclip.metrics(opt_state)["clip/norm"]
            return (optax.apply_updates(params, updates), opt_state), (loss, norm)

        return step

    @functools.cached_property
    def judge(self) -> Callable[..., jax.Array]:
        """The jitted loss."""
        return jax.jit(self.task.loss)

    def key(self, seed: int, learning_rate: float, code: str) -> str:
        """Under which name a run is kept."""
        return f"{self.name}, seed {seed}, learning rate {learning_rate:g}, {code}"

    def run(self, seed: int, learning_rate: float, code: str) -> dict[str, Any]:
        """The outcome of a run: from the file, or trained now."""
        key = self.key(seed, learning_rate, code)
        if key not in self.done:
            self.done[key] = self._train(seed, learning_rate, code)
            self._write()
        return self.done[key]

    def _train(self, seed: int, learning_rate: float, code: str) -> dict[str, Any]:
        threshold = _threshold_in(code)
        settings = (jnp.float32(learning_rate), jnp.float32(threshold or jnp.inf))
        code_left = "" if threshold else code  # a fixed threshold is a value, and no new program
        params = self.task.init(seed)
        state = (params, _optimizer(*settings, code_left).init(params))
        readings = []
        for number in range(self.task.steps):
            batch = self.task.batch(seed, number)
            spike = self.spikes and number >= FIRST and number % EVERY == 0
            scale = jnp.float32(SPIKE if spike else 1.0)
            state, reading = self.step(state, *batch, scale, *settings, code=code_left)
            readings.append(reading)
        losses, norms = np.array(jax.device_get(readings), np.float64).T
        held_out = np.mean([self.judge(state[0], *batch) for batch in self.task.held_out])
        outcome: dict[str, Any] = {
            "train": number_or_null(losses[-LAST:].mean()),
            "held_out": number_or_null(held_out),
        }
        if code == NO_CLIP:
            outcome["norms"] = [number_or_null(norm) for norm in norms]
            outcome["losses"] = [number_or_null(loss) for loss in losses]
        return outcome

    def _write(self) -> None:
        """Whole or not at all: the benchmark may be interrupted here."""
        part = self.file.with_suffix(".part")
        content = {"benchmark": "suggested_thresholds", "runs": self.done}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)

    def suggestion(self, seed: int, learning_rate: float) -> Suggestion:
        """What is suggested from the run without a clip."""
        measured = self.run(seed, learning_rate, NO_CLIP)
        columns = {"norm": measured["norms"], "loss": measured["losses"]}
        return suggest_threshold(
            {
                name: [math.nan if x is None else x for x in values]
                for name, values in columns.items()
            }
        )


def _optimizer(learning_rate: Any, threshold: Any, code: str) -> optax.GradientTransformation:
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    if not code:
        return optax.chain(optclip.clip_by_global_norm(threshold), optimizer)
    clip = eval(code, {"optclip": optclip, "optimizer": optimizer})  # as a person pastes it
    return clip if "(optimizer" in code else optax.chain(clip, optimizer)


def fixed(threshold: float) -> str:
    """The code of a fixed clip."""
    return f"optclip.clip_by_global_norm({threshold:.4g})"


def _threshold_in(code: str) -> float | None:
    """The number in a fixed clip; None for another one, which is a program of its own."""
    name, _, number = code.removesuffix(")").partition("(")
    return float(number) if name == "optclip.clip_by_global_norm" else None


def number_or_null(value: Any) -> float | None:
    """As JSON has it: null for what is not finite, a loss that diverged."""
    return float(value) if math.isfinite(value) else None
