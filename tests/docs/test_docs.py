"""What can be told of the documentation without building it.

The build itself runs every code cell and every claim in them: `python -m sphinx -W -b html docs`.
"""

import collections
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest
from helpers.scripts import DOCS, ROOT, script

import optclip
from optclip import catalogue, histograms, limiters, norms, scopes, testing, thresholds, tuning

readme_tables = script(DOCS / "readme_tables.py")
listing = script(DOCS / "_support/listing.py")
pages_code = script(ROOT / "tests/docs/test_pages_code.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
OUTPUT = ("_build", "jupyter_execute", ".jupyter_cache")
PAGES = {
    page.relative_to(DOCS).with_suffix("").as_posix(): listing.filled(page.read_text("utf-8"))
    for page in sorted(DOCS.rglob("*.md"))
    if page.relative_to(DOCS).parts[0] not in OUTPUT
}
each_page = pytest.mark.parametrize("page", PAGES)

RUN_BY_A_TEST = {"logging": "test_logging_recipes"}
"""Pages with blocks of Python that are no cells, and their test; `pages_code` runs more."""

_FENCE = re.compile(r"^( *)(`{3,}|:{3,})([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|data):: (\S+)$", re.MULTILINE)


def blocks(text):
    """(language or directive, content) of every fenced block of backticks."""
    found = (fence.group(2, 3, 4) for fence in _FENCE.finditer(text))
    return [(info.strip(), content) for ticks, info, content in found if ticks[0] == "`"]


def cells(page):
    return [content for info, content in blocks(PAGES[page]) if info.startswith("{code-cell}")]


def pieces(module, kind):
    """Of a module of pieces: their type, the pieces, and the functions that make one."""
    for name, value in vars(module).items():
        made = inspect.isfunction(value) and value.__annotations__.get("return") in (
            kind,
            kind.__name__,
        )
        if not name.startswith("_") and (value is kind or isinstance(value, kind) or made):
            yield f"{module.__name__}.{name}"


def public_names():
    modules = {"histograms", "limiters", "norms", "scopes", "thresholds"}
    yield from (f"optclip.{name}" for name in optclip.__all__ if name not in modules)
    for module in (thresholds, tuning, testing, catalogue):
        yield from (f"{module.__name__}.{name}" for name in module.__all__)
    yield from pieces(norms, norms.Norm)
    yield from pieces(scopes, scopes.Scope)
    yield from pieces(limiters, limiters.Limiter)
    yield "optclip.scopes.fan_in_axes"
    yield from (f"optclip.histograms.{name}" for name in ("merged", "middles", "quantile"))
    yield from (f"optclip.histograms.{histograms.NormHistogram.__name__}",)


def test_every_public_name_is_documented_once():
    documented = collections.Counter(
        name for text in PAGES.values() for name in _DIRECTIVE.findall(text)
    )
    public = set(public_names())
    assert {
        "optclip.zclip",
        "optclip.norms.l2",
        "optclip.norms.lp",
        "optclip.tuning.sweep",
    } < public
    assert public - set(documented) == set(), "no page has them"
    assert set(documented) - public == set(), "not public"
    assert [name for name, times in documented.items() if times > 1] == []


def test_every_module_without_an_underscore_is_documented():
    """By one of its own names, or as the command line."""
    documented = {name for text in PAGES.values() for name in _DIRECTIVE.findall(text)}
    modules = {m.name for m in pkgutil.walk_packages(optclip.__path__, "optclip.")}
    public = {name for name in modules if not re.search(r"\._|\.cli$", name)}
    assert {"optclip.clipping", "optclip.methods.fixed", "optclip.tuning"} < public
    for name in public:
        module = importlib.import_module(name)
        own = {
            f"optclip.{value}" if hasattr(optclip, value) else f"{parent}.{value}"
            for value in vars(module)
            for parent in (name, name.rpartition(".")[0])
        }
        assert own & documented, f"{name} is public, and no page has any of it"


@each_page
def test_a_page_has_something_to_run(page):
    shells = [info for info, _ in blocks(PAGES[page]) if info in ("", "bash", "sh")]
    with_cells = [p for p in PAGES if p.partition("/")[0] == page.partition("/")[0] and cells(p)]
    # An index of pages with cells needs none of its own.
    index = page.endswith("/index") and len(with_cells) > 1
    tested = page in RUN_BY_A_TEST or page in pages_code.PAGES
    assert cells(page) or shells or index or tested


@each_page
def test_python_is_a_cell_or_run_by_a_test(page):
    loose = [content for info, content in blocks(PAGES[page]) if re.match(r"py|python", info)]
    if page in pages_code.PAGES:
        assert len(loose) == len(pages_code.blocks(page)) > 0, "one is indented, or has options"
    elif page in RUN_BY_A_TEST:
        assert f"docs/{page}.md" in (ROOT / f"tests/docs/{RUN_BY_A_TEST[page]}.py").read_text()
    else:
        assert not loose
    if cells(page):
        assert PAGES[page].startswith("---\nfile_format: mystnb\n"), "its cells would not be run"


@each_page
def test_cells_are_python(page):
    for content in cells(page):
        code = re.sub(r"\A(---\n.*?\n---\n|(:[^\n]*\n)+)", "", content, flags=re.DOTALL)
        compile(code, page, "exec")


def test_the_toctree_reaches_every_page():
    reached, waiting = set(), ["index"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        folder = pathlib.PurePosixPath(page).parent
        for info, content in blocks(PAGES[page]):
            if info != "{toctree}":
                continue
            lines = [line.strip() for line in content.splitlines()]
            entries = [line for line in lines if line and line[0] != ":"]
            names = {re.sub(r"^.* <(.*)>$", r"\1", entry) for entry in entries} - {"self"}
            waiting += {(folder / name).as_posix() for name in names} - reached
    assert reached == set(PAGES)


@each_page
def test_no_path_of_a_machine(page):
    assert not re.search(r"(?<![\w.])/(tmp|work|home|root|Users|mnt)/", PAGES[page])


def test_links_to_files_lead_somewhere():
    for text, folder in [(PAGES[page], (DOCS / page).parent) for page in PAGES] + [
        ((ROOT / "README.md").read_text(), ROOT)
    ]:
        for target in re.findall(r"\]\(([^)#:\s]+\.\w+)\)", text):
            assert (folder / target).exists(), target


def test_what_the_tables_of_the_readme_say_is_right():
    """A row may be missing: whoever adds a method need not write it. `.ci/run` wants all."""
    right = readme_tables.written(README).splitlines()
    kept = [line for line in right if line in README.splitlines()]
    assert README.splitlines() == kept, "run: python docs/readme_tables.py"


def test_a_table_cannot_go_stale():
    stale = README.replace("z_threshold=2.5", "z_threshold=3.0")
    assert stale != README
    assert "z_threshold=3.0" not in readme_tables.written(stale)
    assert readme_tables.written(stale) == readme_tables.written(README)


def test_a_table_without_a_place_is_refused():
    with pytest.raises(ValueError, match="has places for"):
        readme_tables.written(README.replace("<!-- methods: learned,", "<!-- "))


@each_page
def test_every_comment_of_a_page_is_filled(page):
    assert not re.search(r"^<!-- (methods|rules|summaries|table)", PAGES[page], re.MULTILINE)
