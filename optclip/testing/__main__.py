"""`python -m optclip.testing`: what does a clip keep to?"""

import sys

if __name__ == "__main__":
    try:
        from optclip.testing._command import main
    except ImportError as error:
        if error.name not in ("hypothesis", "rich"):
            raise
        sys.exit(f'{error.name} is not installed: pip install "optclip[testing]"')
    sys.exit(main())
