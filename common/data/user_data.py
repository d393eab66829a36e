"""Data of the user's own: an .npz archive, or a folder of class folders with pictures."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lockstep.common.data.arrays import MAX_CLASSES, NAMES, check_labels, class_names
from lockstep.common.data.dataset import Dataset
from lockstep.common.data.parsing import PARSE_ERRORS, one_line
from lockstep.common.errors import DataError

MAX_UNPACKED = 2**29  # bytes of arrays in an archive of any size; CIFAR-10 takes 184 million
MAX_PACKED = 4  # an archive larger than that must take at least a fourth of its arrays; pictures hardly shrink
MAX_PIXELS = 50_000_000  # of one picture: at most 16 bytes each while it is decoded, so 800 MB
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "PPM",
    "WEBP",
)  # the only decoders that a file can reach, whatever its name


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive: those of NAMES, and `classes`, if it has some."""
    shown, expected = repr(str(path)), NAMES
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as on headers that Python 2 wrote
            arrays = read_members(archive, (*expected, "classes"), os.fstat(file.fileno()).st_size)
    except MemoryError:
        raise  # what it claims has been looked at, so the machine has no room for it
    except PARSE_ERRORS as error:
        raise DataError(
            f"{shown} cannot be read ({one_line(error)}): write it again with numpy.savez"
        ) from error
    if missing := [name for name in expected if name not in arrays]:
        raise DataError(
            f"{shown} has no {', '.join(missing)}: write it with numpy.savez, naming {', '.join(expected)}"
        )
    return arrays


def load_npz(path: Path) -> Dataset:
    """The pictures of an archive, and their labels."""
    shown, arrays = repr(str(path)), read_npz(path)
    images, labels = {}, {}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3):
            raise DataError(
                f"{shown}: x_{split} is {x.dtype} {x.shape}: it must be uint8 (n, 32, 32, 3)"
            )
        if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
            raise DataError(
                f"{shown}: y_{split} is {y.dtype} {y.shape}: it must hold {len(x)} integers, one per image"
            )
        if not len(x):
            raise DataError(f"{shown}: x_{split} is empty: both splits need images")
        images[split], labels[split] = x, y.reshape(-1)

    largest = max(int(y.max()) for y in labels.values())
    numbers = range(max(2, min(largest + 1, MAX_CLASSES)))
    classes = class_names(shown, arrays.get("classes")) or tuple(map(str, numbers))
    check_labels(shown, labels.values(), len(classes))
    train, test = ((images[split], labels[split].astype(np.int64)) for split in ("train", "test"))
    return Dataset(_name(path), *train, *test, classes)


def read_members(
    archive: zipfile.ZipFile, names: Sequence[str], size: int
) -> dict[str, np.ndarray]:
    """The arrays of these names that the archive has; all that they claim to take is looked at
    before any is made.

    Args:
        size: of the archive's file, in bytes.

    Raises:
        ValueError: and others of `PARSE_ERRORS`, if the archive is damaged, or claims too much.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in names and name in members:
            raise ValueError(f"it has two members {name}")
        members[name] = member
    members = {name: members[name] for name in names if name in members}
    for name, member in members.items():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is packed otherwise than numpy.savez does")
    claimed = sum(member.file_size for member in members.values())
    if claimed > max(MAX_UNPACKED, MAX_PACKED * size):
        raise ValueError(f"it claims to hold {claimed} bytes in {size}")
    return {name: _read_member(archive, name, member) for name, member in members.items()}


def _read_member(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name} is of another version of the npy format")
        try:
            shape, _, dtype = readers[version](stream)
        except MemoryError:  # says Python's parser of brackets that are nested too deeply
            raise ValueError(f"{name} has no header") from None
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are not loaded")
        if dtype.itemsize * math.prod(shape) != member.file_size - stream.tell():
            raise ValueError(f"{name} claims to be {dtype} {shape}, which is not what it holds")
    with archive.open(member) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def load_folder(path: Path, announce: Callable[[str], None]) -> Dataset:
    classes = list_dir(path, os.path.isdir)
    given = classes == ["test", "train"]
    if given:
        classes, others = (list_dir(path / split, os.path.isdir) for split in ("train", "test"))
        if differing := sorted(set(classes) ^ set(others)):
            raise DataError(
                f"{str(path)!r}: train and test need the same class folders; only one has {differing[0]!r}"
            )
    if len(classes) < 2:
        raise DataError(
            f"{str(path)!r} has {len(classes)} class folders: it needs two or more, with pictures in them"
        )
    if given:
        train, test = (
            [_pictures(path / split / name) for name in classes] for split in ("train", "test")
        )
    else:
        every = [_pictures(path / name) for name in classes]
        train = [[file for index, file in enumerate(files) if index % 5 != 4] for files in every]
        test = [files[4::5] for files in every]
        if not any(test):
            remedy = "add pictures, or sort them into train and test folders"
            raise DataError(
                f"{str(path)!r} has no class of five pictures, so none to test on: {remedy}"
            )
        announce(
            f"{str(path)!r} has no train and test folders: every fifth picture of each class is for testing "
            f"({sum(map(len, train))} training, {sum(map(len, test))} test pictures)"
        )
    return Dataset(_name(path), *_read_pictures(train), *_read_pictures(test), tuple(classes))


def list_dir(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if wanted(folder / name))
    except OSError as error:
        remedy = "check that it is a folder you may read"
        raise DataError(
            f"{str(folder)!r} cannot be listed ({one_line(error)}): {remedy}"
        ) from error


def _pictures(folder: Path) -> list[Path]:
    names = [
        name for name in list_dir(folder, os.path.isfile) if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not names:
        raise DataError(
            f"class folder {str(folder)!r} has no pictures ({' '.join(IMAGE_SUFFIXES)}): add some"
        )
    return [folder / name for name in names]


def _read_pictures(files: list[list[Path]]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the files of each class."""
    images = np.stack([_read_picture(file) for of_class in files for file in of_class])
    return images, np.repeat(
        np.arange(len(files), dtype=np.int64), [len(of_class) for of_class in files]
    )


def _read_picture(file: Path) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # such as on palettes with transparency, of which RGB knows nothing
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
                    )
                return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    except (*PARSE_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"picture {str(file)!r} cannot be read ({one_line(error)}): replace or remove it"
        ) from error


def _name(path: Path) -> str:
    return os.path.basename(os.path.abspath(path)) or str(path)
