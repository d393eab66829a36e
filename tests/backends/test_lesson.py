"""The lesson's two programs: each runs alone, and they train the same network in the same way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lockstep.backends.flax_backend import convert as flax_convert
from lockstep.backends.lesson import flax_train, torch_train
from lockstep.backends.torch_backend import convert as torch_convert
from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Backend, Snapshot

ROOT = Path(__file__).resolve().parents[2]
LESSON = ROOT / "backends" / "lesson"
STEPS = 50
BOUND = 1e-13  # measured 8.9e-16, on losses of 2.4; the control: 1.3e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch_train", "flax_train"])
def test_a_program_of_the_lesson_runs_alone(name: str, tmp_path: Path) -> None:
    """From another folder, without an installed package; on the digits, as no data is given."""
    environment = {key: value for key, value in os.environ.items() if key != "LOCKSTEP_DATA"}
    shown = subprocess.run(
        [sys.executable, str(LESSON / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout.splitlines()
    assert [line.partition(" on:")[0] for line in shown] == [
        f"digits, steps {step}" for step in ("0", "500", "1,000", "1,500")
    ]
    first, *_, last = (float(line.rpartition(" ")[2]) for line in shown)
    assert last < 0.5 * first  # it learns


@pytest.mark.slow
def test_both_programs_have_the_losses_of_the_backends_from_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., Backend]
) -> None:
    jax.config.update("jax_enable_x64", True)
    dataset = data.load("digits")
    config = Config(
        steps=STEPS,
        batch_size=torch_train.BATCH_SIZE,
        lr=torch_train.LEARNING_RATE,
        momentum=torch_train.MOMENTUM,
        seed=torch_train.SEED,
    ).resolve(len(dataset.train_labels))
    backends = {name: build(name, config, "float64") for name in BACKENDS}
    weights = initial_weights(backends["torch"].shapes(), 0, "float64")
    indices = np.stack(list(data.batch_indices(config, len(dataset.train_labels))))
    images = data.normalise(dataset.train_images[indices], np.dtype("float64"))

    def losses_of(name: str) -> np.ndarray:
        """The backend's."""
        state = backends[name].init(Snapshot.start(weights))
        _, metrics = backends[name].train_steps(state, images, dataset.train_labels[indices])
        return np.asarray(metrics.loss)

    ours, theirs = torch_train.Net(10).double(), flax_train.Net(10, nnx.Rngs(0))
    torch_convert.attach_names(ours, {}, {"fc1": (16, 5, 5)})

    def torch_losses() -> np.ndarray:
        ours.load_state_dict(torch_convert.from_canonical(ours, weights))
        return np.array(torch_train.train(ours, dataset, STEPS, "float64"))

    def flax_losses() -> np.ndarray:
        nnx.update(theirs, flax_convert.nest(flax_convert.from_canonical(weights)))
        return np.array(flax_train.train(theirs, dataset, STEPS, "float64"))

    lessons = {"torch": torch_losses, "flax": flax_losses}
    expected = losses_of("torch")
    assert expected.shape == (STEPS,)
    assert np.abs(losses_of("flax") - expected).max() <= BOUND
    for losses in lessons.values():
        assert np.abs(losses() - expected).max() <= BOUND
    for program, name in ((torch_train, "torch"), (flax_train, "flax")):  # the control
        monkeypatch.setattr(program, "MOMENTUM", 0.89)
        assert np.abs(lessons[name]() - expected).max() > 1e-4


def definitions(name: str) -> list[str]:
    body = ast.parse((LESSON / f"{name}.py").read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def lines_of_code(name: str) -> int:
    """Without blank lines, docstrings and what is imported."""
    source = (LESSON / f"{name}.py").read_text(encoding="utf-8")
    words = ("import ", "from ", '"""', "sys.path")
    lines = [line.strip() for line in source[source.index("from __future__") :].splitlines()]
    return len([line for line in lines if line and not line.startswith(words)])


def test_the_two_programs_have_the_same_definitions_in_about_sixty_lines_each() -> None:
    torch_names, flax_names = definitions("torch_train"), definitions("flax_train")
    assert torch_names == flax_names == ["Net", "train_step", "train", "batches"]
    assert torch_names != definitions("__init__")  # control
    assert abs(lines_of_code("torch_train") - lines_of_code("flax_train")) <= 3
    assert max(map(lines_of_code, ("torch_train", "flax_train"))) <= 60
