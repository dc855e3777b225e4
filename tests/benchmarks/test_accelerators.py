"""`python -m benchmarks.accelerators`: how it reads a program, its limits, and what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accelerators import gates, programs, reading, targets

ROOT = Path(__file__).parents[2]

GPU = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%quiet (p.1: f32[]) -> f32[] {
  ROOT %p.1 = f32[] parameter(0)
}

%loud (p.2: f32[]) -> f32[] {
  %p.2 = f32[] parameter(0)
  %big = f32[1000]{0} broadcast(%p.2), dimensions={}
  ROOT %least = f32[] reduce(%big, %p.2), dimensions={0}, to_apply=%add
}

ENTRY %main (g.1: bf16[100,10], w.1: f32[100,10], choice: s32[]) -> (f32[100,10], f32[]) {
  %g.1 = bf16[100,10]{1,0} parameter(0)
  %w.1 = f32[100,10]{1,0} parameter(1)
  %choice = s32[] parameter(2)
  %zero = f32[] constant(0)
  %total = f32[] fusion(%g.1, %zero), kind=kInput, calls=%add
  %all-reduce-start = f32[] all-reduce-start(%total), to_apply=%add
  %all-reduce-done = f32[] all-reduce-done(%all-reduce-start)
  %picked = f32[] CHOICE
  %copied = f32[] copy(%picked)
  %stepped = (f32[100,10]{1,0}, pred[100]{0}) fusion(%w.1, %g.1, %copied), kind=kLoop, calls=%add
  %new = f32[100,10]{1,0} get-tuple-element(%stepped), index=0
  ROOT %both = (f32[100,10]{1,0}, f32[]) tuple(%new, %picked)
}
"""


CONDITIONAL = (
    "conditional(%choice, %all-reduce-done, %all-reduce-done), branch_computations={%loud, %quiet}"
)


def test_kernels_and_bytes_of_a_gpu_s_program():
    found = reading.read(GPU.replace("CHOICE", CONDITIONAL))
    # total, the all-reduce's first half, the conditional, copy, step.
    assert found.kernels == 5
    assert found.conditionals == 1
    assert dict(found.collectives) == {"all-reduce": 1}
    total, reduced, copied = 2000 + 4 + 4, 4 + 4, 4 + 4
    stepped = 4000 + 2000 + 4 + 4000 + 100
    assert found.bytes == total + reduced + copied + stepped


TPU = """\
HloModule jit_step

ENTRY %main (g: f32[8,128], w: f32[8,128]) -> f32[8,128] {
  %g = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = f32[8,128]{1,0:T(8,128)} parameter(1)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%g)
  %here = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %part = ((f32[8,128]{1,0}), f32[4,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:4]}
  %half = f32[4,128]{1,0:T(8,128)S(1)} slice-done(%part)
  %joined = f32[8,128]{1,0:S(1)} custom-call(%half, %half), target="ConcatBitcast"
  ROOT %new = f32[8,128]{1,0} fusion(%here, %joined), config={"estimated_cycles":"1234"}
}
"""


def test_what_stays_on_a_tpu_s_chip_is_no_traffic():
    found = reading.read(TPU)
    leaf = 8 * 128 * 4
    assert found.bytes == leaf + leaf / 2 + leaf  # g comes, half of w comes, the result goes.
    assert (found.kernels, found.cycles, found.conditionals) == (3, 1234, 0)


def test_a_branch_that_is_called_is_followed():
    found = reading.read(GPU.replace("CHOICE", "call(%all-reduce-done), to_apply=%loud"))
    assert found.conditionals == 0
    assert found.kernels == 4 + 2
    assert found.bytes > reading.read(GPU.replace("CHOICE", CONDITIONAL)).bytes


def results(**changes):
    return {
        "passes": 4.0,
        "kernels": 50,
        "conditionals": 0,
        "collectives": {"all-reduce": 1},
        "cycles": 0,
        "temporary_share": 0.0,
        **changes,
    }


def test_a_limit_that_does_not_hold_is_named():
    limits = [gates.Gate("h100", ("zclip",), {"passes": 4.05, "kernels": 60}, {})]

    def broken(**changes):
        return gates.broken("h100", "zclip", results(**changes), results(), limits)

    assert broken() == []
    assert broken(passes=5.0) == ["passes 5, at most 4.05"]
    assert broken(kernels=61) == ["kernels 61, at most 60"]
    assert broken(conditionals=1) == ["conditionals"]
    assert broken(collectives={"all-reduce": 2, "all-gather": 1}) == [
        "2 all-reduce, at most 1",
        "1 all-gather, at most 0",
    ]


def test_the_limits_in_the_file_bind_methods_that_there_are():
    everyone, devices = programs.known(), {target.name for target in targets.TARGETS}
    for gate in gates.load():
        assert gate.device in devices
        assert gate.limits
        assert set(gate.methods) <= everyone.keys()
        assert set(gate.missed) <= everyone.keys()


def test_every_method_has_something_to_be_set_beside():
    everyone = programs.known()
    for name, contender in everyone.items():
        assert programs.counterpart(contender) in everyone, name
    chosen = {x.name for x in programs.chosen(["optclip.safeguard"])}
    assert chosen == {"sgd", "safeguard", programs.CLIPPED_ADAMW}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--method", "zclop"], "did you mean zclip?"),
        (["--device", "h10"], "did you mean h100?"),
        (["--compare", "nowhere.json"], "No such file"),
        (["--help"], "examples:"),
    ],
)
def test_what_the_command_says(typed, said, environment):
    command = [sys.executable, "-m", "benchmarks.accelerators", *typed]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    out = ran.stdout if typed == ["--help"] else ran.stderr
    assert said in out or ".[accelerators]" in out
    assert ran.returncode == (0 if typed == ["--help"] else 2)
    assert typed == ["--help"] or len(ran.stderr.splitlines()) == 1
