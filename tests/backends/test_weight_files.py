"""Weights go out and come back bit for bit, other programs give the same logits, and a file is
checked before use."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import safetensors.torch
import tensorstore
import torch
from flax import nnx

from lockstep import cli as compare
from lockstep.backends import weight_files
from lockstep.backends.flax_backend import convert as flax_convert
from lockstep.backends.flax_backend.backend import FlaxBackend
from lockstep.backends.flax_backend.models.net import Net as FlaxNet
from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend import weight_files as torch_files
from lockstep.backends.torch_backend.backend import TorchBackend
from lockstep.backends.torch_backend.models.net import Net as TorchNet
from lockstep.common import data
from lockstep.common.config import BACKENDS, DTYPES, FORMATS, Config
from lockstep.common.data import Dataset
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import DataError, RecordError
from lockstep.common.model.initial_weights import digest, initial_weights
from lockstep.common.model.weight_files import FLOATS, MIN_LIMIT
from lockstep.common.protocol import Arrays, Snapshot
from lockstep.common.runs import checkpoint, record, training
from lockstep.common.runs.checkpoint import Checkpoint, CheckpointManager
from lockstep.common.verdict import locate
from tests.backends.test_convert import SHAPES, same_bits
from tests.conftest import SilentObserver
from tests.verdict.helpers import diverging

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = ["--data", "digits", "--steps", "3", "--batch-size", "4", "--quiet"]
forms = pytest.mark.parametrize("form", FORMATS)


def arrays(dtype: str = "float64", seed: int = 0) -> Arrays:
    return initial_weights(SHAPES, seed, dtype)


def lockstep(*arguments: str | Path) -> int:
    try:
        return compare.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        assert isinstance(error.code, int)
        return error.code


@functools.cache
def trained() -> record.Record:
    """A run of one step."""
    digits = data.load("digits")
    config = Config(steps=1).resolve(len(digits.train_images))
    return training.train(
        TorchBackend(config, 10, "float64", "cpu"), config, digits, "float64", SilentObserver()
    )


def write_record(folder: Path, backend: str, dtype: str, final: Arrays) -> Path:
    """A run's record, with these weights at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    ends: Any = {"weights": arrays(dtype, seed=9), "final": final, "parameter_history": {}}
    return record.write(
        dataclasses.replace(trained(), backend=backend, dtype=dtype, **ends), folder
    )


def exported(folder: Path, form: str, final: Arrays, dtype: str) -> Path:
    """What `compare.py export` makes of a run that ended with these weights."""
    write_record(folder, "torch", dtype, final)
    assert lockstep("export", folder, "--to", form, "--dtype", dtype) == 0
    return (
        folder
        / {
            "torch": f"torch-{dtype}.pt",
            "safetensors": f"torch-{dtype}-weights.safetensors",
            "orbax": f"torch-{dtype}-orbax",
        }[form]
    )


# --- Out and in again


@forms
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_exported_comes_back_bit_for_bit(form: str, dtype: str, tmp_path: Path) -> None:
    path = exported(tmp_path, form, arrays(dtype), dtype)
    assert same_bits(weight_files.read_weights(path, SHAPES), arrays(dtype))
    assert not same_bits(
        weight_files.read_weights(path, SHAPES), arrays(dtype, seed=1)
    )  # the control
    leftovers = {found.name for found in tmp_path.iterdir()} - {
        path.name,
        f"torch-{dtype}.safetensors",
    }
    assert not leftovers


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_floating_point_dtype_is_read_as_it_is(dtype: str, tmp_path: Path) -> None:
    given = {name: array.astype(numpy_dtype(dtype)) for name, array in arrays().items()}
    for form, name in (("torch", "a.pt"), ("safetensors", "a.safetensors"), ("orbax", "a")):
        weight_files.write_weights(tmp_path / name, given, form)
        assert same_bits(weight_files.read_weights(tmp_path / name, SHAPES), given)


def test_the_digest_tells_numbers_names_and_shapes_apart_but_not_dtypes() -> None:
    small = arrays("bfloat16")
    assert digest(small) == digest(
        {name: a.astype(np.float64) for name, a in reversed(small.items())}
    )
    others = [
        arrays("bfloat16", seed=1),
        small | {"fc3.bias": -small["fc3.bias"]},
        {name.replace("fc3", "fc4"): a for name, a in small.items()},
        small | {"fc3.bias": small["fc3.bias"].reshape(2, 5)},
    ]
    assert len({digest(each) for each in [small, *others]}) == 5


def test_the_best_record_of_a_run_is_exported_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(*options: str) -> str:
        assert (
            lockstep("export", "--to", "torch", tmp_path, *options, "--out", tmp_path / "a.pt") == 0
        )
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{tmp_path / 'a.pt'}: the trained weights of ")
        assert f"load_state_dict(torch.load('{tmp_path / 'a.pt'}', weights_only=True))" in line
        return line.split(" of ")[1].split(";")[0]

    write_record(tmp_path, "flax", "float64", arrays())
    assert taken() == "flax-float64.safetensors"
    write_record(tmp_path, "torch", "bfloat16", arrays("bfloat16"))
    assert taken() == "torch-bfloat16.safetensors"
    write_record(tmp_path, "torch", "float32", arrays("float32"))
    assert taken() == "torch-float32.safetensors"
    assert taken("--backend", "flax") == "flax-float64.safetensors"
    assert taken("--dtype", "bfloat16") == "torch-bfloat16.safetensors"


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_file_is_replaced_by_a_later_export(form: str, tmp_path: Path) -> None:
    exported(tmp_path, form, arrays(), "float64")
    path = exported(tmp_path, form, arrays(seed=1), "float64")
    assert same_bits(weight_files.read_weights(path, SHAPES), arrays(seed=1))


def test_an_orbax_folder_is_not_replaced_and_what_was_in_it_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(tmp_path, "orbax", arrays(), "float64")
    write_record(tmp_path, "torch", "float64", arrays(seed=1))
    assert lockstep("export", tmp_path, "--to", "orbax") == 2
    said = f"error: {path} is there already: remove it, or choose another folder with --out\n"
    assert capsys.readouterr().err == said
    assert same_bits(weight_files.read_weights(path, SHAPES), arrays())


def test_an_orbax_folder_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, folder: Path, tree: Any) -> None:
        folder.mkdir()
        (folder / "half").write_text("half")
        raise ValueError("no space left")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", broken)
    with pytest.raises(RecordError, match="cannot write"):
        weight_files.write_weights(tmp_path / "a", arrays(), "orbax")
    assert not list(tmp_path.iterdir())


# --- Programs that know nothing of this project

IMAGES = np.random.default_rng(0).standard_normal((8, 32, 32, 3))
# Of logits up to 0.17: measured gap 9.7e-17; the axes of a kernel changed 0.035, the flatten's
# order not undone 0.065
LOGITS_BOUND, LOGITS_FAULT = 1e-14, 1e-3

PLAIN_TORCH = """
import sys
import numpy as np, safetensors.torch, torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)

images = torch.from_numpy(np.load("images.npy")).permute(0, 3, 1, 2)
for path in sys.argv[1:]:
    model = Net().double()
    if path.endswith(".safetensors"):
        safetensors.torch.load_model(model, path)
    else:
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        np.save(path + ".npy", model(images).numpy())
assert not {"lockstep", "backends", "common", "compare", "jax"} & set(sys.modules)
"""

PLAIN_FLAX = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from flax import nnx
jax.config.update("jax_enable_x64", True)

class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(5 * 5 * 16, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)

images = np.load("images.npy")
graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
for path in sys.argv[1:]:
    restored = ocp.StandardCheckpointer().restore(path)
    updated = Net(nnx.Rngs(0))
    nnx.update(updated, restored)
    logits = [np.asarray(model(images)) for model in (updated, nnx.merge(graph, restored))]
    assert np.array_equal(*logits)
    np.save(path + ".npy", logits[0])
assert not {"lockstep", "backends", "common", "compare", "torch"} & set(sys.modules)
"""


def logits_of(backend: Any, weights: Arrays) -> np.ndarray:
    state = backend.init(
        Snapshot.start({name: array.astype(np.float64) for name, array in weights.items()})
    )
    return backend.probe(state, IMAGES, np.zeros(len(IMAGES), np.int64))["forward/logits"]


def elsewhere(program: str, folder: Path, paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """The logits that a program computes from files of weights, run where the project is not."""
    np.save(folder / "images.npy", IMAGES)
    command = [sys.executable, "-I", "-W", "error", "-c", program, *map(str, paths.values())]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return {name: np.load(f"{path}.npy") for name, path in paths.items()}


def gap(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def test_plain_pytorch_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {
        f"{form} {dtype}": exported(tmp_path, form, arrays(dtype), dtype)
        for form in ("torch", "safetensors")
        for dtype in DTYPES
    }
    crossed = arrays() | {"conv1.kernel": arrays()["conv1.kernel"].transpose(1, 0, 2, 3)}
    weight_files.write_weights(tmp_path / "crossed.pt", crossed, "torch")
    monkeypatch.setattr(convert, "flattened", lambda model: {})
    weight_files.write_weights(tmp_path / "unrolled.pt", arrays(), "torch")
    monkeypatch.undo()
    controls = {name: tmp_path / f"{name}.pt" for name in ("crossed", "unrolled")}
    found = elsewhere(PLAIN_TORCH, tmp_path, paths | controls)
    backend = TorchBackend(Config(), 10, "float64", "cpu")
    for name in paths:
        assert gap(found[name], logits_of(backend, arrays(name.split()[1]))) <= LOGITS_BOUND, name
    for name in controls:
        assert gap(found[name], logits_of(backend, arrays())) > LOGITS_FAULT, name


@pytest.mark.slow
def test_plain_flax_gives_the_same_logits(tmp_path: Path) -> None:
    paths = {dtype: exported(tmp_path, "orbax", arrays(dtype), dtype) for dtype in DTYPES}
    rows = arrays()["fc1.kernel"].reshape(5, 5, 16, 120).transpose(2, 0, 1, 3).reshape(400, 120)
    crossed = arrays()["conv1.kernel"].transpose(1, 0, 2, 3)
    controls = {}
    for name, wrong in {
        "unrolled": {"fc1.kernel": rows},
        "crossed": {"conv1.kernel": crossed},
    }.items():
        controls[name] = tmp_path / name
        weight_files.write_weights(controls[name], arrays() | wrong, "orbax")
    found = elsewhere(PLAIN_FLAX, tmp_path, paths | controls)
    backend = FlaxBackend(Config(), 10, "float64", "cpu")
    for dtype in DTYPES:
        assert gap(found[dtype], logits_of(backend, arrays(dtype))) <= LOGITS_BOUND, dtype
    for name in controls:
        assert gap(found[name], logits_of(backend, arrays())) > LOGITS_FAULT, name


# --- Files that others have written


def torch_net() -> TorchNet:
    """Other weights, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TorchNet(10)


def flax_state() -> Any:
    return nnx.state(FlaxNet(10, "cpu", rngs=nnx.Rngs(0)), nnx.Param)


def of_torch(model: TorchNet) -> Arrays:
    return convert.to_canonical(model, dict(model.named_parameters()))


def of_flax(state: Any) -> Arrays:
    return {name: np.asarray(array) for name, array in flax_convert.flatten(state).items()}


TORCH_SAVES: dict[str, Callable[[TorchNet, Path], None]] = {
    "state_dict.pt": lambda net, path: torch.save(net.state_dict(), path),
    "parameters.pth": lambda net, path: torch.save(dict(net.named_parameters()), path),
    "pytorch_model.bin": lambda net, path: torch.save(net.state_dict(), path),
    "CAPITALS.PT": lambda net, path: torch.save(net.state_dict(), path),
    "channels_last.pt": lambda net, path: torch.save(
        net.to(memory_format=torch.channels_last).state_dict(), path
    ),
    "save_model.safetensors": lambda net, path: safetensors.torch.save_model(net, str(path)),
    "save_file.safetensors": lambda net, path: safetensors.torch.save_file(net.state_dict(), path),
}


@pytest.mark.parametrize("name", TORCH_SAVES)
def test_what_pytorch_saves_is_read(name: str, tmp_path: Path) -> None:
    net = torch_net()
    TORCH_SAVES[name](net, tmp_path / name)
    assert same_bits(weight_files.read_weights(tmp_path / name, SHAPES), of_torch(net))


def save_steps(state: Any, path: Path) -> None:
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(nnx.to_pure_dict(state)))
        manager.wait_until_finished()


def save_standard(state: Any, path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def save_tree(state: Any, path: Path, **options: bool) -> None:
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(state))


FLAX_SAVES: dict[str, Callable[[Any, Path], Any]] = {
    "a state": save_standard,
    "a pure dictionary": lambda state, path: save_standard(nnx.to_pure_dict(state), path),
    "a tree": lambda state, path: save_tree(state, path),
    "a tree in single files": lambda state, path: save_tree(state, path, use_ocdbt=False),
    "a tree in zarr3": lambda state, path: save_tree(state, path, use_zarr3=True),
    "a manager's only step": save_steps,
    "flax.safetensors": lambda state, path: safetensors.numpy.save_file(of_flax(state), path),
}


@pytest.mark.parametrize("name", FLAX_SAVES)
def test_what_flax_saves_is_read(name: str, tmp_path: Path) -> None:
    state = flax_state()
    FLAX_SAVES[name](state, tmp_path / name)
    assert same_bits(weight_files.read_weights(tmp_path / name, SHAPES), of_flax(state))


def test_names_alone_decide_the_layout(tmp_path: Path) -> None:
    """A square kernel fits either layout."""
    square = {"conv.kernel": (5, 5, 5, 5), "conv.bias": (5,)}
    kernel = np.random.default_rng(0).standard_normal((5, 5, 5, 5))
    bias = np.zeros(5)
    safetensors.numpy.save_file(
        {"conv.kernel": kernel, "conv.bias": bias}, tmp_path / "a.safetensors"
    )
    assert np.array_equal(
        weight_files.read_weights(tmp_path / "a.safetensors", square)["conv.kernel"], kernel
    )
    given = {"fc2.weight": np.arange(84.0 * 84).reshape(84, 84), "fc2.bias": np.zeros(84)}
    square = {"fc2.kernel": (84, 84), "fc2.bias": (84,)}
    safetensors.numpy.save_file(given, tmp_path / "b.safetensors")
    assert np.array_equal(
        weight_files.read_weights(tmp_path / "b.safetensors", square)["fc2.kernel"],
        given["fc2.weight"].T,
    )


def test_a_record_and_a_checkpoint_give_their_last_weights(
    tmp_path: Path, digits: Dataset, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(steps=4, batch_size=4, lr=0.1).resolve(len(digits.train_images))
    checkpoints = CheckpointManager(tmp_path, every=2)
    kept: list[Checkpoint] = []
    monkeypatch.setattr(checkpoints, "save", kept.append)
    backend = build("torch", config)
    found = training.train(
        backend, config, digits, "float64", SilentObserver(), checkpoints=checkpoints
    )
    path = checkpoint.write(kept[-1], tmp_path)
    moved = path.rename(tmp_path / "of any name.safetensors")
    assert same_bits(weight_files.read_weights(moved, SHAPES), kept[-1].snapshot.parameters)
    assert same_bits(weight_files.read_weights(record.write(found, tmp_path), SHAPES), found.final)
    assert not same_bits(found.final, found.weights)
    assert not same_bits(found.final, kept[-1].snapshot.parameters)


# --- Files that are refused


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def zipped(path: Path, pickled: bytes, **entries: bytes) -> None:
    """An archive as `torch.save` makes it, round another pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, content in entries.items():
            archive.writestr(f"archive/data/{name}", content)


def taking(memory: int) -> bytes:
    """A pickle of protocol 2 that asks for so many bytes, in words that `weights_only` allows."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ"
        + memory.to_bytes(4, "little")
        + b"\x85Rs."
    )


def hungry(path: Path) -> None:
    zipped(path, taking(2 * 10**9))


def without_numbers(path: Path) -> None:
    """A state dict whose storages are shorter than it says."""
    whole = io.BytesIO()
    torch.save(changed(), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            archive.writestr(
                name, source.read(name)[:16] if "/data/" in name else source.read(name)
            )


def long_header(path: Path) -> None:
    entries = {
        f"{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for number in range(200_000)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def changed(**others: Any) -> dict[str, Any]:
    """A state dict of the network with some tensors changed; None: left out."""
    tensors: dict[str, Any] = torch_files.to_native(arrays()) | {
        name.replace("__", "."): t for name, t in others.items()
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_value(value: float) -> Any:
    bias = torch.zeros(84, dtype=torch.float64)
    bias[3] = value
    return bias


def orbax(path: Path, **others: Any) -> None:
    weight_files.write_weights(
        path, arrays() | {name.replace("__", "."): array for name, array in others.items()}, "orbax"
    )


def orbax_without(path: Path, name: str) -> None:
    orbax(path)
    (path / name).unlink()


def orbax_cut(path: Path) -> None:
    orbax(path)
    for found in path.rglob("d/*"):
        found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])


def orbax_in_large_pieces(path: Path) -> None:
    """Metadata that ask for 80 GB to read ten numbers."""
    orbax(path)
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    described = json.loads(store.read("fc3.bias/.zarray").result().value)
    store.write("fc3.bias/.zarray", json.dumps(described | {"chunks": [10**10]}).encode()).result()


def orbax_of_two_steps(path: Path) -> None:
    orbax(path / "1")
    orbax(path / "2")


def orbax_with_a_pipe(path: Path) -> None:
    orbax(path)
    os.mkfifo(path / "d" / "pipe")


def crowd(path: Path) -> None:
    path.mkdir()
    for number in range(1001):
        (path / f"{number}").touch()


def damaged_record(path: Path) -> None:
    write_record(path.parent, "torch", "float64", arrays()).rename(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def old_format(path: Path) -> None:
    torch.save(changed(), path, _use_new_zipfile_serialization=False)


def truncated(write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:-1000])

    return cut


def sparse(size: int) -> Callable[[Path], None]:
    """A file that is large, and takes no room."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return write


def torch_saved(entries: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save(entries() if callable(entries) else entries, path)


def numpy_saved(**others: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        given = arrays() | {name.replace("__", "."): array for name, array in others.items()}
        safetensors.numpy.save_file({name: a for name, a in given.items() if a is not None}, path)

    return write


NO_STATE_DICT = "is no PyTorch state dict"
DAMAGED = "is damaged, or no"
OTHERS = "does not hold this network's parameters"
REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    # what it is: its name, how it is written, what is said
    "nothing": ("a.pt", lambda path: None, "there is no "),
    "nothing safe": ("a.safetensors", lambda path: None, "there is no "),
    "nothing without an ending": ("a", lambda path: None, "there is no "),
    "another kind": (
        "a.npz",
        lambda path: path.write_bytes(b""),
        "does not say what it is: let it end in .pt, .pth",
    ),
    "a pipe": ("a.pt", os.mkfifo, "is no file (a pipe or a device)"),
    "a safe pipe": ("a.safetensors", os.mkfifo, "is no file (a pipe or a device)"),
    "a link to itself": ("a.pt", lambda path: path.symlink_to(path), "cannot be read"),
    "a folder of many files": (
        "a",
        crowd,
        "holds more than 1000 files: give the folder of the checkpoint alone",
    ),
    "an empty folder": ("a.pt", Path.mkdir, "is no Orbax checkpoint (none in it)"),
    # damage
    "an empty state dict": ("a.pt", lambda path: path.write_bytes(b""), DAMAGED),
    "noise": (
        "a.pt",
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(10_000)),
        DAMAGED,
    ),
    "a cut state dict": ("a.pt", truncated(torch_saved(changed)), DAMAGED),
    "an empty safetensors file": ("a.safetensors", lambda path: path.write_bytes(b""), DAMAGED),
    "a cut safetensors file": ("a.safetensors", truncated(numpy_saved()), DAMAGED),
    "a damaged record": ("a.safetensors", damaged_record, "is damaged (its digest does not match)"),
    "a cut checkpoint": ("a", orbax_cut, DAMAGED),
    "a checkpoint without a manifest": (
        "a",
        lambda path: orbax_without(path, "manifest.ocdbt"),
        DAMAGED,
    ),
    "a checkpoint without metadata": (
        "a",
        lambda path: orbax_without(path, "_METADATA"),
        "(none in it)",
    ),
    "two checkpoints": (
        "a",
        orbax_of_two_steps,
        "is no Orbax checkpoint (1, 2): give the folder that has a file",
    ),
    "a checkpoint of nonsense": (
        "a",
        lambda path: (path.mkdir(), (path / "_METADATA").write_text("[")),
        DAMAGED,
    ),
    # hostility
    "a pickle that runs code": (
        "a.pt",
        torch_saved(Evil),
        f"{NO_STATE_DICT}, for it makes posix system",
    ),
    "a bare pickle": ("a.pt", lambda path: path.write_bytes(pickle.dumps(Evil())), DAMAGED),
    "a pickle that takes memory": ("a.pt", hungry, "for it makes builtins bytearray"),
    "a bomb": (
        "a.pt",
        lambda path: zipped(path, b"", bomb=bytes(10**8)),
        "is too large for this network's weights",
    ),
    "numbers that are not there": ("a.pt", without_numbers, DAMAGED),
    "a huge state dict": (
        "a.pt",
        sparse(10**11),
        "is too large for this network's weights (100,000,000,000 bytes",
    ),
    "a huge safetensors file": (
        "a.safetensors",
        sparse(10**11),
        "is too large for this network's weights",
    ),
    "a huge header": (
        "a.safetensors",
        lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
        "a header of 18,446,744,",
    ),
    "a long header": ("a.safetensors", long_header, "a header of 1"),
    "large pieces": (
        "a",
        orbax_in_large_pieces,
        "(fc3.bias is (10,), in pieces of (10000000000,))",
    ),
    "a pipe in a checkpoint": ("a", orbax_with_a_pipe, "is no file (a pipe or a device)"),
    # things that people save
    "a whole network": (
        "a.pt",
        torch_saved(torch_net),
        "for it makes __builtin__ set, lockstep.backends.torch_backend.",
    ),
    "a list": (
        "a.pt",
        torch_saved([torch.zeros(3)]),
        "(the whole is list): save it with torch.save(model",
    ),
    "a training state": (
        "a.pt",
        torch_saved({"epoch": 3, "model": {}}),
        "(epoch is int, model is dict)",
    ),
    "the old format": ("a.pt", old_format, DAMAGED),
    # other networks, other numbers
    "a missing tensor": (
        "a.pt",
        torch_saved(lambda: changed(fc3__bias=None)),
        f"{OTHERS} (missing: fc3.bias): name",
    ),
    "another tensor": (
        "a.pt",
        torch_saved(lambda: {f"module.{name}": tensor for name, tensor in changed().items()}),
        f"{OTHERS} (missing: conv1.weight, conv1.bias, conv2.weight, conv2.bias, and 6 more; not of this network: "
        "module.conv1.weight, module.conv1.bias, module.conv2.weight, module.conv2.bias, and 6 more)",
    ),
    "other classes": (
        "a.pt",
        lambda path: torch.save(TorchNet(7).state_dict(), path),
        "has other shapes than this network (fc3.weight (7, 84) for (10, 84); fc3.bias (7,) for (10,)): name",
    ),
    "whole numbers": (
        "a.pt",
        torch_saved(lambda: changed(fc2__bias=torch.zeros(84).int())),
        "(fc2.bias int32)",
    ),
    "eight bits": (
        "a.pt",
        torch_saved(lambda: changed(fc2__bias=torch.zeros(84, dtype=torch.float8_e5m2))),
        "e5m2",
    ),
    "nan": (
        "a.pt",
        torch_saved(lambda: changed(fc2__bias=with_value(np.nan))),
        "or beyond 1e+30 (fc2.bias: 1 of",
    ),
    "infinity": (
        "a.pt",
        torch_saved(lambda: changed(fc2__bias=with_value(-np.inf))),
        "(fc2.bias: 1 of 84)",
    ),
    "large numbers": (
        "a.pt",
        torch_saved(lambda: changed(fc2__bias=with_value(1e300))),
        "(fc2.bias: 1 of 84)",
    ),
    "safe: missing": (
        "a.safetensors",
        numpy_saved(fc3__bias=None),
        f"{OTHERS} (missing: fc3.bias): name",
    ),
    "safe: extra": (
        "a.safetensors",
        numpy_saved(fc4__bias=np.zeros(3)),
        f"{OTHERS} (not of this network: fc4.bias)",
    ),
    "safe: mixed names": (
        "a.safetensors",
        numpy_saved(conv1__weight=np.zeros(3)),
        f"{OTHERS} (missing: conv2.weight",
    ),
    "safe: shapes": (
        "a.safetensors",
        numpy_saved(fc3__bias=np.zeros(3)),
        "(fc3.bias (3,) for (10,)): name",
    ),
    "safe: whole numbers": (
        "a.safetensors",
        numpy_saved(fc3__bias=np.zeros(10, np.int64)),
        "(fc3.bias I64): convert",
    ),
    "safe: nan": (
        "a.safetensors",
        numpy_saved(fc3__bias=np.full(10, np.nan)),
        "(fc3.bias: 10 of 10): take",
    ),
    "orbax: extra": (
        "a",
        lambda path: orbax(path, fc4__bias=np.zeros(3)),
        "(not of this network: fc4.bias)",
    ),
    "orbax: shapes": (
        "a",
        lambda path: orbax(path, fc3__bias=np.zeros(3)),
        "(fc3.bias (3,) for (10,)): name",
    ),
    "orbax: whole numbers": (
        "a",
        lambda path: orbax(path, fc3__bias=np.zeros(10, int)),
        "(fc3.bias int64): convert",
    ),
    "orbax: nan": (
        "a",
        lambda path: orbax(path, fc3__bias=np.full(10, np.nan)),
        "(fc3.bias: 10 of 10): take",
    ),
}


def peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line_and_takes_no_memory(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, write, said = REFUSED[case]
    write(tmp_path / name)
    capfd.readouterr()
    before = peak()
    assert lockstep(*SHORT, "--weights", tmp_path / name, "--out", tmp_path / "out") == 2
    assert peak() - before < 2**28
    out, error = capfd.readouterr()
    assert out == ""
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error, error
    assert ": " in error.removeprefix("error: "), "there is a remedy"
    assert len(error) < 600
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_what_is_refused_would_be_taken_if_nothing_looked(tmp_path: Path) -> None:
    """The control of the test above: why `torch.load` alone is not enough."""
    zipped(tmp_path / "a.pt", taking(1000))
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": bytearray(1000)}
    zipped(tmp_path / "b.pt", pickle.dumps({}, 2), bomb=bytes(MIN_LIMIT))
    assert (tmp_path / "b.pt").stat().st_size < MIN_LIMIT / 100
    with pytest.raises(DataError, match=r"\(missing: "):  # as large as it may be
        weight_files.read_weights(tmp_path / "b.pt", SHAPES)


def test_a_hostile_name_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(changed() | {"\x1b[2J\n" * 100: torch.zeros(3)}, tmp_path / "a.pt")
    assert lockstep(*SHORT, "--weights", tmp_path / "a.pt") == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "\x1b" not in error and "\\x1b[2J" in error and len(error) < 500
    )


EXPORTS_REFUSED: dict[str, tuple[list[str], str]] = {
    "no run": (["export", "--to", "torch"], "export needs a run's folder and a format"),
    "no format": (["export", "RUN"], "export needs a run's folder and a format"),
    "no such format": (["export", "RUN", "--to", "onnx"], "argument --to: 'onnx' is unknown"),
    "two runs": (["export", "RUN", "RUN", "--to", "torch"], "export takes no "),
    "no record": (
        ["export", "RUN/empty", "--to", "torch"],
        "holds no record of a finished run (torch-float64.",
    ),
    "no such record": (
        ["export", "RUN", "--to", "torch", "--dtype", "float32"],
        "(torch-float32.safetensors or",
    ),
    "no such backend's": (
        ["export", "RUN", "--to", "torch", "--backend", "flax"],
        "(flax-float64.safetensors or",
    ),
    "another option": (
        ["export", "RUN", "--to", "torch", "--lr", "0.1"],
        "export takes no --lr (run, locate do)",
    ),
    "data": (
        ["export", "RUN", "--to", "torch", "--data", "digits"],
        "export takes no --data (run, locate,",
    ),
    "another ending": (
        ["export", "RUN", "--to", "torch", "--out", "RUN/a"],
        "must end in .pt or .pth or .bin",
    ),
    "the record itself": (
        ["export", "RUN", "--to", "safetensors", "--out", "RECORD"],
        "is the record itself",
    ),
    "a file as a folder": (
        ["export", "RUN", "--to", "torch", "--out", "RECORD/a.pt"],
        "cannot write",
    ),
    "the same for orbax": (["export", "RUN", "--to", "orbax", "--out", "RECORD/a"], "cannot write"),
    "another command": (["faults", "RUN"], "faults takes no '"),
    "a run": (["run", "RUN"], "run takes no '"),
    "a format for a run": (["--to", "torch"], "run takes no --to (export does)"),
    "weights for a study": (
        ["grid", "--weights", "a.pt"],
        "grid takes no --weights (run, locate do)",
    ),
    "weights for an export": (
        ["export", "RUN", "--to", "torch", "--weights", "a.pt"],
        "export takes no --weights",
    ),
}


@pytest.mark.parametrize("case", EXPORTS_REFUSED)
def test_an_export_that_cannot_be_made_is_refused_in_one_line(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_record(tmp_path, "torch", "float64", arrays())
    (tmp_path / "empty").mkdir()
    before = path.read_bytes()
    given, said = EXPORTS_REFUSED[case]
    words = [word.replace("RUN", str(tmp_path)).replace("RECORD", str(path)) for word in given]
    assert lockstep(*words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error, error
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_record_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged_record(tmp_path / "torch-float64.safetensors")
    assert lockstep("export", tmp_path, "--to", "torch") == 2
    assert "is damaged (its digest does not match)" in capsys.readouterr().err
    assert not (tmp_path / "torch-float64.pt").exists()


# --- Runs that start from a file


@pytest.mark.slow
def test_both_backends_start_from_the_file_and_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(tmp_path, "safetensors", arrays("float32", seed=5), "float32")
    out = tmp_path / "out"
    assert lockstep(*SHORT, "--dtype", "float64", "--weights", path, "--out", out) == 0
    given = {
        name: array.astype(np.float64) for name, array in arrays("float32", seed=5).items()
    }  # exact
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] == "agree" and report["config"]["weights"] == digest(given)
    for name in BACKENDS:
        found = record.read(out / f"{name}-float64.safetensors")
        assert same_bits(found.weights, given)
        assert not same_bits(found.final, given)
        assert found.config["weights"] == digest(given)
    # It goes on with the same weights only.
    resume = ["--resume", out, "--quiet"]
    assert lockstep(*resume) == 0
    before = path.rename(tmp_path / "before")
    assert lockstep(*resume) == 2
    assert f"there is no {path}" in capsys.readouterr().err
    weight_files.write_weights(path, arrays("float32", seed=6), "safetensors")
    assert lockstep(*resume) == 2
    assert f"{path} holds other weights than {out} started from" in capsys.readouterr().err
    before.replace(path)
    # The control: from other weights, or none, the records are not compared.
    other = exported(tmp_path / "other", "torch", arrays(seed=6), "float64")
    for options in ([], ["--weights", other]):
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        shutil.copytree(out, tmp_path / "one")
        command = [
            *SHORT,
            "--dtype",
            "float64",
            "--backend",
            "torch",
            "--out",
            tmp_path / "one",
            *options,
        ]
        assert lockstep(*(word for word in command if word != "--quiet")) == 0
        assert "Not compared: " in capsys.readouterr().out


def test_each_lens_rounds_the_weights_and_its_twins_start_next_to_them(tmp_path: Path) -> None:
    path = exported(tmp_path, "torch", arrays(), "float64")
    options = [
        "--backend",
        "torch",
        "--dtype",
        "float32",
        "--twins",
        "1",
        "--weights",
        path,
        "--out",
        tmp_path,
    ]
    assert lockstep(*SHORT, *options) == 0
    run, twin = (
        record.read(tmp_path / f"torch-float32{end}.safetensors").weights for end in ("", "-twin1")
    )
    assert same_bits(run, {name: array.astype(np.float32) for name, array in arrays().items()})
    moves = [
        np.unique(twin[n].view(np.int32).astype(int) - run[n].view(np.int32)).tolist() for n in run
    ]
    assert set().union(*moves) == {-1, 0, 1}


def test_runs_from_other_weights_have_other_folders() -> None:
    config = Config(steps=3).resolve(100)
    one, other = (
        Config(steps=3, weights=digest(arrays(seed=seed))).resolve(100) for seed in (0, 1)
    )
    assert len({each.fingerprint("data") for each in (config, one, other)}) == 3
    assert "weights" not in config.to_json()
    assert Config.from_json(one.to_json()) == one and Config.from_json(config.to_json()) == config


def test_a_step_is_replayed_from_the_files_weights(
    digits: Dataset, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(steps=9, batch_size=4).resolve(len(digits.train_images))
    seen: list[Arrays] = []

    def watched(
        backend: Any, config: Any, dataset: Any, dtype: str, snapshot: Snapshot, *rest: Any
    ) -> Any:
        seen.append(snapshot.parameters)
        raise KeyboardInterrupt

    monkeypatch.setattr(locate, "one_step", watched)
    runs: Any = {
        name: SimpleNamespace(dtype="float64", first_steps={}, loss=np.zeros(9))
        for name in BACKENDS
    }
    for weights in (arrays("float32", seed=5), None):
        with pytest.raises(KeyboardInterrupt):
            locate.locate(
                diverging(5, "loss", "loss"),
                runs,
                config,
                digits,
                lambda name: build(name, config),
                weights=weights,
            )
    assert same_bits(
        seen[0], {name: a.astype(np.float64) for name, a in arrays("float32", seed=5).items()}
    )
    assert same_bits(seen[1], arrays(seed=config.seed))
