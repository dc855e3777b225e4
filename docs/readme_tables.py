"""Writes the tables of methods in README.md, from the methods' own signatures and docstrings.

python docs/readme_tables.py            write them
python docs/readme_tables.py --check    exit with 1 if README.md says anything else
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from optclip import catalogue

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WORDS = ROOT / "docs/data/readme.toml"

_PLACE = re.compile(
    r"(?P<begin><!-- methods: (?P<group>\w+)[^>]*-->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def written(readme: str) -> str:
    """README.md with its tables as they should be.

    Args:
        readme: The text as it is, with a pair of comments around each table.

    Returns:
        The text with new tables.

    Raises:
        ValueError: If a method or a group is missing, in the words or in the text, or unknown.
    """
    groups = tomllib.loads(WORDS.read_text(encoding="utf-8"))
    named = [name for group in groups.values() for name in group["methods"]]
    known = [method.name for method in catalogue.methods()]
    if sorted(named) != sorted(known):
        odd = sorted(set(named) ^ set(known)) or "one of them twice"
        raise ValueError(f"{WORDS.name} must name every method once; look at {odd}")
    places = [place["group"] for place in _PLACE.finditer(readme)]
    if sorted(places) != sorted(groups):
        raise ValueError(f"README.md has places for {places}, {WORDS.name} has {list(groups)}")
    return _PLACE.sub(
        lambda place: place["begin"] + _table(groups[place["group"]]) + place["end"], readme
    )


def _table(group: dict[str, Any]) -> str:
    columns = group["columns"]
    hidden = {x.name for x in catalogue.plumbing(catalogue.methods())} | set(
        group.get("hidden", ())
    )
    rows = [columns, ["---"] * len(columns)]
    for name, words in group["methods"].items():
        method = catalogue.named(name)
        cells = [f"[`{_call(method, hidden)}`]({_page(name)})", words["bounds"]]
        if len(columns) > 2:
            papers = method.papers if words.get("papers", True) else ()
            cited = [f"[{paper.authors} {paper.year}]({paper.url})" for paper in papers]
            cells.append("; ".join([*filter(None, [words.get("like")]), *cited]))
        rows.append(cells)
    lines = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join(line.replace("|  |", "| |").replace(" --- ", "---") for line in lines) + "\n"


def _call(method: catalogue.Method, hidden: Collection[str]) -> str:
    shown = [x for x in method.arguments if x.name not in hidden]
    named = [str(x) for x in shown if x.keyword_only]
    positional = [str(x) for x in shown if not x.keyword_only]
    return f"{method.name}({', '.join([*positional, *(['*', *named] if named else [])])})"


def _page(name: str) -> str:
    """The page with the section of a method."""
    directive = f"autofunction:: optclip.{name}\n"
    for page in sorted((ROOT / "docs/methods").glob("*.md")):
        if directive in page.read_text(encoding="utf-8"):
            return page.relative_to(ROOT).as_posix()
    raise ValueError(f"no page of docs/methods has the directive {directive.strip()!r}")


def main() -> None:
    """Runs the script from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = written(old)
    if options.check:
        if new != old:
            sys.exit("the tables of README.md are out of date; run: python docs/readme_tables.py")
        return
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
