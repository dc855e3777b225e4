"""Imports run one way, bring nothing that is not needed, and take no time."""

import ast
import pathlib
import subprocess
import sys

import pytest

import optclip

PACKAGE = pathlib.Path(optclip.__file__).parent

LAYERS = (
    {"_jax"},
    {"_numerics", "_paths", "_checks", "_zeros", "_programs"},
    {"_matrices"},
    {"norms", "_potential"},
    {"scopes", "limiters", "thresholds"},
    {"_tree"},
    {"state"},
    {"clipping"},
    {"histograms"},
    {"methods"},
    {"readings", "restoring"},
    {"optclip"},
    {"_tuning", "catalogue"},
    {"tuning"},
    {"cli"},
    {"testing", "__main__"},
)
"""A module may import from its own layer and from those before it, but not in a circle."""

OUTSIDE = {"jax", "numpy", "optax"}
"""What else a module may import; numpy comes with jax."""

ANYTHING = {"_tuning", "tuning", "cli", "testing", "__main__"}
"""On top, with extras of its own."""


def modules():
    """From module name ("norms", "methods.adaptive", "optclip" for the package) to source."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__") or "optclip", file.read_text()


def imports(name, source):
    """(modules of the package, other packages) that a module imports, anywhere in its source."""
    inside, outside = set(), set()
    known = dict(modules())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for path in found:
            package, *rest = path.split(".")
            if package != "optclip":
                outside.add(package)
                continue
            while rest and ".".join(rest) not in known:  # A name in a module, not a module.
                rest = rest[:-1]
            inside.add(".".join(rest) or "optclip")
    return inside, outside


def layer_of(name):
    (layer,) = (place for place, names in enumerate(LAYERS) if name.split(".")[0] in names)
    return layer


@pytest.mark.parametrize("name", dict(modules()))
def test_imports_run_one_way(name):
    inside, outside = imports(name, dict(modules())[name])
    assert not [other for other in inside if layer_of(other) > layer_of(name)]
    top = name.split(".")[0]
    if top not in ANYTHING:
        assert outside - sys.stdlib_module_names <= OUTSIDE
        assert "tuning" not in {other.split(".")[0] for other in inside}


def test_imports_do_not_run_in_a_circle():
    known = dict(modules())
    left = {name: imports(name, source)[0] & known.keys() for name, source in known.items()}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_the_lowest_layers_do_not_know_each_other():
    known = dict(modules())
    for lower in LAYERS[:2]:
        for name in lower:
            assert not imports(name, known[name])[0] & lower


def import_after_optax(cache):
    """(packages that `import optclip` loads beyond optax's, its time as a share of optax's).

    Args:
        cache: Where its bytecode is kept, as that of an installed package is.
    """
    code = f"""
import sys, time
start = time.process_time()
import optax
before, optax_there = set(sys.modules), time.process_time()
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(cache)!r}
import optclip
share = (time.process_time() - optax_there) / (optax_there - start)
print(share, *{{name.split('.')[0] for name in set(sys.modules) - before}})
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    share, *packages = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.split()
    return packages, float(share)


@pytest.mark.timing
def test_it_brings_nothing_but_itself_and_takes_no_time(tmp_path):
    packages, share = import_after_optax(tmp_path)
    assert packages == ["optclip"]
    for _ in range(4):  # The first compiles it, and a busy machine adds what is not the import's.
        if share >= 0.1:
            share = import_after_optax(tmp_path)[1]
    assert share < 0.1
