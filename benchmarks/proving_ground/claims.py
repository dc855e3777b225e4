"""What papers claim for their clips, each with a test that these tasks allow and its outcome.

A claim is of a paper's own models; what is tested is the smallest version of it: the same direction
of the effect, and a size beyond the noise of three seeds.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.reporting import CUSTOMARY, FIXED, number

ONE = f"{FIXED}({CUSTOMARY})"
MOMENTUM, ADAMW = "transformer, momentum", "transformer, AdamW"
UNITS = ("x1e-5", "x20")


NOT_RUN = "not run yet"
"""What pages say of a contender that the results have no scores of."""


class NotRun(LookupError):
    """The results have no scores of a contender: it is newer than they are."""


class Found:
    """The scores of a report, by task, setting and method; a loss that diverged is infinite."""

    def __init__(self, scores: dict[str, Any]) -> None:
        self.scores = scores

    def of(self, task: str, setting: str, method: str, what: str = "loss") -> float:
        """A number of a score; infinity where there is none.

        Raises:
            NotRun: If the results do not have the method.
        """
        if method not in self.scores[task][setting]:
            raise NotRun(f"{task}, {setting}: {method} was {NOT_RUN}")
        value = self.scores[task][setting][method].get(what)
        return math.inf if value is None else float(value)

    def over(self, task: str, setting: str, method: str, other: str) -> float:
        """The loss of a method over that of another one."""
        ours, theirs = (self.of(task, setting, name) for name in (method, other))
        if math.isinf(theirs):
            return math.nan if math.isinf(ours) else 0.0
        return ours / theirs


class Outcome(NamedTuple):
    """What came of a claim.

    Attributes:
        held: Whether it was reproduced.
        figure: What was measured.
    """

    held: bool
    figure: str


class Claim(NamedTuple):
    """A published claim.

    Attributes:
        paper: Authors, year and arXiv number.
        claimed: What the paper says.
        tested: What is asked for here; why nothing can be, where `test` is None.
        test: From the scores to the outcome.
    """

    paper: str
    claimed: str
    tested: str
    test: Callable[[Found], Outcome] | None = None


def _number(x: float) -> str:
    return number(x, 3) if math.isfinite(x) else "diverged"


def _loss_ratio(
    task: str, setting: str, method: str, other: str, most: float, *, least: float = 0.0
) -> Callable[[Found], Outcome]:
    """The loss of a method over that of another one is in [least, most]."""

    def test(found: Found) -> Outcome:
        ratio = found.over(task, setting, method, other)
        ours, theirs = (_number(found.of(task, setting, name)) for name in (method, other))
        return Outcome(least <= ratio <= most, f"{ours} against {theirs}")

    return test


def _exploding(found: Found) -> Outcome:
    task, setting = "recurrent", "adding"
    ratio = found.over(task, setting, FIXED, NO_CLIP)
    losses = " against ".join(_number(found.of(task, setting, x)) for x in (FIXED, NO_CLIP))
    shares = [found.of(task, setting, x, "diverged") for x in (ONE, NO_CLIP)]
    figure = f"{losses}; diverged {shares[0]:.0%} (threshold 1) against {shares[1]:.0%}"
    return Outcome(ratio < 0.95 and shares[0] < shares[1], figure)


def _faster(found: Found) -> Outcome:
    methods = (FIXED, NO_CLIP)
    loss, rate = (
        [found.of(MOMENTUM, "clean", method, what) for method in methods]
        for what in ("loss", "rate")
    )
    figure = (
        f"{_number(loss[0])} at rate {rate[0]:.2g} against {_number(loss[1])} at rate {rate[1]:.2g}"
    )
    return Outcome(loss[0] < loss[1] and rate[0] > rate[1], figure)


def _any_units(found: Found) -> Outcome:
    task = "deep network, batch 64"

    def worst(method: str) -> float:
        plain = found.of(task, "clean", method)
        ratios = [found.of(task, setting, method, "transferred") / plain for setting in UNITS]
        return max(ratios)

    ours, fixed = worst("autoclip"), worst(FIXED)
    figure = f"loss over that in plain units, the worse of the two: {ours:.3f}; fixed {fixed:.3f}"
    return Outcome(ours <= 1.02 < fixed, figure)


def _large_batches(found: Found) -> Outcome:
    ratios = [
        found.over(f"deep network, batch {size}", "clean", "adaptive_grad_clip", NO_CLIP)
        for size in (16, 64, 256, 1024)
    ]
    numbers = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    figure = f"loss over no clip at batch 16, 64, 256, 1024: {numbers}"
    return Outcome(ratios[-1] <= 0.95 and ratios[-1] < ratios[0], figure)


def _smooth(found: Found) -> Outcome:
    ratios = [
        found.over(task, setting, "smooth_clip", FIXED)
        for task, settings in found.scores.items()
        for setting, methods in settings.items()
        if "smooth_clip" in methods and math.isfinite(found.of(task, setting, FIXED))
    ]
    if not ratios:
        raise NotRun(f"smooth_clip was {NOT_RUN}")
    near = sum(ratio <= 1.05 for ratio in ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    figure = f"within 5% in {near} of {len(ratios)} settings; {spread}"
    return Outcome(max(ratios) <= 2.0, figure)


def _spiky(method: str, most: float) -> Callable[[Found], Outcome]:
    """Under spikes of the gradient and of the batch, against the customary threshold."""

    def test(found: Found) -> Outcome:
        figures, held = [], True
        for task in (MOMENTUM, ADAMW):
            for setting in ("spikes", "wrong labels"):
                ratio = found.over(task, setting, method, ONE)
                held &= ratio <= most
                figures.append("diverged" if math.isnan(ratio) else f"{ratio:.3f}")
        return Outcome(
            held, "loss over clip_by_global_norm(1.0), momentum and AdamW: " + ", ".join(figures)
        )

    return test


CLAIMS = (
    Claim(
        "Pascanu et al. 2012, arXiv:1211.5063",
        "A clip of the norm lets a recurrent network train whose gradient explodes.",
        "adding problem: less than 0.95 of the loss without, and fewer runs diverge",
        _exploding,
    ),
    Claim(
        "Zhang et al. 2019, arXiv:1905.11881",
        "Clipped descent bears larger steps and arrives at a lower loss.",
        "transformer, momentum: a lower loss at a larger learning rate than without",
        _faster,
    ),
    Claim(
        "Zhang et al. 2019, arXiv:1905.11881",
        "A smooth clip does what the hard one does, up to a constant.",
        "loss at most 2 times the hard clip's under every setting",
        _smooth,
    ),
    Claim(
        "Zhang et al. 2020, arXiv:1912.03194",
        "Under noise with heavy tails SGD needs a clip.",
        "quadratic, Student's t: at most a twentieth of the loss without",
        _loss_ratio("quadratic", "heavy tails", FIXED, NO_CLIP, 0.05),
    ),
    Claim(
        "Zhang et al. 2020, arXiv:1912.03194",
        "There, a clip entry by entry does better than one by the norm.",
        "quadratic, Student's t: at most half of the loss of the best threshold on the norm",
        _loss_ratio("quadratic", "heavy tails", "clip_by_value", FIXED, 0.5),
    ),
    Claim(
        "Zhang et al. 2020, arXiv:1912.03194",
        "Under Gaussian noise a clip gains nothing.",
        "quadratic, Gaussian: the best threshold within 5% of no clip",
        _loss_ratio("quadratic", "gaussian", FIXED, NO_CLIP, 1.05, least=0.95),
    ),
    Claim(
        "Merad and Gaïffas 2023, arXiv:2309.17316",
        "A clip at a quantile makes SGD robust against heavy tails.",
        "quadratic, Student's t, `clip_by_quantile`: at most a fifth of the loss without",
        _loss_ratio("quadratic", "heavy tails", "clip_by_quantile", NO_CLIP, 0.2),
    ),
    Claim(
        "Seetharaman et al. 2020, arXiv:2007.14469",
        "One percentile does for a loss of any scale.",
        "deep network, loss times 1e-5 and 20, rate divided by as much: within 2%, a fixed "
        "threshold is not",
        _any_units,
    ),
    Claim(
        "Brock et al. 2021, arXiv:2102.06171",
        "AGC lets networks without normalization train with large batches.",
        "deep network: at batch 1024 at most 0.95 of the loss without; a larger gain than at 16",
        _large_batches,
    ),
    Claim(
        "Kumar et al. 2025, arXiv:2504.02507",
        "ZClip ends lower than a fixed threshold of 1 where the loss spikes.",
        "transformers with spikes and with wrong labels: below 0.99 of `clip_by_global_norm(1.0)`",
        _spiky("zclip", 0.99),
    ),
    Claim(
        "Wang et al. 2025, arXiv:2502.11034",
        "AdaGC ends lower than a fixed threshold of 1.",
        "transformer, AdamW, clean: below 0.99 of `clip_by_global_norm(1.0)`",
        _loss_ratio(ADAMW, "clean", "adagc", ONE, 0.99),
    ),
    Claim(
        "Huang et al. 2025, arXiv:2501.06842",
        "SPAM's clip by entries cures spikes of the gradient under Adam.",
        "transformer, AdamW, spikes: below 0.99 of the loss without a clip",
        _loss_ratio(ADAMW, "spikes", "spam_clip", NO_CLIP, 0.99),
    ),
    Claim(
        "Tang et al. 2023, arXiv:2302.09178",
        "Clippy trains a ranker with Adagrad better than a clip of the gradient.",
        "ranker: below 0.99 of the best threshold on the norm",
        _loss_ratio("ranker", "rare features", "clippy", FIXED, 0.99),
    ),
    Claim(
        "Shazeer and Stern 2018, arXiv:1804.04235",
        "A bound on the RMS of each update steadies an adaptive optimizer better than a clip of "
        "the gradient.",
        "transformer, AdamW, spikes: `clip_by_block_rms` after it below 0.99 of the best threshold "
        "on the norm",
        _loss_ratio(ADAMW, "spikes", "clip_by_block_rms", FIXED, 0.99),
    ),
    Claim(
        "Brock et al. 2021, arXiv:2102.06171",
        "Top-1 accuracies of NFNets on ImageNet at batch 4096.",
        "needs ImageNet and accelerators",
    ),
    Claim(
        "Kumar et al. 2025; Wang et al. 2025; Huang et al. 2025",
        "Perplexities and downstream scores of language models from 60M to 10B parameters.",
        "the transformer here has 42,000 parameters and 300 steps",
    ),
    Claim(
        "Andrew et al. 2019, arXiv:1905.03871",
        "The online quantile finds the clip of private federated learning.",
        "privacy and clients are outside of what this library does",
    ),
)
"""In the order of their years, those that cannot be tested last."""
