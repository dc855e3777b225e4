"""The blocks of Python of a page run in order, as its reader pastes them, and print what it says.

For pages without cells, which Sphinx would run. To add a page, add its name to `PAGES`.
"""

import contextlib
import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"

PAGES = [
    "coming_from",
    "getting_started",
    "glossary",
    "idea",
    "loss_spiked",
    "metrics",
    "methods/fixed",
    "methods/relative",
    "methods/wrappers",
    "mixed_precision",
    "norms_scopes",
    "reinforcement",
    "resuming",
    "sharding",
    "sharp_edges",
    "testing",
    "which_clip",
]
"""They may use the eight CPU devices of the tests, and write files where they are run."""

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"^ *print\(.*\)  # (\d[\d.]*\d|\d)", re.MULTILINE)
"""A line that prints, and the number that its comment begins with."""


def blocks(page):
    """(place in the file, code) of each."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in _BLOCK.finditer(text)]


@pytest.fixture
def register_once(monkeypatch):
    """A process may export the states of Optax from several tests, and register them once."""
    register = jax.export.register_namedtuple_serialization

    def registered(*args, **kwargs):
        with contextlib.suppress(ValueError):
            register(*args, **kwargs)

    monkeypatch.setattr(jax.export, "register_namedtuple_serialization", registered)


@pytest.mark.usefixtures("register_once")
@pytest.mark.parametrize("page", PAGES)
def test_its_code_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for line, code in blocks(page):
        # Lines before it, so that a traceback has the lines of the page.
        exec(compile("\n" * line + code, DOCS / f"{page}.md", "exec"), names)
        printed = re.findall(r"\d[\d.]*", capsys.readouterr().out)
        for number in _PRINTED.findall(code):
            assert any(word.startswith(number) for word in printed), (number, printed)


@pytest.mark.parametrize("page", PAGES)
def test_its_code_can_be_read(page):
    """On a screen of usual width, and a block at a glance."""
    for _, code in blocks(page):
        assert max(map(len, code.splitlines())) <= 88
        assert len(code.splitlines()) <= 27
