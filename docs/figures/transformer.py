"""Draws a run of examples/fsdp_transformer.py, for docs/transformer.md.

    python docs/figures/transformer.py runs/transformer

The loss, and the norm of the gradient against the threshold.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

PICTURE = Path(__file__).parents[1] / "images/transformer.png"
BLUE, GRAY, ORANGE = "#0072B2", "#888888", "#D55E00"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "figure.facecolor": "white",
    "font.size": 13,
    "legend.frameon": False,
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Two panels over the steps of a log."""
    steps = np.array([row["step"] for row in rows])
    spikes = np.array([bool(row["spike"]) for row in rows])
    norms = np.array([row["clip/norm"] for row in rows])
    figure = Figure(figsize=(6, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.plot(steps, [row["loss"] for row in rows], color=BLUE)
    top.set(title="Loss", ylim=(0, None))
    bottom.semilogy(steps, norms, color=GRAY, lw=1)
    bottom.plot(steps[spikes], norms[spikes], "v", ms=8, color=ORANGE, label="spike")
    thresholds = [row["clip/threshold"] for row in rows]
    bottom.plot(steps, thresholds, color="black", lw=2, label="threshold")
    bottom.set(title="Gradient norm", xlabel="step")
    bottom.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    bottom.minorticks_off()
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    return figure


def main() -> None:
    """Draws the run that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder that the example wrote (its --out)")
    log = parser.parse_args().run / "steps.jsonl"
    if not log.is_file():
        parser.error(f"there is no {log}: run examples/fsdp_transformer.py with --out first")
    lines = log.read_text("utf-8").splitlines()
    with mpl.rc_context(STYLE):
        draw([json.loads(line) for line in lines]).savefig(PICTURE, dpi=150)
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
