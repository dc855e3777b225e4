"""Clips of entries, clips relative to the parameters, and wrappers of optimizers, in float64.

Nothing here calls optclip or jax. Gradients, updates and parameters are lists of arrays, one for
each tensor, or one flat array where nothing depends on the tensors. As in `learned.py`,
steps that teach nothing are not shown to an oracle.
"""

import math
from collections import deque

import numpy as np

from oracles.learned import Robust


class Spam:
    """sign(g) sqrt(theta v) where g^2 > theta v; v learns from the clipped g (arXiv:2501.06842).

    v starts at 0, and an entry whose v is 0 is not clipped; nor is any in the first steps. One
    flat gradient. With "raw" v learns from g as it came.
    """

    def __init__(self, threshold=5000.0, decay=0.999, warmup_steps=20, learn_from="clipped"):
        self.theta, self.decay, self.warmup_steps = threshold, decay, warmup_steps
        self.learn_from, self.steps, self.v = learn_from, 0, 0.0

    def step(self, gradient):
        """The smallest bound of an entry, and the clipped gradient."""
        v = np.broadcast_to(self.v, gradient.shape)
        acting = (v > 0) & (self.steps >= self.warmup_steps)
        bound = np.where(acting, np.sqrt(self.theta * v), np.inf)
        clipped = np.sign(gradient) * np.minimum(np.abs(gradient), bound)
        seen = gradient if self.learn_from == "raw" else clipped
        self.v = self.decay * v + (1 - self.decay) * seen**2
        self.steps += 1
        return bound.min(), clipped


class Clippy:
    """Each tensor times min(1, min_i (rho |w_i| + alpha) / |u_i|) (arXiv:2302.09178)."""

    def __init__(self, relative=0.1, absolute=1e-7):
        self.relative, self.absolute = relative, absolute

    def step(self, updates, params):
        """The tightest factor, and the clipped tensors."""
        factors = []
        for u, w in zip(updates, params, strict=True):
            moving = u != 0
            bounds = self.relative * np.abs(w[moving]) + self.absolute
            factors.append(np.min(bounds / np.abs(u[moving]), initial=1.0))
        return min(factors), [f * u for f, u in zip(factors, updates, strict=True)]


class ParamNorm:
    """|u| <= ratio max(|w|, eps sqrt(size)); one flat update."""

    def __init__(self, ratio, eps=1e-3):
        self.ratio, self.eps = ratio, eps

    def allowed(self, params):
        """The norm of the parameters, or the floor under it."""
        return max(np.linalg.norm(params), self.eps * math.sqrt(params.size))

    def step(self, update, params):
        """The threshold and the bounded update."""
        threshold, norm = self.ratio * self.allowed(params), np.linalg.norm(update)
        return threshold, update * (threshold / norm if norm > threshold else 1.0)


class Momentum:
    """Gradient descent with heavy-ball momentum; one flat gradient."""

    def __init__(self, rate=0.1, momentum=0.9):
        self.rate, self.momentum, self.velocity = rate, momentum, 0.0

    def step(self, gradient):
        """The update."""
        self.velocity = gradient + self.momentum * self.velocity
        return -self.rate * self.velocity


class Ordinary:
    """The last ordinary values of one quantity, and the spikes in a row since the last of them.

    Their std counts as 1e-6 of the largest at the least: equal norms are equal but for rounding.
    """

    def __init__(self, deviations, window, patience):
        self.deviations, self.needed = deviations, min(patience, max(window // 2, 1))
        self.values, self.spikes = deque(maxlen=window), deque(maxlen=window)

    def limit(self):
        """mean + k std of the ordinary values, once there are enough."""
        if len(self.values) < self.needed:
            return math.inf
        std = max(np.std(self.values), 1e-6 * np.max(self.values))
        return float(np.mean(self.values) + self.deviations * std)

    def learn(self, value, spike, accepted):
        """Learns one value; where it is accepted, all spikes since the last ordinary one."""
        if spike:
            self.spikes.append(value)
        else:
            self.spikes.clear()
            self.values.append(value)
        if accepted:
            self.values = self.spikes.copy()
            self.spikes.clear()


class SkipSpikes:
    """Leaves out a step whose norm (or loss) is above mean + k std of the last ordinary ones.

    The optimizer does not see it. After `patience` spikes in a row their level is accepted, with
    the last of them, and what came before is forgotten. As many ordinary norms, or half a window,
    are needed before the first skip. A gradient of zeros is a step that teaches nothing.
    """

    def __init__(self, inner, deviations=6.0, window=128, patience=20):
        self.inner, self.patience, self.streak = inner, patience, 0
        self.norms = Ordinary(deviations, window, patience)
        self.losses = Ordinary(deviations, window, patience)

    def step(self, gradient, loss=None):
        """The threshold, and the update: zeros where the step is skipped."""
        norm, threshold = float(np.linalg.norm(gradient)), self.norms.limit()
        spike = norm > threshold or (loss is not None and loss > self.losses.limit())
        accepted = spike and self.streak + 1 >= self.patience
        if norm > 0:
            self.streak = self.streak + 1 if spike and not accepted else 0
            self.norms.learn(norm, spike, accepted)
            if loss is not None:
                self.losses.learn(loss, spike, accepted)
        skipped = spike and not accepted
        return threshold, np.zeros_like(gradient) if skipped else self.inner.step(gradient)


class Safeguard:
    """The robust clip, an optimizer, and the bound relative to the parameters, in this order."""

    def __init__(self, inner, deviations=2.0, ratio=0.01):
        self.inner, self.clip, self.bound = inner, Robust(deviations), ParamNorm(ratio)

    def step(self, gradient, params):
        """The thresholds before and after the optimizer, and the update."""
        norm = float(np.linalg.norm(gradient))
        before, applied = self.clip.step(norm) if norm > 0 else (math.nan, 0.0)
        update = self.inner.step(gradient * (applied / norm if norm > 0 else 1.0))
        after, update = self.bound.step(update, params)
        return before, after, update
