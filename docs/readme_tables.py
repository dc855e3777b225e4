"""Writes the tables of methods in README.md, from the methods' own signatures and docstrings.

python docs/readme_tables.py            write them
python docs/readme_tables.py --check    exit with 1 if README.md says anything else
"""

import argparse
import inspect
import re
import sys
from pathlib import Path

import optclip
from optclip import catalogue

README = Path(__file__).parents[1] / "README.md"

COLUMNS = ("method", "what it does", "like")

OF_LEARNING = ("learn_from", "patience")
"""Arguments of which README.md speaks once for all."""

_PLACE = re.compile(
    r"(?P<begin><!-- methods: (?P<family>\w+)[^>]*-->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def written(readme: str) -> str:
    """README.md with its tables as they should be.

    Args:
        readme: The text as it is, with a pair of comments around the table of each family.

    Raises:
        ValueError: If the text has no place for a family, or one for something else.
    """
    places = [place["family"] for place in _PLACE.finditer(readme)]
    if sorted(places) != sorted(catalogue.FAMILIES):
        raise ValueError(f"README.md has places for {places}, there are {list(catalogue.FAMILIES)}")
    return _PLACE.sub(lambda place: place["begin"] + _table(place["family"]) + place["end"], readme)


def _table(family: str) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for method in catalogue.methods():
        if method.family == family:
            cited = [f"[{paper.authors} {paper.year}]({paper.url})" for paper in method.papers]
            like = "; ".join(filter(None, [method.like, *cited]))
            file = Path(inspect.getfile(getattr(optclip, method.name))).relative_to(README.parent)
            rows.append(
                (f"[`{_call(method)}`]({file.as_posix()})", method.summary.rstrip("."), like)
            )
    lines = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join(line.replace("|  |", "| |").replace(" --- ", "---") for line in lines) + "\n"


def _call(method: catalogue.Method) -> str:
    hidden = {x.name for x in catalogue.plumbing(catalogue.methods())}
    hidden |= set() if method.wraps else {*OF_LEARNING}
    shown = [x for x in method.arguments if x.name not in hidden]
    named = [str(x) for x in shown if x.keyword_only]
    positional = [str(x) for x in shown if not x.keyword_only]
    return f"{method.name}({', '.join([*positional, *(['*', *named] if named else [])])})"


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
