"""What `read` makes of logs as they are found: several clips, rows of other things, odd numbers."""

import numpy as np
import pytest

from optclip._tuning.findings import finding
from optclip._tuning.records import read
from optclip.tuning import suggest_threshold


def noisy(count: int = 400) -> list[float]:
    return np.exp(0.2 * np.random.default_rng(0).normal(size=count)).tolist()


def test_of_several_clips_the_first_with_a_threshold_is_read():
    first = {"clip/0/threshold": np.inf, "clip/0/factor": 1.0, "clip/0/clip_rate": 0.0}
    second = {"clip/1/threshold": 0.5, "clip/1/factor": 0.5, "clip/1/clip_rate": 1.0}
    norms = {"clip/0/norm": 1.0, "clip/1/norm": 2.0}
    record = read([norms | first | second] * 40)
    assert (record.norms == 1.0).all()
    assert [record.reading(name)[0] for name in ("threshold", "factor")] == [0.5, 0.5]
    assert record.notes == ("2 clips in the log; norm of clip/0/norm, threshold of clip/1",)
    assert finding(record) == "100% of 40 steps clipped"
    assert any("100% of the steps were clipped" in x for x in suggest_threshold(record).notes)
    own = read([norms | second | {"clip/0/threshold": 0.7}])
    assert own.reading("threshold") == [0.7]


def test_a_norm_logged_by_hand_goes_with_the_readings_of_the_clip():
    row = {"train/grad_norm": 2.0, "clip/norm": 2.0, "clip/threshold": 1.0, "clip/norms/a": 2.0}
    record = read([row] * 3, "train/grad_norm")
    assert record.reading("threshold").tolist() == [1.0] * 3
    assert list(record.leaf_norms) == ["a"]
    own = read({"grad_norm": [2.0], "grad_threshold": [3.0], "clip/threshold": [1.0]})
    assert own.reading("threshold") == [3.0]


def test_rows_of_other_things_are_no_steps():
    norms = noisy()
    rows = [{"step": at, "clip/norm": norm} for at, norm in enumerate(norms, 1)]
    between = [row for at in range(400) for row in (rows[at], {"epoch": at, "val_loss": 1.0})]
    record = read(between)
    assert record.norms.tolist() == norms
    assert record.notes == ("400 rows without a number for clip/norm left out",)
    assert read([*rows, {"step": 401, "clip/norm": [1.0]}]).norms.tolist() == norms
    assert read([*rows, {"step": 401, "clip/norm": None}, {"end": 1}]).norms[400:].size == 1


def test_rows_of_one_step_are_joined():
    rows = [{"step": at, "loss": 2.0 - at} for at in range(3)]
    apart = [x for row in rows for x in (row, {"step": row["step"], "clip/norm": 1.0})]
    for loss_will_do in (False, True):
        record = read(apart, loss_will_do=loss_will_do)
        assert record.columns["loss"].tolist() == [2.0, 1.0, 0.0]
        assert record.notes == ()


def test_a_loss_between_the_norms_is_kept_for_a_picture():
    rows = [{"step": at, "loss": 2.0} | ({} if at % 10 else {"norm": 1.0}) for at in range(100)]
    assert len(read(rows, loss_will_do=True).columns["loss"]) == 100
    record = read(rows)
    assert len(record.norms) == record.every == 10
    assert any("one row in 10 steps" in note for note in record.notes)


def test_norms_that_stand_several_times_are_counted_once_nan_and_infinity_too():
    """As in a log of every micro-batch, which repeats the norm; a NaN is equal to a NaN."""
    once = [*noisy(20), np.nan, *noisy(5), np.inf, np.nan, *noisy(10)]
    record = read([{"clip/norm": norm} for norm in once for _ in range(4)])
    np.testing.assert_array_equal(record.norms, once)
    assert any("each norm stands 4 times in a row" in note for note in record.notes)
    apart = read([{"clip/norm": norm} for norm in once])
    np.testing.assert_array_equal(apart.norms, once)
    assert apart.notes == ()
    # The last stretch may be cut short, and a long stretch of NaN be several steps.
    cut = read([{"clip/norm": norm} for norm in once for _ in range(4)][:-3])
    np.testing.assert_array_equal(cut.norms, once)


def test_equal_steps_of_whole_rows_are_not_joined_and_are_noted():
    rows = [{"step": at // 2, "clip/norm": 1.0 + at} for at in range(6)]
    record = read(rows)
    assert record.norms.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert record.steps.tolist() == [0, 0, 1, 1, 2, 2]
    assert record.notes == ("the steps do not rise (0 after 0); two runs in one file?",)


def test_rows_without_a_step_have_their_own_number():
    rows = [{"clip/norm": 1.0} | ({"step": at} if at % 2 else {}) for at in range(1, 9)]
    record = read(rows)
    assert record.steps.tolist() == list(range(1, 9))
    assert record.every == 1
    assert record.notes == ()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"clip/norm": 10**400}, "clip/norm has a whole number beyond all floats"),
        ({"clip/norm": 1.0, "seed": 10**5000}, "seed has a whole number beyond all floats"),
        ({"clip": {"norm": 0.7}}, "clip/norm, but nested: clip holds an object; log flat names"),
    ],
)
def test_what_is_no_number_is_said_in_one_line(row, said):
    with pytest.raises(ValueError, match=said):
        read([row])
    if "clip" not in row:
        with pytest.raises(ValueError, match=said):
            read({name: [x] for name, x in row.items()})


def test_a_list_too_deep_to_show_is_refused_in_one_line():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="as a list: 'too deeply nested to show'"):
        read([{"clip/norm": deep}])


def test_a_number_with_too_many_digits_spoils_its_line_only(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"norm": 1}\n' * 3 + f'{{"norm": {"1" * 6000}}}\n')
    record = read(path)
    assert record.norms.tolist() == [1.0] * 3
    assert "was left out" in record.notes[0]
