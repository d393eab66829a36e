"""A run as event files for TensorBoard: `tensorboard --logdir DIR`.

The package `tensorboard` makes the files; it needs no framework. It is an optional dependency, and
imported only if `--tensorboard` is given.
"""

from __future__ import annotations

import importlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.errors import ConfigError
from lockstep.common.report.images import label_of, without_one_channel
from lockstep.common.report.json import ReportJson
from lockstep.common.report.summary import sentence
from lockstep.common.report.text import escape
from lockstep.common.runs.record import Record
from lockstep.common.system.storage import write_atomic
from lockstep.common.verdict.compare import class_accuracy
from lockstep.common.verdict.statistics import is_correct

MAX_POINTS = 5_000  # of a series
MAX_IMAGES = 32  # of a kind
# tag: field of a record
SERIES = {"loss": "loss", "learning rate": "lr", "gradient norm": "gradient_norm"}
# The same name each time, so that a run that is written again replaces the old one.
FILE = "events.out.tfevents.0.lockstep"
Entries = Iterator[tuple[int, object]]  # a step, and a value of a Summary
MODULES = {
    "Event": "tensorboard.compat.proto.event_pb2",
    "Summary": "tensorboard.compat.proto.summary_pb2",
    "SummaryMetadata": "tensorboard.compat.proto.summary_pb2",
    "TensorProto": "tensorboard.compat.proto.tensor_pb2",
    "DataType": "tensorboard.compat.proto.types_pb2",
    "RecordWriter": "tensorboard.summary.writer.record_writer",
}


def check_tensorboard() -> None:
    """Raise ConfigError, before hours of training, if the package `tensorboard` is not
    installed."""
    _tensorboard()


def write_tensorboard(
    folder: Path,
    report: ReportJson,
    records: dict[str, dict[str, Record]],
    twins: dict[str, dict[str, list[Record]]],
    dataset: Dataset,
    sample: np.ndarray | None = None,
) -> None:
    """Write `folder` for TensorBoard: one of its "runs" per run of a backend, and one per precision
    for the gaps between the two.

    `<dtype>/torch`, `<dtype>/flax` and `<dtype>/torch-twin1`, ... hold loss (nats), learning rate
    and gradient norm of each step, and after the last step the accuracy, of all test images and per
    class. `<dtype>/gap` holds |torch - flax| of the three series, and test images for which the two
    predict different classes. `overview` holds the verdict and training images. Of more than 5,000
    steps every second, third, ... is kept, and the last one, so the largest gap may be left out;
    report.json has it. TensorBoard's numbers are float32, and it shows 1,000 of a series unless
    told otherwise (`--samples_per_plugin scalars=5000`).

    Args:
        folder: files of the same name from an earlier run are replaced, other files are left alone.
        records: by precision, then by backend.
        twins: by precision, then by backend; may be empty.
        sample: int64 (images,), the training images to show, in the order in which the run sees
            them; None shows the first of the data.

    Raises:
        ConfigError: if the package `tensorboard` is not installed.
        RecordError: if the folder cannot be written.
    """
    make = _tensorboard()
    _write(folder / "overview", make, _overview(make, report, dataset, sample))
    for dtype, by_backend in records.items():
        runs = [
            run
            for name in by_backend
            for run in (by_backend[name], *twins.get(dtype, {}).get(name, ()))
        ]
        for record in runs:
            name = record.stem.replace(f"-{dtype}", "")
            _write(folder / dtype / name, make, _run(make, record, dataset))
        if len(by_backend) == 2:
            torch, flax = (by_backend[name] for name in BACKENDS)
            _write(folder / dtype / "gap", make, _gap(make, torch, flax, dataset))


def _overview(
    make: SimpleNamespace, report: ReportJson, dataset: Dataset, sample: np.ndarray | None
) -> Entries:
    text = make.SummaryMetadata(plugin_data=make.SummaryMetadata.PluginData(plugin_name="text"))
    verdict = make.TensorProto(
        dtype=make.DataType.Value("DT_STRING"), string_val=[escape(sentence(report)).encode()]
    )
    yield 0, make.Summary.Value(tag="verdict", metadata=text, tensor=verdict)
    if not dataset.has_pictures:
        return
    chosen = np.arange(len(dataset.train_images)) if sample is None else sample
    for place, index in enumerate(chosen[:MAX_IMAGES].tolist()):
        tag = f"training images/{place:02} {label_of(dataset, index)}".rstrip()
        yield 0, _image(make, tag, dataset.train_images[index])


def _run(make: SimpleNamespace, record: Record, dataset: Dataset) -> Entries:
    for tag, series in SERIES.items():
        yield from _series(make, tag, getattr(record, series))
    if not dataset.classes:
        yield record.steps, make.Summary.Value(tag="test loss", simple_value=record.test_loss)
        return
    right = is_correct(record.predictions, dataset.test_labels).mean()
    yield record.steps, make.Summary.Value(tag="accuracy", simple_value=right)
    for label, accuracy in class_accuracy(record, dataset.test_labels, dataset.classes).items():
        if accuracy is not None:
            yield (
                record.steps,
                make.Summary.Value(
                    tag=escape(f"accuracy per class/{label}"), simple_value=accuracy
                ),
            )


def _gap(make: SimpleNamespace, torch: Record, flax: Record, dataset: Dataset) -> Entries:
    for tag, series in SERIES.items():
        with np.errstate(invalid="ignore"):  # infinite on both sides: the gap is unknown
            yield from _series(
                make, f"gap/{tag}", np.abs(getattr(torch, series) - getattr(flax, series))
            )
    if not (dataset.classes and dataset.has_pictures):
        return
    predictions = list(zip(dataset.test_labels, torch.predictions, flax.predictions, strict=False))
    differing = [index for index, (_, one, other) in enumerate(predictions) if one != other]
    for index in differing[:MAX_IMAGES]:
        truth, one, other = (dataset.classes[label] for label in predictions[index])
        tag = f"test images that differ/{index} {truth}: torch {one}, flax {other}"
        yield torch.steps, _image(make, tag, dataset.test_images[index])


def _series(make: SimpleNamespace, tag: str, values: np.ndarray) -> Entries:
    for step in kept_steps(len(values)):
        yield step, make.Summary.Value(tag=tag, simple_value=values[step])


def kept_steps(steps: int) -> list[int]:
    """At most MAX_POINTS of `steps` steps, evenly spaced, with the first and the last."""
    if steps <= MAX_POINTS:
        return list(range(steps))
    stride = -(-steps // (MAX_POINTS - 1))
    return [*range(0, steps - 1, stride), steps - 1]


def _image(make: SimpleNamespace, tag: str, pixels: np.ndarray) -> object:
    """A uint8 (height, width, 3) image as PNG, or one of grey."""
    from PIL import Image

    content, pixels = io.BytesIO(), without_one_channel(pixels)
    Image.fromarray(pixels).save(content, format="png")
    height, width, channels = (*pixels.shape, 1)[:3]
    image = make.Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=content.getvalue()
    )
    return make.Summary.Value(tag=escape(tag), image=image)


def _write(folder: Path, make: SimpleNamespace, entries: Entries) -> None:
    content, now = io.BytesIO(), time.time()
    writer = make.RecordWriter(content)
    writer.write(make.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for step, value in entries:
        event = make.Event(wall_time=now, step=step, summary=make.Summary(value=[value]))
        writer.write(event.SerializeToString())
    write_atomic(folder / FILE, content.getvalue())


def _tensorboard() -> SimpleNamespace:
    """The classes of the package `tensorboard` in MODULES, by name."""
    try:
        return SimpleNamespace(
            **{name: getattr(importlib.import_module(path), name) for name, path in MODULES.items()}
        )
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs a package that is not installed: pip install -e '.[tensorboard]'"
        ) from error
