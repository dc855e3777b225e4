"""What pages list of the methods and rules, from the code: they need no line for a new one.

`conf.py` fills a page before it is parsed, where it has one of these comments:

<!-- methods: FAMILY -->    a section for every method of the family that the page has none of
<!-- summaries -->          the name and first line of every method, by family
<!-- table -->              the same with the papers, in a table
<!-- rules -->              every rule of optclip.thresholds that the page does not have
"""

import inspect
import re
from collections.abc import Iterator

from optclip import catalogue, thresholds

_PLACE = re.compile(r"^<!-- (methods: \w+|summaries|table|rules) -->$", re.MULTILINE)

_SECTION = """(method-{label})=
## {name}

```{{eval-rst}}
.. autofunction:: optclip.{name}
```
"""

_MEASURED = """
### How {name} behaves

```{{code-cell}} python
:tags: [remove-input]
dynamics_table("{name}")
```

```{{code-cell}} python
draw(optclip.{name}(), "{name}()")
```
"""


def filled(page: str) -> str:
    """A page with what its comments stand for."""
    return _PLACE.sub(lambda place: _listed(place[1], page), page)


def _listed(what: str, page: str) -> str:
    if what == "summaries":
        return _rst("\n".join(_summaries(family) for family in catalogue.FAMILIES))
    if what == "table":
        return "\n".join(["| method | what it does |", "|---|---|", *_rows()])
    if what == "rules":
        names = [f"optclip.thresholds.{name}" for name in thresholds.__all__]
        rules = [name for name in names if inspect.isfunction(getattr(thresholds, name[19:]))]
        return _rst("\n".join(f".. autofunction:: {x}" for x in rules if not _has(page, x)))
    family = what.partition(": ")[2]
    named = [method for method in catalogue.methods() if method.family == family]
    return "\n".join(_section(x) for x in named if not _has(page, f"optclip.{x.name}"))


def _section(method: catalogue.Method) -> str:
    measured = method.family == "learned" and not method.needs
    text = _SECTION + (_MEASURED if measured else "")
    return text.format(name=method.name, label=method.name.replace("_", "-"))


def _rows() -> Iterator[str]:
    for method in catalogue.methods():
        papers = "; ".join(f"[{paper}]({paper.url})" for paper in method.papers)
        summary = method.summary.replace("|", r"\|")
        yield f"| {{func}}`{method.name} <optclip.{method.name}>` | {summary} {papers} |"


def _summaries(family: str) -> str:
    names = [f"   {method.name}" for method in catalogue.methods() if method.family == family]
    head = [
        f".. rubric:: {catalogue.FAMILIES[family]}",
        "",
        ".. autosummary::",
        "   :nosignatures:",
        "",
    ]
    return "\n".join([*head, *names, ""])


def _has(page: str, name: str) -> bool:
    return f".. autofunction:: {name}\n" in page


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n.. currentmodule:: optclip\n\n{text}\n```"
