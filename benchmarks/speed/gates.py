"""The limits in `gates.toml`."""

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import contenders, trees
from benchmarks.speed.trees import hint

FILE = Path(__file__).parent.parent / "gates.toml"

EVERY_METHOD = "every method"
GRADIENT = "gradient"
MEASURES = ("time", "temporary memory", "bytes accessed", "compile time")
DTYPES = ("float32", "bfloat16")


class Gate(NamedTuple):
    """A limit.

    Attributes:
        name: What it is called.
        measure: One of `MEASURES`.
        contenders: Whom it binds.
        against: Of which contender the figure is a multiple; "gradient" for memory.
        tree: On which tree.
        dtype: In which dtype.
        limit: The largest ratio.
        why: A sentence.
        missed: Why it is known not to hold; empty where it should.
    """

    name: str
    measure: str
    contenders: tuple[str, ...]
    against: str
    tree: str
    dtype: str
    limit: float
    why: str
    missed: str = ""

    @property
    def place(self) -> tuple[str, str]:
        """Tree and dtype."""
        return self.tree, self.dtype


def load(file: Path) -> list[Gate]:
    """The gates of a file.

    Raises:
        ValueError: If it is none, or names what there is not.
    """
    try:
        listed = tomllib.loads(file.read_text(encoding="utf-8")).get("gate", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--gates {file}: {error}") from None
    if not listed:
        raise ValueError(f"--gates {file}: it has no [[gate]]")
    return [_gate(file, entry) for entry in listed]


def _gate(file: Path, entry: dict[str, Any]) -> Gate:
    fields = {*Gate._fields, "except"}
    where = f"--gates {file}, {entry.get('name', 'a gate without a name')}"
    for name in entry.keys() - fields:
        raise ValueError(f"{where}: there is no {name!r}; {hint(name, fields)}")
    for name in sorted(set(Gate._fields) - {*Gate._field_defaults} - entry.keys()):
        raise ValueError(f"{where}: {name} is missing")
    exceptions, named = entry.get("except", []), list(entry["contenders"])
    everyone = contenders.known()
    if named == [EVERY_METHOD]:
        named = [x.name for x in contenders.methods() if x.name not in exceptions]
    allowed = {
        "measure": MEASURES,
        "dtype": DTYPES,
        "tree": [tree.name for tree in trees.TREES + trees.QUICK_TREES],
        "against": [GRADIENT] if entry["measure"] == "temporary memory" else list(everyone),
    }
    for field, values in allowed.items():
        if entry[field] not in values:
            raise ValueError(f"{where}: {field} {entry[field]!r}; {hint(entry[field], values)}")
    for name in [*named, *exceptions]:
        if name not in everyone:
            raise ValueError(f"{where}: no contender {name!r}; {hint(name, everyone)}")
    values = {field: value for field, value in entry.items() if field in Gate._fields}
    values["contenders"] = tuple(named)
    return Gate(**values)
