"""What several pages draw and tabulate; `conf.py` puts this folder on the path of their cells."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

DYNAMICS = Path(__file__).parents[1] / "data/dynamics.json"

_ROWS = (
    ("clipped at noise 0.1", "clipped", "sigma 0.1", "share"),
    ("at noise 0.5", "clipped", "sigma 0.5", "share"),
    ("1st spike leaves as", "spikes", "first", "norm"),
    ("2nd spike", "spikes", "second", "norm"),
    ("burst", "spikes", "burst", "norm"),
    ("spike at step 10", "spikes", "step 10", "norm"),
    ("steps to follow x 3", "recovery", "x3", "steps"),
    ("x 10", "recovery", "x10", "steps"),
    ("x 0.1", "recovery", "x0.1", "steps"),
    ("clipped, heavy tail", "pareto", "clipped", "share"),
)


def dynamics_table(*names: str) -> Markdown:
    """A column for each rule of the dynamics benchmark that begins with one of the names."""
    recorded = json.loads(DYNAMICS.read_text(encoding="utf-8"))["rules"]
    found = {rule: of for rule, of in recorded.items() if any(_fits(rule, name) for name in names)}
    if not found:
        return Markdown("Not run yet: `python -m benchmarks.dynamics`.")
    rows = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for title, group, key, kind in _ROWS:
        cells = (_shown(of[group][key], kind) for of in found.values())
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return Markdown("\n".join(rows))


def _fits(rule: str, name: str) -> bool:
    return f"{rule} ".startswith(f"{name} ")


def _shown(value: float | None, kind: str) -> str:
    if value is None:
        return "never"
    if kind == "share":
        return f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"
    return f"{value:,.0f}" if kind == "steps" or value >= 99.95 else f"{value:.3g}"


def stream(seed: int = 0) -> np.ndarray:
    """400 norms: noise of 0.2 about 1, spikes at steps 120 and 140, three times the level from 240.

    The level falls to a tenth of that at step 320.
    """
    norms = np.exp(0.2 * np.random.default_rng(seed).normal(size=400))
    norms[240:] *= 3
    norms[320:] /= 10
    norms[120], norms[140] = 50, 20
    return norms.astype(np.float32)


def run(clip: Any, norms: np.ndarray) -> dict[str, np.ndarray]:
    """Drives a clip with gradients of one entry that have these norms; what every step read."""
    params = jnp.zeros(1)

    def step(state: Any, norm: jax.Array) -> tuple[Any, Any]:
        _, state = clip.update(norm[None], state, params)
        return state, (state.threshold, state.clipped_norm)

    _, (thresholds, clipped) = jax.lax.scan(step, clip.init(params), jnp.asarray(norms))
    return {"threshold": np.asarray(thresholds), "clipped_norm": np.asarray(clipped)}


def draw(clip: Any, title: str = "") -> None:
    """Norm, threshold and what is left of the norm, on `stream`."""
    norms = stream()
    read = run(clip, norms)
    threshold = np.where(np.isfinite(read["threshold"]), read["threshold"], math.nan)
    plt.rcParams.update({"font.size": 12, "savefig.facecolor": "white"})
    _, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(norms, color="#9aa5b1", lw=0.9, label="norm before")
    axes.plot(read["clipped_norm"], color="#1f6fb2", lw=0.9, label="norm after")
    axes.plot(threshold, color="#c4501b", lw=1.6, label="threshold")
    axes.set(yscale="log", xlabel="step", ylabel="norm", title=title, ylim=(0.1, 400))
    axes.legend(ncols=3, frameon=False, loc="upper left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    plt.show()
