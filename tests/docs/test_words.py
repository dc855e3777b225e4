"""How long the documentation is, and words that it does without."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
MOST = 14_000
"""Words of all pages together, without code and the docstrings of the reference."""
LINES = 110
"""Of the README."""

PAGES = {
    page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md"))
    if "_build" not in page.parts
}

AVOIDED = {
    r"mend(s|ed|ing)?": "fix",
    r"behind the optimizer": "after the optimizer",
    r"turns? the gradient": "changes the gradient's direction",
    r"went astray": "diverged",
    r"as it came": "unclipped",
    r"its line": "the line to type",
    r"by rights": "",
    r"to rounding": "up to rounding error",
    r"finer": "smaller",
    r"pip install [\"']?optclip": "it is not published: pip install -e .",
}
"""Words of a translation, and what to write instead; `codespell` looks for British spelling."""


def words(page: str) -> int:
    """Words and numbers outside of code, directives and comments."""
    page = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)
    page = re.sub(r"^(`{3,})[^\n]*\n.*?^\1\s*$", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    return sum(any(c.isalnum() for c in word) for word in page.split())


def test_words_are_counted():
    page = "---\na: b\n---\n# A title\n\nTwo [words](a/link.md). <!-- no -->\n\n```\nx = 1\n```\n"
    assert words(page) == 4


def test_a_person_reads_it_in_one_sitting():
    counted = {name: words(page) for name, page in PAGES.items()}
    assert sum(counted.values()) <= MOST, counted


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_plain_words(page):
    text = PAGES[page] if page in PAGES else (ROOT / "README.md").read_text(encoding="utf-8")
    found = {word: AVOIDED[word] for word in AVOIDED if re.search(rf"\b{word}\b", text, re.I)}
    assert not found, "write this instead"
