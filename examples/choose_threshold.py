"""Choose a clipping threshold for the digits network: measure, suggest, replay, sweep.

::

    pip install -e ".[examples]"
    python examples/choose_threshold.py

One run measures the norms of the gradient without clipping. From its log comes a suggestion with a
reason (`suggest_threshold`), and what every rule that learns its threshold would have done
(`replay`). Then the network is trained with thresholds over four decades (`sweep`), the suggested
one among them, to see what the suggestion was worth; the last line says which line of code to use.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import digits_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clip_options import Parser, add_learning_rate, at_least_one, exit_code
from mnist import LinenNetwork, cross_entropy
from rich.console import Console
from run_folder import (
    RESULT,
    add_folder_options,
    check_free,
    clear,
    json_ready,
    keep_result,
    words_aside,
)

import optclip
from optclip import tuning
from optclip._tuning.wording import percent

EXAMPLES = """\
examples:
  python examples/choose_threshold.py                   about a minute on two CPU cores
  python examples/choose_threshold.py --lr 0.5          at a learning rate that is too large
  python examples/choose_threshold.py --quick           fewer steps, seeds and thresholds
"""
LEARNING_RATES = {"momentum": 0.05, "sgd": 0.1, "adam": 0.001}
BATCH_SIZE = 32
MOST = 0.5  # of the steps: a clip of more is no clip against spikes
WITHIN = 1.05  # of the lowest loss: as good
LOG, OTHERS = "measured.jsonl", ("measured.png", "replay.png", "sweep.png", RESULT)


def build_optimizer(options: argparse.Namespace, clip: Any) -> optax.GradientTransformation:
    """The clip, or what only measures, in front of the optimizer; or a wrapper around it."""
    optimizers = {"momentum": functools.partial(optax.sgd, momentum=0.9), "sgd": optax.sgd}
    optimizer = (optimizers | {"adam": optax.adam})[options.optimizer]
    if clip is optclip.safeguard:
        return clip(optimizer(options.lr))
    return optax.chain(clip, optimizer(options.lr))


def start(seed: Any, optimizer: optax.GradientTransformation) -> Any:
    """Fresh parameters and a fresh optimizer state."""
    params = LinenNetwork().init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
    return params, optimizer.init(params)


def loss_of(params: Any, batch: Any) -> jax.Array:
    """The mean loss of some images, in nats."""
    images, labels = batch
    logits: Any = LinenNetwork().apply({"params": params}, images)
    return cross_entropy(logits, labels)


def take_step(state: Any, batch: Any, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """One step; the state, and loss and readings."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    readings = {"loss": loss, **optclip.metrics(opt_state, params)}
    return (optax.apply_updates(params, updates), opt_state), readings


class Batches:
    """The training images in an order of their own for each seed."""

    def __init__(self, split: digits_data.Split):
        self.split = split

    def __call__(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step."""
        per_epoch = len(self.split.labels) // BATCH_SIZE
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(self.split.labels))
        chosen = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        return self.split.images[chosen], self.split.labels[chosen]


def measure(options: argparse.Namespace, batches: Batches, log: Path) -> Any:
    """Trains without clipping, with a line in the log for every step; the optimizer's state."""
    optimizer = build_optimizer(options, optclip.measure_norms(histogram=True, detail=True))
    step = jax.jit(functools.partial(take_step, optimizer=optimizer))
    state, waiting = start(0, optimizer), []
    for number in range(options.steps):
        state, readings = step(state, batches(0, number))
        waiting.append(readings)
    with log.open("w") as file:
        for number, readings in enumerate(jax.device_get(waiting), 1):
            row = {name: value.item() for name, value in readings.items()}
            print(json.dumps({"step": number, **row}), file=file)
    return state[1]


def sweep(
    options: argparse.Namespace, data: digits_data.Dataset, clip: Any, thresholds: list[float]
) -> tuning.Sweep:
    """Trains with `clip(threshold)` for every threshold and seed; their loss is the test loss."""
    optimizer = functools.partial(build_optimizer, options)
    return tuning.sweep(
        lambda state, threshold, batch: take_step(state, batch, optimizer(clip(threshold))),
        thresholds,
        options.seeds,
        init=lambda seed, threshold: start(seed, optimizer(clip(threshold))),
        batches=Batches(data.train),
        steps=options.steps,
        evaluate=lambda state: loss_of(state[0], data.test),
        vectorize=False,  # On a CPU convolutions in a `vmap` are slower than one by one.
    )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser("choose_threshold.py", "Chooses a threshold for the digits network.", EXAMPLES)
    add = parser.add_argument
    add("--optimizer", choices=list(LEARNING_RATES), default="momentum", help="(default: momentum)")
    add_learning_rate(parser, LEARNING_RATES)
    add("--steps", type=at_least_one, default=188, help="of each run (default: 188, four epochs)")
    add("--thresholds", type=at_least_one, default=9, help="over four decades (default: 9)")
    add("--seeds", type=at_least_one, default=3, help="runs of each threshold (default: 3)")
    add("--quick", action="store_true", help="60 steps, 5 thresholds, 1 seed")
    add("--out", type=Path, default=Path("runs/threshold"), help="folder of log and pictures")
    add_folder_options(parser, resumable=False)
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.thresholds, options.seeds = 60, 5, 1
    options.lr = options.lr or LEARNING_RATES[options.optimizer]
    return options


def answer(method: str, losses: np.ndarray, found: tuning.Sweep) -> dict[str, Any]:
    """What came out of it all.

    Args:
        method: What the log of the measured run suggests.
        losses: The test loss with that, of each seed.
        found: The sweep.

    Returns:
        JSON-ready: whether the suggestion holds in the sweep, the line of code to use, and the
        answer in a sentence.
    """
    loss, lowest = np.median(losses), found.medians.min()
    if not np.isfinite(min(loss, lowest)):
        return _told(False, None, "Lower the learning rate: every run diverged")
    if not np.isfinite(lowest):
        why = f"its test loss is {loss:.3g}, where every fixed threshold diverged"
        return _told(True, method, f"Use {method}, as the log suggests: {why}")
    place = list(found.thresholds).index(found.best)
    free = np.isinf(found.best)
    best = "no clip" if free else f"optclip.clip_by_global_norm({found.best:.3g})"
    if loss <= WITHIN * lowest or losses.min() <= found.losses[place].max():
        how = "no higher than" if loss <= lowest else "within the noise of"
        why = (
            f"its test loss, {loss:.3g}, is {how} the lowest of the sweep, {lowest:.3g} with {best}"
        )
        return _told(True, method, f"Use {method}, as the log suggests: {why}")
    rate = np.nanmean(found.clip_rates[place])
    why = "every clip made the loss higher" if free else f"it shortens {percent(rate)} of the steps"
    if rate > MOST:
        why += ", so it works as a smaller learning rate; try one"
    shown = f"{loss:.3g}" if np.isfinite(loss) else "not finite"
    than = f"test loss {lowest:.3g}, where that of {method}, which the log suggests, is {shown}"
    return _told(False, best, f"Use {best} ({than}): {why}")


def _told(holds: bool, use: str | None, sentence: str) -> dict[str, Any]:
    return {"holds": holds, "use": use, "answer": f"{sentence}."}


def run(options: argparse.Namespace) -> int:
    """The whole path, with a table or a sentence for each step, and one answer at the end."""
    with words_aside(options.json) as stdout:
        replaced = check_free(options.out, LOG, OTHERS, options.overwrite, "")
        data = digits_data.load("digits")
        clear(options.out, LOG, OTHERS)
        if replaced:
            print(f"The earlier run in {options.out} is replaced.")
        result = choose(options, data, Console())
        print(f"log, pictures and result: {options.out}")
        print(result["answer"])
        keep_result(options.out, result, stdout if options.json else None)
    return 0


def choose(
    options: argparse.Namespace, data: digits_data.Dataset, console: Console
) -> dict[str, Any]:
    """Measures, suggests, replays and sweeps; the result, JSON-ready."""
    log = options.out / LOG
    setup = f"digits, {options.optimizer}, learning rate {options.lr:g}, {options.steps} steps"

    console.rule("1. Measure: one run without clipping")
    opt_state = measure(options, Batches(data.train), log)
    figure = tuning.plot_run(log, options.out / "measured.png", subtitle=setup)
    console.print(figure.get_suptitle(), highlight=False)

    console.rule("2. Suggest: from the log")
    suggestion = tuning.suggest_threshold(log)
    console.print(str(suggestion), highlight=False)
    from_counts = tuning.suggest_threshold(opt_state)
    if kind(from_counts) != kind(suggestion):
        console.print("\nFrom the histogram in the optimizer's state:", str(from_counts))

    console.rule("3. Replay: what every rule would have done")
    replayed = tuning.replay(log)
    console.print(replayed.table())
    replayed.draw(options.out / "replay.png")

    console.rule("4. Sweep: train with every threshold, and with the suggestion")
    thresholds = [*np.geomspace(0.01, 100, options.thresholds), np.inf]
    if suggestion.threshold is not None:
        thresholds.append(suggestion.threshold)
    found = sweep(options, data, optclip.clip_by_global_norm, thresholds)
    console.print(found.table())
    found.draw(options.out / "sweep.png", subtitle=setup)
    if "safeguard" in suggestion.method:
        losses = sweep(options, data, lambda threshold: optclip.safeguard, [1.0]).losses[0]
    else:  # a fixed threshold, or none where the run was too short to tell
        losses = found.losses[found.thresholds == (suggestion.threshold or np.inf)][0]
    loss = json_ready(np.median(losses))
    told = {"suggested": suggestion.method, "loss": loss}
    told |= answer(suggestion.method, losses, found)
    return told | {"sweep": found.to_dict()}


def kind(suggestion: tuning.Suggestion) -> str:
    """The method that is suggested, without its numbers."""
    return suggestion.method.split("(")[0]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the answer is the exit code."""
    return exit_code("choose_threshold.py", lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
