"""Whoever adds a method needs no more than its function, an entry of the registry and an oracle."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_ALL = "test_every_public_name_is_in_the_registry or test_every_method_has_an_oracle"
ABOUT = 100
"""Tests that there are of a method that learns."""


def test_every_contract_is_tested_on_it(environment):
    paths = [str(ROOT), str(ROOT / "tests"), environment["PYTHONPATH"]]
    command = [sys.executable, "-m", "pytest", "-p", "helpers.new_method", "-n", "0"]
    ran = subprocess.run(
        [*command, "tests/contracts", "tests/oracles", "-k", f"clip_by_pattern_median or {OF_ALL}"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > ABOUT
