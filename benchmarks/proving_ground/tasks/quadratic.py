"""A quadratic whose gradient is noisy: with heavy tails, and a Gaussian control.

f = 1/2 sum h_i x_i^2 over 50 entries, h from 0.1 to 10. To the gradient comes noise of size 0.3,
Student's t with 1.2 degrees of freedom, which has no variance, or normal. The recorded loss is f
without the noise; the result is the median of the last quarter. The claim that clipping, and above
all clipping by entries, is what makes SGD work under heavy tails: Zhang et al., "Why are adaptive
methods good for attention models?", 2020, arXiv:1912.03194.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.proving_ground import conditions
from benchmarks.proving_ground.task import Feed, Setting, Task

CURVATURES = np.logspace(-1, 1, 50).astype(np.float32)
NOISE, FREEDOM = 0.3, 1.2


def init(seed: int) -> jax.Array:
    """A point at distance about 7, another one for each seed."""
    return jax.random.normal(jax.random.key(seed), CURVATURES.shape)


def objective(x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss f with a slope that is the noise, to learn from; f, to record."""
    value = 0.5 * jnp.sum(CURVATURES * x * x)
    return value + jnp.sum(noise * x), value


def _noise(steps: int, seeds: tuple[int, ...], heavy: bool) -> Feed:
    shape = (steps, len(CURVATURES))

    def of(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        return random.standard_t(FREEDOM, shape) if heavy else random.standard_normal(shape)

    drawn = NOISE * np.stack([of(seed) for seed in seeds], axis=1)
    return conditions.plain(drawn.astype(np.float32), steps)


def heavy_tails(steps: int, seeds: tuple[int, ...]) -> Feed:
    """Noise without a variance."""
    return _noise(steps, seeds, heavy=True)


def gaussian(steps: int, seeds: tuple[int, ...]) -> Feed:
    """Normal noise of the same size."""
    return _noise(steps, seeds, heavy=False)


TASK = Task(
    name="quadratic",
    steps=2000,
    rate=3e-3,
    threshold=10.0,
    init=init,
    objective=objective,
    optimizer=lambda rate: optax.sgd(rate),
    settings=(Setting("heavy tails", heavy_tails), Setting("gaussian", gaussian)),
    last=0.25,
    seconds=0.2,
    settle=np.median,
)
