"""What a run logged, from whatever a person has: `read_log` makes one `Record` of it.

Every format becomes rows of numbers by name first. What is wrong with a log is said in a note where
the rest can be used, and in an error of one line where it cannot.
"""

import collections
import csv
import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optclip._tuning.wording import LogError, counted

# Under which names a norm is looked for first, in this order; then under the one name whose last
# part is such a word.
NORM_KEYS = ("clip/norm", "clip/0/norm", "skip/norm", "grad_norm", "train/grad_norm", "norm")
NORM_NAMES = re.compile(
    r"(global|total)?_?(grad|gradient|g)_?(2\.0_)?(global_|total_)?norm(_total)?(_step)?"
)

# Under which names losses and steps are looked for, in this order.
LOSS_KEYS = ("loss", "train/loss", "train_loss", "training_loss", "lm_loss", "loss/train")
STEP_KEYS = ("step", "_step", "global_step", "train/global_step", "trainer/global_step")
STEP_KEYS += ("iteration", "iter")

# The files that are read of a folder: the first that is there.
IN_A_FOLDER = ("steps.jsonl", "metrics.jsonl", "trainer_state.json", "metrics.csv", "progress.csv")

# So many stretches of equal norms, besides the first and the last, make a log of repeated ones.
REPEATED = 4

# A file of which less than this share of the lines fits a format is of another one.
LEAST_WHOLE = 0.5

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|(?i:nan|inf(?:inity)?))\b"
_PAIR = re.compile(rf"(grad norm|[A-Za-z_][\w./-]*)['\"]?\s*[:=]\s*['\"]?({_NUMBER})(?![:\w])")
_STEP = re.compile(r"\b(step|iteration|iter)\s+#?(\d+)\b", re.IGNORECASE)
_READINGS = ("threshold", "factor", "clipped_norm", "clip_rate", "nonfinite_steps")

Row = Mapping[str, Any]


class Record(NamedTuple):
    """A recorded run; arrays of float64 with one value for each logged step, NaN where none is.

    Attributes:
        norms: Norm of the gradient before clipping. Infinite or NaN where it was not finite.
        steps: Number of the step.
        columns: All other numbers that were logged, by name ("loss", "clip/threshold", ...).
        leaf_norms: Norm of each leaf by path, from names such as "clip/norms/dense/kernel".
        source: Where it comes from, for titles and messages.
        prefix: Of the name of the norm: ``clip/``, ``clip/0/``, ``train/grad_``; empty for "norm".
        notes: What a reader should know: lines that were dropped, and the like.
        has_norms: Whether there were norms in it at all; else they are all NaN.
        clip: Prefix of the clip whose threshold and rates are read; None: that of the norm.
        every: How many steps of the run one row stands for.
        norm_key: The name of the norm.
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
    norm_key: str = "norm"

    def reading(self, name: str) -> np.ndarray | None:
        """What the clip itself logged under a name of `optclip.metrics`: "threshold", "factor"."""
        return self.columns.get((self.prefix if self.clip is None else self.clip) + name)

    @property
    def loss(self) -> np.ndarray | None:
        """The loss, if it was logged."""
        key = _first(LOSS_KEYS, self.columns)
        return None if key is None else self.columns[key]


def read_log(
    source: Any,
    *,
    format: str | None = None,
    norm_key: str | None = None,
    step_key: str | None = None,
    loss_will_do: bool = False,
) -> Record:
    """Reads the log of a run, in any of the forms that trainers write.

    The format is told from the content, and the names from what is usual: "clip/norm" of
    `optclip.metrics`, "grad_norm", "train/grad_norm", "gradient_norm", "gnorm" and the like. Where
    each norm stands k times in a row, as in a log of the small batches that `optax.MultiSteps`
    accumulates, it is counted once. Rows without a norm, as of an evaluation between the steps, are
    left out; a null is a norm that was not finite. The record's notes say so.

    Args:
        source: The path of a file, which may be compressed by gzip: JSON lines, a JSON document
            (`trainer_state.json` of a Hugging Face trainer), CSV or TSV (a logger's, or an export
            of Weights & Biases), an event file of TensorBoard, one norm per line, or text with
            "grad_norm=1.2" or "gnorm: 1.2" in its lines. A folder with event files or one of these
            in it; "-" for standard input; an open file. Or rows (dicts), columns (a dict of arrays,
            a data frame), or the norms alone, of shape (steps,).
        format: "jsonl", "json", "csv", "numbers" or "text", where the content does not tell.
        norm_key: The name of the norm, where it is none of the usual ones.
        step_key: The name of the step's number, where it is none of the usual ones.
        loss_will_do: Whether to take a log without norms if it has a loss.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If an event file is to be read without tensorboard.
        ValueError: With one line that says what is wrong and what to do.

    Example:
        >>> from optclip.tuning import read_log
        >>> read_log([{"step": 1, "grad_norm": 0.5}, {"step": 2, "grad_norm": 0.7}]).norms.tolist()
        [0.5, 0.7]
    """
    if isinstance(source, Record):
        return source
    if format is not None and format not in PARSERS:
        raise LogError(f"format must be one of {', '.join(PARSERS)}, got {format!r}")
    rows, name, notes = _rows_of(source, format)
    rows = [_flat(row) for row in rows]
    columns = _columns(rows)
    key = _norm_key(columns, norm_key, name)
    step, loss = step_key or _first(STEP_KEYS, columns), _first(LOSS_KEYS, columns)
    if step_key is not None and step_key not in columns:
        raise LogError(f"{name} has no numbers under {step_key}; it has {_known(columns)}")
    if key is None and not (loss_will_do and loss is not None and norm_key is None):
        raise LogError(_no_norms(rows, columns, norm_key, name))
    if key is not None and not all(_has_number(row, key) for row in rows):
        rows = rows if step is None else _joined(rows, step)
        kept = [row for row in rows if _has_number(row, key) or (loss_will_do and loss in row)]
        if left_out := len(rows) - len(kept):
            notes.append(f"{counted(left_out, 'row')} without a number for {key} left out")
        columns = _columns(kept)
    return _record(columns, key, step, name, notes)


# From a source to rows ---------------------------------------------------------------------------


def _rows_of(source: Any, format: str | None) -> tuple[list[Row], str, list[str]]:
    """The rows of a source, its name, and notes."""
    if isinstance(source, str) and source == "-":
        source = getattr(sys.stdin, "buffer", sys.stdin)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            path = _in_folder(path)
        if path.is_dir() or "tfevents" in path.name:
            return _of_events(path), str(path), []
        return _parsed(path.read_bytes(), str(path), format)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "the file"))
        return _parsed(source.read(), "standard input" if "stdin" in name else name, format)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.to_dict("list")
    if not isinstance(source, Mapping) and isinstance(source, Iterable):
        source = source if hasattr(source, "ndim") else list(source)
    return _of_objects(source), "the log", []


def _of_objects(source: Any) -> list[Row]:
    """Rows of what JSON or Python hold: rows, columns, a trainer's state, or norms alone."""
    if isinstance(source, Mapping):
        if "log_history" in source:
            return list(source["log_history"])
        columns = {name: _column(name, x) for name, x in source.items() if np.ndim(x)}
        if not columns:
            return [source]
        (first, values), *others = columns.items()
        for name, other in others:
            if len(other) != len(values):
                raise LogError(f"{name} has {len(other)} values and {first} has {len(values)}")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(source, list) and source and all(isinstance(row, Mapping) for row in source):
        return source
    norms = _column("the norms", source)
    if any(x is not None and _number(x) is None for x in norms):
        raise LogError(f"the norms must be numbers, one for each step, got {str(norms)[:60]}")
    return [{"norm": x} for x in norms]


def _column(name: str, values: Any) -> list[Any]:
    try:
        shape = np.shape(values)
    except ValueError:
        shape = (0, 0)
    if len(shape) != 1:
        raise LogError(f"{name} must be of shape (steps,), got {shape}; of several runs pass one")
    return list(np.asarray(values) if hasattr(values, "ndim") else values)


def _in_folder(folder: Path) -> Path:
    """The log in a folder: a file, or the folder with event files."""
    for name in IN_A_FOLDER:
        if (folder / name).exists():
            return folder / name
    runs = sorted({path.parent for path in folder.rglob("*tfevents*")})
    if len(runs) > 1:
        raise LogError(
            f"{folder} holds the event files of {len(runs)} runs; give one: {_listed(runs)}"
        )
    if not runs:
        raise LogError(
            f"{folder} is a folder with no log in it that is known ({', '.join(IN_A_FOLDER)} or "
            "event files of TensorBoard); give the file"
        )
    return runs[0]


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")


def _of_events(path: Path) -> list[Row]:
    """The scalars of event files, a row for each step, in the order in which they were written."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise ImportError(
            f'reading {path} needs tensorboard: pip install "optclip[examples]"'
        ) from None
    # A run that was started again from an earlier step is told of, and nothing of it thrown away.
    events = EventAccumulator(
        str(path), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False
    )
    events.Reload()
    tags = events.Tags()
    found = [(tag, x, x.value) for tag in tags["scalars"] for x in events.Scalars(tag)]
    found += [
        (tag, x, make_ndarray(x.tensor_proto))
        for tag in tags["tensors"]
        for x in events.Tensors(tag)
    ]
    if not found:
        raise LogError(f"{path} holds no scalars")
    rows: dict[tuple[int, int], tuple[float, dict[str, Any]]] = {}
    met = collections.Counter[tuple[str, int]]()
    for tag, event, value in found:
        place = (event.step, met[tag, event.step])  # a step that is met again is another row
        met[tag, event.step] += 1
        rows.setdefault(place, (event.wall_time, {"step": event.step}))[1][tag] = value
    return [row for _, _, row in sorted((time, place, row) for place, (time, row) in rows.items())]


# Formats: each parser answers with rows and the numbers of the lines that do not fit -------------

Parsed = tuple[list[Row], list[int]]


def _parsed(
    content: str | bytes, name: str, format: str | None
) -> tuple[list[Row], str, list[str]]:
    """The rows in the content of a file, by the first parser that most of it fits."""
    if isinstance(content, bytes):
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if b"\0" in content[:4096]:
            raise LogError(f"{name} is no text in UTF-8; give the log of a run")
        content = content.decode("utf-8-sig", "replace")
    # Not splitlines, which also splits inside of strings, at U+2028.
    lines = content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    full = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not full:
        raise LogError(f"{name} is empty; log the norm of the gradient at each step")
    first = lines[full[0] - 1]
    known = PARSERS if format is None else {format: PARSERS[format]}
    if format is None and _PAIR.search(first):  # no header of a table
        known = {name: parser for name, parser in PARSERS.items() if name != "csv"}
    for parser in known.values():
        rows, broken = parser(lines)
        if rows and len(broken) <= (1 - LEAST_WHOLE) * len(full):
            return rows, name, _left_out(broken, full[-1], name)
    expected = "a log in any format that is known" if format is None else format
    raise LogError(
        f"{name} is not {expected}: line {full[0]} is {first.strip()[:40]!r}; log a line of JSON "
        'for each step, such as {"step": 1, "grad_norm": 0.7}, or name the format (format=)'
    )


def _left_out(broken: list[int], last: int, name: str) -> list[str]:
    inner = [number for number in broken if number != last]
    said = []
    if inner:
        which = f"line{'s' if len(inner) > 1 else ''} {_listed(inner)}"
        said.append(f"{which} of {name} cannot be read: {len(inner):,} left out")
    if last in broken:
        said.append(f"line {last} of {name} is cut short and was left out")
    return said


def _json(lines: list[str]) -> Parsed:
    try:
        return _of_objects(json.loads("\n".join(lines))), []
    except (ValueError, RecursionError):
        return [], []


def _line_by_line(read: Callable[[str], Row | None], lines: list[str]) -> Parsed:
    found = {number: read(line) for number, line in enumerate(lines, 1) if line.strip()}
    broken = [number for number, row in found.items() if row is None]
    return [row for row in found.values() if row is not None], broken


def _json_row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a ValueError also of a number with too many digits
        return None
    return row if isinstance(row, Mapping) else None


def _norm_row(line: str) -> Row | None:
    norm = _number(line)
    return None if norm is None else {"norm": norm}


def _csv(lines: list[str]) -> Parsed:
    """A header and values, apart by the character that the header has most of."""
    header = next(line for line in lines if line.strip())
    apart = max(",\t;", key=header.count)
    if apart not in header:
        return [], []
    skipped = lines.index(header)
    reader = csv.DictReader(lines[skipped:], delimiter=apart, skipinitialspace=True)
    rows, broken = [], []
    for row in reader:
        if None in row or None in row.values():  # more cells than names, or fewer
            broken.append(skipped + reader.line_num)
        else:  # an empty cell is a value that was not logged in this row
            rows.append({name: x for name, x in row.items() if x.strip()})
    return rows, broken


def _text(lines: list[str]) -> Parsed:
    """Whatever a program printed; lines without a number under a name are no broken ones."""
    rows = []
    for line in lines:
        if pairs := _PAIR.findall(line):
            rows.append({name.lower(): x for name, x in _STEP.findall(line)} | dict(pairs))
    return rows, []


# By the names of the formats, in the order in which they are tried.
PARSERS: Mapping[str, Callable[[list[str]], Parsed]] = {
    "json": _json,
    "jsonl": partial(_line_by_line, _json_row),
    "numbers": partial(_line_by_line, _norm_row),
    "csv": _csv,
    "text": _text,
}


# From rows to a record ---------------------------------------------------------------------------


def _record(
    columns: dict[str, np.ndarray], key: str | None, step: str | None, source: str, notes: list[str]
) -> Record:
    """The record of the columns, of which those of norm and step are known."""
    count = len(next(iter(columns.values())))
    norms = np.full(count, np.nan) if key is None else columns.pop(key)
    numbers = np.arange(1.0, count + 1)
    steps = numbers if step is None else columns.pop(step, numbers)
    steps = np.where(np.isfinite(steps), steps, numbers)
    prefix = "clip/" if key is None else key.removesuffix("norm")
    clip, clips = _clip_with_threshold(columns, prefix)
    if clips > 1:
        notes.append(f"{clips} clips in the log; norm of {key}, threshold of {clip[:-1]}")
    every = max(1.0, float(np.median(np.diff(steps)))) if count > 1 else 1.0
    if every > 1:
        notes.append(f"the log has one row in {every:,.0f} steps; counts and shares are of rows")
    times, kept = _once_each(norms, columns.get(f"{clip}factor"))
    if times > 1:
        notes.append(
            f"each norm stands {times} times in a row and is counted once; log once per optimizer "
            "step"
        )
    norms, steps = norms[kept], steps[kept]
    columns = {name: x[kept] for name, x in columns.items()}
    falls = np.flatnonzero(np.diff(steps) <= 0)
    if falls.size:
        before, after = steps[falls[0] : falls[0] + 2]
        notes.append(
            f"the steps do not rise ({after:,.0f} after {before:,.0f}); two runs in one file?"
        )
    leaves = f"{prefix}norms/"
    if not any(name.startswith(leaves) for name in columns):
        leaves = "clip/norms/"  # of the clip beside a norm that was logged by hand
    of_leaves = [name for name in columns if name.startswith(leaves)]
    leaf_norms = {name.removeprefix(leaves): columns.pop(name) for name in of_leaves}
    return Record(
        norms,
        steps,
        columns,
        leaf_norms,
        source,
        prefix,
        tuple(notes),
        key is not None,
        clip,
        every,
        key or "norm",
    )


def _once_each(norms: np.ndarray, factor: np.ndarray | None) -> tuple[int, Any]:
    """(how many times in a row each norm stands, the places at which it is read once)."""
    same = _same_as_before(norms)
    if factor is not None:
        same &= _same_as_before(factor)
    starts = np.flatnonzero(~same)
    lengths = np.diff(starts, append=len(same))
    times = int(np.gcd.reduce(lengths[1:-1])) if len(starts) >= REPEATED + 2 else 1
    if times < 2:
        return 1, slice(None)
    early = int(lengths[0]) % times
    kept = np.arange(early, len(same), times)
    if early and norms[0] != 0:  # a norm of 0 is of a state before the first update
        kept = np.insert(kept, 0, 0)
    return times, kept


def _same_as_before(values: np.ndarray) -> np.ndarray:
    before, after = values[:-1], values[1:]
    return np.insert((after == before) | (np.isnan(after) & np.isnan(before)), 0, False)


def _flat(row: Row) -> Row:
    """A row without objects in it: what they hold has names with a slash."""
    if not any(isinstance(value, Mapping) for value in row.values()):
        return row
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{part}": x for part, x in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _columns(rows: list[Row]) -> dict[str, np.ndarray]:
    """A column for each name with a number, or nothing but null; NaN where a row has none."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        logged = values = [row.get(name) for row in rows]
        if not set(map(type, logged)) <= {float, type(None)}:  # a hundred times as fast
            values = [_number(x) for x in logged]
        # A number that was null at every step was never finite; a word or a list is none at all.
        if any(x is not None for x in values) or all(x is None for x in logged):
            columns[name] = np.array(values, np.float64)  # None becomes NaN
    return columns


def _number(x: Any) -> float | None:
    """A number, also one in letters; None for what is none."""
    if x is None or getattr(x, "ndim", 0):
        return None
    try:
        return float(x)
    except OverflowError:  # a whole number beyond all floats
        return np.inf if x > 0 else -np.inf
    except (TypeError, ValueError):
        return None


def _has_number(row: Row, key: str) -> bool:
    """Whether a row has a norm, or a null for one that was not finite; a list or a word is none."""
    return key in row and (row[key] is None or _number(row[key]) is not None)


def _joined(rows: list[Row], step: str) -> list[Row]:
    """The rows, where two of a step that have no other name in common are one.

    So are those of a norm and a loss, or of an evaluation, that were logged one after the other.
    """
    joined: list[Row] = []
    for row in rows:
        before = joined[-1] if joined else {}
        if row.keys() & before.keys() == {step} and _number(row[step]) == _number(before[step]):
            joined[-1] = {**before, **row}
        else:
            joined.append(row)
    return joined


# Names -------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """A name as others write it: in an export of Weights & Biases it stands after the run's."""
    return name.rpartition(" - ")[2].strip().lower().replace(" ", "_").replace("-", "_")


def _first(keys: Iterable[str], columns: Mapping[str, Any]) -> str | None:
    """The first of the keys that the columns have, exactly or as others write it."""
    names = {_plain(name): name for name in reversed(list(columns)) if not _is_band(name)}
    found = (key if key in columns else names.get(key) for key in keys)
    return next((name for name in found if name is not None), None)


def _is_band(name: str) -> bool:
    """Whether it is the lowest or highest of several runs, beside their mean."""
    return name.endswith(("__MIN", "__MAX"))


def _norm_key(columns: Mapping[str, Any], norm_key: str | None, source: str) -> str | None:
    wanted = NORM_KEYS if norm_key is None else (norm_key,)
    exact = next((key for key in wanted if key in columns), None)
    if exact is not None or norm_key is not None:
        return exact
    plain = {name: _plain(name) for name in columns if not _is_band(name)}
    alike = [
        name
        for name, said in plain.items()
        if said in NORM_KEYS or NORM_NAMES.fullmatch(said.rpartition("/")[2])
    ]
    if len(alike) > 1:
        raise LogError(
            f"{source} has several norms: {', '.join(alike[:8])}; name the one of the whole "
            "gradient before clipping (norm_key=)"
        )
    return alike[0] if alike else None


def _no_norms(
    rows: list[Row], columns: Mapping[str, Any], norm_key: str | None, source: str
) -> str:
    """Why there is no norm, and what to do."""
    named = (norm_key,) if norm_key is not None else NORM_KEYS
    there = next((row[key] for row in rows for key in named if row.get(key) is not None), None)
    if there is not None:
        return f"{source} has the norm as a {type(there).__name__}; log it as a number, float(norm)"
    keys = norm_key or "clip/norm, grad_norm or the like"
    return (
        f"{source} has no norms under {keys}; it has {_known(columns)}. Log "
        "optclip.metrics(opt_state) at every step, or name the key of the norm (norm_key=)"
    )


def _known(columns: Mapping[str, Any]) -> str:
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    return (", ".join(list(columns)[:12]) or "nothing") + more


def _clip_with_threshold(columns: Mapping[str, np.ndarray], prefix: str) -> tuple[str, int]:
    """The clip whose threshold is read, and how many there are.

    That of the norm, if it has a finite threshold; else the first that has: the norm of a chain is
    that of its first clip, which may only measure.
    """
    found = filter(None, (re.fullmatch(r"(clip/(?:(\d+)/)?)threshold", name) for name in columns))
    clips = [match[1] for match in sorted(found, key=lambda match: int(match[2] or 0))]
    for clip in (prefix, *clips):
        if np.isfinite(columns.get(f"{clip}threshold", np.nan)).any():
            return clip, len(clips)
    own = any(f"{prefix}{name}" in columns for name in _READINGS)
    return prefix if own else "clip/", len(clips)
