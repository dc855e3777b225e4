"""Against other people's packages, over long runs.

They need torch: `pip install -e ".[parity]"`, then `pytest -m parity` (with `-rP`, the deviations
too). A peer is imported where it is used, so that these tests can be collected, and left out,
without it.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.streams import (
    SIZE,
    STEPS,
    Stream,
    assert_run_close,
    deviation,
    gradients_of,
    leaves_of,
    norms_of,
    run_stream,
)

import optclip
from optclip import thresholds

pytestmark = pytest.mark.parity

NOISES = {"quiet": 0.02, "usual": 0.2, "loud": 1.0}
each_noise = pytest.mark.parametrize("noise", NOISES)


def single(number):
    """What a float32 holds of a number: what our clips work with."""
    return float(np.float32(number))


def run_of(noise):
    """Gradients of norm 1, shifts and spikes apart, and none without a lesson: peers take all."""
    return gradients_of(Stream(NOISES[noise], holes=(), seed=4))


def leafwise_run(noise):
    """Gradients whose leaves have norms of their own."""
    random, parts = np.random.default_rng(5), []
    for place, leaf in enumerate(leaves_of(np.zeros((1, SIZE)))):
        direction = random.normal(size=leaf.shape[1])
        norms = norms_of(Stream(NOISES[noise], (0.02, 0.5, 0.001)[place], seed=place))
        parts.append(np.outer(norms, direction / np.linalg.norm(direction)))
    return np.concatenate(parts, axis=1).astype(np.float32)


class Model:
    """Parameters in torch, a flat tensor for each leaf, and what becomes of their gradients.

    In float64, in which the peers make no error to speak of.
    """

    def __init__(self):
        import torch

        self.tensor = torch.tensor
        parts = leaves_of(np.ones(SIZE))
        self.module = torch.nn.ParameterList(torch.nn.Parameter(torch.tensor(x)) for x in parts)

    def applied(self, rows, step, read=lambda parameter: parameter.grad):
        """What `read` finds of every leaf after a step with each of the gradients."""
        result = []
        for row in rows:
            for parameter, part in zip(self.module, leaves_of(row.astype(np.float64)), strict=True):
                parameter.grad = self.tensor(part)
            step()
            result.append(np.concatenate([read(x).numpy() for x in self.module]))
        return np.array(result)


def assert_same(result, applied, rows):
    """The same entries at every step, in a run in which some are clipped and some are not."""
    assert 0.001 < np.mean(np.abs(applied) < np.abs(rows) * (1 - 1e-4)) < 0.999
    print(f"deviation {deviation(result.updates, applied):.1e}")
    assert_run_close(result.updates, applied, "entries")


@each_noise
@pytest.mark.parametrize("ord", [1.0, 1.5, 2.0, 4.0, math.inf])
def test_torch_clip_grad_norm(ord, noise):
    import torch

    model, rows = Model(), run_of(noise)

    def step():  # It divides by the norm + 1e-6.
        torch.nn.utils.clip_grad_norm_(model.module, 1.2, norm_type=ord)

    result = run_stream(optclip.clip_by_global_norm, rows, {"max_norm": 1.2}, {"ord": ord})
    assert_same(result, model.applied(rows, step), rows)


@each_noise
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("reciprocal", {"mode": "zscore", "clip_option": "adaptive_scaling"}),
        ("mean", {"mode": "zscore", "clip_option": "mean"}),
        ("max", {"mode": "percentile"}),
    ],
)
def test_zclip(variant, options, noise):
    from zclip import ZClip

    # By default the package also clips to norm 1.
    peer, model = ZClip(alpha=single(0.97), max_grad_norm=None, **options), Model()
    rows = run_of(noise)
    result = run_stream(optclip.zclip, rows, {}, {"variant": variant})
    applied = model.applied(rows, lambda: peer.step(model.module))
    assert_same(result, applied, rows)


def of_the_past(rule):
    """The threshold that a rule had for the step before: from history without this step."""

    def init(norms):
        return rule.init(norms), jnp.full(norms.shape, jnp.inf, norms.dtype)

    def observe(memory, step, norms, clipped_norms):
        learned = rule.observe(memory[0], step, norms, clipped_norms)
        return learned, rule.threshold(memory[0], step, norms, None)

    return thresholds.Rule(
        init, lambda memory, step, norms, params: memory[1], observe, has_memory=True
    )


def clip_by_past_quantile(percentile, window):
    return optclip.clip_by(of_the_past(thresholds.quantile_over_window(percentile, window)))


@each_noise
@pytest.mark.parametrize(("quantile", "window"), [(0.9, 1000), (0.5, 30)])
def test_autoclip_of_the_past(quantile, window, noise):
    """The package leaves the present norm out, unlike the paper and `optclip.autoclip`."""
    from autoclip.torch import QuantileClip

    model, rows = Model(), run_of(noise)
    peer = QuantileClip(
        model.module.parameters(),
        quantile=quantile,
        history_length=window,
        global_threshold=True,
    )
    result = run_stream(
        clip_by_past_quantile, rows, {"percentile": 100 * quantile}, {"window": window}
    )
    assert_same(result, model.applied(rows, peer.step), rows)


@each_noise
@pytest.mark.parametrize(
    "setting",
    [
        {"relative": 1.05, "decay": 0.98, "warmup_steps": 100, "max_norm": 1.0},
        {"relative": 1.5, "decay": 0.9, "warmup_steps": 10, "max_norm": 0.3},
    ],
)
def test_adagc(setting, noise):
    from pytorch_optimizer import AdaGC

    model, rows = Model(), leafwise_run(noise)
    # Without a first moment, its average of gradients is the clipped gradient.
    peer = AdaGC(
        model.module.parameters(),
        betas=(0.0, 0.999),
        beta=single(setting["decay"]),
        lambda_rel=single(setting["relative"]),
        lambda_abs=single(setting["max_norm"]),
        warmup_steps=setting["warmup_steps"],
        weight_decay=0.0,
    )
    applied = model.applied(rows, peer.step, lambda x: peer.state[x]["exp_avg"])
    assert_same(run_stream(optclip.adagc, rows, setting), applied, rows)


@pytest.mark.parametrize("theta", [5000.0, 50.0])
def test_spam(theta):
    """The package clips from its twentieth step on; an entry of v = 0, which it would set to 0,
    does not occur. It clips gradients in place."""
    from pytorch_optimizer import SPAM

    random = np.random.default_rng(6)
    rows = random.normal(size=(STEPS, SIZE)) * 10 ** random.uniform(-2, 2, SIZE)
    spikes = random.random(rows.shape) < 0.005
    rows[spikes] *= 10 ** random.uniform(1, 4, spikes.sum())
    rows, model = rows.astype(np.float32), Model()
    peer = SPAM(
        model.module.parameters(),
        betas=(0.9, single(0.999)),
        threshold=theta,
        update_proj_gap=10**9,
    )
    result = run_stream(optclip.spam_clip, rows, {"threshold": theta, "warmup_steps": 19})
    assert_same(result, model.applied(rows, peer.step), rows)


def test_pytorch_optimizer_stable_adamw():
    """Whose RMS has eps^2 under v too; of its weights what one step adds."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    setting = {"weight_decay": 0.1, "eps": 1e-6}
    rows, model = run_of("usual"), Model()
    optimizer = pytorch_optimizer.StableAdamW(
        model.module.parameters(), lr=0.1, betas=(0.9, 0.99), kahan_sum=False, **setting
    )
    after = model.applied(rows, optimizer.step, read=lambda parameter: parameter.detach().clone())
    params = np.concatenate([np.ones((1, SIZE)), after[:-1]])
    result = run_stream(
        lambda **given: optclip.stable_adamw(0.1, b2=0.99, **given), rows, setting, params=params
    )
    assert np.mean(result.readings["clip/norm"] > 1.001) > 0.01
    own = np.max(np.abs(result.updates - (after - params))) / 0.1
    print(f"updates, of the learning rate: {own:.1e}")
    assert own <= 1e-4
