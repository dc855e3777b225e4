"""`read_log`: every form in which people have a log, as it is written and as it is found."""

import csv
import gzip
import io
import json

import numpy as np
import pytest

from optclip._tuning.findings import finding
from optclip.tuning import read_log, suggest_threshold

NORMS = [1.0, 0.5, 2.0, float("nan"), 1.5]
STEPS = [10, 20, 30, 40, 50]


def noisy(count: int = 400) -> list[float]:
    return np.exp(0.2 * np.random.default_rng(0).normal(size=count)).tolist()


def lines(template: str) -> str:
    pairs = zip(STEPS, NORMS, strict=True)
    return "".join(template.format(step=step, norm=norm) + "\n" for step, norm in pairs)


def rows(key: str = "grad_norm") -> list[dict]:
    return [{"step": s, key: n, "loss": 2.0} for s, n in zip(STEPS, NORMS, strict=True)]


# Every format ------------------------------------------------------------------------------------

STATE = {"best_metric": None, "log_history": [*rows(), {"step": 50, "eval_loss": 1.0}]}
FILES = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in rows()),
    "one line": json.dumps({"log": 1, "log_history": rows()}),
    "trainer_state": json.dumps(STATE, indent=2),
    "rows": json.dumps(rows(), indent=1),
    "columns": json.dumps({"step": STEPS, "train/grad_norm": NORMS}),
    "csv": "step,epoch,grad_norm\n" + lines("{step},0,{norm}"),
    "csv of another country": "step;gradient_norm\r\n" + lines("{step};{norm}"),
    "tsv": "step\tgnorm\n" + lines("{step}\t{norm}"),
    "wandb": '"Step","run-1 - train/grad_norm","run-1 - train/grad_norm__MIN",'
    '"run-1 - train/grad_norm__MAX"\n' + lines('"{step}","{norm}","0.1","9.9"'),
    "lightning": "epoch,grad_2.0_norm_total,step,val_loss\n"
    + lines("0,{norm},{step},")
    + "0,,50,3",
    "log lines": "start\n"
    + lines("2026-11-30 06:45:16,1 INFO step={step}, lr=1e-3, grad_norm={norm}"),
    "fairseq": lines("| epoch 001 | loss: 2.31 | gnorm: {norm} | step: {step}"),
    "megatron": lines(" iteration {step}/ 100 | grad norm: {norm} | lm loss: 2.3E+00 |"),
    "one norm a line": lines("{norm}"),
    "hugging face on the terminal": lines("{{'loss': 2.3, 'grad_norm': {norm}, 'step': {step}}}"),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_of_every_format(content, tmp_path):
    path = tmp_path / "log"
    path.write_text(content)
    record = read_log(path)
    np.testing.assert_array_equal(record.norms, NORMS)
    steps = [1, 2, 3, 4, 5] if content == FILES["one norm a line"] else STEPS
    assert record.steps.tolist() == steps
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + content.encode()))
    for source in (str(path), io.StringIO(content)):
        np.testing.assert_array_equal(read_log(source).norms, NORMS)


SOURCES = {
    "rows": rows(),
    "rows of text": list(csv.DictReader(io.StringIO(FILES["csv"]))),
    "a reader": csv.DictReader(io.StringIO(FILES["csv"])),
    "nested": [{"step": s, "clip": {"norm": n}} for s, n in zip(STEPS, NORMS, strict=True)],
    "a trainer's state": STATE,
    "columns": {"step": np.array(STEPS), "gradient_norm": np.array(NORMS)},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_python_holds(source):
    record = read_log(source)
    np.testing.assert_array_equal(record.norms, NORMS)
    assert record.steps.tolist() == STEPS
    assert read_log(record) is record


def test_norms_alone_and_a_data_frame():
    class Frame:
        """What is used of `pandas.DataFrame`."""

        columns = ("grad_norm",)

        def to_dict(self, kind):
            return {"grad_norm": NORMS} if kind == "list" else pytest.fail(kind)

    for source in (NORMS, np.array(NORMS), [str(x) for x in NORMS], (x for x in NORMS), Frame()):
        np.testing.assert_array_equal(read_log(source).norms, NORMS)


def test_event_files_of_tensorboard(tmp_path):
    writer_of = pytest.importorskip("tensorboardX").SummaryWriter
    for run in ("a", "b"):
        with writer_of(str(tmp_path / run)) as writer:
            for step, norm in zip(STEPS, [1.0, 0.5, 2.0, 3.0, 1.5], strict=True):
                writer.add_scalar("train/grad_norm", norm, step)
                writer.add_scalar("train/loss", 2.0, step)
    (file,) = (tmp_path / "a").iterdir()
    for source in (tmp_path / "a", file):
        record = read_log(source)
        assert record.norms.tolist() == [1.0, 0.5, 2.0, 3.0, 1.5]
        assert record.steps.tolist() == STEPS
        assert record.loss.tolist() == [2.0] * 5
    with pytest.raises(ValueError, match=r"event files of 2 runs; give one: .*/a, .*/b"):
        read_log(tmp_path)


def test_event_files_of_a_run_that_was_started_again_keep_every_step(tmp_path):
    writer_of = pytest.importorskip("tensorboardX").SummaryWriter
    for suffix, steps in (("1", range(1, 7)), ("2", range(4, 9))):
        with writer_of(str(tmp_path), filename_suffix=suffix) as writer:
            for step in steps:
                writer.add_scalar("grad_norm", step + 0.5, step)
    record = read_log(tmp_path)
    assert record.steps.tolist() == [*range(1, 7), *range(4, 9)]
    assert "two runs in one file?" in record.notes[0]


def test_without_tensorboard_its_files_are_refused_in_one_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    with pytest.raises(ImportError, match=r'pip install "optclip\[examples\]"'):
        read_log(tmp_path)


@pytest.mark.parity
def test_the_state_that_transformers_writes(tmp_path):
    state = pytest.importorskip("transformers").TrainerState(log_history=rows())
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    np.testing.assert_array_equal(read_log(tmp_path).norms, NORMS)


# Which name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "clip/norm",
        "grad_norm",
        "train/grad_norm",
        "train/gradient_norm",
        "gnorm",
        "Grad Norm",
        "optim/total_grad_norm",
        "global_grad_norm",
        "grad_2.0_norm_total_step",
        "norm",
    ],
)
def test_usual_names_are_found(name):
    np.testing.assert_array_equal(read_log(rows(name)).norms, NORMS)


def test_several_norms_are_listed_and_asked_for():
    row = {"actor/grad_norm": 1.0, "critic/grad_norm": 2.0, "update": 7}
    with pytest.raises(
        ValueError, match=r"several norms: actor/grad_norm, critic/grad_norm; .*key"
    ):
        read_log([row])
    assert read_log([row], norm_key="critic/grad_norm").norms.tolist() == [2.0]
    assert read_log([row], norm_key="actor/grad_norm", step_key="update").steps.tolist() == [7]
    with pytest.raises(ValueError, match="no numbers under epoch"):
        read_log([row], norm_key="actor/grad_norm", step_key="epoch")


def test_the_format_can_be_given(tmp_path):
    path = tmp_path / "log"
    path.write_text("a=1,grad_norm\n1,2.0\n")
    assert read_log(path, format="csv").norms.tolist() == [2.0]
    with pytest.raises(ValueError, match="is not jsonl: line 1 is 'a=1,grad_norm'"):
        read_log(path, format="jsonl")
    with pytest.raises(ValueError, match="format must be one of json, jsonl, "):
        read_log(path, format="yaml")


def test_of_several_clips_the_first_with_a_threshold_is_read():
    first = {"clip/0/threshold": np.inf, "clip/0/factor": 1.0, "clip/0/clip_rate": 0.0}
    second = {"clip/1/threshold": 0.5, "clip/1/factor": 0.5, "clip/1/clip_rate": 1.0}
    norms = {"clip/0/norm": 1.0, "clip/1/norm": 2.0}
    record = read_log([norms | first | second] * 60)
    assert (record.norms == 1.0).all()
    assert [record.reading(name)[0] for name in ("threshold", "factor")] == [0.5, 0.5]
    assert record.notes == ("2 clips in the log; norm of clip/0/norm, threshold of clip/1",)
    assert finding(record) == "100% of 60 steps clipped"
    assert suggest_threshold(record).verdict == "clipped"
    own = read_log([norms | second | {"clip/0/threshold": 0.7}])
    assert own.reading("threshold") == [0.7]


def test_a_norm_logged_by_hand_goes_with_the_readings_of_the_clip():
    row = {"train/grad_norm": 2.0, "clip/norm": 2.0, "clip/threshold": 1.0, "clip/norms/a": 2.0}
    record = read_log([row] * 3, norm_key="train/grad_norm")
    assert record.reading("threshold").tolist() == [1.0] * 3
    assert list(record.leaf_norms) == ["a"]
    own = read_log({"grad_norm": [2.0], "grad_threshold": [3.0], "clip/threshold": [1.0]})
    assert own.reading("threshold") == [3.0]


# As it is found -----------------------------------------------------------------------------------


def test_rows_of_other_things_are_no_steps():
    norms = noisy()
    steps = [{"step": at, "clip/norm": norm} for at, norm in enumerate(norms, 1)]
    between = [row for at in range(400) for row in (steps[at], {"epoch": at, "val_loss": 1.0})]
    record = read_log(between)
    assert record.norms.tolist() == norms
    assert record.notes == ("400 rows without a number for clip/norm left out",)
    assert read_log([*steps, {"step": 401, "clip/norm": [1.0]}]).norms.tolist() == norms
    # A null is a norm that was not finite; no norm at all is a row of something else.
    assert read_log([*steps, {"step": 401, "clip/norm": None}, {"end": 1}]).norms[400:].size == 1


def test_rows_of_one_step_are_joined():
    losses = [{"step": at, "loss": 2.0 - at} for at in range(3)]
    apart = [x for row in losses for x in (row, {"step": row["step"], "clip/norm": 1.0})]
    for loss_will_do in (False, True):
        record = read_log(apart, loss_will_do=loss_will_do)
        assert record.columns["loss"].tolist() == [2.0, 1.0, 0.0]
        assert record.notes == ()


def test_a_loss_between_the_norms_is_kept_for_a_picture():
    sparse = [{"step": at, "loss": 2.0} | ({} if at % 10 else {"norm": 1.0}) for at in range(100)]
    assert len(read_log(sparse, loss_will_do=True).columns["loss"]) == 100
    record = read_log(sparse)
    assert len(record.norms) == record.every == 10
    assert any("one row in 10 steps" in note for note in record.notes)


def test_norms_that_stand_several_times_are_counted_once_nan_and_infinity_too():
    """As in a log of every micro-batch, which repeats the norm; a NaN is equal to a NaN."""
    once = [*noisy(20), np.nan, *noisy(5), np.inf, np.nan, *noisy(10)]
    record = read_log([{"clip/norm": norm} for norm in once for _ in range(4)])
    np.testing.assert_array_equal(record.norms, once)
    assert any("each norm stands 4 times in a row" in note for note in record.notes)
    apart = read_log([{"clip/norm": norm} for norm in once])
    np.testing.assert_array_equal(apart.norms, once)
    assert apart.notes == ()
    # The last stretch may be cut short, and a long stretch of NaN be several steps.
    cut = read_log([{"clip/norm": norm} for norm in once for _ in range(4)][:-3])
    np.testing.assert_array_equal(cut.norms, once)


def test_equal_steps_of_whole_rows_are_not_joined_and_are_noted():
    record = read_log([{"step": at // 2, "clip/norm": 1.0 + at} for at in range(6)])
    assert record.norms.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert record.steps.tolist() == [0, 0, 1, 1, 2, 2]
    assert record.notes == ("the steps do not rise (0 after 0); two runs in one file?",)


def test_rows_without_a_step_have_their_own_number():
    record = read_log([{"clip/norm": 1.0} | ({"step": at} if at % 2 else {}) for at in range(1, 9)])
    assert record.steps.tolist() == list(range(1, 9))
    assert record.every == 1
    assert record.notes == ()
    # Also where only a row that is left out has a step.
    assert read_log([{"clip/norm": 1.0}, {"step": 7, "val_loss": 2.0}]).steps.tolist() == [1]


def test_what_is_broken_in_a_file_is_named_and_the_rest_is_used(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"norm": 1}\nhalf{"nor\n{"norm": 2}\n{"norm": 3}\n{"norm": 4}\n{"nor')
    record = read_log(path)
    assert record.norms.tolist() == [1, 2, 3, 4]
    assert record.notes == (
        f"line 2 of {path} cannot be read: 1 left out",
        f"line 6 of {path} is cut short and was left out",
    )
    path.write_text("step,grad_norm\n1,0.5\n2\n3,0.7\n4,")
    record = read_log(path)
    assert record.norms.tolist() == [0.5, 0.7]
    assert record.notes[0] == f"line 3 of {path} cannot be read: 1 left out"
    # A number with too many digits spoils its line only.
    path.write_text('{"norm": 1}\n' * 3 + f'{{"norm": {"1" * 6000}}}\n')
    assert read_log(path).norms.tolist() == [1.0] * 3


def test_a_whole_number_beyond_all_floats_is_an_infinity():
    assert read_log([{"clip/norm": 10**400, "seed": -(10**5000)}]).norms.tolist() == [np.inf]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "has no norms under"),
        (["a"], "must be numbers, one for each step"),
        ([[1.0, 2.0]], r"must be of shape \(steps,\)"),
        ({"a": [1, 2], "norm": [1]}, "norm has 1 values and a has 2"),
        ([{"clip/norm": "high"}], "has the norm as a str; log it as a number"),
        ([{"clip/norm": [3.1]}], "has the norm as a list; log it as a number"),
        ([{"loss": 1.0}], "has no norms under .*; it has loss. Log optclip.metrics"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(source, said):
    with pytest.raises(ValueError, match=said) as raised:
        read_log(source)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_log_says_what_is_looked_for(tmp_path):
    with pytest.raises(
        ValueError, match=r"no log in it that is known \(steps.jsonl, .*TensorBoard"
    ):
        read_log(tmp_path)
    (tmp_path / "metrics.csv").write_text(FILES["csv"])
    np.testing.assert_array_equal(read_log(tmp_path).norms, NORMS)
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "none.jsonl")
