"""What recording costs a training script.

    python -m tests.recorder.overhead [--turns 5] [--steps 400] [--out results/overhead]

Trains an MLP of nine layers in PyTorch and in JAX, on batches of 64 images of 3 x 32 x 32, by itself
and recorded, in turns. The time of the calls `run.batch` and `run.step` is taken in the same process
as that of the step between them. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

import lockstep
from lockstep.common.recorder.launch import AT_ONCE, run_script
from lockstep.common.recorder.script import find
from lockstep.common.recorder.script_process import MALLOC, child_environment
from lockstep.common.recorder.settings import Settings
from lockstep.common.report import write_json
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.system import environment

if TYPE_CHECKING:
    import jax

    Params = list[jax.Array]

Made = dict[str, object]  # what `Run.step` is given
BATCH, WIDTH, LAYERS, CLASSES = 64, 128, 8, 10
PIXELS = (3, 32, 32)
WARM_UP = 50  # steps that do not count
STEP = 5e-3  # seconds: a step that the cost is compared with


class Row(NamedTuple):
    """The medians of one run."""

    framework: str
    recorded: bool
    turn: int
    step_us: float  # microseconds, without the calls of `run`
    calls_us: float  # of `run.batch` and `run.step`
    first_steps_ms: float  # all of the first steps, calls included


def train_torch(run: lockstep.Run, steps: int) -> list[tuple[float, float]]:
    import torch
    from torch import nn

    hidden = [
        m
        for _ in range(LAYERS - 1)
        for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())
    ]
    first = nn.Linear(int(np.prod(PIXELS)), WIDTH)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), *hidden, nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.begin(model, optimizer)

    def step(x: torch.Tensor, y: torch.Tensor) -> Made:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    images, labels = batch()
    return timed(run, steps, step, torch.tensor(images), torch.tensor(labels))


def train_jax(run: lockstep.Run, steps: int) -> list[tuple[float, float]]:
    import jax
    import jax.numpy as jnp
    import optax

    sizes = [int(np.prod(PIXELS)), *[WIDTH] * LAYERS, CLASSES]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        jax.random.normal(key, (n, m)) / n**0.5
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]
    params = run.begin(params)
    optimizer = optax.adamw(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def update(
        params: Params, state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array, Params]:
        def mean_loss(params: Params) -> jax.Array:
            x_ = x.reshape(len(x), -1)
            for kernel in params[:-1]:
                x_ = jax.nn.relu(x_ @ kernel)
            return optax.softmax_cross_entropy_with_integer_labels(x_ @ params[-1], y).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return cast("Params", optax.apply_updates(params, updates)), state, loss, grads

    def step(x: jax.Array, y: jax.Array) -> Made:
        nonlocal params, state
        params, state, loss, grads = jax.block_until_ready(update(params, state, x, y))
        return {"loss": loss, "params": params, "grads": grads, "opt_state": state}

    images, labels = batch()
    return timed(run, steps, step, jnp.asarray(images), jnp.asarray(labels))


TRAIN = {"torch": train_torch, "jax": train_jax}


def batch() -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(0)
    images = draws.standard_normal((BATCH, *PIXELS)).astype(np.float32)
    return images, draws.integers(0, CLASSES, BATCH)


def timed(
    run: lockstep.Run, steps: int, step: Callable[..., Made], *arrays: object
) -> list[tuple[float, float]]:
    """Seconds of each step without the calls of `run`, and of these calls."""
    found: list[tuple[float, float]] = []
    for _ in range(steps):
        times = [time.perf_counter()]
        given = run.batch(*arrays)
        times.append(time.perf_counter())
        made = step(*given)
        times.append(time.perf_counter())
        run.step(**made)
        times.append(time.perf_counter())
        found.append((times[2] - times[1], times[3] - times[2] + times[1] - times[0]))
    run.finish()
    return found


def worker() -> None:
    """One run, as a script: `overhead.py:worker FRAMEWORK STEPS OUT`."""
    framework, steps, out = sys.argv[1:]
    Path(out).write_text(json.dumps(TRAIN[framework](lockstep.Run(), int(steps))))


def run_once(framework: str, steps: int, recorded: bool, turn: int, folder: Path) -> Row:
    out = folder / "times.json"
    arguments = [framework, str(steps), str(out)]
    if recorded:
        script = find(f"{Path(__file__).resolve()}:worker")
        run_script(script, arguments, Settings(str(folder / "a.safetensors"), "overhead.py"))
    else:
        code = "from tests.recorder import overhead; overhead.worker()"
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, env=plain_environment(), check=True)
    times = json.loads(out.read_text())
    later = times[WARM_UP:]
    return Row(
        framework,
        recorded,
        turn,
        step_us=1e6 * statistics.median(step for step, _ in later),
        calls_us=1e6 * statistics.median(calls for _, calls in later),
        first_steps_ms=1e3 * sum(map(sum, times[:FIRST_STEPS])),
    )


def plain_environment() -> dict[str, str]:
    """As many threads as in a recorded run, and what the user's own shell has besides."""
    recorded = child_environment(AT_ONCE)
    return {
        name: value for name, value in recorded.items() if name not in MALLOC.keys() - os.environ
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("results/overhead"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for framework in TRAIN:
                for recorded in (False, True):
                    rows.append(run_once(framework, options.steps, recorded, turn, Path(folder)))
                    print(rows[-1], flush=True)
    report = {
        "schema": 1,
        "command": ["python", "-m", "tests.recorder.overhead", *sys.argv[1:]],
        "environment": environment.describe(),
        "step": STEP,
        "summary": summary(rows),
        "rows": [row._asdict() for row in rows],
    }
    write_json(report, options.out)
    return 0


def summary(rows: list[Row]) -> list[dict[str, object]]:
    """For each framework, the medians of the turns."""

    def median(framework: str, recorded: bool, key: str) -> float:
        chosen = [row for row in rows if (row.framework, row.recorded) == (framework, recorded)]
        return statistics.median(getattr(row, key) for row in chosen)

    return [
        {
            "framework": framework,
            "step_us": median(framework, True, "step_us"),
            "step_alone_us": median(framework, False, "step_us"),
            "calls_us": median(framework, True, "calls_us"),
            "calls_alone_us": median(framework, False, "calls_us"),
            "share_of_step": median(framework, True, "calls_us") / (1e6 * STEP),
            "first_steps_ms": median(framework, True, "first_steps_ms"),
            "first_steps_alone_ms": median(framework, False, "first_steps_ms"),
        }
        for framework in TRAIN
    ]


if __name__ == "__main__":
    sys.exit(main())
