"""What is tested: a clip, or a function that makes it, and what can be found out about it."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip.testing._samples import Broken, NotAsked, first_other, normal

Factory = Callable[..., optax.GradientTransformation]

WARM_UPS = (60, 300)
"""Ordinary steps before a clip with a memory is tested: more where it needs them to clip."""

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}
"""Options of XLA's CPU backend that compile several times as fast by optimizing less."""


@functools.cache
def quick_options() -> dict[str, Any]:
    """Those of `QUICK` that this XLA knows; none on another machine than a CPU."""

    def compiles(name: str) -> bool:
        try:
            jax.jit(lambda: jnp.int32(0), compiler_options={name: QUICK[name]})()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in QUICK.items() if compiles(name)}


class Subject:
    """A clip under test.

    Attributes:
        name: What it is called in a report.
        factory: What makes it; None where it is made already.
        parameters: The arguments of the factory.
        threshold: The name of the factory's argument that is the threshold; None has none.
        value: The threshold that it is tested with.
        examples: How many inputs are drawn where inputs are drawn.
    """

    def __init__(
        self,
        clip: optax.GradientTransformation | Factory,
        *,
        threshold: str | None = None,
        name: str | None = None,
        readings: Callable[[Any], Any] | None = None,
        quick: bool = False,
    ):
        """Looks at a clip without running it; the arguments are those of `check_clip`."""
        self.quick, self.examples = quick, 10 if quick else 40
        self._readings = readings
        self._clip: Any = None
        self.factory: Factory | None = None
        self.parameters: Mapping[str, inspect.Parameter] = {}
        if hasattr(clip, "init") and hasattr(clip, "update"):
            self._clip = clip
            self.name = name or "the clip"
            if threshold is not None:
                raise ValueError(
                    f"threshold={threshold!r} names an argument of a function that makes the clip, "
                    "and this is a clip that is made already; pass the function"
                )
        elif callable(clip):
            self.factory = clip
            own = getattr(_innermost(clip), "__name__", "the clip")
            self.name = name or own
            try:
                self.parameters = inspect.signature(clip).parameters
            except (TypeError, ValueError) as error:
                raise TypeError(f"{self.name}: {error}; wrap it in a function") from error
        else:
            raise TypeError(
                "a clip is an optax.GradientTransformation, or a function that makes one; "
                f"got {clip!r}"
            )
        if threshold is not None and threshold not in self.parameters:
            raise ValueError(
                f"{self.name} has no argument {threshold!r}; "
                f"its arguments: {', '.join(self.parameters) or 'none'}"
            )
        required = [name for name, p in self.parameters.items() if _is_required(p)]
        self.threshold = threshold or (required[0] if required else None)
        more = [name for name in required if name != self.threshold]
        if more:
            raise ValueError(
                f"{self.name} needs {', '.join(more)} too; "
                f"give it by functools.partial({self.name.split(':')[-1]}, {more[0]}=...)"
            )
        self.value = 1.0
        if self.threshold is not None:
            default = self.parameters[self.threshold].default
            if _is_number(default) and math.isfinite(default):
                self.value = float(default)

    @property
    def tested_with(self) -> str:
        """The threshold and its number, in words; nothing where there is none."""
        return "" if self.threshold is None else f"{self.threshold}={self.value:g}"

    def try_out(self) -> None:
        """Makes it and takes a step.

        Raises:
            TypeError: If what is made is no clip.
            ValueError: If that raises anything; the line says what was tried, and the way out.
        """
        asked = f"{self.name}({self.tested_with})" if self.factory else self.name
        try:
            made = self.transform
            if not (hasattr(made, "init") and hasattr(made, "update")):
                raise TypeError(f"{asked} makes no optax.GradientTransformation, but {made!r}")
            made.update(self.params, made.init(self.params), self.params)
        except Exception as error:
            if str(error).startswith(asked):
                raise
            way = "threshold= names the argument that is the threshold; " if self.factory else ""
            raise ValueError(
                f"{asked} cannot take a step: {raised(error)}; {way}what else it needs, a function "
                "around it can give"
            ) from error

    # How it is made ------------------------------------------------------------------------------

    def takes(self, argument: str) -> bool:
        """Whether the factory has an argument of that name."""
        return argument in self.parameters

    def build(self, threshold: Any = None, **changes: Any) -> Any:
        """The clip, with another threshold or other arguments."""
        if self.factory is None:
            return self._clip
        if self.threshold is not None:
            changes[self.threshold] = self.value if threshold is None else threshold
        return self.factory(**changes)

    def need_threshold(self) -> str:
        """The name of the threshold.

        Raises:
            NotAsked: If there is none.
        """
        if self.threshold is None:
            known = ", ".join(name for name, p in self.parameters.items() if _is_number(p.default))
            raise NotAsked(
                f"no threshold to set: threshold= says which of {known} it is"
                if known
                else "no threshold to set: give the function that makes the clip"
            )
        return self.threshold

    @functools.cached_property
    def transform(self) -> Any:
        """The clip with the threshold that it is tested with."""
        return self.build()

    def jit(self, function: Any, **options: Any) -> Any:
        """`jax.jit`; compiled with less care where the suite is to be quick."""
        return jax.jit(
            function, compiler_options=quick_options() if self.quick else None, **options
        )

    @functools.cached_property
    def update(self) -> Any:
        """(updates, state, params) -> (updates, state), compiled."""
        return self.jit(lambda *args: self.transform.update(*args))

    @functools.cached_property
    def update_with(self) -> Any:
        """(threshold, updates, state, params) -> (updates, state), compiled once if it may be."""
        traced = self.jit(lambda threshold, *args: self.build(threshold).update(*args))
        gradient = self.loud
        try:
            traced(jnp.float32(self.value), gradient, self.fresh(gradient), gradient)
        except Exception:  # Whatever a factory says of a value that it cannot look at.
            program = functools.cache(lambda threshold: self.jit(self.build(threshold).update))
            return lambda threshold, *args: program(threshold)(*args)
        return lambda threshold, *args: traced(jnp.float32(threshold), *args)

    def fresh(self, params: Any) -> Any:
        """A fresh state."""
        return self.transform.init(params)

    def readings(self, state: Any) -> Any:
        """What a script reads from a state; nothing where nobody said how."""
        return () if self._readings is None else self._readings(state)

    # What it is like -----------------------------------------------------------------------------

    def warm(self, params: Any, scale: float = 0.1) -> Any:
        """The state after ordinary steps where it has a memory; else a fresh one."""
        state = self.fresh(params)
        for seed in range(self.steps_before):
            _, state = self.update(like(params, seed, scale), state, params)
        return state

    @functools.cached_property
    def params(self) -> Any:
        """Ordinary parameters."""
        return normal(seed=1000)

    @property
    def learns(self) -> bool:
        """Whether what it does with a gradient depends on those before."""
        return self.steps_before > 0

    @functools.cached_property
    def steps_before(self) -> int:
        """How many ordinary steps it takes until it does something else than at first; else 0."""
        params = self.params
        state = fresh = self.fresh(params)
        if not jax.tree.leaves(fresh):
            return 0

        def at_spikes(state: Any) -> Any:
            spikes = (normal(seed=1, scale=1.25**power) for power in range(-8, 20))
            return [self.update(spike, state, params)[0] for spike in spikes]

        first = at_spikes(fresh)
        for seed in range(WARM_UPS[-1]):
            _, state = self.update(normal(seed % 16, scale=0.1), state, params)
            if jax.tree.structure(state) != jax.tree.structure(fresh):
                return 0  # It would be compiled anew at every step; other contracts say so.
            if seed + 1 in WARM_UPS and first_other(at_spikes(state), first, rtol=1e-5):
                return seed + 1
        return 0

    @functools.cached_property
    def needs_params(self) -> bool:
        """Whether `update` needs the parameters."""
        state = self.fresh(self.params)
        try:
            jax.eval_shape(lambda g, s: self.transform.update(g, s, None), self.params, state)
        except Exception:  # Which one, the contract of refusals says.
            return True
        return False

    @functools.cached_property
    def started(self) -> Any:
        """A state for ordinary parameters, after ordinary steps where there is a memory."""
        return self.warm(self.params)

    def is_clipped(self, gradient: Any) -> bool:
        """Whether a gradient of the ordinary tree comes back as another one."""
        updates, _ = self.update(gradient, self.started, self.params)
        return first_other(updates, gradient) is not None

    @functools.cached_property
    def scale(self) -> float:
        """The scale of normal entries at which it clips, and a thousandth of which it does not.

        Raises:
            NotAsked: If it clips at none.
        """
        unit = 1.0 if self.learns or not self.value else self.value
        for power in range(-3, 9):
            if self.is_clipped(normal(seed=1, scale=unit * 10.0**power)):
                return unit * 10.0**power
        within = f" within {WARM_UPS[-1]} steps" if jax.tree.leaves(self.started) else ""
        raise NotAsked(f"it clips no gradient of any size{within}")

    @functools.cached_property
    def size(self) -> float:
        """That scale, or 1 where it never clips."""
        try:
            return self.scale
        except NotAsked:
            return 1.0

    @functools.cached_property
    def loud(self) -> Any:
        """A gradient that is clipped, or an ordinary one where none is."""
        return normal(seed=1, scale=self.size)

    @functools.cached_property
    def soft(self) -> Any:
        """A thousandth of it."""
        return jax.tree.map(lambda x: x / 1000, self.loud)

    @functools.cached_property
    def is_hard(self) -> bool:
        """Whether it leaves a small gradient alone."""
        return not self.is_clipped(self.soft)

    @functools.cached_property
    def measured(self) -> "Measured | None":
        """The norm that is the threshold after clipping, if it is one of the usual."""
        if self.threshold is None or self.learns:
            return None
        for candidate in MEASURES:
            if all(candidate.is_met_by(self, value) for value in (self.value, self.value / 2)):
                return candidate
        return None

    @property
    def after(self) -> str:
        """After which steps an input comes, in words."""
        return f", after {self.steps_before} ordinary steps" if self.learns else ""


class Measured:
    """A norm, and of what: of the whole tree or of each leaf."""

    def __init__(self, name: str, norm: Callable[[np.ndarray], float], whole: bool):
        """Keeps what it is given."""
        self.name, self.norm, self.whole = name, norm, whole

    def norms(self, tree: Any) -> list[float]:
        """The norms of a tree, in 64 bits."""
        parts = [np.abs(np.asarray(x, np.complex128)).ravel() for x in jax.tree.leaves(tree)]
        parts = [np.concatenate(parts)] if self.whole else parts
        return [float(self.norm(part)) for part in parts if part.size]

    def is_met_by(self, subject: Subject, threshold: float) -> bool:
        """Whether clipped gradients have this norm, or nearly."""
        for seed in (1, 2):
            gradient = jax.tree.map(lambda x: 100 * x, normal(seed, scale=subject.value))
            state = subject.build(threshold).init(subject.params)
            updates, _ = subject.update_with(threshold, gradient, state, subject.params)
            pairs = zip(self.norms(gradient), self.norms(updates), strict=True)
            for before, after in pairs:
                if not math.isclose(min(before, threshold), after, rel_tol=0.05):
                    return False
        return True


def _l2(x: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


MEASURES = (
    Measured("2-norm of the tree", _l2, True),
    Measured("2-norm of each leaf", _l2, False),
    Measured("largest entry of the tree", np.max, True),
    Measured("root mean square of each leaf", _rms, False),
    Measured("1-norm of the tree", np.sum, True),
)
"""What is usually held to a threshold."""


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def like(tree: Any, seed: int, scale: float) -> Any:
    """Normal entries in the shapes and types of a tree."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(scale * random.normal(size=x.shape)), x.dtype), tree
    )


def attempt(said: str, function: Callable[[], Any]) -> Any:
    """What a function returns; what it raises becomes a promise that is not kept.

    Raises:
        Broken: With what was said and what was raised, in one line.
    """
    try:
        return function()
    except (Broken, NotAsked):
        raise
    except Exception as error:
        raise Broken(f"{said}: {raised(error)}") from error


def raised(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    line = " ".join(lines[0].split())
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__
