"""The look of the gallery's pictures, and how a script writes its picture and its table.

Every script here has three functions: `compute` trains and returns arrays, `table` makes the text
of them and `draw` the picture. `python docs/gallery/NAME.py` writes both.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

GRAY, BLUE, ORANGE, GREEN, RED, PURPLE = (
    "#7f7f7f",
    "#2f82d6",
    "#c87800",
    "#1f9460",
    "#de4a4a",
    "#9a63d1",
)

STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "figure.facecolor": "white",
    "font.size": 13,
    "grid.alpha": 0.25,
    "grid.color": GRAY,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "lines.linewidth": 2.0,
    "savefig.dpi": 150,
}


def stacked(rows: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Panels below each other, so that they stay readable on a narrow screen."""
    figure = Figure(figsize=(6, height * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False)
    return figure, list(axes[:, 0])


def legend(axes: Axes, columns: int = 2, **which: Any) -> None:
    """Names the lines of a panel below it, where they hide no data."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
    axes.legend(**place, ncols=columns, columnspacing=1.2, **which)


def write(
    script: str, results: Any, table: Callable[[Any], str], draw: Callable[[Any], Figure]
) -> None:
    """Writes `NAME.txt` beside `NAME.py`, and `docs/images/gallery_NAME.png`; prints the text."""
    path = Path(script).resolve()
    made_by = f"# jax {jax.__version__}, {jax.default_backend()}"
    text = f"{table(results).rstrip()}\n\n{made_by}\n"
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    picture = path.parents[1] / f"images/gallery_{path.stem}.png"
    with mpl.rc_context(STYLE):
        draw(results).savefig(buffer := io.BytesIO())
    # 64 colors take a third of the space.
    Image.open(buffer).convert("RGB").quantize(64).save(picture, optimize=True)
    print(f"{text}\n{picture}")
