"""The look of the gallery's figures: no background, and grays and colors for light and dark."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Each has a contrast of 3 or more to white and to the dark theme's #121212.
GRAY, BLUE, ORANGE, GREEN, RED, PURPLE = (
    "#7f7f7f",
    "#2f82d6",
    "#c87800",
    "#1f9460",
    "#de4a4a",
    "#9a63d1",
)

set_matplotlib_formats("svg")
plt.rcParams.update(
    {
        "axes.edgecolor": GRAY,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": GRAY,
        "axes.labelsize": 12,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": GRAY,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "figure.facecolor": "none",
        "font.size": 12,
        "grid.alpha": 0.25,
        "grid.color": GRAY,
        "legend.fontsize": 11,
        "legend.frameon": False,
        "legend.labelcolor": GRAY,
        "lines.linewidth": 1.6,
        "savefig.facecolor": "none",
        "svg.hashsalt": "optclip",
        "text.color": GRAY,
        "xtick.color": GRAY,
        "ytick.color": GRAY,
    }
)


def stacked(rows: int, height: float = 2.9) -> tuple[Figure, list[plt.Axes]]:
    """Panels below each other, so that they stay readable on a narrow screen."""
    figure, axes = plt.subplots(
        rows, figsize=(6.4, height * rows), squeeze=False, layout="constrained"
    )
    return figure, list(axes[:, 0])
