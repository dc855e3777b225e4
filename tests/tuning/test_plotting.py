"""`plot_run`: what is drawn of a run, and whether its title is true."""

import json
import sys
import time

import numpy as np
import pytest

from optclip._tuning.findings import SPIKE_TIMES, finding, look_at, usual_norm
from optclip._tuning.log import read_log
from optclip._tuning.plotting import MOST_COLUMNS, MOST_LEAVES, plot_run


def rows_of(norms, threshold=1.0, **columns):
    """The log of a run that was clipped to a threshold; more columns by name."""
    clipped, finite, rows = 0, 0, []
    for at, norm in enumerate(norms):
        clipped += norm > threshold
        finite += norm == norm
        row = {
            "step": at + 1,
            "clip/norm": norm,
            "clip/clipped_norm": min(norm, threshold),
            "clip/threshold": threshold,
            "clip/factor": min(1.0, threshold / norm) if norm else 1.0,
            "clip/clip_rate": clipped / finite,
            "clip/recent_clip_rate": clipped / finite,
        }
        rows.append(row | {name.replace("__", "/"): x[at] for name, x in columns.items()})
    return rows


def written(path, rows, cut_short=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut_short)
    return path


def labels(figure):
    """The label of each panel, and of a color bar, in one line."""
    return [axis.get_ylabel().replace("\n", " ") for axis in figure.axes]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def title_of(figure):
    """On one line, however wide the figure is."""
    return figure.get_suptitle().replace("\n", " ")


def drawn(axis, label):
    """The points of the line with this label."""
    (line,) = (line for line in axis.lines if line.get_label() == label)
    return line.get_xydata()


def noise(count, deviation=0.2, seed=0):
    return np.exp(deviation * np.random.default_rng(seed).normal(size=count))


# What is drawn -----------------------------------------------------------------------------------


def test_an_ordinary_run(tmp_path):
    norms = np.array([0.5, 2.0, 4.0, 0.25] * 10)
    loss = np.linspace(2.0, 1.0, 40)
    log = written(tmp_path / "run.jsonl", rows_of(norms.tolist(), loss=loss.tolist()))
    figure = plot_run(log, tmp_path / "run.png")
    assert labels(figure) == ["loss", "gradient norm (log axis)", "share of steps (%)"]
    assert figure.axes[-1].get_xlabel() == "step"
    assert figure.axes[1].get_yscale() == "log"
    assert legend(figure.axes[1]) == ["norm before clipping", "clipped step", "threshold"]
    assert legend(figure.axes[2]) == ["clipped since the start", "clipped recently"]
    np.testing.assert_array_equal(drawn(figure.axes[1], "norm before clipping")[:, 1], norms)
    clipped = drawn(figure.axes[1], "clipped step")
    np.testing.assert_array_equal(clipped[:, 0], np.flatnonzero(norms > 1) + 1)
    np.testing.assert_array_equal(clipped[:, 1], norms[norms > 1])
    assert set(drawn(figure.axes[1], "threshold")[:, 1]) == {1.0}
    # 20 of 40; the mean of the last two losses is 1.013.
    assert title_of(figure) == "50% of 40 steps clipped; loss 1.01 at the end"
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_title_and_subtitle_can_be_given():
    figure = plot_run([1.0, 2.0], title="A title", subtitle="a setup")
    assert title_of(figure) == "A title"
    assert "a setup" in [text.get_text() for text in figure.texts]


def test_no_setting_of_matplotlib_is_changed():
    import matplotlib

    before = matplotlib.rcParams.copy()
    plot_run([1.0, 2.0])
    changed = [name for name, value in matplotlib.rcParams.items() if before[name] != value]
    assert set(changed) <= {"backend"}  # looking it up is what settles it


def test_a_run_that_diverges(tmp_path):
    norms = [*(0.5 * 1.1**at for at in range(60)), *([float("nan")] * 20)]
    loss = [*(2.0 * 1.1**at for at in range(59)), *([None] * 21)]
    counted = [0] * 60 + list(range(1, 21))
    rows = rows_of(norms, loss=loss, clip__nonfinite_steps=counted)
    rows = [{k: None if x != x else x for k, x in row.items()} for row in rows]
    figure = plot_run(written(tmp_path / "run.jsonl", rows), tmp_path / "run.png")
    title = title_of(figure)
    # 0.5 * 1.1**8 is the first above 1: 52 of 60.
    assert title == (
        "No finite loss from step 60 of 80; 20 gradients not finite; 87% of 60 finite steps clipped"
    )
    assert figure.axes[0].get_yscale() == "log"
    assert list(drawn(figure.axes[1], "not finite")[:, 0]) == list(range(61, 81))


def test_nan_norms_without_a_count():
    norms = noise(100)
    norms[[40, 41]] = np.nan
    norms[70] = np.inf
    figure = plot_run(norms)
    assert list(drawn(figure.axes[0], "not finite")[:, 0]) == [41, 42, 71]
    assert title_of(figure).startswith("No finite norm at 3 steps; norm from ")


def test_a_loss_that_is_logged_now_and_then_is_no_broken_one():
    rows = [{"norm": 1.0} | ({"loss": 2.0} if at % 10 == 0 else {}) for at in range(100)]
    figure = plot_run(rows)
    assert "finite" not in title_of(figure)
    line = figure.axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), range(1, 101, 10))


def test_a_truncated_last_line_is_said(tmp_path):
    log = written(tmp_path / "run.jsonl", rows_of([0.5, 2.0]), '{"step": 3, "cli')
    figure = plot_run(log)
    _, note = (text.get_text() for text in figure.texts)
    assert note.replace("\n", " ").endswith("line 3 is cut short and was left out")
    assert title_of(figure) == "50% of 2 steps clipped"


def test_one_step(tmp_path):
    figure = plot_run(rows_of([2.0], loss=[0.5]), tmp_path / "run.png")
    assert title_of(figure) == "100% of 1 step clipped; loss 0.5 at the end"
    figure = plot_run([2.0], tmp_path / "run.png")
    assert title_of(figure) == "Norm 2 at the one step"
    assert drawn(figure.axes[0], "norm before clipping").tolist() == [[1.0, 2.0]]


def test_norms_only():
    figure = plot_run(np.arange(1.0, 102.0))
    assert labels(figure) == ["gradient norm (log axis)"]
    assert title_of(figure) == "Norm from 6 to 96 in nine of ten steps"  # percentiles 5, 95


def test_without_norms_it_is_refused():
    with pytest.raises(ValueError, match=r"has no norms under clip/norm.* it has step, accuracy"):
        plot_run([{"step": 1, "accuracy": 2.0}])
    with pytest.raises(ValueError, match="has no norms under g; it has step, loss"):
        plot_run([{"step": 1, "loss": 2.0}], norm_key="g")
    with pytest.raises(ValueError, match="there is nothing to draw"):
        plot_run([{"norm": None}, {"norm": float("nan")}])


def test_without_norms_the_loss_is_drawn():
    figure = plot_run([{"loss": 2.0, "spike": at == 5} for at in range(9)])
    assert labels(figure) == ["loss"]
    assert title_of(figure) == "1 spike; no norms in the log of 9 steps; loss 2 at the end"
    assert legend(figure.axes[0]) == ["spike"]
    figure = plot_run([{"norm": None, "loss": 2.0}, {"norm": None, "loss": 1.5}])
    assert labels(figure) == ["loss"]
    assert title_of(figure) == "None of the 2 norms is finite; loss 1.5 at the end"


def test_norms_that_are_not_finite_are_marked_whatever_the_log_counted():
    norms = noise(50)
    norms[[20, 30]] = np.nan, np.inf
    figure = plot_run({"clip/norm": norms, "clip/nonfinite_steps": np.zeros(50)})
    assert list(drawn(figure.axes[0], "not finite")[:, 0]) == [21, 31]
    assert title_of(figure).startswith("2 gradients not finite")


def test_what_would_be_hidden_is_drawn_on_top():
    figure = plot_run(rows_of([0.5, 2.0, 1.0001, 0.25]))
    clipped, threshold, recent, since = (
        next(line for axis in figure.axes for line in axis.lines if line.get_label() == label)
        for label in ("clipped step", "threshold", "clipped recently", "clipped since the start")
    )
    assert clipped.zorder > threshold.zorder
    assert recent.is_dashed()
    lines = list(recent.axes.lines)
    assert lines.index(recent) > lines.index(since)


def test_steps_that_do_not_rise_are_drawn_in_order():
    rows = [{"step": step, "norm": 1.0} for step in (1, 2, 3, 1, 2, 3)]
    figure = plot_run(rows)
    assert drawn(figure.axes[0], "norm before clipping")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert "in order" in figure.axes[0].get_xlabel()


def test_skipped_steps():
    norms = noise(200)
    norms[100] = 80.0
    skipping = np.isin(np.arange(200), [100, 150])
    columns = {"norm": norms, "threshold": np.full(200, 3.0), "skipping": skipping}
    columns["skipped_steps"] = np.cumsum(skipping)
    figure = plot_run({f"skip/{name}": column for name, column in columns.items()})
    usual = max(np.median(norms[50:100]), np.median(norms[101:151]))
    title = f"1 spike, {80 / usual:.0f} times the usual norm, skipped; 2 steps skipped"
    assert title_of(figure) == title
    assert drawn(figure.axes[0], "skipped")[:, 0].tolist() == [101, 151]
    assert drawn(figure.axes[1], "skipped since the start")[-1, 1] == pytest.approx(0.01)


def test_a_clip_of_several_groups_says_so():
    rows = rows_of([2.0, 3.0])
    for row in rows:
        row |= {"clip/clipped_norm": 1.6, "clip/clip_rate": 0.25}
    figure = plot_run(rows)
    assert "threshold (the smallest of several)" in legend(figure.axes[0])
    assert title_of(figure) == "Clip rate 25% since the start"  # of groups, not of steps


# Spikes ------------------------------------------------------------------------------------------


def test_spikes_are_found_and_said():
    norms = noise(400)
    norms[[100, 250, 251]] = 20.0, 1000.0, 30.0
    rows = rows_of(norms.tolist(), threshold=2.5)
    figure = plot_run(rows)
    assert drawn(figure.axes[0], "spike")[:, 0].tolist() == [101, 251, 252]
    usual = max(np.median(norms[200:250]), np.median(norms[251:301]))
    assert title_of(figure) == (
        f"3 spikes, the largest {1000 / usual:,.0f} times the usual norm, "
        f"clipped to {2.5 / usual:.1f} times; 3 of 400 steps clipped"
    )


def test_a_column_says_better_what_a_spike_is():
    rows = rows_of(noise(100).tolist(), threshold=9.0)
    rows[30]["spike"] = True
    figure = plot_run(rows)
    assert drawn(figure.axes[0], "spike")[:, 0].tolist() == [31]
    assert title_of(figure).startswith("1 spike, ")


@pytest.mark.parametrize(
    "norms",
    [
        noise(300) * np.where(np.arange(300) < 150, 1, 100),
        noise(300) * np.where(np.arange(300) < 150, 100, 1),
        noise(300) * 50 * np.exp(-np.arange(300) / 10) + 1,
        noise(300, deviation=1.5),
        np.ones(300),
        np.zeros(300),
        [1.0, 1000.0, 1.0],
    ],
    ids=["rise", "fall", "steep start", "much noise", "constant", "zero", "too short"],
)
def test_what_is_no_spike(norms):
    assert not look_at(read_log(norms)).spikes.any()


def test_the_usual_norm_by_hand():
    norms = noise(180)
    norms[20] = np.nan
    known = norms[np.isfinite(norms)]
    usual = usual_norm(norms)
    assert np.isnan(usual[:5]).all()  # nothing before them says what is usual
    assert np.isnan(usual[20])
    places = np.delete(np.arange(180), 20)
    for at, place in enumerate(places):
        before, after = known[max(0, at - 50) : at], known[at + 1 : at + 51]
        if len(before) < 5:
            continue
        levels = [np.median(near) for near in (before, after) if len(near) >= 5]
        assert usual[place] == max(levels)
    assert SPIKE_TIMES == 5


# Leaves ------------------------------------------------------------------------------------------


def leaf_rows(leaves, steps):
    sizes = np.random.default_rng(0).random(len(leaves))
    norms = {f"clip/norms/{path}": float(x) for path, x in zip(leaves, sizes, strict=True)}
    return [{"clip/norm": 1.0, "step": at + 1} | norms for at in range(steps)]


def test_a_heat_map_of_the_leaves(tmp_path):
    leaves = [f"params/block_{at}/kernel" for at in range(6)]
    rows = leaf_rows(leaves, 30)
    rows[7]["clip/norms/params/block_2/kernel"] = 0.0
    rows[8]["clip/norms/params/block_2/kernel"] = None
    figure = plot_run(rows, tmp_path / "run.png")
    assert labels(figure)[-2:] == ["leaf", "norm of the leaf (log colors)"]
    heat = figure.axes[-2]
    assert [text.get_text() for text in heat.get_yticklabels()] == [
        f"block_{at}/kernel" for at in range(6)
    ]
    (mesh,) = heat.collections
    values = mesh.get_array()
    assert values.shape == (6, 30)
    assert values[1, 3] == rows[3]["clip/norms/params/block_1/kernel"]
    assert values.mask[2, 7]
    assert values.mask[2, 8]
    assert values.mask.sum() == 2


def test_the_label_of_two_leaves_fits(tmp_path):
    figure = plot_run(leaf_rows(["w", "b"], 20), tmp_path / "run.png")
    label = figure.axes[-1].yaxis.label.get_window_extent()
    assert label.y0 >= 0
    assert label.height <= figure.axes[-1].get_window_extent().height * 1.2


def heat(figure):
    """Names of the rows, edges of the columns, and values of a heat map."""
    axis = figure.axes[-2]
    (mesh,) = axis.collections
    edges = mesh.get_coordinates()[0, :, 0]
    return [text.get_text() for text in axis.get_yticklabels()], edges, mesh.get_array()


def test_of_many_leaves_the_largest_are_drawn():
    names = [f"block_{at // 4}/{'abcd'[at % 4]}/kernel" for at in range(1200)]
    sizes = np.random.default_rng(0).permutation(1200) + 1.0
    leaves = {f"clip/norms/{name}": [x, 0.5] for name, x in zip(names, sizes, strict=True)}
    figure = plot_run({"clip/norm": [1.0, 1.0], **leaves})
    shown, _, values = heat(figure)
    largest = sizes > 1200 - MOST_LEAVES
    assert shown == [name for name, x in zip(names, largest, strict=True) if x]
    np.testing.assert_array_equal(values[:, 0], sizes[largest])
    assert labels(figure)[-2] == "leaf (40 largest of 1,200)"


def test_long_names_of_leaves_are_cut_in_the_middle(tmp_path):
    figure = plot_run(leaf_rows([f"params/{'a' * 40}/{at}" for at in "bc"], 20), tmp_path / "x.png")
    assert heat(figure)[0] == ["b", "c"]  # what all begin with is left out
    figure = plot_run(leaf_rows([f"{at}{'a' * 40}/kernel" for at in "bc"], 20))
    assert heat(figure)[0] == [f"{at}{'a' * 11}...{'a' * 6}/kernel" for at in "bc"]


def test_many_steps_are_binned_by_their_median():
    norms = np.random.default_rng(0).random((2, 1000))
    norms[0, 3:6] = np.nan
    leaves = {f"clip/norms/{name}": x for name, x in zip("ab", norms, strict=True)}
    _, edges, columns = heat(plot_run({"clip/norm": np.ones(1000), **leaves}))
    assert columns.shape[1] <= MOST_COLUMNS
    assert len(edges) == columns.shape[1] + 1
    assert (edges[0], edges[1], edges[-1]) == (0.5, 3.5, 1000.5)
    np.testing.assert_array_equal(columns[:, 0], np.median(norms[:, :3], axis=1))
    assert columns.mask[0, 1]
    np.testing.assert_array_equal(columns[:, -1], norms[:, -1])


def test_leaves_without_any_norm_have_no_heat_map(tmp_path):
    log = {"clip/norm": [1.0, 2.0], "clip/norms/a": [0.0, np.nan]}
    assert labels(plot_run(log, tmp_path / "run.png")) == ["gradient norm (log axis)"]


# Long runs ---------------------------------------------------------------------------------------


def test_twenty_thousand_steps(tmp_path):
    norms = 2 * noise(20_000)
    norms[12_345] = 500.0
    log = written(tmp_path / "run.jsonl", rows_of(norms.tolist(), loss=norms.tolist()))
    began = time.process_time()
    figure = plot_run(log, tmp_path / "run.png")
    assert time.process_time() - began < 5
    line = drawn(figure.axes[1], "norm before clipping")
    assert len(line) <= 6000
    assert [12_346, 500.0] in line.tolist()  # what is thinned out is never the extreme
    assert line[:, 1].min() == norms.min()
    label = next(text for text in legend(figure.axes[1]) if "clipped step" in text)
    count = int((norms > 1).sum())
    assert label == f"clipped step (one in {-(-count // 1500)} marked)"
    assert drawn(figure.axes[1], "spike")[:, 0].tolist() == [12_346]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'pip install "optclip\[tuning\]"'):
        plot_run([1.0, 2.0])
    assert finding([1.0, 2.0]).startswith("Norm from ")
