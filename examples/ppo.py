"""PPO balances a pole: many seeds, and several thresholds of the clip, in one jitted program.

::

    pip install -e ".[examples]"
    python examples/ppo.py

Read `make_optimizer` first: that is where the clip goes. `make_train` is the whole of PPO as a
function of a key, in the shape of PureJaxRL: one `jax.vmap` makes an ensemble of seeds of it, and
another a sweep of thresholds. What the clip did comes out of the scan over the updates.
"""

import functools
import inspect
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import clip_options as given
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clip_options import UsageError
from flax import linen
from matplotlib.figure import Figure

import optclip
from optclip._tuning.style import BLUE, DARK, GREEN, ORANGE, PURPLE
from optclip._tuning.wording import number, percent

EXAMPLES = """\
examples:
  python examples/ppo.py                                    8 seeds, clipped to 0.5
  python examples/ppo.py --picture ppo.png --json ppo.json  return, norm and clip rate
  python examples/ppo.py --sweep                            each seed with max_norm 0.05, 0.5 and 5
  python examples/ppo.py --sweep 1 10 --seeds 4             ... with others
  python examples/ppo.py --clip safeguard                   no threshold to choose
  python examples/ppo.py --clip clip_by_group_norm \\
      --clip-arg "labels={'actor': 'actor', 'critic': 'critic'}"
  python examples/ppo.py --compare-cost                     time it against Optax's clip
"""
MAX_NORM, SWEEP, ROUNDS = 0.5, [0.05, 0.5, 5.0], 5
FONT = 13  # of the picture, in points at 6 inches: it can be read on a phone


@dataclass(frozen=True)
class Config:
    """What to train: an update is `envs * steps` pushes, then `epochs * minibatches` Adam steps."""

    clip: str = "clip_by_global_norm"
    clip_args: dict[str, Any] = field(default_factory=lambda: {"max_norm": MAX_NORM})
    lr: float = 2.5e-3
    updates: int = 80
    envs: int = 16
    steps: int = 128
    epochs: int = 4
    minibatches: int = 4
    width: int = 64
    discount: float = 0.99
    trace: float = 0.95  # the lambda of generalized advantage estimation
    ratio_range: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The clip and Adam: by default `optclip.clip_by_global_norm(0.5)`, as PPO has it."""
    adam = optax.adam(config.lr, eps=1e-5)
    if config.clip == "optax":
        return optax.chain(optax.clip_by_global_norm(**config.clip_args), adam)
    return given.with_clip(adam, config.clip, config.clip_args)


# The pole on a cart ------------------------------------------------------------------------------


class Pole(NamedTuple):
    """A pole on a cart."""

    motion: jax.Array  # position and speed of the cart, angle and turning of the pole
    length: jax.Array  # of this episode, in pushes; each is worth 1
    returned: jax.Array  # the return of the last episode that ended


def upright(key: jax.Array, returned: Any = 0.0) -> Pole:
    """The beginning of an episode."""
    motion = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return Pole(motion, jnp.float32(0), jnp.float32(returned))


def push(key: jax.Array, pole: Pole, action: jax.Array) -> tuple[Pole, jax.Array]:
    """0.02 s after a push to the left or right; a fresh pole where it fell or 500 pushes passed."""
    _, speed, angle, turning = pole.motion
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    pushed = (20.0 * action - 10 + 0.05 * turning**2 * sin) / 1.1
    bend = (9.8 * sin - cos * pushed) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    rates = jnp.stack([speed, pushed - 0.05 * bend * cos / 1.1, turning, bend])
    after = Pole(pole.motion + 0.02 * rates, pole.length + 1, pole.returned)
    fell = (jnp.abs(after.motion[0]) > 2.4) | (jnp.abs(after.motion[2]) > math.radians(12))
    done = fell | (after.length >= 500)
    fresh = upright(key, after.length)
    return jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, after), done


# PPO ---------------------------------------------------------------------------------------------


class Tower(linen.Module):
    """A small network."""

    width: int
    outputs: int
    scale: float

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The outputs for observations."""
        # PPO mostly begins with orthogonal weights, but under `vmap` their QR factorizations can
        # wait for each other for ever, on a CPU with jaxlib 0.10.
        for _ in range(2):
            x = jnp.tanh(linen.Dense(self.width)(x))
        init = linen.initializers.variance_scaling(self.scale, "fan_in", "truncated_normal")
        return linen.Dense(self.outputs, kernel_init=init)(x)


class ActorCritic(linen.Module):
    """Two towers."""

    width: int

    @linen.compact
    def __call__(self, motion: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logarithms of the probabilities of both pushes, and the value."""
        logits = Tower(self.width, 2, 1e-4, name="actor")(motion)
        value = Tower(self.width, 1, 1.0, name="critic")(motion)
        return jax.nn.log_softmax(logits), value[..., 0]


def make_train(config: Config) -> Callable[[jax.Array], dict[str, Any]]:
    """The whole training as a function of a key, for `jax.jit` and `jax.vmap`.

    It gives the "params" and "opt_state" at the end, and the "history": return, and the readings
    of the clip, after each update.
    """
    network, optimizer = ActorCritic(config.width), make_optimizer(config)

    def policy(params: Any, motion: jax.Array) -> Any:
        return network.apply({"params": params}, motion)

    def chosen(log_probs: jax.Array, action: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_probs, action[..., None], -1)[..., 0]

    def act(params: Any, carry: Any, _: None) -> Any:
        poles, key = carry
        key, action_key, push_key = jax.random.split(key, 3)
        log_probs, value = policy(params, poles.motion)
        action = jax.random.categorical(action_key, log_probs)
        after, done = jax.vmap(push)(jax.random.split(push_key, config.envs), poles, action)
        seen = {"motion": poles.motion, "action": action, "value": value, "done": done}
        return (after, key), seen | {"log_prob": chosen(log_probs, action)}

    def look_back(carry: Any, seen: Any) -> Any:
        advantage, next_value = carry
        goes_on = config.discount * (1 - seen["done"])
        surprise = 1 + goes_on * next_value - seen["value"]
        advantage = surprise + config.trace * goes_on * advantage
        return (advantage, seen["value"]), advantage

    def loss_of(params: Any, seen: Any) -> jax.Array:
        log_probs, value = policy(params, seen["motion"])
        advantage = seen["advantage"] - seen["advantage"].mean()
        advantage /= seen["advantage"].std() + 1e-8
        ratio = jnp.exp(chosen(log_probs, seen["action"]) - seen["log_prob"])
        limited = jnp.clip(ratio, 1 - config.ratio_range, 1 + config.ratio_range)
        gain = jnp.minimum(ratio * advantage, limited * advantage).mean()
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        value_loss = jnp.square(value - seen["target"]).mean() / 2
        return -gain + config.value_weight * value_loss - config.entropy_weight * entropy

    def learn(learner: Any, seen: Any) -> Any:
        params, opt_state = learner
        grads = jax.grad(loss_of)(params, seen)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def update(carry: Any, _: None) -> Any:
        learner, actors = carry
        params, _ = learner
        actors, seen = jax.lax.scan(functools.partial(act, params), actors, length=config.steps)
        poles, key = actors
        value = policy(params, poles.motion)[1]
        start = jnp.zeros_like(value), value
        advantage = jax.lax.scan(look_back, start, seen, reverse=True)[1]
        seen |= {"advantage": advantage, "target": advantage + seen["value"]}
        seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)

        def epoch(learner: Any, key: jax.Array) -> Any:
            order = jax.random.permutation(key, config.envs * config.steps)
            order = order.reshape(config.minibatches, -1)
            return jax.lax.scan(learn, learner, jax.tree.map(lambda x: x[order], seen))

        key, epoch_key = jax.random.split(key)
        learner, _ = jax.lax.scan(epoch, learner, jax.random.split(epoch_key, config.epochs))
        params, opt_state = learner
        readings = {"return": poles.returned.mean(), **optclip.metrics(opt_state, params)}
        return (learner, (poles, key)), readings

    def train(key: jax.Array) -> dict[str, Any]:
        init_key, pole_key, key = jax.random.split(key, 3)
        params = network.init(init_key, jnp.zeros(4))["params"]
        poles = jax.vmap(upright)(jax.random.split(pole_key, config.envs))
        start = (params, optimizer.init(params)), (poles, key)
        (learner, _), history = jax.lax.scan(update, start, length=config.updates)
        return {"params": learner[0], "opt_state": learner[1], "history": history}

    return train


def train_ensemble(config: Config, keys: jax.Array) -> dict[str, Any]:
    """A run for each key; the history has the axes (seeds, updates)."""
    return jax.vmap(make_train(config))(keys)


def train_sweep(config: Config, keys: jax.Array, max_norms: jax.Array) -> dict[str, Any]:
    """A run for each threshold and key: the threshold is a traced value, as the key is."""

    def train_with(max_norm: jax.Array) -> dict[str, Any]:
        args = config.clip_args | {"max_norm": max_norm}
        return train_ensemble(replace(config, clip_args=args), keys)

    return jax.vmap(train_with)(max_norms)


# What came of it ---------------------------------------------------------------------------------


def clipping(config: Config, history: dict[str, Any]) -> dict[str, Any]:
    """Norm, threshold, and the share of steps clipped or skipped; empty without readings."""
    if "skip/norm" in history and "clip/norm" not in history:
        steps = config.epochs * config.minibatches * np.arange(1, config.updates + 1)
        history = history | {"skip/clip_rate": history["skip/skipped_steps"] / steps}
    kind = "clip" if "clip/norm" in history else "skip"
    wanted = {name: f"{kind}/{name}" for name in ("norm", "threshold", "clip_rate")}
    return {name: history[key] for name, key in wanted.items() if key in history}


def verdict(config: Config, history: dict[str, Any]) -> tuple[str, str]:
    """What share of the steps was clipped, and what that means."""
    found = clipping(config, history)
    if not found:
        return "the share of steps clipped is not known", "nothing here measures it"
    share = float(np.median(found["clip_rate"][:, -1]))
    norms = "usual norm {}, threshold {}".format(
        *(number(float(np.median(found[name]))) for name in ("norm", "threshold"))
    )
    means = "nearly all gradients left equally long, so that long and short ones weigh the same"
    if share <= 0.9:
        means = "ordinary gradients were cut too, beside those that stand out"
    if share <= 0.1:
        means = "only what stands out was cut" if share else "no norm was above the threshold"
    return f"{percent(share)} of the steps clipped ({norms})", means


def draw(path: Path, config: Config, runs: dict[str, Any], title: str, subtitle: str) -> None:
    """Return, norm against threshold, and share clipped: median and range over the seeds."""
    names = ["return", "norm", "clip_rate"]
    if not all(clipping(config, history) for history in runs.values()):
        del names[1:]
    figure = Figure(figsize=(6, 1 + 2.1 * len(names)), layout="constrained", facecolor="white")
    sizes = {"sharex": True, "squeeze": False, "height_ratios": (3, 3, 2)[: len(names)]}
    panels = figure.subplots(len(names), **sizes)[:, 0]
    panels[0].set(ylabel="return", ylim=(0, 510))
    updates = np.arange(1, config.updates + 1)
    for place, (label, history) in enumerate(runs.items()):
        color = (BLUE, ORANGE, GREEN, PURPLE)[place % 4]
        lines = clipping(config, history) | {"return": history["return"]}
        for name, panel in zip(names, panels, strict=True):
            panel.plot(updates, np.median(lines[name], 0), color=color, label=label)
            low, high = lines[name].min(0), lines[name].max(0)
            panel.fill_between(updates, low, high, color=color, alpha=0.2, linewidth=0)
        if len(names) > 1:
            threshold = np.median(lines["threshold"], 0)
            threshold[np.isinf(threshold)] = np.nan
            panels[1].plot(updates, threshold, "--", color=color if len(runs) > 1 else ORANGE)
            panels[1].set(ylabel="norm\n(--: threshold)", yscale="log")
            panels[2].set(ylabel="clipped", ylim=(-0.03, 1.03))
    if len(runs) > 1:
        panels[0].legend(frameon=False, loc="lower right")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=FONT)
        panel.yaxis.label.set_size(FONT)
    steps = config.epochs * config.minibatches
    panels[-1].set_xlabel(f"update ({steps} steps of Adam each)", fontsize=FONT)
    panels[0].set_title(textwrap.fill(subtitle, 52), fontsize=FONT, color=DARK, loc="left")
    figure.suptitle(textwrap.fill(title, 48), fontsize=FONT + 2, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def report(config: Config, runs: dict[str, Any]) -> str:
    """Prints what the runs came to, and last what the clip did; a heading for their picture."""
    headings = []
    for label, history in runs.items():
        first, last = np.median(history["return"], 0)[[0, -1]]
        low, high = history["return"][:, -1].min(), history["return"][:, -1].max()
        print(f"{label}: return {first:.0f} at first, {last:.0f} at last ({low:.0f} to {high:.0f})")
        share = verdict(config, history)[0].partition(" (")[0]
        headings.append(f"{share}, return {last:.0f} at last")
    for label, history in runs.items():
        print(f"{label}: {': '.join(verdict(config, history))}.")
    return "; ".join(headings)


def compare_cost(config: Config, keys: jax.Array) -> dict[str, Any]:
    """Times the whole training with this clip and with Optax's, in turns, after a warm-up."""
    optax_config = replace(config, clip="optax", clip_args={"max_norm": MAX_NORM})
    programs, seconds = {}, {"optax": [], "optclip": []}
    for name, own in (("optax", optax_config), ("optclip", config)):
        programs[name] = jax.jit(functools.partial(train_ensemble, own))
        jax.block_until_ready(programs[name](keys))
    for name in [*seconds] * ROUNDS:
        began = time.perf_counter()
        jax.block_until_ready(programs[name](keys))
        seconds[name].append(time.perf_counter() - began)
    ratio = float(np.median(np.divide(seconds["optclip"], seconds["optax"])))
    ours, theirs = (float(np.median(seconds[name])) for name in ("optclip", "optax"))
    print(f"{ours:.2f} s, with optax.clip_by_global_norm {theirs:.2f} s: {ratio:.3f} times as long")
    return {"ratio": ratio, "seconds": seconds}


# The command line --------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None) -> tuple[Any, Config]:
    """Reads the command line: the options, and what they ask for."""
    parser = given.Parser("ppo.py", "PPO balances a pole, with clipped gradients.", EXAMPLES)
    add, base = parser.add_argument, Config()
    help_ = "a method of optclip, optax (its clip_by_global_norm), or none (default: %(default)s)"
    add("--clip", default=base.clip, metavar="NAME", help=help_)
    help_ = "an argument of the clip; repeat it for more (default: max_norm=0.5 where it has that)"
    add("--clip-arg", action="append", default=[], metavar="NAME=VALUE", help=help_)
    help_ = "train every seed with every max_norm of these, in one program (default: 0.05 0.5 5)"
    add("--sweep", nargs="*", type=given.positive_number, metavar="MAX_NORM", help=help_)
    add("--lr", type=given.positive_number, default=base.lr, help="default: %(default)s")
    add("--updates", type=given.at_least_one, default=base.updates, help="default: %(default)s")
    add("--seeds", type=given.at_least_one, default=8, help="how many (default: %(default)s)")
    add("--seed", type=given.seed, default=0, help="the first of them (default: %(default)s)")
    add("--compare-cost", action="store_true", help="only time the training against Optax's clip")
    add("--json", type=Path, metavar="FILE", help="write what came of it, with the history")
    add("--picture", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")
    options = parser.parse_args(arguments)
    name = "clip_by_global_norm" if options.clip == "optax" else options.clip
    method = given.clip_methods().get(name)
    has_max_norm = method is not None and "max_norm" in inspect.signature(method).parameters
    args = given.clip_args(name, [f"max_norm={MAX_NORM}"] * has_max_norm + options.clip_arg)
    if options.sweep is not None and not has_max_norm:
        raise UsageError(f"--sweep: {name} has no max_norm; take clip_by_global_norm")
    if options.sweep is not None and any(x.startswith("max_norm") for x in options.clip_arg):
        raise UsageError("--sweep sets max_norm: leave out --clip-arg max_norm=...")
    if options.compare_cost and (options.sweep is not None or options.picture):
        raise UsageError("--compare-cost only times: leave out --sweep and --picture")
    if options.picture and options.picture.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--picture {options.picture}: give it the ending .png, .pdf or .svg")
    changes = {"clip_args": args, "lr": options.lr, "updates": options.updates}
    config = replace(base, clip=options.clip, **changes)
    with given.explained(options.clip):  # by trying it out on the shapes of the parameters
        tx, network = make_optimizer(config), ActorCritic(config.width)
        params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(4))["params"]
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)
    for path in filter(None, (options.json, options.picture)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; name another file") from None
    return options, config


def run(options: Any, config: Config) -> int:
    """Trains and reports; the answer is the exit code."""
    seeds = np.uint32(options.seed) + np.arange(options.seeds, dtype=np.uint32)
    keys = jax.vmap(jax.random.key)(seeds)
    setup = f"{config.clip}({given.shown_args(config.clip_args)}), Adam at {config.lr:g}"
    setup = f"PPO, {len(keys)} seeds, {setup}"
    told = {"setup": setup, "seeds": seeds.tolist()}
    print(f"{setup}, {config.updates} updates", flush=True)
    if options.compare_cost:
        told |= compare_cost(config, keys)
    else:
        max_norms = [] if options.sweep is None else options.sweep or SWEEP
        inputs = (keys, jnp.float32(max_norms)) if max_norms else (keys,)
        train = functools.partial(train_sweep if max_norms else train_ensemble, config)
        began = time.perf_counter()
        program = jax.jit(train).lower(*inputs).compile()
        compiled = time.perf_counter()
        history = jax.device_get(jax.block_until_ready(program(*inputs))["history"])
        told["seconds"] = {"compile": compiled - began, "train": time.perf_counter() - compiled}
        print("compiled in {compile:.1f} s, trained in {train:.1f} s".format(**told["seconds"]))
        runs = {f"{len(keys)} seeds": history}
        if max_norms:
            each = [jax.tree.map(lambda x, i=i: x[i], history) for i in range(len(max_norms))]
            runs = {f"max_norm {x:g}": one for x, one in zip(max_norms, each, strict=True)}
        heading = report(config, runs)
        if options.picture:
            draw(options.picture, config, runs, heading, f"{setup}; median and range")
        told |= {"runs": jax.tree.map(json_ready, runs)}
    if options.json:
        options.json.write_text(json.dumps(told) + "\n")
    return 0


def json_ready(values: np.ndarray) -> Any:
    """An array as nested lists, with null where a number is not finite."""
    finite = np.where(np.isfinite(values), values, np.nan)
    return [json_ready(x) if np.ndim(x) else None if np.isnan(x) else x.item() for x in finite]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the answer is the exit code."""
    return given.exit_code("ppo.py", lambda: run(*parse_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
