"""Files of JSON lines as rows: what is whole of a broken log is used, and the rest is named.

A run that was killed leaves half a line; if it went on in the same file, one in the middle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optclip._tuning.wording import LogError

LEAST_WHOLE = 0.5
"""A file of which less than this share of the lines is JSON objects is no log."""

_NAMED = 5  # lines that were left out


def rows_of(path: Path) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """The objects in the file at a path, and what a reader should know of it."""
    if path.is_dir():
        raise LogError(f"{path} is a folder; give the file in it, mostly {path / 'steps.jsonl'}")
    return rows_in(path.read_bytes(), str(path))


def rows_in(content: str | bytes, path: str) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """The objects in the content of a file, and what a reader should know of it.

    Raises:
        ValueError: With one line, if there is none, or most lines are something else.
    """
    text = content.decode("utf-8-sig", "replace") if isinstance(content, bytes) else content
    rows: list[Mapping[str, Any]] = []
    broken: dict[int, str] = {}
    last = 0
    # Not splitlines, which also splits inside of strings, at U+2028.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        last, row = number, _parsed(line)
        if isinstance(row, Mapping):
            rows.append(row)
        else:
            what = "not JSON" if row is _NO_JSON else "not a JSON object"
            broken[number] = f"{path}, line {number} is {what}: {line[:40]!r}"
    if broken and len(rows) < LEAST_WHOLE * (len(rows) + len(broken)):
        raise LogError(
            f"{next(iter(broken.values()))}; expected one object in each line, such as "
            '{"step": 1, "clip/norm": 0.7}'
        )
    if not rows:
        raise LogError(f"{path} is empty; log one JSON object for each step")
    return rows, tuple(_left_out(sorted(broken), last, path))


_NO_JSON = object()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # a ValueError also of a number with too many digits
        return _NO_JSON


def _left_out(broken: list[int], last: int, path: str) -> list[str]:
    said = []
    inner = [number for number in broken if number != last]
    if len(inner) == 1:
        said.append(f"line {inner[0]} of {path} is not a JSON object and was left out")
    elif inner:
        named = ", ".join(map(str, inner[:_NAMED])) + (", ..." if len(inner) > _NAMED else "")
        said.append(f"lines {named} of {path} are not JSON objects; {len(inner):,} were left out")
    if last in broken:
        said.append(f"line {last} of {path} is cut short and was left out")
    return said
