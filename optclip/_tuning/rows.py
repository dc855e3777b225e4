"""Rows of a log as columns of numbers, whatever else stands in them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from optclip._tuning.wording import LogError

_PLAIN = {float, int, bool, type(None)}
"""What JSON has nearly everywhere, and NumPy takes as it is: a hundred times as fast."""


def columns_of(rows: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
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
            columns[name] = _as_floats(name, values)
    return columns


def _as_floats(name: str, values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, np.float64)  # None becomes NaN
    except OverflowError:
        raise LogError(_too_large(name)) from None


def _too_large(name: str) -> str:
    return f"{name} has a whole number beyond all floats (1.8e308); log it as a float"


def _number(x: Any) -> int | float | None:
    """A number from JSON; None for what is none. Numbers that are not finite may be words there."""
    if isinstance(x, bool | int):
        return x
    if isinstance(x, float | np.number | np.bool_):
        return float(x)
    if isinstance(x, str) and x.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return float(x)
    if getattr(x, "ndim", None) == 0:
        return float(x)
    return None


def numbers_of(name: str, values: Any) -> np.ndarray:
    """The values under a name, one number for each step."""
    try:
        numbers = np.asarray(values, np.float64)
    except OverflowError:
        raise LogError(_too_large(name)) from None
    except (TypeError, ValueError):
        raise LogError(
            f"{name} must be numbers, one for each step, got {str(values)[:60]}"
        ) from None
    if numbers.ndim != 1:
        raise LogError(
            f"{name} must be of shape (steps,), got {numbers.shape}; of several runs pass one"
        )
    return numbers


def has_number(row: Mapping[str, Any], key: str) -> bool:
    """Whether a row has a norm, or a null for one that was not finite; a list or a word is none."""
    value = row.get(key)
    return key in row if value is None else _number(value) is not None


def joined(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows, where two of a step that have no other name in common are one.

    So are those of a norm and a loss, or of an evaluation, that were logged one after the other.
    """
    joined: list[Mapping[str, Any]] = []
    for row in rows:
        before = joined[-1] if joined else {}
        alone = row.keys() & before.keys() == {"step"}
        if alone and _number(row["step"]) == _number(before["step"]):
            joined[-1] = {**before, **row}
        else:
            joined.append(row)
    return joined


def refuse_other_kinds(rows: list[Mapping[str, Any]], keys: tuple[str, ...], source: str) -> None:
    """Says what is wrong where a norm is there, but not as a number under a flat name."""
    present = ((key, row[key]) for key in keys for row in rows if row.get(key) is not None)
    key, value = next(present, (None, None))
    if key is not None:
        kind = "as text" if isinstance(value, str) else f"as a {type(value).__name__}"
        raise LogError(
            f"{source} has {key}, but {kind}: {_shown(value)!r}; log it as a number, "
            "float(norm) (json.dumps with default=str makes text of it)"
        )
    for key in keys:
        if any(_is_nested(row, key.split("/")) for row in rows):
            raise LogError(
                f"{source} has {key}, but nested: {key.split('/')[0]} holds an object; log flat "
                f'names, {{"{key}": 0.7}}, as optclip.metrics(opt_state) gives them'
            )


def _shown(value: Any) -> str:
    try:
        return str(value)[:40]
    except RecursionError:
        return "too deeply nested to show"


def _is_nested(row: Any, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(row, Mapping) or part not in row:
            return False
        row = row[part]
    return len(parts) > 1
