"""Every method keeps to what `optclip.testing` asks of any clip."""

import functools

import pytest
from helpers.samples import ALL_METHODS, once_a_method

import optclip
from optclip.testing import CONTRACTS
from optclip.testing._report import ask
from optclip.testing._subject import Subject

LESS = {
    "clippy": {"absolute": 1e-12},  # Which is a scale of its own.
}
"""Arguments other than the registry's."""


@once_a_method
def subject_of(method):
    detail = {"detail": True} if method.takes("detail") else {}
    arguments = {**method.arguments, **detail, **LESS.get(method.name, {})}
    return Subject(
        functools.partial(method.factory, **arguments),
        threshold=method.threshold,
        readings=optclip.metrics,
        quick=True,
    )


UNBOUND = {("clip_by_adam_rms", "bound")}
"""What a method does not promise: the bound is on Adam's ratio, which is bounded by itself."""


@pytest.mark.parametrize(
    ("contract", "method"),
    [(c, m) for c in CONTRACTS for m in ALL_METHODS if (m.name, c) not in UNBOUND],
    ids=str,
)
def test_contract(method, contract, request):
    if contract != "composition":  # Optax's own wrappers promote.
        request.getfixturevalue("strict")
    result = ask(subject_of(method), contract)
    assert not result.findings, "\n".join(result.findings)
