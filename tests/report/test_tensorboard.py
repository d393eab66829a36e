"""What TensorBoard is given: read back, it holds the records' numbers, the verdict and the images,
and no more."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lockstep.common.data import Dataset
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.report import sentence
from lockstep.common.report import tensorboard as written
from lockstep.common.report.tensorboard import (
    MAX_POINTS,
    check_tensorboard,
    kept_steps,
    write_tensorboard,
)
from lockstep.common.runs.record import Record
from tests.report.helpers import HOSTILE, PLAIN, dataset, make, record

pytest.importorskip(
    "tensorboard", reason="TensorBoard is not installed: pip install -e '.[tensorboard]'"
)

Records = dict[str, dict[str, Record]]


def runs(*backends: str) -> Records:
    """Two precisions; torch and flax differ in float32, in every series and in the predictions of
    images 2, 5 and 8."""
    records: Records = {
        dtype: {name: record(name, dtype) for name in backends} for dtype in ("float64", "float32")
    }
    for name in backends:
        steps = np.arange(40.0)
        lr, norm = 0.1 * 0.9**steps, 3 / (1 + steps)
        records["float64"][name] = dataclasses.replace(
            records["float64"][name], lr=lr, gradient_norm=norm
        )
    if "flax" in backends:
        flax = record("flax", "float32", noise=1e-3)
        flax = dataclasses.replace(
            flax, predictions=np.minimum(flax.predictions, 1), lr=1.01 * flax.lr
        )
        records["float32"]["flax"] = flax
    return records


def write(folder: Path, records: Records, data: Dataset | None = None, **options: Any) -> Any:
    """Write `records` and read every event file back: by the folder's name, an accumulator that
    keeps all it finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backends = tuple(records["float64"])
    verdicts = ("agree", "disagree") if len(backends) == 2 else ("single", "single")
    report = make(*verdicts, backends=backends)
    twins = options.pop("twins", {})
    write_tensorboard(
        folder, report, records, twins, dataset() if data is None else data, **options
    )
    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        everything = EventAccumulator(str(path), {"scalars": 0, "images": 0, "tensors": 0})
        found[path.parent.relative_to(folder).as_posix()] = everything.Reload()
    return found


def series(events: Any, tag: str) -> tuple[list[int], np.ndarray]:
    scalars = events.Scalars(tag)
    return [scalar.step for scalar in scalars], np.array([scalar.value for scalar in scalars])


def same(events: Any, tag: str, values: np.ndarray) -> bool:
    """Whether a tag holds `values`, one per step, rounded to float32."""
    steps, found = series(events, tag)
    return steps == list(range(len(values))) and np.array_equal(
        found, values.astype(np.float32), equal_nan=True
    )


def picture(image: Any) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(image.encoded_image_string)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_every_step_of_a_run_is_there_as_recorded(tmp_path: Path, backend: str, dtype: str) -> None:
    records = runs("torch", "flax")
    found = write(tmp_path, records)[f"{dtype}/{backend}"]
    mine = records[dtype][backend]
    assert same(found, "loss", mine.loss)
    assert same(found, "learning rate", mine.lr)
    assert same(found, "gradient norm", mine.gradient_norm)
    assert not same(found, "loss", np.nextafter(mine.loss.astype(np.float32), np.float32(9)))
    assert not same(found, "loss", mine.loss[:-1])


def test_the_gap_is_that_of_the_two_runs_and_a_precision_with_one_run_has_none(
    tmp_path: Path,
) -> None:
    records = runs("torch", "flax")
    found = write(tmp_path / "both", records)
    one, other = records["float32"].values()
    assert same(found["float32/gap"], "gap/loss", np.abs(one.loss - other.loss))
    assert same(found["float32/gap"], "gap/learning rate", np.abs(one.lr - other.lr))
    assert same(found["float64/gap"], "gap/loss", np.zeros(40))
    assert not same(found["float32/gap"], "gap/loss", np.zeros(40))
    assert set(write(tmp_path / "one", runs("flax"))) == {
        "overview",
        "float64/flax",
        "float32/flax",
    }


def test_losses_that_are_not_finite_stay_so(tmp_path: Path) -> None:
    records = runs("torch", "flax")
    records["float64"]["torch"].loss[3:5] = np.inf
    records["float64"]["flax"].loss[4] = np.inf
    found = write(tmp_path, records)
    assert same(found["float64/torch"], "loss", records["float64"]["torch"].loss)
    expected = np.zeros(40)
    expected[3:5] = np.inf, np.nan
    assert same(found["float64/gap"], "gap/loss", expected)


def test_the_accuracy_after_the_last_step_is_there_of_all_images_and_of_each_class(
    tmp_path: Path,
) -> None:
    data, records = dataset(), runs("torch", "flax")
    found = write(tmp_path, records, data)
    for name, mine in records["float32"].items():
        right = mine.predictions == data.test_labels
        expected = {
            f"accuracy per class/{label}": right[data.test_labels == k].mean()
            for k, label in enumerate(PLAIN)
        }
        for tag, value in (expected | {"accuracy": right.mean()}).items():
            steps, values = series(found[f"float32/{name}"], tag)
            assert (steps, values.tolist()) == ([40], [pytest.approx(value, rel=1e-7)])
    torch, flax = (series(found[f"float32/{name}"], "accuracy")[1] for name in ("torch", "flax"))
    assert torch != flax


def test_a_class_without_test_images_has_no_accuracy(tmp_path: Path) -> None:
    data = dataclasses.replace(dataset(), classes=(*PLAIN, "dog"))
    tags = write(tmp_path, runs("torch"), data)["float64/torch"].Tags()["scalars"]
    assert "accuracy per class/deer" in tags and "accuracy per class/dog" not in tags


def test_twins_are_runs_next_to_the_run(tmp_path: Path) -> None:
    kin = [record("torch", "float32", 1e-5, twin) for twin in (1, 2)]
    found = write(tmp_path, runs("torch", "flax"), twins={"float32": {"torch": kin}})
    for twin, mine in enumerate(kin, start=1):
        assert same(found[f"float32/torch-twin{twin}"], "loss", mine.loss)
    assert [name for name in found if "twin" in name] == [
        "float32/torch-twin1",
        "float32/torch-twin2",
    ]


def test_the_images_are_those_the_run_saw_first_and_those_on_which_the_two_differ(
    tmp_path: Path,
) -> None:
    data, sample = dataset(), np.array([7, 0, 3])
    found = write(tmp_path, runs("torch", "flax"), data, sample=sample)
    shown = found["overview"]
    tags = sorted(shown.Tags()["images"])
    assert tags == ["training images/00 bird", "training images/01 plane", "training images/02 cat"]
    for tag, index in zip(tags, sample, strict=True):
        [image] = shown.Images(tag)
        assert np.array_equal(picture(image), data.train_images[index])
        assert not np.array_equal(picture(image), data.train_images[index - 1])
    differ = found["float32/gap"]
    tags = [
        f"test images that differ/{index} {truth}: torch bird, flax car"
        for index, truth in DIFFERING.items()
    ]
    assert sorted(differ.Tags()["images"]) == tags
    [image] = differ.Images(tags[1])
    assert (image.step, image.width, image.height) == (40, 32, 32)
    assert np.array_equal(picture(image), data.test_images[5])
    assert found["float64/gap"].Tags()["images"] == []


DIFFERING = {2: "bird", 5: "plane", 8: "cat"}  # test images, by number, and what they show


def test_the_verdict_is_there_in_words(tmp_path: Path) -> None:
    [event] = write(tmp_path, runs("torch", "flax"))["overview"].Tensors("verdict")
    assert event.tensor_proto.string_val[0].decode() == sentence(make("agree", "disagree"))


def test_hostile_names_are_written_escaped(tmp_path: Path) -> None:
    data = dataset(HOSTILE)
    found = write(tmp_path, runs("torch", "flax"), data)
    tags = [*found["float64/torch"].Tags()["scalars"], *found["overview"].Tags()["images"]]
    assert all(tag.isprintable() for tag in tags) and any(r"\x1b[31mred" in tag for tag in tags)
    assert sum(tag.startswith("accuracy per class/") for tag in tags) == len(HOSTILE)


@pytest.mark.parametrize(
    "steps", [1, 2, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, 37_500, 1_000_000]
)
def test_of_a_long_run_evenly_many_steps_are_kept_with_the_first_and_the_last(steps: int) -> None:
    chosen = kept_steps(steps)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, steps - 1, len(set(chosen)))
    assert min(steps, MAX_POINTS / 2) <= len(chosen) <= MAX_POINTS
    assert (chosen == list(range(steps))) == (steps <= MAX_POINTS)
    assert len(set(np.diff(chosen)[:-1])) <= 1


def test_a_long_run_is_thinned_and_its_steps_keep_their_numbers(tmp_path: Path) -> None:
    long = np.linspace(2.3, 0.1, 12_345)
    records = runs("torch")
    mine = dataclasses.replace(records["float64"]["torch"], loss=long, lr=long, gradient_norm=long)
    found = write(tmp_path, {"float64": {"torch": mine}})["float64/torch"]
    steps, values = series(found, "loss")
    assert steps == kept_steps(len(long)) and len(steps) < len(long)
    assert np.array_equal(values, long[steps].astype(np.float32))


def test_a_run_that_is_written_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    records = runs("torch")
    write(tmp_path, records)
    records["float64"]["torch"].loss[:] = 7
    found = write(tmp_path, records)
    assert same(found["float64/torch"], "loss", np.full(40, 7.0))
    assert len(list(tmp_path.rglob("*.*"))) == len(found) == 3


def test_without_the_package_the_remedy_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tensorboard()
    monkeypatch.setitem(written.MODULES, "Event", "a_package_that_is_not_installed.event_pb2")
    remedy = r"pip install -e '\.\[tensorboard\]'"
    with pytest.raises(ConfigError, match=remedy):
        check_tensorboard()
    with pytest.raises(ConfigError, match=remedy):
        write(tmp_path / "new", runs("torch"))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="cannot write"):
        write(tmp_path / "file", runs("torch"))
