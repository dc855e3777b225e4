"""Writes or checks the pages from the command line."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.parsing import Parser
from benchmarks.proving_ground.claims import Found
from benchmarks.proving_ground.page import __doc__ as about
from benchmarks.proving_ground.page import picture, results, rivals

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results.json"
DOCS = HERE.parents[1] / "docs"
PICTURE = DOCS / "images/proving_ground_summary.png"
PAGES = (DOCS / "proving_ground.md",)


def blocks(report: dict[str, Any], found: Found) -> dict[str, Callable[[], str]]:
    """What can stand in a page, by name.

    Args:
        report: The committed results.
        found: Its scores.
    """
    return {
        "source": lambda: results.source(report),
        "sums": lambda: results.sums(found),
        "settings": lambda: results.settings(found),
        "claims": lambda: results.claims(found),
        "waiting": lambda: results.waiting(found),
        "rivals": lambda: rivals.rivals(found),
    }


def filled(text: str, made_of: dict[str, Callable[[], str]]) -> str:
    """A page with its blocks as the results have them."""
    for name, block in made_of.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            made = f"{begin}\n{block()}\n{end}"
            text = pattern.sub(lambda _, made=made: made, text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the pages.

    Args:
        arguments: The command line; None for that of this process.

    Returns:
        The exit code: 1 if a page is not as it should be.
    """
    parser = Parser(
        prog="python -m benchmarks.proving_ground.page", description=(about or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is old")
    options = parser.parse_args(arguments)
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = Found(report["scores"])
    made_of, old = blocks(report, found), []
    if not options.check:
        picture.draw(PICTURE, found)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = filled(text, made_of)
        if made != text and options.check:
            old.append(page.name)
        elif made != text:
            page.write_text(made, encoding="utf-8")
            print(f"docs/{page.name} written")
    for name in old:
        print(f"docs/{name} is old; run python -m benchmarks.proving_ground.page", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
