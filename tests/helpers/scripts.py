"""Files that are no part of a package, as modules."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


def script(path):
    """A file as a module; nothing is imported under its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
