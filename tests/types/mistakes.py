# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Mistakes that pyright must catch.

Every line has a comment that ignores its error; where there is no error any more, pyright reports
the comment. Nothing here is run.
"""

import jax.numpy as jnp
import optax

import optclip
from optclip import limiters, norms, scopes, thresholds


def thresholds_that_are_none() -> None:
    optclip.clip_by_global_norm("1.0")  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm(None)  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm([1.0, 2.0])  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm(norms.l2)  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm(lambda: 1.0)  # pyright: ignore[reportArgumentType]
    optclip.clip_by_group_norm({"head": "1.0"}, labels="head")  # pyright: ignore[reportArgumentType]
    optclip.clip_by_value((-1.0, 1.0))  # pyright: ignore[reportArgumentType]
    optclip.zclip(decay="0.97")  # pyright: ignore[reportArgumentType]
    optclip.clip_by_window(window=100.0)  # pyright: ignore[reportArgumentType]
    optclip.skip_spikes(optax.sgd(0.1), deviations=optax.constant_schedule(6.0))  # pyright: ignore[reportArgumentType]
    thresholds.minimum(thresholds.constant(1.0), "2.0")  # pyright: ignore[reportArgumentType]
    thresholds.patient(1.0, None)  # pyright: ignore[reportArgumentType]


def one_thing_for_another() -> None:
    optclip.clip_by(norms.l2)  # pyright: ignore[reportArgumentType]
    optclip.clip_by(1.0, scope=norms.l2)  # pyright: ignore[reportArgumentType]
    optclip.clip_by(1.0, norm=norms.lp)  # pyright: ignore[reportArgumentType]
    optclip.clip_by(1.0, norm=scopes.tree)  # pyright: ignore[reportArgumentType]
    optclip.clip_by(1.0, limiter=norms.l2)  # pyright: ignore[reportArgumentType]
    optclip.clip_by(1.0, scope=limiters.smooth)  # pyright: ignore[reportArgumentType]
    optclip.clip_by(1.0, scope="leaf")  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm(1.0, ord="inf")  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm(1.0, axis_name=0)  # pyright: ignore[reportArgumentType]
    optclip.adaptive_grad_clip(0.01, axis="in")  # pyright: ignore[reportArgumentType]
    optclip.safeguard(1.0)  # pyright: ignore[reportArgumentType]
    optclip.safeguard(optclip.clip_by_global_norm)  # pyright: ignore[reportArgumentType]


def words_that_do_not_exist() -> None:
    optclip.clip_by_global_norm(1.0, nonfinite="skip")  # pyright: ignore[reportArgumentType]
    optclip.autoclip(learn_from="winsorized")  # pyright: ignore[reportArgumentType]
    optclip.clip_by_global_norm(1.0, max_norm=2.0)  # pyright: ignore[reportCallIssue]
    optclip.clip_by_global_norm(max_nrom=1.0)  # pyright: ignore[reportCallIssue]
    optclip.clip_by_global_norm(1.0, 2.0)  # pyright: ignore[reportCallIssue]
    optclip.clip_by_norm(1.0)  # pyright: ignore[reportAttributeAccessIssue]


def clips_used_as_functions() -> None:
    grads = {"w": jnp.ones(2)}
    optclip.clip_by_global_norm(1.0)(grads)  # pyright: ignore[reportCallIssue]
    optax.chain(optclip.clip_by_global_norm, optax.sgd(0.1))  # pyright: ignore[reportArgumentType]
    optclip.metrics()  # pyright: ignore[reportCallIssue]
