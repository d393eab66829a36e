"""The kinds of files that the program reads: a valid one of each, ways to damage it, and how a
command reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import zipfile
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from unittest import mock

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config, Schedule
from lockstep.common.data import Dataset, cifar10
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import BackendError, RecordError
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.perturb import perturb_one_ulp, twin_weights
from lockstep.common.protocol import Arrays
from lockstep.common.runs import checkpoint, record, request, training
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.find import find_ensemble
from lockstep.common.runs.record import Record
from lockstep.common.system import environment, storage
from lockstep.common.verdict.comparison import Comparison
from lockstep.common.verdict.judge import judge
from tests.robustness.mutations import (
    ESCAPES,
    INTEGERS,
    NAMES,
    SCRIPT,
    Generator,
    damaged,
    distorted,
    distorted_arrays,
    one_of,
    text_of,
)
from tests.shapes import NET
from tests.verdict.helpers import compared

ROOT = Path(__file__).resolve().parents[2]
GENUINE = Path(os.environ.get("LOCKSTEP_DATA") or "absent")
SHAPES = NET | {"fc3.kernel": (84, 4), "fc3.bias": (4,)}  # for four classes
LENSES = ("float64", "float32")
CONFIG = Config(
    steps=12,
    batch_size=8,
    lr=0.01,
    momentum=0.9,
    schedule=Schedule("plateau", window=2, patience=1, cooldown=1),
).resolve(20)
# What a verdict of agreement leaves room for in float64 is 1e-12 of the largest magnitude, or of 1;
# see lockstep.common.verdict.compare.
EXACT = 4e-12


class Wrong(Exception):
    """What was accepted is not fit for use."""


class Kind:
    """One kind of input."""

    share: ClassVar[int]  # of all inputs, relative to those of the other kinds
    seconds: ClassVar[float] = 10.0  # longest time that one may take
    memory: ClassVar[int] = 2**30  # bytes that one may take besides what was taken before

    @classmethod
    def missing(cls) -> str | None:
        """Why there are no inputs of this kind here, if there are none."""
        return None

    def prepare(self) -> None:
        """Make what the inputs are made of, in the working directory."""

    @abstractmethod
    def valid(self, folder: Path) -> None:
        """Put the valid input into the folder."""

    @abstractmethod
    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        """Put a damaged one there; returns how it was damaged, and whether its digests were made
        right again."""

    @abstractmethod
    def read(self, folder: Path, forged: bool) -> None:
        """Read it as a command does.

        Raises:
            LockstepError: if it is refused.
            Wrong: if it is accepted, and is not fit for use.
        """


def made_dataset() -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    labels = np.arange(40) % 4
    return Dataset(
        "made", pixels[:20], labels[:20], pixels[20:], labels[20:], ("cat", "dog", "ant", "bee")
    )


def check_dataset(dataset: Dataset) -> None:
    """Raise Wrong unless all that `Dataset` promises is true."""
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        if images.dtype != np.uint8 or images.shape != (len(images), 32, 32, 3) or len(images) == 0:
            raise Wrong(f"images are {images.dtype} {images.shape}")
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise Wrong(f"labels are {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(dataset.classes):
            raise Wrong("a label has no class")
    if len(dataset.classes) < 2 or len(set(dataset.classes)) < len(dataset.classes):
        raise Wrong(f"classes {dataset.classes!a:.100}")
    if not all(type(name) is str for name in dataset.classes) or len(dataset.digest) != 64:
        raise Wrong("classes that are no strings")


def load_data(path: Path | str, data_dir: Path | None = None) -> Dataset:
    dataset = data.load(str(path), data_dir, announce=lambda line: None, progress=False)
    check_dataset(dataset)
    return dataset


class Payload:
    """What harms whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo harm",)


# --- Data sets


class Cifar10(Kind):
    """The genuine files, one of them damaged; where a file was not, it is a link to the genuine
    one."""

    share = 5
    FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")

    @classmethod
    def missing(cls) -> str | None:
        return (
            None
            if (GENUINE / cifar10.CIFAR10_FOLDER).is_dir()
            else "CIFAR-10 is not there: set LOCKSTEP_DATA"
        )

    def valid(self, folder: Path) -> None:
        (folder / cifar10.CIFAR10_FOLDER).mkdir()
        for name in self.FILES:
            (folder / cifar10.CIFAR10_FOLDER / name).symlink_to(
                (GENUINE / cifar10.CIFAR10_FOLDER / name).resolve()
            )

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        self.valid(folder)
        name = one_of(generator, [self.FILES[0], self.FILES[0], *self.FILES])
        file = folder / cifar10.CIFAR10_FOLDER / name
        content = file.read_bytes()
        file.unlink()
        how = one_of(generator, ["damage"] * 6 + ["missing", "other", "pickle", "odd", "large"])
        if how == "damage":
            content, how = damaged(generator, content)
            file.write_bytes(content)
        elif how == "other":
            other = one_of(generator, self.FILES)
            file.symlink_to((GENUINE / cifar10.CIFAR10_FOLDER / other).resolve())
            how = f"{other} in its place"
        elif how == "pickle":
            file.write_bytes(pickle.dumps({"data": Payload(), "labels": Payload()}))
        elif how == "odd":
            how = odd_file(generator, file)
        elif how == "large":
            with file.open("wb") as opened:
                opened.truncate(2**40)
        return f"{name}: {how}", False

    def read(self, folder: Path, forged: bool) -> None:
        dataset = load_data("cifar10", folder)
        if dataset.train_images.shape != (50_000, 32, 32, 3):
            raise Wrong("another number of images")


def odd_file(generator: Generator, path: Path) -> str:
    """Put what is no file there."""
    how = one_of(generator, ["pipe", "socket", "folder", "loop", "dangling", "device", "endless"])
    if how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as opened, contextlib.suppress(OSError):
            opened.bind(os.path.relpath(path))
    elif how == "folder":
        path.mkdir()
    else:
        aim = {
            "loop": path.name,
            "dangling": "nowhere",
            "device": "/dev/null",
            "endless": "/dev/zero",
        }[how]
        path.symlink_to(aim)
    return how


class Npz(Kind):
    """Archives of NumPy arrays."""

    share = 22

    def prepare(self) -> None:
        generator = np.random.default_rng(0)
        self.arrays: dict[str, np.ndarray] = {
            "x_train": generator.integers(0, 256, (6, 32, 32, 3), np.uint8),
            "y_train": np.array([0, 1, 2, 0, 1, 2]),
            "x_test": generator.integers(0, 256, (2, 32, 32, 3), np.uint8),
            "y_test": np.array([[0], [1]], np.uint8),
            "classes": np.array(["cat", "dog", "ant"]),
        }
        self.bomb_size, block = 600 * 2**20, bytes(2**20)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, self.header((self.bomb_size,)))
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.bomb, self.crc = packer.compress(header.getvalue()), zlib.crc32(header.getvalue())
        self.bomb += packer.flush(zlib.Z_FULL_FLUSH)
        piece = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
        for _ in range(self.bomb_size // len(block)):
            self.bomb += piece
            self.crc = zlib.crc32(block, self.crc)
        self.bomb += packer.flush()
        self.bomb_size += len(header.getvalue())

    def header(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"descr": "|u1", "fortran_order": False, "shape": shape}

    def members(self) -> dict[str, bytes]:
        return {f"{name}.npy": npy(array) for name, array in self.arrays.items()}

    def valid(self, folder: Path) -> None:
        (folder / "data.npz").write_bytes(zipped(self.members()))

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        members = self.members()
        packing = one_of(generator, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        name = one_of(generator, sorted(members))
        how = one_of(
            generator,
            ["raw"] * 3 + ["member", "header", "header", "array", "array", "zip", "zip", "classes"],
        )
        if how == "raw":
            content, how = damaged(generator, zipped(members, packing))
        elif how == "zip":
            content, how = self.at_zip_level(generator, members, name, packing)
        else:
            if how == "member":
                members[name], how = damaged(generator, members[name])
            elif how == "header":
                members[name], how = self.other_header(generator, members[name])
            elif how == "array":
                array, how = self.other_array(generator, self.arrays[name.removesuffix(".npy")])
                members[name] = npy(array)
            else:
                names = [one_of(generator, [*NAMES, "cat", "dog", "x" * 100_000]) for _ in range(3)]
                members["classes.npy"], name = (
                    npy(np.array([text.replace("\udce9", "?") for text in names])),
                    "classes",
                )
            content, how = zipped(members, packing), f"{name}: {how}"
        (folder / "data.npz").write_bytes(content)
        return how, False

    def other_header(self, generator: Generator, member: bytes) -> tuple[bytes, str]:
        """The same numbers under another claim."""
        stream = io.BytesIO(member)
        np.lib.format.read_magic(stream)
        shape, order, dtype = np.lib.format.read_array_header_1_0(stream)
        rest = stream.read()
        huge = one_of(generator, INTEGERS)
        shapes = [
            shape,
            (huge,),
            (huge, *shape[1:]),
            (*shape, 0),
            (*shape, huge),
            (-1,),
            (),
            "x",
            None,
            [6],
            (6.0,),
            (True,),
        ]
        shapes += [(1,) * 64, (1,) * 200, (2**31, 2**31, 2**31), shape[::-1]]
        descrs = [
            dtype.str,
            "|u1",
            "<f8",
            "|O",
            "O",
            "<U1000000000",
            "V99999999999",
            "|S0",
            ">i8",
            "M8[ns]",
            "\\d",
            "x" * 9000,
        ]
        descrs += [
            [("a", "|u1"), ("b", "|O")],
            [("a", "<f8", (10**6, 10**6))],
            {"names": ["a"], "formats": ["u1"]},
            None,
            3,
        ]
        claim = {"descr": dtype.str, "fortran_order": order, "shape": shape}
        claim[
            one_of(generator, ["shape", "shape", "descr", "descr", "fortran_order", "novelty"])
        ] = None
        if "novelty" not in claim:
            claim = {
                "descr": one_of(generator, descrs) if claim["descr"] is None else claim["descr"],
                "fortran_order": one_of(generator, [True, 1, "x", None])
                if claim["fortran_order"] is None
                else claim["fortran_order"],
                "shape": one_of(generator, shapes) if claim["shape"] is None else claim["shape"],
            }
        text = one_of(
            generator, [repr(claim), repr(claim), repr(claim), repr(claim).replace(")", "L)")]
        )
        text = one_of(
            generator,
            [text] * 8
            + ["(" * 2000, "[" * 9000, "{" * 200, "9" * 9000, "-" * 9000, "'\\d'", "b''"],
        )
        text += one_of(generator, ["", "\n", " " * 60 + "\n", " " * 20_000 + "\n"])
        version = one_of(generator, [(1, 0)] * 5 + [(2, 0), (3, 0), (9, 9), (0, 0)])
        encoded = text.encode()
        length = one_of(generator, [len(encoded)] * 7 + [0, 3, 2**16 - 1, 2**32 - 1])
        size = (
            struct.pack("<H", length & 0xFFFF)
            if version == (1, 0)
            else struct.pack("<I", length & 0xFFFFFFFF)
        )
        return b"\x93NUMPY" + bytes(
            version
        ) + size + encoded + rest, f"header {version} {length} {text:.100}"

    def other_array(self, generator: Generator, array: np.ndarray) -> tuple[np.ndarray, str]:
        others: dict[str, Any] = {
            "objects": np.array([Payload(), None], object),
            "objects of this shape": np.full(array.shape, Payload(), object),
            "records": np.zeros(len(array), [("a", "u1"), ("b", "f8")]),
            "bytes": array.astype("S"),
            "text": array.astype("U"),
            "dates": np.zeros(array.shape, "M8[s]"),
            "complex": np.zeros(array.shape, complex),
            "truth": np.zeros(array.shape, bool),
            "empty": array[:0],
            "one less": array[:-1],
            "one more axis": array[..., np.newaxis],
            "no axis": np.array(3),
            "another order": np.asfortranarray(array),
            "reversed": array[::-1],
        }
        how = one_of(generator, [*others, "distorted"])
        if how == "distorted" and array.dtype.kind in "iu":
            found, how = distorted_arrays(generator, {"x": array, "y": array})
            return found.get("x", array), how
        return others.get(how, array), how

    def at_zip_level(
        self, generator: Generator, members: dict[str, bytes], name: str, packing: int
    ) -> tuple[bytes, str]:
        how = one_of(
            generator,
            [
                "twice",
                "renamed",
                "fields",
                "fields",
                "fields",
                "bomb",
                "more",
                "many",
                "comment",
                "two",
            ],
        )
        if how == "twice":
            return zipped(
                members, packing, [(name, one_of(generator, [members[name], b"", b"x"]))]
            ), f"{how} {name}"
        if how == "renamed":
            other = one_of(
                generator,
                [*NAMES[:-3], name + ".npy", name.upper(), name.removesuffix(".npy"), "/" + name],
            )
            content = members.pop(name)
            return zipped(members | {other: content}, packing), f"{name} is called {other}"
        if how == "more":
            return zipped(
                members | dict.fromkeys(("../up.npy", "/etc/x.npy", "a/" * 500), b"x"), packing
            ), how
        if how == "many":
            return zipped(members | {f"{number}.npy": b"" for number in range(3000)}, packing), how
        if how == "comment":
            return zipped(members, packing) + bytes(70_000), how
        if how == "two":
            return zipped(members, packing) + zipped(members, packing), how
        content = bytearray(zipped(members, packing))
        if how == "bomb":
            lock_folder = one_of(generator, [self.bomb_size, 100, 2**32 - 2])
            return self.with_bomb(members, name, lock_folder), f"{how} as {name}"
        # A field of the central directory, of the local header before the data, or of both
        marks = {
            b"PK\x01\x02": {6: 2, 8: 2, 10: 2, 16: 4, 20: 4, 24: 4, 28: 2, 30: 2, 32: 2, 42: 4}
        }
        marks |= {b"PK\x03\x04": {4: 2, 6: 2, 8: 2, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2}}
        marks |= {b"PK\x05\x06": {8: 2, 10: 2, 12: 4, 16: 4, 20: 2}}
        mark = one_of(generator, list(marks))
        field, size = one_of(generator, list(marks[mark].items()))
        places = [found.start() for found in re.finditer(re.escape(mark), bytes(content))]
        number = one_of(generator, [*INTEGERS, 8, 9, 12, 14, 93, 95, 99]) % 2 ** (8 * size)
        at = one_of(generator, places) + field
        content[at : at + size] = number.to_bytes(size, "little")
        return bytes(content), f"field {field} of {mark!r} is {number}"

    def with_bomb(self, members: dict[str, bytes], name: str, lock_folder: int) -> bytes:
        """An archive with a small member that unpacks to 600 MiB, and claims to take so many
        bytes."""
        members = {n: m for n, m in members.items() if n != name}
        content = bytearray(zipped(members))
        end = content.rindex(b"PK\x05\x06")
        start, count = struct.unpack("<I", content[end + 16 : end + 20])[0], len(members) + 1
        facts = struct.pack("<HHHHHIII", 20, 0, 8, 0, 33, self.crc, len(self.bomb), lock_folder)
        local = b"PK\x03\x04" + facts + struct.pack("<HH", len(name), 0) + name.encode()
        entry = (
            b"PK\x01\x02\x14\0"
            + facts
            + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, start)
            + name.encode()
        )
        directory = bytes(content[start:end]) + entry
        body = bytes(content[:start]) + local + self.bomb
        tail = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
        return body + directory + b"PK\x05\x06" + tail

    def read(self, folder: Path, forged: bool) -> None:
        load_data(folder / "data.npz")


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def zipped(members: dict[str, bytes], packing: int = zipfile.ZIP_STORED, more: Any = ()) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for name, content in [*members.items(), *more]:
            info = zipfile.ZipInfo(name)
            info.compress_type = packing
            with _silent():  # names that are there twice
                archive.writestr(info, content)
    return stream.getvalue()


@contextlib.contextmanager
def _silent() -> Any:
    import warnings

    with warnings.catch_warnings(action="ignore"):
        yield


class Folder(Kind):
    """Folders of pictures by class."""

    share = 14
    FORMATS = ("png", "jpg", "bmp", "ppm", "webp")

    def prepare(self) -> None:
        from PIL import Image

        generator = np.random.default_rng(0)
        self.files: dict[str, bytes] = {}
        for name in ("ant", "bee"):
            for number in range(5):
                kind = self.FORMATS[number]
                stream = io.BytesIO()
                picture = Image.fromarray(generator.integers(0, 256, (12, 9, 3), np.uint8))
                picture.save(stream, {"jpg": "JPEG"}.get(kind, kind.upper()))
                self.files[f"{name}/{number}.{kind}"] = stream.getvalue()
        self.odd: dict[str, bytes] = {}
        for title, mode, size, kind, options in (
            ("palette", "P", (9, 9), "PNG", {"transparency": b"\0\x80"}),
            ("16 bits", "I;16", (9, 9), "PNG", {}),
            ("grey and alpha", "LA", (9, 9), "PNG", {}),
            ("inks", "CMYK", (9, 9), "JPEG", {}),
            ("bits", "1", (9, 9), "PPM", {}),
            ("40 million pixels", "1", (8000, 5000), "PNG", {}),
            ("60 million pixels", "1", (10000, 6000), "PNG", {}),
            ("a line", "L", (65000, 1), "JPEG", {}),
            ("another format", "P", (9, 9), "GIF", {}),
            ("another format, TIFF", "RGB", (9, 9), "TIFF", {}),
        ):
            stream = io.BytesIO()
            Image.new(mode, size).save(stream, kind, **options)
            self.odd[title] = stream.getvalue()

    def valid(self, folder: Path) -> None:
        self.write(folder, self.files)

    def write(self, folder: Path, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = folder / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        weight_files = dict(self.files)
        name = one_of(generator, sorted(weight_files))
        how = one_of(
            generator,
            ["damage"] * 8
            + ["odd picture", "size", "size", "chunk", "names", "names", "tree", "file"],
        )
        if how == "damage":
            weight_files[name], how = damaged(generator, weight_files[name])
        elif how == "odd picture":
            how = one_of(generator, list(self.odd))
            weight_files[name] = self.odd[how]
        elif how == "size":
            width, height = (
                one_of(generator, INTEGERS) % 2**32,
                one_of(generator, [1, 9, 2**15, 2**31 - 1, 2**32 - 1]),
            )
            name, weight_files[name], how = self.claiming(generator, weight_files, width, height)
        elif how == "chunk":
            name = "ant/0.png"
            weight_files[name], how = self.with_chunk(generator, weight_files[name])
        self.write(folder, weight_files)
        root = folder / "set"
        if how == "names":
            other = os.fsencode(
                one_of(generator, NAMES[3:]).replace("/", "_").replace("\0", "_")[:200]
            )
            at = one_of(generator, [root / "ant", root / name])
            if at.is_file():
                other += os.fsencode(one_of(generator, [at.suffix, at.suffix.upper(), ".txt", ""]))
            os.rename(at, os.path.join(os.fsencode(at.parent), other))
            how = f"{at.name} is called {other!r}"
        elif how == "tree":
            how = self.other_tree(generator, root)
        elif how == "file":
            (root / name).unlink()
            how = odd_file(generator, root / name)
        return f"{name}: {how}", False

    def claiming(
        self, generator: Generator, files: dict[str, bytes], width: int, height: int
    ) -> tuple[str, bytes, str]:
        """A small picture that claims to be large."""
        kind = one_of(generator, self.FORMATS)
        name = next(name for name in files if name.endswith(kind))
        content = bytearray(files[name])
        if kind == "png":
            header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
            content[12:33] = header + struct.pack(">I", zlib.crc32(header))
        elif kind == "bmp":
            content[18:26] = struct.pack("<II", width, height)
        elif kind == "jpg":
            at = content.index(b"\xff\xc0") + 5
            content[at : at + 4] = struct.pack(">HH", height % 2**16, width % 2**16)
        elif kind == "ppm":
            content = bytearray(
                f"P6 {width} {height} {one_of(generator, [255, 1, 65535, 0, 99999])}\n".encode()
                + bytes(9)
            )
        else:
            at = content.index(b"VP8") + 4
            content[at + 6 : at + 10] = struct.pack("<HH", width % 2**14, height % 2**14)
        return name, bytes(content), f"claims {width} x {height}"

    def with_chunk(self, generator: Generator, content: bytes) -> tuple[bytes, str]:
        kind = one_of(
            generator,
            [
                b"iCCP",
                b"zTXt",
                b"iTXt",
                b"tEXt",
                b"eXIf",
                b"acTL",
                b"PLTE",
                b"tRNS",
                b"gAMA",
                b"fcTL",
            ],
        )
        packed = zlib.compress(bytes(one_of(generator, [9, 10**5, 5 * 10**7])))
        bodies = [
            packed,
            b"name\0\0" + packed,
            b"name\0\1\0\0\0" + packed,
            generator.bytes(40),
            b"",
            bytes(4),
            b"\xff" * 8,
        ]
        body = one_of(generator, bodies)
        size = one_of(generator, [len(body)] * 4 + [2**31 - 1, 2**32 - 1, 0])
        chunk = struct.pack(">I", size) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        return content[:33] + chunk + content[33:], f"chunk {kind!r} of {size}"

    def other_tree(self, generator: Generator, root: Path) -> str:
        how = one_of(
            generator,
            ["split", "half a split", "loop", "empty", "deep", "one", "files", "links", "root"],
        )
        if how in ("split", "half a split"):
            (root / "train").mkdir()
            for name in ("ant", "bee"):
                (root / name).rename(root / "train" / name)
            (root / "test").mkdir()
            if how == "split":
                shutil.copytree(
                    root / "train" / "ant", root / "test" / one_of(generator, ["ant", "bee", "cow"])
                )
        elif how == "loop":
            (root / "ant" / "again").symlink_to("../../set")
            (root / "cow").symlink_to("../set")
        elif how == "empty":
            (root / "cow").mkdir()
        elif how == "deep":
            (root / "cow" / "/".join("abcdefgh")).mkdir(parents=True)
        elif how == "one":
            shutil.rmtree(root / "ant")
        elif how == "files":
            (root / "cow.png").write_bytes(b"x")
            (root / "ant" / ".png").write_bytes(b"x")
        elif how == "links":
            (root / "cow").symlink_to("ant")
        else:
            shutil.rmtree(root)
            how = f"root: {odd_file(generator, root)}"
        return how

    def read(self, folder: Path, forged: bool) -> None:
        load_data(folder / "set")


# --- Runs


def made_records() -> dict[str, list[Record]]:
    """By precision, Flax's run of the made data, and in float32 its twin: numbers without meaning, of
    the right form."""
    found = {}
    for dtype in LENSES:
        found[dtype] = [
            made_record(dtype, twin) for twin in ([None, 1] if dtype == "float32" else [None])
        ]
    return found


def made_record(dtype: str, twin: int | None) -> Record:
    values, own = np.random.default_rng(1), np.random.default_rng([2, twin or 0])
    dataset = made_dataset()

    def noisy(*shape: int) -> np.ndarray:
        noise = {"float64": 2e-16, "float32": 1e-7}[dtype]
        return values.normal(size=shape) * (1 + noise * own.uniform(-1, 1, shape))

    def tensor(*shape: int) -> np.ndarray:
        return np.asarray(noisy(*shape)).astype(numpy_dtype(dtype))

    first_steps: Arrays = {}
    for step in range(2):
        first_steps[f"{step}/data/images"] = values.uniform(-1, 1, (4, 32, 32, 3)).astype(
            numpy_dtype(dtype)
        )
        first_steps[f"{step}/data/labels"] = values.integers(0, 4, 4)
        first_steps[f"{step}/forward/input of fc3"] = tensor(4, 84)
        first_steps[f"{step}/forward/logits"] = tensor(4, 4)
        first_steps[f"{step}/loss/loss"] = tensor()
        first_steps |= {f"{step}/backward/{name}": tensor(*shape) for name, shape in SHAPES.items()}
        for what in ("update/", "update/momentum of "):
            first_steps |= {
                f"{step}/{what}{name}": tensor(*shape) for name, shape in SHAPES.items()
            }
    weights = initial_weights(SHAPES, 0, dtype)
    steps = CONFIG.total_steps
    return Record(
        backend="flax",
        dtype=dtype,
        twin=twin,
        config=CONFIG.to_json(),
        data=training.describe(CONFIG, dataset),
        environment={"device": "cpu"},
        source=environment.source_digest("flax"),
        loss=np.abs(noisy(steps)) + 1,
        gradient_norm=np.abs(noisy(steps)),
        lr=np.full(steps, 0.01),
        batch_digests=np.arange(1, steps + 1),
        predictions=values.integers(0, 4, 20),
        test_loss=float(noisy(1)[0]) + 2,
        seconds=1.0,
        steps_per_second=10.0,
        weights=weights if twin is None else twin_weights(weights, 0, twin),
        first_steps=first_steps,
        layers=["input of fc3", "logits"],
        parameter_history={
            f"{step}/{name}": tensor(*shape) for step in (3, 10) for name, shape in SHAPES.items()
        },
        final={name: tensor(*shape) for name, shape in SHAPES.items()},
        segments=[{"backend": "flax", "stop": steps}],
    )


def same_numbers(one: Record, other: Record) -> bool:
    """Whether two records show the same run, up to what float64's bounds leave room for."""
    groups = [
        {
            name: getattr(r, name)
            for name in ("loss", "gradient_norm", "lr", "batch_digests", "predictions")
        }
        for r in (one, other)
    ]
    for group in ("weights", "first_steps", "parameter_history", "final"):
        for found, record_ in zip(groups, (one, other), strict=True):
            found |= {f"{group}/{name}": array for name, array in getattr(record_, group).items()}
    for found, record_ in zip(groups, (one, other), strict=True):
        found["test_loss"] = np.float64(record_.test_loss)
    if groups[0].keys() != groups[1].keys():
        return False
    return all(_near(array, groups[1][name]) for name, array in groups[0].items())


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    a, b = one.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())
    with np.errstate(over="ignore"):
        return not a.size or float(np.abs(a - b).max()) <= EXACT * max(1.0, float(np.abs(b).max()))


def exactly(one: Record, other: Record) -> bool:
    """Equal to the bit."""

    def bits(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bits(item) for name, item in value.items()}
        if isinstance(value, list):
            return [bits(item) for item in value]
        if isinstance(value, np.ndarray):
            return value.dtype, value.shape, value.tobytes()
        return repr(value)

    return bits(vars(one)) == bits(vars(other))


def ordered(content: bytes) -> bytes:
    """A safetensors file with its metadata in order; safetensors itself writes them in any."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(size) + content[8 + size :]


def other_tensors(generator: Generator, path: Path) -> tuple[str, bool]:
    """A file of Lockstep's own with something changed in it, and often with the right digest for
    that."""
    content = path.read_bytes()
    how = one_of(
        generator, ["raw"] * 3 + ["header", "facts", "facts", "facts", "arrays", "arrays", "arrays"]
    )
    if how == "raw":
        content, how = damaged(generator, content)
        path.write_bytes(content)
        return how, False
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if how == "header":
        header, how = distorted(generator, header)
        text = text_of(header, sort_keys=False).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        return f"header: {how}", False

    from safetensors.numpy import load, save

    arrays, facts = load(content), header["__metadata__"]["facts"]
    if how == "facts":
        changed, how = distorted(generator, json.loads(facts))
        facts = text_of(changed)
    else:
        for _ in range(one_of(generator, [1, 1, 1, 2, 5])):
            if arrays:
                arrays, how = distorted_arrays(generator, arrays)
    arrays = {
        name.encode("utf-8", "replace").decode(): np.asarray(a, order="C")
        for name, a in arrays.items()
    }
    metadata = {"facts": facts, "digest": storage._digest(facts, arrays)}
    path.write_bytes(ordered(save(arrays, metadata=metadata)))
    return how, True


class Records(Kind):
    """Flax's records, next to PyTorch's, which are as they should be."""

    share = 20

    def prepare(self) -> None:
        environment.source_digest = functools.cache(
            environment.source_digest
        )  # whoever edits the sources meanwhile makes no record stale
        self.dataset, self.records, self.count = made_dataset(), made_records(), 0
        self.others = {
            dtype: [self.of_torch(r) for r in records] for dtype, records in self.records.items()
        }
        paths = [
            record.write(one, Path("records"))
            for records in self.records.values()
            for one in records
        ]
        self.files = {path.name: ordered(path.read_bytes()) for path in paths}

    def of_torch(self, flax: Record) -> Record:
        """The same numbers, up to rounding in float32."""
        source = environment.source_digest("torch")
        if flax.dtype == "float64":
            return dataclasses.replace(flax, backend="torch", source=source)
        generator = np.random.default_rng([3, flax.twin or 0])
        final = {name: perturb_one_ulp(array, generator) for name, array in flax.final.items()}
        return dataclasses.replace(
            flax,
            backend="torch",
            source=source,
            final=final,
            loss=perturb_one_ulp(flax.loss, generator),
        )

    def valid(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        self.valid(folder)
        path = one_of(generator, sorted(folder.iterdir()))
        if generator.integers(25) == 0:
            path.unlink()
            return f"{path.name}: {odd_file(generator, path)}", False
        how, forged = other_tensors(generator, path)
        return f"{path.name}: {how}", forged

    def read(self, folder: Path, forged: bool) -> None:
        for dtype, records in self.records.items():
            ensemble = find_ensemble(folder, "flax", dtype, CONFIG, self.dataset, lambda line: None)
            if ensemble is None:
                continue  # the run is trained again
            found = ensemble.records
            families = {"torch": list(self.others[dtype]), "flax": found}
            ensembles = {name: Ensemble.of(records) for name, records in families.items()}
            comparison = judge(ensembles, lambda name, twins: [], self.dataset.test_labels)
            undamaged = len(found) == len(records) and all(map(exactly, found, records))
            agrees = comparison.verdict == "agree"
            if undamaged and not agrees:
                raise Wrong("the verdict is disagree, of an undamaged record")
            if agrees and forged and dtype == "float64" and not same_numbers(found[0], records[0]):
                raise Wrong("the verdict is agree, of other numbers")
            if agrees and not forged and not undamaged and len(found) == len(records):
                raise Wrong("the verdict is agree, of a damaged record")
            self.show(folder, families, comparison)

    def show(self, folder: Path, families: dict[str, list[Record]], comparison: Comparison) -> None:
        """What a run does with its records."""
        from lockstep.common import report, session
        from lockstep.common.verdict import locate

        dtype = comparison.dtype
        runs = {dtype: {name: members[0] for name, members in families.items()}}
        first = comparison.first_divergence
        if first and (first.step < record.FIRST_STEPS or first.stage == "evaluate"):
            location = locate.locate(first, runs[dtype], CONFIG, self.dataset, untrained)
            comparison = dataclasses.replace(comparison, location=location)
        made = session.make_report("quick", CONFIG, self.dataset, [], runs, [comparison], None)
        report.to_json(made)
        out = io.StringIO()
        report.Terminal(stdout=out, stderr=out).verdict(made)
        if not out.getvalue().replace("\n", "").isprintable():
            raise Wrong("what is printed may command the terminal")
        self.count += 1
        if self.count % 60 == 3:  # pages take a second
            twins = {dtype: {name: members[1:] for name, members in families.items()}}
            report.write_report_page(folder, made, runs, self.dataset, twins, np.arange(8))


def untrained(name: str) -> NoReturn:
    raise BackendError(f"{name} is not trained here: look at the records alone")


class Checkpoints(Kind):
    """What a run of PyTorch resumes from: of the run itself in float64, and of a twin in
    float32."""

    share = 15
    MEMBERS = (("float64", None), ("float32", 1))

    def prepare(self) -> None:
        from lockstep import backends

        environment.source_digest = functools.cache(environment.source_digest)
        self.dataset = made_dataset()
        self.backends = {
            dtype: backends.load("torch")(CONFIG, 4, dtype, "cpu", "off")
            for dtype, _ in self.MEMBERS
        }
        self.records: dict[str, Record] = {}
        folder = Path("checkpoints")
        for dtype, twin in self.MEMBERS:
            self.records[dtype] = self.trained(folder, dtype, twin, None, every=5)
            kept = checkpoint.read(checkpoint.found(folder, self.records[dtype].stem)[-1])
            checkpoint.remove(folder, kept.stem)
            checkpoint.write(dataclasses.replace(kept, seconds=1.0), folder)
        self.files = {
            path.name: ordered(path.read_bytes()) for path in (folder / checkpoint.FOLDER).iterdir()
        }

    def trained(
        self, folder: Path, dtype: str, twin: int | None, start: Any, every: int = 0
    ) -> Record:
        class Silent:
            def line(self, text: str) -> None: ...

            def advance(self, steps: int, loss: float) -> None: ...

        checkpoints = checkpoint.CheckpointManager(folder, every, stopping=lambda: False)
        backend = self.backends[dtype]
        return training.train(
            backend,
            CONFIG,
            self.dataset,
            dtype,
            Silent(),
            twin,
            log_every=0,
            start=start,
            checkpoints=checkpoints,
        )

    def valid(self, folder: Path) -> None:
        (folder / checkpoint.FOLDER).mkdir()
        for name, content in self.files.items():
            (folder / checkpoint.FOLDER / name).write_bytes(content)

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        self.valid(folder)
        path = one_of(generator, sorted((folder / checkpoint.FOLDER).iterdir()))
        if generator.integers(25) == 0:
            path.unlink()
            return f"{path.name}: {odd_file(generator, path)}", False
        how, forged = other_tensors(generator, path)
        return f"{path.name}: {how}", forged

    def read(self, folder: Path, forged: bool) -> None:
        for dtype, twin in self.MEMBERS:
            stem = record.file_stem("torch", dtype, twin)
            name = next(name for name in self.files if name.startswith(stem))
            path = folder / checkpoint.FOLDER / name
            if path.is_file() and path.read_bytes() == self.files[name]:
                continue  # this one is not damaged
            found = checkpoint.found(folder, stem)
            if not found:
                continue  # the run is trained again
            again = self.trained(folder, dtype, twin, checkpoint.read(found[0]))
            again = record.read(record.write(again, folder))
            runs = {
                "torch": again,
                "flax": dataclasses.replace(self.records[dtype], backend="flax"),
            }
            if twin is not None:
                if not forged and not same_numbers(again, self.records[dtype]):
                    raise Wrong("a run resumed from a damaged checkpoint")
                continue
            lens = compared(runs, {}, self.dataset.test_labels)
            if lens["verdict"] == "agree" and not same_numbers(again, self.records[dtype]):
                raise Wrong("the verdict is agree, of other numbers")


class Plans(Kind):
    """`run.json`, from which `--resume` restarts; nothing is trained."""

    share = 12

    def prepare(self) -> None:
        from lockstep import cli as compare
        from lockstep.common import session
        from lockstep.common.runs import parallel

        def no_process(*given: object) -> None:
            raise parallel.WorkerFailed("none is started here")

        dataset = made_dataset()
        np.savez(
            "made.npz",
            x_train=dataset.train_images,
            y_train=dataset.train_labels,
            x_test=dataset.test_images,
            y_test=dataset.test_labels,
            classes=np.array(dataset.classes),
        )
        arguments = [
            "--data",
            "made.npz",
            "--steps",
            "12",
            "--batch-size",
            "4",
            "--device",
            "cpu",
            "--out",
            "begun",
        ]
        report: Any = {"verdict": "agree", "cut_short": None}
        made = session.Result(report, Path("begun"))
        session.train_and_compare = lambda *given: made
        # the second process of a long run
        mock.patch.object(parallel, "WorkerProcess", no_process).start()
        if compare.main([*arguments, "--quiet"]) != 0:
            raise RuntimeError("the valid run is refused")
        self.content = Path("begun", request.FILE).read_bytes()

    def valid(self, folder: Path) -> None:
        (folder / request.FILE).write_bytes(self.content)

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        path = folder / request.FILE
        how = one_of(generator, ["raw", "raw", "facts", "forged", "forged", "forged", "odd"])
        if how == "raw":
            content, how = damaged(generator, self.content)
            path.write_bytes(content)
            return how, False
        if how == "odd":
            return odd_file(generator, path), False
        facts = json.loads(self.content)
        if how == "facts":
            facts, how = distorted(generator, facts)
            path.write_text(text_of(facts))
            return how, False
        del facts["sha256"]
        if generator.integers(3) == 0:
            options = {
                "data": [
                    *NAMES,
                    "auto",
                    "/dev/zero",
                    "/dev/stdin",
                    "/",
                    ".",
                    "~",
                    "made.npz/x",
                    "x" * 5000,
                ],
                "weights": [*NAMES, "/dev/zero"],
                "device": ["cuda", "tpu"],
                "recipe": [*NAMES, "tutorial"],
                "digest": ["", "0" * 64],
                "checkpoint_every": INTEGERS,
                "twins": INTEGERS,
            }
            name = one_of(generator, list(options))
            facts[name], how = one_of(generator, options[name]), f"another {name}"
        else:
            facts, how = distorted(generator, facts)
        text = text_of(facts)
        with contextlib.suppress(
            ValueError, RecursionError, AttributeError, TypeError, UnicodeEncodeError
        ):
            read = json.loads(text)
            text = text[:-1] + f', "sha256": "{request._digest(read)}"}}'
        path.write_text(text)
        return f"forged, {how}", True

    def read(self, folder: Path, forged: bool) -> None:
        from lockstep import cli as compare

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = compare.main(["--resume", str(folder)])
        said = out.getvalue() + err.getvalue()
        if not said.replace("\n", "").isprintable():
            raise Wrong("what is printed may command the terminal")
        if status == 2 and err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1:
            raise RecordError(err.getvalue().removeprefix("error: ").strip())
        if status != 0:
            raise Wrong(f"status {status}: {said[:200]!a}")
        if not forged and request.read(folder) != request.read(Path("begun")):
            raise Wrong("a damaged run.json was accepted")


# --- Weights


def weights_of(path: Path) -> None:
    from lockstep.backends import weight_files

    found = weight_files.read_weights(path, SHAPES)
    if {name: array.shape for name, array in found.items()} != SHAPES:
        raise Wrong("other shapes")
    if not all(np.isfinite(array.astype(np.float64)).all() for array in found.values()):
        raise Wrong("numbers that are not finite")
    initial = {name: array.astype(np.float32) for name, array in found.items()}
    if not all(np.isfinite(array).all() for array in initial.values()):
        raise Wrong("numbers that float32 does not hold")


class TorchWeights(Kind):
    """PyTorch's state dicts."""

    share = 6

    def prepare(self) -> None:
        from lockstep.backends import weight_files

        weight_files.write_weights(
            Path("weights.pt"), initial_weights(SHAPES, 0, "float32"), "torch"
        )
        self.content = Path("weights.pt").read_bytes()

    def valid(self, folder: Path) -> None:
        (folder / "weights.pt").write_bytes(self.content)

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        path = folder / "weights.pt"
        how = one_of(
            generator, ["raw"] * 4 + ["member", "member", "pickle", "content", "content", "odd"]
        )
        if how == "odd":
            return odd_file(generator, path), False
        if how == "raw":
            content, how = damaged(generator, self.content)
        elif how == "content":
            content, how = self.other_content(generator)
        else:
            with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            name = next(name for name in members if name.endswith("data.pkl"))
            if how == "pickle":
                programs = {
                    "system": pickle.dumps(Payload(), 2),
                    "room": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x20\x85R.",
                    "getattr": b"\x80\x02cbuiltins\ngetattr\nctorch\nload\nX\x01\0\0\0a\x86R.",
                    "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
                    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
                    "text": b"\x80\x02X\xff\xff\xff\x7fx.",
                    "self": b"\x80\x02]q\0h\0a.",
                    "marks": b"(" * 100_000 + b".",
                }
                how = one_of(generator, list(programs))
                members[name] = programs[how]
            else:
                name = one_of(generator, [name, name, *sorted(members)])
                members[name], how = damaged(generator, members[name])
            content = zipped(members, one_of(generator, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
            how = f"{name}: {how}"
        path.write_bytes(content)
        return how, False

    def other_content(self, generator: Generator) -> tuple[bytes, str]:
        import torch

        state: Any = torch.load(io.BytesIO(self.content), weights_only=True)
        with _silent():  # quantised tensors are to go
            quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)
        name = one_of(generator, sorted(state))
        shape = state[name].shape
        others: dict[str, Any] = {
            "none": None,
            "number": 3,
            "text": ESCAPES,
            "nothing": torch.zeros(0),
            "expanded": torch.zeros(1).expand(shape),
            "expanded far": torch.zeros(1).expand(10**6, 10**6),
            "not finite": torch.full(shape, float("nan")),
            "too large": torch.full(shape, 1e200, dtype=torch.float64),
            "whole numbers": torch.zeros(shape, dtype=torch.int64),
            "complex": torch.zeros(shape, dtype=torch.complex64),
            "sparse": torch.zeros(shape).to_sparse(),
            "quantised": quantised,
            "half": torch.zeros(shape, dtype=torch.float16),
            "bfloat16": torch.zeros(shape, dtype=torch.bfloat16),
            "eighth": torch.zeros(shape).to(torch.float8_e4m3fn),
            "parameter": torch.nn.Parameter(torch.zeros(shape)),
            "transposed": state[name].T if state[name].ndim == 2 else state[name][None],
            "meta": torch.zeros(shape, device="meta"),
            "payload": Payload(),
        }
        how = one_of(generator, [*others, "whole", "missing", "more", "old", "model"])
        value: Any = state
        if how in others:
            state[name] = others[how]
        elif how == "missing":
            del state[name]
        elif how == "more":
            state[one_of(generator, [*NAMES, 3, (1, 2), None])] = state[name]
        elif how == "whole":
            value = one_of(
                generator, [None, [state], (state,), {"state_dict": state}, state[name], "x", 3]
            )
        elif how == "model":
            value = torch.nn.Linear(2, 2)
        stream = io.BytesIO()
        with _silent():
            torch.save(value, stream, _use_new_zipfile_serialization=how != "old")
        return stream.getvalue(), f"{how} for {name}"

    def read(self, folder: Path, forged: bool) -> None:
        weights_of(folder / "weights.pt")


class Safetensors(Kind):
    """PyTorch's and Lockstep's own layout, and Lockstep's own records."""

    share = 6

    def prepare(self) -> None:
        from safetensors.numpy import save

        from lockstep.backends import weight_files

        weights = initial_weights(SHAPES, 0, "float32")
        weight_files.write_weights(Path("torch.safetensors"), weights, "safetensors")
        self.contents = {"torch": Path("torch.safetensors").read_bytes(), "own": save(weights)}
        self.contents["record"] = ordered(
            record.write(made_record("float64", None), Path()).read_bytes()
        )

    def valid(self, folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(self.contents["torch"])

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        from safetensors.numpy import load, save

        path = folder / "weights.safetensors"
        kind = one_of(generator, list(self.contents))
        path.write_bytes(self.contents[kind])
        how = one_of(generator, ["raw", "raw", "header", "header", "arrays", "arrays", "odd"])
        if how == "odd":
            path.unlink()
            return odd_file(generator, path), False
        if kind == "record":
            how, forged = other_tensors(generator, path)
            return f"record: {how}", forged
        content = self.contents[kind]
        size = int.from_bytes(content[:8], "little")
        if how == "raw":
            content, how = damaged(generator, content)
        elif how == "header":
            header, how = distorted(generator, json.loads(content[8 : 8 + size]))
            text = text_of(header, sort_keys=False).encode()
            content = (
                one_of(generator, [len(text)] * 6 + [*INTEGERS[:-1]]).to_bytes(8, "little")
                + text
                + content[8 + size :]
            )
        else:
            arrays, how = distorted_arrays(generator, load(content))
            content = save(arrays) if arrays else b""
        path.write_bytes(content)
        return f"{kind}: {how}", False

    def read(self, folder: Path, forged: bool) -> None:
        weights_of(folder / "weights.safetensors")


class Orbax(Kind):
    """Orbax checkpoints, which are folders."""

    share = 3

    def prepare(self) -> None:
        from lockstep.backends import weight_files

        weight_files.write_weights(Path("orbax"), initial_weights(SHAPES, 0, "float32"), "orbax")
        self.paths = sorted(
            (path.relative_to("orbax") for path in Path("orbax").rglob("*") if path.is_file()),
            key=lambda path: (len(path.parts), Path("orbax", path).stat().st_size),
        )  # their names are drawn again each time

    def valid(self, folder: Path) -> None:
        shutil.copytree("orbax", folder / "weights")

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        self.valid(folder)
        place = int(generator.integers(len(self.paths)))
        path = folder / "weights" / self.paths[place]
        how = one_of(generator, ["raw"] * 5 + ["JSON", "JSON", "missing", "odd", "moved"])
        content = path.read_bytes()
        if how == "JSON" and content.startswith(b"{"):
            value, how = distorted(generator, json.loads(content))
            path.write_text(text_of(value))
        elif how == "missing":
            path.unlink()
        elif how == "odd":
            path.unlink()
            how = odd_file(generator, path)
        elif how == "moved":
            path.rename(path.with_name("other"))
        else:
            content, how = damaged(generator, content)
            path.write_bytes(content)
        return f"file {place}: {how}", False

    def read(self, folder: Path, forged: bool) -> None:
        weights_of(folder / "weights")


# --- Reports


class Reports(Kind):
    """The report of the faults, which `compare.py learn` makes a page of."""

    share = 6

    def prepare(self) -> None:
        from lockstep.backends import faults
        from lockstep.common import learn

        self.content = (ROOT / "results" / "faults" / "report.json").read_bytes()
        self.names, self.count = [fault.name for fault in faults.FAULTS], 0
        self.page, self.read_report = learn.write_read_page, learn.read_report

    def valid(self, folder: Path) -> None:
        (folder / "report.json").write_bytes(self.content)

    def make(self, generator: Generator, folder: Path) -> tuple[str, bool]:
        path = folder / "report.json"
        how = one_of(generator, ["raw", "value", "value", "value", "odd"])
        if how == "odd" and generator.integers(4) == 0:
            return odd_file(generator, path), False
        if how == "raw":
            content, how = damaged(generator, self.content)
            path.write_bytes(content)
        else:
            report = json.loads(self.content)
            rows = report["rows"]
            if generator.integers(2):
                place = int(generator.integers(len(rows)))
                rows[place], how = distorted(generator, rows[place])
            else:
                report["rows"] = rows[:3]
                report, how = distorted(generator, report)
                if isinstance(report, dict) and isinstance(report.get("rows"), list):
                    report["rows"] += rows[3:]
            path.write_text(text_of(report))
        return how, False

    def read(self, folder: Path, forged: bool) -> None:
        from lockstep.common.learn.side_by_side import _fault

        report = self.read_report(folder / "report.json")
        for row in report["rows"]:
            _fault(row, [])
        self.count += 1
        if self.count % 30 == 1:  # a page takes a second
            page = self.page(folder / "read.html", ROOT, report, self.names).read_text()
            if SCRIPT in page or not page.replace("\n", "").replace("\t", "").isprintable():
                raise Wrong("the page holds what it should not")


KINDS: dict[str, type[Kind]] = {
    "cifar10": Cifar10,
    "npz": Npz,
    "folder": Folder,
    "record": Records,
    "checkpoint": Checkpoints,
    "plan": Plans,
    "torch": TorchWeights,
    "safetensors": Safetensors,
    "orbax": Orbax,
    "report": Reports,
}
