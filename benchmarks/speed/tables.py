"""The figures as tables to print."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.speed.measuring import REFERENCES

LEGEND = (
    "Times: median of all rounds, ms; ratios: median of the ratio in each round (quartiles in the "
    "JSON; those of the time here). temp: memory beside arguments and results, of the gradient's "
    "size. passes: the tree read or written by the main program, in gradients; reads: reductions "
    "of a leaf, those that run rarely after the +; kernels: what the main program runs one by "
    "one; bytes: XLA's estimate, rare branches included, in gradients. lower, compile: seconds. A "
    "tree that fits into the caches can be read faster than memory."
)


def top(header: dict[str, Any]) -> str:
    """The machine and its memory, in two lines."""
    machine, bandwidth = header["machine"], header["bandwidth"]
    torch = f"torch {machine['torch']}" if machine["torch"] else "no torch (its row is left out)"
    speeds = ", ".join(f"{name} {x / 1e9:.1f} GB/s" for name, x in bandwidth.items())
    return (
        f"{machine['device']}, {machine['cores']} cores; jax {machine['jax']}, "
        f"optax {machine['optax']}, optclip {machine['optclip']}, {torch}; {machine['date']}\n"
        f"memory: {speeds}"
    )


def table(measured: dict[str, Any], header: dict[str, Any]) -> Table:
    """One tree in one dtype."""
    speed, fastest = measured["floor_bytes_per_second"], max(header["bandwidth"].values())
    result = _table(
        f"{measured['title']} ({measured['parameters']:,} parameters, {measured['leaves']:,} "
        f"leaves, {measured['rounds']} rounds)",
        f"floor: {speed / 1e9:.1f} GB/s, {speed / fastest:.0%} of the machine's memory bandwidth",
    )
    result.add_column("step", no_wrap=True)
    _add(result, "ms", "quartiles", "/sgd", "/floor", "/optax", "/global")
    _add(result, "temp", "passes", "reads", "kernels", "bytes", "lower", "compile")
    for name, of in measured["contenders"].items():
        time = of["milliseconds"]
        ratios = [of["ratios"].get(reference) for reference in REFERENCES]
        result.add_row(
            name,
            f"{time['median']:.2f}",
            f"{time['low']:.2f}-{time['high']:.2f}",
            *(f"{ratio['median']:.2f}" if ratio else "" for ratio in ratios),
            *_compiled(of),
        )
    return result


def _compiled(of: dict[str, Any]) -> list[str]:
    if "temporary_bytes" not in of:  # PyTorch runs eagerly.
        return []
    rarely = f"+{of['reductions_rarely']}" if of["reductions_rarely"] else ""
    accessed = of["accessed_share"]
    return [
        percent(of["temporary_share"]),
        f"{of['passes']:.2f}",
        f"{of['reductions']}{rarely}",
        str(of["kernels"]),
        "" if accessed is None else f"{accessed:.2f}",
        f"{of['lowering_seconds']:.2f}",
        f"{of['compile_seconds']:.2f}",
    ]


def percent(share: float) -> str:
    """A share of the gradient's size."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"


def comparison(measured: dict[str, Any], earlier: dict[str, Any]) -> Table:
    """The change of each ratio against an earlier run of the same tree and dtype.

    A change is marked where each median lies outside the quartiles of the other: beyond the spread.
    """
    result = _table(
        f"{measured['title']}: ratios, earlier → now", "*: beyond the spread of both runs"
    )
    result.add_column("step", no_wrap=True)
    _add(result, *(f"/{'global' if x == REFERENCES[-1] else x}" for x in REFERENCES))
    for name, of in measured["contenders"].items():
        before = earlier["contenders"].get(name)
        if before is None:
            continue
        pairs = [(before["ratios"].get(x), of["ratios"].get(x)) for x in REFERENCES]
        result.add_row(name, *(_change(*pair) if all(pair) else "" for pair in pairs))
    return result


def _change(old: Any, new: Any) -> str:
    mark = "*" if beyond_spread(old, new) else " "
    change = new["median"] / old["median"] - 1
    return f"{old['median']:.2f} → {new['median']:.2f} {change:+.0%}{mark}"


def beyond_spread(old: dict[str, float], new: dict[str, float]) -> bool:
    """Whether each median lies outside the quartiles of the other run."""
    return not (
        old["low"] <= new["median"] <= old["high"] or new["low"] <= old["median"] <= new["high"]
    )


def gates(verdicts: list[dict[str, Any]]) -> Table:
    """A row a gate; of one with several contenders the worst, and all that do not hold."""
    result = _table("gates", "")
    result.add_column("gate", overflow="fold")
    result.add_column("step", overflow="fold")
    _add(result, "measured", "limit")
    result.add_column("of", overflow="fold")
    result.add_column("holds")
    for gate in dict.fromkeys(verdict["gate"] for verdict in verdicts):
        of_gate = [x for x in verdicts if x["gate"] == gate]
        of_gate.sort(key=lambda verdict: verdict["measured"], reverse=True)
        failing = [x for x in of_gate if not x["holds"]]
        for verdict in failing or of_gate[:1]:
            others = len(of_gate) - 1
            worst = f" (worst of {others + 1})" if others and not failing else ""
            result.add_row(
                gate,
                verdict["contender"] + worst,
                _measured(verdict["measured"], verdict),
                _measured(verdict["limit"], verdict),
                verdict["against"],
                "yes" if verdict["holds"] else "NO",
            )
        if failing and len(of_gate) > len(failing):
            result.add_row("", f"the other {len(of_gate) - len(failing)}", "", "", "", "yes")
    return result


def missed(verdicts: list[dict[str, Any]]) -> list[str]:
    """A line for each gate that does not hold and is known not to: what bounds it."""
    reasons = {x["gate"]: x["missed"] for x in verdicts if not x["holds"] and x["missed"]}
    return [f"{gate}: {reason}" for gate, reason in reasons.items()]


def _measured(value: float, verdict: dict[str, Any]) -> str:
    return f"{value:.2%}" if verdict["measure"] == "temporary memory" else f"{value:.3f}"


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )


def _add(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
