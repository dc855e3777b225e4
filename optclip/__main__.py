"""`python -m optclip`: the command line."""

import sys

from optclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
