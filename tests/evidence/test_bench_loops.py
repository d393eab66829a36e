"""The loops whose speed is measured: they train as they should, and the timer counts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep import backends
from lockstep.backends.benchmark import loops, tutorial
from lockstep.common.data import Dataset
from lockstep.common.evidence import bench_report
from lockstep.common.evidence.bench import PRODUCTS
from lockstep.common.runs import chunks as chunking


def plain_losses(net: torch.nn.Module, dataset: Dataset, lr: float) -> list[float]:
    """Of three steps on all of the first images, without anything of the project's."""
    images = (
        torch.from_numpy((dataset.train_images[:IMAGES] / 255 - 0.5) / 0.5)
        .float()
        .permute(0, 3, 1, 2)
    )
    labels = torch.from_numpy(dataset.train_labels[:IMAGES])
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


IMAGES = 48  # all in one batch, so that their order does not matter


@pytest.mark.parametrize("kind", ["tutorial", "eager"])
def test_the_loops_compared_with_train_as_torch_does(kind: str, digits: Dataset) -> None:
    torch.manual_seed(0)
    given = (digits.train_images[:IMAGES], digits.train_labels[:IMAGES], 10, IMAGES)
    loop = (
        tutorial.TutorialLoop(*given, workers=0)
        if kind == "tutorial"
        else tutorial.InMemoryLoop(*given)
    )
    same, other = (copy.deepcopy(loop.net) for _ in range(2))
    losses = []
    for done in itertools.islice(loop.steps(), 3):
        assert done == loops.Progress(steps=1, images=IMAGES)
        losses.append(loop.loss.item())
    assert losses == pytest.approx(plain_losses(same, digits, 0.001), rel=1e-5)
    assert losses != pytest.approx(plain_losses(other, digits, 0.002), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_loops_compared_with_stay_in_the_precision_that_is_asked_for(
    dtype: str, digits: Dataset
) -> None:
    given = (digits.train_images[:8], digits.train_labels[:8], 10, 4, dtype)
    for loop in (tutorial.TutorialLoop(*given, workers=0), tutorial.InMemoryLoop(*given)):
        assert [done.images for done in itertools.islice(loop.steps(), 3)] == [4, 4, 4]
        assert loop.loss.dtype == getattr(torch, dtype)


def test_an_epoch_of_the_loops_ends_with_a_smaller_batch_as_the_tutorials_does(
    digits: Dataset,
) -> None:
    given = (digits.train_images[:10], digits.train_labels[:10], 10, 4)
    for loop in (tutorial.TutorialLoop(*given, workers=0), tutorial.InMemoryLoop(*given)):
        assert [done.images for done in itertools.islice(loop.steps(), 4)] == [4, 4, 2, 4]


@pytest.fixture
def job(digits: Dataset, tmp_path: Path) -> loops.BenchmarkJob:
    loops.write_images(digits.train_images, digits.train_labels, tmp_path)
    return loops.BenchmarkJob("eager", 16, 100, 10, "float32", "cpu", seed=3, folder=tmp_path)


def test_a_worker_reads_the_first_images(job: loops.BenchmarkJob, digits: Dataset) -> None:
    images, labels = loops.read_images(job)
    assert np.array_equal(images, digits.train_images[:100]) and np.array_equal(
        labels, digits.train_labels[:100]
    )


@pytest.mark.slow
def test_fused_and_single_steps_are_the_same_training(
    job: loops.BenchmarkJob, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `train` has it: two chunks of one step, then long ones. What is compiled in PyTorch has
    tests of its own."""
    cls: Any = backends.load(name)
    monkeypatch.setattr(backends, "load", lambda name: lambda *given: cls(*given[:-1], "off"))
    losses = []
    for path in (name, f"{name} fused"):
        loop = loops.make_loop(dataclasses.replace(job, path=path, batch_size=4, dtype="float64"))
        assert isinstance(loop, loops.Training)
        done = [*itertools.islice(loop.steps(), loop.compile_calls)]
        *first, steps = (call.steps for call in done)
        assert first == [1, 1] and 50 < steps <= chunking.CHUNK_STEPS
        assert [call.images for call in done] == [4, 4, 4 * steps]
        losses.append(loop.losses)
        assert loop.losses.shape == (steps,)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][0] != losses[0][1]


def test_the_timer_counts_whole_calls_for_at_least_so_long(job: loops.BenchmarkJob) -> None:
    timer = loops.Timer(job)
    assert timer.compile()["steps"] == 1
    found = timer.run(0.05)
    assert found["seconds"] >= 0.05 and found["steps"] > 1
    assert 4 * found["images"] == pytest.approx(4 * 16 * found["steps"], rel=0.2), (
        "epochs end with a batch of 4"
    )
    facts = timer.describe()
    assert facts["loader"] is None and facts["flops_per_image"] is None
    assert facts["memory"] > 50e6


@pytest.mark.parametrize("path", PRODUCTS)
def test_a_product_is_one_of_two_large_matrices(
    path: str, job: loops.BenchmarkJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loops.SIZE == bench_report.PRODUCT_SIZE
    monkeypatch.setattr(loops, "SIZE", 8)
    loop = loops.make_loop(dataclasses.replace(job, path=path, dtype="float64"))
    assert isinstance(loop, loops.TorchProduct | loops.FlaxProduct)
    assert next(loop.steps()) == loops.Progress(steps=1, images=0)
    one, other = np.asarray(loop.matrices)
    assert np.asarray(loop.product) == pytest.approx(one @ other, rel=1e-12)
    assert loop.product.dtype == loop.matrices.dtype and "64" in str(loop.product.dtype)
