"""What a run logged: from a file of JSON lines, rows, columns or a plain array to one `Record`."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NORM_KEYS = ("clip/norm", "clip/0/norm", "skip/norm", "grad_norm", "norm")
"""Under which names a norm is looked for, in this order."""

_PLAIN = {float, int, bool, type(None)}
"""What JSON has nearly everywhere, and NumPy takes as it is: a hundred times as fast."""


class Record(NamedTuple):
    """A recorded run; arrays of float64 with one value for each logged step, NaN where none is.

    Attributes:
        norms: Norm of the gradient before clipping. Infinite or NaN where it was not finite.
        steps: Number of the step.
        columns: All other numbers that were logged, by name ("loss", "clip/threshold", ...).
        leaf_norms: Norm of each leaf by path, from names such as "clip/norms/dense/kernel".
        source: Where it comes from, for titles and messages.
        prefix: Of the clip whose norm this is: "clip/", "clip/0/", "skip/" or "".
        notes: What a reader should know: lines that were dropped, and the like.
    """

    norms: np.ndarray
    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    leaf_norms: Mapping[str, np.ndarray]
    source: str
    prefix: str = "clip/"
    notes: tuple[str, ...] = ()

    def reading(self, name: str) -> np.ndarray | None:
        """What the clip itself logged under a name of `optclip.metrics`: "threshold", "factor"."""
        return self.columns.get(self.prefix + name)


def read(source: Any, norm_key: str | None = None) -> Record:
    """A `Record` of whatever a person has.

    Args:
        source: A `Record`; the path of a file with one JSON object in each line; rows (a list of
            dicts) or columns (a dict of arrays) with the names of `optclip.metrics`; or just the
            norms, an array of shape (steps,). An open file is taken too.
        norm_key: The name of the norm, where it is none of `NORM_KEYS`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With one line that says what is wrong and what to do.
    """
    if isinstance(source, Record):
        return source
    if isinstance(source, str | os.PathLike):
        rows, notes = _rows_of(Path(source))
        return _from_columns(_columns_of(rows), norm_key, str(source), notes)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "the file"))
        rows, notes = _rows_in(source.read(), name)
        return _from_columns(_columns_of(rows), norm_key, name, notes)
    if isinstance(source, Mapping):
        columns = {name: _numbers(name, values) for name, values in source.items()}
        return _from_columns(columns, norm_key, "the columns", ())
    if isinstance(source, Iterable) and not hasattr(source, "ndim"):
        source = list(source)
        if source and all(isinstance(row, Mapping) for row in source):
            return _from_columns(_columns_of(source), norm_key, "the rows", ())
    norms = _numbers("the norms", source)
    if not norms.size:
        raise ValueError("there are no norms in it; pass those of at least one step")
    return Record(norms, np.arange(1, len(norms) + 1), {}, {}, "the norms", prefix="")


def _rows_of(path: Path) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file in it, mostly {path / 'steps.jsonl'}")
    return _rows_in(path.read_bytes(), str(path))


def _rows_in(content: str | bytes, path: str) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """The objects in a file of JSON lines. A run that was killed may have left half a line."""
    text = content.decode(errors="replace") if isinstance(content, bytes) else content
    lines = text.split("\n")  # not splitlines, which also splits inside of strings, at U+2028
    rows: list[Mapping[str, Any]] = []
    last = len(lines)
    while last and not lines[last - 1].strip():
        last -= 1
    for number, line in enumerate(lines[:last], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == last and rows:
                return rows, (f"line {number} of {path} is cut short and was left out",)
            raise ValueError(
                f"{path}, line {number} is no JSON: {line[:40]!r}; expected one object in each "
                'line, such as {"step": 1, "clip/norm": 0.7}'
            ) from None
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{path}, line {number} is no JSON object: {line[:40]!r}; expected names and "
                'numbers, such as {"step": 1, "clip/norm": 0.7}'
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; log one JSON object for each step")
    return rows, ()


def _columns_of(rows: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """A column for each name with a number, or nothing but null; NaN where a row has none."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kinds = set(map(type, values))
        if not kinds <= _PLAIN:
            values = [_number(x) for x in values]
            kinds = set(map(type, values))
        # A number that was null at every step was never finite; a word or a list is none at all.
        if kinds != {type(None)} or all(row.get(name) is None for row in rows):
            columns[name] = np.array(values, np.float64)  # None becomes NaN
    return columns


def _number(x: Any) -> float | None:
    """A number from JSON; None for what is none. Numbers that are not finite may be words there."""
    if isinstance(x, bool | int | float | np.number | np.bool_):
        return float(x)
    if isinstance(x, str) and x.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return float(x)
    if getattr(x, "ndim", None) == 0:
        return float(x)
    return None


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be numbers, one for each step, got {str(values)[:60]}"
        ) from None
    if numbers.ndim != 1:
        raise ValueError(
            f"{name} must be of shape (steps,), got {numbers.shape}; of several runs pass one"
        )
    return numbers


def _from_columns(
    columns: Mapping[str, np.ndarray], norm_key: str | None, source: str, notes: tuple[str, ...]
) -> Record:
    keys = NORM_KEYS if norm_key is None else (norm_key,)
    key = next((key for key in keys if key in columns), None)
    if key is None:
        known = ", ".join(list(columns)[:12]) or "nothing"
        known += f" and {len(columns) - 12} more" if len(columns) > 12 else ""
        raise ValueError(
            f"{source} has no norms under {' or '.join(keys)}; it has {known}. Log "
            "optclip.metrics(opt_state) at every step, or name the key of the norm (norm_key=)"
        )
    columns = dict(columns)
    norms = columns.pop(key)
    prefix = key.removesuffix("norm")
    leaves = f"{prefix}norms/"
    leaf_norms = {
        name.removeprefix(leaves): columns.pop(name)
        for name in list(columns)
        if name.startswith(leaves)
    }
    numbers = np.arange(1, len(norms) + 1, dtype=np.float64)
    steps = columns.pop("step", numbers)
    steps = np.where(np.isfinite(steps), steps, numbers)
    wrong = [name for name, x in (columns | leaf_norms).items() if len(x) != len(norms)]
    if wrong:
        raise ValueError(f"{wrong[0]} has not as many values as {key}, which has {len(norms)}")
    return Record(norms, steps, columns, leaf_norms, source, prefix, notes)
