"""The gallery's scripts run, in small, and their committed tables are those of the scripts."""

import re
import sys

import jax
import matplotlib as mpl
import numpy as np
import pytest
from helpers.scripts import DOCS, script

GALLERY = DOCS / "gallery"
SCRIPTS = {path.stem for path in GALLERY.glob("*.py")} - {"figures"}
SMALL = {  # sizes, and the shape of its arrays
    "agc": ({"steps": 2, "names": ("no clip", "adaptive_grad_clip(0.1)")}, (9, 2)),
    "exploding": ({"steps": 3, "seeds": 1}, (7, 1, 3)),
    "heavy_tails": ({"steps": 3, "seeds": 2, "names": ("no clip",)}, (2, 3)),
    "spikes": ({"steps": 3, "names": ("robust_clip()",)}, (3, 3)),
    "too_low": ({"steps": 30}, (2, 18, 30)),
    "truncation": ({"steps": 2, "thresholds": 20}, (2, 20)),
    "vanishing": ({"steps": 3, "seeds": 2}, (8, 2, 2, 3)),
}


def labels(table):
    """The first column of a table, without the headings, which have none."""
    lines = table.partition("\n\n# jax")[0].splitlines()
    return [re.split(r"  +|(?<=\)) ", line)[0] for line in lines if line.strip()]


@pytest.fixture
def module(request, monkeypatch):
    """A script of the gallery; `figures` stands beside it. Compiling takes nearly all the time."""
    monkeypatch.syspath_prepend(str(GALLERY))
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield script(GALLERY / f"{request.param}.py")
    sys.modules.pop("figures", None)
    jax.config.update("jax_disable_most_optimizations", quick)


def test_every_script_has_a_page_a_table_and_a_picture():
    assert set(SMALL) == SCRIPTS
    pages = {path.stem for path in GALLERY.glob("*.md")} - {"index"}
    assert pages == SCRIPTS
    for name in SCRIPTS:
        text = (GALLERY / f"{name}.md").read_text("utf-8")
        assert f"python docs/gallery/{name}.py" in text
        assert f"{{literalinclude}} {name}.txt" in text
        assert f"](../images/gallery_{name}.png)" in text
        picture = GALLERY.parent / f"images/gallery_{name}.png"
        assert 10_000 < picture.stat().st_size < 150_000


@pytest.mark.parametrize("module", sorted(SMALL), indirect=True)
def test_a_script_runs_in_small_and_its_committed_table_has_its_rows(module):
    import figures

    sizes, shape = SMALL[module.__name__]
    results = module.compute(**sizes)
    arrays = [x for x in jax.tree.leaves(results) if np.ndim(x) > 0]
    assert sum(x.shape == shape for x in arrays) >= 2
    # A learned threshold is infinite at first.
    assert not any(np.isnan(x).any() for x in arrays)

    table = module.table(results)
    committed = (GALLERY / f"{module.__name__}.txt").read_text("utf-8")
    assert "\n\n# jax " in committed
    assert set(labels(table)) <= set(labels(committed))
    for of in ("VARIANTS", "CLIPS", "OPTIMIZERS"):
        for name in getattr(module, of, ()):
            assert name in committed, "a variant has no row: run the script"

    with mpl.rc_context(figures.STYLE):
        figure = module.draw(results)
    assert figure.get_figwidth() == 6
    assert all(axes.has_data() for axes in figure.axes)
