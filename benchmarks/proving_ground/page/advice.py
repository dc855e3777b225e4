"""The table of symptoms: what to add to a run, with what was measured."""

from benchmarks.proving_ground.claims import Found
from benchmarks.proving_ground.contenders import NO_CLIP
from benchmarks.proving_ground.page.cells import (
    SAFEGUARD,
    loss_text,
    range_of,
    range_text,
    table,
)
from benchmarks.proving_ground.reporting import FIXED


def symptoms(found: Found) -> str:
    """What to do about what one sees, with what was measured."""
    momentum, adamw = "transformer, momentum", "transformer, AdamW"

    def losses(task: str, setting: str, *methods: str) -> str:
        named = (f"`{name}` {loss_text(found, task, setting, name)}" for name in methods)
        return f"{task}, {setting}: {', '.join(named)}"

    def rates(task: str) -> str:
        ours, none = (range_text(range_of(found, task, "clean", x)) for x in (SAFEGUARD, NO_CLIP))
        shares = [found.of(task, "clean", x, "diverged") for x in (SAFEGUARD, NO_CLIP)]
        wide = f"good over a {ours}-fold range of rates (no clip: {none})"
        return f"{task}: {wide}, {shares[0]:.0%} of runs diverge (no clip: {shares[1]:.0%})"

    rows: list[tuple[str, ...]] = [
        (
            "Single steps with a huge gradient",
            "`optclip.safeguard(optimizer)`",
            "; ".join(losses(x, "spikes", SAFEGUARD, FIXED, NO_CLIP) for x in (momentum, adamw)),
        ),
        (
            "It diverges at the learning rate you would like",
            "`optclip.safeguard(optimizer)`",
            "; ".join(rates(x) for x in (momentum, adamw)),
        ),
        (
            "Some dozens of steps, or Lion, and time to try thresholds and learning rates",
            "`optclip.clip_by_global_norm(c)` before the optimizer, c from a sweep",
            "; ".join(
                losses(x, "clean", FIXED, SAFEGUARD, NO_CLIP)
                for x in ("deep network, batch 1024", "transformer, Lion")
            ),
        ),
        (
            "A recurrent network whose gradient explodes",
            "`optclip.adaptive_grad_clip(0.01)` or, after, `optclip.clip_by_param_norm(0.03)`",
            losses(
                "recurrent",
                "adding",
                "adaptive_grad_clip",
                "clip_by_param_norm",
                SAFEGUARD,
                FIXED,
                NO_CLIP,
            ),
        ),
        (
            "A deep network without normalization, large batches",
            "`optclip.clip_by_global_norm(c)` or `optclip.adaptive_grad_clip(0.01)` before",
            losses(
                "deep network, batch 1024", "clean", FIXED, "adaptive_grad_clip", SAFEGUARD, NO_CLIP
            ),
        ),
        (
            "SGD, and norms over several orders of magnitude at every step",
            "`optclip.clip_by_value(c)` before",
            losses("quadratic", "heavy tails", "clip_by_value", FIXED, SAFEGUARD, NO_CLIP),
        ),
        (
            "Embeddings of rare features, Adagrad",
            "`optclip.clip_by_block_rms(0.01)` after, or no clip",
            losses(
                "ranker", "rare features", "clip_by_block_rms", NO_CLIP, SAFEGUARD, FIXED, "clippy"
            ),
        ),
        (
            "Some batches are broken",
            "fix the data; a clip gains little",
            "; ".join(losses(x, "wrong labels", SAFEGUARD, NO_CLIP) for x in (momentum, adamw)),
        ),
        (
            "Nothing is wrong",
            "none; `optclip.measure_norms()` to see the norms",
            losses("quadratic", "gaussian", NO_CLIP, FIXED, "robust_clip"),
        ),
    ]
    return table(("what you see", "what to add", "measured: final loss, best settings"), rows)
