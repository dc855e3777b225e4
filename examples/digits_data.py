"""Handwritten digits through tensorflow-datasets: MNIST, or the real digits in scikit-learn.

Neither needs TensorFlow to be read. Preparing MNIST does, once, and a way to its host; the 1,797
digits of scikit-learn need neither, so they stand in where MNIST is out of reach.
"""

import contextlib
import importlib.util
import io
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

MNIST_HOST = "storage.googleapis.com"
PROBE_SECONDS = 4.0
DOWNLOAD_ERRORS = (
    OSError,
    tfds.download.DownloadError,
    NonMatchingChecksumError,  # a login page, for example
)


class Split(NamedTuple):
    """Images (count, height, width, 1), float32 in [0, 1], and their labels, int32."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set, all of it in memory.

    Attributes:
        name: "mnist" or "digits": what the numbers are really from.
        note: A sentence on why this is not the data set that was asked for; empty if it is.
        train: What to learn from.
        test: What to be judged by.
    """

    name: str
    note: str
    train: Split
    test: Split


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 8x8 handwritten digits in scikit-learn's wheel (UCI optdigits, its test set).

    The last 297 were written by other people than the first 1,500, and are the test split.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {
            "train": self._generate_examples(0, 1500),
            "test": self._generate_examples(1500, 1797),
        }

    def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # 1.5 s to import, and needed only once

        digits: Any = load_digits()
        for i in range(start, stop):
            image = digits.images[i].astype(np.uint8)[..., None]
            yield i, {"image": image, "label": int(digits.target[i])}


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Reads a data set into memory, and prepares it on disk first where needed.

    Args:
        name: "mnist", which falls back to the digits where it is out of reach, or "digits".
        data_dir: Where prepared data sets are; None for tensorflow-datasets' own default.

    Returns:
        A `Dataset`, whose `name` says what it really is.
    """
    note = ""
    if name == "mnist":
        obstacle = _obstacle_to_mnist(data_dir)
        if not obstacle:
            try:
                return _read("mnist", _mnist(data_dir))
            except DOWNLOAD_ERRORS as error:
                obstacle = f"preparing it failed: {' '.join(str(error).split())[:150]}"
        note = f"MNIST is out of reach: {obstacle}. "
    return _read("digits", Digits(data_dir=data_dir, file_format="array_record"), note)


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Which examples each batch of an epoch has; those left over sit the epoch out.

    Drawn from the seed and the epoch alone, so that a resumed run sees what it would have seen.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[: count - count % batch_size].reshape(-1, batch_size)


def slices(split: Split, size: int) -> list[Split]:
    """A split in pieces of at most `size` examples, in order."""
    starts = range(0, len(split.labels), size)
    return [Split(*(array[i : i + size] for array in split)) for i in starts]


def _mnist(data_dir: str | None) -> tfds.core.DatasetBuilder:
    """MNIST as it is on disk, or else as it would be prepared: readable without TensorFlow."""
    on_disk = tfds.builder("mnist", data_dir=data_dir)
    if on_disk.is_prepared():
        return on_disk
    return tfds.builder("mnist", data_dir=data_dir, file_format="array_record")


def _obstacle_to_mnist(data_dir: str | None) -> str:
    """Why MNIST can be neither read nor prepared; empty if it can."""
    mnist = _mnist(data_dir)
    has_tensorflow = importlib.util.find_spec("tensorflow") is not None
    if mnist.is_prepared():
        needs_tensorflow = mnist.info.file_format == tfds.core.FileFormat.TFRECORD
        if has_tensorflow or not needs_tensorflow:
            return ""
        return f"{mnist.data_dir} holds tfrecords, which take TensorFlow to read"
    missing = f"it is not in {mnist.data_dir}"
    if not has_tensorflow:
        return f'{missing}, and preparing it takes TensorFlow, once (pip install -e ".[mnist]")'
    if not _reachable(MNIST_HOST):
        return f"{missing}, and {MNIST_HOST} does not answer"
    return ""


def _reachable(host: str) -> bool:
    """Whether `host` answers within a few seconds; a blind download would retry for minutes."""
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"https://{host}/", timeout=PROBE_SECONDS):
                answers.append("yes")
        except urllib.error.HTTPError:  # an answer all the same
            answers.append("yes")
        except OSError:
            pass

    # In a thread, because looking up the name of the host knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return bool(answers)


def _read(name: str, builder: tfds.core.DatasetBuilder, note: str = "") -> Dataset:
    if not builder.is_prepared():
        _prepare(builder, show_progress=name == "mnist")
    train, test = (_split(builder, name) for name in ("train", "test"))
    scale = np.float32(train.images.max())  # 255 for MNIST, 16 for the digits
    return Dataset(
        name,
        note,
        train=train._replace(images=train.images / scale),
        test=test._replace(images=test.images / scale),
    )


def _prepare(builder: tfds.core.DatasetBuilder, show_progress: bool) -> None:
    if show_progress:
        builder.download_and_prepare()
        return
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    tfds.enable_progress_bar()


def _split(builder: Any, name: str) -> Split:
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        rows = list(tfds.as_numpy(builder.as_dataset(split=name)))
    else:
        source = builder.as_data_source(split=name)
        rows = source.__getitems__(range(len(source)))  # far faster than one by one
    return Split(
        images=np.stack([row["image"] for row in rows]).astype(np.float32),
        labels=np.array([row["label"] for row in rows], np.int32),
    )
