"""The methods that meet on the proving ground: each a name, a way to build it, and its settings.

A method with a default is run with it. One without is run with a grid, since whoever uses it has to
choose as well: thresholds on the gradient a factor of about 3 apart around the usual norm of the
task, ratios as the papers have them. Clips of the gradient stand before the optimizer, bounds on
the update after it, wrappers around it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip

FINE = tuple(10.0 ** (k / 2) for k in range(-4, 4))
"""Multiples of the task's usual norm."""
COARSE = tuple(10.0**k for k in range(-2, 2))
OF_ENTRIES = tuple(10.0 ** (k / 2) for k in range(-7, 1))
"""The same for single entries, which are smaller than the norm of all."""


class Contender(NamedTuple):
    """A method with the settings that it is tried with.

    Attributes:
        name: As in tables, files and on the command line.
        build: From an optimizer and a threshold to the optimizer with the method.
        thresholds: What is tried; one number that `build` ignores where there is nothing to choose.
        of_norm: Whether the thresholds are multiples of the usual norm of the task.
        instead: For an optimizer that takes the place of the task's: from the multiple of its usual
            learning rate to it; None for a method that goes with the task's own.
        family: The tasks that it is run on, as `Task.family` names them; "" for all.
    """

    name: str
    build: Callable[[optax.GradientTransformation, Any], optax.GradientTransformation]
    thresholds: tuple[float, ...] = (0.0,)
    of_norm: bool = False
    instead: Callable[[Any], optax.GradientTransformation] | None = None
    family: str = ""

    @property
    def chooses(self) -> bool:
        """Whether whoever uses it has to choose a threshold."""
        return len(self.thresholds) > 1


def before(name: str, clip: Callable[[Any], Any], *thresholds: float, **more: Any) -> Contender:
    """A clip of the gradient, from its threshold."""
    build = lambda optimizer, threshold: optax.chain(clip(threshold), optimizer)  # noqa: E731
    return Contender(name, build, thresholds or (0.0,), **more)


def after(name: str, clip: Callable[[Any], Any], *thresholds: float, **more: Any) -> Contender:
    """A bound on the update, from its threshold."""
    build = lambda optimizer, threshold: optax.chain(optimizer, clip(threshold))  # noqa: E731
    return Contender(name, build, thresholds or (0.0,), **more)


def around(name: str, wrap: Callable[[Any], Any], **more: Any) -> Contender:
    """A wrapper, from the optimizer that it holds."""
    return Contender(name, lambda optimizer, _: wrap(optimizer), **more)


def rival(name: str, family: str, optimizer: Callable[[Any], Any]) -> Contender:
    """An optimizer instead of the task's own, from the multiple of its usual learning rate."""
    return Contender(name, lambda own, _: own, instead=optimizer, family=family)


def layer(path: str) -> str:
    """The layer of a parameter, which is a group of `clip_by_group_norm`."""
    return path.rpartition("/")[0] or path


NO_CLIP = "no clip"

CONTENDERS = (
    Contender(NO_CLIP, lambda optimizer, _: optimizer),
    before("clip_by_global_norm", optclip.clip_by_global_norm, *FINE, of_norm=True),
    before("clip_by_leaf_norm", optclip.clip_by_leaf_norm, *FINE, of_norm=True),
    before(
        "clip_by_group_norm",
        lambda threshold: optclip.clip_by_group_norm(threshold, layer),
        *COARSE,
        of_norm=True,
    ),
    before("clip_by_value", optclip.clip_by_value, *OF_ENTRIES, of_norm=True),
    before("smooth_clip", optclip.smooth_clip, *COARSE, of_norm=True),
    before("clip_singular_values", optclip.clip_singular_values, *COARSE, of_norm=True),
    before("normalize_by_norm", optclip.normalize_by_norm, *COARSE, of_norm=True),
    before("adaptive_grad_clip", optclip.adaptive_grad_clip, 0.01, 0.04, 0.16),
    before("autoclip", lambda _: optclip.autoclip()),
    before("clip_by_quantile", lambda _: optclip.clip_by_quantile()),
    before("zclip", lambda _: optclip.zclip()),
    before("adagc", lambda _: optclip.adagc()),
    before("clip_by_window", lambda _: optclip.clip_by_window()),
    before("clip_by_moving_average", lambda _: optclip.clip_by_moving_average()),
    before("spam_clip", lambda _: optclip.spam_clip()),
    before("robust_clip", lambda _: optclip.robust_clip()),
    after("clip_by_block_rms", optclip.clip_by_block_rms, 1e-4, 1e-3, 1e-2, 1e-1),
    after("clippy", lambda _: optclip.clippy()),
    after("clip_by_param_norm", optclip.clip_by_param_norm, 0.003, 0.01, 0.03),
    around("skip_spikes", optclip.skip_spikes),
    around("safeguard", optclip.safeguard),
    around("clip_by_adam_rms", optclip.clip_by_adam_rms, family="AdamW"),
    after("robust_clip after", lambda _: optclip.robust_clip()),
    after("clip_by_window after", lambda _: optclip.clip_by_window()),
    around("mechanize", optax.contrib.mechanize),
    after("reduce_on_plateau", lambda _: optax.contrib.reduce_on_plateau()),
    rival(
        "schedule_free_adamw", "AdamW", lambda rate: optax.contrib.schedule_free_adamw(0.01 * rate)
    ),
    rival("prodigy", "AdamW", lambda rate: optax.contrib.prodigy(rate)),
    rival("momo_adam", "AdamW", lambda rate: optax.contrib.momo_adam(0.01 * rate)),
    rival("lamb", "AdamW", lambda rate: optax.lamb(0.01 * rate)),
    rival("schedule_free_sgd", "momentum", lambda rate: optax.contrib.schedule_free_sgd(rate)),
    rival("momo", "momentum", lambda rate: optax.contrib.momo(rate)),
    rival("dowg", "momentum", lambda rate: optax.contrib.dowg(rate)),
    rival("lars", "momentum", lambda rate: optax.lars(rate)),
)

RIVALS = tuple(x.name for x in CONTENDERS[-12:])
"""Others that promise a run without a choice of the learning rate, or of the clip."""
