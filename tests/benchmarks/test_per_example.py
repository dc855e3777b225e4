"""benchmarks/per_example.py: all forms give one gradient, and what is told of each."""

import functools
import json

import jax
from helpers.samples import QUICK

from benchmarks import per_example


def test_every_form_is_timed_and_its_memory_told(monkeypatch, capsys):
    monkeypatch.setattr(per_example, "SIZES", (6, 8, 8, 3))
    monkeypatch.setattr(per_example.jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
    assert per_example.main(["--rounds", "1", "--json"]) == 0  # which compares their results
    out = capsys.readouterr().out
    assert "136 parameters" in out
    figures = json.loads(out.splitlines()[-1])
    assert list(figures) == list(per_example.FORMS)
    assert figures["one clip of the mean"]["ratio"] == 1
    assert all(row["ms"] > 0 for row in figures.values())
    held = {name: row["temporary"] for name, row in figures.items()}
    assert held["vmap"] > 64 > held["lax.scan, 8 at a time"]
