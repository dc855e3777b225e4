"""What all pictures of this folder share: their colors, and what they say without matplotlib."""

# From Okabe and Ito's palette, which the color-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GRAY, DARK, INK = "#999999", "#444444", "#222222"

NEED_MATPLOTLIB = 'pictures need matplotlib: pip install "optclip[tuning]"'

FEW_POINTS = 30
"""Lines of so many points at the most have a mark at each."""
