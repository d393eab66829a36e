"""The known faults: what the catalogue says of each, and that the verdict finds one of every
stage."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

from lockstep.backends import faults
from lockstep.backends.faults import FAULTS, QUICK, Fault, inject
from lockstep.common.config import MODELS, Config
from lockstep.common.data import Dataset
from lockstep.common.errors import ConfigError
from lockstep.common.evidence import fault_summary
from lockstep.common.evidence import faults as matrix
from lockstep.common.evidence.faults import Row
from lockstep.common.evidence.plots import draw_faults
from lockstep.common.protocol import STAGES
from tests.marks import slow_except

pytestmark = pytest.mark.usefixtures("quickly_compiled")
REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = [fault.name for fault in FAULTS]
LAYER_PAIRS = [f"lockstep.backends.faults.layer_pairs:{name}" for name in ("TAGGER", "PAINTER")]
ONE_OF_EACH_FILE = {fault.apply.__module__: fault.name for fault in FAULTS}.values()
nothing = Fault(
    "nothing", "Nothing is wrong.", "data", None, "", lambda *_: None, {}, None, False, False, None
)


def short(fault: Fault, steps: int = 3) -> Fault:
    """The fault in a run of so few steps that each is a call of one compiled program."""
    return dataclasses.replace(fault, options={**fault.options, "steps": steps, "batch_size": 8})


@pytest.fixture(scope="module")
def cache() -> matrix.Cache:
    """PyTorch's runs, which all faults share."""
    return matrix.Cache()


@pytest.fixture(scope="module")
def few(digits: Dataset) -> Dataset:
    return digits.first_test_images(100)


@pytest.fixture
def rows() -> list[Row]:
    """Two faults as `measure` would report them: one located in float64 only, one in the wrong
    stage."""
    seen: dict[str, Any] = {
        "caught": True,
        "step": 1,
        "stage": "update",
        "tensor": "lr",
        "gap": 2e-3,
        "bound": 1e-6,
    }
    seen |= {
        "gap_over_bound": 2e3,
        "stage_right": True,
        "tensor_right": True,
        "trajectory_agrees": False,
    }
    missed: dict[str, Any] = dict.fromkeys(
        ("step", "stage", "tensor", "gap", "bound", "gap_over_bound")
    )
    missed |= {
        "caught": False,
        "stage_right": False,
        "tensor_right": False,
        "trajectory_agrees": True,
    }
    elsewhere = seen | {
        "stage": "loss",
        "stage_right": False,
        "tensor_right": False,
        "gap_over_bound": None,
    }
    shared: dict[str, Any] = {
        "sentence": "",
        "source": "",
        "stage": "update",
        "tensor": "lr",
        "changes_function": True,
        "lens": None,
    }
    return cast(
        list[Row],
        [
            {"name": "a", **shared, "lenses": {"float64": seen, "float32": missed}},
            {"name": "b", **shared, "lenses": {"float64": elsewhere, "float32": seen}},
            {
                "name": "c",
                **shared | {"lens": "float32"},
                "lenses": {"float64": missed, "float32": missed},
            },
        ],
    )


# --- The catalogue


def test_there_are_many_faults_and_at_least_one_of_every_stage() -> None:
    assert len(FAULTS) >= 44
    assert {fault.stage for fault in FAULTS} == set(STAGES)
    ranks = [STAGES.index(fault.stage) for fault in FAULTS]
    assert ranks == sorted(ranks)


def test_no_two_faults_have_the_same_name_or_description() -> None:
    assert len(set(NAMES)) == len({fault.description for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_every_fault_says_what_it_is_and_where_it_is_documented(fault: Fault) -> None:
    assert fault.name == fault.name.lower().replace("_", "-").replace(" ", "-")
    assert len(fault.name) <= 27  # so that the table has 80 columns
    assert fault.description.endswith(".") and "\n" not in fault.description
    assert fault.source
    assert fault.precision in (None, *matrix.PRECISIONS)


@pytest.mark.parametrize("images", [1437, 50_000], ids=["digits", "cifar10"])
@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_every_fault_has_a_run_in_which_it_can_show(fault: Fault, images: int) -> None:
    images = fault.train_images or images
    config = matrix.config_of(fault, images)
    assert (40 if config.model == "net" else 10) <= config.total_steps <= 90
    assert fault.train_images is None or config.total_steps > config.batches_per_epoch(images)


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_a_fault_of_a_slow_network_is_given_a_short_run_of_small_batches(fault: Fault) -> None:
    config = matrix.config_of(fault, 50_000)
    assert (
        config.model == "net" or config.total_steps * config.batch_size <= 100
    )  # net: 40 steps of 32 images


def test_every_network_with_layers_of_its_own_has_faults_of_its_own() -> None:
    models = {fault.options.get("model", "net") for fault in FAULTS}
    assert models & set(MODELS) == set(MODELS) - {"mlp"}


def test_a_fault_is_found_by_its_name_and_an_unknown_one_is_refused() -> None:
    assert faults.named("flatten-order").stage == "forward"
    with pytest.raises(ConfigError, match=r"did you mean flatten-order.*faults --list names all"):
        faults.named("flaten-order")


def test_the_quick_choice_has_one_fault_of_each_stage() -> None:
    assert [faults.named(name).stage for name in QUICK] == list(STAGES)


def test_no_framework_is_imported_before_a_fault_is_applied() -> None:
    program = "import sys, lockstep.backends.faults; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    modules = set(process.stdout.split())
    assert "lockstep.backends.faults" in modules
    assert not modules & {"torch", "jax", "jaxlib", "flax", "optax"}


# --- In and out


def attributes() -> dict[tuple[str, str], Any]:
    """Everything that a fault may replace: what lies in the modules and classes that
    `lockstep.backends.faults` patches."""
    modules = [
        "jax",
        "jax.lax",
        "optax",
        "optax.tree",
        "flax.nnx",
        "lockstep.backends.faults.layer_pairs",
        "lockstep.common.data.augment",
        "lockstep.common.runs.training",
    ]
    modules += [
        f"lockstep.backends.flax_backend.{name}"
        for name in ("backend", "convert", "inputs", "layers", "losses", "optimizer")
    ]
    modules += [
        f"lockstep.backends.flax_backend.models.{name}"
        for name in ("net", "resnet20", "convnext", "vit")
    ]
    found: dict[str, Any] = {module: importlib.import_module(module) for module in modules}
    classes = {
        "backend": "FlaxBackend",
        "layers": "Dropout",
        "inputs": "Inputs",
        "models.net": "Net",
        "models.resnet20": "Block",
        "models.vit": "Attention",
    }
    for module, name in classes.items():
        found[f"{module}.{name}"] = getattr(found[f"lockstep.backends.flax_backend.{module}"], name)
    for name in ("GRUCell", "OptimizedLSTMCell"):
        found[f"nnx.{name}"] = getattr(found["flax.nnx"], name)
    return {
        (place, name): value
        for place, holder in found.items()
        for name, value in vars(holder).items()
    }


@pytest.mark.parametrize("name", slow_except(NAMES, *ONE_OF_EACH_FILE))
def test_a_fault_is_put_in_and_taken_out_whole(name: str, digits: Dataset) -> None:
    fault, before = faults.named(name), attributes()
    labels, images = digits.train_labels.copy(), digits.train_images.copy()
    with inject(fault, matrix.config_of(fault, len(digits.train_images)), digits):
        within = attributes()
    assert any(within.get(key) is not value for key, value in before.items())
    after = attributes()
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())
    np.testing.assert_array_equal(digits.train_labels, labels)
    np.testing.assert_array_equal(digits.train_images, images)


def test_a_fault_is_taken_out_when_what_it_was_put_in_for_fails(digits: Dataset) -> None:
    before = attributes()
    fault = faults.named("x64-left-off")  # of three patches
    with pytest.raises(ZeroDivisionError), inject(fault, matrix.config_of(fault, 1437), digits):
        raise ZeroDivisionError
    assert all(attributes()[key] is value for key, value in before.items())


# --- The matrix


@pytest.mark.parametrize("name", slow_except(QUICK, "classes-moved"))
def test_a_fault_of_each_stage_is_caught_and_named_in_both_precisions(
    name: str, few: Dataset, build: Callable, cache: matrix.Cache
) -> None:
    row = matrix.measure(short(faults.named(name)), few, build, inject, cache)
    assert row["lenses"].keys() == {"float64", "float32"}
    for finding in row["lenses"].values():
        assert finding["caught"] and finding["stage_right"] and finding["tensor_right"]
        assert finding["gap_over_bound"] is None or finding["gap_over_bound"] > 1
    if row["stage"] == "evaluate":
        assert all(finding["trajectory_agrees"] for finding in row["lenses"].values())


@pytest.mark.parametrize(
    "name",
    slow_except(["batch-norm-momentum", "evaluated-in-train-mode", "keys-for-queries"]),
)
def test_a_fault_of_another_network_is_caught_and_named(
    name: str, few: Dataset, build: Callable, cache: matrix.Cache
) -> None:
    row = matrix.measure(
        short(faults.named(name)), few, build, inject, cache, precisions=("float64",)
    )
    finding = row["lenses"]["float64"]
    assert finding["caught"] and finding["stage_right"] and finding["tensor_right"]
    assert finding["trajectory_agrees"] == (row["stage"] != "forward")


@pytest.mark.parametrize("model", slow_except(["resnet20", "vit", *LAYER_PAIRS]))
def test_without_a_fault_nothing_is_caught_in_another_network(
    model: str, few: Dataset, build: Callable, cache: matrix.Cache
) -> None:
    fault = dataclasses.replace(nothing, options={"model": model})
    finding = matrix.measure(short(fault), few, build, inject, cache, precisions=("float64",))[
        "lenses"
    ]["float64"]
    assert not finding["caught"] and finding["trajectory_agrees"]


def test_without_a_fault_nothing_is_caught(
    few: Dataset, build: Callable, cache: matrix.Cache
) -> None:
    row = matrix.measure(short(nothing), few, build, inject, cache)
    for finding in row["lenses"].values():
        assert not finding["caught"] and finding["trajectory_agrees"]
        assert finding["stage"] is finding["gap_over_bound"] is None


def test_a_fault_of_one_precision_is_not_seen_in_the_other(
    few: Dataset, build: Callable, cache: matrix.Cache
) -> None:
    row = matrix.measure(short(faults.named("float32-inside")), few, build, inject, cache)
    assert row["lenses"]["float64"]["caught"]
    assert not row["lenses"]["float32"]["caught"]


def test_the_right_side_is_trained_once_for_all_faults_of_one_run(
    few: Dataset, build: Callable
) -> None:
    built: list[str] = []

    def counted(name: str, config: Config, dtype: str) -> Any:
        built.append(name)
        return build(name, config, dtype)

    cache = matrix.Cache()
    for name in ("zero-biases", "stopped-gradient"):
        matrix.measure(
            short(faults.named(name)), few, counted, inject, cache, precisions=("float64",)
        )
    assert built == ["torch", "flax", "flax"]


@pytest.mark.slow
def test_a_fault_at_the_end_of_an_epoch_is_given_a_short_epoch(
    few: Dataset, build: Callable
) -> None:
    fault = dataclasses.replace(
        faults.named("mean-over-padding"), train_images=60
    )  # batches of 8, and one of 4
    row = matrix.measure(
        short(fault, steps=12), few, build, inject, matrix.Cache(), precisions=("float64",)
    )
    finding = row["lenses"]["float64"]
    assert (finding["step"], finding["stage"], finding["tensor"]) == (7, "loss", "loss")


def test_the_summary_counts_what_each_precision_showed(rows: list[Row]) -> None:
    summary = fault_summary.summary(rows)
    assert (summary["faults"], summary["caught"], summary["missed"]) == (3, 2, ["c"])
    assert summary["stage_right"] == summary["tensor_right"] == {"yes": 1, "of": 2}
    assert summary["lenses"]["float64"]["caught"] == {"yes": 2, "of": 2}
    assert summary["lenses"]["float32"]["caught"] == {"yes": 1, "of": 3}
    assert summary["lenses"]["float32"]["missed"] == ["a", "c"]
    assert fault_summary.sentence(summary) == (
        "2 of 3 known faults are found (float64: 2 of 2, float32: 1 of 3), 1 of 2 in the right "
        "stage, 1 of 2 in the right tensor. Missed: c."
    )


def test_a_fault_that_no_measured_precision_has_is_not_missed(rows: list[Row]) -> None:
    for row in rows:
        del row["lenses"]["float32"]
    summary = fault_summary.summary(rows)
    assert (summary["faults"], summary["caught"], summary["missed"]) == (2, 2, [])


def test_the_matrix_is_drawn(rows: list[Row], tmp_path: Path) -> None:
    draw_faults(rows, tmp_path / "faults.png")
    assert (tmp_path / "faults.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_marks_what_was_missed_and_what_was_found_elsewhere(
    rows: list[Row],
) -> None:
    columns, lines = fault_summary.table(rows)
    assert columns == ("fault", "lies in", "float64", "over>", "float32", "over>")
    assert lines[0] == ("a", "update", "1", "2e3", "missed", "")
    assert lines[1] == ("b", "update", "1 loss", "inf", "1", "2e3")
    assert lines[2] == ("c", "update", "none", "", "missed", "")


def framework_names(module: ModuleType) -> set[str]:
    """Names of `backends/faults/frameworks.py` that a module holds."""
    frameworks = importlib.import_module("lockstep.backends.faults.frameworks")
    return set(vars(module)) & set(frameworks.__all__)


def test_a_fault_writes_no_names_into_the_files_of_the_catalogue(digits: Dataset) -> None:
    for name in QUICK:
        fault = faults.named(name)
        with inject(fault, matrix.config_of(fault, len(digits.train_images)), digits):
            assert not framework_names(sys.modules[fault.apply.__module__]), name


def test_names_of_frameworks_in_a_module_are_seen() -> None:
    module = ModuleType("made")
    assert not framework_names(module)
    module.__dict__["jnp"] = None
    assert framework_names(module) == {"jnp"}


def test_the_faults_that_no_rule_was_set_with_are_those_of_one_file() -> None:
    held_out = [fault for fault in FAULTS if fault.held_out]
    assert {"clipped-by-value", "z-loss", "evaluated-mirrored"} <= {f.name for f in held_out}
    assert {fault.stage for fault in held_out} == set(STAGES) - {"weights"}
    assert len(FAULTS) >= 125
