"""The wrappers of optimizers, in float64.

Nothing here calls optclip. A gradient, an update and the parameters are one flat array each. As in
`learned.py`, steps that teach nothing are not shown to an oracle.
"""

import math
from collections import deque

import numpy as np

from oracles.learned import Robust
from oracles.methods import clip_by_param_norm


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
        self.inner, self.clip, self.bound = inner, Robust(deviations), clip_by_param_norm(ratio)

    def step(self, gradient, params):
        """The thresholds before and after the optimizer, and the update."""
        norm = float(np.linalg.norm(gradient))
        before, applied = self.clip.step(norm) if norm > 0 else (math.nan, 0.0)
        update = self.inner.step(gradient * (applied / norm if norm > 0 else 1.0))
        bounded = self.bound.step(update, params)
        return before, bounded.thresholds[0], bounded.updates
