"""Records one run of a script: what `lockstep.Run` does within a command of Lockstep."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType

import ml_dtypes
import numpy as np

from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.model.initial_weights import generator_for
from lockstep.common.model.perturb import TWINS_STREAM, image_perturbation_rng, perturb_one_ulp
from lockstep.common.protocol import Arrays, split_slot
from lockstep.common.recorder import recording
from lockstep.common.recorder.adapter import Adapter, Tree, adapter_for, framework_of
from lockstep.common.recorder.ranks import Digests, path_of
from lockstep.common.recorder.recording import Recording, batch_digest, fingerprint
from lockstep.common.recorder.settings import FIRST, Settings
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.system import environment
from lockstep.common.system.storage import read_tensors

SMALL = 2**16  # bytes; arrays of no more are kept beyond the limit, too
FLUSH = 256  # steps whose losses may wait on the device
# In the paths of files that are not the user's.
LIBRARIES = ("site-packages", "dist-packages", os.path.dirname(os.__file__))


class Recorder:
    """One run of a script, as `settings` asks for it."""

    def __init__(self, settings: Settings, backend_module: Callable[[str], ModuleType]) -> None:
        self.settings = settings
        self._backend_module = backend_module
        self._adapter: Adapter | None = None
        self._step = 0  # steps that are recorded
        self._before = 0  # steps before those, which a replay passes over
        self._waiting = settings.replay is not None  # for the step of a replay
        self._synced = False
        self._things = 0  # that `begin` was given
        self._dtype = ""
        self._framework = ""
        self._groups: dict[str, Arrays] = {
            name: {}
            for name in ("weights", "optimizer", "first_steps", "parameter_history", "final")
        }
        self._size = 0
        self._series: dict[str, list[Tree]] = {}
        self._read = 0  # steps whose losses are numbers already
        self._digests: dict[str, list[tuple[int, int]]] = {}
        self._forward: dict[str, np.ndarray] = {}
        self._layers: dict[str, None] = {}
        self._fingerprints: list[str] = []
        self._pinned: dict[str, None] = {}
        self._lines: dict[str, str] = {}
        self._digests_of_rank = None if settings.processes in (None, 1) else Digests()
        self._params: Tree = None
        self._calls = 0  # of `batch` in this step
        self._batch_rng = image_perturbation_rng(settings.seed, settings.twin or 0)
        self._start_from = _read_state(settings.start_from)
        self._state = _read_state(settings.state)
        self._begun = self._last = time.monotonic()
        self._written = False
        self._claim()
        atexit.register(self.close)

    def _claim(self) -> None:
        """Only one Run may record."""
        rank = f".rank{self.settings.rank}" if self.settings.rank else ""
        file = f"{self.settings.out}{rank}.run"
        try:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise ConfigError(
                "lockstep.Run() was called twice: one Run records the script"
            ) from None
        except OSError as error:
            raise RecordError(
                f"cannot write {self.settings.out} ({error.strerror}): choose another --out"
            ) from error

    # --- The calls of a script

    def begin(self, state: tuple[Tree, ...]) -> tuple[Tree, ...]:
        if self._adapter is not None:
            raise ConfigError("run.begin was called twice: give it everything in one call")
        if not state:
            raise ConfigError("run.begin() was given nothing: give it the model or its parameters")
        self._framework = "torch" if framework_of(state) == "torch" else "jax"
        self._adapter = adapter_for(state, self._backend_module)
        self._things = len(state)
        state = self._adapter.begin(state, self._change, self._keep_forward)
        weights = self._adapter.start()
        if not weights:
            raise ConfigError("run.begin found no parameters: give it the model or its parameters")
        if not self._waiting:
            self._keep("weights", weights)
        first = next((w for w in weights.values() if _is_float(w)), None)
        self._dtype = "float64" if first is None else first.dtype.name
        if self.settings.twin and self._dtype != "float64":
            twin = self.settings.twin
            draw = generator_for(self.settings.seed, TWINS_STREAM, "scalars of the optimizer", twin)
            self._adapter.move_scalars(draw.uniform(-1, 1))
        self._begun = self._last = time.monotonic()
        return state

    def sync(self, state: tuple[Tree, ...]) -> tuple[Tree, ...]:
        adapter = self._begun_adapter("sync")
        if self._calls:
            raise ConfigError("run.sync was called after run.batch: call it first in each step")
        if state and len(state) != self._things:
            raise ConfigError(
                f"run.sync was given {len(state)} of the {self._things} things that run.begin was "
                "given: give it the same, in the same order"
            )
        self._synced = True
        if not self._waiting or self._before != self.settings.replay:
            return state
        self._waiting = False
        return adapter.sync(state, self._keep_state)

    def _keep_state(self, name: str, array: np.ndarray) -> np.ndarray:
        """A parameter, a buffer or a tensor of the optimizer, as a replay starts from it."""
        array = self._moved(name, self._state.get(name, array))
        slot, _ = split_slot(name)
        self._keep("optimizer" if slot else "weights", {name: array})
        return array

    def batch(self, arrays: tuple[Tree, ...]) -> tuple[Tree, ...]:
        adapter = self._begun_adapter("batch")
        call, self._calls = self._calls, self._calls + 1
        if self._waiting:
            return tuple(
                adapter.map_arrays(each, lambda path, a: self._in_precision(a, self._batch_rng))
                for each in arrays
            )
        again = f" ({call + 1})" if call else ""
        self._note_line("data/batch")

        def of_array(place: str, path: str, array: np.ndarray) -> np.ndarray:
            tensor = f"batch{place}{path}{again}"
            digests = self._digests.setdefault(tensor, [])
            digests += [(0, 0)] * (self._step - len(digests))
            digests.append(batch_digest(array))
            if self._step < FIRST_STEPS:
                self._keep("first_steps", {f"{self._step}/data/{tensor}": array.copy()})
            return self._in_precision(array, self._batch_rng)

        return tuple(
            adapter.map_arrays(array, functools.partial(of_array, f"[{place}]"))
            for place, array in enumerate(arrays)
        )

    def tap(self, name: str, value: Tree) -> None:
        if self._step < FIRST_STEPS:
            self._begun_adapter("tap").tap(name, value)

    def step(self, loss: Tree, params: Tree, grads: Tree, opt_state: Tree, lr: Tree) -> None:
        adapter = self._begun_adapter("step")
        self._calls = 0
        if self._waiting:
            self._before += 1
            return
        losses = loss if isinstance(loss, dict) else {"loss": loss}
        rate = adapter.learning_rate() if lr is None else lr
        for name, value in {**losses, **({} if rate is None else {"lr": rate})}.items():
            _check_scalar(name, value)
            values = self._series.setdefault(name, [])
            values += [math.nan] * (self._step - len(values))
            values.append(adapter.detached(value))
        if self._step < FIRST_STEPS:
            self._record_first_step(adapter, losses, params, grads, opt_state)
        self._step += 1
        self._params = params
        if self._step == FIRST_STEPS:
            adapter.end_first_steps()
        elif self._step > FIRST_STEPS and _is_milestone(self._step):
            self._keep_parameters("parameter_history", f"{self._step}/", params)
        if self._step - self._read >= FLUSH:
            self._read_series()
        self._last = time.monotonic()
        if self._before + self._step == self.settings.steps:
            self.close(complete=True)
            raise SystemExit(0)
        if self._step == FIRST_STEPS and self.settings.early:
            self._read_series()
            self._write(complete=False, results={}, suffix=FIRST)

    def finish(self, results: dict[str, Tree]) -> None:
        adapter = self._begun_adapter("finish")
        found: Arrays = {}

        def collect(name: str, array: np.ndarray) -> np.ndarray:
            found[name] = array
            return array

        for name, value in results.items():
            if isinstance(value, (bool, int, float, np.generic)):
                found[name] = np.array(value)
            else:
                adapter.map_arrays(
                    value, lambda path, a, n=name: collect(f"{n}{path}", np.array(a))
                )
        self.close(complete=True, results=found)

    def _begun_adapter(self, call: str) -> Adapter:
        if self._adapter is None:
            raise ConfigError(f"run.{call} was called before run.begin: call run.begin(...) first")
        return self._adapter

    # --- What is kept

    def _record_first_step(
        self, adapter: Adapter, losses: dict[str, Tree], params: Tree, grads: Tree, opt_state: Tree
    ) -> None:
        step = self._step
        adapter.wait()
        self._keep_stage("forward", self._forward)
        self._forward = {}
        self._note_line("loss/loss")
        self._keep_stage("loss", {name: _scalar(value) for name, value in losses.items()})
        self._keep_stage("backward", adapter.gradients(grads))
        self._keep_stage("update", adapter.optimizer_state(opt_state))
        self._keep_parameters("first_steps", f"{step}/update/", params)

    def _keep_forward(self, name: str, array: np.ndarray | None) -> None:
        """One tensor of the forward pass; of several calls in a step, the last."""
        if self._waiting:
            return
        self._layers.setdefault(name)
        self._note_line(f"forward/{name}")
        if array is not None:
            self._forward[name] = array

    def _keep_stage(self, stage: str, arrays: Arrays) -> None:
        if self.settings.dtype == "float64":
            for name, array in arrays.items():
                if _is_float(array) and array.dtype != np.float64:
                    self._pinned.setdefault(f"{stage}/{name}")
        prefix = f"{self._step}/{stage}/"
        self._keep("first_steps", {prefix + name: array for name, array in arrays.items()})

    def _keep_parameters(self, group: str, prefix: str, params: Tree) -> None:
        assert self._adapter is not None
        arrays = self._adapter.weights(params)
        self._keep(group, {prefix + name: array for name, array in arrays.items()})

    def _keep(self, group: str, arrays: Arrays) -> None:
        """Keep arrays, or fingerprints of those that would exceed the limit; of other ranks than 0,
        digests."""
        if self._digests_of_rank is not None:
            self._digests_of_rank.add(group, arrays)
        if self.settings.rank:
            return
        for name, array in arrays.items():
            if array.nbytes > SMALL and self._size + array.nbytes > self.settings.limit:
                array = fingerprint(array)
                self._fingerprints.append(f"{group}/{name}")
            self._size += array.nbytes
            self._groups[group][name] = array

    def _note_line(self, tensor: str) -> None:
        """Where in the user's own files the call stands that made a tensor."""
        if self._step == 0 and tensor not in self._lines and (line := users_line()) is not None:
            self._lines[tensor] = line

    # --- Precision and twins

    def _change(self, name: str, array: np.ndarray) -> np.ndarray:
        return self._moved(name, self._start_from.get(name, array))

    def _moved(self, name: str, array: np.ndarray) -> np.ndarray:
        generator = generator_for(self.settings.seed, TWINS_STREAM, name, self.settings.twin or 0)
        return self._in_precision(array, generator)

    def _in_precision(self, array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if not _is_float(array):
            return array
        if self.settings.dtype == "float64":
            array = array.astype(np.float64)
        moves = self.settings.twin and not self._waiting
        return perturb_one_ulp(array, generator) if moves else array

    # --- The file

    def _read_series(self) -> None:
        for values in self._series.values():
            values[self._read :] = [float(_scalar(v)) for v in values[self._read :]]
        self._read = self._step

    def close(self, complete: bool = False, results: Arrays | None = None) -> None:
        """Write the recording, once."""
        if self._written or self._adapter is None:
            return
        self._written = True
        if self._waiting:
            raise ConfigError(
                f"run.sync was not called at step {self.settings.replay}: call it in each step"
            )
        self._adapter.move_scalars(0.0)
        if self._step < FIRST_STEPS:
            self._adapter.end_first_steps()
        with contextlib.suppress(RuntimeError):  # donated to a later step
            self._keep_parameters("final", "", self._params)
        self._read_series()
        self._write(complete, results or {})

    def _write(self, complete: bool, results: Arrays, suffix: str = "") -> None:
        """Write what rank 0 has recorded, and the digests of each of several ranks."""
        settings, found = self.settings, self._recording(complete, results)
        if self._digests_of_rank is not None:
            for group in ("series", "batch_digests", "results"):
                self._digests_of_rank.add(group, getattr(found, group))
            path = Path(f"{path_of(settings.out, settings.rank)}{suffix}")
            self._digests_of_rank.write(path, found.steps)
        if settings.rank == 0:
            recording.write(found, Path(f"{settings.out}{suffix}"))

    def _recording(self, complete: bool, results: Arrays) -> Recording:
        assert self._adapter is not None
        script = Path(sys.argv[0])
        groups = self._groups
        return Recording(
            name=self.settings.name,
            framework=self._framework,
            dtype=self._dtype,
            twin=self.settings.twin,
            script=str(script),
            arguments=sys.argv[1:],
            source=hashlib.sha256(script.read_bytes()).hexdigest() if script.is_file() else "",
            environment={**environment.describe(), **self._adapter.describe()},
            complete=complete,
            parameters=self._adapter.parameters(),
            synced=self._synced,
            layers=list(self._layers),
            series={n: np.array(_padded(v, self._step, math.nan)) for n, v in self._series.items()},
            batch_digests={
                name: np.array(_padded(values, self._step, (0, 0)), np.int64).reshape(-1, 2)
                for name, values in self._digests.items()
            },
            results=results,
            fingerprints=self._fingerprints,
            pinned=list(self._pinned),
            notes=self._adapter.notes(),
            lines=self._lines,
            seconds=self._last - self._begun,
            processes=self.settings.processes or 1,
            rank_differences=None,
            local=[],
            **groups,
        )


def _read_state(file: str | None) -> Arrays:
    if file is None:
        return {}
    _, arrays = read_tensors(Path(file), 1, "file of weights", "run the check again")
    return arrays


def _padded(values: list[Tree], steps: int, value: Tree) -> list[Tree]:
    return [*values, *[value] * (steps - len(values))][:steps]


def _is_milestone(steps: int) -> bool:
    """3, 10, 30, 100, ..."""
    while steps % 10 == 0:
        steps //= 10
    return steps in (1, 3)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _check_scalar(name: str, value: Tree) -> None:
    """Raise ConfigError if a loss has more than one entry; without waiting for its value."""
    shape = getattr(value, "shape", ())
    if math.prod(shape) != 1:
        raise ConfigError(f"run.step: {name} has the shape {tuple(shape)}: give it a scalar")


def _scalar(value: Tree) -> np.ndarray:
    """A loss as an array of no dimensions; waits for its value."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.dtype.itemsize < 4 else value  # NumPy has no bfloat16
    return np.asarray(value).reshape(())


def users_line() -> str | None:
    """ "file:line" of the innermost call in the user's own files."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        ours = str(frame.f_globals.get("__name__", "")).startswith("lockstep.")
        if not ours and not file.startswith("<") and not any(map(file.__contains__, LIBRARIES)):
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return None
