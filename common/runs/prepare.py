"""Choose the device, load the initial weights, and check the folder, before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lockstep.common.backends import BackendPackage
from lockstep.common.config import BACKENDS, FRAMEWORKS, Config
from lockstep.common.data import Dataset
from lockstep.common.errors import ConfigError, DataError
from lockstep.common.model import checks, initial_weights
from lockstep.common.protocol import Arrays
from lockstep.common.request import Request
from lockstep.common.runs import parallel
from lockstep.common.runs.parallel import ModelInfo, TrainingWorker
from lockstep.common.system.storage import check_writable

CHECKPOINT_EVERY, LONG_RUN = 1_000, 5_000  # steps between checkpoints, in runs of so many or more


def choose_device(
    backends: BackendPackage,
    config: Config,
    dataset: Dataset,
    names: Sequence[str],
    log: Callable[[str], None],
    device: str,
    worker: TrainingWorker | None = None,
) -> str:
    """The device for all of `names`: "auto" means the GPU only if each of them finds it.

    Args:
        log: called with a line if only one of them finds it.
        worker: builds its backend at the same time.

    Raises:
        ConfigError: if the two networks do not have the same tensors.
        BackendError: if a framework or the device is not there.
    """
    build = functools.partial(backends.build, config, dataset.task, device, "off")
    pending = {
        name: worker.model_info(build, name)
        if worker is not None and name == parallel.WORKER_BACKEND
        else functools.partial(parallel.describe_model, build, name)
        for name in names
    }
    own = [name for name in names if name != parallel.WORKER_BACKEND]
    # This process builds its own before it waits for the worker.
    found = {name: pending[name]() for name in sorted(names, key=lambda name: name not in own)}
    return common_device({name: found[name] for name in names}, log)


def common_device(found: Mapping[str, ModelInfo], log: Callable[[str], None]) -> str:
    """The device for all backends, as `choose_device` has it, once they are built.

    Args:
        found: by backend.
    """
    if len(found) == 2:
        torch, flax = found["torch"], found["flax"]
        native_names = {name: info.native_names for name, info in found.items()}
        checks.check_same(torch.shapes, flax.shapes, native_names)
        checks.check_dropout(torch.dropout_layers, flax.dropout_layers)
    devices = {name: info.device for name, info in found.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name}: {device}" for name, device in devices.items())
        log(f"Only one framework finds a GPU ({listed}): both use the CPU")
        return "cpu"
    return next(iter(devices.values()))


def load_initial_weights(
    path: Path, config: Config, dataset: Dataset, name: str, device: str, backends: BackendPackage
) -> tuple[Arrays, Config]:
    """The user's own weights, canonical, and the configuration of the run that starts from them.

    Raises:
        DataError: if they are not those of the network that is trained.
    """
    backend = backends.load(name)(config, dataset.task, "float32", device, "off")
    found = backends.module("weight_files").read_weights(path, backend.shapes(), config.model)
    return found, dataclasses.replace(config, weights=initial_weights.digest(found))


def own_start(
    config: Config, dataset: Dataset, device: str, backends: BackendPackage
) -> Arrays | None:
    """The initial weights that a module of the user's draws from the run's seed, canonical; None
    where Lockstep draws them."""
    if config.starts_from not in BACKENDS:
        return None
    module = backends.module(f"{config.starts_from}_backend.user_module")
    return module.own_start(config.model, dataset.task, device, config.seed)


def check_images(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError if images are to be augmented, and the data are none."""
    images = dataset.train_images
    if config.augment is not None and not (images.dtype == np.uint8 and images.ndim == 4):
        raise ConfigError(
            f"--augment {config.augment} is for images, uint8 (n, height, width, channels), and the "
            f"inputs are {images.dtype} {images.shape}: leave it out"
        )


def check_same_data(request: Request, dataset: Dataset) -> None:
    """Raise DataError if a run that is resumed was trained on other data."""
    if request.resumed is not None and request.resumed.digest != dataset.digest:
        raise DataError(
            f"{request.resume} was trained on other data than {dataset.name}: name them with --data"
        )


def check_same_weights(request: Request, config: Config) -> None:
    """Raise DataError if a run that is resumed started from other weights.

    Args:
        config: the run that starts from the weights of today.
    """
    if request.resumed is not None and request.resumed.config != config.to_json():
        raise DataError(
            f"{request.weights} holds other weights than {request.resume} started from: restore it"
        )


def check_folder(folder: Path) -> None:
    """Raise RecordError if the folder cannot be written; nothing is left there."""
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    check_writable(folder)
    with contextlib.suppress(OSError):  # another run writes there now
        for place in made:
            place.rmdir()


def check_batch_norm(config: Config, processes: int, found: Mapping[str, int]) -> None:
    """Raise ConfigError if batch norm is that of each process and their number is not the same.

    Args:
        found: by backend, the processes of the runs that are there.
    """
    for name, count in found.items():
        if config.batch_norm == "local" and count != processes:
            raise ConfigError(
                f"--batch-norm local is another network in {processes} processes than in "
                f"{FRAMEWORKS[name]}'s {count}: use --processes {count}, or --batch-norm global"
            )


def checkpoint_every(steps: int | None, config: Config) -> int:
    """Steps between two checkpoints; 0: only where a run is stopped."""
    if steps is not None:
        return steps
    return CHECKPOINT_EVERY if config.total_steps >= LONG_RUN else 0
