"""The contracts by name, and what came of asking a clip for each."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import optax

from optclip.testing import _numbers, _programs, _states
from optclip.testing._samples import Broken, NotAsked
from optclip.testing._subject import Factory, Subject, raised

Check = Callable[[Subject], Iterator[str]]

CONTRACTS: dict[str, tuple[Check, ...]] = {
    "dtypes": (_numbers.types_are_kept, _numbers.types_of_thresholds),
    "norms": (_numbers.norms_are_right, _numbers.norms_of_many_leaves),
    "bound": (
        _numbers.bound_holds,
        _numbers.threshold_is_the_bound,
        _numbers.small_is_left_alone,
    ),
    "zero_and_infinity": (
        _numbers.no_nan_of_finite_numbers,
        _numbers.threshold_0_and_infinity,
        _numbers.derivatives_are_finite,
    ),
    "refusals": (_numbers.nonsense_is_refused,),
    "nonfinite": (_numbers.nonfinite_is_all_or_nothing, _numbers.nonfinite_is_forgotten),
    "not_floating": (_numbers.others_are_not_touched,),
    "scan": (
        _states.carry_keeps_its_form,
        _states.scan_is_a_loop,
        _states.init_needs_shapes_only,
    ),
    "donation": (_states.no_buffer_is_shared, _states.donated_steps_are_the_same),
    "resume": (_states.resumed_is_the_same_run,),
    "composition": (_states.composes,),
    "meshes": (_programs.same_on_a_mesh,),
    "shard_map": (_programs.same_in_shard_map,),
    "scale": (_numbers.scales_with_the_gradient,),
    "vmap": (_programs.vmap_is_a_loop,),
    "retrace": (
        _programs.compiled_once,
        _programs.transformation_remembers_nothing,
        _programs.without_jit_it_does_the_same,
    ),
    "host": (_programs.nothing_is_asked_of_the_host,),
}
"""What a clip should keep to: a name for each promise, and the checks of it."""


class Result(NamedTuple):
    """What came of one contract.

    Attributes:
        contract: Its name.
        kept: Whether nothing was found; None where nothing could be asked.
        findings: A line for each promise that is not kept, with the input that shows it.
        not_asked: Why some of it was not tried, a line each.
        seconds: How long it took.
    """

    contract: str
    kept: bool | None
    findings: tuple[str, ...]
    not_asked: tuple[str, ...]
    seconds: float


class Report(NamedTuple):
    """What a clip keeps to.

    Attributes:
        clip: Its name.
        threshold: The argument that was taken for the threshold, and its number; "" for none.
        results: One for each contract that was asked for.
    """

    clip: str
    threshold: str
    results: tuple[Result, ...]

    @property
    def kept(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def findings(self) -> tuple[str, ...]:
        """All findings, each with its contract in front."""
        return tuple(f"{x.contract}: {line}" for x in self.results for line in x.findings)

    def to_json(self) -> str:
        """As JSON: the clip, whether it keeps to all, and each contract's fields."""
        results = [{**x._asdict(), "seconds": round(x.seconds, 2)} for x in self.results]
        about = {"clip": self.clip, "threshold": self.threshold, "kept": self.kept}
        return json.dumps({**about, "contracts": results})

    def __str__(self) -> str:
        width = max((len(x.contract) for x in self.results), default=0)
        lines = [f"{self.clip}, tested with {self.threshold}" if self.threshold else self.clip]
        for x in self.results:
            kept = ("kept",) if x.kept else ()
            first, *rest = (*kept, *x.findings, *(f"not asked: {why}" for why in x.not_asked))
            lines.append(f"  {x.contract:{width}}  {first}")
            lines += [f"  {'':{width}}  {line}" for line in rest]
        return "\n".join(lines)


def contracts_named(names: Iterable[str] | None) -> tuple[str, ...]:
    """The contracts of these names; all where none are given.

    Raises:
        ValueError: If there is no such contract.
    """
    if names is None:
        return tuple(CONTRACTS)
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError(f"contracts= names none; there are {', '.join(CONTRACTS)}")
    for name in names:
        if name not in CONTRACTS:
            raise ValueError(f"there is no contract {name!r}; there are {', '.join(CONTRACTS)}")
    return names


def ask(subject: Subject, contract: str) -> Result:
    """Asks a clip for one contract."""
    began = time.perf_counter()
    findings: list[str] = []
    not_asked: list[str] = []
    for check in CONTRACTS[contract]:
        try:
            for found in check(subject):
                findings.append(found)
        except Broken as broken:
            findings.append(str(broken))
        except NotAsked as reason:
            not_asked.append(str(reason))
        except (Exception, SystemExit) as error:  # Whatever it raises is a finding about the clip.
            findings.append(f'could not be tried: "{_promise(check)}" {raised(error)}')
    kept = None if len(not_asked) == len(CONTRACTS[contract]) else not findings
    unique = tuple(dict.fromkeys(findings)), tuple(dict.fromkeys(not_asked))
    return Result(contract, kept, *unique, time.perf_counter() - began)


def _promise(check: Check) -> str:
    return " ".join((check.__doc__ or "").split())


def report(
    clip: optax.GradientTransformation | Factory,
    *,
    threshold: str | None = None,
    contracts: Sequence[str] | None = None,
    quick: bool = False,
    readings: Callable[[Any], Any] | None = None,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Asks a clip for its contracts, and reports what it keeps to and what not.

    Args:
        clip: A clip, or a function that makes one. With a function more can be asked: other
            thresholds, and `axis_name=` where it has that argument.
        threshold: The function's argument that is the threshold, in the units of the gradient or of
            the parameters; by default the first that has to be given. It is tested with its default
            value, or with 1. Other arguments are given by `functools.partial`.
        contracts: Names from `CONTRACTS`; by default all.
        quick: Fewer inputs, in three types of leaves and not in six, compiled with less care.
        readings: What a training script reads from a state, as `optclip.metrics` does; it has to be
            the same inside Optax's wrappers.
        name: What the clip is called in the report; by default the function's name.
        progress: Called with the name of each contract that was asked.

    Returns:
        The report: `print` shows it, `to_json()` is for programs.

    Raises:
        TypeError: If `clip` is neither a clip nor a function that makes one.
        ValueError: If the function has no such argument, or needs others too; if the clip cannot
            take a step; if there is no such contract.

    Examples:
        >>> import optclip, optclip.testing
        >>> print(optclip.testing.report(optclip.clip_by_global_norm, contracts=["refusals"]))
        clip_by_global_norm, tested with max_norm=1
          refusals  kept
    """
    subject = Subject(clip, threshold=threshold, name=name, readings=readings, quick=quick)
    names = contracts_named(contracts)
    subject.try_out()
    results = []
    for contract in names:
        results.append(ask(subject, contract))
        if progress is not None:
            progress(contract)
    return Report(subject.name, subject.tested_with, tuple(results))


def check_clip(
    clip: optax.GradientTransformation | Factory,
    *,
    threshold: str | None = None,
    contracts: Sequence[str] | None = None,
    quick: bool = False,
    readings: Callable[[Any], Any] | None = None,
) -> None:
    """Fails with every finding where a clip does not keep to its contracts; for tests of your own.

    Args:
        clip: A clip, or a function that makes one.
        threshold: The function's argument that is the threshold; see `report`.
        contracts: Names from `CONTRACTS`; by default all.
        quick: Fewer inputs; see `report`.
        readings: What a training script reads from a state; see `report`.

    Raises:
        AssertionError: With a line for each promise that is not kept.
        TypeError: If `clip` is neither a clip nor a function.
        ValueError: If an argument names what is not there; see `report`.

    Examples:
        >>> import optax, optclip.testing
        >>> optclip.testing.check_clip(optax.clip_by_global_norm, contracts=["refusals"])
        Traceback (most recent call last):
        AssertionError: clip_by_global_norm does not keep to 2 of its promises:
          refusals: max_norm=-1 is accepted: float32[3, 4] becomes float32[-0.6, -0.8]
          refusals: max_norm=nan is accepted: float32[3, 4] becomes float32[nan, nan]
    """
    found = report(clip, threshold=threshold, contracts=contracts, quick=quick, readings=readings)
    if not found.kept:
        lines = "\n".join(f"  {line}" for line in found.findings)
        raise AssertionError(
            f"{found.clip} does not keep to {len(found.findings)} of its promises:\n{lines}"
        )
