"""What a recorder has to know of PyTorch. Reads next to backends/flax_backend/recorder.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lockstep.backends.torch_backend.inputs import as_array, as_tensor
from lockstep.common.errors import ConfigError
from lockstep.common.protocol import Arrays
from lockstep.common.recorder.adapter import SCALARS_ROUNDING, SLOTS, Change, Keep, State, Tree


class Adapter:
    """Hooks of modules, parameters and optimizers report what `Run.begin` was given them of."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}  # parameters and buffers
        self._trained: list[str] = []
        self._optimizers: list[Optimizer] = []
        self._raw: dict[str, Tensor] = {}  # gradients as the last backward pass left them
        self._averaged = False  # by DistributedDataParallel, when a backward pass ends
        self._gradients: dict[str, Tensor] = {}  # those that the optimizer was about to use
        self._rate: float | None = None
        self._scalars = (
            0.0  # the share of their rounding that the scalars of optimizers are moved by
        )
        self._updates: dict[int, int] = {}  # by the id of an optimizer, so far
        self._rates: list[float | Tensor] = []  # as they are without that
        self._handles: list[RemovableHandle] = []
        self._keep: Keep = lambda name, array: None
        self._notes: list[str] = []

    def begin(self, state: State, change: Change, keep: Keep) -> State:
        self._keep = keep
        for prefix, thing in _parts(state):
            if isinstance(thing, nn.Module):
                self._averaged |= any(isinstance(layer, DataParallel) for layer in thing.modules())
                self._add_module(prefix, thing.module if type(thing) is DataParallel else thing)
            elif isinstance(thing, Optimizer):
                self._optimizers.append(thing)
            elif isinstance(thing, Tensor):
                self._add_tensor(prefix, thing, trained=thing.requires_grad)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                if tensor.is_floating_point():
                    new = change(name, _copy(tensor))
                    if self._averaged and new.dtype != as_array(tensor).dtype:
                        raise ConfigError(
                            f"run.begin was given a DistributedDataParallel, and its {name} is to "
                            f"become {new.dtype}: give it the module before that wraps it"
                        )
                    _replace(tensor, new)
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_update))
            optimizer.register_step_post_hook(self._restore_rates)
            if optimizer.state:
                self._change_state(optimizer, change)
        return state

    def _add_module(self, prefix: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            self._add_tensor(_joined(prefix, name), parameter, parameter.requires_grad)
        for name, buffer in module.named_buffers():
            self._add_tensor(_joined(prefix, name), buffer, trained=False)
        if any(type(layer).__name__ == "OptimizedModule" for layer in module.modules()):
            self._notes.append(
                "a compiled module's layers are not recorded: call run.begin before torch.compile"
            )
            return
        for name, layer in module.named_modules():
            hook = self._reporter(_joined(prefix, name) if name else prefix or "output")
            self._handles.append(layer.register_forward_hook(hook))

    def _add_tensor(self, name: str, tensor: Tensor, trained: bool) -> None:
        self._tensors[name] = tensor
        if trained:
            self._trained.append(name)
            hook = self._gradient_reporter(name)
            self._handles.append(tensor.register_post_accumulate_grad_hook(hook))

    def _reporter(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return
            tensor = _first_tensor(output)
            if tensor is not None:
                self._keep(name, _copy(tensor))

        return hook

    def _gradient_reporter(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            if self._averaged:
                _at_the_end(lambda: hold(parameter))
            else:
                hold(parameter)

        def hold(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._raw[name] = parameter.grad.detach().clone()

        return hook

    def _before_update(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Before clipped gradients are used: the raw ones are those to compare. Not where processes
        average them by calls of their own, which come after the backward pass."""
        by_calls = _process_count() > 1 and not self._averaged
        self._rate = float(optimizer.param_groups[0]["lr"])
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in self._trained:
            parameter = self._tensors[name]
            if id(parameter) in updated and parameter.grad is not None:
                raw = None if by_calls else self._raw.get(name)
                self._gradients[name] = parameter.grad.detach().clone() if raw is None else raw
        self._move_rates(optimizer)

    def move_scalars(self, share: float) -> None:
        self._scalars = share

    def _move_rates(self, optimizer: Optimizer) -> None:
        """Until the update is done: a rate moves the update as Adam's second scalar does, by half
        of it."""
        count = self._updates[id(optimizer)] = self._updates.get(id(optimizer), 0) + 1
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if self._scalars and "betas" in group:
                rounding = SCALARS_ROUNDING / (1 - float(group["betas"][-1]) ** count)
                group["lr"] = group["lr"] * (1 + self._scalars * rounding / 2)

    def _restore_rates(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _change_state(self, optimizer: Optimizer, change: Change) -> None:
        for slot, name, tensor in self._slots(optimizer):
            if tensor.is_floating_point():
                _replace(tensor, change(f"{slot} of {name}", _copy(tensor)))

    def sync(self, state: State, change: Change) -> State:
        in_place = not any(isinstance(thing, (Tensor, dict, list, tuple)) for thing in state)
        with torch.no_grad():
            for name, tensor in (self._tensors if in_place else dict(_tensors(state))).items():
                if tensor.is_floating_point():
                    tensor.copy_(as_tensor(change(name, _copy(tensor))))
            for optimizer in self._optimizers:
                self._change_state(optimizer, change)
        return state

    def start(self) -> Arrays:
        return self.weights()

    def weights(self, params: Tree = None) -> Arrays:
        if params is not None:
            return {name: _copy(t) for name, t in _tensors(params)}
        return {name: _copy(tensor) for name, tensor in self._tensors.items()}

    def parameters(self) -> list[str]:
        return list(self._trained)

    def gradients(self, grads: Tree = None) -> Arrays:
        if grads is not None:
            return {name: _copy(tensor) for name, tensor in _tensors(grads)}
        found = {name: _copy(gradient) for name, gradient in (self._raw | self._gradients).items()}
        self._raw, self._gradients = {}, {}
        return found

    def optimizer_state(self, opt_state: Tree = None) -> Arrays:
        return {
            f"{slot} of {name}": _copy(tensor)
            for optimizer in self._optimizers
            for slot, name, tensor in self._slots(optimizer)
        }

    def _slots(self, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors of an optimizer's state that have their parameter's shape."""
        for name, parameter in self._tensors.items():
            for slot, tensor in dict(optimizer.state.get(parameter, {})).items():
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    yield SLOTS.get(str(slot), str(slot)), name, tensor

    def learning_rate(self) -> float | None:
        return self._rate

    def map_arrays(self, value: Tree, change: Change) -> Tree:
        return _map(value, "", change)

    def tap(self, name: str, value: Tree) -> None:
        if torch.compiler.is_compiling():
            self._notes.append(f"run.tap({name!r}) inside torch.compile records nothing")
        elif (tensor := _first_tensor(value)) is not None:
            self._keep(name, _copy(tensor))

    def wait(self) -> None:
        """Hooks report at once."""

    def end_first_steps(self) -> None:
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            optimizer.register_step_pre_hook(self._note_rate)
        self._handles, self._raw, self._gradients = [], {}, {}

    def _note_rate(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._rate = float(optimizer.param_groups[0]["lr"])
        self._move_rates(optimizer)

    def random(self, numbers: np.ndarray, state: State) -> Tensor:
        first = next(
            (t for _, t in _tensors(state) if t.is_floating_point()), torch.zeros((), device="cpu")
        )
        return torch.as_tensor(numbers).to(device=first.device, dtype=first.dtype)

    def detached(self, value: Tree) -> Tree:
        return value.detach() if isinstance(value, Tensor) else value

    def notes(self) -> list[str]:
        return list(dict.fromkeys(self._notes))

    def describe(self) -> dict[str, object]:
        tensor = next(iter(self._tensors.values()), torch.zeros(()))
        return {
            "torch": str(torch.__version__),
            "device": tensor.device.type,
            "threads": torch.get_num_threads(),
        }


# --- Several processes


def _process_count() -> int:
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def _at_the_end(call: Callable[[], None]) -> None:
    """Call it at the end of this backward pass, after DistributedDataParallel's own callback, which
    puts the averages into `grad`. That is queued later: hence a callback that queues this one."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(call))


# --- Trees of tensors: dictionaries, lists and tuples


def _parts(state: State) -> list[tuple[str, Tree]]:
    """Modules, optimizers and tensors with their prefixes: positions, where there are several
    things that hold parameters."""
    several = sum(not isinstance(thing, Optimizer) for thing in state) > 1
    found: list[tuple[str, Tree]] = []
    place = 0
    for thing in state:
        if isinstance(thing, Optimizer):
            found.append(("", thing))
        else:
            found += _flat(thing, str(place) if several else "")
            place += 1
    return found


def _flat(value: Tree, prefix: str) -> list[tuple[str, Tree]]:
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in _flat(item, _joined(prefix, str(key)))]
    if isinstance(value, (list, tuple)):
        return [p for i, item in enumerate(value) for p in _flat(item, _joined(prefix, str(i)))]
    return [(prefix, value)]


def _tensors(value: Tree) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a tree, those of its modules included."""
    for name, thing in _parts(value if isinstance(value, tuple) else (value,)):
        if isinstance(thing, nn.Module):
            for own, parameter in thing.named_parameters():
                yield _joined(name, own), parameter
        elif isinstance(thing, Tensor):
            yield name, thing


def _map(value: Tree, path: str, change: Change) -> Tree:
    if isinstance(value, dict):
        return type(value)((k, _map(item, f"{path}.{k}", change)) for k, item in value.items())
    if isinstance(value, (list, tuple)):
        if (fields := getattr(value, "_fields", None)) is not None:
            named = zip(fields, value, strict=True)
            return type(value)(*(_map(item, f"{path}.{name}", change) for name, item in named))
        return type(value)(_map(item, f"{path}[{i}]", change) for i, item in enumerate(value))
    if isinstance(value, np.ndarray):
        return change(path, value)
    if isinstance(value, Tensor):
        array = as_array(value.detach())
        new = change(path, array)
        return value if new is array else as_tensor(new).to(value.device)
    return value


def _first_tensor(value: object) -> Tensor | None:
    """The first float tensor in an output."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((t for item in value if (t := _first_tensor(item)) is not None), None)
    return None


def _replace(tensor: Tensor, array: np.ndarray) -> None:
    """New values, and perhaps a new dtype, in the place and the memory format of the old."""
    new = as_tensor(np.ascontiguousarray(array))
    tensor.data = torch.empty_like(tensor, dtype=new.dtype).copy_(new)


def _copy(tensor: Tensor) -> np.ndarray:
    return np.array(as_array(tensor.detach()))


def _joined(prefix: str, name: str) -> str:
    """Without the words that `torch.compile` and `DataParallel` put into names."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.")
    return f"{prefix}.{name}" if prefix else name
