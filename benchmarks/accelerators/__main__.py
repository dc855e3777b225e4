"""`python -m benchmarks.accelerators`: what XLA makes of clips for a GPU and a TPU."""

import sys

from benchmarks.accelerators import targets

if __name__ == "__main__":
    targets.set_environment()
    from benchmarks.accelerators.command import run

    sys.exit(run())
