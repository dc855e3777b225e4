"""The trees of parameters that clips are timed on."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import NamedTuple


class Tree(NamedTuple):
    """A tree of parameters, before it has a dtype.

    Attributes:
        name: What is typed for it.
        title: What a table is called.
        shapes: The shape of each leaf, by its name.
    """

    name: str
    title: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def entries(self) -> int:
        """Numbers in the whole tree."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def _matrices(name: str, title: str, count: int, shape: tuple[int, int]) -> Tree:
    return Tree(name, title, {f"matrix_{place:04}": shape for place in range(count)})


def _layers(name: str, title: str, count: int, shape: tuple[int, int]) -> Tree:
    """Half of the leaves are matrices, the other half their biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in range(count // 2):
        shapes[f"matrix_{place:04}"] = shape
        shapes[f"vector_{place:04}"] = shape[1:]
    return Tree(name, title, shapes)


def _count(entries: int) -> str:
    if entries >= 1e9:
        return f"{entries / 1e9:.2f}B"
    return f"{entries / 1e6:.0f}M" if entries >= 1e7 else f"{entries / 1e6:.1f}M"


def transformer(parameters: int, name: str = "transformer") -> Tree:
    """A tree shaped as a transformer's, of about so many parameters.

    Wider ones are deeper too: 4 layers and one more for every 128 of width. The embedding has 32
    rows for each of its columns.
    """

    def shapes_of(width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"embedding": (32 * width, width)}
        for layer in range(4 + width // 128):
            parts: dict[str, tuple[int, ...]] = {
                "attention_in": (width, 3 * width),
                "attention_out": (width, width),
                "widening": (width, 4 * width),
                "narrowing": (4 * width, width),
                "scale_before": (width,),
                "scale_between": (width,),
                "bias_widening": (4 * width,),
                "bias_narrowing": (width,),
            }
            shapes |= {f"layer_{layer:02}_{part}": shape for part, shape in parts.items()}
        return shapes

    candidates = (Tree(name, "", shapes_of(width)) for width in range(32, 8192, 16))
    nearest = min(candidates, key=lambda tree: abs(tree.entries - parameters))
    return nearest._replace(title=f"a transformer-shaped tree of {_count(nearest.entries)}")


def _stacks(layers: int, width: int) -> Tree:
    """A transformer whose layers are stacked along axis 0, as for a scan, and an embedding."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (32 * width, width),
        "stacked_attention_in": (layers, width, 3 * width),
        "stacked_attention_out": (layers, width, width),
        "stacked_bias": (layers, 4 * width),
        "stacked_narrowing": (layers, 4 * width, width),
        "stacked_scale": (layers, width),
        "stacked_widening": (layers, width, 4 * width),
    }
    return Tree("stacked", f"6 stacks of {layers} layers and an embedding", shapes)


TREES = (
    _matrices("16-leaves", "16 leaves of 2M", 16, (2048, 1024)),
    _layers("200-leaves", "200 leaves", 200, (256, 512)),
    _layers("1000-leaves", "1,000 leaves", 1000, (128, 128)),
    _matrices("one-leaf", "one leaf of 33.5M", 1, (8192, 4096)),
    transformer(50_000_000),
)
"""16-leaves: as matrices, since clips by unit need units."""

QUICK_TREES = (
    _matrices("16-small-leaves", "16 leaves of 256k", 16, (512, 512)),
    transformer(1_000_000, "small-transformer"),
)
"""For a first look, and for tests."""

STACKED = _stacks(12, 512)

GPU_PARAMETERS = 1_000_000_000


def named(name: str) -> Tree:
    """One of the trees.

    Raises:
        ValueError: If there is none of this name.
    """
    known = {tree.name: tree for tree in (*TREES, *QUICK_TREES, STACKED)}
    if name not in known:
        raise ValueError(f"there is no tree {name!r}; {hint(name, known)}")
    return known[name]


def hint(name: str, known: Iterable[str]) -> str:
    """What may have been meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def parameters(text: str) -> int:
    """A number of parameters as people write it: 4M, 1.5B, 250k, 1000000.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    number = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]] if found else 0
    if number < 1:
        raise ValueError(f"--parameters {text}: write a number such as 4M, 250k or 1B")
    return int(number)
