"""What a run logged: from a file of JSON lines, rows, columns or a plain array to one `Record`."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optclip._tuning.lines import rows_in, rows_of
from optclip._tuning.rows import columns_of, has_number, joined, numbers_of, refuse_other_kinds
from optclip._tuning.wording import LogError

NORM_KEYS = ("clip/norm", "clip/0/norm", "skip/norm", "grad_norm", "norm")
"""Under which names a norm is looked for, in this order."""

LOSS_KEYS = ("loss", "train_loss", "train/loss", "training_loss")
"""Under which names a loss is looked for, in this order."""

REPEATED = 4
"""So many stretches of equal norms, besides the first and the last, make a log of repeated ones."""

_READINGS = ("threshold", "factor", "clipped_norm", "clip_rate", "nonfinite_steps")


class Record(NamedTuple):
    """A recorded run; arrays of float64 with one value for each logged step, NaN where none is.

    Attributes:
        norms: Norm of the gradient before clipping. Infinite or NaN where it was not finite.
        steps: Number of the step.
        columns: All other numbers that were logged, by name ("loss", "clip/threshold", ...).
        leaf_norms: Norm of each leaf by path, from names such as "clip/norms/dense/kernel".
        source: Where it comes from, for titles and messages.
        prefix: Of the name of the norm: "clip/", "clip/0/", "skip/", "train/grad_" or "".
        notes: What a reader should know: lines that were dropped, and the like.
        has_norms: Whether there were norms in it at all; else they are all NaN.
        clip: Prefix of the clip whose threshold and rates are read; None: that of the norm.
        every: How many steps of the run one row stands for.
    """

    norms: np.ndarray
    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    leaf_norms: Mapping[str, np.ndarray]
    source: str
    prefix: str = "clip/"
    notes: tuple[str, ...] = ()
    has_norms: bool = True
    clip: str | None = None
    every: float = 1.0

    def reading(self, name: str) -> np.ndarray | None:
        """What the clip itself logged under a name of `optclip.metrics`: "threshold", "factor"."""
        return self.columns.get((self.prefix if self.clip is None else self.clip) + name)


def read(source: Any, norm_key: str | None = None, *, loss_will_do: bool = False) -> Record:
    """A `Record` of whatever a person has.

    Where each norm stands k times in a row, as in a log of the small batches that
    `optax.MultiSteps` accumulates, it is counted once. Rows without a norm, as of an evaluation
    between the steps, are left out; a null there is a norm that was not finite. Notes say so.

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
    return _noted(_once_each(_spaced(_recorded(source, norm_key, loss_will_do))))


def _recorded(source: Any, norm_key: str | None, loss_will_do: bool) -> Record:
    if isinstance(source, str | os.PathLike):
        rows, notes = rows_of(Path(source))
        return _from_rows(rows, norm_key, str(source), notes, loss_will_do)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "the file"))
        rows, notes = rows_in(source.read(), name)
        return _from_rows(rows, norm_key, name, notes, loss_will_do)
    if isinstance(source, Mapping):
        columns = {name: numbers_of(name, values) for name, values in source.items()}
        return _from_columns(columns, norm_key, "the columns", (), loss_will_do)
    if isinstance(source, Iterable) and not hasattr(source, "ndim"):
        source = list(source)
        if source and all(isinstance(row, Mapping) for row in source):
            return _from_rows(source, norm_key, "the rows", (), loss_will_do)
    norms = numbers_of("the norms", source)
    if not norms.size:
        raise LogError("there are no norms in it; pass those of at least one step")
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


def _spaced(record: Record) -> Record:
    """The record with how many steps one row stands for, and a note where these are several."""
    every = float(np.median(np.diff(record.steps))) if len(record.steps) > 1 else 1.0
    if every <= 1:
        return record
    note = f"the log has one row in {every:,.0f} steps; counts and shares are of rows"
    return record._replace(every=every, notes=(*record.notes, note))


def _noted(record: Record) -> Record:
    """The record with a note where its steps do not rise, as of two runs in one file."""
    falls = np.flatnonzero(np.diff(record.steps) <= 0)
    if not falls.size:
        return record
    before, after = record.steps[falls[0]], record.steps[falls[0] + 1]
    note = f"the steps do not rise ({after:,.0f} after {before:,.0f}); two runs in one file?"
    return record._replace(notes=(*record.notes, note))


# Names -------------------------------------------------------------------------------------------


def _from_rows(
    rows: list[Mapping[str, Any]],
    norm_key: str | None,
    source: str,
    notes: tuple[str, ...],
    loss_will_do: bool,
) -> Record:
    columns = columns_of(rows)
    keys = _norm_keys(norm_key)
    key = next((key for key in keys if key in columns), None)
    if key is None:
        refuse_other_kinds(rows, keys, source)
    elif not all(has_number(row, key) for row in rows):
        rows = joined(rows)
        kept = [row for row in rows if has_number(row, key) or (loss_will_do and _has_loss(row))]
        if left_out := len(rows) - len(kept):
            said = "1 row" if left_out == 1 else f"{left_out:,} rows"
            notes = (*notes, f"{said} without a number for {key} left out")
        columns = columns_of(kept)
    return _from_columns(columns, norm_key, source, notes, loss_will_do)


def _has_loss(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in LOSS_KEYS)


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
        raise LogError(
            f"{source} has no norms under {' or '.join(keys)}; it has {known}. Log "
            "optclip.metrics(opt_state) at every step, or name the key of the norm (norm_key=)"
        )
    columns = dict(columns)
    norms = columns.pop(key)
    prefix = key.removesuffix("norm")
    leaves = f"{prefix}norms/"
    if not any(name.startswith(leaves) for name in columns):
        leaves = "clip/norms/"  # of the clip beside a norm that was logged by hand
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
        raise LogError(f"{wrong[0]} has not as many values as {key}, which has {len(norms)}")
    clips = _clips(columns)
    clip = _clip_with_threshold(columns, prefix, clips)
    if len(clips) > 1:
        notes = (*notes, f"{len(clips)} clips in the log; norm of {key}, threshold of {clip[:-1]}")
    return Record(norms, steps, columns, leaf_norms, source, prefix, notes, has_norms, clip)


def _clips(columns: Mapping[str, np.ndarray]) -> list[str]:
    """The prefixes of the clips in a log, in the order of the chain."""
    found = (re.fullmatch(r"(clip/(?:(\d+)/)?)threshold", name) for name in columns)
    return [match[1] for match in sorted(filter(None, found), key=lambda m: int(m[2] or 0))]


def _clip_with_threshold(columns: Mapping[str, np.ndarray], prefix: str, clips: list[str]) -> str:
    """The clip whose threshold is read: that of the norm, if it has a finite one; else the first.

    The norm of a chain is that of its first clip, which may only measure.
    """
    for clip in (prefix, *clips):
        threshold = columns.get(f"{clip}threshold")
        if threshold is not None and np.isfinite(threshold).any():
            return clip
    return prefix if any(f"{prefix}{name}" in columns for name in _READINGS) else "clip/"
