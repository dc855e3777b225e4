"""The tables of all methods: what `safeguard` keeps, what papers claim, who wins."""

import math
from typing import Any

from benchmarks.proving_ground.claims import CLAIMS, NOT_RUN, Found, NotRun
from benchmarks.proving_ground.contenders import CONTENDERS, NO_CLIP, Contender
from benchmarks.proving_ground.page.cells import (
    SAFEGUARD,
    range_of,
    range_text,
    ratio_text,
    settings_of,
    table,
    too_narrow,
)
from benchmarks.proving_ground.reporting import FIXED
from benchmarks.proving_ground.tasks import TASKS

NEAR, CHEAP = 1.02, 1.01
"""What is asked of `safeguard`: the loss over the best fixed pair, and the cost of spikes."""
SPIKED = ("spikes", "bursts")


def source(found: dict[str, Any]) -> str:
    """Where the figures are from."""
    lines = []
    for place, part in enumerate(found["parts"]):
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        methods = _from_part(found["scores"], place)
        last = place == len(found["parts"]) - 1
        of = "" if last and place == 0 else f" ({', '.join(f'`{x}`' for x in methods)})"
        lines.append(f"`{part['command']}`, {part['date']}; {versions}{of}.")
    return "\n\n".join(lines)


def _from_part(scores: dict[str, Any], place: int) -> list[str]:
    every = (
        x for settings in scores.values() for methods in settings.values() for x in methods.items()
    )
    return list(dict.fromkeys(name for name, score in every if score["part"] == place))


def duties(found: Found) -> str:
    """`safeguard` against what is asked of it."""
    rows = []
    for task, setting in settings_of(found):
        methods = found.scores[task][setting]
        if SAFEGUARD not in methods or FIXED not in methods:
            continue
        ratio = found.over(task, setting, SAFEGUARD, FIXED)
        ours, none = (range_of(found, task, setting, name) for name in (SAFEGUARD, NO_CLIP))
        diverged = found.of(task, setting, SAFEGUARD, "diverged")
        cost = methods[SAFEGUARD].get("cost") if setting in SPIKED else None
        rows.append(
            (
                f"{task}: {setting}",
                _marked(ratio_text(ratio), not ratio <= NEAR),
                _marked(range_text(ours), ours is not None and too_narrow(ours)),
                range_text(none),
                _marked(f"{diverged:.0%}", diverged > 0),
                f"{found.of(task, setting, NO_CLIP, 'diverged'):.0%}",
                "" if cost is None else _marked(f"{100 * (cost - 1):+.2f}%", cost > CHEAP),
            )
        )
    head = (
        "task: setting",
        "loss over the best fixed threshold's",
        "good rates",
        "without a clip",
        "diverged",
        "without a clip",
        "cost of the spikes",
    )
    return table(head, rows)


def _marked(text: str, missed: bool) -> str:
    return f"**{text}**" if missed and text else text


def sums(found: Found) -> str:
    """How often each duty is met."""
    pairs = [x for x in settings_of(found) if SAFEGUARD in found.scores[x[0]][x[1]]]
    near = [found.over(*x, SAFEGUARD, FIXED) <= NEAR for x in pairs]
    ranges = [(range_of(found, *x, SAFEGUARD), range_of(found, *x, NO_CLIP)) for x in pairs]
    asked = [ours for ours, none in ranges if ours is not None and (none or 0) < 3.5]
    costs = [found.of(*x, SAFEGUARD, "cost") for x in pairs if x[1] in SPIKED]
    runs = [found.of(*x, SAFEGUARD, "diverged") for x in pairs]
    lines = (
        f"- Runs that diverge, at any learning rate: {max(runs):.0%} at the most "
        f"(without a clip: {max(found.of(*x, NO_CLIP, 'diverged') for x in pairs):.0%}).",
        f"- Within 2% of the best pair of fixed threshold and learning rate: {sum(near)} of "
        f"{len(near)} settings.",
        f"- Good over a thirtyfold range of learning rates, where no clip is good over threefold "
        f"or less: {sum(not too_narrow(x) for x in asked)} of {len(asked)} settings.",
        f"- What spikes and bursts cost: {100 * (max(costs) - 1):.2f}% of the loss at the most.",
    )
    return "\n".join(lines)


def claims(found: Found) -> str:
    """The published claims."""
    rows = []
    for claim in CLAIMS:
        outcome, verdict = None, "not testable here"
        if claim.test is not None:
            try:
                outcome = claim.test(found)
                verdict = "reproduced" if outcome.held else "**not reproduced**"
            except NotRun:
                verdict = NOT_RUN
        figure = "" if outcome is None else outcome.figure
        rows.append((claim.paper, claim.claimed, claim.tested, verdict, figure))
    return table(("paper", "claim", "asked for here", "", "measured"), rows)


def winners(found: Found) -> str:
    """The best methods of each setting, and who was not run yet."""
    rows = []
    for task, setting in settings_of(found):
        methods = found.scores[task][setting]
        losses = {name: found.of(task, setting, name) for name in methods}
        first = sorted((x for x in losses if math.isfinite(losses[x])), key=losses.__getitem__)[:3]
        best = ", ".join(f"`{name}` {losses[name]:.4g}" for name in first)
        others = (
            f"{losses[name]:.4g}" if math.isfinite(losses[name]) else "diverged"
            for name in (FIXED, SAFEGUARD, NO_CLIP)
            if name in losses
        )
        rows.append((f"{task}: {setting}", best, *others))
    head = ("task: setting", "lowest losses", "best fixed threshold", "`safeguard`", "no clip")
    waiting: dict[str, list[str]] = {}
    for contender in CONTENDERS:
        if places := _missing(found, contender):
            waiting.setdefault(places, []).append(f"`{contender.name}`")
    lines = [f"{', '.join(names)} ({places})" for places, names in waiting.items()]
    return table(head, rows) + (f"\n\n{NOT_RUN.capitalize()}: {'; '.join(lines)}." if lines else "")


def _missing(found: Found, contender: Contender) -> str:
    """Where the results do not have a method that belongs there."""
    meant = [x for x in settings_of(found) if _belongs(contender, *x)]
    places = [x for x in meant if contender.name not in found.scores[x[0]][x[1]]]
    if len(places) == len(meant):
        return "anywhere"
    of_tasks: dict[str, list[str]] = {}
    for task, setting in places:
        of_tasks.setdefault(task, []).append(setting)
    whole = {task: len(settings) == len(found.scores[task]) for task, settings in of_tasks.items()}
    return "; ".join(
        task if whole[task] else f"{task}: {', '.join(settings)}"
        for task, settings in of_tasks.items()
    )


def _belongs(contender: Contender, task: str, setting: str) -> bool:
    [own] = [x for x in TASKS[task].settings if x.name == setting]
    in_units = contender.instead is None or own.rate_factor == 1
    return contender.family in ("", TASKS[task].family) and in_units
