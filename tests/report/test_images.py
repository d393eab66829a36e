"""The pictures in a run's folder: whole, equal for equal runs, and drawn whatever the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.report import write_json, write_pictures
from lockstep.common.report.chart_data import loss_gap, running_mean
from lockstep.common.runs.record import Record
from tests.report.helpers import HOSTILE, PLAIN, STEPS, dataset, make, record

PICTURES = [
    "samples.png", "predictions.png", "losses.png", "losses.svg", "classes.png", "classes.svg",
    "confusion.png", "confusion.svg", "course.png", "course.svg",
]  # fmt: skip


def pictures(
    folder: Path, classes: tuple[str, ...] = PLAIN, backends: tuple[str, ...] = ("torch", "flax")
) -> list[Path]:
    both = len(backends) == 2
    report = make(
        *(("disagree", "agree") if both else ("single", "single")),
        classes=classes,
        backends=backends,
    )
    noise = {"torch": 0.0, "flax": 1e-6}
    records = {d: {b: record(b, d, noise[b]) for b in backends} for d in ("float64", "float32")}
    twins = {"float32": {b: [record(b, "float32", 1e-5, 1)] for b in backends}} if both else {}
    return write_pictures(folder, report, records, dataset(classes), twins, np.arange(10)[::-1])


@pytest.mark.parametrize(
    ("classes", "backends"),
    [
        pytest.param(PLAIN, ("torch",), id="plain", marks=pytest.mark.slow),
        pytest.param(HOSTILE, ("torch", "flax"), id="hostile"),
        pytest.param(("", " ", "car"), ("torch", "flax"), id="nameless", marks=pytest.mark.slow),
    ],
)
def test_pictures_are_drawn_and_equal_runs_give_equal_bytes(
    tmp_path: Path, classes: tuple[str, ...], backends: tuple[str, ...]
) -> None:
    first, second = (
        pictures(tmp_path / "a", classes, backends),
        pictures(tmp_path / "b", classes, backends),
    )
    assert [path.name for path in first] == PICTURES
    for one, other in zip(first, second, strict=True):
        start = b"\x89PNG\r\n\x1a\n" if one.suffix == ".png" else b'<?xml version="1.0"'
        assert one.read_bytes().startswith(start) and 5_000 < one.stat().st_size < 400_000
        assert one.read_bytes() == other.read_bytes()


def test_the_samples_are_the_images_in_their_order(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).permutation(250)[: 10 * 3].reshape(10, 3).astype(np.uint8)
    plain = np.broadcast_to(colours[:, None, None], (10, 32, 32, 3))
    small = Dataset("small", plain, np.zeros(10, np.int64), plain, np.zeros(10, np.int64), PLAIN)
    report, records = (
        make("agree"),
        {"float64": {b: record(b, "float64") for b in ("torch", "flax")}},
    )
    write_pictures(tmp_path, report, records, small, None, np.arange(10)[::-1])
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    middles = []
    for colour in colours[::-1]:
        rows, columns = np.nonzero((picture == colour).all(axis=-1))
        assert len(rows) == pytest.approx(
            126**2, rel=0.05
        )  # 32 by 32, each four dots wide, less the frame
        middles.append((round(rows.mean(), -1), columns.mean()))
    assert middles == sorted(middles)  # eight in the first row, two in the second
    assert [row for row, _ in middles] == [middles[0][0]] * 8 + [middles[8][0]] * 2


@pytest.mark.slow
def test_runs_that_blow_up_or_coincide_can_be_drawn(tmp_path: Path) -> None:
    report = make("agree", "agree")
    wild = record("torch", "float64")
    wild.loss[:] = [1e300, *[np.inf] * 10, *[np.nan] * (STEPS - 11)]
    records = {
        "float64": {"torch": wild, "flax": wild},
        "float32": {b: record(b, "float32") for b in ("torch", "flax")},
    }
    for each in report["lenses"]:
        each["stretches"] = []
    assert len(write_pictures(tmp_path, report, records, dataset(), None, None)) == len(PICTURES)


@pytest.mark.slow
def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    one = record("torch", "float64")
    short = Record(
        **{
            **vars(one),
            **{name: getattr(one, name)[:1] for name in ("loss", "gradient_norm", "lr")},
        }
    )
    report = make("agree")
    assert len(
        write_pictures(tmp_path, report, {"float64": {"torch": short, "flax": short}}, dataset())
    ) == len(PICTURES)


def test_nothing_half_written_is_left_where_the_folder_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="--out"):
        pictures(tmp_path / "file")
    with pytest.raises(RecordError, match="--out"):
        write_json({}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_running_mean_ends_at_the_step_it_is_drawn_at() -> None:
    x, y = running_mean(np.arange(5.0), 2)
    assert x.tolist() == [1, 2, 3, 4] and y.tolist() == [0.5, 1.5, 2.5, 3.5]


def test_the_gap_of_losses_that_are_not_finite_is_unknown_not_zero() -> None:
    one, other = record("torch", "float64"), record("flax", "float64")
    one.loss[3] = other.loss[3] = np.inf
    gap = loss_gap(one, other)
    assert np.isnan(gap[3]) and not np.delete(gap, 3).any()
