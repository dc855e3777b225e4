"""Draws the norm after a clip against the norm before, for docs/methods/fixed.md.

python docs/figures/fixed.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optclip

PICTURE = Path(__file__).parents[1] / "images/fixed.png"
CLIPS = ("clip_by_global_norm", "smooth_clip", "clip_singular_values", "normalize_by_norm")


def left(name: str, norms: np.ndarray) -> np.ndarray:
    """The norms after a clip with threshold 1 of gradients with one entry."""
    clip = getattr(optclip, name)(1.0)
    one = jax.vmap(lambda norm: clip.update(norm[None], None)[1].clipped_norm)
    return np.asarray(jax.jit(one)(jnp.asarray(norms, jnp.float32)))


def main() -> None:
    """Writes the picture."""
    norms = np.linspace(0, 4, 81)
    with plt.rc_context({"font.size": 12, "savefig.facecolor": "white"}):
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for name, style in zip(CLIPS, ("-", "--", ":", "-."), strict=True):
            axes.plot(norms, left(name, norms), style, lw=2, label=f"{name}(1.0)")
        axes.plot(norms, norms, color="#999999", lw=1, label="no clip")
        axes.set(xlabel="norm before", ylabel="norm after", ylim=(0, 1.9))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=11, loc="upper right")
        figure.savefig(PICTURE, dpi=150)
        plt.close(figure)
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
