"""The code of docs/logging.md runs as it stands, and logs what was read."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from optclip.tuning import read_log

PAGE = pathlib.Path(__file__).parents[2] / "docs/logging.md"
READ = {"loss", "clip/norm", "clip/threshold", "clip/clip_rate", "clip/norms/w", "clip/norms/b"}


class DictWriter:
    """As in CLU."""

    def __init__(self):
        self.rows, self.flushed = {}, False

    def write_scalars(self, step, scalars):
        self.rows[step] = scalars

    def flush(self):
        self.flushed = True


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's code leaves behind, and the folder it ran in."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    folder, names = tmp_path_factory.mktemp("logs"), {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_SILENT", "true")
        exec(compile(code, PAGE, "exec"), names)
    return folder, names


@pytest.mark.parametrize("name", ["steps.jsonl", "steps.csv", "tensorboard"])
def test_what_is_logged_is_read_back(page, name):
    record = read_log(page[0] / name)
    assert record.steps.tolist() == list(range(20))
    assert set(record.leaf_norms) == {"w", "b"}
    together = np.hypot(record.leaf_norms["w"], record.leaf_norms["b"])
    np.testing.assert_allclose(record.norms, together, rtol=1e-6)
    assert {"clip/norm", *record.columns, *(f"clip/norms/{x}" for x in record.leaf_norms)} >= READ


def test_a_writer_of_dicts_gets_every_reading(page):
    names, writer = page[1], DictWriter()
    names["log"](writer, names["training"]())
    assert list(writer.rows) == list(range(20))
    assert set(writer.rows[0]) >= READ
    assert writer.flushed


def test_weights_and_biases_keeps_a_run_to_upload(page):
    (run,) = (page[0] / "wandb").glob("offline-run-*/*.wandb")
    assert b"clip/norm" in run.read_bytes()


@pytest.mark.parametrize(("name", "leaves"), [("linen", "wb"), ("nnx", ("kernel", "bias"))])
def test_flax_steps_read_the_same(page, name, leaves):
    readings = page[1][f"{name}_readings"]
    assert set(readings) >= {"loss", "clip/norm", *(f"clip/norms/{leaf}" for leaf in leaves)}


def test_a_profile_has_the_steps_of_a_clip(page):
    assert list((page[0] / "profile").rglob("*.xplane.pb"))
    names = page[1]
    arguments = names["params"], names["opt_state"], jnp.ones((8, 3))
    program = names["train_step"].lower(*arguments).compile().as_text()
    for scope in ("measure", "limit", "observe"):
        assert f"optclip/{scope}" in program
