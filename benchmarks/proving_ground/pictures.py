"""The pictures: who wins where, losses by learning rate, and by threshold and learning rate."""

from pathlib import Path

from benchmarks.proving_ground import jobs, rates_picture, summary_picture, thresholds_picture
from benchmarks.proving_ground.reporting import Row
from benchmarks.proving_ground.running import Order, job


def draw(orders: list[Order], found: list[Row], folder: Path) -> list[Path]:
    """Draws all pictures.

    Args:
        orders: What was meant to run; what is not there is left out.
        found: The scores of it.
        folder: Where the pictures go.

    Returns:
        The files that were written.
    """
    results = [result for order in orders if (result := jobs.read(job(order))) is not None]
    summary_picture.draw(folder / "summary.png", found)
    written = [folder / "summary.png"]
    for name, picture in (("rates.png", rates_picture), ("thresholds.png", thresholds_picture)):
        if picture.draw(folder / name, results):
            written.append(folder / name)
    return written
