"""Ideas of papers that were tried on the proving ground, and what was compared with them.

AGGC, a band that raises small gradients as well, U-Clip, and resets of Adam's moments: each as a
plain Optax transformation made of the library's own rules. `python -m
benchmarks.proving_ground.tried` runs them; `contenders` has them for a task in the form of
candidates.py.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optclip
from benchmarks.proving_ground import jobs, scores
from benchmarks.proving_ground.contenders import FINE, OF_ENTRIES, Contender, around, before
from benchmarks.proving_ground.task import Task
from benchmarks.proving_ground.tasks import TASKS
from optclip import scopes, thresholds
from optclip.scopes import Scope
from optclip.thresholds import Rule

# Norms that are raised ---------------------------------------------------------------------------


def held(rule: Rule, most: float, scope: Scope = scopes.tree) -> optax.GradientTransformation:
    """Holds each norm to what `rule` says, which may be up to `most` times the norm.

    Multiplied by `most` first, a norm that is to be raised is one that is to be clipped.

    Args:
        rule: Its threshold is not the largest norm allowed, but the norm to bring about.
        most: By how much a norm may be multiplied; a power of two, so that nothing is rounded.
        scope: Which entries share a norm.
    """

    def threshold(memory, step, norms, params):
        return rule.threshold(memory, step, norms / most, params)

    def observe(memory, step, norms, held_norms):
        return rule.observe(memory, step, norms / most, held_norms)

    scaled = Rule(rule.init, threshold, observe, has_memory=rule.has_memory)
    return optax.chain(optax.scale(most), optclip.clip_by(scaled, scope=scope))


# AGGC --------------------------------------------------------------------------------------------


class Band(NamedTuple):
    """The values that AGGC was run with.

    Attributes:
        decay: Share of the average that a step keeps.
        low: What a norm is raised to, over the average: early and late in the run.
        high: What a norm is reduced to, likewise.
        raises: Whether norms are raised at all.
        turn: The share of the run from which low and high move from early to late.
        over: In what share of the run they do.
        min_norm: The smallest norm that one is raised to.
    """

    decay: float
    low: tuple[float, float]
    high: tuple[float, float]
    raises: bool
    turn: float
    over: float
    min_norm: float = 0.0


LORA = Band(0.95, (0.95, 0.98), (0.6, 0.7), False, 0.4, 0.3, 0.01)
"""The released script for LoRA; `low` is without effect there."""
GRPO = Band(0.99, (0.98, 0.98), (0.7, 0.999), True, 0.6, 0.2)
"""The released script for GRPO."""
WIDE = Band(0.95, (0.5, 0.5), (2.0, 2.0), True, 0.0, 1.0)
"""Not theirs: a band whose lower end is below its upper one."""


def group_band(band: Band, steps: int) -> Rule:
    """AGGC as the paper writes it: a norm within a band about its average, itself included.

    The average is without bias, so that it begins with the first norm.

    Args:
        band: Its values.
        steps: The length of the run.
    """

    def init(norms):
        return jnp.zeros((2, *norms.shape), norms.dtype)

    def averaged(memory, norms):
        return band.decay * memory + (1 - band.decay) * jnp.stack([norms, jnp.ones_like(norms)])

    def threshold(memory, step, norms, params):
        total, weight = averaged(memory, norms)
        low, high = _ends(band, step.count / steps)
        return _within(band, norms, low * total / weight, high * total / weight)

    return Rule(
        init,
        threshold,
        lambda memory, step, norms, held_norms: averaged(memory, norms),
        has_memory=True,
    )


def group_band_as_released(band: Band, steps: int, down: float = 0.9, up: float = 1.1) -> Rule:
    """AGGC as the released code has it.

    The average is of the norms as they left, begins at zero, and does without the present one; and
    no step multiplies a norm by less than `down` or more than `up`.
    """

    def threshold(memory, step, norms, params):
        low, high = _ends(band, step.count / steps)
        target = _within(band, norms, low * memory, high * memory)
        return jnp.where(memory > 0, jnp.clip(target, down * norms, up * norms), norms)

    def observe(memory, step, norms, held_norms):
        return band.decay * memory + (1 - band.decay) * held_norms

    return Rule(jnp.zeros_like, threshold, observe, has_memory=True)


def _ends(band: Band, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    late = jnp.clip((share - band.turn) / band.over, 0, 1)
    low, high = ((1 - late) * ends[0] + late * ends[1] for ends in (band.low, band.high))
    return low, high


def _within(band: Band, norms: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """What the norms are brought to; of a band that is upside down the upper end comes first."""
    raised = jnp.maximum(norms, jnp.maximum(low, band.min_norm)) if band.raises else norms
    return jnp.where(norms > high, high, raised)


def module_type(path: str) -> str:
    """A group of AGGC: all parameters of one kind, in whichever block they are."""
    names = [name for name in path.split("/") if not name.isdigit()]
    return "/".join(name for name in names if name not in ("blocks", "bias", "kernel")) or path


def aggc(rule: Rule, most: float = 128.0) -> optax.GradientTransformation:
    """A rule of this section, with a norm for each type of module."""
    return held(rule, most, scopes.group(module_type))


# A plain band ------------------------------------------------------------------------------------


def plain_band(share: float, deviations: float = 2.0, most: float = 2.0) -> Rule:
    """The whole norm between a share of the usual one and `robust_clip`'s threshold.

    Args:
        share: The smallest norm that is left alone, over the usual one.
        deviations: Of `robust_clip`.
        most: By how much a norm may be raised.
    """
    level = thresholds.robust(0.0, 0.97)
    upper = thresholds.robust(deviations, 0.97)

    def threshold(memory, step, norms, params):
        usual = level.threshold(memory, step, norms, params)
        low = jnp.where(jnp.isfinite(usual), share * usual, 0)  # nothing is usual at first
        raised = jnp.maximum(norms, jnp.minimum(low, most * norms))
        return jnp.minimum(raised, upper.threshold(memory, step, norms, params))

    return Rule(upper.init, threshold, upper.observe, has_memory=True)


# U-Clip ------------------------------------------------------------------------------------------


class Carried(NamedTuple):
    """What `u_clip` remembers.

    Attributes:
        carry: What was clipped off so far and not handed on since; like the parameters.
        clip_state: Of the clip.
    """

    carry: Any
    clip_state: Any


def u_clip(clip: optax.GradientTransformation) -> optax.GradientTransformation:
    """Hands on what `clip` takes off at later steps, so that no gradient is lost."""

    def init(params: optax.Params) -> Carried:
        return Carried(jax.tree.map(jnp.zeros_like, params), clip.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Carried]:
        owed = jax.tree.map(jnp.add, updates, state.carry)
        handed_on, clip_state = clip.update(owed, state.clip_state, params)
        return handed_on, Carried(jax.tree.map(jnp.subtract, owed, handed_on), clip_state)

    return optax.GradientTransformation(init, update)


def robust_u_clip() -> optax.GradientTransformation:
    """The same by the threshold of `robust_clip`, which learns from gradients without the carry."""
    robust: Any = optclip.robust_clip()

    def init(params: optax.Params) -> Carried:
        return Carried(jax.tree.map(jnp.zeros_like, params), robust.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Carried]:
        _, clip_state = robust.update(updates, state.clip_state, params)
        owed = jax.tree.map(jnp.add, updates, state.carry)
        clip = optclip.clip_by_global_norm(clip_state.threshold)
        handed_on, _ = clip.update(owed, clip.init(owed), params)
        return handed_on, Carried(jax.tree.map(jnp.subtract, owed, handed_on), clip_state)

    return optax.GradientTransformation(init, update)


# Resets ------------------------------------------------------------------------------------------


class Reset(NamedTuple):
    """What `reset_moments` remembers.

    Attributes:
        count: Updates so far.
        inner_state: Of the optimizer.
    """

    count: jax.Array
    inner_state: Any


def reset_moments(
    inner: optax.GradientTransformation, every: int, warmup: int = 0, *, count_too: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Adam's moments are set to zero now and then, and its steps are short after that.

    Args:
        inner: The optimizer.
        every: After how many steps.
        warmup: For how many steps after a reset the update rises from nothing, as a cosine.
        count_too: Whether Adam's count begins anew as well, so that its moments are without bias
            again; Stable-SPAM does so, SPAM does not.
    """
    held_optimizer = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> Reset:
        return Reset(jnp.zeros([], jnp.int32), held_optimizer.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Reset]:
        count, inner_state = state
        anew = (count > 0) & (count % every == 0)

        def emptied(node: Any) -> Any:
            if not isinstance(node, optax.ScaleByAdamState):
                return node
            mu, nu, steps = jax.tree.map(
                lambda x: jnp.where(anew, jnp.zeros_like(x), x), (node.mu, node.nu, node.count)
            )
            return node._replace(mu=mu, nu=nu, count=steps if count_too else node.count)

        inner_state = jax.tree.map(
            emptied, inner_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
        )
        updates, inner_state = held_optimizer.update(updates, inner_state, params, **extra_args)
        if warmup:
            part = jnp.minimum((count % every) / warmup, 1.0)
            rise = jnp.where(count < every, 1.0, 0.5 - 0.5 * jnp.cos(jnp.pi * part))
            updates = jax.tree.map(lambda u: u * rise.astype(u.dtype), updates)
        return updates, Reset(count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def spam(every: int, warmup: int = 0, *, count_too: bool = False) -> Callable[[Any], Any]:
    """The optimizer with resets, after SPAM's clip."""

    def wrapped(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        resetting = reset_moments(optimizer, every, warmup, count_too=count_too)
        return optax.chain(optclip.spam_clip(), resetting)

    return wrapped


# What is run -------------------------------------------------------------------------------------


def contenders(task: Task) -> tuple[Contender, ...]:
    """All of them for a task, whose length the bands of AGGC and the resets have to know."""
    steps = task.steps
    third = steps // 3  # 100 of 300 steps
    found = [
        before("aggc, LoRA", lambda _: aggc(group_band(LORA, steps))),
        before("aggc, GRPO", lambda _: aggc(group_band(GRPO, steps))),
        before("aggc, 0.5 to 2", lambda _: aggc(group_band(WIDE, steps))),
        before("aggc released, LoRA", lambda _: aggc(group_band_as_released(LORA, steps), 2.0)),
        before("aggc released, GRPO", lambda _: aggc(group_band_as_released(GRPO, steps), 2.0)),
        before("band(1/3, x2)", lambda _: held(plain_band(1 / 3), 2.0)),
        before("band(1, x8)", lambda _: held(plain_band(1.0, most=8.0), 8.0)),
        before("u_clip robust", lambda _: robust_u_clip()),
        before(
            "u_clip norm", lambda c: u_clip(optclip.clip_by_global_norm(c)), *FINE, of_norm=True
        ),
        before(
            "u_clip value", lambda c: u_clip(optclip.clip_by_value(c)), *OF_ENTRIES, of_norm=True
        ),
    ]
    if task.family == "AdamW":
        found += [
            around("spam", spam(third, 3 * third // 10)),
            around("spam, often", spam(third // 3, third // 10)),
            around("stable spam resets", spam(third, count_too=True)),
            around("stable spam resets, often", spam(third // 3, count_too=True)),
        ]
    return tuple(found)


def main() -> int:
    """Runs what is asked for and prints a line for each score; what was run before is only read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="one task")
    parser.add_argument("--setting", action="append", help="only these settings; several times")
    parser.add_argument("--method", action="append", help="only these methods; several times")
    parser.add_argument(
        "--places", type=int, nargs=2, metavar=("FIRST", "END"), help="only these thresholds"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tried"))
    options = parser.parse_args()
    task = TASKS[options.task]
    if options.setting:
        task = task._replace(settings=tuple(x for x in task.settings if x.name in options.setting))
    for contender in contenders(task):
        if contender.name in (options.method or [contender.name]):
            if options.places and contender.chooses:
                some = contender.thresholds[slice(*options.places)]
                contender = contender._replace(thresholds=some)
            began = time.perf_counter()
            job = jobs.Job(task, contender, jobs.FULL, options.out)
            result = jobs.read(job) or jobs.run(job)
            _show(job, result["settings"], time.perf_counter() - began)
    return 0


def _show(job: jobs.Job, settings: dict[str, Any], seconds: float) -> None:
    for setting in job.settings:
        runs = settings[setting.name]
        score = scores.score(runs, settings.get(setting.base))
        tried = f"threshold {score.threshold:g}, " if job.contender.chooses else ""
        print(
            f"{job.task.name}: {setting.name} | {job.contender.name} | {score.loss:.4g} +- "
            f"{score.spread:.2g} | {tried}rate {score.rate:.4g} | good {score.rates_range:.3g} | "
            f"diverged {score.diverged:.0%} | {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
