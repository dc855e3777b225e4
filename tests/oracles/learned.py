"""Clips that learn, from their papers: plain float64, one norm at a time.

Nothing here calls optclip or jax. An oracle's `step` takes the norm of one ordinary gradient (not
zero, every entry finite) and answers with the threshold and the norm after clipping; steps that
teach nothing are not shown to it. The defaults are the papers'. Clips of single entries, clips
relative to the parameters and the wrappers of optimizers are in `methods.py` and `wrappers.py`.
"""

import math
from collections import deque

import numpy as np


class Learner:
    """A clip of the whole gradient that learns from norms.

    A subclass has `threshold`, from the norm of this step, and `learn`, from what it is to learn
    from. `level` is what "winsorized" holds a norm to, by default the threshold.

    Args:
        learn_from: "raw", "clipped" or "winsorized".
        patience: Clips in a row from which on it learns from raw norms, until one is not clipped.
    """

    def __init__(self, learn_from: str, patience: float = math.inf):
        self.learn_from, self.patience, self.streak = learn_from, patience, 0

    def threshold(self, norm: float) -> float:
        raise NotImplementedError

    def learn(self, norm: float) -> None:
        raise NotImplementedError

    def level(self, norm: float) -> float:
        return self.threshold(norm)

    def step(self, norm: float) -> tuple[float, float]:
        """The threshold and the norm after clipping."""
        threshold = self.threshold(norm)
        applied = min(norm, threshold)
        self.streak = self.streak + 1 if applied < norm else 0
        if self.learn_from == "raw" or self.streak >= self.patience:
            self.learn(norm)
        else:
            self.learn(applied if self.learn_from == "clipped" else min(norm, self.level(norm)))
        return threshold, applied


class AutoClip(Learner):
    """The p-th percentile of all norms so far, the present one among them (arXiv:2007.14469).

    The paper's list is unbounded; here it keeps the last `window`.
    """

    def __init__(self, percentile=10.0, window=1024, learn_from="raw", patience=math.inf):
        super().__init__(learn_from, patience)
        self.percentile, self.norms = percentile, deque(maxlen=window)

    def threshold(self, norm):
        among = [*self.norms, norm][-self.norms.maxlen :]
        return float(np.percentile(among, self.percentile))

    def learn(self, norm):
        self.norms.append(norm)


class OnlineQuantile(Learner):
    """C <- C exp(-eta (b - gamma)), b whether the norm was at most C (arXiv:1905.03871)."""

    def __init__(self, quantile=0.9, step_size=0.2, init=None):
        super().__init__("raw")
        self.quantile, self.step_size, self.now = quantile, step_size, init

    def threshold(self, norm):
        return norm if self.now is None else self.now

    def learn(self, norm):
        now = self.threshold(norm)
        self.now = now * math.exp(-self.step_size * (float(norm <= now) - self.quantile))


class ZClip(Learner):
    """z = (n - mu) / (sigma + 1e-6); above z_t it applies and learns from g* (arXiv:2504.02507).

    g* = mu + z_t^2 / z sigma ("reciprocal"), mu ("mean"), or mu + z_t sigma ("max"). Mean and
    variance start as those of the norms of a warm-up; then the variance is about the new mean.
    """

    def __init__(
        self,
        z_threshold=2.5,
        decay=0.97,
        warmup_steps=25,
        variant="reciprocal",
        learn_from="clipped",
        patience=math.inf,
    ):
        super().__init__(learn_from, patience)
        self.z_threshold, self.decay, self.warmup_steps = z_threshold, decay, warmup_steps
        self.variant, self.buffer, self.mean, self.variance = variant, [], 0.0, 0.0

    @property
    def warm(self):
        return len(self.buffer) < max(self.warmup_steps, 1)

    def threshold(self, norm):
        if self.warm:
            return math.inf
        sigma = math.sqrt(self.variance)
        outlying = sigma if self.variant == "max" else sigma + 1e-6
        if norm <= self.mean + self.z_threshold * outlying:
            return self.mean + self.z_threshold * outlying
        if self.variant == "mean":
            return self.mean
        if self.variant == "max":
            return self.mean + self.z_threshold * sigma
        z = (norm - self.mean) / (sigma + 1e-6)
        return self.mean + self.z_threshold**2 / z * sigma

    def level(self, norm):
        return math.inf if self.warm else self.mean + self.z_threshold * math.sqrt(self.variance)

    def learn(self, norm):
        if self.warm:
            self.buffer.append(norm)
            self.mean, self.variance = float(np.mean(self.buffer)), float(np.var(self.buffer))
        else:
            keep = self.decay
            self.mean = keep * self.mean + (1 - keep) * norm
            self.variance = keep * self.variance + (1 - keep) * (norm - self.mean) ** 2


class AdaGC:
    """h_l = min(lambda gamma_l / n_l, 1), gamma_l an average of the clipped n_l (arXiv:2502.11034).

    Before step T_start (steps count from 1) all tensors are clipped together to lambda_abs, and
    gamma_l is the smallest clipped norm of the tensor. `step` takes the norms of all tensors; one
    of 0 has no gradient, and its gamma stays. Patience is not the paper's.
    """

    def __init__(
        self,
        relative=1.05,
        decay=0.98,
        warmup_steps=100,
        max_norm=1.0,
        learn_from="clipped",
        patience=math.inf,
    ):
        self.relative, self.decay, self.warmup_steps = relative, decay, warmup_steps
        self.max_norm, self.learn_from, self.patience = max_norm, learn_from, patience
        self.steps, self.gamma, self.streak = 0, {}, {}

    def step(self, norms):
        """The thresholds and the norms after clipping, of every tensor."""
        self.steps += 1
        warm = self.steps < self.warmup_steps
        together = math.sqrt(sum(norm**2 for norm in norms))
        h = min(self.max_norm / together, 1.0) if together > 0 else 1.0
        thresholds, applied = [], []
        for leaf, norm in enumerate(norms):
            gamma = self.gamma.get(leaf)
            if warm:
                threshold = h * norm if h < 1 else math.inf
            else:
                threshold = math.inf if gamma is None else self.relative * gamma
            thresholds.append(threshold)
            applied.append(min(norm, threshold))
            if norm > 0:
                self._learn(leaf, norm, applied[-1], gamma, warm)
        return thresholds, applied

    def _learn(self, leaf, norm, applied, gamma, warm):
        self.streak[leaf] = self.streak.get(leaf, 0) + 1 if applied < norm else 0
        raw = self.learn_from == "raw" or self.streak[leaf] >= self.patience
        seen = norm if raw else applied
        if gamma is None:
            self.gamma[leaf] = seen
        elif warm:
            self.gamma[leaf] = min(gamma, seen)
        else:
            self.gamma[leaf] = self.decay * gamma + (1 - self.decay) * seen


class MeanOverWindow(Learner):
    """mean + k std (of the population) of the last norms before this one, as Levanter does it.

    Nothing is clipped before half of the window is filled. std counts as 1e-6 of the mean at the
    least (as 1e-6 in Levanter).
    """

    def __init__(self, deviations=3.0, window=128, learn_from="raw", patience=math.inf):
        super().__init__(learn_from, patience)
        self.deviations, self.norms = deviations, deque(maxlen=window)

    def threshold(self, norm):
        if len(self.norms) < max(self.norms.maxlen // 2, 1):
            return math.inf
        mean, std = float(np.mean(self.norms)), float(np.std(self.norms))
        return mean + self.deviations * max(std, 1e-6 * mean)

    def learn(self, norm):
        self.norms.append(norm)


class MovingAverage(Learner):
    """k times the moving average of the norms, corrected for its start as Adam's are."""

    def __init__(self, multiplier=2.0, decay=0.99, learn_from="clipped", patience=math.inf):
        super().__init__(learn_from, patience)
        self.multiplier, self.decay, self.average, self.steps = multiplier, decay, 0.0, 0

    def threshold(self, norm):
        if not self.steps:
            return math.inf
        return self.multiplier * self.average / (1 - self.decay**self.steps)

    def learn(self, norm):
        self.average = self.decay * self.average + (1 - self.decay) * norm
        self.steps += 1


class Robust:
    """exp(m + k sqrt v), m and v moving mean and variance of log norms that are held to a band.

    The band is m +- 2 sqrt v; the mean alone believes a smaller norm down to a tenth. The first
    norm sets m, v starts at 0.25^2, and sqrt v counts as 0.02 at the least. With "raw" and
    "clipped" nothing is held.
    """

    def __init__(self, deviations=2.0, decay=0.97, max_rise=math.inf, learn_from="winsorized"):
        self.deviations, self.decay, self.max_rise = deviations, decay, max_rise
        self.learn_from, self.count, self.m, self.v = learn_from, 0, 0.0, 0.25**2

    def step(self, norm):
        """The threshold and the norm after clipping."""
        spread = max(math.sqrt(self.v), 0.02)
        threshold = math.exp(self.m + self.deviations * spread) if self.count else math.inf
        applied = min(norm, threshold)
        log = math.log(applied if self.learn_from == "clipped" else norm)
        if self.count:
            for_mean = for_variance = log - self.m
            if self.learn_from == "winsorized":
                held = min(log - self.m, 2 * spread)
                for_mean = max(held, -max(2 * spread, math.log(10)))
                for_variance = max(held, -2 * spread)
            keep = min(self.decay, 1 - 1 / (self.count + 4))
            self.m += min((1 - keep) * for_mean, math.log1p(self.max_rise))
            self.v = keep * (self.v + (1 - keep) * for_variance**2)
        else:
            self.m = log
        self.count += 1
        return threshold, applied


OF_THE_NORM = {
    "autoclip": AutoClip,
    "clip_by_moving_average": MovingAverage,
    "clip_by_quantile": OnlineQuantile,
    "clip_by_window": MeanOverWindow,
    "robust_clip": Robust,
    "zclip": ZClip,
}
"""The methods that learn from the norm of the whole gradient."""
