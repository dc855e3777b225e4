"""The scripts of docs/figures run, in small."""

import numpy as np
import pytest
from helpers.scripts import DOCS, script

import optclip

FIGURES = DOCS / "figures"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(FIGURES)


def figure_of(name):
    return script(FIGURES / f"{name}.py")


def test_a_clip_lets_through_what_it_is_drawn_with():
    fixed = figure_of("fixed")
    norms = np.array([0.0, 0.5, 4.0])
    np.testing.assert_allclose(fixed.left("clip_by_global_norm", norms), [0, 0.5, 1])
    np.testing.assert_allclose(fixed.left("smooth_clip", norms), [0, 1 / 3, 0.8], rtol=1e-6)


def test_a_broken_batch_is_seen_in_loss_and_norm():
    network = figure_of("small_network")
    run = network.train(
        network.regression,
        network.noisy_sine,
        optclip.measure_norms(),
        change=lambda step, targets: targets * (1 + 99 * (step == 20)),
        steps=30,
    )
    assert run["loss"].argmax() == run["clip/norm"].argmax() == 20


def test_the_runs_of_a_page_are_drawn(monkeypatch, tmp_path):
    def flat(*_, steps, **__):
        names = ("loss", "clip/norm", "clip/clipped_norm", "clip/threshold", "clip/clip_rate")
        return dict.fromkeys(names, np.ones(steps))

    for name in ("metrics", "loss_spiked"):
        figure = figure_of(name)
        monkeypatch.setattr(figure, "train", flat)
        monkeypatch.setattr(figure, "PICTURE", tmp_path / f"{name}.png")
        figure.main()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_the_transformer_is_drawn():
    row = {"loss": 1.0, "clip/norm": 1.0, "clip/threshold": 2.0, "spike": False}
    rows = [row | {"step": n, "spike": n == 5} for n in range(9)]
    assert len(figure_of("transformer").draw(rows).axes) == 2
