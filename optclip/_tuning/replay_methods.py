"""Which methods can be replayed on recorded norms, which cannot and why, and how one is driven."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip import catalogue
from optclip._tuning import statistics, suggestion_text
from optclip._tuning.log import Record
from optclip._tuning.wording import LogError, number
from optclip.clipping import NO_PARAMS_MSG
from optclip.methods.safeguard import SafeguardState

# What stands beside the methods that learn, with the threshold that was suggested.
FIXED = "clip_by_global_norm"

NO_PARAMS = "takes the parameters, which were not recorded"
NO_MOMENTS = "takes Adam's second moments, which were not recorded"
NO_LEAVES = (
    "takes the norm of each leaf, and none were recorded; record a run with "
    "optclip.measure_norms(detail=True) and log optclip.metrics(opt_state, params)"
)

# Between which the median of the norms has to lie: a replay runs in float32.
LEAST, MOST = 1e-30, 1e30

# At this share of the steps the norms of the leaves have to make up the norm, to so much of it.
NEARLY, WITHIN = 0.95, 0.01

# Parameters for `safeguard`, whose bound then never acts: the norms cannot tell when it would.
LARGE = 1e30

# From name to the transformation, and whether it takes the norm of each leaf.
Methods = dict[str, tuple[Any, bool]]


def need_replayable(record: Record) -> None:
    """Refuses a record whose norms cannot be replayed, with a `LogError` that says why."""
    ordinary = record.norms[statistics.finite_positive(record.norms)]
    if not ordinary.size:
        raise LogError(suggestion_text.nothing(record.norms, record.source, "replay"))
    usual = float(np.median(ordinary))
    if not LEAST <= usual <= MOST:
        raise LogError(
            f"{record.source}: the usual norm of {number(usual)} is beyond what float32 can replay "
            f"({LEAST:g} to {MOST:g}); multiply all norms by a constant first"
        )


def choose(methods: Any, record: Record, threshold: float) -> tuple[Methods, dict[str, str]]:
    """What to replay of what was asked for, and by name why not the rest.

    The threshold is that of the fixed clip that stands beside the learned ones.
    """
    replayed: Methods = {}
    not_replayed: dict[str, str] = {}
    if isinstance(methods, Mapping):
        asked = dict(methods)
    elif methods is None:
        asked = {f"{FIXED}({threshold:.3g})": optclip.clip_by_global_norm(threshold)}
        asked |= _with_defaults(catalogue.methods(), not_replayed)
        del not_replayed[FIXED]
    elif isinstance(methods, str) or not isinstance(methods, Iterable):
        raise LogError(
            f"methods must be a list of names or a mapping from name to transformation, got "
            f"{methods!r}; pass ['robust_clip', 'zclip'], or leave it out for all"
        )
    else:
        asked = _with_defaults(map(_named, methods), not_replayed)
    for name, transform in asked.items():
        if isinstance(methods, Mapping):
            by_leaf = _tried_out(name, transform, record)
        else:  # all of those measure the 2-norm
            by_leaf = _by_memory(transform)
        why = _without_leaves(record) if by_leaf is True else by_leaf
        if why:
            not_replayed[name] = str(why)
        else:
            replayed[name] = (transform, bool(by_leaf))
    return replayed, not_replayed


def _named(name: Any) -> catalogue.Method:
    known = {method.name: method for method in catalogue.methods()}
    if name not in known:
        raise LogError(
            f"no method to replay is called {name!r}; there are {', '.join(known)}, and any "
            "transformation in a mapping: {'mine': optclip.robust_clip(deviations=3.0)}"
        )
    method = known[name]
    if method.needs and method.family != "relative":
        raise LogError(f"{name} {_needs(method)}")
    return method


def _needs(method: catalogue.Method) -> str:
    arguments = ", ".join("labels" if x == "labels" else "1.0" for x in method.needs)
    needs = " and ".join(method.needs)
    return f"has no default for {needs}; pass {{'mine': optclip.{method.name}({arguments})}}"


def _with_defaults(
    methods: Iterable[catalogue.Method], not_replayed: dict[str, str]
) -> dict[str, Any]:
    """The methods with their defaults; why not, of those that have none or learn nothing."""
    asked = {}
    for method in methods:
        if method.needs_adam:
            not_replayed[method.name] = NO_MOMENTS
        elif method.family == "relative":
            not_replayed[method.name] = NO_PARAMS
        elif method.needs:
            not_replayed[method.name] = _needs(method)
        elif method.family == "fixed":
            not_replayed[method.name] = "learns no threshold"
        else:
            function = getattr(optclip, method.name)
            asked[method.name] = function(optax.identity()) if method.wraps else function()
    return asked


def _without_leaves(record: Record) -> str | None:
    """Why a record cannot be replayed leaf by leaf; None if it can.

    With leaves or steps left out a rule would learn thresholds from what was never a gradient.
    """
    if not record.leaf_norms:
        return NO_LEAVES
    known = statistics.finite_positive(record.norms)
    total = np.zeros(int(known.sum()))
    for norms in record.leaf_norms.values():
        total += (norms[known] / record.norms[known]) ** 2
    fits = np.abs(np.sqrt(total) - 1) <= WITHIN
    if fits.mean() >= NEARLY:
        return None
    return (
        f"takes the norm of each leaf, and at {(~fits).sum():,} of {len(fits):,} steps those "
        "recorded do not make up the norm; log those of all leaves at every step, "
        "optclip.metrics(opt_state, params)"
    )


def _by_memory(transform: Any) -> bool | str:
    """Whether a rule takes the norm of each leaf, by the shapes of what it remembers."""
    if _memory_differs(transform, {"a": jnp.ones(1)}, {"a": jnp.ones(2)}):
        return "takes single entries of the gradient"
    return _memory_differs(transform, {"a": jnp.ones(1)}, {"a": jnp.ones(1), "b": jnp.ones(1)})


def _tried_out(name: str, transform: Any, record: Record) -> bool | str:
    """Whether a transformation takes the norm of each leaf; or why it cannot be replayed.

    It is tried out on two leaves, far above any threshold: what it reads tells what it measures.
    """
    if not (hasattr(transform, "init") and hasattr(transform, "update")):
        raise LogError(
            f"methods[{name!r}] must be a transformation, such as optclip.robust_clip(), got "
            f"{transform!r}"
        )
    paths = list(dict.fromkeys((*record.leaf_norms, "a", "b")))[:2]
    entries = (jnp.array([3e15, 4e15]), jnp.array([12e14, 0.0]))
    gradient = dict(zip(paths, entries, strict=True))
    try:
        state = transform.init(_params(gradient))
        _, state = jax.jit(transform.update)(gradient, state, *_params_of(state, gradient))
    except (ValueError, KeyError) as error:
        if str(error) == NO_PARAMS_MSG:
            return f"{NO_PARAMS}; pass the clip alone"
        return f"cannot be tried out: {' '.join(str(error).split())[:200]}"
    read = jax.device_get(optclip.metrics(state))
    norm = _readings(read, "norm")[0]
    if norm is None:
        return "keeps no readings of a clip; pass one of optclip's transformations"
    if not np.isclose(norm, np.hypot(5e15, 12e14), rtol=1e-5):
        return "measures another norm than the 2-norm of the gradient, or of each leaf"
    factor, clipped = _readings(read, "factor")[0], _readings(read, "clipped_norm")[0]
    together = factor is None or np.isclose(factor * norm, clipped, rtol=1e-4)
    # A rule that warms up has not clipped yet, but what it remembers has a number for each leaf.
    first = dict(list(gradient.items())[:1])
    return not together or _memory_differs(transform, first, gradient)


def _memory_differs(transform: Any, *trees: Any) -> bool:
    """Whether a rule remembers something of another shape for another gradient."""
    states = [jax.eval_shape(transform.init, tree) for tree in trees]
    one, other = ([x.shape for x in jax.tree.leaves(_memories(state))] for state in states)
    return one != other


def _memories(state: Any) -> list[Any]:
    return [clip.memory for clip in _nodes(optclip.ClipState, state)]


def _nodes(kind: type, state: Any) -> list[Any]:
    """All states of a kind in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _params(gradient: Any) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, LARGE), gradient)


def _params_of(state: Any, gradient: Any) -> tuple[Any, ...]:
    """Parameters, only for `safeguard`: without them a clip that needs them is found out."""
    return (_params(gradient),) if _nodes(SafeguardState, state) else ()


def _readings(readings: Mapping[str, Any], name: str) -> list[Any]:
    """That reading of every clip in the order of the chain, then of a skip; [None] for none."""
    places = sum(key.startswith("clip/") and key.endswith(f"/{name}") for key in readings)
    keys = (f"clip/{name}", *(f"clip/{at}/{name}" for at in range(places)), f"skip/{name}")
    return [readings[key] for key in keys if key in readings] or [None]


def drive(
    transform: Any, norms: np.ndarray, leaf_norms: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Runs a transformation over gradients with one entry, or one in each leaf: one jitted scan.

    Returns:
        For each step the threshold (of several leaves the smallest, infinite where it does not
        clip), the norm that came out (0 where it was skipped), and whether it was clipped or
        skipped (not so where it was not finite).
    """
    stream = {name: _entries(x) for name, x in (leaf_norms or {"": norms}).items()}

    def step(state: Any, gradient: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        _, state = transform.update(gradient, state, *_params_of(state, gradient))
        return state, _what_it_did(optclip.metrics(state), bool(leaf_norms))

    @jax.jit
    def through(stream: Any) -> tuple[jax.Array, ...]:
        first = jax.tree.map(lambda x: x[0], stream)
        return jax.lax.scan(step, transform.init(_params(first)), stream)[1]

    thresholds, outputs, clipped = map(np.asarray, through(stream))
    return thresholds.astype(np.float64), outputs.astype(np.float64), clipped


def _entries(norms: np.ndarray) -> jax.Array:
    """Gradients of one entry; a finite norm beyond float32 is as large as can be."""
    most = float(np.finfo(np.float32).max)
    held = np.where(np.isfinite(norms), np.minimum(norms, most), norms)
    return jnp.asarray(held[:, None], jnp.float32)


def _what_it_did(readings: Mapping[str, Any], by_leaf: bool) -> tuple[jax.Array, ...]:
    thresholds, norms = _readings(readings, "threshold"), _readings(readings, "norm")
    norm = norms[-1 if "skip/norm" in readings else 0]
    skipping = readings.get("skip/skipping", jnp.zeros([], bool))
    through = _readings(readings, "clipped_norm")[-1]
    output = jnp.where(skipping, 0, norm if through is None else through)
    if by_leaf:
        clipped = jnp.min(jnp.stack(_readings(readings, "factor"))) < 1
    else:
        clipped = jnp.any(jnp.stack(norms) > jnp.stack(thresholds))
    return jnp.min(jnp.stack(thresholds)), output, (clipped | skipping) & jnp.isfinite(norm)
