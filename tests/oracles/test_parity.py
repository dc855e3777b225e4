"""Every clip that learns, step by step against its paper, over long and unquiet runs."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.registry import METHODS
from helpers.streams import (
    CLOSE,
    STREAMS,
    deviation,
    float32_oracle,
    gradients_of,
    norms_of_rows,
    run_stream,
    teaches,
)

import optclip
from optclip import thresholds
from oracles import learned


class Case(NamedTuple):
    """One program: a clip of the whole gradient.

    Attributes:
        clip: The method.
        oracle: Its oracle, which takes the same arguments.
        settings: The numbers it is run with, given as traced values; {} for the defaults.
        static: Arguments that set a program.
        streams: What it is run on.
    """

    clip: Callable[..., Any]
    oracle: Callable[..., Any]
    settings: tuple[dict[str, float], ...] = ({},)
    static: Mapping[str, Any] = MappingProxyType({})
    streams: tuple[str, ...] = tuple(STREAMS)

    def __str__(self) -> str:
        words = [str(word) for word in self.static.values()]
        words += sorted({name for setting in self.settings for name in setting})
        return "-".join((self.clip.__name__, *words))


CHANGING = tuple(name for name, stream in STREAMS.items() if not stream.steady)
TWO = ("usual", "loud, huge")
IMPATIENT = ({"patience": 1}, {"patience": 4}, {"patience": 20})
SOURCES = ("raw", "clipped", "winsorized")


def patient_autoclip(percentile, patience, window, learn_from):
    """A rule that takes no patience of its own, made patient."""
    rule = thresholds.quantile_over_window(percentile, window, learn_from)
    return optclip.clip_by(thresholds.patient(rule, patience))


def patient_window(patience, window, learn_from):
    """Another, with the default of `clip_by_window`."""
    rule = thresholds.mean_over_window(3.0, window, learn_from)
    return optclip.clip_by(thresholds.patient(rule, patience))


def autoclips() -> Iterator[Case]:
    def case(*settings, **static):
        return Case(optclip.autoclip, learned.AutoClip, settings, static, TWO)

    yield case({})
    yield case(*({"percentile": x} for x in (90.0, 50.0, 0.0, 100.0)), window=50)
    yield case({"percentile": 25.0}, window=1)
    # Percentiles that fall between two norms: one that is a norm itself is clipped or not by luck.
    yield case({"percentile": 83.0}, {"percentile": 96.0}, window=99, learn_from="clipped")
    patient = ({"percentile": 83.0, "patience": 5}, {"percentile": 96.0, "patience": np.inf})
    yield Case(
        patient_autoclip, learned.AutoClip, patient, {"window": 99, "learn_from": "clipped"}, TWO
    )


def quantiles() -> Iterator[Case]:
    def case(streams, *settings):
        # Of equal norms, the threshold comes back to the very norm: above or below is rounding.
        return Case(optclip.clip_by_quantile, learned.OnlineQuantile, settings, {}, streams)

    yield case(CHANGING, {})
    half, most = {"quantile": 0.5, "step_size": 0.05}, {"quantile": 0.99, "step_size": 0.5}
    yield case(CHANGING, half, most)
    yield case(("quiet", "usual"), {"init": 0.1}, {"init": 50.0, "quantile": 0.25})


def zclips() -> Iterator[Case]:
    def case(*settings, streams=tuple(STREAMS), **static):
        return Case(optclip.zclip, learned.ZClip, settings, static, streams)

    numbers = (
        {"z_threshold": 2.0, "decay": 0.9, "warmup_steps": 1},
        {"z_threshold": 3.0, "decay": 0.98, "warmup_steps": 0},
        {"z_threshold": 1.0, "decay": 0.8, "warmup_steps": 60},
    )
    yield case({})
    yield from (case(*numbers, variant=variant) for variant in ("reciprocal", "mean", "max"))
    yield from (case({}, *numbers, learn_from=source) for source in ("raw", "winsorized"))
    for source, variant in (("clipped", "reciprocal"), ("winsorized", "max")):
        yield case(*IMPATIENT, learn_from=source, variant=variant)


def windows() -> Iterator[Case]:
    def case(*settings, streams=TWO, **static):
        return Case(optclip.clip_by_window, learned.MeanOverWindow, settings, static, streams)

    deviations = tuple({"deviations": x} for x in (0.0, 1.0, 6.0))
    yield case({}, streams=tuple(STREAMS))
    yield case(*deviations, window=1)
    yield case(*deviations, window=40, learn_from="clipped")
    yield case(*deviations[:2], window=301, learn_from="clipped")
    static = {"window": 33, "learn_from": "clipped"}
    yield Case(patient_window, learned.MeanOverWindow, IMPATIENT, static, TWO)


def averages() -> Iterator[Case]:
    def case(*settings, **static):
        return Case(optclip.clip_by_moving_average, learned.MovingAverage, settings, static)

    numbers = ({"multiplier": 1.2, "decay": 0.9}, {"multiplier": 5.0, "decay": 0.0})
    yield case({})
    yield from (case(*numbers, learn_from=source) for source in ("raw", "clipped"))
    yield case(*IMPATIENT)


def robusts() -> Iterator[Case]:
    def case(*settings, **static):
        return Case(optclip.robust_clip, learned.Robust, settings, static)

    numbers = (
        {"deviations": -0.5, "decay": 0.9, "max_rise": 0.02},
        {"deviations": 1.5, "decay": 0.99, "max_rise": 0.0},
        {"deviations": 0.0, "decay": 0.0, "max_rise": np.inf},
    )
    yield case({})
    yield from (case(*numbers, learn_from=source) for source in SOURCES)


def others(cases: list[Case]) -> Iterator[Case]:
    """Every other method that learns from the norm: its defaults, its entry, all it learns from."""
    have = {case.clip.__name__ for case in cases}
    for method in METHODS:
        if method.name in have or method.name not in learned.OF_THE_NORM:
            continue
        of_it = functools.partial(Case, method.factory, learned.OF_THE_NORM[method.name])
        yield of_it()
        numbers = {name: method.arguments[name] for name in method.traced}
        static = {name: x for name, x in method.arguments.items() if name not in numbers}
        yield of_it((numbers,), static)
        if "learn_from" in inspect.signature(method.factory).parameters:
            yield from (of_it(({},), {"learn_from": source}) for source in ("raw", "clipped"))


CASES = [*autoclips(), *quantiles(), *zclips(), *windows(), *averages(), *robusts()]
CASES += others(CASES)
RUNS = [pytest.param(case, x, id=f"{case}-{x}") for case in CASES for x in case.streams]


def deviations_of(case: Case, setting: dict[str, float], stream: str) -> tuple[float, float]:
    """The largest deviations of a threshold and of an applied norm over a stream."""
    rows = gradients_of(STREAMS[stream])
    seen, result = teaches(rows), run_stream(case.clip, rows, setting, case.static)
    oracle = float32_oracle(case.oracle, **setting, **case.static)
    right = np.array([oracle.step(norm) for norm in norms_of_rows(rows[seen])])
    # Steps that teach nothing are handed on as they are.
    np.testing.assert_array_equal(result.updates[~seen], rows[~seen])
    thresholds, applied = result.readings["clip/threshold"], norms_of_rows(result.updates)
    return deviation(thresholds[seen], right[:, 0]), deviation(applied[seen], right[:, 1])


@pytest.mark.parametrize(("case", "stream"), RUNS)
def test_thresholds_and_norms_are_the_papers(case, stream, strict):
    for setting in case.settings:
        threshold, applied = deviations_of(case, setting, stream)
        assert threshold <= CLOSE, f"threshold off by {threshold:.1e} with {setting}"
        assert applied <= CLOSE, f"applied norm off by {applied:.1e} with {setting}"
