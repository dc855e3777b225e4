"""Asks clips of Optax, public trainers and optclip for their contracts, for docs/testing.md.

python docs/contracts_table.py                         all, into docs/data/contracts.json
python docs/contracts_table.py optax.clip remade       those whose names begin so
"""

import importlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

from optclip.testing import CONTRACTS, report
from optclip.testing._command import devices

HERE = Path(__file__).parent
FILE = HERE / "data/contracts.json"

CLIPS = (
    "optax.clip",
    "optax.clip_by_block_rms",
    "optax.clip_by_global_norm",
    "optax.adaptive_grad_clip",
    "remade.clip_by_history",
    "remade.drop_by_average",
    "optclip.clip_by_global_norm",
    "optclip.adaptive_grad_clip",
    "optclip.clip_by_window",
    "optclip.robust_clip",
)


def main(begins: list[str]) -> None:
    """Writes what came of it, beside what is there of others."""
    devices()
    sys.path.insert(0, str(HERE / "_support"))
    kept = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    wanted = [clip for clip in CLIPS if not begins or clip.startswith(tuple(begins))]
    with tqdm(total=len(wanted) * len(CONTRACTS), unit="contract") as bar:
        for clip in wanted:
            module, name = clip.split(".")
            bar.set_description(clip)
            found = report(
                getattr(importlib.import_module(module), name), progress=lambda _: bar.update()
            )
            kept[clip] = {
                x.contract: {"kept": x.kept, "findings": x.findings, "not_asked": x.not_asked}
                for x in found.results
            }
    ordered = {clip: kept[clip] for clip in CLIPS if clip in kept}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
