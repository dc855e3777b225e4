"""The public methods as a table, made from their own signatures and docstrings."""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip
from optclip import limiters, norms, scopes, thresholds

__all__ = ["Argument", "Method", "Paper", "methods", "named"]

_PAPER = re.compile(
    r'(?P<authors>[^"]+), "(?P<title>[^"]+)", (?P<year>\d{4}), arXiv:(?P<number>\d{4}\.\d{4,5})'
)

FAMILIES = {
    "fixed": "Fixed thresholds",
    "learned": "Learned thresholds",
    "relative": "Relative to the parameters",
    "wrappers": "Wrappers",
}
"""Kinds of methods and their titles: each has a page in docs/methods/ and a table in README.md."""


class Argument(NamedTuple):
    """An argument of a method.

    Attributes:
        name: Its name.
        default: Its default as it is typed in Python; None where it must be given.
        keyword_only: Whether it must be given by name.
    """

    name: str
    default: str | None
    keyword_only: bool

    def __str__(self) -> str:
        return self.name if self.default is None else f"{self.name}={self.default}"


class Paper(NamedTuple):
    """A paper that a method is from.

    Attributes:
        authors: As they are cited: "Wang et al."
        title: Its title.
        year: When it appeared.
        url: Where it is.
    """

    authors: str
    title: str
    year: int
    url: str

    def __str__(self) -> str:
        return f"{self.authors} {self.year}, arXiv:{self.url.rpartition('/')[-1]}"


class Method(NamedTuple):
    """A public function of optclip.

    Attributes:
        name: Its name.
        arguments: All that it takes.
        summary: The first line of its docstring.
        papers: Those that its docstring names with their arXiv numbers.
        document: The whole docstring.
    """

    name: str
    arguments: tuple[Argument, ...]
    summary: str
    papers: tuple[Paper, ...]
    document: str

    def to_dict(self) -> dict[str, Any]:
        """The same for `json.dumps`."""
        arguments = [argument._asdict() for argument in self.arguments]
        papers = [paper._asdict() for paper in self.papers]
        plain = {"arguments": arguments, "papers": papers, "wraps": self.wraps}
        return self._asdict() | plain

    @property
    def wraps(self) -> bool:
        """Whether it holds the optimizer, and is not chained with it."""
        return bool(self.arguments) and self.arguments[0].name == "inner"

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments without a default, but for the optimizer that it wraps."""
        return tuple(x.name for x in self.arguments if x.default is None and x.name != "inner")

    @property
    def needs_adam(self) -> bool:
        """Whether the optimizer that it wraps must hold an Adam: its docstring says so."""
        return "`inner` holds no Adam" in self.document

    @property
    def follows(self) -> bool:
        """Whether it bounds the update, and stands after the optimizer: its docstring says so."""
        return bool(re.search(r"\b[Ff]or after the optimizer[.:]", self.document))

    @property
    def like(self) -> str:
        """What other libraries call it: what its docstring has in a line "Like ...."."""
        found = re.search(r"^Like (.+)\.$", self.document, re.MULTILINE)
        return found[1] if found else ""

    @property
    def family(self) -> str:
        """One of `FAMILIES`: as the file with the method is called, or from what it asks for."""
        file = getattr(optclip, self.name).__module__.rpartition(".")[-1]
        if self.wraps or file in FAMILIES:
            return "wrappers" if self.wraps else file
        if "`update` gets no `params`" in self.document:
            return "relative"
        return "fixed" if self.needs else "learned"

    @property
    def call(self) -> str:
        """How it is called, with every default."""
        at = next((n for n, x in enumerate(self.arguments) if x.keyword_only), None)
        shown = [str(argument) for argument in self.arguments]
        if at is not None:
            shown.insert(at, "*")
        return f"optclip.{self.name}({', '.join(shown)})"


def methods() -> tuple[Method, ...]:
    """Every clip and wrapper, by name; not `clip_by`, which makes them, nor whole optimizers."""
    return tuple(
        method_of(name, function)
        for name, function in sorted(_functions().items())
        if name not in ("clip_by", "stable_adamw") and _is_transformation(function)
    )


def named(name: str, only_methods: bool = False) -> Method:
    """One of `methods`, or another public function.

    Raises:
        ValueError: If there is none of this name.
    """
    known = [x.name for x in methods()] if only_methods else sorted(_functions())
    name = name.strip().removeprefix("optclip.")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"optclip has no method {name!r}; {hint}")
    return method_of(name, _functions()[name])


def method_of(name: str, function: Callable[..., Any]) -> Method:
    """What a function says of itself."""
    document = inspect.getdoc(function) or ""
    arguments = (
        Argument(
            parameter.name,
            None if parameter.default is parameter.empty else _typed(parameter.default),
            parameter.kind is parameter.KEYWORD_ONLY,
        )
        for parameter in inspect.signature(function).parameters.values()
    )
    summary = document.partition("\n\n")[0].replace("\n", " ")
    return Method(name, tuple(arguments), summary, _papers(document), document)


def plumbing(of: tuple[Method, ...]) -> tuple[Argument, ...]:
    """The arguments by name that most of the methods take alike: not what tells them apart."""
    by_name = [x for method in of for x in method.arguments if x.keyword_only]
    return tuple(x for x in dict.fromkeys(by_name) if 2 * by_name.count(x) > len(of))


def _functions() -> dict[str, Callable[..., Any]]:
    public = {name: getattr(optclip, name) for name in optclip.__all__}
    return {name: value for name, value in public.items() if inspect.isfunction(value)}


def _is_transformation(function: Callable[..., Any]) -> bool:
    returns = inspect.signature(function, eval_str=True).return_annotation
    return isinstance(returns, type) and issubclass(returns, optax.GradientTransformation)


def _typed(value: Any) -> str:
    """A default as it is typed: `scopes.tree` rather than all that is in it."""
    for module in (limiters, norms, scopes, thresholds):
        for name, member in vars(module).items():
            if member is value and isinstance(value, tuple):
                return f"{module.__name__.rpartition('.')[-1]}.{name}"
    return repr(value)


def _papers(document: str) -> tuple[Paper, ...]:
    references = " ".join(document.partition("\nReferences:\n")[2].split())
    return tuple(
        Paper(
            _cited(found["authors"]),
            found["title"],
            int(found["year"]),
            f"https://arxiv.org/abs/{found['number']}",
        )
        for found in _PAPER.finditer(references)
    )


def _cited(authors: str) -> str:
    """The first of more than two authors; without the words that lead to them."""
    authors = re.split(r"[:;.] (?=[A-Z])", authors)[-1].strip()
    names = re.split(r", | and ", authors)
    return f"{names[0]} et al." if len(names) > 2 else authors
