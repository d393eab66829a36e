"""Hostile names do no harm anywhere; files that once ended in a traceback, or could take all
memory, are refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from lockstep import cli as compare
from lockstep.common import data, session
from lockstep.common.data import cifar10, user_data
from lockstep.common.errors import DataError, RecordError
from lockstep.common.learn import read_report
from lockstep.common.runs import request as plan
from tests.pages.browser import chromium, examine
from tests.robustness.inputs import SHAPES, Npz, made_dataset, zipped
from tests.robustness.mutations import ESCAPES, SCRIPT

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = (
    SCRIPT,
    "<img src=x onerror=alert(2)>",
    ESCAPES,
    "two\nlines",
    "\u202etxt.exe",
    "\udce9",  # what stands for a byte that is no text
    "$x_1$",
    "{{ 7 * 7 }}",
    "../../up",
)


# --- Names


class Ran(NamedTuple):
    """What one command left."""

    status: int
    stdout: str
    stderr: str
    folder: Path  # what it was started in
    classes: list[str]

    @property
    def page(self) -> str:
        return (self.folder / "out" / "report.html").read_text("utf-8")


def folder_of_pictures(folder: Path) -> tuple[str, list[str]]:
    """Class folders; a slash cannot be in a name."""
    classes = [name.replace("/", "_") for name in NAMES]
    images = np.random.default_rng(0).integers(0, 256, (len(classes), 5, 8, 8, 3), np.uint8)
    root = folder / f"{ESCAPES}<b>"
    for name, pictures in zip(classes, images, strict=True):
        (root / name).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(root / name / f"{number}{ESCAPES}<i>.png")
    return str(root), sorted(classes)


def archive(folder: Path) -> tuple[str, list[str]]:
    classes = [name.replace("\udce9", "\xe9") for name in NAMES]  # NumPy writes no surrogates
    labels = np.arange(36) % len(classes)
    images = np.random.default_rng(0).integers(0, 256, (36, 32, 32, 3), np.uint8)
    path = folder / f"{ESCAPES}<b>.npz"
    np.savez(
        path,
        allow_pickle=False,
        x_train=images,
        y_train=labels,
        x_test=images,
        y_test=labels,
        classes=np.array(classes),
    )
    return str(path), classes


@pytest.fixture(
    scope="module",
    params=[folder_of_pictures, pytest.param(archive, marks=pytest.mark.slow)],
    ids=["folder_of_pictures", "archive"],
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A whole run of both backends on data with these names; the archive's with --json."""
    folder = tmp_path_factory.mktemp("hostile")
    choice, classes = request.param(folder)
    command = [
        sys.executable,
        str(REPOSITORY / "compare.py"),
        "--data",
        choice,
        "--steps",
        "3",
        "--batch-size",
        "4",
    ]
    command += [
        "--dtype",
        "float64",
        "--device",
        "cpu",
        "--out",
        "out",
        "--tensorboard",
        "tensorboard",
    ]
    command += ["--json"] * (request.param is archive)
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    return Ran(
        done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"), folder, classes
    )


def commands(text: str) -> list[str]:
    """What could steer a terminal, or show text as something else: all that is not printable, but
    ends of lines."""
    return sorted({letter for letter in text if not letter.isprintable() and letter != "\n"})


def test_a_run_on_hostile_names_ends_as_any_other(ran: Ran) -> None:
    report = json.loads((ran.folder / "out" / "report.json").read_text("utf-8"))
    assert (ran.status, report["verdict"], report["data"]["classes"]) == (0, "agree", ran.classes)
    if "--json" in report["command"]:
        assert json.loads(ran.stdout) == report
    else:
        assert ran.stderr == ""


def test_what_is_printed_commands_no_terminal(ran: Ran) -> None:
    assert commands(ran.stdout) == commands(ran.stderr) == []
    assert "pwn" in ran.stdout  # it was shown


def test_the_search_for_commands_finds_them() -> None:
    assert commands("plain\ntext, 猫") == []
    assert commands(f"a{ESCAPES}\r\u202e\x9b") == ["\x07", "\r", "\x1b", "\x9b", "\u202e"]


def test_the_page_holds_no_name_as_markup(ran: Ran) -> None:
    assert "<script>alert" not in ran.page and "<img src=x" not in ran.page
    assert "&lt;img src=x onerror=alert(2)&gt;" in ran.page
    assert "{{ 7 * 7 }}" in ran.page
    assert commands(ran.page) == []


def test_the_page_runs_nothing_in_a_browser(ran: Ran) -> None:
    with chromium() as browser:
        faults = examine(browser, ran.folder / "out" / "report.html", access=False)
    assert [fault for fault in faults if fault.kind in ("error", "network")] == []


def test_the_pictures_can_be_opened_and_hold_no_script(ran: Ran) -> None:
    pictures = [path for path in (ran.folder / "out").iterdir() if path.suffix in (".png", ".svg")]
    assert {path.suffix for path in pictures} == {".png", ".svg"}
    for path in pictures:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        else:
            tags = {
                element.tag.rpartition("}")[2]
                for element in ET.fromstring(path.read_text("utf-8")).iter()
            }
            assert not tags & {"script", "img", "foreignObject"}


def test_nothing_is_written_next_to_the_folders_that_were_asked_for(ran: Ran) -> None:
    new = {path.name for path in ran.folder.iterdir() if ESCAPES not in path.name}
    assert new == {"out", "tensorboard"}
    assert not any(path.is_dir() for path in (ran.folder / "out").iterdir())
    assert all(path.name.isprintable() for path in (ran.folder / "out").iterdir())


# --- Archives


def archive_with(**members: bytes) -> bytes:
    maker = Npz()
    maker.prepare()
    return zipped(maker.members() | {f"{name}.npy": content for name, content in members.items()})


def header(text: str, rest: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + rest


def claim(shape: object, descr: object = "|u1") -> bytes:
    return header(repr({"descr": descr, "fortran_order": False, "shape": shape}), bytes(6 * 3072))


def bomb() -> bytes:
    """600 MB in 600 kB."""
    maker = Npz()
    maker.prepare()
    return maker.with_bomb(maker.members(), "x_train.npy", maker.bomb_size)


def twice() -> bytes:
    maker = Npz()
    maker.prepare()
    return zipped(maker.members(), more=[("y_test.npy", maker.members()["y_test.npy"])])


def packed_otherwise() -> bytes:
    """In LZMA, whose own header may claim 4 GB, and whose errors are of a class of their own."""
    maker = Npz()
    maker.prepare()
    return zipped(maker.members(), zipfile.ZIP_LZMA)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "brackets that are not closed": (
        lambda: archive_with(x_train=header("{" * 60)),
        "cannot be read",
    ),
    "a header that is cut off": (lambda: archive_with(x_train=header("{'a")), "cannot be read"),
    "whole numbers as Python 2 wrote them, and nothing else": (
        lambda: archive_with(y_test=header("(6,L)")),
        "cannot be",
    ),
    "brackets that are nested deeply": (
        lambda: archive_with(x_train=header("-" * 9000)),
        "x_train has no header",
    ),
    "a million million pictures": (
        lambda: archive_with(x_train=claim((10**12, 32, 32, 3))),
        "claims to be uint8",
    ),
    "a negative number of pictures": (
        lambda: archive_with(x_train=claim((-6, 32, 32, 3))),
        "claims to be uint8",
    ),
    "another dtype": (
        lambda: archive_with(x_train=claim((6, 32, 32, 3), "<f8")),
        "claims to be float64",
    ),
    "text of a gigabyte": (
        lambda: archive_with(classes=claim((6,), "<U200000000")),
        "claims to be <U200000000",
    ),
    "objects": (lambda: archive_with(classes=claim((3,), "|O")), "pickled objects"),
    "another version": (
        lambda: archive_with(classes=b"\x93NUMPY\x09\x09" + bytes(100)),
        "another version",
    ),
    "a bomb": (bomb, "claims to hold"),
    "a member that is there twice": (twice, "two members y_test"),
    "another way to pack": (packed_otherwise, "packed otherwise"),
}


def refusal(choice: str | Path, data_dir: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        data.load(str(choice), data_dir, announce=lambda line: None, progress=False)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_with_a_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    make, said = ARCHIVES[name]
    (tmp_path / "bad.npz").write_bytes(make())
    assert said in refusal(tmp_path / "bad.npz")
    (tmp_path / "good.npz").write_bytes(
        archive_with()
    )  # the control: nothing else is wrong with it
    assert len(data.load(str(tmp_path / "good.npz")).train_images) == 6


def test_a_large_archive_may_hold_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.npz").write_bytes(archive_with())
    monkeypatch.setattr(user_data, "MAX_UNPACKED", 100)
    assert len(data.load(str(tmp_path / "good.npz")).train_images) == 6
    monkeypatch.setattr(user_data, "MAX_PACKED", 0)
    assert "claims to hold" in refusal(tmp_path / "good.npz")


def test_an_archive_of_too_many_classes_is_refused(tmp_path: Path) -> None:
    maker = Npz()
    maker.prepare()
    names = np.array([str(number) for number in range(user_data.MAX_CLASSES + 1)])
    np.savez(tmp_path / "many.npz", allow_pickle=False, **maker.arrays | {"classes": names})
    assert "10001 classes" in refusal(tmp_path / "many.npz")
    np.savez(tmp_path / "most.npz", allow_pickle=False, **maker.arrays | {"classes": names[:-1]})
    assert len(data.load(str(tmp_path / "most.npz")).classes) == user_data.MAX_CLASSES


# --- Pictures and folders


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes."""
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(pictures: Path) -> None:
    content = io.BytesIO()
    Image.new("1", (10_000, 6_000)).save(content, "PNG")  # below Pillow's own limit
    (pictures / "ant" / "2.png").write_bytes(content.getvalue())
    assert "10000 x 6000 pixels are more than" in refusal(pictures)
    Image.new("1", (10_000, 4_000)).save(pictures / "ant" / "2.png")
    assert len(data.load(str(pictures), announce=lambda line: None).train_images) == 8


def test_what_only_is_called_a_picture_is_left_out(pictures: Path) -> None:
    os.mkfifo(pictures / "ant" / "pipe.png")
    (pictures / "ant" / "loop.png").symlink_to("loop.png")
    (pictures / "ant" / "endless.png").symlink_to("/dev/zero")
    (pictures / "ant" / "folder.png").mkdir()
    (pictures / "ant" / "again").symlink_to("..")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(pictures / "bee" / "s.png"))
    assert len(data.load(str(pictures), announce=lambda line: None).train_images) == 8


def test_data_that_is_a_pipe_or_a_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "endless.npz").symlink_to("/dev/zero")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    for name in ("pipe.npz", "endless.npz"):
        assert "neither a folder nor an .npz file" in refusal(tmp_path / name)
    assert "does not exist" in refusal(tmp_path / "loop.npz")


@pytest.mark.parametrize("kind", ["npz", "folder", "digits"])
def test_a_machine_without_room_for_the_data_says_so_in_one_line(
    kind: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    (pictures.parent / "good.npz").write_bytes(archive_with())
    choice = {"npz": pictures.parent / "good.npz", "folder": pictures, "digits": "digits"}[kind]
    data.load(str(choice), announce=lambda line: None)  # the control
    monkeypatch.setattr(np.lib.format, "read_array", no_room)
    monkeypatch.setattr(np, "stack", no_room)
    monkeypatch.setattr(np, "rint", no_room)
    assert refusal(choice).endswith(
        "does not fit into the memory of this machine: choose smaller data, or a machine with more memory"
    )


def test_a_file_of_cifar10_that_is_larger_than_any_is_not_read(tmp_path: Path) -> None:
    (tmp_path / cifar10.CIFAR10_FOLDER).mkdir()
    with open(tmp_path / cifar10.CIFAR10_FOLDER / "data_batch_1", "wb") as file:
        file.truncate(2**40)
    assert "truncated or altered" in refusal("cifar10", tmp_path)


# --- Names and paths on the command line, and in the files of a run


@pytest.mark.parametrize(
    "option", ["--data", "--data-dir", "--out", "--resume", "--weights", "--tensorboard", "export"]
)
def test_a_name_that_no_file_can_have_is_answered_in_one_line(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("n" * 5000, "n" * 5000 + ".pt", "n" * 5000 + ".safetensors"):
        rest = {
            "--data-dir": ["--data", "cifar10"],
            "export": ["--to", "torch"],
            "--data": [],
            "--resume": [],
        }
        assert compare.main([option, name, *rest.get(option, ["--data", "digits"])]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run that was begun, and not trained."""
    monkeypatch.chdir(tmp_path)
    made = made_dataset()
    images = {"x_train": made.train_images, "x_test": made.test_images}
    np.savez(
        "made.npz", allow_pickle=False, y_train=made.train_labels, y_test=made.test_labels, **images
    )
    report: Any = {"verdict": "agree", "cut_short": None}
    made_up = session.Result(report, tmp_path / "begun")
    monkeypatch.setattr(session, "train_and_compare", lambda *given: made_up)
    assert (
        compare.main(
            ["--data", "made.npz", "--steps", "3", "--batch-size", "4", "--out", "begun", "--quiet"]
        )
        == 0
    )
    yield tmp_path / "begun"


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "../../up"},
        {"weights": "a\0b"},
        {"weights": "n" * 5000},
        {"data": "/dev/zero"},
        {"data": "a\0b"},
        {"data": "\udce9"},
        {"backend": "../torch"},
        {"device": "../cpu"},
        {"dtypes": ["../../float64"]},
    ],
    ids=lambda changes: " ".join(f"{name} {value!a:.20}" for name, value in changes.items()),
)
def test_a_forged_plan_is_refused_in_one_line_and_leads_nowhere(
    changes: dict[str, Any], begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(begun.parent.rglob("*"))
    assert compare.main(["--resume", str(begun)]) == 0  # the control
    plan.write(dataclasses.replace(plan.read(begun), **changes), begun)
    capsys.readouterr()
    assert compare.main(["--resume", str(begun)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and commands(said.err) == []
    assert sorted(begun.parent.rglob("*")) == before


def test_names_in_a_file_of_weights_are_shown_escaped(tmp_path: Path) -> None:
    import torch

    from lockstep.backends import weight_files
    from lockstep.common.model.initial_weights import initial_weights

    weight_files.write_weights(tmp_path / "w.pt", initial_weights(SHAPES, 0, "float32"), "torch")
    assert weight_files.read_weights(tmp_path / "w.pt", SHAPES).keys() == SHAPES.keys()
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    torch.save(state | {ESCAPES: state["fc3.bias"]}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="pwn") as caught:
        weight_files.read_weights(tmp_path / "w.pt", SHAPES)
    assert str(caught.value).isprintable()


# --- The report of the faults

FAULTS = REPOSITORY / "results" / "faults" / "report.json"


def in_row(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda report: report | {"rows": [report["rows"][0] | changes, *report["rows"][1:]]}


def in_finding(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def changed(report: dict[str, Any]) -> Any:
        lenses = report["rows"][0]["lenses"]
        return in_row(lenses=lenses | {"float64": lenses["float64"] | changes})(report)

    return changed


REPORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda report: [report],
    "another schema": lambda report: report | {"schema": 2},
    "no rows": lambda report: {name: value for name, value in report.items() if name != "rows"},
    "rows that are an object": lambda report: report | {"rows": {"name": 1}},
    "a fault that is there twice": lambda report: report | {"rows": report["rows"][:1] * 2},
    "a command that is text": lambda report: report | {"command": "compare.py"},
    "a command with an escape": lambda report: report | {"command": [ESCAPES]},
    "data without a name": lambda report: report | {"data": [{}]},
    "a sentence that is null": in_row(sentence=None),
    "a sentence with an escape": in_row(sentence=ESCAPES),
    "half a letter": in_row(source="\udce9"),
    "a lens that there is not": in_row(lenses={"../float64": {"caught": False}}),
    "lenses that are a list": in_row(lenses=[]),
    "caught, perhaps": in_finding(caught="yes"),
    "a step that is text": in_finding(step="0"),
    "a step below zero": in_finding(step=-1),
    "a gap that is not a number": in_finding(gap=float("nan")),
    "a bound that is missing": in_finding(bound=None),
    "a share that is endless": in_finding(gap_over_bound=float("inf")),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_is_not_fit_for_a_page_is_refused(name: str, tmp_path: Path) -> None:
    report = json.loads(FAULTS.read_text("utf-8"))
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert len(read_report(tmp_path / "report.json")["rows"]) == len(report["rows"])  # the control
    (tmp_path / "report.json").write_text(json.dumps(REPORTS[name](report)))
    with pytest.raises(RecordError, match=r"make it with: python compare\.py faults") as caught:
        read_report(tmp_path / "report.json")
    assert str(caught.value).isprintable()


def test_a_report_that_is_a_pipe_or_nested_deeply_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**40)
    for name in ("pipe.json", "deep.json", "large.json"):
        with pytest.raises(RecordError, match="cannot be read"):
            read_report(tmp_path / name)
