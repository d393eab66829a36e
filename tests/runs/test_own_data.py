"""Pairs of any inputs, outputs and losses are trained and compared as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep import Config, load_backend, load_data, same_run
from lockstep import cli as compare
from lockstep.common.data.arrays import of_arrays
from lockstep.common.data.dataset import IGNORED, Dataset, label_count
from lockstep.common.errors import DataError, LockstepError
from lockstep.common.protocol import Backend
from lockstep.common.runs import record

EXAMPLES = Path(__file__).parents[1] / "model" / "examples.py"
ADAMW = ["--optimizer", "adamw", "--lr", "0.01", "--batch-size", "8", "--quiet"]


def numbers(folder: Path, **other: Any) -> Path:
    """An archive of a regression."""
    drawn = np.random.default_rng(0)
    x, slope = drawn.standard_normal((60, 5)), drawn.standard_normal(5)
    arrays: dict[str, Any] = {
        "x_train": x[:40],
        "y_train": x[:40] @ slope,
        "x_test": x[40:],
        "y_test": x[40:] @ slope,
    }
    path = folder / "numbers.npz"
    np.savez(path, **arrays | other)
    return path


@pytest.mark.slow
def test_a_regression_is_trained_from_an_archive_and_shown_without_classes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = ["--model", f"{EXAMPLES}:REGRESSION", "--data", str(numbers(tmp_path)), "--steps", "12"]
    assert compare.main([*run, *ADAMW, "--twins", "1", "--out", str(out)]) == 0
    for found in json.loads((out / "report.json").read_text())["lenses"]:
        # float64: losses within 2.2e-16, outputs within 3.3e-16
        assert found["verdict"] == "agree" and found["predictions_equal"] is None
        assert set(found["accuracy"].values()) == {None}
    assert not (out / "classes.png").exists() and not (out / "samples.png").exists()
    page = (out / "report.html").read_text()
    assert "Outputs for the test data are within" in page
    assert "per class" not in page and "nats" not in page and "cross entropy" not in page
    kept = record.read(out / "torch-float64.safetensors")
    assert (kept.predictions.dtype, kept.predictions.shape) == (np.float64, (20, 1))
    before = (out / "report.html").read_bytes()
    assert compare.main(["report", str(out)]) == 0  # from its records
    assert (out / "report.html").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong", "stage"),
    [
        ("MASKED", "UNMASKED", "loss"),
        ("TWO", "WEIGHED", "loss"),
        ("REGRESSION", "STEEPER", "forward"),
    ],
)
def test_a_pair_agrees_in_a_users_test_and_its_control_is_located(
    name: str, wrong: str, stage: str, tmp_path: Path
) -> None:
    def built(side: str, name: str) -> tuple[Backend, Config, Dataset]:
        model = f"{EXAMPLES}:{name}"
        path = str(numbers(tmp_path)) if name in ("REGRESSION", "STEEPER") else "auto"
        dataset = load_data(path, announce=lambda line: None, model=model)
        config = Config(model=model, steps=4, batch_size=8, lr=0.05, momentum=0.9)
        config = config.resolve(len(dataset.train_images))
        return load_backend(side)(config, dataset.task, "float64", "cpu"), config, dataset

    original, config, dataset = built("torch", name)
    assert same_run(original, built("flax", name)[0], dataset, config)  # gaps: 1.8e-15 at most
    found = same_run(original, built("flax", wrong)[0], dataset, config)
    assert not found and found.first_divergence is not None
    assert found.first_divergence.stage == stage


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("MASKED", 0), ("UNMASKED", 1)])
def test_tokens_agree_in_mixed_precision_with_adam_where_no_twin_moved_what_is_computed(
    name: str, status: int, tmp_path: Path
) -> None:
    options = ["--optimizer", "adamw", "--lr", "0.01", "--dtype", "mixed_bfloat16", "--quiet"]
    options += ["--steps", "50", "--batch-size", "8", "--out", str(tmp_path)]
    assert compare.main(["--model", f"{EXAMPLES}:{name}", *options]) == status


# --- Arrays

FLOATS = np.arange(6.0)
ARRAYS = {"x_train": FLOATS, "y_train": FLOATS, "x_test": FLOATS, "y_test": FLOATS}


def refused(labelled: bool = False, **other: Any) -> str:
    with pytest.raises(DataError) as error:
        of_arrays("data", "FILE", ARRAYS | other, labelled)
    return str(error.value)


def test_arrays_that_are_no_data_are_refused_with_the_remedy() -> None:
    assert refused(x_train=np.array(["a", "b"])) == (
        "FILE: x_train is <U1 (2,): give numbers of two samples or more"
    )
    assert "no array" in refused(x_train=[[1.0], [1.0, 2.0]])
    assert "y_test is float64 (1,): give numbers of two" in refused(y_test=FLOATS[:1])
    assert "x_test has 3 samples and y_test 6: give as many" in refused(x_test=FLOATS[:3])
    assert "x_train has numbers that are not finite" in refused(
        x_train=np.append(FLOATS[:5], np.nan)
    )
    assert "x_train is float64 (6,), and x_test float64 (6, 1)" in refused(x_test=FLOATS[:, None])
    assert "x_train is float64 (6,), and x_test int64 (6,)" in refused(x_test=np.arange(6))
    assert "a cross entropy of integers: name another loss" in refused(labelled=True)
    labels = np.arange(6)
    assert "labels must lie between 0 and 9999" in refused(True, y_train=labels - 1, y_test=labels)
    rows = labels.reshape(3, 2)
    short: dict[str, Any] = {"x_train": FLOATS[:3], "x_test": FLOATS[:3]}
    assert "or -100 where there is none" in refused(True, y_train=rows - 1, y_test=rows, **short)
    none = np.full((3, 2), IGNORED)
    assert "need some each" in refused(True, y_train=none, y_test=rows, **short)


def test_the_number_of_classes_may_be_larger_than_the_labels_show() -> None:
    labels = np.arange(6)
    given = ARRAYS | {"y_train": labels, "y_test": labels}
    found = of_arrays("data", "FILE", given, True, 10)
    assert found.task.classes == 10 and found.classes == tuple("0123456789")
    assert of_arrays("data", "FILE", given, True).task.classes == 6  # the control
    assert of_arrays("data", "FILE", ARRAYS, False, 4).task.classes == 4
    with pytest.raises(DataError, match="must lie between 0 and 3: number the classes from 0"):
        of_arrays("data", "FILE", given, True, 4)
    names = {"classes": np.array(["a", "b", "c", "d", "e", "f"])}
    with pytest.raises(DataError, match="it names 6 classes, and the pair says 7: make them equal"):
        of_arrays("data", "FILE", given | names, True, 7)
    rows = {key: of.reshape(3, 2) for key, of in given.items()}
    with pytest.raises(DataError, match="there are 5 classes, and a label of 5"):
        of_arrays("data", "FILE", rows, True, 5)
    assert of_arrays("data", "FILE", rows, True, 9).task.classes == 9


def test_arrays_keep_what_they_are() -> None:
    pictures = np.zeros((4, 28, 28, 1), np.uint8)
    labels = np.array([[0], [2], [1], [0]], np.int32)
    given = {"x_train": pictures, "y_train": labels, "x_test": pictures, "y_test": labels}
    found = of_arrays("data", "FILE", given, labelled=True)
    assert found.classes == ("0", "1", "2") and found.train_labels.shape == (4,)
    assert found.has_pictures and found.task.classes == 3
    assert found.train_images.dtype == np.uint8 and found.train_labels.dtype == np.int64
    numbers = of_arrays("data", "FILE", given, labelled=False)  # another loss: targets, as they are
    assert numbers.classes == () and numbers.train_labels.shape == (4, 1)
    assert numbers.task.classes == 3
    tokens = of_arrays("data", "FILE", given | {"x_train": labels, "x_test": labels}, True)
    assert tokens.train_images.dtype == np.int64 and not tokens.has_pictures
    half = np.zeros((4, 2), np.float16)
    floats = of_arrays("data", "FILE", dict.fromkeys(given, half), labelled=False)
    assert floats.train_images.dtype == floats.train_labels.dtype == np.float32
    assert len({each.digest for each in (found, numbers, tokens, floats)}) == 4


def test_the_weight_of_a_batch_is_that_of_its_labels() -> None:
    assert label_count(np.array([[1, IGNORED, 2], [IGNORED] * 3])) == 2
    assert label_count(np.array([1, 2, 3])) == 3
    assert label_count(np.zeros((4, 5))) == 4


def test_a_cross_entropy_leaves_out_what_has_no_label() -> None:
    import jax.numpy as jnp
    import torch

    from lockstep.backends.flax_backend.losses import cross_entropy_of_each as in_flax
    from lockstep.backends.torch_backend.losses import cross_entropy_of_each as in_torch

    logits = np.random.default_rng(0).standard_normal((3, 4, 5))
    labels = np.array([[0, 1, 2, IGNORED], [4, IGNORED, IGNORED, IGNORED], [IGNORED] * 4])
    one = in_torch(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    other = float(in_flax(jnp.asarray(logits), jnp.asarray(labels)))
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = -np.mean([scores[0, 0, 0], scores[0, 1, 1], scores[0, 2, 2], scores[1, 0, 4]])
    assert abs(one - right) < 1e-14 and abs(other - right) < 1e-6  # float32 without x64: 1.2e-7


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("REGRESSION", ["--data", "digits"], "torch cannot take images (2, 3, 32, 32)"),
        ("MASKED", ["--augment", "crop-flip"], "--augment crop-flip is for images, uint8"),
        (
            "MASKED",
            ["--label-smoothing", "0.1"],
            "--label-smoothing is of the cross entropy of one",
        ),
        (
            "TWO",
            ["--batch-size", "99"],
            "--batch-size 99 is larger than the data: choose 8 or less",
        ),
    ],
)
def test_what_a_pair_cannot_be_trained_with_is_refused_in_one_line(
    name: str, options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--model", f"{EXAMPLES}:{name}", "--out", str(tmp_path / "run"), *ADAMW, *options]
    assert compare.main(run) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1


def test_data_that_were_loaded_for_another_loss_are_refused() -> None:
    with pytest.raises(LockstepError, match=r"load_data\(\.\.\., model="):
        model = f"{EXAMPLES}:REGRESSION"
        dataset = load_data("digits")
        config = Config(model=model, steps=1).resolve(len(dataset.train_images))
        from lockstep.common.evidence import train_ensemble

        class Stub:
            name = "torch"

        backend: Any = Stub()
        train_ensemble(backend, config, dataset, "float64", 0)
