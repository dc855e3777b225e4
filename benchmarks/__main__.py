"""`python -m benchmarks`: what clips cost."""

import os
import sys

from benchmarks.speed.command import main

if __name__ == "__main__":
    code = main()
    if code == 130:
        # XLA may still be compiling after Ctrl-C, and crashes a Python that shuts down meanwhile.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
