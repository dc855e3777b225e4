"""What a run logged: from a file of JSON lines, rows, columns or a plain array to one `Record`."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optclip.tuning.lines import rows_in, rows_of

NORM_KEYS = ("clip/norm", "clip/0/norm", "skip/norm", "grad_norm", "norm")
"""Under which names a norm is looked for, in this order."""

LOSS_KEYS = ("loss", "train_loss", "train/loss", "training_loss")
"""Under which names a loss is looked for, in this order."""

REPEATED = 4
"""So many stretches of equal norms, besides the first and the last, make a log of repeated ones."""

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
        has_norms: Whether there were norms in it at all; else they are all NaN.
    """

    norms: np.ndarray
    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    leaf_norms: Mapping[str, np.ndarray]
    source: str
    prefix: str = "clip/"
    notes: tuple[str, ...] = ()
    has_norms: bool = True

    def reading(self, name: str) -> np.ndarray | None:
        """What the clip itself logged under a name of `optclip.metrics`: "threshold", "factor"."""
        return self.columns.get(self.prefix + name)


def read(source: Any, norm_key: str | None = None, *, loss_will_do: bool = False) -> Record:
    """A `Record` of whatever a person has.

    Where each norm stands k times in a row, as in a log of the small batches that
    `optax.MultiSteps` accumulates, it is counted once; a note says so.

    Args:
        source: A `Record`; the path of a file with one JSON object in each line; rows (a list of
            dicts) or columns (a dict of arrays) with the names of `optclip.metrics`; or just the
            norms, an array of shape (steps,). An open file is taken too.
        norm_key: The name of the norm, where it is none of `NORM_KEYS`.
        loss_will_do: Whether to take a log without norms if it has a loss.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With one line that says what is wrong and what to do.
    """
    if isinstance(source, Record):
        return source
    return _noted(_once_each(_recorded(source, norm_key, loss_will_do)))


def _recorded(source: Any, norm_key: str | None, loss_will_do: bool) -> Record:
    if isinstance(source, str | os.PathLike):
        rows, notes = rows_of(Path(source))
        return _from_rows(rows, norm_key, str(source), notes, loss_will_do)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "the file"))
        rows, notes = rows_in(source.read(), name)
        return _from_rows(rows, norm_key, name, notes, loss_will_do)
    if isinstance(source, Mapping):
        columns = {name: _numbers(name, values) for name, values in source.items()}
        return _from_columns(columns, norm_key, "the columns", (), loss_will_do)
    if isinstance(source, Iterable) and not hasattr(source, "ndim"):
        source = list(source)
        if source and all(isinstance(row, Mapping) for row in source):
            return _from_rows(source, norm_key, "the rows", (), loss_will_do)
    norms = _numbers("the norms", source)
    if not norms.size:
        raise ValueError("there are no norms in it; pass those of at least one step")
    return Record(norms, np.arange(1, len(norms) + 1), {}, {}, "the norms", prefix="")


# Rows that say something together ----------------------------------------------------------------


def _once_each(record: Record) -> Record:
    """The record with every norm once, where each stands several times in a row."""
    factor = record.reading("factor")
    same = _same_as_before(record.norms)
    if factor is not None:
        same &= _same_as_before(factor)
    starts = np.flatnonzero(~same)
    lengths = np.diff(starts, append=len(same))
    times = int(np.gcd.reduce(lengths[1:-1])) if len(starts) >= REPEATED + 2 else 1
    if times < 2:
        return record
    early = int(lengths[0]) % times
    kept = np.arange(early, len(same), times)
    if early and record.norms[0] != 0:  # a norm of 0 is of a state before the first update
        kept = np.insert(kept, 0, 0)
    note = (
        f"each norm stands {times} times in a row and is counted once; log once per optimizer step"
    )
    return record._replace(
        norms=record.norms[kept],
        steps=record.steps[kept],
        columns={name: x[kept] for name, x in record.columns.items()},
        leaf_norms={name: x[kept] for name, x in record.leaf_norms.items()},
        notes=(*record.notes, note),
    )


def _same_as_before(values: np.ndarray) -> np.ndarray:
    same = values[1:] == values[:-1]
    return np.insert(same | (np.isnan(values[1:]) & np.isnan(values[:-1])), 0, False)


def _noted(record: Record) -> Record:
    """The record with a note where its steps do not rise, as of two runs in one file."""
    falls = np.flatnonzero(np.diff(record.steps) <= 0)
    if not falls.size:
        return record
    before, after = record.steps[falls[0]], record.steps[falls[0] + 1]
    note = f"the steps do not rise ({after:,.0f} after {before:,.0f}); two runs in one file?"
    return record._replace(notes=(*record.notes, note))


# Names and numbers -------------------------------------------------------------------------------


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


def _from_rows(
    rows: list[Mapping[str, Any]],
    norm_key: str | None,
    source: str,
    notes: tuple[str, ...],
    loss_will_do: bool,
) -> Record:
    columns = _columns_of(rows)
    keys = _norm_keys(norm_key)
    if not any(key in columns for key in keys):
        present = ((key, row[key]) for key in keys for row in rows if row.get(key) is not None)
        key, value = next(present, (None, None))
        if key is not None:
            kind = "as text" if isinstance(value, str) else f"as a {type(value).__name__}"
            raise ValueError(
                f"{source} has {key}, but {kind}: {str(value)[:40]!r}; log it as a number, "
                "float(norm) (json.dumps with default=str makes text of it)"
            )
    return _from_columns(columns, norm_key, source, notes, loss_will_do)


def _norm_keys(norm_key: str | None) -> tuple[str, ...]:
    return NORM_KEYS if norm_key is None else (norm_key,)


def _from_columns(
    columns: Mapping[str, np.ndarray],
    norm_key: str | None,
    source: str,
    notes: tuple[str, ...],
    loss_will_do: bool,
) -> Record:
    keys = _norm_keys(norm_key)
    key = next((key for key in keys if key in columns), None)
    loss = next((name for name in LOSS_KEYS if name in columns), None)
    has_norms = key is not None
    if key is None and norm_key is None and loss is not None and loss_will_do:
        key = keys[0]
        columns = {**columns, key: np.full(len(columns[loss]), np.nan)}
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
    return Record(norms, steps, columns, leaf_norms, source, prefix, notes, has_norms)
