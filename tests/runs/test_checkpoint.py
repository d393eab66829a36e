"""A checkpoint and run.json are read back bit by bit, or refused in one line; the newest is always
a whole one."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lockstep import backends
from lockstep.common.config import DTYPES, MAX_COUNT, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import RecordError
from lockstep.common.model.perturb import image_perturbation_rng
from lockstep.common.protocol import Snapshot
from lockstep.common.runs import checkpoint, record, request, training
from lockstep.common.runs.checkpoint import KEEP_LAST, Checkpoint, CheckpointManager
from lockstep.common.runs.request import RunRequest
from lockstep.common.system import interrupt, storage
from lockstep.common.system.interrupt import SignalHandler
from tests.conftest import SilentObserver
from tests.robustness import kills

SHAPES = {"fc1.kernel": (3, 2), "fc1.bias": (2,)}


def make(
    step: int = 4, dtype: str = "float32", twin: int | None = None, **changes: Any
) -> Checkpoint:
    """A checkpoint after `step` steps of a run with momentum and plateau."""
    generator, kind = np.random.default_rng(0), numpy_dtype(dtype)

    def tensors(scale: float = 1.0) -> dict[str, np.ndarray]:
        return {
            name: (scale * generator.normal(size=shape)).astype(kind)
            for name, shape in SHAPES.items()
        }

    plateau = {
        "lr": 0.1,
        "scale": 0.5,
        "best": math.inf,
        "bad": 1.0,
        "cooldown": 0.0,
        "count": 1.0,
        "mean": 2.5,
    }
    snapshot = Snapshot(
        parameters=tensors(), model_state={}, slots={"momentum": tensors()} if step else {},
        schedule=plateau if step else {}, step=step, extra={},
    )  # fmt: skip
    series = [generator.normal(size=step) for _ in range(3)]
    fields: dict[str, Any] = {
        "backend": "torch", "dtype": dtype, "twin": twin, "config": Config(momentum=0.9, schedule=Schedule("plateau")).to_json(),
        "data": {"name": "猫", "digest": "d1"}, "source": "s1",
        "segments": [{"backend": "torch", "stop": step}] if step else [], "layers": ["fc1", "logits"],
        "perturbation_rng_state": None if twin is None else dict(image_perturbation_rng(0, twin).bit_generator.state), "seconds": 1.5,
        "loss": series[0], "gradient_norm": np.abs(series[1]), "lr": series[2], "batch_digests": np.arange(step), "weights": tensors(),
        "first_steps": {"0/forward/fc1": np.ones((2, 2), kind), "0/forward/logits": np.ones(2, kind), "0/loss/loss": np.array(2.0, kind)} if step else {},
        "parameter_history": {"3/fc1.bias": np.array([-0.0, 5e-324]).astype(kind)} if step else {}, "snapshot": snapshot,
    }  # fmt: skip
    return Checkpoint(**fields | changes)


def bits(one: Checkpoint) -> str:
    return kills.bits(
        {name: value for name, value in vars(one).items() if name != "snapshot"}
        | one.snapshot._asdict()
    )


# --- There and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("twin", [None, 1, 12])
@pytest.mark.parametrize("step", [0, 1, 12345])
def test_a_checkpoint_is_read_back_bit_by_bit(
    tmp_path: Path, dtype: str, twin: int | None, step: int
) -> None:
    path = checkpoint.write(make(step, dtype, twin), tmp_path / "new")
    assert path.parent == tmp_path / "new" / checkpoint.FOLDER
    assert path.name == f"{record.file_stem('torch', dtype, twin)}-{step:010d}.safetensors"
    assert bits(checkpoint.read(path)) == bits(make(step, dtype, twin))


def test_the_comparison_of_checkpoints_that_this_file_uses_sees_one_bit() -> None:
    arrays: list[Callable[[Checkpoint], np.ndarray]] = [
        lambda c: c.loss, lambda c: c.weights["fc1.bias"], lambda c: c.snapshot.slots["momentum"]["fc1.kernel"],
        lambda c: c.parameter_history["3/fc1.bias"], lambda c: c.first_steps["0/loss/loss"],
    ]  # fmt: skip
    for of in arrays:
        other = make()
        of(other).flat[-1] = np.nextafter(of(other).flat[-1], np.asarray(9, of(other).dtype))
        assert bits(other) != bits(make())
    assert bits(make(twin=1)) != bits(make(twin=2))


def test_one_generators_state_is_continued_and_another_is_not(tmp_path: Path) -> None:
    generator = image_perturbation_rng(3, 1)
    generator.integers(0, 9, 1000)
    state = dict(generator.bit_generator.state)
    path = checkpoint.write(make(twin=1, perturbation_rng_state=state), tmp_path)
    restored = image_perturbation_rng(3, 1)
    assert restored.integers(0, 2**60) != (expected := generator.integers(0, 2**60))
    restored.bit_generator.state = checkpoint.read(path).perturbation_rng_state or {}
    assert restored.integers(0, 2**60) == expected


# --- What is refused


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]) -> Path:
    """The same file with other contents, and the digest that belongs to them."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        names = file.keys()
        arrays = {name: file.get_tensor(name) for name in names}
    change(facts, arrays)
    text = json.dumps(facts, sort_keys=True)
    save_file(arrays, path, metadata={"facts": text, "digest": storage._digest(text, arrays)})
    return path


def fact(**changes: Any) -> Callable[..., Any]:
    return lambda facts, arrays: facts.update(changes)


def array(name: str, value: Any) -> Callable[..., Any]:
    return lambda facts, arrays: arrays.update({name: np.asarray(value)})


def without(name: str) -> Callable[..., Any]:
    return lambda facts, arrays: (facts if name in facts else arrays).pop(name)


HALF, NAN = np.ones(2, np.float32), np.array([1, np.nan], np.float32)
WRONG: list[tuple[str, Callable[..., Any]]] = [  # what is said, and what was done
    ("backend", fact(backend="keras")),
    ("backend", fact(backend=["torch"])),
    ("dtype", fact(dtype="float16")),
    ("twin", fact(twin=-1)),
    ("twin", fact(twin=True)),
    ("twin", fact(twin=1.0)),
    ("twin", fact(twin=MAX_COUNT + 1)),
    ("step", fact(step=-1)),
    ("step", fact(step=4.0)),
    ("step", fact(step="4")),
    ("step", fact(step=True)),
    ("config", fact(config=[])),
    ("config", fact(config={"schedule": {"kind": 3}})),
    ("KeyError", fact(config={})),
    ("data", fact(data="digits")),
    ("source", fact(source=None)),
    ("seconds", fact(seconds=-1.0)),
    ("seconds", fact(seconds=1)),
    ("seconds", fact(seconds=math.inf)),
    ("seconds", fact(seconds=math.nan)),
    ("layers", fact(layers="fc1")),
    ("layers", fact(layers=["fc1", 2])),
    ("segments", fact(legs=[])),
    ("segments", fact(legs=[{"backend": "torch", "stop": 3}])),
    ("segments", fact(legs=[{"backend": "torch", "stop": 5}])),
    ("segments", fact(legs=[{"backend": "keras", "stop": 4}])),
    ("segments", fact(legs=[{"backend": "torch", "stop": 4, "more": 1}])),
    ("segments", fact(legs=[{"backend": "torch", "stop": 0}, {"backend": "flax", "stop": 4}])),
    ("segments", fact(legs=[{"backend": "torch", "stop": 4}, {"backend": "flax", "stop": 4}])),
    ("segments", fact(legs=[{"backend": name, "stop": stop} for name, stop in (("torch", 3), ("flax", 2), ("torch", 4))])),
    ("rank_differences", fact(rank_differences={})),
    ("rank_differences", fact(rank_differences=[{"step": 1, "rank": 1, "tensor": "a"}])),
    ("rank_differences", fact(rank_differences=[{"step": 1, "rank": 0, "tensor": "a", "gap": 1.0}])),
    ("KeyError", fact(legs=[{"backend": "torch"}])),
    ("TypeError", fact(legs=[3])),
    ("perturbation_rng_state", fact(rounding={})),
    ("perturbation_rng_state", fact(twin=1)),
    ("ValueError", fact(twin=1, rounding={"bit_generator": "MT19937"})),
    ("KeyError", fact(twin=1, rounding={"bit_generator": "PCG64"})),
    ("loss", array("loss", np.ones(3))),
    ("loss", array("loss", np.ones((4, 1)))),
    ("gradient_norm", array("gradient_norm", np.ones(4, np.float32))),
    ("gradient_norm", array("gradient_norm", [1.0, 1.0, -1.0, 1.0])),
    ("gradient_norm", array("gradient_norm", [1.0, 1.0, math.nan, 1.0])),
    ("lr", array("lr", [0.1, 0.1, math.nan, 0.1])),
    ("KeyError", without("loss")),
    ("weights", lambda facts, arrays: [arrays.pop(f"weights/{name}") for name in SHAPES]),
    ("weights", array("weights/fc1.bias", np.ones(2))),
    ("weights, not finite", array("weights/fc1.bias", NAN)),
    ("parameters", without("parameters/fc1.bias")),
    ("parameters", array("parameters/fc1.bias", np.ones(3, np.float32))),
    ("parameters", array("parameters/fc1.bias", np.ones(2, np.float16))),
    ("parameters", array("parameters/fc2.bias", HALF)),
    ("parameters, not finite", array("parameters/fc1.bias", NAN)),
    ("model state, not finite", array("model_state/norm.mean", NAN)),
    ("optimizer", without("momentum/fc1.bias")),
    ("optimizer", array("first moment/fc1.bias", HALF)),
    ("optimizer", fact(config=Config(schedule=Schedule("plateau")).to_json())),
    ("optimizer, not finite", array("momentum/fc1.bias", NAN)),
    ("schedule", without("schedule/bad")),
    ("schedule", array("schedule/novelty", 1.0)),
    ("schedule", fact(config=Config(momentum=0.9, schedule=Schedule("step")).to_json())),
    ("TypeError", array("schedule/lr", [0.1, 0.2])),
    ("schedule, not finite", array("schedule/lr", math.nan)),
    ("schedule, not finite", array("schedule/mean", math.inf)),
    ("schedule, best", array("schedule/best", math.nan)),
    ("first_steps", array("opening/0/novelty/fc1", HALF)),
    ("first_steps", array("opening/x/forward/fc1", HALF)),
    ("ValueError", array("opening/0", HALF)),
    ("layers, of the first steps", without("opening/0/forward/logits")),
    ("layers, of the first steps", array("opening/0/forward/fc2", HALF)),
    ("parameter_history", array("along/x/fc1.bias", HALF)),
    ("KeyError", array("novelty/fc1.bias", HALF)),
    ("TypeError", fact(novelty=1)),
    ("TypeError", without("source")),
    ("KeyError", without("step")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "change"), WRONG, ids=[f"{n} {said}" for n, (said, _) in enumerate(WRONG)]
)
def test_a_checkpoint_with_a_right_digest_and_wrong_contents_is_refused(
    tmp_path: Path, said: str, change: Callable[..., Any]
) -> None:
    path = checkpoint.write(make(), tmp_path)
    assert bits(checkpoint.read(rewritten(path, lambda *_: None))) == bits(make()), "the control"
    with pytest.raises(RecordError) as caught:
        checkpoint.read(rewritten(path, change))
    assert str(caught.value) == f"the checkpoint {path} cannot be used ({said}): {checkpoint.HINT}"


def test_every_check_has_such_a_file() -> None:
    assert {name for name, _ in checkpoint._checks(make())} <= {said for said, _ in WRONG}


def test_a_checkpoint_before_the_first_step_holds_no_state_of_the_optimizer(tmp_path: Path) -> None:
    for said, change in (
        ("optimizer", array("momentum/fc1.bias", HALF)),
        ("schedule", array("schedule/lr", 0.1)),
    ):
        path = checkpoint.write(make(0), tmp_path)
        checkpoint.read(path)
        with pytest.raises(RecordError, match=rf"\({said}\)"):
            checkpoint.read(rewritten(path, change))


def test_a_run_without_momentum_and_with_a_plain_schedule_has_neither(tmp_path: Path) -> None:
    plain = make(config=Config(schedule=Schedule("step")).to_json())
    plain = dataclasses.replace(
        plain, snapshot=plain.snapshot._replace(slots={}, schedule={"lr": 0.1})
    )
    assert bits(checkpoint.read(checkpoint.write(plain, tmp_path))) == bits(plain)


def test_a_gradients_norm_may_overflow_where_the_loss_does_not(tmp_path: Path) -> None:
    mine = make(gradient_norm=np.array([1.0, math.inf, 2.0, 0.0]))
    assert bits(checkpoint.read(checkpoint.write(mine, tmp_path))) == bits(mine)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], "cannot be read"),
        (lambda content: content[: len(content) // 2], "cannot be read"),
        (lambda content: b"", "cannot be read"),
        (lambda content: content + b"\0", "cannot be read"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
    ],
    ids=["the last byte lost", "half", "empty", "one byte more", "one bit"],
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    path = checkpoint.write(make(), tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        RecordError, match=rf"^the checkpoint .* {said}.*: delete it to resume from the one before"
    ):
        checkpoint.read(path)


def test_a_checkpoint_of_another_version_a_missing_one_and_no_file_are_refused(
    tmp_path: Path,
) -> None:
    path = rewritten(checkpoint.write(make(), tmp_path), fact(schema=checkpoint.SCHEMA + 1))
    with pytest.raises(RecordError, match="another version"):
        checkpoint.read(path)
    os.mkfifo(tmp_path / "pipe")
    for missing in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(RecordError, match="there is no checkpoint"):
            checkpoint.read(missing)


@pytest.mark.parametrize(
    "name",
    ["flax-float32-0000000004", "torch-float32-0000000005", "torch-float32-twin1-0000000004"],
)
def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    path = checkpoint.write(make(), tmp_path)
    with pytest.raises(RecordError, match="is not what its name says"):
        checkpoint.read(path.rename(path.with_name(f"{name}.safetensors")))


# --- What is kept, and in which order


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_newest_three_are_kept_of_each_run(tmp_path: Path) -> None:
    for step in (1, 20, 3, 100, 7):
        checkpoint.write(make(step), tmp_path)
        checkpoint.write(make(step, twin=1), tmp_path)
    for stem in ("torch-float32", "torch-float32-twin1"):
        kept = [path.name for path in checkpoint.found(tmp_path, stem)]
        assert kept == [f"{stem}-{step:010d}.safetensors" for step in (100, 20, 7)]
    assert KEEP_LAST == 3


def test_names_that_only_look_alike_are_another_runs(tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.FOLDER
    folder.mkdir()
    mine = "torch-float32-0000000001.safetensors"
    others = [
        "torch-float32-twin1-0000000001.safetensors", "flax-float32-0000000001.safetensors",
        "torch-float32-00000000011.safetensors", "torch-float32-000000001.safetensors",
        "torch-float32-0000000001.safetensors.bak", "xtorch-float32-0000000001.safetensors",
        f".{mine}.abcdefgh.part", "torch-float321-0000000001.safetensors", "torch.float32-0000000001.safetensors",
    ]  # fmt: skip
    for name in (mine, *others):
        (folder / name).write_bytes(b"")
    assert [path.name for path in checkpoint.found(tmp_path, "torch-float32")] == [mine]
    checkpoint.remove(tmp_path, "torch-float32")
    assert names(folder) == sorted(others)


def test_the_folder_of_the_checkpoints_goes_with_the_last_one(tmp_path: Path) -> None:
    checkpoint.remove(tmp_path, "torch-float32")  # there is none
    checkpoint.write(make(), tmp_path)
    checkpoint.write(make(twin=1), tmp_path)
    checkpoint.remove(tmp_path, "torch-float32")
    assert names(tmp_path) == [f"{checkpoint.FOLDER}/torch-float32-twin1-0000000004.safetensors"]
    checkpoint.remove(tmp_path, "torch-float32-twin1")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(make(), tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(
        RecordError,
        match=r"cannot remove old checkpoints .*\(Read-only file system\): make the folder",
    ):
        checkpoint.remove(tmp_path, "torch-float32")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls that change the disk, in their order, with the name of what they change."""
    calls: list[tuple[str, str]] = []
    for name, complete in [
        (name, getattr(os, name)) for name in ("fsync", "replace", "unlink", "rmdir")
    ]:

        def call(
            first: Any, *rest: Any, name: str = name, complete: Any = complete, **options: Any
        ) -> Any:
            path = (
                os.readlink(f"/proc/self/fd/{first}")
                if isinstance(first, int)
                else str(rest[0] if rest else first)
            )
            made = complete(first, *rest, **options)
            calls.append((name, Path(path).name))
            return made

        monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="no /proc to ask for the names of open files"
)
def test_the_old_ones_are_removed_only_after_the_new_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        checkpoint.write(make(step), tmp_path)
    calls = recorded(monkeypatch)
    new = checkpoint.write(make(4), tmp_path).name
    flushed, *rest = calls
    assert flushed[0] == "fsync" and flushed[1].startswith(f".{new}."), "its content"
    assert rest == [
        ("replace", new),
        ("fsync", checkpoint.FOLDER),
        ("unlink", "torch-float32-0000000001.safetensors"),
    ], "its name, then the old one"


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="no /proc to ask for the names of open files"
)
def test_new_folders_are_flushed_into_those_above_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)
    checkpoint.write(make(), tmp_path / "deep" / "run")
    assert [name for call, name in calls if call == "fsync"][:3] == ["run", "deep", tmp_path.name]


def test_the_first_checkpoint_of_a_run_may_stand_alone(tmp_path: Path) -> None:
    path = checkpoint.write(make(1), tmp_path)
    assert checkpoint.found(tmp_path, "torch-float32") == [path]
    assert checkpoint.found(tmp_path / "none", "torch-float32") == []


# --- Who may resume from it


def test_a_state_that_is_handed_over_is_the_same_but_for_who_has_it() -> None:
    mine = make(twin=1)
    theirs = checkpoint.for_backend(mine, "flax", "s2")
    assert (theirs.backend, theirs.source, theirs.stem) == ("flax", "s2", "flax-float32-twin1")
    assert bits(dataclasses.replace(theirs, backend="torch", source="s1")) == bits(mine)


def test_only_its_own_run_resumes_from_a_checkpoint() -> None:
    mine = make()
    right: Any = {"config": mine.config, "data": mine.data, "shapes": SHAPES, "source": "s1"}
    checkpoint.check(mine, **right)
    checkpoint.check(mine, **(right | {"shapes": None}))
    checkpoint.check(mine, **(right | {"data": mine.data | {"name": "elsewhere"}}))
    wrong = {
        "is of a run with another configuration": {"config": mine.config | {"lr": 1.0}},
        "is of a run on other data": {"data": mine.data | {"digest": "d2"}},
        "is of another network": {"shapes": SHAPES | {"fc1.bias": (3,)}},
        "is stale, the code has changed since": {"source": "s2"},
    }
    for said, change in wrong.items():
        with pytest.raises(RecordError) as caught:
            checkpoint.check(mine, **(right | change))
        assert str(caught.value) == (
            f"the checkpoint of torch-float32 after step 4 {said}: start the run again, in another folder (--out), or "
            "delete the folder's checkpoints"
        )


@pytest.mark.parametrize("group", ["parameters", "slots", "model_state"])
def test_a_state_is_finite_or_not(group: str) -> None:
    snapshot = make().snapshot
    assert checkpoint.is_finite(snapshot)
    for value in (math.nan, math.inf):
        worse: Any = {"fc1.bias": np.array([1, value], ml_dtypes.bfloat16)}
        worse = {"momentum": worse} if group == "slots" else worse
        assert not checkpoint.is_finite(snapshot._replace(**{group: worse}))


# --- When


@pytest.mark.parametrize(
    ("every", "before", "now", "due"),
    [
        (0, 0, 1000, False),
        (10, 0, 9, False),
        (10, 0, 10, True),
        (10, 9, 10, True),
        (10, 10, 11, False),
        (10, 10, 19, False),
        (10, 9, 31, True),
        (1, 0, 1, True),
        (10, 19, 20, True),
        (10, 20, 20, False),
    ],
)
def test_a_checkpoint_is_due_once_a_multiple_is_reached(
    every: int, before: int, now: int, due: bool
) -> None:
    assert CheckpointManager(Path(), every).should_save(before, now) is due


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the next call of this function of `os` be preceded by Ctrl-C."""

    def send(name: str) -> None:
        complete = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(os, name, complete)
            signal.raise_signal(signal.SIGINT)
            return complete(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    return send


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace", "unlink"])
@pytest.mark.parametrize("within", [True, False], ids=["in training", "elsewhere"])
def test_a_signal_while_a_checkpoint_is_kept_waits_until_it_is(
    tmp_path: Path,
    sent: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    call: str,
    within: bool,
) -> None:
    with SignalHandler() as signals:
        checkpoints = CheckpointManager(tmp_path, 1, signals)
        sent(call)
        with signals.deferred() if within else tempfile.TemporaryDirectory():
            checkpoints.save(make())
            assert checkpoints.stopping()
    assert checkpoints.last_path is not None
    assert bits(checkpoint.read(checkpoints.last_path)) == bits(make())
    assert capfd.readouterr().err == f"\n{interrupt.ANNOUNCEMENT}\n"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "no alarm rings later"
    assert names(tmp_path / checkpoint.FOLDER) == [checkpoints.last_path.name]


def test_an_alarm_that_comes_while_a_checkpoint_is_kept_waits_too(
    tmp_path: Path, sent: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "GRACE", 0.05)
    complete = os.fsync

    def slow(descriptor: int) -> None:
        complete(descriptor)
        deadline = os.times().elapsed + 0.3
        while os.times().elapsed < deadline:
            pass

    signals = SignalHandler()
    checkpoints = CheckpointManager(tmp_path, 1, signals)
    with signals, pytest.raises(KeyboardInterrupt), signals.deferred():
        sent("replace")
        monkeypatch.setattr(os, "fsync", slow)
        checkpoints.save(make())
        while True:  # as long as training takes to look: the alarm comes
            pass
    assert checkpoints.last_path is not None
    checkpoint.read(checkpoints.last_path)


def test_outside_of_training_a_signal_stops_at_once_and_says_which() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with SignalHandler() as signals:
            assert not signals.requested()
            assert signals.status() == 130
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            assert (signals.requested(), signals.status()) == (True, status)
            assert (
                signal.getsignal(signal.SIGTERM)
                == signal.getsignal(signal.SIGINT)
                == signal.SIG_DFL
            )
        assert signal.getsignal(signal.SIGTERM) == before


def test_in_a_thread_nobody_listens() -> None:
    import threading

    handlers = []

    def work() -> None:
        with SignalHandler() as signals, signals.deferred():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


# --- k + (N - k) steps are N steps


EVERY = range(1, kills.PIECES + 1)


@pytest.mark.parametrize(
    ("kind", "twin", "dtype", "stops"),
    [
        ("plateau", None, "float64", EVERY[::6]),
        pytest.param("plateau", None, "float64", EVERY, marks=pytest.mark.slow),
        pytest.param("cosine", 1, "float32", EVERY[::4], marks=pytest.mark.slow),
        pytest.param("step", 1, "bfloat16", EVERY[::6], marks=pytest.mark.slow),
    ],
    ids=["float64", "float64, every k", "float32, a twin", "bfloat16, a twin"],
)
def test_k_steps_and_then_the_rest_are_all_steps(
    tmp_path: Path,
    digits: Dataset,
    build: Callable,
    name: str,
    kind: str,
    twin: int | None,
    dtype: str,
    stops: range,
) -> None:  # the others: tests.robustness.kills
    config = kills.small(kind).resolve(len(digits.train_images))
    backend = build(name, config, dtype)
    assert kills.pieces(backend, config, digits, dtype, tmp_path, twin, stops=stops) == {}


@pytest.mark.slow
def test_adamw_is_resumed_bit_by_bit(
    tmp_path: Path, digits: Dataset, build: Callable, name: str
) -> None:
    config = Config(
        optimizer="adamw", batch_size=4, steps=kills.PIECES, weight_decay=0.01,
        decay_biases_and_norms=False, schedule=Schedule("cosine"),
    ).resolve(len(digits.train_images))  # fmt: skip
    backend = build(name, config, "float64")
    assert kills.pieces(backend, config, digits, "float64", tmp_path, None, stops=EVERY[::4]) == {}


def no_momentum(found: Checkpoint) -> Checkpoint:
    slots = {
        slot: {name: np.zeros_like(array) for name, array in arrays.items()}
        for slot, arrays in found.snapshot.slots.items()
    }
    return dataclasses.replace(found, snapshot=found.snapshot._replace(slots=slots))


def other_rounding(found: Checkpoint) -> Checkpoint:
    return dataclasses.replace(
        found, perturbation_rng_state=dict(image_perturbation_rng(1, 1).bit_generator.state)
    )


def no_counters(found: Checkpoint) -> Checkpoint:
    counters = {"best": math.inf, "bad": 0.0, "cooldown": 0.0, "count": 0.0, "mean": 0.0}
    return dataclasses.replace(
        found, snapshot=found.snapshot._replace(schedule=found.snapshot.schedule | counters)
    )


def one_bit(found: Checkpoint) -> Checkpoint:
    parameters = {name: array.copy() for name, array in found.snapshot.parameters.items()}
    array = parameters["conv1.kernel"]
    array.flat[0] = np.nextafter(array.flat[0], np.inf, dtype=array.dtype)
    return dataclasses.replace(found, snapshot=found.snapshot._replace(parameters=parameters))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (no_momentum, "loss"),
        (other_rounding, "final"),
        (no_counters, "lr"),
        (one_bit, "final"),
    ],  # losses may stay
    ids=["no momentum", "a twin's rounding from the start", "no counters", "one bit of a weight"],
)
def test_a_resume_that_forgets_something_is_seen(
    tmp_path: Path, digits: Dataset, build: Callable, name: str, change: Callable, field: str
) -> None:
    config = kills.small("plateau").resolve(len(digits.train_images))
    unlike = kills.pieces(
        build(name, config, "float64"),
        config,
        digits,
        "float64",
        tmp_path,
        twin=1,
        changed=change,
        stops=range(5, 6),
    )
    assert field in unlike[5]


def test_a_checkpoint_inside_a_chunk_is_refused(
    tmp_path: Path, digits: Dataset, observer: SilentObserver
) -> None:
    config = Config(batch_size=4, steps=12).resolve(len(digits.train_images))
    backend = backends.load("torch")(config, 10, "float64", "cpu", "off")
    checkpoints = CheckpointManager(tmp_path, 0, stopping=lambda: observer.steps >= 2)
    with pytest.raises(KeyboardInterrupt):
        training.train(backend, config, digits, "float64", observer, checkpoints=checkpoints)
    assert checkpoints.last_path is not None
    start = checkpoint.read(checkpoints.last_path)
    training.train(backend, config, digits, "float64", observer, start=start)
    series: dict[str, np.ndarray] = {name: np.ones(3) for name in ("loss", "gradient_norm", "lr")}
    series["batch_digests"] = np.ones(3, np.int64)
    moved = dataclasses.replace(start, snapshot=start.snapshot._replace(step=3), **series)
    with pytest.raises(RecordError, match="is not between two chunks: delete it"):
        training.train(backend, config, digits, "float64", observer, start=moved)


# --- run.json


CONFIG = Config(batch_size=4, steps=12, momentum=0.9).resolve(100)
REQUEST = RunRequest(
    recipe="quick", config=CONFIG.to_json(), dtypes=("float64", "float32"), twins=2, backend="both", data="digits",
    digest="d1", device="auto", compile="off", checkpoint_every=5, weights=None,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"weights": "a.npz"}, {"backend": "flax", "dtypes": ("float32",)}, {"data": "猫\n"}],
)
def test_a_run_request_is_read_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    request.write(mine := dataclasses.replace(REQUEST, **changes), tmp_path / "new")
    assert request.read(tmp_path / "new") == mine
    assert (mine.to_recipe().config, mine.to_recipe().dtypes, mine.to_recipe().twins) == (
        CONFIG,
        mine.dtypes,
        mine.twins,
    )


def rewritten_request(
    folder: Path, change: Callable[[dict[str, Any]], Any], digest: str | None = None
) -> None:
    """Another run.json, with the digest that belongs to it."""
    request.write(REQUEST, folder)
    facts = json.loads((folder / request.FILE).read_text())
    del facts["sha256"]
    change(facts)
    text = json.dumps(facts, sort_keys=True).encode()
    (folder / request.FILE).write_text(
        json.dumps(facts | {"sha256": digest or hashlib.sha256(text).hexdigest()})
    )


def test_the_run_request_that_these_refusals_vary_is_itself_one(tmp_path: Path) -> None:
    rewritten_request(tmp_path, lambda facts: None)
    assert request.read(tmp_path) == REQUEST


REFUSALS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("types", lambda facts: facts.update(data=3)),
    ("types", lambda facts: facts.update(weights=3)),
    ("types", lambda facts: facts.update(digest=None)),
    ("recipe", lambda facts: facts.update(recipe="slow")),
    ("dtypes", lambda facts: facts.update(dtypes=[])),
    ("dtypes", lambda facts: facts.update(dtypes=["float16"])),
    ("dtypes", lambda facts: facts.update(dtypes=["float64", "float64"])),
    ("TypeError", lambda facts: facts.update(dtypes=3)),
    ("TypeError", lambda facts: facts.update(dtypes=[["float64"]])),
    ("twins", lambda facts: facts.update(twins=-1)),
    ("twins", lambda facts: facts.update(twins=1.0)),
    ("twins", lambda facts: facts.update(twins=True)),
    ("backend", lambda facts: facts.update(backend="keras")),
    ("device", lambda facts: facts.update(device="tpu")),
    ("compile", lambda facts: facts.update(compile="yes")),
    ("checkpoint_every", lambda facts: facts.update(checkpoint_every=-1)),
    ("checkpoint_every", lambda facts: facts.update(checkpoint_every=None)),
    ("ConfigError", lambda facts: facts.update(config={})),
    ("ConfigError", lambda facts: facts["config"].update(lr="0.1")),
    ("ConfigError", lambda facts: facts["config"].update(novelty=1)),
    ("ConfigError", lambda facts: facts["config"].update(momentum=-1.0)),
    ("TypeError", lambda facts: facts.update(novelty=1)),
    ("TypeError", lambda facts: facts.pop("digest")),
    ("KeyError", lambda facts: facts.pop("dtypes")),
    ("KeyError", lambda facts: facts.pop("schema")),
]


@pytest.mark.parametrize(
    ("said", "change"), REFUSALS, ids=[f"{n} {said}" for n, (said, _) in enumerate(REFUSALS)]
)
def test_a_run_request_with_a_right_digest_and_wrong_contents_is_refused(
    tmp_path: Path, said: str, change: Callable[..., Any]
) -> None:
    rewritten_request(tmp_path, change)
    with pytest.raises(RecordError) as caught:
        request.read(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path / request.FILE} cannot be used ({said}): start the run again"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[]", "(AttributeError|TypeError)"),
        (b"3", "AttributeError"),
        (b"[" * 100_000, "RecursionError"),
        (b" " * (request.MAX_BYTES + 1), "ValueError"),
    ],
    ids=["empty", "no text", "a list", "a number", "deep", "large"],
)
def test_a_file_that_is_no_run_request_is_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / request.FILE).write_bytes(content)
    with pytest.raises(RecordError, match=rf"cannot be used \({said}\): start the run again"):
        request.read(tmp_path)


def test_a_changed_run_request_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    rewritten_request(tmp_path, lambda facts: None, digest="0" * 64)
    with pytest.raises(RecordError, match="is damaged"):
        request.read(tmp_path)
    rewritten_request(tmp_path, lambda facts: facts.update(schema=2))
    with pytest.raises(RecordError, match="another version"):
        request.read(tmp_path)


def test_a_folder_without_run_json_holds_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            RecordError, match=r"holds no run \(run.json is missing\): name the folder of a run"
        ):
            request.read(folder)
