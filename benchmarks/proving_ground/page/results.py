"""The tables of all methods: who wins where, what papers claim, who was not run."""

from typing import Any

from benchmarks.proving_ground.claims import CLAIMS, NOT_RUN, Found, NotRun
from benchmarks.proving_ground.contenders import CONTENDERS, NO_CLIP, Contender
from benchmarks.proving_ground.page.cells import (
    SAFEGUARD,
    range_of,
    ratio_text,
    settings_of,
    table,
    too_narrow,
)
from benchmarks.proving_ground.reporting import FIXED
from benchmarks.proving_ground.tasks import TASKS

NEAR = 1.02
"""What is asked of `safeguard`: the loss over that of the best fixed threshold."""
SPIKED = ("spikes", "bursts")
FEW = 3
"""How many methods are named one by one where they were not run."""


def source(found: dict[str, Any]) -> str:
    """Where the figures are from."""
    lines = []
    for part in found["parts"]:
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        lines.append(f"- `{part['command']}`, {part['date']}; {versions}.")
    return "\n".join(lines)


def settings(found: Found) -> str:
    """Each setting: the lowest loss of all, that of `safeguard` and that without a clip."""
    rows = []
    for task, setting in settings_of(found):
        methods = found.scores[task][setting]
        losses = {name: found.of(task, setting, name) for name in methods}
        best = min(losses, key=losses.__getitem__)
        ours = found.over(task, setting, SAFEGUARD, FIXED)
        lowest = f"`{best}` {ratio_text(found.over(task, setting, best, FIXED))}"
        rows.append(
            (
                f"{task}: {setting} ({lowest})",
                _marked(ratio_text(ours), not ours <= NEAR),
                ratio_text(found.over(task, setting, NO_CLIP, FIXED)),
            )
        )
    return table(("setting (lowest)", "safeguard", "no clip"), rows)


def _share(most: float) -> str:
    return f"At most {most:.0%}" if most else "None"


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
        f"- **Divergence.** {_share(max(runs))} of its runs under a setting diverged, counting all "
        "seven learning rates. Without a clip it is up to "
        f"{max(found.of(*x, NO_CLIP, 'diverged') for x in pairs):.0%}.",
        f"- **Final loss.** In {sum(near)} of {len(near)} settings it is within 2% of the best "
        "fixed threshold, when both have their best learning rate.",
        f"- **Learning rates.** In {len(asked)} settings the good rates without a clip span a "
        f"factor of three or less. With `safeguard` they span thirty or more in "
        f"{sum(not too_narrow(x) for x in asked)} of these.",
        f"- **Spikes.** In the {len(costs)} settings with spikes or bursts, they raise its final "
        f"loss by at most {100 * (max(costs) - 1):.2f}%.",
    )
    return "\n".join(lines)


def claims(found: Found) -> str:
    """The published claims that can be tested here."""
    rows = []
    for claim in CLAIMS:
        if claim.test is None:
            continue
        try:
            outcome = claim.test(found)
            verdict = "yes" if outcome.held else "**no**"
            rows.append((f"{claim.claimed} {_cited(claim.paper)}", outcome.figure, verdict))
        except NotRun:
            rows.append((f"{claim.claimed} {_cited(claim.paper)}", "", NOT_RUN))
    return table(("claim", "measured", "reproduced"), rows)


def _cited(paper: str) -> str:
    authors, _, number = paper.partition(", arXiv:")
    return f"([{authors}](https://arxiv.org/abs/{number}))"


def waiting(found: Found) -> str:
    """Who was not run yet, and where."""
    names: dict[str, list[str]] = {}
    for contender in CONTENDERS:
        if places := _missing(found, contender):
            names.setdefault(places, []).append(f"`{contender.name}`")
    return "\n".join(
        f"- {', '.join(which) if len(which) <= FEW else f'{len(which)} methods'}: {places}."
        for places, which in names.items()
    )


def _missing(found: Found, contender: Contender) -> str:
    """Where the results do not have a method that belongs there."""
    meant = [x for x in settings_of(found) if _belongs(contender, *x)]
    places = [x for x in meant if contender.name not in found.scores[x[0]][x[1]]]
    if len(places) == len(meant):
        return "anywhere"
    return f"{len(places)} of {len(meant)} settings" if places else ""


def _belongs(contender: Contender, task: str, setting: str) -> bool:
    [own] = [x for x in TASKS[task].settings if x.name == setting]
    in_units = contender.instead is None or own.rate_factor == 1
    return contender.family in ("", TASKS[task].family) and in_units
