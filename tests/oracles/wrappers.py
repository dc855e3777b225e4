"""The wrappers of optimizers, in float64.

Nothing here calls optclip. A gradient, an update and the parameters are one flat array each. As in
`learned.py`, steps that teach nothing are not shown to an oracle.
"""

import copy
import math
from collections import deque

import numpy as np

from oracles.learned import Robust


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


class Adam:
    """Adam without weight decay; one flat gradient."""

    def __init__(self, rate=0.1, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.mean, self.square, self.count = 0.0, 0.0, 0

    def step(self, gradient):
        """The update."""
        self.count += 1
        self.mean = self.b1 * self.mean + (1 - self.b1) * gradient
        self.square = self.b2 * self.square + (1 - self.b2) * gradient**2
        mean = self.mean / (1 - self.b1**self.count)
        square = self.square / (1 - self.b2**self.count)
        return -self.rate * mean / (np.sqrt(square) + self.eps)


class Safeguard:
    """The robust clip, and a bound on what one gradient may do to each leaf.

    An optimizer of single numbers runs beside, on the root mean square of each leaf's gradient.
    Where its update grows with the gradient, the gradient is cut to where the sum of all it adds to
    updates, `gain` times what it adds to this one, is within the bound; an update is cut to where
    the one of single numbers is, without the growth of its first steps, and as much smaller as
    updates were so far. The optimizers here are told what they are like: `gain`, and `fading`, the
    share of an update that is left in the next.

    Args:
        inner: The optimizer, of one leaf.
        sizes: The entries of each leaf.
    """

    def __init__(self, inner, sizes, deviations=2.0, ratio=0.03, gain=None, fading=0.0):
        self.clip, self.ratio, self.sizes = Robust(deviations), ratio, sizes
        self.leaves = [Leaf(inner, gain, fading) for _ in sizes]

    def step(self, gradient, params):
        """The threshold before the optimizer, the smallest bound, and the update."""
        norm = float(np.linalg.norm(gradient))
        before, applied = self.clip.step(norm) if norm > 0 else (math.nan, 0.0)
        gradient = gradient * (applied / norm if norm > 0 else 1.0)
        typical = max(np.linalg.norm(params) / math.sqrt(len(params)), 1e-3)
        bounds, updates, start = [], [], 0
        for leaf, size in zip(self.leaves, self.sizes, strict=True):
            own = slice(start, start + size)
            length = max(np.linalg.norm(params[own]), typical * math.sqrt(size))
            bound, update = leaf.step(gradient[own], self.ratio * length)
            bounds.append(bound)
            updates.append(update)
            start += size
        return before, min(bounds), np.concatenate(updates)


class Leaf:
    """One leaf under `Safeguard`."""

    def __init__(self, inner, gain, fading):
        self.inner, self.small = copy.deepcopy(inner), copy.deepcopy(inner)
        self.gain, self.fading, self.excess, self.steps = gain, fading, 0.0, 0
        self.reached = 0.0

    def step(self, gradient, allowed):
        """The bound, and the update."""
        root = math.sqrt(len(gradient))
        size = np.linalg.norm(gradient) / root
        bound = allowed / math.sqrt(1 + self.excess / 400)
        share, factor = 0.0, 1.0
        if self.gain is not None:
            added = copy.deepcopy(self.small).step(size) - copy.deepcopy(self.small).step(0.0)
            share = self.gain * abs(added) * root
            factor = min(1.0, bound / share) if share > 0 else 1.0
        self.steps += 1
        first_steps = 1 - self.fading**self.steps
        one = abs(self.small.step(factor * size))
        length = one * root * (self.reached or 1.0) / first_steps
        update = self.inner.step(factor * gradient)
        if one > 0:
            reached = np.linalg.norm(update) / (one * root)
            self.reached = min(max(self.reached, reached), 1.0)
        if length > bound:
            update = update * (bound / length)
        if allowed > 0:
            self.excess += min(max(max(share, length) / allowed / 2 - 1, 0), 1)
        return bound, update


class StableAdamW:
    """AdamW whose every tensor takes a step shortened by max(1, RMS(g / sqrt(v)) / d).

    Algorithm 2 of arXiv:2304.13013, with its decays that are corrected for the start. The weights
    are told at every step. `leaves` are the sizes of the tensors.
    """

    def __init__(self, leaves, rate, b1, b2, eps, decay, threshold):
        self.parts = np.split(np.arange(sum(leaves)), np.cumsum(leaves)[:-1])
        self.rate, self.b1, self.b2 = rate, b1, b2
        self.eps, self.decay, self.threshold, self.steps = eps, decay, threshold, 0
        self.mean, self.square = 0.0, 0.0

    def step(self, gradient, weights):
        """The largest RMS, and the update."""
        self.steps += 1
        b1, b2 = (b * (1 - b ** (self.steps - 1)) / (1 - b**self.steps) for b in (self.b1, self.b2))
        self.mean = b1 * self.mean + (1 - b1) * gradient
        self.square = b2 * self.square + (1 - b2) * gradient**2
        ratios = gradient**2 / np.maximum(self.square, self.eps**2)
        update = -self.rate * (self.decay * weights + self.mean / (np.sqrt(self.square) + self.eps))
        sizes = [math.sqrt(np.mean(ratios[part])) for part in self.parts]
        for part, size in zip(self.parts, sizes, strict=True):
            update[part] /= max(1, size / self.threshold)
        return max(sizes), update
